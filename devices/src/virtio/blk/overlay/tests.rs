//! Overlays behind a device, against plain bytes; and what happens to their files.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::super::overlay::{
    BaseFormat, FormatError, Header, MOST_LAYERS, Overlay, OverlayError, commit, create, describe,
    flatten, freeze,
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

    fn writes() -> Probe<(Block, Folder)> {
        Probe {
            request: |harness| Request::new(harness, OUT, 9, &[0xaa; 512], 0).buffers,
            check: |_, written| assert_eq!(written, 1),
            ..Probe::default()
        }
    }

    fn flushes() -> Probe<(Block, Folder)> {
        Probe {
            queue: 1,
            request: |harness| Request::new(harness, FLUSH, 0, &[], 0).buffers,
            check: |_, written| assert_eq!(written, 1),
            ..Probe::default()
        }
    }

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

#[test]
fn what_is_open_is_locked() {
    let folder = Folder::new();
    let top = folder.made();
    let refused = |result: Result<Overlay, OverlayError>| {
        assert!(matches!(result, Err(OverlayError::Open(OpenError::Locked { .. }))), "{result:?}");
    };
    refused(Overlay::open(&folder.path("top"), false, false));
    refused(Overlay::open(&folder.path("top"), true, false));
    let base = DiskFile::open(&folder.path("base"), false, false);
    assert!(matches!(base, Err(OpenError::Locked { .. })));
    // Others may stand on the same base.
    create(&folder.path("other"), &folder.path("base"), BaseFormat::Raw).unwrap();
    let other = folder.open("other");
    assert!(matches!(commit(&folder.path("other"), &|_, _| {}), Err(OverlayError::Open(_))));
    drop(other);
    assert!(matches!(commit(&folder.path("other"), &|_, _| {}), Err(OverlayError::Open(_))));
    drop(top);
    commit(&folder.path("other"), &|_, _| {}).unwrap();
}

#[test]
fn a_base_that_changed_is_refused() {
    let folder = Folder::new();
    drop(folder.made());
    let base = File::options().write(true).open(folder.path("base")).unwrap();
    let open = || Overlay::open(&folder.path("top"), false, false);
    base.set_len(SIZE + 512).unwrap();
    assert!(matches!(open(), Err(OverlayError::BaseLength { found, .. }) if found == SIZE + 512));
    base.set_len(SIZE).unwrap();
    assert!(matches!(open(), Err(OverlayError::BaseWritten { .. })));
    fs::remove_file(folder.path("base")).unwrap();
    assert!(matches!(open(), Err(OverlayError::Open(OpenError::Open { .. }))));
}

#[test]
fn what_is_no_overlay_is_refused() {
    let folder = Folder::new();
    drop(folder.made());
    let bytes = fs::read(folder.path("top")).unwrap();
    let format = |bytes: &[u8]| {
        fs::write(folder.path("top"), bytes).unwrap();
        match Overlay::open(&folder.path("top"), false, false) {
            Err(OverlayError::Format { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    let mut flipped = bytes.clone();
    flipped[100] ^= 4;
    assert_eq!(format(&flipped), FormatError::Checksum);
    let mut later = bytes.clone();
    later[8] = 9;
    assert_eq!(format(&later), FormatError::Version(9));
    assert_eq!(format(&vec![0; 8192]), FormatError::Magic);
    assert!(matches!(format(&bytes[..bytes.len() - 1]), FormatError::Truncated { .. }));
    assert!(matches!(format(&bytes[..100]), FormatError::Truncated { .. }));
    assert_eq!(format(&[]), FormatError::Magic);
}

#[test]
fn a_raw_disk_is_not_believed_to_be_an_overlay() {
    let folder = Folder::new();
    drop(folder.made());
    // A guest wrote the header of an overlay to its disk.
    let result = create(&folder.path("new"), &folder.path("top"), BaseFormat::Raw);
    assert!(matches!(result, Err(OverlayError::Ambiguous(_))), "{result:?}");
    create(&folder.path("new"), &folder.path("top"), BaseFormat::CertainlyRaw).unwrap();
    assert_eq!(folder.open("new").depth(), 2);
    create(&folder.path("deep"), &folder.path("top"), BaseFormat::Overlay).unwrap();
    assert_eq!(folder.open("deep").depth(), 3);
}

#[test]
fn an_overlay_has_one_base() {
    let folder = Folder::new();
    drop(folder.made());
    fs::write(folder.path("other"), &folder.bytes).unwrap();
    let result = Overlay::open_or_create(&folder.path("top"), &folder.path("other"), false, false);
    assert!(matches!(result, Err(OverlayError::NotItsBase { .. })));
    let result = create(&folder.path("top"), &folder.path("base"), BaseFormat::Raw);
    assert!(matches!(result, Err(OverlayError::Exists(_))));
    // Neighbours can be moved together.
    let moved = tempfile::tempdir().unwrap();
    for name in ["base", "top"] {
        fs::rename(folder.path(name), moved.path().join(name)).unwrap();
    }
    Overlay::open(&moved.path().join("top"), false, false).unwrap();
}

#[test]
fn a_chain_has_an_end() {
    let folder = Folder::new();
    let mut below = "base".to_owned();
    for depth in 1..64 {
        let format = if depth == 1 { BaseFormat::Raw } else { BaseFormat::Overlay };
        let name = format!("top{depth}");
        create(&folder.path(&name), &folder.path(&below), format).unwrap();
        below = name;
    }
    assert_eq!(folder.open(&below).depth(), 64);
    let result = create(&folder.path("more"), &folder.path(&below), BaseFormat::Overlay);
    assert!(matches!(result, Err(OverlayError::Deep(_))), "{result:?}");
    assert_eq!(describe(&folder.path(&below)).unwrap().layers.len(), 64);
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
fn commit_and_flatten_give_what_the_guest_saw() {
    let mut harness = running(Cache::Writeback, 1);
    for sector in [0, 13, 100, 199] {
        assert_eq!(ask(&mut harness, OUT, sector, &[sector as u8 + 1; 512], 0), only_status(OK));
    }
    assert_eq!(ask(&mut harness, WRITE_ZEROES, 0, &segment(24, 16, 0), 0), only_status(OK));
    let expected = whole(&mut harness);
    harness.pause();
    let subject = &mut harness.device_mut();
    subject.0.end();
    let folder = Folder { folder: tempfile::tempdir().unwrap(), bytes: Vec::new() };
    let from = &harness.device().1;
    for name in ["base", "top"] {
        fs::copy(from.path(name), folder.path(name)).unwrap();
        let time = fs::metadata(from.path(name)).unwrap().modified().unwrap();
        File::options().write(true).open(folder.path(name)).unwrap().set_modified(time).unwrap();
    }
    flatten(&folder.path("top"), &folder.path("raw"), &|_, _| {}).unwrap();
    assert_eq!(fs::read(folder.path("raw")).unwrap(), expected);
    assert!(flatten(&folder.path("top"), &folder.path("raw"), &|_, _| {}).is_err());
    // A middle, folded into what it stands on.
    create(&folder.path("higher"), &folder.path("top"), BaseFormat::Overlay).unwrap();
    folder.open("higher").save().unwrap();
    commit(&folder.path("higher"), &|_, _| {}).unwrap();
    assert!(!folder.path("higher").exists());
    let last = std::sync::Mutex::new((0, 0));
    commit(&folder.path("top"), &|done, total| *last.lock().unwrap() = (done, total)).unwrap();
    let (done, total) = *last.lock().unwrap();
    assert!(done == total && total > 0);
    assert_eq!(fs::read(folder.path("base")).unwrap(), expected);
    assert!(!folder.path("top").exists());
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

#[test]
fn a_read_only_overlay_is_only_read() {
    let folder = Folder::new();
    let missing = Overlay::open_or_create(&folder.path("top"), &folder.path("base"), true, false);
    assert!(matches!(missing, Err(OverlayError::Open(OpenError::Open { .. }))));
    drop(folder.made());
    let before = fs::read(folder.path("top")).unwrap();
    let overlay = Overlay::open(&folder.path("top"), true, false).unwrap();
    let path = folder.path("top");
    let mut harness = Harness::new((block_over(overlay, Cache::Writeback, 1), folder));
    harness.activate();
    assert_eq!(ask(&mut harness, OUT, 0, &[7; 512], 0), only_status(IO_ERROR));
    harness.device_mut().0.end();
    drop(harness.pause());
    assert_eq!(fs::read(&path).unwrap(), before);
}

/// The overlay at `top` as a power cut may leave it: what is not known to be on the disk of its data is not,
/// and what else was written is. Read on another start of the host.
fn after_a_power_cut(folder: &Folder, durable: &[u8]) -> Vec<u8> {
    let mut bytes = fs::read(folder.path("top")).unwrap();
    let start = (bytes.len() as u64 - SIZE) as usize;
    bytes[start..].copy_from_slice(&durable[start..]);
    let mut note = super::super::overlay::Note::parse(&bytes[4096..8192]);
    note.boot = note.boot.map(|_| [3; 16]);
    bytes[4096..8192].copy_from_slice(&note.to_page()[..]);
    fs::write(folder.path("cut"), bytes).unwrap();
    contents(folder.open("cut"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// After each operation the power may go.
    #[test]
    fn a_power_cut_takes_nothing_that_was_flushed(
        steps in proptest::collection::vec((0..SIZE / 512, 1u64..24, 1u8.., any::<bool>()), 1..24),
        pauses: bool)
    {
        let mut harness = running(Cache::Writeback, 1);
        let base = harness.device().1.bytes.clone();
        let mut durable = fs::read(harness.device().1.path("top")).unwrap();
        // Each sector as it was flushed, and all that was written to it since.
        let mut allowed: Vec<Vec<u8>> = base.chunks(512).map(|sector| vec![sector[0]]).collect();
        let first = |bytes: &[u8]| bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<_>>();
        for (sector, len, byte, flush) in steps {
            let len = len.min(SIZE / 512 - sector);
            let range = sector as usize..(sector + len) as usize;
            allowed[range.clone()].iter_mut().for_each(|allowed| allowed.push(byte));
            harness.hold_operations(true);
            let data = vec![byte; len as usize * 512];
            let mut requests = vec![Request::new(&mut harness, OUT, sector, &data, 0)];
            if flush {
                requests.push(Request::new(&mut harness, FLUSH, 0, &[], 0));
            }
            for request in &requests {
                harness.offer(0, &request.buffers);
                harness.kick(0);
                harness.run();
                while let Some(operation) = harness.oldest_operation() {
                    let is_sync = matches!(operation.action, Action::Sync);
                    harness.finish_operation();
                    if is_sync {
                        durable = fs::read(harness.device().1.path("top")).unwrap();
                    }
                    let found = after_a_power_cut(&harness.device().1, &durable);
                    for (found, allowed) in first(&found).iter().zip(&allowed) {
                        prop_assert!(allowed.contains(found), "{found} is none of {allowed:?}");
                    }
                    harness.run();
                }
                prop_assert!(harness.used(0).is_some());
                prop_assert_eq!(harness.read(request.status, 1), vec![OK]);
            }
            harness.hold_operations(false);
            if pauses {
                harness.pause();
                harness.resume();
            }
            if flush {
                for allowed in &mut allowed {
                    allowed.drain(..allowed.len() - 1);
                }
            }
            let found = after_a_power_cut(&harness.device().1, &durable);
            for (found, allowed) in first(&found).iter().zip(&allowed) {
                prop_assert!(allowed.contains(found), "{found} is none of {allowed:?}");
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Read(u64, u64),
    Flush,
    Fork,
    Reopen,
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = SIZE / 512;
    let span =
        (0..sectors).prop_flat_map(move |first| (Just(first), (1..=(sectors - first).min(40))));
    prop_oneof![
        8 => (span.clone(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        3 => (span.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        4 => span.prop_map(|(at, len)| Step::Read(at, len)),
        2 => Just(Step::Flush),
        1 => Just(Step::Fork),
        1 => Just(Step::Reopen),
        1 => Just(Step::Commit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Requests, several at a time and in any order of their operations, against plain bytes.
    #[test]
    fn behaves_like_plain_bytes(
        batches in proptest::collection::vec(proptest::collection::vec(step(), 1..6), 1..12),
        alone: bool, through: bool)
    {
        let cache = if through { Cache::Writethrough } else { Cache::Writeback };
        let (block, folder) = subject(cache, 2);
        let mut bytes = folder.bytes.clone();
        let mut harness = Harness::new((block, folder));
        harness.set_alone(alone);
        harness.activate();
        let (mut forks, mut top) = (0, "top".to_owned());
        for batch in batches {
            let mut requests = Vec::new();
            // What is under way together must not meet.
            let mut touched = vec![false; (SIZE / 512) as usize];
            harness.hold_operations(true);
            for (n, step) in batch.iter().enumerate() {
                let queue = (n % 2) as u16;
                let mut free = |at: u64, len: u64| {
                    let range = at as usize..(at + len) as usize;
                    let free = touched[range.clone()].iter().all(|touched| !touched);
                    touched[range].fill(true);
                    free
                };
                let range = |at: u64, len: u64| at as usize * 512..(at + len) as usize * 512;
                let request = match *step {
                    Step::Write(at, len, byte) if free(at, len) => {
                        let data: Vec<u8> =
                            (0..len * 512).map(|n| byte.wrapping_add((n / 512) as u8)).collect();
                        bytes[range(at, len)].copy_from_slice(&data);
                        (Request::new(&mut harness, OUT, at, &data, 0), None)
                    }
                    Step::Zero(at, len, unmap) if free(at, len) => {
                        bytes[range(at, len)].fill(0);
                        let flags = if unmap { UNMAP } else { 0 };
                        let data = segment(at, len as u32, flags);
                        (Request::new(&mut harness, WRITE_ZEROES, 0, &data, 0), None)
                    }
                    Step::Read(at, len) if free(at, len) => {
                        let request =
                            Request::new(&mut harness, IN, at, &[], (len * 512) as u32);
                        (request, Some(bytes[range(at, len)].to_vec()))
                    }
                    Step::Flush => (Request::new(&mut harness, FLUSH, 0, &[], 0), None),
                    _ => continue,
                };
                harness.offer(queue, &request.0.buffers);
                requests.push(request);
            }
            harness.kick(0);
            harness.kick(1);
            harness.run();
            while harness.finish_operation() {
                harness.run();
            }
            harness.hold_operations(false);
            harness.run();
            for (request, expected) in &requests {
                prop_assert_eq!(harness.read(request.status, 1), vec![OK]);
                if let Some(expected) = expected {
                    let (gpa, len) = request.room;
                    prop_assert_eq!(&harness.read(gpa, len), expected);
                }
            }
            while harness.used(0).is_some() {}
            while harness.used(1).is_some() {}
            for step in &batch {
                match step {
                    Step::Fork if !matches!(step, Step::Read(..)) => {
                        forks += 1;
                        let name = format!("f{forks}");
                        let child = fork(&mut harness, &name, &format!("c{forks}"));
                        prop_assert_eq!(contents(child), bytes.clone());
                        if harness.device().1.path(&name).exists() {
                            top = name;
                        }
                    }
                    Step::Reopen | Step::Commit => {
                        harness.pause();
                        harness.device_mut().0.end();
                        let (_, folder) = harness.device();
                        let path = folder.path("spare");
                        let placeholder = Folder::new();
                        let spare = Overlay::open_or_create(
                            &placeholder.path("top"), &placeholder.path("base"), false, false);
                        let device = &mut harness.device_mut().0;
                        device.replace(BackEnd::Frozen(spare.unwrap().into())).unwrap();
                        let (_, folder) = harness.device();
                        if matches!(step, Step::Commit) {
                            let _ = fs::remove_file(&path);
                            flatten(&folder.path(&top), &path, &|_, _| {}).unwrap();
                            prop_assert_eq!(&fs::read(&path).unwrap(), &bytes);
                        }
                        let again = folder.open(&top);
                        harness.device_mut().0.replace(BackEnd::Frozen(again.into())).unwrap();
                        harness.resume();
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(&whole(&mut harness), &bytes);
        }
        prop_assert!(Header::parse(&fs::read(harness.device().1.path("top")).unwrap(), u64::MAX).is_ok());
    }
}

#[path = "tests/survival.rs"]
mod survival;
