//! The ways in which a machine ends, and what is left of it.

use machine_tests::{Guest, PAYLOAD};
use std::time::{Duration, Instant};

#[test]
fn reset_and_power_off_end_well() {
    for end in ["reset", "poweroff"] {
        let outcome = Guest::new(&format!("hello end={end}")).run();
        assert_eq!(outcome.ok(), "hello\n", "{end}");
    }
}

#[test]
fn a_triple_fault_has_a_code_of_its_own() {
    let outcome = Guest::new("triple").run();
    assert_eq!(outcome.code(), 3, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("triple fault"), "{}", outcome.stderr);
    assert!(outcome.left.is_empty());
}

#[test]
fn restart_on_reboot() {
    let guest = Guest::new("hello").option("--on-reboot", "restart").start();
    guest.wait_for("hello\nhello\nhello\n");
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.finish().code(), 143);
}

#[test]
fn power_off_is_no_reboot() {
    let outcome = Guest::new("hello end=poweroff").option("--on-reboot", "restart").run();
    assert_eq!(outcome.ok(), "hello\n");
}

#[test]
fn signals_end_every_kind_of_guest() {
    for (signal, code) in [(libc::SIGTERM, 143), (libc::SIGINT, 130)] {
        // The last one starts over and over, so that the signal comes at any point of it.
        for (scenario, cpus, reboot, text) in [
            ("halt", "1", "exit", "halting"),
            ("spin", "1", "exit", "hello"),
            ("smp cpus=4", "4", "restart", "cpus=4"),
        ] {
            let guest = Guest::new(scenario).option("--cpus", cpus).option("--on-reboot", reboot);
            let guest = guest.option("--name", "mortal").start();
            guest.wait_for(text);
            let start = Instant::now();
            guest.signal(signal);
            let outcome = guest.finish();
            assert_eq!(outcome.code(), code, "{scenario}: {}", outcome.stderr);
            assert!(start.elapsed() < Duration::from_secs(10), "{scenario}");
            assert!(outcome.left.is_empty(), "{scenario}: {:?}", outcome.left);
        }
    }
}

#[test]
fn a_killed_machine_is_no_obstacle() {
    let folder = tempfile::tempdir().unwrap();
    let named = || {
        Guest::new("halt").option("--name", "phoenix").variable("XDG_RUNTIME_DIR", folder.path())
    };
    let first = named().start();
    first.wait_for("halting");
    let taken = named().run();
    taken.failed(&["a machine named \"phoenix\" runs already"]);
    first.signal(libc::SIGKILL);
    assert_eq!(first.finish().code(), 137);
    let second = named().start();
    second.wait_for("halting");
    second.signal(libc::SIGTERM);
    assert_eq!(second.finish().code(), 143);
}

#[test]
fn ps_and_stop() {
    let guest = Guest::new("halt").option("--name", "sleeper").start();
    guest.wait_for("halting");
    let beside =
        |subcommand: &str| Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime());
    let list = beside("ps").run();
    assert!(list.stdout.contains("sleeper"), "{}", list.stdout);
    // It does not listen to its power button, so it is ended after the wait.
    let stop = beside("stop").flag("sleeper").option("--timeout", "1").run();
    assert_eq!(stop.code(), 0, "{}", stop.stderr);
    let runtime = guest.runtime().to_owned();
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
    let list = Guest::hull("ps").variable("XDG_RUNTIME_DIR", &runtime).run();
    assert!(!list.stdout.contains("sleeper"), "{}", list.stdout);
}

#[test]
fn stop_of_nobody() {
    Guest::hull("stop").flag("nobody").run().failed(&["no machine named \"nobody\" runs"]);
}

#[test]
fn the_pid_file_is_there_and_goes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pid");
    let guest = Guest::new("halt").option("--pidfile", &file).start();
    guest.wait_for("halting");
    assert_eq!(std::fs::read_to_string(&file).unwrap().trim(), guest.id().to_string());
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.finish().code(), 143);
    assert!(!file.exists());
}

#[test]
fn a_printed_configuration_runs_the_same_guest() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.toml");
    let printed = Guest::new("hello").flag("--print-config").run();
    std::fs::write(&file, printed.ok()).unwrap();
    let outcome = Guest::hull("run").option("--config", &file).run();
    assert_eq!(outcome.ok(), "hello\n");
    assert!(printed.stdout.contains(&*PAYLOAD.display().to_string()));
}
