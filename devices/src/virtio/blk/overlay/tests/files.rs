//! Files of chains: which are taken, which are refused, and what folding leaves.

use super::super::super::overlay::{FormatError, describe, flatten};
use super::*;

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
