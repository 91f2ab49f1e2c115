//! Overlays behind a device. Their files, a model of them, kills and power cuts have modules of their own.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;

use super::super::overlay::{
    BaseFormat, MOST_LAYERS, Overlay, OverlayError, commit, create, freeze,
};
use super::*;

/// Bytes of a disk whose last block is cut short.
const SIZE: u64 = 200 * 512;
const BLOCK: u64 = 4096;

struct Folder {
    folder: TempDir,
    bytes: Vec<u8>,
}

impl Folder {
    /// A folder with a base that is nowhere 0.
    fn new() -> Folder {
        Folder::of(SIZE)
    }

    fn of(size: u64) -> Folder {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..size).map(|at| (at / 512 + at % 7) as u8 | 1).collect();
        fs::write(folder.path().join("base"), &bytes).unwrap();
        Folder { folder, bytes }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, name: &str) -> Overlay {
        Overlay::open(&self.path(name), false, false).unwrap()
    }

    fn made(&self) -> Overlay {
        Overlay::open_or_create(&self.path("top"), &self.path("base"), false, false).unwrap()
    }
}

fn block_over(overlay: impl Into<Backing>, cache: Cache, queues: u16) -> Block {
    Block::new(Options { disk: overlay.into(), cache, id: "over".into(), queues })
}

fn subject(cache: Cache, queues: u16) -> (Block, Folder) {
    let folder = Folder::new();
    (block_over(folder.made(), cache, queues), folder)
}

type Over = Harness<(Block, Folder)>;

fn running(cache: Cache, queues: u16) -> Over {
    let mut harness = Harness::new(subject(cache, queues));
    harness.activate();
    harness
}

fn whole(harness: &mut Over) -> Vec<u8> {
    let answer = ask(harness, IN, 0, &[], SIZE as u32);
    assert_eq!(answer.status, OK);
    answer.data
}

mod over_a_base {
    use super::*;

    mod write {
        use super::*;
        conformance!(|| subject(Cache::Writeback, 1), writes());
    }

    mod flush {
        use super::*;
        conformance!(|| subject(Cache::Writeback, 2), flushes());
    }

    mod through {
        use super::*;
        conformance!(|| subject(Cache::Writethrough, 1), writes());
    }
}

#[test]
fn the_base_is_read_and_never_written() {
    let mut harness = running(Cache::Writeback, 1);
    let before = harness.device().1.bytes.clone();
    assert_eq!(whole(&mut harness), before);
    assert_eq!(ask(&mut harness, OUT, 3, &[7; 1024], 0), only_status(OK));
    let mut expected = before.clone();
    expected[3 * 512..5 * 512].fill(7);
    assert_eq!(whole(&mut harness), expected);
    let base = harness.device().1.path("base");
    assert_eq!(fs::read(base).unwrap(), before);
}

#[test]
fn writes_to_one_block_at_the_same_time_are_both_there() {
    let mut harness = running(Cache::Writeback, 2);
    harness.hold_operations(true);
    let requests: Vec<(u16, Request)> = (0..8u64)
        .map(|sector| {
            let queue = (sector % 2) as u16;
            let request = Request::new(&mut harness, OUT, sector, &[sector as u8 + 100; 512], 0);
            harness.offer(queue, &request.buffers);
            (queue, request)
        })
        .collect();
    harness.kick(0);
    harness.kick(1);
    harness.run();
    harness.hold_operations(false);
    harness.run();
    for (queue, request) in &requests {
        assert!(harness.used(*queue).is_some());
        assert_eq!(harness.read(request.status, 1), [OK]);
    }
    let found = whole(&mut harness);
    for sector in 0..8usize {
        assert_eq!(found[sector * 512..][..512], [sector as u8 + 100; 512], "sector {sector}");
    }
}

#[test]
fn zeroes_take_no_room_and_leave_the_rest() {
    let mut harness = running(Cache::Writeback, 1);
    let mut expected = harness.device().1.bytes.clone();
    // Edges in blocks that are not there, whole blocks between.
    let range = segment(3, 60, UNMAP);
    let room = |harness: &Over| fs::metadata(harness.device().1.path("top")).unwrap().blocks();
    let before = room(&harness);
    assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &range, 0), only_status(OK));
    harness.device().0.disk().unwrap().save().unwrap();
    // Two edges, and a page of each bitmap.
    assert!(room(&harness) - before <= 4 * 8, "{} sectors", room(&harness) - before);
    expected[3 * 512..63 * 512].fill(0);
    assert_eq!(whole(&mut harness), expected);
    // Within one block, and up to the end of the disk.
    for (sector, count) in [(81, 2), (195, 5)] {
        let range = segment(sector, count, 0);
        assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &range, 0), only_status(OK));
        expected[sector as usize * 512..][..count as usize * 512].fill(0);
    }
    assert_eq!(whole(&mut harness), expected);
    // A discard leaves what the base has.
    let range = segment(100, 8, 0);
    assert_eq!(ask(&mut harness, DISCARD, 0, &range, 0), only_status(OK));
    assert_eq!(whole(&mut harness), expected);
}

#[test]
fn a_flush_puts_data_before_bits() {
    let mut harness = running(Cache::Writeback, 1);
    assert_eq!(ask(&mut harness, FLUSH, 0, &[], 0), only_status(OK));
    assert_eq!(ask(&mut harness, OUT, 0, &[7; 4096], 0), only_status(OK));
    harness.hold_operations(true);
    let request = Request::new(&mut harness, FLUSH, 0, &[], 0);
    harness.offer(0, &request.buffers);
    harness.kick(0);
    harness.run();
    let mut steps = Vec::new();
    while let Some(operation) = harness.oldest_operation() {
        steps.push(match &operation.action {
            Action::Sync => "sync".to_owned(),
            Action::Write { .. } => format!("write at {}", operation.offset),
            other => format!("{other:?}"),
        });
        assert!(harness.used(0).is_none(), "answered before {steps:?}");
        harness.finish_operation();
        harness.run();
    }
    assert_eq!(steps, ["sync", "write at 8192", "sync"]);
    assert_eq!(harness.read(request.status, 1), [OK]);
}

#[test]
fn a_failed_flush_says_so_and_is_made_up_for() {
    for fails in 0..3 {
        let mut harness = running(Cache::Writeback, 1);
        assert_eq!(ask(&mut harness, FLUSH, 0, &[], 0), only_status(OK));
        assert_eq!(ask(&mut harness, OUT, 0, &[7; 4096], 0), only_status(OK));
        harness.hold_operations(true);
        let request = Request::new(&mut harness, FLUSH, 0, &[], 0);
        harness.offer(0, &request.buffers);
        harness.kick(0);
        harness.run();
        for _ in 0..fails {
            harness.finish_operation();
        }
        assert!(harness.fail_operation(libc::EIO));
        harness.run();
        assert_eq!(harness.read(request.status, 1), [IO_ERROR], "step {fails}");
        assert!(harness.used(0).is_some());
        harness.hold_operations(false);
        assert_eq!(ask(&mut harness, FLUSH, 0, &[], 0), only_status(OK));
        assert_eq!(saved_blocks(&harness.device().1.path("top")), [0]);
    }
}

/// Blocks that the first bitmap of the overlay at `path` names.
fn saved_blocks(path: &Path) -> Vec<u64> {
    let bytes = fs::read(path).unwrap();
    (0..SIZE.div_ceil(BLOCK))
        .filter(|block| bytes[8192 + *block as usize / 8] & 1 << (block % 8) != 0)
        .collect()
}

#[test]
fn what_was_written_through_is_on_the_disk_when_it_is_answered() {
    let mut harness = running(Cache::Writethrough, 1);
    assert_eq!(ask(&mut harness, OUT, 17, &[7; 512], 0), only_status(OK));
    assert_eq!(saved_blocks(&harness.device().1.path("top")), [2]);
    let range = segment(40, 16, 0);
    assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &range, 0), only_status(OK));
    assert_eq!(saved_blocks(&harness.device().1.path("top")), [2, 5, 6]);
}

#[test]
fn a_pause_keeps_what_was_written_without_waiting_for_the_disk() {
    let mut harness = running(Cache::Writeback, 1);
    assert_eq!(ask(&mut harness, OUT, 0, &[7; 512], 0), only_status(OK));
    harness.pause();
    let (_, folder) = harness.device();
    assert_eq!(saved_blocks(&folder.path("top")), [0; 0]);
    // Somebody else, on the same start of the host.
    fs::copy(folder.path("top"), folder.path("copy")).unwrap();
    let copy = folder.open("copy");
    assert_eq!((copy.allocated(), copy.is_saved()), (1, false));
    drop(copy);
    // And on another.
    let file = File::options().read(true).write(true).open(folder.path("copy")).unwrap();
    let mut note = [0; 4096];
    file.read_exact_at(&mut note, 4096).unwrap();
    note[12 + 32] ^= 1;
    file.write_all_at(&note, 4096).unwrap();
    assert_eq!(folder.open("copy").allocated(), 0);
}

#[test]
fn the_end_saves_and_leaves_the_time_alone() {
    let mut harness = running(Cache::Unsafe, 1);
    assert_eq!(ask(&mut harness, OUT, 0, &[7; 512], 0), only_status(OK));
    harness.pause();
    let path = harness.device().1.path("top");
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    harness.device_mut().0.end();
    assert_eq!(saved_blocks(&path), [0]);
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), before);
}

/// Goes on with what `freeze` gives.
fn fork(harness: &mut Over, fresh: &str, child: &str) -> Overlay {
    harness.pause();
    let disk = Arc::clone(harness.device().0.disk().unwrap());
    let path = harness.device().1.path(fresh);
    let frozen = freeze(&disk, &path).unwrap();
    let child = frozen.base.copy(&harness.device().1.path(child), false).unwrap();
    if let Some(disk) = frozen.disk {
        harness.device_mut().0.replace(BackEnd::Frozen(disk)).unwrap();
    }
    harness.resume();
    let Backing::Overlay(child) = child else { panic!("the file system copied {child:?}") };
    *child
}

fn contents(overlay: Overlay) -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    overlay.read_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_running_disk_becomes_a_base() {
    let image = Folder::new();
    let file = DiskFile::open(&image.path("base"), false, false).unwrap();
    let mut expected = image.bytes.clone();
    let mut harness = Harness::new((block_over(file, Cache::Writeback, 2), image));
    harness.activate();
    assert_eq!(ask(&mut harness, OUT, 8, &[1; 512], 0), only_status(OK));
    expected[8 * 512..9 * 512].fill(1);
    let child = fork(&mut harness, "a", "a-child");
    assert_eq!(
        child.unsynced_below().len(),
        2,
        "base and folder are synced before a flush is answered"
    );
    assert_eq!(contents(child), expected);
    // Nothing was written: the same base.
    let child = fork(&mut harness, "b", "b-child");
    assert_eq!(child.depth(), 2);
    assert!(!harness.device().1.path("b").exists());
    drop(child);
    assert_eq!(ask(&mut harness, OUT, 9, &[2; 512], 0), only_status(OK));
    let child = fork(&mut harness, "c", "c-child");
    assert_eq!(child.depth(), 3);
    let mut later = expected.clone();
    later[9 * 512..10 * 512].fill(2);
    assert_eq!(whole(&mut harness), later);
    assert_eq!(contents(child), later);
    // The first child is as it was, by its path.
    let (_, folder) = harness.device();
    assert_eq!(contents(folder.open("a-child")), expected);
    // Writers of what is a base now are refused.
    assert!(matches!(
        Overlay::open(&folder.path("a"), false, false),
        Err(OverlayError::Open(OpenError::Locked { .. }))
    ));
    assert!(DiskFile::open(&folder.path("base"), false, false).is_err());
}

#[test]
fn a_base_that_is_noted_only_counts_until_the_host_ends_or_a_flush() {
    let mut harness = running(Cache::Writeback, 1);
    assert_eq!(ask(&mut harness, OUT, 0, &[9; 4096], 0), only_status(OK));
    let child = fork(&mut harness, "fresh", "child");
    assert!(!child.is_saved());
    let expected = whole(&mut harness);
    child.save().unwrap();
    assert_eq!(contents(child), expected);
    // Another start of the host: what the child synced still counts.
    let (_, folder) = harness.device();
    let top = File::options().read(true).write(true).open(folder.path("top"));
    let file = top.unwrap();
    let before = fs::metadata(folder.path("top")).unwrap().modified().unwrap();
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 4096).unwrap();
    let mut note = super::super::overlay::Note::parse(&page);
    note.boot = Some([3; 16]);
    file.write_all_at(&note.to_page()[..], 4096).unwrap();
    file.set_modified(before).unwrap();
    assert_eq!(contents(folder.open("child")), expected);
    // The machine itself did not flush: its own view of the base is the one of its last flush.
    let fresh = harness.device().1.path("fresh");
    fs::copy(&fresh, harness.device().1.path("copy")).unwrap();
    let old = harness.device().1.bytes.clone();
    assert_eq!(contents(harness.device().1.open("copy")), old);
}

#[test]
fn a_machine_may_fork_as_often_as_it_wants() {
    let mut harness = running(Cache::Writeback, 1);
    let mut expected = harness.device().1.bytes.clone();
    for n in 0..100u64 {
        let sector = n * 37 % 200;
        assert_eq!(ask(&mut harness, OUT, sector, &[n as u8; 512], 0), only_status(OK));
        expected[sector as usize * 512..][..512].fill(n as u8);
        let child = fork(&mut harness, &format!("f{n}"), &format!("c{n}"));
        assert!(child.depth() <= MOST_LAYERS + 1, "{} files", child.depth());
        assert_eq!(contents(child), expected, "fork {n}");
        assert_eq!(whole(&mut harness), expected, "after fork {n}");
    }
    let last = harness.device().1.open("c99");
    assert_eq!(contents(last), expected);
}

#[test]
fn nobody_writes_to_what_others_stand_on() {
    let folder = Folder::new();
    let open = || Backing::from(DiskFile::open(&folder.path("base"), false, false).unwrap());
    let disk = open();
    let frozen = freeze(&disk, &folder.path("fresh")).unwrap();
    for file in &frozen.base.files {
        let refused = file.write_at(&[1], 0).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBADF));
    }
    let child = frozen.base.copy(&folder.path("child"), false).unwrap();
    drop(disk);
    // Also when the machine that had it is gone.
    drop(frozen);
    let locked = DiskFile::open(&folder.path("base"), false, false);
    assert!(matches!(locked, Err(OpenError::Locked { .. })), "{locked:?}");
    drop(child);
    open();
}

#[test]
fn a_disk_that_is_not_shared_after_all_is_its_machines_alone() {
    let folder = Folder::new();
    let before = fs::read_dir(&folder.folder).unwrap().count();
    let disk = Backing::from(DiskFile::open(&folder.path("base"), false, false).unwrap());
    let reader = || DiskFile::open(&folder.path("base"), true, false);
    let frozen = freeze(&disk, &folder.path("fresh")).unwrap();
    reader().unwrap();
    let again = freeze(&disk, &folder.path("fresh"));
    assert!(matches!(again, Err(OverlayError::Exists(_))), "{again:?}");
    frozen.undo();
    assert_eq!(fs::read_dir(&folder.folder).unwrap().count(), before);
    assert!(matches!(reader(), Err(OpenError::Locked { .. })));
    let nowhere = freeze(&disk, &folder.path("nowhere/fresh"));
    assert!(matches!(nowhere, Err(OverlayError::File { .. })), "{nowhere:?}");
    assert!(matches!(reader(), Err(OpenError::Locked { .. })));
}

#[path = "tests/files.rs"]
mod files;
#[path = "tests/model.rs"]
mod model;
#[path = "tests/power.rs"]
mod power;
#[path = "tests/survival.rs"]
mod survival;
#[path = "tests/tree.rs"]
mod tree;
