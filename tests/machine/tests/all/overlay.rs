//! Disks that stand on others: the base is never written, what was flushed survives, and files are folded.

use machine_tests::{Guest, Outcome, Running};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const SIZE: usize = 8 << 20;

struct Disks {
    folder: TempDir,
    base: Vec<u8>,
}

impl Disks {
    fn new() -> Disks {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let base: Vec<u8> = (0..SIZE).map(|at| (at >> 9) as u8 | 1).collect();
        fs::write(folder.path().join("base.img"), &base).unwrap();
        Disks { folder, base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn guest(&self, scenario: &str, overlay: &str, more: &str) -> Guest {
        let overlay = self.path(overlay);
        let more = format!(",overlay={}{more}", overlay.display());
        Guest::new(scenario).disk(&self.path("base.img"), &more)
    }

    fn verified(&self, scenario: &str, overlay: &str, more: &str) -> Outcome {
        let outcome = self.guest(&format!("blk op=verify {scenario}"), overlay, more).run();
        outcome.ok();
        assert_eq!(outcome.number("bad"), 0, "{scenario}{more}");
        assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
        outcome
    }

    fn base_is_untouched(&self) {
        assert!(fs::read(self.path("base.img")).unwrap() == self.base, "the base was written");
    }
}

fn disk(words: &[&Path]) -> Guest {
    words.iter().fold(Guest::hull("disk"), |guest, word| guest.flag(word.to_str().unwrap()))
}

fn beside(guest: &Running, subcommand: &str) -> Guest {
    Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime())
}

#[test]
fn data_comes_back_in_every_mode_and_the_base_stays() {
    for more in [
        "",
        ",direct",
        ",cache=writethrough",
        ",cache=unsafe",
        ",direct,cache=writethrough",
        ",queues=4",
    ] {
        for scenario in [
            "size=4096 count=64",
            "size=512 count=50 sector=3",
            "size=65536 count=8 segs=16 sector=5",
            "size=1M count=2",
            "size=8192 count=20 indirect=1 segs=5 sector=1",
        ] {
            let disks = Disks::new();
            disks.verified(scenario, "top.ovl", more);
            disks.base_is_untouched();
            // And in another life of the machine.
            disks.verified(&format!("read=1 {scenario}"), "top.ovl", more);
            let top = fs::metadata(disks.path("top.ovl")).unwrap();
            assert!(top.blocks() * 512 < 3 << 20, "{} blocks of 512", top.blocks());
        }
    }
}

#[test]
fn many_requests_at_once() {
    for (more, io) in [("", "read"), ("", "write"), (",direct", "write"), (",queues=2", "write")] {
        for depth in [1, 32, 80] {
            let disks = Disks::new();
            let scenario = format!("blk op={io} depth={depth} count=2000 flush=500 size=1536");
            let outcome = disks.guest(&scenario, "top.ovl", more).run();
            outcome.ok();
            assert_eq!(outcome.number("failed"), 0, "{scenario}{more}");
            disks.base_is_untouched();
        }
    }
}

#[test]
fn discard_and_zeroes() {
    for op in ["discard", "wzeroes", "wzeroes unmap=1"] {
        let disks = Disks::new();
        // What the overlay has, what it has not, and a part of a block.
        disks.verified("size=65536 count=16 sector=2048", "top.ovl", "");
        let scenario = format!("blk op={op} sector=3000 sectors=2047");
        let outcome = disks.guest(&scenario, "top.ovl", "").run();
        outcome.ok();
        assert_eq!(outcome.number("status"), 0, "{op}");
        disks.base_is_untouched();
        let whole = disks.path("whole.img");
        disk(&[Path::new("commit"), &disks.path("top.ovl"), Path::new("--output"), &whole])
            .run()
            .ok();
        let bytes = fs::read(&whole).unwrap();
        assert_eq!(bytes.len(), SIZE);
        let (start, end) = (3000 * 512, 5047 * 512);
        assert!(bytes[..2048 * 512] == disks.base[..2048 * 512], "{op}");
        assert!(bytes[end..] == disks.base[end..], "{op}");
        if op != "discard" {
            assert!(bytes[start..end].iter().all(|byte| *byte == 0), "{op}");
        }
    }
}

#[test]
fn what_was_flushed_survives_a_kill() {
    for more in ["", ",direct", ",cache=writethrough"] {
        let disks = Disks::new();
        let scenario = "blk op=verify size=3584 count=200 sector=1 stay=1";
        let guest = disks.guest(scenario, "top.ovl", more).start();
        guest.wait_for("halting");
        guest.signal(libc::SIGKILL);
        guest.finish();
        disks.base_is_untouched();
        disks.verified("size=3584 count=200 sector=1 read=1", "top.ovl", more);
    }
}

#[test]
fn a_kill_between_flushes_leaves_a_disk() {
    let disks = Disks::new();
    // What the first machine flushed stays, whatever the next does elsewhere.
    disks.verified("size=65536 count=16 sector=0", "top.ovl", "");
    for millis in [0, 5, 20, 50, 90] {
        let scenario = "blk op=write size=3584 depth=16 count=100000000 flush=64 pattern=seq";
        let guest = disks.guest(scenario, "other.ovl", "").start();
        std::thread::sleep(Duration::from_millis(100 + millis));
        guest.signal(libc::SIGKILL);
        guest.finish();
        let whole = disks.path(&format!("whole-{millis}.img"));
        let flatten =
            [Path::new("commit"), &disks.path("other.ovl"), Path::new("--output"), &whole];
        disk(&flatten).run().ok();
        // Each sector is the base's, or was written: nothing reads as zeroes.
        let bytes = fs::read(&whole).unwrap();
        for (n, sector) in bytes.chunks(512).enumerate() {
            let old = sector == &disks.base[n * 512..][..512];
            let new = sector[0] != 0 && sector.iter().all(|byte| *byte == sector[0]);
            assert!(old || new, "sector {n} after {millis} ms");
        }
    }
    disks.verified("size=65536 count=16 sector=0 read=1", "top.ovl", "");
    disks.base_is_untouched();
}

#[test]
fn who_else_has_it() {
    let disks = Disks::new();
    let first = disks.guest("halt", "one.ovl", "").start();
    first.wait_for("halting");
    // Others stand on the same base, nobody on the same overlay, and nobody writes the base.
    let second = disks.guest("halt", "two.ovl", "").start();
    second.wait_for("halting");
    let taken = format!("{} is in use", disks.path("one.ovl").display());
    disks.guest("hello", "one.ovl", "").run().failed(&["hull: cannot set up disk0\n", &taken]);
    let base = format!("{} is in use", disks.path("base.img").display());
    Guest::new("hello").disk(&disks.path("base.img"), "").run().failed(&[&base]);
    Guest::new("hello").disk(&disks.path("base.img"), ",ro").run().ok();
    disk(&[Path::new("commit"), &disks.path("one.ovl")]).run().failed(&[&taken]);
    disk(&[Path::new("show"), &disks.path("one.ovl")]).run().ok();
    let config = beside(&first, "ps").flag("--json").run();
    config.ok();
    for guest in [first, second] {
        guest.signal(libc::SIGKILL);
        guest.finish();
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let disks = Disks::new();
    disks.verified("count=1", "top.ovl", "");
    let file = File::options().write(true).open(disks.path("base.img")).unwrap();
    file.set_len(SIZE as u64 + 512).unwrap();
    let refused = |words: &[&str]| disks.guest("hello", "top.ovl", "").run().failed(words);
    refused(&["cannot set up disk0", "8389120 bytes; it had 8388608"]);
    file.set_len(SIZE as u64).unwrap();
    refused(&["was written after", "top.ovl"]);
    let other = disks.path("other.img");
    fs::write(&other, &disks.base).unwrap();
    let more = format!(",overlay={}", disks.path("fresh.ovl").display());
    Guest::new("hello").disk(&other, &more).run().ok();
    disks.guest("hello", "fresh.ovl", "").run().failed(&["stands on", "not on"]);
    fs::write(disks.path("top.ovl"), "x").unwrap();
    refused(&["cannot be used as an overlay", "not an overlay"]);
    Guest::new("hello").disk(&other, ",overlay=").run().misused(&["disk[0].overlay"]);
}

#[test]
fn overlays_are_made_shown_and_folded() {
    let disks = Disks::new();
    let (base, one, two) = (disks.path("base.img"), disks.path("one.ovl"), disks.path("two.ovl"));
    let create = |words: &[&Path]| {
        let all: Vec<&Path> =
            std::iter::once(Path::new("create")).chain(words.iter().copied()).collect();
        disk(&all).run()
    };
    create(&[&one, Path::new("--base"), &base]).ok();
    create(&[&one, Path::new("--base"), &base]).failed(&["is there already"]);
    disks.verified("size=4096 count=3 sector=0 seed=1", "one.ovl", "");
    create(&[&two, Path::new("--base"), &one]).failed(&["looks like an overlay", "--base-format"]);
    create(&[&two, Path::new("--base"), &one, Path::new("--base-format=overlay")]).ok();
    let more = format!(",overlay={}", two.display());
    Guest::new("blk op=verify size=4096 count=2 sector=64 seed=2").disk(&one, &more).run().ok();
    let shown = disk(&[Path::new("show"), &two]).run();
    for words in ["two.ovl", "one.ovl", "base.img", "2 of 2048 blocks", "3 of 2048 blocks", "raw"] {
        assert!(shown.ok().contains(words), "{words}: {}", shown.stdout);
    }
    let json = disk(&[Path::new("show"), &two, Path::new("--json")]).run();
    assert!(json.ok().contains("\"blocks\": 2"), "{}", json.stdout);
    let commit = |words: &[&Path]| {
        let all: Vec<&Path> =
            std::iter::once(Path::new("commit")).chain(words.iter().copied()).collect();
        disk(&all).run()
    };
    commit(&[&two, Path::new("--into"), &base]).failed(&["stands on"]);
    commit(&[&two, Path::new("--into"), &one]).ok();
    assert!(!two.exists());
    disks.base_is_untouched();
    disks.verified("size=4096 count=2 sector=64 seed=2 read=1", "one.ovl", "");
    commit(&[&one]).ok();
    assert!(!one.exists());
    let raw =
        Guest::new("blk op=verify size=4096 count=3 sector=0 seed=1 read=1").disk(&base, "").run();
    raw.ok();
    assert_eq!(raw.number("bad"), 0);
    commit(&[&base]).failed(&["not an overlay"]);
}

#[test]
fn a_killed_commit_is_made_up_for() {
    for millis in [1, 3, 6, 10, 20] {
        let disks = Disks::new();
        disks.verified("size=1M count=8", "top.ovl", "");
        let top = disks.path("top.ovl");
        let commit = disk(&[Path::new("commit"), &top]).start();
        std::thread::sleep(Duration::from_millis(millis));
        commit.signal(libc::SIGKILL);
        commit.finish();
        if top.exists() {
            disks.verified("size=1M count=8 read=1", "top.ovl", "");
            disk(&[Path::new("commit"), &top]).run().ok();
        }
        let base = disks.path("base.img");
        let outcome = Guest::new("blk op=verify size=1M count=8 read=1").disk(&base, "").run();
        outcome.ok();
        assert_eq!(outcome.number("bad"), 0);
    }
}

#[test]
fn a_machine_is_saved_and_goes_on() {
    let disks = Disks::new();
    let saved = disks.path("saved");
    let scenario = "blk op=verify size=512 count=40 sector=3 stay=1";
    let guest = disks.guest(scenario, "top.ovl", ",id=root").option("--name", "first").start();
    guest.wait_for("halting");
    let config = beside(&guest, "config").flag("first").run();
    assert!(config.ok().contains("top.ovl"), "{}", config.stdout);
    let snapshot = beside(&guest, "snapshot").flag("--stop").flag("first");
    snapshot.flag(saved.to_str().unwrap()).run().ok();
    guest.finish().ok();
    let shown = Guest::hull("snapshot").flag("show").flag(saved.to_str().unwrap()).run();
    assert!(shown.ok().contains("top.ovl"), "{}", shown.stdout);
    let restored = Guest::hull("restore").flag(saved.to_str().unwrap()).start();
    std::thread::sleep(Duration::from_millis(300));
    restored.signal(libc::SIGTERM);
    let outcome = restored.finish();
    assert!(!outcome.stderr.contains("changed"), "{}", outcome.stderr);
    disks.verified("size=512 count=40 sector=3 read=1", "top.ovl", "");
    // What somebody else writes to it is seen.
    let file = File::options().write(true).open(disks.path("top.ovl")).unwrap();
    let end = file.metadata().unwrap().len() - 512;
    file.write_all_at(&[1; 512], end).unwrap();
    let restored = Guest::hull("restore").flag(saved.to_str().unwrap()).start();
    restored.wait_for_message("was changed since the snapshot");
    restored.signal(libc::SIGTERM);
    restored.finish();
}
