//! Files that become disks, and their locks.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::process::Command;

use super::*;

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
    let name = "virtio::blk::tests::opening::locks_keep_writers_apart";
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
