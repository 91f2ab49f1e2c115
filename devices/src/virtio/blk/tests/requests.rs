//! Requests by themselves: what they may be, and what is answered.

use proptest::prelude::*;

use super::request::{self, Disk};
use super::*;
use crate::virtio::device::Fault;
use crate::virtio::iobuf::GuestByte;
use crate::virtio::queue::Chain;

#[test]
fn what_is_written_can_be_read_and_is_in_the_file() {
    let mut harness = started(disk());
    let bytes: Vec<u8> = (0..3 * SECTOR).map(|i| i as u8 ^ (i >> 8) as u8).collect();
    assert_eq!(ask(&mut harness, OUT, 5, &bytes, 0), only_status(OK));
    assert_eq!(on_file(&harness, 5, 3), bytes);
    assert_eq!(on_file(&harness, 4, 1), [fill(4); 512]);
    assert_eq!(on_file(&harness, 8, 1), [fill(8); 512]);
    let answer = ask(&mut harness, IN, 5, &[], 3 * 512);
    assert_eq!(answer, Answer { status: OK, written: 3 * 512 + 1, data: bytes });
    let last = ask(&mut harness, IN, SECTORS - 1, &[], 512);
    assert_eq!((last.status, last.data), (OK, vec![fill(SECTORS - 1); 512]));
}

#[test]
fn what_is_not_a_whole_range_of_the_disk_is_an_error() {
    let mut harness = started(disk());
    let cases = [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (1 << 55, 512),
        (0, 511),
        (0, 513),
        (0, 1),
        (0, 0),
        (0, SECTORS as u32 * 512 + 512),
    ];
    for (sector, len) in cases {
        let read = ask(&mut harness, IN, sector, &[], len);
        let nothing = Answer { status: IO_ERROR, written: 1, data: vec![0; len as usize] };
        assert_eq!(read, nothing, "read of {len} at {sector}");
        let write = ask(&mut harness, OUT, sector, &vec![9; len as usize], 0);
        assert_eq!(write, only_status(IO_ERROR), "write of {len} at {sector}");
    }
    assert_eq!(on_file(&harness, 0, 1), [fill(0); 512]);
    assert_eq!(harness.device().1.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
    assert!(harness.take_fault().is_none(), "the request fails, not the device");
}

#[test]
fn a_request_longer_than_a_used_entry_can_tell_is_an_error() {
    // 4 GiB of references to one buffer, on a disk that has as much.
    let mut memory = vec![0u8; 16 << 20];
    for (count, expected) in [(255, true), (256, false)] {
        let mut chain = Chain::default();
        let mut header = header(IN, 0);
        chain.readable.push(header.as_mut_ptr(), 16);
        for _ in 0..count {
            chain.writable.push(memory.as_mut_ptr(), 16 << 20);
        }
        let mut status = [0];
        chain.writable.push(status.as_mut_ptr(), 1);
        let disk = Disk { len: 1 << 40, read_only: false };
        let (_, kind): (GuestByte, _) = request::parse(&mut chain, disk).unwrap();
        assert_eq!(kind.is_ok(), expected, "{count} buffers: {kind:?}");
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut harness = started(disk());
    for kind in [2, 3, 5, 7, 10, 12, 14, 15, 18, 26, 1 << 31, u32::MAX] {
        let answer = ask(&mut harness, kind, 0, &[], 512);
        assert_eq!((answer.status, answer.written), (UNSUPPORTED, 1), "type {kind}");
    }
    assert!(harness.take_fault().is_none());
}

#[test]
fn the_id_has_twenty_bytes() {
    let mut harness = started(disk());
    let answer = ask(&mut harness, GET_ID, 0, &[], 20);
    assert_eq!((answer.status, answer.written), (OK, 21));
    assert_eq!(answer.data, b"a disk\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(ask(&mut harness, GET_ID, 0, &[], 19).status, IO_ERROR);
    let roomy = ask(&mut harness, GET_ID, 0, &[], 40);
    assert_eq!((roomy.written, &roomy.data[20..]), (21, [0; 20].as_slice()));

    let image = image();
    let file = DiskFile::open(image.path(), true, false).unwrap();
    let id = "exactly twenty bytes, and more".to_owned();
    let block = Block::new(Options { disk: file.into(), cache: Cache::Writeback, id, queues: 1 });
    let mut harness = started((block, image));
    assert_eq!(ask(&mut harness, GET_ID, 0, &[], 20).data, b"exactly twenty bytes");
}

#[test]
fn a_read_only_disk_refuses_what_would_change_it() {
    let mut harness = started(disk_with(Cache::Writeback, true, 1));
    let range = segment(0, 1, 0);
    for (kind, data) in [(OUT, vec![9; 512]), (DISCARD, range.clone()), (WRITE_ZEROES, range)] {
        assert_eq!(ask(&mut harness, kind, 0, &data, 0), only_status(IO_ERROR), "type {kind}");
    }
    assert_eq!(ask(&mut harness, IN, 0, &[], 512).data, [fill(0); 512]);
    assert_eq!(on_file(&harness, 0, 1), [fill(0); 512]);
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut harness = started(disk());
    // § 2.7.4.2: header byte by byte, data in uneven pieces, status beside data.
    let (head, _) = harness.readable(&header(IN, 6));
    let (room, _) = harness.writable(1025);
    let mut buffers: Vec<Buffer> = (0..16).map(|i| (head + i, 1, false)).collect();
    buffers.extend([(room, 1, true), (room + 1, 600, true), (room + 601, 424, true)]);
    assert_eq!(harness.request(0, &buffers), Some(1025));
    let bytes = harness.read(room, 1025);
    assert_eq!(
        (&bytes[..512], &bytes[512..1024]),
        ([fill(6); 512].as_slice(), &[fill(7); 512][..])
    );
    assert_eq!(bytes[1024], OK);
    // Header and data in one buffer, and the rest of the data in another.
    let (head, _) = harness.readable(&[header(OUT, 6), vec![0x11; 100]].concat());
    let (rest, _) = harness.readable(&[0x22; 412]);
    let (status, _) = harness.readable(&[UNTOUCHED]);
    let buffers = [(head, 116, false), (rest, 412, false), (status, 1, true)];
    assert_eq!(harness.request(0, &buffers), Some(1));
    assert_eq!(on_file(&harness, 6, 1), [[0x11; 100].as_slice(), &[0x22; 412]].concat());
}

#[test]
fn a_request_that_cannot_be_answered_is_the_drivers_fault() {
    let mut harness = Harness::new(disk());
    type Chains = fn(&mut Harness<Subject>) -> Vec<Buffer>;
    let cases: [Chains; 4] = [
        |harness| {
            let (gpa, _) = harness.readable(&header(IN, 0));
            vec![(gpa, 15, false), (gpa + 64, 1, true)]
        },
        |harness| {
            let (gpa, _) = harness.readable(&header(FLUSH, 0));
            vec![(gpa, 16, false)]
        },
        |harness| vec![(harness.writable(600).0, 600, true)],
        |harness| {
            let (gpa, _) = harness.readable(&header(OUT, 0));
            vec![(gpa, 16, false), (gpa, 512, false)]
        },
    ];
    for (number, case) in cases.into_iter().enumerate() {
        harness.activate();
        let buffers = case(&mut harness);
        assert_eq!(harness.request(0, &buffers), Some(0), "case {number}: it is given back");
        assert!(matches!(harness.take_fault(), Some(Fault::Request(0, _))), "case {number}");
        harness.reset();
    }
    harness.activate();
    assert_eq!(ask(&mut harness, IN, 0, &[], 512).status, OK);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(40) })]

    /// Whatever is read, written and zeroed in whatever order, the disk is an array of bytes.
    #[test]
    fn behaves_like_an_array_of_bytes(
        steps in proptest::collection::vec((0u8..4, 0..SECTORS + 2, 0u64..9, any::<u8>()), 1..60),
        writethrough in any::<bool>())
    {
        let cache = if writethrough { Cache::Writethrough } else { Cache::Writeback };
        let mut harness = started(disk_with(cache, false, 1));
        let mut model: Vec<u8> =
            (0..SECTORS).flat_map(|sector| [fill(sector); SECTOR as usize]).collect();
        for (step, sector, count, byte) in steps {
            let fits = count > 0 && sector + count <= SECTORS;
            let range = (sector * SECTOR) as usize..((sector + count) * SECTOR) as usize;
            let len = range.len();
            let status = match step {
                0 => {
                    let answer = ask(&mut harness, IN, sector, &[], len as u32);
                    if fits {
                        prop_assert_eq!(&answer.data, &model[range]);
                    }
                    answer.status
                }
                1 => {
                    if fits {
                        model[range].fill(byte);
                    }
                    ask(&mut harness, OUT, sector, &vec![byte; len], 0).status
                }
                _ => {
                    if fits {
                        model[range].fill(0);
                    }
                    let flags = u32::from(byte) & UNMAP;
                    let range = segment(sector, count as u32, flags);
                    ask(&mut harness, WRITE_ZEROES, 0, &range, 0).status
                }
            };
            prop_assert_eq!(status == OK, fits);
        }
        prop_assert_eq!(on_file(&harness, 0, SECTORS), model);
    }
}
