//! Machines that are saved and go on, from the command line.

use machine_tests::{Guest, HugePages, PAYLOAD, Running};
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use tempfile::TempDir;

/// Another `hull` that sees the machines of `guest`.
fn beside(guest: &Running, subcommand: &str) -> Guest {
    Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime())
}

#[test]
fn a_machine_is_saved_and_its_copies_go_on() {
    let folder = TempDir::new().unwrap();
    let saved = folder.path().join("a/b");
    let guest = Guest::new("spin say=1").option("--name", "first").flag("--rng").start();
    guest.wait_for("hello");
    let outcome = beside(&guest, "snapshot").flag("first").flag(saved.to_str().unwrap()).run();
    assert_eq!(outcome.ok(), "");
    for name in ["state", "memory"] {
        let mode = fs::metadata(saved.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let shown = Guest::hull("snapshot").flag("show").flag(saved.to_str().unwrap()).run();
    for words in ["first", "state of vcpu 0", "state of rng", "memory written"] {
        assert!(shown.ok().contains(words), "{words}: {}", shown.stdout);
    }
    let shown = Guest::hull("snapshot").flag("show").flag("--json").flag(saved.to_str().unwrap());
    assert!(shown.run().ok().starts_with("{\n  \"hull\""));
    // Two copies beside the machine itself, with names of their own.
    let copy = |name: &str| {
        let restore = beside(&guest, "restore").flag(saved.to_str().unwrap());
        restore.option("--name", name).start()
    };
    let (one, other) = (copy("one"), copy("other"));
    one.wait_for("...");
    other.wait_for("...");
    let list = beside(&guest, "ps").run();
    for name in ["first", "one", "other"] {
        assert!(list.ok().contains(name), "{name}: {}", list.stdout);
    }
    // A copy is saved in its turn, and ends.
    let again = folder.path().join("again");
    let outcome =
        beside(&guest, "snapshot").flag("--stop").flag("one").flag(again.to_str().unwrap()).run();
    assert_eq!(outcome.ok(), "");
    assert_eq!(one.finish().code(), 0);
    let third = beside(&guest, "restore").flag(again.to_str().unwrap()).flag("--paused");
    let third = third.option("--name", "third").start();
    let resume = || beside(&guest, "resume").flag("third").run();
    while resume().code() != 0 {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    third.wait_for(".");
    for (name, running) in [("other", other), ("third", third)] {
        assert_eq!(beside(&guest, "stop").flag("--now").flag(name).run().code(), 0);
        assert_eq!(running.finish().code(), 0);
    }
    assert_eq!(beside(&guest, "stop").flag("--now").flag("first").run().code(), 0);
    assert_eq!(guest.finish().code(), 0);
}

#[test]
fn what_cannot_be_saved_or_restored_is_named() {
    let restore = |folder: &str| Guest::hull("restore").flag(folder);
    restore("/nowhere").run().failed(&["/nowhere/state", "No such file"]);
    restore("/nowhere").option("--net", "x").run().misused(&["--net", "id, ="]);
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("state"), "x").unwrap();
    restore(folder.path().to_str().unwrap()).run().failed(&["not a snapshot"]);
    Guest::hull("snapshot").flag("show").flag("/etc/passwd").run().failed(&["not a snapshot"]);
    let nobody = Guest::hull("snapshot").flag("nobody").flag(folder.path().to_str().unwrap());
    nobody.run().failed(&["no machine named \"nobody\""]);
}

/// A guest with 2,048 pages that it knows, and a snapshot of it.
fn working(saved: &str) -> Running {
    begun(Guest::new("work dirty=8388608 size=65536"), saved)
}

fn begun(guest: Guest, saved: &str) -> Running {
    let mut guest = guest.option("--name", "first").start();
    guest.wait_for("ready");
    guest.write("d");
    guest.wait_for("dirty");
    assert_eq!(beside(&guest, "snapshot").flag("first").flag(saved).run().ok(), "");
    guest
}

fn stop(guest: &Running, name: &str) {
    assert_eq!(beside(guest, "stop").flag("--now").flag(name).run().code(), 0);
}

#[test]
fn diffs_are_listed_merged_and_removed() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut guest = working(&at("base"));
    for (name, pages) in [("one", 4096), ("two", 6144)] {
        guest.write("dc");
        guest.wait_for(&format!("pages={pages}"));
        let snapshot = beside(&guest, "snapshot").flag("--diff").flag("first").flag(&at(name));
        assert_eq!(snapshot.run().ok(), "");
        let written = fs::metadata(folder.path().join(name).join("memory")).unwrap();
        let written = std::os::unix::fs::MetadataExt::blocks(&written) * 512;
        assert!((8 << 20..9 << 20).contains(&written), "{written}");
    }
    let snapshot = |words: &[&str]| {
        words.iter().fold(Guest::hull("snapshot"), |guest, word| guest.flag(word)).run()
    };
    let list = snapshot(&["ls", folder.path().to_str().unwrap()]);
    for words in ["base", "../base", "one", "../one", "two", "first", "MEMORY"] {
        assert!(list.ok().contains(words), "{words}: {}", list.stdout);
    }
    let json = snapshot(&["ls", "--json", folder.path().to_str().unwrap()]);
    assert_eq!(json.ok().matches("\"dir\"").count(), 3);
    snapshot(&["rm", &at("base")]).failed(&["base", "one", "diff to"]);
    let restored = |guest: &Running, name: &str, pages: u32| {
        let mut copy = beside(guest, "restore").flag(&at(name)).option("--name", "copy").start();
        copy.write("c");
        copy.wait_for(&format!("pages={pages}"));
        stop(guest, "copy");
        assert_eq!(copy.finish().code(), 0);
    };
    restored(&guest, "two", 6144);
    // Into what it stands on, which takes what is above with it.
    snapshot(&["merge", &at("one"), "--into", &at("base")]).ok();
    restored(&guest, "base", 4096);
    restored(&guest, "two", 6144);
    snapshot(&["merge", &at("two")]).ok();
    snapshot(&["rm", &at("base"), &at("one")]).ok();
    restored(&guest, "two", 6144);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    // What the next one would be a diff to is gone, or is not: nothing is lost.
    fs::remove_dir_all(folder.path().join("two")).unwrap();
    guest.write("dc");
    guest.wait_for("pages=8192");
    beside(&guest, "snapshot").flag("--diff").flag("first").flag(&at("three")).run().ok();
    restored(&guest, "three", 8192);
    snapshot(&["merge", &at("nothing")]).failed(&["nothing/state", "No such file"]);
    stop(&guest, "first");
    assert_eq!(guest.finish().code(), 0);
}

#[test]
fn damage_is_found_wherever_it_is() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut guest = working(&at("base"));
    guest.write("dc");
    guest.wait_for("pages=4096");
    beside(&guest, "snapshot").flag("--diff").flag("first").flag(&at("diff")).run().ok();
    stop(&guest, "first");
    guest.finish();
    let verify = |words: &[&str]| {
        let verify = Guest::hull("snapshot").flag("verify");
        words.iter().fold(verify, |guest, word| guest.flag(word)).run()
    };
    let good = verify(&[&at("diff"), &at("base")]);
    assert_eq!(good.ok().matches("as it was written").count(), 3, "{}", good.stdout);
    let json = verify(&["--json", &at("diff")]);
    let json: serde_json::Value = serde_json::from_str(json.ok()).unwrap();
    assert_eq!(json[1]["memory"], at("base/memory"));
    assert!(json[0]["bytes"].as_u64().unwrap() >= 8 << 20, "{json}");
    let header: serde_json::Value = {
        let shown = Guest::hull("snapshot").flag("show").flag("--json").flag(&at("base")).run();
        serde_json::from_str(shown.ok()).unwrap()
    };
    let samples: Vec<u64> = header["memory"]["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| sample["page"].as_u64().unwrap())
        .collect();
    let path = folder.path().join("base/memory");
    let memory = fs::read(&path).unwrap();
    // One bit of a page that has something, and of one that has nothing; neither is looked at by a restore.
    let page = |zero: bool| {
        let pages = memory.chunks(4096).zip(0u64..);
        pages
            .filter(|(page, n)| page.iter().all(|byte| *byte == 0) == zero && !samples.contains(n))
            .map(|(_, n)| n)
            .last()
            .unwrap()
    };
    let file = fs::File::options().write(true).open(&path).unwrap();
    for page in [page(false), page(true)] {
        let place = page * 4096 + 1234;
        let byte = memory[place as usize];
        file.write_all_at(&[byte ^ 4], place).unwrap();
        verify(&[&at("base")]).failed(&["base/memory is damaged"]);
        // What stands on it is damaged too, and what is not is said all the same.
        let outcome = verify(&[&at("diff"), &at("base")]);
        assert_eq!(outcome.stderr.matches("base/memory is damaged").count(), 2);
        file.write_all_at(&[byte], place).unwrap();
        verify(&[&at("diff")]).ok();
    }
    // A page that was lost.
    file.write_all_at(&[0; 4096], page(false) * 4096).unwrap();
    verify(&[&at("base")]).failed(&["base/memory is damaged"]);
    verify(&[&at("nothing")]).failed(&["nothing/state", "No such file"]);
}

#[test]
fn huge_pages_are_saved_and_go_on_as_such() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    // 64 MiB, twice.
    let _pool = HugePages::for_guests(64);
    let guest = Guest::bare()
        .option("--kernel", &*PAYLOAD)
        .option("--memory", "64M")
        .option("--cmdline", "payload=work dirty=8388608 size=65536")
        .flag("--huge-pages");
    let mut guest = begun(guest, &at("base"));
    guest.write("dc");
    guest.wait_for("pages=4096");
    let save = |guest: &Running, words: &[&str]| {
        words.iter().fold(beside(guest, "snapshot"), |save, word| save.flag(word)).run().ok();
    };
    save(&guest, &["--diff", "first", &at("one")]);
    let restored = |name: &str, pages: u32| {
        let mut copy = beside(&guest, "restore").flag(&at(name)).option("--name", "copy").start();
        copy.write("c");
        copy.wait_for(&format!("pages={pages}"));
        // All that it ever wrote, at least.
        let huge = copy.kilobytes("HugetlbPages");
        assert!((u64::from(pages) * 4..64 << 10).contains(&huge), "{huge} kB");
        copy
    };
    let ended = |copy: Running| {
        stop(&guest, "copy");
        assert_eq!(copy.finish().code(), 0);
    };
    ended(restored("base", 2048));
    // A copy is saved in its turn, twice.
    let mut copy = restored("one", 4096);
    copy.write("dc");
    copy.wait_for("pages=6144");
    save(&guest, &["--diff", "copy", &at("two")]);
    copy.write("dc");
    copy.wait_for("pages=8192");
    save(&guest, &["copy", &at("whole")]);
    ended(copy);
    let snapshot = |words: &[&str]| {
        words.iter().fold(Guest::hull("snapshot"), |guest, word| guest.flag(word)).run()
    };
    let shown = |name: &str| snapshot(&["show", &at(name)]).ok().to_owned();
    assert!(shown("two").contains("../one"), "{}", shown("two"));
    ended(restored("two", 6144));
    snapshot(&["merge", &at("two")]).ok();
    snapshot(&["rm", &at("one"), &at("base")]).ok();
    snapshot(&["verify", &at("two"), &at("whole")]).ok();
    ended(restored("two", 6144));
    ended(restored("whole", 8192));
    stop(&guest, "first");
    assert_eq!(guest.finish().code(), 0);
}

#[test]
fn what_is_touched_is_written_down_and_fetched() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let guest = working(&at("base"));
    let copy = || beside(&guest, "restore").flag(&at("base")).option("--name", "copy");
    let mut one = copy().option("--record", at("set")).start();
    one.write("c");
    one.wait_for("pages=2048");
    stop(&guest, "copy");
    assert_eq!(one.finish().code(), 0);
    let set = fs::read_to_string(at("set")).unwrap();
    assert!(set.contains("\"pages\""), "{set}");
    // It does not run, and has its memory all the same.
    let other = copy().flag("--paused").option("--prefetch", at("set")).start();
    let there = || other.kilobytes("RssFile") > 9000;
    while !there() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    stop(&guest, "copy");
    assert_eq!(other.finish().code(), 0);
    let refused = |options: &str| copy().option("--prefetch", options).run();
    refused(&at("nothing")).failed(&["working set", "nothing", "No such file"]);
    refused(&at("base/memory")).failed(&["not a working set"]);
    refused(&(at("set") + ",rate=x")).misused(&["--prefetch", "rate"]);
    fs::write(at("set"), r#"{ "id": "x", "pages": [] }"#).unwrap();
    refused(&at("set")).failed(&["another snapshot's"]);
    stop(&guest, "first");
    assert_eq!(guest.finish().code(), 0);
}

#[test]
fn the_console_stays_as_the_guest_has_it() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let with = Guest::new("spin say=1").option("--name", "m").start();
    with.wait_for("hello");
    assert_eq!(beside(&with, "snapshot").flag("--stop").flag("m").flag(&at("with")).run().ok(), "");
    with.finish();
    let without = Guest::new("spin").console("off").option("--name", "m").start();
    let save = || beside(&without, "snapshot").flag("--stop").flag("m").flag(&at("without")).run();
    while save().code() != 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    without.finish();
    let restore = |name: &str| Guest::hull("restore").flag(&at(name)).option("--name", "copy");
    // Nobody listens, and the guest is none the wiser.
    for name in ["with", "without"] {
        let copy = restore(name).option("--console", "off").start();
        let stop = || beside(&copy, "stop").flag("--now").flag("copy").run();
        while stop().code() != 0 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let outcome = copy.finish();
        assert_eq!(outcome.ok(), "");
    }
    restore("without").option("--console", "stdio").run().misused(&["console", "without one"]);
    let copy = restore("with").option("--console", "file=".to_owned() + &at("file")).start();
    while !fs::read_to_string(at("file")).is_ok_and(|text| text.contains('.')) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    stop(&copy, "copy");
    copy.finish();
}

#[test]
fn what_others_stand_on_is_not_replaced() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let guest = working(&at("base"));
    for name in ["one", "two"] {
        let snapshot = beside(&guest, "snapshot").flag("--diff").flag("first").flag(&at(name));
        assert_eq!(snapshot.run().ok(), "");
    }
    // The second is a diff to the first.
    let merge = |words: &[&str]| {
        let merge = Guest::hull("snapshot").flag("merge");
        words.iter().fold(merge, |guest, word| guest.flag(word)).run()
    };
    let again = |words: &[&str]| {
        let save = beside(&guest, "snapshot").flag("first");
        words.iter().fold(save, |guest, word| guest.flag(word)).run()
    };
    again(&[&at("one")]).failed(&["one", "two", "diff to"]);
    merge(&[&at("two"), "--into", &at("base")]).failed(&["base", "one", "diff to"]);
    again(&["--force", &at("one")]).ok();
    stop(&guest, "first");
    assert_eq!(guest.finish().code(), 0);
    // Nothing is made for what is not there.
    merge(&[&at("nothing")]).failed(&["No such file"]);
    assert!(!folder.path().join("nothing").exists());
    // What is damaged can be removed, if one insists; a pipe is none.
    fs::write(folder.path().join("one/state"), "x").unwrap();
    let remove = |words: &[&str]| {
        let remove = Guest::hull("snapshot").flag("rm");
        words.iter().fold(remove, |guest, word| guest.flag(word)).run()
    };
    remove(&[&at("two")]).ok();
    remove(&[&at("one")]).failed(&["not a snapshot"]);
    remove(&["--force", &at("one")]).ok();
    assert!(!folder.path().join("one").exists());
}

#[test]
fn each_copy_is_told_that_it_is_another() {
    let folder = TempDir::new().unwrap();
    let saved = folder.path().join("s").display().to_string();
    let mut guest = working(&saved);
    let word = |text: &str, name: &str| -> String {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    let copy = || {
        let mut copy = beside(&guest, "restore").flag(&saved).start();
        copy.write("iq");
        copy.finish().ok().to_owned()
    };
    let mut texts = vec![copy(), copy()];
    guest.write("iq");
    texts.push(guest.finish().ok().to_owned());
    // VMGenID; of VMClock: what it is, its sequence, which is even, the disruption marker.
    let mut seen: Vec<_> =
        texts.iter().map(|text| word(text, "vmgenid")[..32].to_owned()).collect();
    seen.extend(texts.iter().map(|text| word(text, "vmclock")[24..48].to_owned()));
    for text in &texts {
        let clock = word(text, "vmclock");
        assert!(clock.starts_with("56434c4b"), "{clock}");
        assert_eq!(u8::from_str_radix(&clock[24..26], 16).unwrap() % 2, 0, "{clock}");
    }
    let all = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), all, "{texts:?}");
}
