//! Ranges that are discarded or filled with zeroes.

use super::*;

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
