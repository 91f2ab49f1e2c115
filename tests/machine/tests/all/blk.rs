//! Disks: what is written is there, what is refused is not, and the guest is told the truth.

use machine_tests::{Guest, Outcome};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const OK: u64 = 0;
const IO_ERROR: u64 = 1;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// A disk of `bytes` bytes in a folder of its own, on a real file system: O_DIRECT is not for tmpfs.
fn disk(bytes: u64) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    (folder, path)
}

fn run(scenario: &str, path: &Path, more: &str) -> Outcome {
    let outcome = Guest::new(&format!("blk {scenario}")).disk(path, more).run();
    outcome.ok();
    outcome
}

/// What the payload's `verify` writes, seen from the host: not zeroes.
fn is_written(path: &Path, offset: u64) -> bool {
    let mut sector = [0; 512];
    File::open(path).unwrap().read_exact_at(&mut sector, offset).unwrap();
    sector.iter().any(|byte| *byte != 0)
}

#[test]
fn data_comes_back_in_every_mode() {
    for more in
        ["", ",direct", ",cache=writethrough", ",cache=unsafe", ",direct,cache=writethrough"]
    {
        for scenario in [
            "size=4096 count=64",
            "size=512 count=50 sector=3",
            "size=65536 count=8 segs=16",
            "size=1M count=2",
            "size=8192 count=20 indirect=1 segs=5",
            "size=4096 count=20 noevent=1",
        ] {
            let (_folder, path) = disk(8 << 20);
            let outcome = run(&format!("op=verify {scenario}"), &path, more);
            assert_eq!(outcome.number("bad"), 0, "{scenario}{more}");
            assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
            assert!(outcome.number("count") > 0);
            // And in another life of the machine.
            let outcome = run(&format!("op=verify read=1 {scenario}"), &path, more);
            assert_eq!(outcome.number("bad"), 0, "{scenario}{more}, again");
        }
    }
}

#[test]
fn many_requests_at_once() {
    for more in ["", ",direct"] {
        for op in ["read", "write"] {
            for depth in [1, 32, 80] {
                let (_folder, path) = disk(8 << 20);
                let scenario = format!("op={op} depth={depth} count=2000 flush=500");
                let outcome = run(&scenario, &path, more);
                assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
                assert_eq!(outcome.number("depth"), depth);
            }
        }
    }
}

#[test]
fn geometry_and_identity() {
    let (_folder, path) = disk(3 << 20);
    let outcome = run("op=info", &path, "");
    assert_eq!(outcome.number("sectors"), (3 << 20) / 512);
    let features = outcome.number("features");
    for wanted in [F_FLUSH, F_DISCARD, F_WRITE_ZEROES] {
        assert!(features & wanted != 0, "{features:#x} lacks {wanted:#x}");
    }
    assert!(features & F_RO == 0);
    let outcome = run("op=id", &path, ",id=my-disk");
    assert_eq!((outcome.number("status"), outcome.value("id")), (OK, "my-disk"));
}

#[test]
fn read_only_is_read_only() {
    let (_folder, path) = disk(1 << 20);
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    // Even where the file system says so too.
    for mode in [0o644, 0o444] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        assert!(run("op=info", &path, ",ro").number("features") & F_RO != 0);
        assert_eq!(run("op=get", &path, ",ro").number("status"), OK);
        for op in ["put", "discard", "wzeroes"] {
            assert_ne!(run(&format!("op={op}"), &path, ",ro").number("status"), OK, "{op}");
        }
    }
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 7));
}

#[test]
fn what_lies_past_the_end_is_refused() {
    let (_folder, path) = disk(1 << 20);
    let last = (1 << 20) / 512 - 8;
    for op in ["get", "put"] {
        assert_eq!(run(&format!("op={op} sector={last}"), &path, "").number("status"), OK);
        for sector in [last + 1, last + 8, 1 << 40, u64::MAX, u64::MAX - 7] {
            let outcome = run(&format!("op={op} sector={sector}"), &path, "");
            assert_eq!(outcome.number("status"), IO_ERROR, "{op} at {sector}");
        }
    }
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20, "the file has not grown");
}

#[test]
fn discard_and_zeroes() {
    for op in ["discard", "wzeroes", "wzeroes unmap=1"] {
        let (_folder, path) = disk(4 << 20);
        File::create(&path).unwrap().write_all(&vec![7; 4 << 20]).unwrap();
        let before = fs::metadata(&path).unwrap().blocks();
        let outcome = run(&format!("op={op} sector=2048 sectors=2048"), &path, "");
        assert_eq!(outcome.number("status"), OK, "{op}");
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        assert!(bytes[..1 << 20].iter().all(|byte| *byte == 7), "{op}: before the range");
        assert!(bytes[2 << 20..].iter().all(|byte| *byte == 7), "{op}: after the range");
        assert!(bytes[1 << 20..2 << 20].iter().all(|byte| *byte == 0), "{op}: the range");
        if op != "wzeroes" {
            assert!(fs::metadata(&path).unwrap().blocks() < before, "{op} frees space");
        }
        for (sector, sectors) in [(8191, 2), (1 << 40, 8), (u64::MAX, 8)] {
            let outcome = run(&format!("op={op} sector={sector} sectors={sectors}"), &path, "");
            assert_eq!(outcome.number("status"), IO_ERROR, "{op} at {sector}");
        }
    }
}

#[test]
fn flush_is_answered() {
    for more in ["", ",direct", ",cache=unsafe"] {
        let (_folder, path) = disk(1 << 20);
        assert_eq!(run("op=flush", &path, more).number("status"), OK, "{more}");
    }
}

#[test]
fn two_disks_are_two() {
    let (_first_folder, first) = disk(1 << 20);
    let (_second_folder, second) = disk(2 << 20);
    let outcome = Guest::new("blk op=verify skip=1 count=4")
        .disk(&first, ",id=first")
        .disk(&second, ",id=second")
        .run();
    outcome.ok();
    assert_eq!(outcome.number("bad"), 0);
    assert!(is_written(&second, 0));
    assert!(!is_written(&first, 0));
}

#[test]
fn several_queues_are_offered() {
    let (_folder, path) = disk(1 << 20);
    let outcome = run("op=verify count=16", &path, ",queues=4");
    assert_eq!(outcome.number("bad"), 0);
}

#[test]
fn the_same_disk_for_two_writers() {
    let (_folder, path) = disk(1 << 20);
    // Under two names it is still one disk.
    let other = path.with_file_name("other.img");
    fs::hard_link(&path, &other).unwrap();
    let refused = |path: &Path, more: &str, words: &str| {
        Guest::new("hello").disk(path, more).run().failed(&[
            "hull: cannot set up disk0\n",
            &format!("{} is in use: another machine has it open{words}\n", path.display()),
            "hint: `hull ps` lists the machines; a shared disk must be ,ro in all",
        ]);
    };
    let holder = Guest::new("halt").disk(&path, "").start();
    holder.wait_for("halting");
    for path in [&path, &other] {
        refused(path, "", "");
        refused(path, ",ro", " for writing");
    }
    holder.signal(libc::SIGKILL);
    assert_eq!(holder.finish().code(), 137);
    assert_eq!(Guest::new("hello").disk(&path, "").run().ok(), "hello\n");
    // Readers share it, and keep writers away.
    let reader = Guest::new("halt").disk(&path, ",ro").start();
    reader.wait_for("halting");
    for path in [&path, &other] {
        assert_eq!(Guest::new("hello").disk(path, ",ro").run().ok(), "hello\n");
        refused(path, "", "");
    }
}

#[test]
fn files_that_are_no_disks() {
    let (folder, path) = disk(1 << 20);
    let refused = |path: &Path, words: &[&str]| {
        for more in ["", ",ro"] {
            let outcome = Guest::new("hello").disk(path, more).run();
            outcome.failed(words);
            outcome.failed(&["hull: cannot set up disk0\n", &path.display().to_string()]);
        }
    };
    let missing = folder.path().join("missing");
    refused(&missing, &["cannot open ", "No such file or directory"]);
    assert!(!missing.exists());
    for path in [folder.path(), Path::new("/dev/null")] {
        refused(path, &[" is neither a regular file nor a block device\n"]);
    }
    for size in [1000, 511, 0] {
        OpenOptions::new().write(true).open(&path).unwrap().set_len(size).unwrap();
        refused(
            &path,
            &[
                &format!(" has {size} bytes, which is not a multiple of 512 above 0\n"),
                "hint: a raw disk has whole blocks",
            ],
        );
        assert_eq!(fs::metadata(&path).unwrap().len(), size);
    }
}

#[test]
fn the_disk_shrinks_under_the_guest() {
    // Reads past the new end fail or give zeroes; the machine goes on.
    let (_folder, path) = disk(8 << 20);
    let guest = Guest::new("blk op=read depth=8 count=200000").disk(&path, "").start();
    std::thread::sleep(std::time::Duration::from_millis(100));
    OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert_eq!(outcome.number("count"), 200_000);
}

#[test]
fn unknown_requests_are_answered() {
    let (_folder, path) = disk(1 << 20);
    let outcome = Guest::new("hostile dev=blk case=blk-unknown-type").disk(&path, "").run();
    // One request came back, and the device is as it was: no reset is needed.
    let line = "hostile blk-unknown-type status=0xf used=1 recovered\n";
    assert!(outcome.ok().contains(line), "{}", outcome.stdout);
}

#[test]
fn the_eighteenth_device() {
    let disks: Vec<(TempDir, PathBuf)> = (0..18).map(|_| disk(1 << 20)).collect();
    let guest = |count: usize| {
        let guest = Guest::new("blk op=verify count=2").option("--cpus", "2");
        disks[..count].iter().fold(guest, |guest, (_, path)| guest.disk(path, "")).run()
    };
    assert_eq!(guest(17).ok().lines().count(), 1);
    guest(18).misused(&["disk17: is one device too many: a machine has at most 17"]);
}
