//! Machines that are saved and go on, from the command line.

use machine_tests::{Guest, Running};
use std::fs;
use std::os::unix::fs::PermissionsExt;
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
