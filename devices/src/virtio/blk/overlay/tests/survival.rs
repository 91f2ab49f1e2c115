//! What is left of an overlay when its process is killed.

use super::*;

/// The disk as whoever is started after a kill finds it: what was written to files stays in the page cache.
fn after_a_kill(folder: &Folder, top: &str) -> Vec<u8> {
    fs::copy(folder.path(top), folder.path("killed")).unwrap();
    contents(folder.open("killed"))
}

/// Writes a note into a file, as another start of the host would find it.
fn on_another_start(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let before = fs::metadata(path).unwrap().modified().unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 4096).unwrap();
    let mut note = super::super::super::overlay::Note::parse(&page);
    note.boot = note.boot.map(|_| [3; 16]);
    file.write_all_at(&note.to_page()[..], 4096).unwrap();
    file.set_modified(before).unwrap();
}

#[test]
fn a_kill_takes_nothing_although_nobody_flushes() {
    for alone in [false, true] {
        let mut harness = running(Cache::Unsafe, 1);
        harness.set_alone(alone);
        let mut expected = harness.device().1.bytes.clone();
        assert_eq!(ask(&mut harness, OUT, 3, &[7; 512], 0), only_status(OK));
        expected[3 * 512..4 * 512].fill(7);
        assert_eq!(after_a_kill(&harness.device().1, "top"), expected);
        let range = segment(40, 100, UNMAP);
        assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &range, 0), only_status(OK));
        expected[40 * 512..140 * 512].fill(0);
        assert_eq!(after_a_kill(&harness.device().1, "top"), expected);
    }
}

#[test]
fn a_write_that_meets_a_new_block_waits_for_its_bit() {
    let mut harness = running(Cache::Writeback, 2);
    harness.hold_operations(true);
    let offer = |harness: &mut Over, queue, sector: u64, byte: u8| {
        let request = Request::new(harness, OUT, sector, &[byte; 512], 0);
        harness.offer(queue, &request.buffers);
        harness.kick(queue);
        harness.run();
    };
    offer(&mut harness, 0, 0, 1);
    while matches!(
        harness.oldest_operation().map(|operation| &operation.action),
        Some(Action::Read(_)) | Some(Action::Write { .. })
    ) && harness.oldest_operation().unwrap().offset >= 65536
    {
        harness.finish_operation();
        harness.run();
    }
    // The data are there, and their bit is on its way.
    assert!(harness.oldest_operation().is_some());
    offer(&mut harness, 1, 1, 2);
    while harness.used(1).is_none() {
        assert!(harness.finish_operation());
        harness.run();
    }
    let found = after_a_kill(&harness.device().1, "top");
    assert_eq!(found[512..1024], [2; 512]);
}

#[test]
fn a_second_bitmap_that_cannot_be_written_is_not_the_drivers_business() {
    let mut harness = running(Cache::Writeback, 1);
    harness.hold_operations(true);
    let request = Request::new(&mut harness, OUT, 0, &[7; 4096], 0);
    harness.offer(0, &request.buffers);
    harness.kick(0);
    harness.run();
    while harness.oldest_operation().is_some_and(|operation| operation.offset >= 65536) {
        harness.finish_operation();
        harness.run();
    }
    assert!(harness.used(0).is_none());
    assert!(harness.fail_operation(libc::ENOSPC));
    harness.run();
    assert!(harness.used(0).is_some());
    assert_eq!(harness.read(request.status, 1), [OK]);
    harness.hold_operations(false);
    // The next one makes up for it.
    assert_eq!(ask(&mut harness, OUT, 0, &[8; 512], 0), only_status(OK));
    assert_eq!(after_a_kill(&harness.device().1, "top"), whole(&mut harness));
}

#[test]
fn a_note_that_was_cut_off_revives_no_bits() {
    // With a bitmap of two pages.
    let folder = Folder::new();
    let size = 200 << 20;
    File::create(folder.path("base")).unwrap().set_len(size).unwrap();
    let top = folder.made();
    top.own(40_000..40_001);
    top.note_bits().unwrap();
    drop(top);
    // The power went while the note was written: bits are there, and the data they tell of are not.
    let file = File::options().read(true).write(true).open(folder.path("top")).unwrap();
    file.write_all_at(&[0x55; 512], 4096).unwrap();
    let top = folder.open("top");
    assert_eq!(top.allocated(), 0);
    top.own(9..10);
    top.note_bits().unwrap();
    drop(top);
    let top = folder.open("top");
    assert!(top.has(9) && !top.has(40_000));
}

#[test]
fn what_a_killed_machine_left_can_be_the_base_of_what_is_flushed() {
    let mut harness = running(Cache::Writeback, 1);
    assert_eq!(ask(&mut harness, OUT, 0, &[9; 4096], 0), only_status(OK));
    let expected = whole(&mut harness);
    harness.pause();
    let folder = &harness.device().1;
    fs::copy(folder.path("top"), folder.path("left")).unwrap();
    // It goes on, and is forked before it wrote or flushed anything.
    let left = Backing::from(folder.open("left"));
    let frozen = freeze(&left, &folder.path("fresh")).unwrap();
    frozen.disk.as_ref().unwrap().save().unwrap();
    drop((frozen, left));
    on_another_start(&folder.path("left"));
    assert_eq!(contents(folder.open("fresh")), expected);
}

#[test]
fn opening_leaves_the_time_of_the_last_write() {
    let folder = Folder::new();
    drop(folder.made());
    let path = folder.path("top");
    on_another_start(&path);
    let before = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1 << 30);
    File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    drop(folder.open("top"));
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
}

#[test]
fn an_overlay_can_be_folded_into_one_on_another_start() {
    let folder = Folder::new();
    drop(folder.made());
    create(&folder.path("higher"), &folder.path("top"), BaseFormat::Overlay).unwrap();
    let higher = folder.open("higher");
    higher.own(3..4);
    higher.save().unwrap();
    drop(higher);
    on_another_start(&folder.path("top"));
    commit(&folder.path("higher"), &|_, _| {}).unwrap();
    assert!(folder.open("top").has(3));
}

/// First sector, number of sectors, the byte that is written; 0 asks for zeroes.
type Change = (u64, u64, u8);

/// The process may be killed after each operation of the requests that are under way, whoever they meet.
fn nothing_that_was_answered_is_lost(batches: Vec<Vec<Change>>, alone: bool, cache: Cache) {
    let mut harness = running(cache, 2);
    harness.set_alone(alone);
    let mut bytes = harness.device().1.bytes.clone();
    for batch in batches {
        let mut touched = vec![false; SIZE as usize];
        let mut requests = Vec::new();
        harness.hold_operations(true);
        for (n, (sector, len, byte)) in batch.into_iter().enumerate() {
            let len = len.min(SIZE / 512 - sector);
            let range = sector as usize * 512..(sector + len) as usize * 512;
            if touched[range.clone()].iter().any(|touched| *touched) {
                continue;
            }
            touched[range.clone()].fill(true);
            let request = match byte {
                0 => {
                    let range = segment(sector, len as u32, UNMAP);
                    Request::new(&mut harness, WRITE_ZEROES, 0, &range, 0)
                }
                _ => Request::new(&mut harness, OUT, sector, &vec![byte; range.len()], 0),
            };
            harness.offer((n % 2) as u16, &request.buffers);
            requests.push((request, range, byte));
        }
        harness.kick(0);
        harness.kick(1);
        harness.run();
        loop {
            let found = after_a_kill(&harness.device().1, "top");
            for (request, range, byte) in &requests {
                let answered = harness.read(request.status, 1) == [OK];
                for at in range.clone() {
                    let is_old = !answered && found[at] == bytes[at];
                    assert!(found[at] == *byte || is_old, "{} at {at}", found[at]);
                }
            }
            assert!((0..bytes.len()).all(|at| touched[at] || found[at] == bytes[at]));
            if !harness.finish_operation() {
                break;
            }
            harness.run();
        }
        harness.hold_operations(false);
        harness.run();
        for (request, range, byte) in requests {
            assert_eq!(harness.read(request.status, 1), [OK]);
            bytes[range].fill(byte);
        }
        while harness.used(0).is_some() {}
        while harness.used(1).is_some() {}
        assert_eq!(whole(&mut harness), bytes);
    }
}

#[test]
fn what_ends_while_bits_are_on_their_way_waits_for_them() {
    let batches = vec![vec![(64, 1, 0)], vec![(71, 2, 0), (57, 8, 0), (0, 1, 0)]];
    nothing_that_was_answered_is_lost(batches, false, Cache::Unsafe);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(12) })]

    #[test]
    fn a_kill_takes_nothing_that_was_answered(
        batches in proptest::collection::vec(proptest::collection::vec(
            (0..SIZE / 512, 1u64..24, prop_oneof![1 => Just(0), 3 => any::<u8>()]), 1..6), 1..6),
        alone: bool, through: bool)
    {
        let cache = if through { Cache::Writethrough } else { Cache::Unsafe };
        nothing_that_was_answered_is_lost(batches, alone, cache);
    }
}
