//! Disks that are qcow2 images: they are read and written, survive, and are never taken for what they are not.

use machine_tests::qcow2::{CLUSTER, image};
use machine_tests::{Guest, Outcome, Running};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const SIZE: u64 = 8 << 20;

struct Disks(TempDir);

impl Disks {
    fn new() -> Disks {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        fs::write(folder.path().join("disk.qcow2"), image(SIZE, None)).unwrap();
        Disks(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn guest(&self, scenario: &str, more: &str) -> Guest {
        Guest::new(scenario).disk(&self.path("disk.qcow2"), &format!(",format=qcow2{more}"))
    }

    fn verified(&self, scenario: &str, more: &str) -> Outcome {
        let outcome = self.guest(&format!("blk op=verify {scenario}"), more).run();
        outcome.ok();
        assert_eq!(outcome.number("bad"), 0, "{scenario}{more}");
        assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
        outcome
    }

    fn shown(&self) -> serde_json::Value {
        let path = self.path("disk.qcow2");
        let json = Guest::hull("disk").flag("show").flag(path.to_str().unwrap()).flag("--json");
        serde_json::from_str(json.run().ok()).unwrap()
    }
}

fn beside(guest: &Running, subcommand: &str) -> Guest {
    Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime())
}

#[test]
fn data_comes_back_in_every_mode() {
    for more in
        ["", ",direct", ",cache=writethrough", ",cache=unsafe", ",queues=4", ",rate=10M:1000ops"]
    {
        for scenario in [
            "size=4096 count=64",
            "size=512 count=50 sector=3",
            "size=65536 count=8 segs=16 sector=5",
            "size=1M count=2",
            "size=8192 count=20 indirect=1 segs=5 sector=1",
        ] {
            let disks = Disks::new();
            disks.verified(scenario, more);
            assert_eq!(disks.shown()["dirty"], false, "{scenario}{more}");
            // And in another life of the machine.
            disks.verified(&format!("read=1 {scenario}"), more);
            disks.verified(&format!("read=1 {scenario}"), &format!("{more},ro"));
        }
    }
}

#[test]
fn many_requests_at_once() {
    for (more, io) in [("", "read"), ("", "write"), (",direct", "write"), (",queues=2", "write")] {
        for depth in [1, 32, 80] {
            let disks = Disks::new();
            let scenario = format!("blk op={io} depth={depth} count=2000 flush=500 size=1536");
            let outcome = disks.guest(&scenario, more).run();
            outcome.ok();
            assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
            assert!(disks.shown()["problem"].is_null());
        }
    }
}

#[test]
fn discard_and_zeroes() {
    for op in ["discard", "wzeroes", "wzeroes unmap=1"] {
        let disks = Disks::new();
        disks.verified("size=65536 count=16 sector=2048", "");
        let before = disks.shown()["data_clusters"].as_u64().unwrap();
        let outcome = disks.guest(&format!("blk op={op} sector=2048 sectors=1024"), "").run();
        outcome.ok();
        assert_eq!(outcome.number("status"), 0, "{op}");
        let after = disks.shown()["data_clusters"].as_u64().unwrap();
        assert_eq!(before - after, 8, "{op}");
    }
}

#[test]
fn what_was_flushed_survives_a_kill() {
    for more in ["", ",direct", ",cache=writethrough"] {
        let disks = Disks::new();
        let guest = disks.guest("blk op=verify size=3584 count=200 sector=1 stay=1", more).start();
        guest.wait_for("halting");
        guest.signal(libc::SIGKILL);
        guest.finish();
        assert_eq!(disks.shown()["dirty"], true);
        disks.verified("size=3584 count=200 sector=1 read=1", more);
        disks.verified("size=3584 count=20 sector=9000", more);
        assert_eq!(disks.shown()["dirty"], false);
    }
}

#[test]
fn a_kill_between_flushes_leaves_a_disk() {
    let disks = Disks::new();
    for millis in [0, 5, 20, 50, 90] {
        let scenario = "blk op=write size=3584 depth=16 count=100000000 flush=64 pattern=seq";
        let guest = disks.guest(scenario, "").start();
        std::thread::sleep(Duration::from_millis(100 + millis));
        guest.signal(libc::SIGKILL);
        guest.finish();
        assert!(disks.shown()["problem"].is_null(), "{millis}");
        disks.verified("size=4096 count=100 sector=0", "");
    }
}

#[test]
fn the_format_is_never_guessed() {
    let disks = Disks::new();
    let path = disks.path("disk.qcow2");
    for more in ["", ",ro"] {
        let refused = Guest::new("hello").disk(&path, more).run();
        refused.failed(&["cannot set up disk0", "format=qcow2", "format=raw", "hint: "]);
        Guest::new("hello").disk(&path, &format!("{more},format=raw")).run().ok();
    }
    let raw = disks.path("raw.img");
    fs::write(&raw, vec![1; 1 << 20]).unwrap();
    Guest::new("hello").disk(&raw, ",format=raw").run().ok();
    Guest::new("hello").disk(&raw, ",format=qcow2").run().failed(&["magic"]);
    Guest::new("hello").disk(&raw, ",format=qcow").run().misused(&["did you mean `qcow2`?"]);
    Guest::new("hello").disk(&raw, ",backing").run().misused(&["disk[0].backing", "format=qcow2"]);
    Guest::new("hello").disk(&raw, ",format=qcow2,forked=1").run().misused(&["forked", "backing"]);
    let more = format!(",overlay={}", disks.path("o").display());
    disks.guest("hello", &more).run().misused(&["disk[0].overlay", "qemu-img convert -O raw"]);
    Guest::new("hello").disk(&path, &more).run().failed(&["format=raw"]);
}

#[test]
fn what_an_image_names_is_opened_if_asked_for() {
    let disks = Disks::new();
    let base = disks.path("base.img");
    fs::write(&base, vec![7; SIZE as usize]).unwrap();
    fs::write(disks.path("disk.qcow2"), image(SIZE, Some(("base.img", "raw")))).unwrap();
    let refused = disks.guest("hello", "").run();
    refused.failed(&["stands on \"base.img\"", "hint: ", ",backing"]);
    disks.verified("size=512 count=50 sector=3", ",backing");
    disks.verified("size=512 count=50 sector=3 read=1", ",backing,ro");
    assert!(fs::read(&base).unwrap().iter().all(|byte| *byte == 7), "the base was written");
    assert_eq!(disks.shown()["backing"]["path"], "base.img");
    // The rest of a cluster that was written in part came from it.
    let image = fs::read(disks.path("disk.qcow2")).unwrap();
    assert!(image.chunks(512).any(|sector| sector.iter().all(|byte| *byte == 7)));
    let text = Guest::hull("disk").flag("show").flag(disks.path("disk.qcow2").to_str().unwrap());
    let text = text.run();
    for words in ["qcow2, version 3", "8M", "of 128 clusters", "\"base.img\", format \"raw\""] {
        assert!(text.ok().contains(words), "{words}: {}", text.stdout);
    }
    let commit =
        || Guest::hull("disk").flag("commit").flag(disks.path("disk.qcow2").to_str().unwrap());
    commit().run().failed(&["is a qcow2 image", "`qemu-img commit`"]);
    let output = disks.path("raw").display().to_string();
    commit().flag("--output").flag(&output).run().failed(&["`qemu-img convert -O raw`"]);
    assert!(!disks.path("raw").exists());
}

#[test]
fn who_else_has_it() {
    let disks = Disks::new();
    let guest = disks.guest("halt", "").start();
    guest.wait_for("halting");
    let taken = format!("{} is in use", disks.path("disk.qcow2").display());
    disks.guest("hello", "").run().failed(&["hull: cannot set up disk0\n", &taken]);
    disks.guest("hello", ",ro").run().failed(&[&taken]);
    disks.shown();
    guest.signal(libc::SIGKILL);
    guest.finish();
    let reader = disks.guest("halt", ",ro").start();
    reader.wait_for("halting");
    disks.guest("hello", ",ro").run().ok();
    disks.guest("hello", "").run().failed(&[&taken]);
    let twice = disks.guest("hello", "").disk(&disks.path("disk.qcow2"), ",format=qcow2").run();
    twice.failed(&["in use"]);
}

#[test]
fn a_damaged_image_is_named() {
    let disks = Disks::new();
    let path = disks.path("disk.qcow2");
    // The L1 table leads to itself.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let entry = (3 * CLUSTER as u64) | (1 << 63);
    file.write_all_at(&entry.to_be_bytes(), 3 * CLUSTER as u64).unwrap();
    disks.guest("hello", "").run().failed(&["cannot be used as a qcow2 image", "something else"]);
    assert!(disks.shown()["problem"].as_str().unwrap().contains("something else"));
    file.set_len(100).unwrap();
    disks.guest("hello", "").run().failed(&["cannot be used as a qcow2 image"]);
}

#[test]
fn a_machine_is_saved_and_goes_on() {
    let disks = Disks::new();
    let saved = disks.path("saved");
    let scenario = "blk op=verify size=512 count=40 sector=3 stay=1";
    let guest = disks.guest(scenario, "").option("--name", "first").start();
    guest.wait_for("halting");
    let snapshot = beside(&guest, "snapshot").flag("--stop").flag("first");
    snapshot.flag(saved.to_str().unwrap()).run().ok();
    guest.finish().ok();
    assert_eq!(disks.shown()["dirty"], false);
    let restored = Guest::hull("restore").flag(saved.to_str().unwrap()).start();
    std::thread::sleep(Duration::from_millis(300));
    restored.signal(libc::SIGTERM);
    let outcome = restored.finish();
    assert!(!outcome.stderr.contains("changed"), "{}", outcome.stderr);
    disks.verified("size=512 count=40 sector=3 read=1", "");
    // Its format goes with it: another file in its place has to be one, too.
    let raw = disks.path("raw.img");
    File::create(&raw).unwrap().set_len(SIZE).unwrap();
    let more = format!("--disk=disk0={}", raw.display());
    let restore =
        |path: &Path, more: &str| Guest::hull("restore").flag(path.to_str().unwrap()).flag(more);
    restore(&saved, &more).run().failed(&["cannot be used as a qcow2 image"]);
}
