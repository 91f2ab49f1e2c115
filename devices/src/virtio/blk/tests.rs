use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use tempfile::NamedTempFile;

use super::request::{self, Disk};
use super::*;
use crate::golden;
use crate::virtio::conformance::{Buffer, Harness, Probe, conformance};
use crate::virtio::device::{Action, Fault};
use crate::virtio::features::{EVENT_IDX, VERSION_1};
use crate::virtio::iobuf::GuestByte;
use crate::virtio::mmio::reg;
use crate::virtio::queue::{Chain, INTERRUPT_CONFIG};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What a status byte holds that nobody wrote.
const UNTOUCHED: u8 = 0xee;

const SECTORS: u64 = 64;

/// A disk of [`SECTORS`] sectors and the file behind it.
type Subject = (Block, NamedTempFile);

/// The byte that fills sector `sector` of a new disk: never 0.
fn fill(sector: u64) -> u8 {
    sector as u8 + 1
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [fill(sector); SECTOR as usize]).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

fn disk_with(cache: Cache, read_only: bool, queues: u16) -> Subject {
    let image = image();
    let file = DiskFile::open(image.path(), read_only, false).unwrap();
    (Block::new(Options { disk: file.into(), cache, id: "a disk".into(), queues }), image)
}

fn disk() -> Subject {
    disk_with(Cache::Writeback, false, 1)
}

fn started(subject: Subject) -> Harness<Subject> {
    let mut harness = Harness::new(subject);
    harness.activate();
    harness
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A request in guest memory.
struct Request {
    buffers: Vec<Buffer>,
    room: (u64, u32),
    status: u64,
}

/// What the driver is told.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    /// Bytes that the device says it wrote, status byte included.
    written: u32,
    data: Vec<u8>,
}

impl Request {
    /// A request that carries `data` and has room for `room` bytes.
    fn new<D: Device>(
        harness: &mut Harness<D>,
        kind: u32,
        sector: u64,
        data: &[u8],
        room: u32,
    ) -> Request {
        let (head, len) = harness.readable(&header(kind, sector));
        let mut buffers = vec![(head, len, false)];
        if !data.is_empty() {
            let (gpa, len) = harness.readable(data);
            buffers.push((gpa, len, false));
        }
        let room = harness.writable(room);
        if room.1 > 0 {
            buffers.push((room.0, room.1, true));
        }
        let (status, _) = harness.readable(&[UNTOUCHED]);
        buffers.push((status, 1, true));
        Request { buffers, room, status }
    }

    fn answer<D: Device>(&self, harness: &Harness<D>, written: u32) -> Answer {
        let status = harness.read(self.status, 1)[0];
        Answer { status, written, data: harness.read(self.room.0, self.room.1) }
    }
}

/// Makes a request and waits for its end.
fn ask_queue<D: Device>(
    harness: &mut Harness<D>,
    queue: u16,
    (kind, sector): (u32, u64),
    data: &[u8],
    room: u32,
) -> Answer {
    let request = Request::new(harness, kind, sector, data, room);
    let written = harness.request(queue, &request.buffers).expect("no answer");
    request.answer(harness, written)
}

fn ask<D: Device>(
    harness: &mut Harness<D>,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> Answer {
    ask_queue(harness, 0, (kind, sector), data, room)
}

/// Starts a request and leaves its file operation waiting.
fn begin(
    harness: &mut Harness<Subject>,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> Request {
    harness.hold_operations(true);
    let request = Request::new(harness, kind, sector, data, room);
    harness.offer(0, &request.buffers);
    harness.kick(0);
    harness.run();
    request
}

/// The answer to `request`, if there is one.
fn answer_to(harness: &mut Harness<Subject>, request: &Request) -> Option<Answer> {
    let (_, written) = harness.used(0)?;
    Some(request.answer(harness, written))
}

fn only_status(status: u8) -> Answer {
    Answer { status, written: 1, data: Vec::new() }
}

fn on_file(harness: &Harness<Subject>, sector: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; (count * SECTOR) as usize];
    let file = File::open(harness.device().1.path()).unwrap();
    file.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
    bytes
}

/// Reads that the page cache answers.
mod reads {
    use super::*;

    fn probe() -> Probe<Subject> {
        Probe {
            request: |harness| Request::new(harness, IN, 7, &[], SECTOR as u32).buffers,
            check: |_, written| assert_eq!(written, SECTOR as u32 + 1),
            ..Probe::default()
        }
    }

    conformance!(disk, probe());

    mod limited {
        use super::*;

        /// With limits that only have to be asked.
        fn limited() -> Subject {
            let mut subject = disk();
            subject.0.set_limit(limiter(Some(1 << 40), Some(1 << 40)));
            subject
        }

        conformance!(limited, probe());
    }
}

/// Flushes, which are always file operations, on the second queue of two.
mod flushes {
    use super::*;

    fn probe() -> Probe<Subject> {
        Probe {
            queue: 1,
            request: |harness| Request::new(harness, FLUSH, 0, &[], 0).buffers,
            check: |_, written| assert_eq!(written, 1),
            ..Probe::default()
        }
    }

    conformance!(|| disk_with(Cache::Writeback, false, 2), probe());
}

/// Writes, which are file operations where the file system cannot take them at once.
mod writes {
    use super::*;

    fn probe() -> Probe<Subject> {
        Probe {
            request: |harness| Request::new(harness, OUT, 9, &[0xaa; SECTOR as usize], 0).buffers,
            check: |harness, written| {
                assert_eq!(written, 1);
                assert_eq!(on_file(harness, 9, 1), [0xaa; SECTOR as usize]);
            },
            ..Probe::default()
        }
    }

    conformance!(disk, probe());
}

/// An empty qcow2 image, whose requests are all calls away from the io thread.
mod on_an_image {
    use super::*;
    use crate::virtio::blk::qcow2::{self, Access, Qcow2};

    fn image(cache: Cache, queues: u16) -> Subject {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&qcow2::tests::empty(SECTORS * SECTOR), 0).unwrap();
        let disk = Qcow2::open(file.path(), Access::default()).unwrap();
        let id = "an image".into();
        (Block::new(Options { disk: disk.into(), cache, id, queues }), file)
    }

    fn writes() -> Probe<Subject> {
        Probe {
            request: |harness| Request::new(harness, OUT, 9, &[0xaa; SECTOR as usize], 0).buffers,
            check: |_, written| assert_eq!(written, 1),
            ..Probe::default()
        }
    }

    fn flushes() -> Probe<Subject> {
        Probe {
            queue: 1,
            request: |harness| Request::new(harness, FLUSH, 0, &[], 0).buffers,
            check: |_, written| assert_eq!(written, 1),
            ..Probe::default()
        }
    }

    mod write {
        use super::*;
        conformance!(|| image(Cache::Writeback, 1), writes());
    }

    mod through {
        use super::*;
        conformance!(|| image(Cache::Writethrough, 1), writes());
    }

    mod flush {
        use super::*;
        conformance!(|| image(Cache::Writeback, 2), flushes());
    }

    #[test]
    fn requests_are_calls_and_are_counted() {
        let mut harness = started(image(Cache::Writeback, 1));
        let request = begin(&mut harness, OUT, 9, &[0xaa; SECTOR as usize], 0);
        assert!(matches!(harness.oldest_operation().unwrap().action, Action::Call(_)));
        assert_eq!(answer_to(&mut harness, &request), None);
        harness.finish_operation();
        assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
        harness.hold_operations(false);
        let read = ask(&mut harness, IN, 9, &[], SECTOR as u32);
        assert_eq!((read.status, &read.data[..]), (OK, &[0xaa; SECTOR as usize][..]));
        let discard = segment(8, 4, 0);
        assert_eq!(ask(&mut harness, DISCARD, 0, &discard, 0), only_status(OK));
        assert_eq!(ask(&mut harness, FLUSH, 0, &[], 0), only_status(OK));
        let metrics = harness.device().0.metrics.clone();
        assert_eq!((metrics.read_count.get(), metrics.write_count.get()), (1, 1));
        assert_eq!((metrics.range_count.get(), metrics.flush_count.get()), (1, 1));
    }
}

#[test]
fn configuration_space_describes_the_disk() {
    let (block, _image) = disk_with(Cache::Writeback, false, 4);
    let config = block.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(word(12), 254, "seg_max: a queue of 256 less header and status");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(config[34..36], [4, 0], "num_queues");
    assert_eq!((word(36), word(40), word(44)), (32768, 16, 1), "discard");
    assert_eq!((word(48), word(52), config[56]), (32768, 16, 1), "write zeroes, may unmap");
    assert_eq!(block.queues(), [256; 4]);

    let (block, _image) = disk_with(Cache::Writethrough, false, 1);
    assert_eq!(block.config()[32], 0);
}

#[test]
fn features_follow_the_options() {
    let features = |read_only| disk_with(Cache::Writeback, read_only, 1).0.features();
    assert_eq!(features(false) & feature::RO, 0);
    let changing = feature::FLUSH | feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(features(false) & changing, changing);
    assert_eq!(features(true) & (feature::RO | changing), feature::RO);
}

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
fn a_flush_waits_for_the_file() {
    let mut harness = started(disk());
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    assert!(matches!(harness.oldest_operation().unwrap().action, Action::Sync));
    assert_eq!(answer_to(&mut harness, &request), None);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    harness.fail_operation(libc::EIO);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
}

#[test]
fn a_disk_alone_on_its_thread_writes_and_flushes_there() {
    let mut harness = started(disk());
    harness.set_alone(true);
    // The first may find out that the file system wants a thread that can wait.
    let write = begin(&mut harness, OUT, 2, &[0x5a; SECTOR as usize], 0);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &write), Some(only_status(OK)));
    let write = begin(&mut harness, OUT, 3, &[0x5a; SECTOR as usize], 0);
    assert_eq!(harness.operations(), 0);
    assert_eq!(answer_to(&mut harness, &write), Some(only_status(OK)));
    assert_eq!(on_file(&harness, 3, 1), [0x5a; SECTOR as usize]);
    // The write may have been slow, which makes the flush an operation.
    let flush = begin(&mut harness, FLUSH, 0, &[], 0);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &flush), Some(only_status(OK)));
}

#[test]
fn reads_that_wait_together_are_submitted_together() {
    let mut harness = started(disk());
    harness.hold_operations(true);
    let requests: Vec<Request> = (0..20)
        .map(|sector| {
            let request = Request::new(&mut harness, IN, sector, &[], SECTOR as u32);
            harness.offer(0, &request.buffers);
            request
        })
        .collect();
    harness.kick(0);
    harness.run();
    assert_eq!(harness.operations(), requests.len());
    harness.hold_operations(false);
    harness.run();
    assert_eq!(harness.operations(), 0);
    for (sector, request) in requests.iter().enumerate() {
        let answer = answer_to(&mut harness, request).unwrap();
        assert_eq!(answer.status, OK);
        assert_eq!(answer.data, on_file(&harness, sector as u64, 1));
    }
}

#[test]
fn a_flush_does_nothing_where_durability_is_not_wanted() {
    let mut harness = started(disk_with(Cache::Unsafe, false, 1));
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    assert_eq!(harness.operations(), 0);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    // Not even for a driver that cannot flush.
    harness.reset();
    harness.activate_with(VERSION_1);
    assert_eq!(durability_of_a_write(&mut harness), Some(false));
}

/// Whether a write waits for the disk; `None` if it was done from the page cache.
fn durability_of_a_write(harness: &mut Harness<Subject>) -> Option<bool> {
    let request = begin(harness, OUT, 0, &[7; 512], 0);
    let durable = harness.oldest_operation().map(|operation| match operation.action {
        Action::Write { durable, .. } => durable,
        ref other => panic!("a write led to {other:?}"),
    });
    harness.finish_operation();
    assert_eq!(answer_to(harness, &request), Some(only_status(OK)));
    durable
}

#[test]
fn writes_are_durable_when_they_have_to_be() {
    let mut harness = started(disk());
    assert_ne!(durability_of_a_write(&mut harness), Some(true));
    // The driver switches its cache off and on again.
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    assert!(harness.interrupt().status() & INTERRUPT_CONFIG != 0);
    assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, 0);
    assert_eq!(durability_of_a_write(&mut harness), Some(true));
    harness.write_bytes(reg::CONFIG + 32, &[1]);
    assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, 1);
    assert_ne!(durability_of_a_write(&mut harness), Some(true));
    // Without FLUSH there is no other way to durability.
    harness.reset();
    harness.activate_with(VERSION_1 | EVENT_IDX);
    assert_eq!(durability_of_a_write(&mut harness), Some(true));

    let mut harness = started(disk_with(Cache::Writethrough, false, 1));
    assert_eq!(durability_of_a_write(&mut harness), Some(true));
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let mut harness = started(disk());
    let before = harness.device().config();
    let refused: [(u64, &[u8]); 5] =
        [(32, &[2]), (32, &[0, 0]), (33, &[0]), (0, &[1, 0, 0, 0, 0, 0, 0, 0]), (34, &[9])];
    for (offset, data) in refused {
        harness.write_bytes(reg::CONFIG + offset, data);
        assert_eq!(harness.device().config(), before, "{data:?} at {offset}");
    }
    let mut harness = started(disk_with(Cache::Writeback, true, 1));
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    assert_eq!(harness.device().config()[32], 1);
}

#[test]
fn a_reset_forgets_the_drivers_choice() {
    for (cache, first) in [(Cache::Writeback, 1), (Cache::Writethrough, 0)] {
        let mut harness = started(disk_with(cache, false, 1));
        harness.write_bytes(reg::CONFIG + 32, &[1 - first]);
        assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, u32::from(1 - first));
        harness.reset();
        assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, u32::from(first));
        harness.activate();
        assert_eq!(durability_of_a_write(&mut harness) == Some(true), first == 0);
    }
}

#[test]
fn the_drivers_choice_is_saved() {
    let mut harness = started(disk());
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    let payload = harness.device().save();
    let (mut restored, _image) = disk();
    restored.restore(&payload).unwrap();
    assert_eq!(restored.config()[32], 0);
    let invalid = Payload { bytes: vec![2], ..payload };
    assert!(matches!(restored.restore(&invalid), Err(RestoreError::Invalid { .. })));
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
fn a_read_that_comes_in_pieces_goes_on_where_it_was() {
    let mut harness = started(disk());
    let bytes = on_file(&harness, 0, 4);
    let file = harness.device().1.reopen().unwrap();
    // What the file has not got cannot be read: each step finds one more sector.
    file.set_len(SECTOR).unwrap();
    let request = begin(&mut harness, IN, 0, &[], 4 * 512);
    for sector in 1..4 {
        assert_eq!(answer_to(&mut harness, &request), None);
        assert_eq!(harness.oldest_operation().unwrap().offset, sector * SECTOR);
        // Neither an interrupted call nor a busy one is an error.
        harness.fail_operation(if sector == 1 { libc::EINTR } else { libc::EAGAIN });
        assert_eq!(harness.oldest_operation().unwrap().offset, sector * SECTOR);
        let range = sector as usize * 512..(sector as usize + 1) * 512;
        file.write_all_at(&bytes[range], sector * SECTOR).unwrap();
        harness.finish_operation();
    }
    let expected = Answer { status: OK, written: 4 * 512 + 1, data: bytes };
    assert_eq!(answer_to(&mut harness, &request), Some(expected));
    assert_eq!(harness.operations(), 0);
}

#[test]
fn a_read_past_the_end_of_a_file_that_shrank_is_an_error() {
    let mut harness = started(disk());
    harness.device().1.as_file().set_len(SECTOR).unwrap();
    let answer = ask(&mut harness, IN, 0, &[], 1024);
    assert_eq!((answer.status, answer.written), (IO_ERROR, 513), "one sector came");
    assert_eq!(answer.data[..512], [fill(0); 512]);
    assert_eq!(ask(&mut harness, IN, 8, &[], 512).status, IO_ERROR);
    assert_eq!(ask(&mut harness, IN, 0, &[], 512).status, OK, "the disk goes on");
}

#[test]
fn an_error_of_the_file_is_an_error_of_the_request() {
    let mut harness = started(disk_with(Cache::Writethrough, false, 1));
    let request = begin(&mut harness, OUT, 0, &[9; 512], 0);
    harness.fail_operation(libc::ENOSPC);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
    let request = begin(&mut harness, OUT, 0, &[9; 512], 0);
    harness.fail_operation(libc::EAGAIN);
    assert_eq!(answer_to(&mut harness, &request), None);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    assert!(harness.take_fault().is_none());
}

/// The FALLOC_FL_* bits of the operation under way, or `None` if zeroes are written.
fn mode(harness: &Harness<Subject>) -> Option<i32> {
    match harness.oldest_operation().expect("nothing under way").action {
        Action::Allocate { mode, .. } => Some(mode & !libc::FALLOC_FL_KEEP_SIZE),
        Action::Write { .. } => None,
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn zeroes_are_written_by_the_best_way_that_works() {
    let (zero, punch) = (Some(libc::FALLOC_FL_ZERO_RANGE), Some(libc::FALLOC_FL_PUNCH_HOLE));
    let ladders = [(0, vec![zero, punch, None]), (UNMAP, vec![punch, None])];
    for (flags, ladder) in ladders {
        for refused in 0..ladder.len() {
            let mut harness = started(disk());
            let range = segment(3, 2, flags);
            let request = begin(&mut harness, WRITE_ZEROES, 0, &range, 0);
            for &step in &ladder[..refused] {
                assert_eq!(mode(&harness), step);
                harness.fail_operation(libc::EOPNOTSUPP);
            }
            assert_eq!(mode(&harness), ladder[refused]);
            assert_eq!(answer_to(&mut harness, &request), None);
            // The file system of a test may know some of the ways only.
            harness.hold_operations(false);
            harness.run();
            assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
            assert_eq!(on_file(&harness, 3, 2), [0; 1024]);
            assert_eq!(on_file(&harness, 2, 1), [fill(2); 512]);
            assert_eq!(on_file(&harness, 5, 1), [fill(5); 512]);
            // Other errors end the ladder.
            let request = begin(&mut harness, WRITE_ZEROES, 0, &segment(9, 1, flags), 0);
            for _ in 0..refused {
                harness.fail_operation(libc::EOPNOTSUPP);
            }
            harness.fail_operation(libc::EIO);
            assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
            assert_eq!(harness.operations(), 0);
        }
    }
}

#[test]
fn zeroes_are_durable_without_a_write_cache() {
    let mut harness = started(disk_with(Cache::Writethrough, false, 1));
    let ranges = [segment(1, 1, 0), segment(3, 1, 0)].concat();
    let request = begin(&mut harness, WRITE_ZEROES, 0, &ranges, 0);
    let mut last = None;
    while answer_to(&mut harness, &request).is_none() {
        let sync = matches!(harness.oldest_operation().unwrap().action, Action::Sync);
        last = Some(sync);
        harness.finish_operation();
    }
    assert_eq!(last, Some(true), "the answer came before the zeroes were on the disk");
    assert_eq!(on_file(&harness, 1, 1), [0; 512]);
    // A failed sync is a failed request.
    let request = begin(&mut harness, WRITE_ZEROES, 0, &ranges, 0);
    while !matches!(harness.oldest_operation().unwrap().action, Action::Sync) {
        harness.finish_operation();
    }
    harness.fail_operation(libc::EIO);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
}

#[test]
fn a_discard_gives_space_back_or_does_nothing() {
    let mut harness = started(disk());
    let before = harness.device().1.as_file().metadata().unwrap();
    let all = segment(0, SECTORS as u32, 0);
    let request = begin(&mut harness, DISCARD, 0, &all, 0);
    assert_eq!(mode(&harness), Some(libc::FALLOC_FL_PUNCH_HOLE));
    harness.fail_operation(libc::EOPNOTSUPP);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)), "it is advice");
    assert_eq!(on_file(&harness, 0, 1), [fill(0); 512]);
    let request = begin(&mut harness, DISCARD, 0, &all, 0);
    harness.fail_operation(libc::EIO);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
    harness.hold_operations(false);
    assert_eq!(ask(&mut harness, DISCARD, 0, &all, 0), only_status(OK));
    let after = harness.device().1.as_file().metadata().unwrap();
    assert_eq!(after.len(), before.len());
    assert!(after.blocks() < before.blocks(), "{} blocks", after.blocks());
}

#[test]
fn ranges_are_checked_before_any_is_touched() {
    let mut harness = started(disk());
    let good = segment(0, 1, 0);
    let most = 32768;
    let cases: Vec<(u32, Vec<u8>, u8)> = vec![
        (WRITE_ZEROES, segment(SECTORS, 1, 0), IO_ERROR),
        (WRITE_ZEROES, segment(SECTORS - 1, 2, 0), IO_ERROR),
        (WRITE_ZEROES, segment(u64::MAX, 1, 0), IO_ERROR),
        (WRITE_ZEROES, segment(0, 0, 0), IO_ERROR),
        (WRITE_ZEROES, segment(0, most + 1, 0), IO_ERROR),
        (WRITE_ZEROES, segment(0, 1, 2), UNSUPPORTED),
        (WRITE_ZEROES, segment(0, 1, u32::MAX), UNSUPPORTED),
        (DISCARD, segment(0, 1, UNMAP), UNSUPPORTED),
        (DISCARD, good[..15].to_vec(), IO_ERROR),
        (DISCARD, [good.clone(), vec![0]].concat(), IO_ERROR),
        (DISCARD, Vec::new(), IO_ERROR),
        (DISCARD, good.repeat(17), IO_ERROR),
        // The last of them is wrong, so none is done.
        (WRITE_ZEROES, [good.clone(), segment(SECTORS, 1, 0)].concat(), IO_ERROR),
        (DISCARD, [good.clone(), segment(0, 1, 4)].concat(), UNSUPPORTED),
    ];
    for (kind, data, status) in cases {
        let answer = ask(&mut harness, kind, 0, &data, 0);
        assert_eq!(answer, only_status(status), "type {kind} with {data:?}");
        assert_eq!(on_file(&harness, 0, 1), [fill(0); 512]);
    }
    let sixteen: Vec<u8> = (0..16).flat_map(|i| segment(i * 2, 1, 0)).collect();
    assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &sixteen, 0), only_status(OK));
    for sector in 0..32 {
        let expected = if sector % 2 == 0 { 0 } else { fill(sector) };
        assert_eq!(on_file(&harness, sector, 1), [expected; 512]);
    }
}

#[test]
fn the_longest_range_is_written_where_nothing_better_works() {
    let image = image();
    let len = 16 << 20;
    image.as_file().set_len(len + SECTOR).unwrap();
    for at in [0, len / 2, len - 1, len] {
        image.as_file().write_all_at(&[0xff], at).unwrap();
    }
    let file = DiskFile::open(image.path(), false, false).unwrap();
    let options =
        Options { disk: file.into(), cache: Cache::Writeback, id: String::new(), queues: 1 };
    let mut harness = started((Block::new(options), image));
    let request = begin(&mut harness, WRITE_ZEROES, 0, &segment(0, 32768, 0), 0);
    while mode(&harness).is_some() {
        harness.fail_operation(libc::EOPNOTSUPP);
    }
    harness.hold_operations(false);
    harness.run();
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    assert!(on_file(&harness, 0, 32768).iter().all(|&byte| byte == 0));
    assert_eq!(on_file(&harness, 32768, 1)[0], 0xff);
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

#[test]
fn each_queue_serves_its_own_requests() {
    let mut harness = started(disk_with(Cache::Writeback, false, 4));
    for queue in (0..4).rev() {
        let bytes = [0x40 + queue as u8; 512];
        let write = ask_queue(&mut harness, queue, (OUT, u64::from(queue)), &bytes, 0);
        assert_eq!(write, only_status(OK));
    }
    for queue in 0..4 {
        let sector = 3 - u64::from(queue);
        let answer = ask_queue(&mut harness, queue, (IN, sector), &[], 512);
        assert_eq!(answer.data, [0x40 + sector as u8; 512]);
    }
    // What one of them waits for holds up none of the others.
    harness.hold_operations(true);
    let slow = Request::new(&mut harness, FLUSH, 0, &[], 0);
    harness.offer(0, &slow.buffers);
    harness.kick(0);
    harness.run();
    assert_eq!(ask_queue(&mut harness, 1, (IN, 0), &[], 512).data, [0x40; 512]);
    assert_eq!(harness.used(0), None);
}

#[test]
fn requests_may_overtake_each_other() {
    let mut harness = started(disk());
    let slow = begin(&mut harness, FLUSH, 0, &[], 0);
    let fast = Request::new(&mut harness, GET_ID, 0, &[], 20);
    let fast_head = harness.offer(0, &fast.buffers);
    harness.kick(0);
    harness.run();
    assert_eq!(harness.used(0), Some((fast_head, 21)));
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &slow), Some(only_status(OK)));
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

fn open(path: &Path, read_only: bool) -> Result<DiskFile, OpenError> {
    DiskFile::open(path, read_only, false)
}

/// "rw" and "ro" for each way in which the file can be opened now.
fn openings(path: &Path) -> String {
    let mut text = String::new();
    for (read_only, name) in [(false, "rw "), (true, "ro ")] {
        match open(path, read_only) {
            Ok(_) => text.push_str(name),
            Err(OpenError::Locked { read_only: said, .. }) => assert_eq!(said, read_only),
            Err(other) => panic!("{other}"),
        }
    }
    text
}

/// Names the file to a copy of the test process.
const PATH_VARIABLE: &str = "HULL_TEST_LOCKED_DISK";

/// What [`openings`] says in another process.
fn openings_elsewhere(path: &Path) -> String {
    let name = "virtio::blk::tests::locks_keep_writers_apart";
    let output = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(PATH_VARIABLE, path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.split_once("possible: "));
    line.unwrap_or_else(|| panic!("{text}")).1.to_owned()
}

#[test]
fn locks_keep_writers_apart() {
    if let Some(path) = std::env::var_os(PATH_VARIABLE) {
        println!("\npossible: {}", openings(Path::new(&path)));
        return;
    }
    let image = image();
    let path = image.path();
    let both = |expected: &str| {
        assert_eq!(openings(path), expected, "in this process");
        assert_eq!(openings_elsewhere(path), expected, "in another process");
    };
    both("rw ro ");
    let writer = open(path, false).unwrap();
    both("");
    drop(writer);
    let reader = open(path, true).unwrap();
    both("ro ");
    let second = open(path, true).unwrap();
    drop(reader);
    both("ro ");
    drop(second);
    both("rw ro ");
    // The lock lasts as long as the device.
    let device = started(disk());
    assert_eq!(openings(device.device().1.path()), "");
}

#[test]
fn what_is_no_disk_is_refused_with_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, len: u64| {
        let path = folder.path().join(name);
        File::create(&path).unwrap().set_len(len).unwrap();
        path
    };
    let fifo = folder.path().join("fifo");
    let name = CString::new(fifo.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: the name is a valid C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let cases = BTreeMap::from([
        ("missing", folder.path().join("missing")),
        ("directory", folder.path().to_owned()),
        ("fifo", fifo),
        ("character device", "/dev/null".into()),
        ("size 0", file("empty", 0)),
        ("size 1", file("tiny", 1)),
        ("size 513", file("odd", 513)),
    ]);
    for (what, path) in cases {
        for read_only in [false, true] {
            let err = open(&path, read_only).expect_err(what);
            match (what, &err) {
                ("missing", OpenError::Open { source, .. }) => {
                    assert_eq!(source.kind(), io::ErrorKind::NotFound);
                }
                ("directory" | "fifo" | "character device", OpenError::Kind { .. }) => {}
                (_, OpenError::Size { size, block: 512, .. }) => {
                    assert_eq!(what, format!("size {size}"));
                }
                _ => panic!("{what}: {err}"),
            }
            assert!(err.to_string().contains(&path.display().to_string()), "{err}");
        }
    }
    let disk = open(&file("one", 512), false).unwrap();
    assert_eq!((disk.len(), disk.block_size(), disk.is_empty()), (512, 512, false));
}

/// A limiter that lets so many bytes and operations pass, and no more while a test runs.
fn limiter(bytes: Option<u64>, ops: Option<u64>) -> Option<RateLimiter> {
    use crate::rate::{Bucket, Limits};
    let bucket = |size| Bucket { size, one_time_burst: 0, refill_ms: 1 << 40 };
    let limits = Limits { bandwidth: bytes.map(bucket), ops: ops.map(bucket) };
    RateLimiter::new(limits, std::time::Instant::now())
}

fn limited(queues: u16, bytes: Option<u64>, ops: Option<u64>) -> Harness<Subject> {
    let mut subject = disk_with(Cache::Writeback, false, queues);
    subject.0.set_limit(limiter(bytes, ops));
    started(subject)
}

/// Offers a request in each of `queues` and says how many were answered.
fn served(
    harness: &mut Harness<Subject>,
    queues: &[u16],
    kind: u32,
    data: &[u8],
    room: u32,
) -> usize {
    for &queue in queues {
        let request = Request::new(harness, kind, 0, data, room);
        harness.offer(queue, &request.buffers);
        harness.kick(queue);
    }
    harness.run();
    answered(harness, queues)
}

fn answered(harness: &mut Harness<Subject>, queues: &[u16]) -> usize {
    queues.iter().map(|&queue| std::iter::from_fn(|| harness.used(queue)).count()).sum()
}

#[test]
fn bytes_are_limited_both_ways_and_a_flush_costs_none() {
    let mut harness = limited(1, Some(3 * SECTOR), None);
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 1);
    assert_eq!(served(&mut harness, &[0], OUT, &[7; 512], 0), 1);
    for _ in 0..10 {
        assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 1);
    }
    // One sector is left; the request is larger and passes.
    assert_eq!(served(&mut harness, &[0], IN, &[], 2048), 1);
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 0);
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 0, "requests are not overtaken");
}

#[test]
fn a_flush_is_an_operation() {
    let mut harness = limited(1, None, Some(2));
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 1);
    assert_eq!(served(&mut harness, &[0], IN, &[], 4096), 1);
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 0);
}

#[test]
fn all_queues_share_a_limit() {
    let mut harness = limited(3, None, Some(4));
    assert_eq!(served(&mut harness, &[0, 1, 2], IN, &[], 512), 3);
    assert_eq!(served(&mut harness, &[0, 1, 2], IN, &[], 512), 1);
}

#[test]
fn a_limited_disk_stops_resets_and_goes_on() {
    let mut harness = limited(1, None, Some(2));
    for _ in 0..3 {
        served(&mut harness, &[0], IN, &[], 512);
    }
    // What waits is neither lost nor served in a pause, and pauses do not fill the bucket.
    for _ in 0..3 {
        harness.pause();
        harness.resume();
        assert!(harness.run());
        assert!(harness.expire_timers());
        assert!(harness.run());
        assert_eq!(answered(&mut harness, &[0]), 0);
    }
    let message = Message::RateLimit(Traffic::All, limiter(None, Some(2)));
    harness.device_mut().update(&message);
    harness.message(&message);
    harness.run();
    assert_eq!(answered(&mut harness, &[0]), 1);
    assert_eq!(served(&mut harness, &[0, 0], IN, &[], 512), 1);
    harness.reset();
    harness.activate();
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 0, "a reset filled the bucket");
    let message = Message::RateLimit(Traffic::All, None);
    harness.device_mut().update(&message);
    harness.message(&message);
    harness.run();
    assert_eq!(answered(&mut harness, &[0]), 1);
    assert_eq!(served(&mut harness, &[0; 30], IN, &[], 512), 30);
}

#[test]
fn the_payload_is_as_it_was() {
    for (writeback, text) in [(0, "00"), (1, "01")] {
        let (mut block, _image) = disk();
        block.write_config(WRITEBACK_OFFSET as u64, &[writeback]);
        golden::check(&block.save(), "virtio-blk", 1, text, |payload| {
            // The machine that goes on was told something else, and its driver has not heard of that.
            for cache in [Cache::Writeback, Cache::Writethrough, Cache::Unsafe] {
                let (mut other, _image) = disk_with(cache, false, 1);
                other.restore(payload)?;
                assert_eq!(other.config()[WRITEBACK_OFFSET], writeback);
                assert_eq!(other.save(), *payload);
            }
            Ok(payload.clone())
        });
        let wrong = Payload { bytes: vec![2], ..block.save() };
        assert!(block.restore(&wrong).is_err());
    }
}

#[path = "overlay/tests.rs"]
mod overlay;
