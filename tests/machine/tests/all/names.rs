//! The runtime directory and what is said about machines by name: `ps`, `stop`, `doctor`, help.

use machine_tests::{Guest, PAYLOAD, Running};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Another `hull` that sees the machines of `guest`.
fn beside(guest: &Running, subcommand: &str) -> Guest {
    Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime())
}

#[test]
fn a_machine_that_reboots_all_the_time_is_stopped_in_order() {
    let guest = Guest::new("hello").option("--name", "rr").option("--on-reboot", "restart").start();
    guest.wait_for("hello\nhello\nhello\n");
    let stop = beside(&guest, "stop").flag("rr").option("--timeout", "1").run();
    assert_eq!(stop.code(), 0, "{}", stop.stderr);
    assert!(!stop.stderr.contains("SIGTERM"), "{}", stop.stderr);
    assert!(!stop.stderr.contains("killing"), "{}", stop.stderr);
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
}

#[test]
fn a_monitor_that_cannot_be_asked_is_sent_a_signal() {
    let guest = Guest::new("halt").option("--name", "deaf").start();
    guest.wait_for("halting");
    fs::remove_file(guest.runtime().join("hull/deaf.sock")).unwrap();
    let stop = beside(&guest, "stop").flag("deaf").option("--timeout", "1").run();
    assert_eq!(stop.code(), 0, "{}", stop.stderr);
    assert!(stop.stderr.contains("cannot be asked"), "{}", stop.stderr);
    assert!(stop.stderr.contains("SIGTERM"), "{}", stop.stderr);
    assert!(!stop.stderr.contains("killing"), "{}", stop.stderr);
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 143, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
}

#[test]
fn a_monitor_that_hangs_is_killed_in_the_end() {
    let guest = Guest::new("halt").option("--name", "stuck").start();
    guest.wait_for("halting");
    guest.signal(libc::SIGSTOP);
    // It does not say how it is, and nobody waits for it.
    let begin = Instant::now();
    let list = beside(&guest, "ps").run();
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
    let row: Vec<&str> = list.stdout.lines().last().unwrap().split_whitespace().collect();
    assert_eq!((row[0], row[2]), ("stuck", "?"), "{}", list.stdout);
    let stop = beside(&guest, "stop").flag("stuck").option("--timeout", "1").run();
    assert_eq!(stop.code(), 0, "{}", stop.stderr);
    let said = |words: &str| match stop.stderr.find(words) {
        Some(place) => place,
        None => panic!("no {words:?} in: {}", stop.stderr),
    };
    assert!(said("power off") < said("SIGTERM") && said("SIGTERM") < said("killing"));
    let runtime = guest.runtime().join("hull");
    assert_eq!(fs::read_dir(runtime).unwrap().count(), 0);
    assert_eq!(guest.finish().code(), 137);
}

#[test]
fn a_machine_without_an_api_is_sent_a_signal() {
    let guest = Guest::new("halt").option("--name", "mute").flag("--no-api").start();
    guest.wait_for("halting");
    assert!(beside(&guest, "ps").run().stdout.contains("mute"));
    let pause = beside(&guest, "pause").flag("mute").run();
    assert_eq!(pause.code(), 1, "{}", pause.stderr);
    assert!(pause.stderr.contains("mute has no API\nhint: "), "{}", pause.stderr);
    let stop = beside(&guest, "stop").flag("mute").run();
    let said = "hull: ending mute by SIGTERM: it has no API\n";
    assert_eq!((stop.code(), stop.stderr.as_str()), (0, said));
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 143, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
}

#[test]
fn a_name_that_is_being_cleared_away_can_be_taken() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("hull")).unwrap();
    let path = folder.path().join("hull/phoenix.json");
    fs::write(&path, "").unwrap();
    // What `hull ps` does with the remains of a machine, slowly.
    let remains = File::open(&path).unwrap();
    // SAFETY: flock has no memory arguments.
    assert_eq!(unsafe { libc::flock(remains.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
    let guest = Guest::new("halt")
        .option("--name", "phoenix")
        .variable("XDG_RUNTIME_DIR", folder.path())
        .start();
    std::thread::sleep(Duration::from_millis(500));
    fs::remove_file(&path).unwrap();
    drop(remains);
    guest.wait_for("halting");
    assert!(path.exists());
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.finish().code(), 143);
}

#[test]
fn a_runtime_directory_may_have_a_long_path() {
    let folder = TempDir::new().unwrap();
    let long = folder.path().join("d".repeat(200));
    let hull = |subcommand: &str| Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", &long);
    let nameless = Guest::new("hello").variable("XDG_RUNTIME_DIR", &long).run();
    assert_eq!(nameless.ok(), "hello\n");
    let guest =
        Guest::new("halt").option("--name", "far").variable("XDG_RUNTIME_DIR", &long).start();
    guest.wait_for("halting");
    assert!(hull("ps").run().stdout.contains("far"));
    let stop = hull("stop").flag("far").flag("--now").run();
    assert_eq!((stop.code(), stop.stderr.as_str()), (0, ""));
    assert_eq!(guest.finish().code(), 0);
    assert_eq!(fs::read_dir(long.join("hull")).unwrap().count(), 0);
}

#[test]
fn a_machine_without_a_name_does_without_an_entry() {
    let outcome = Guest::new("hello").variable("XDG_RUNTIME_DIR", "/dev/null").run();
    assert_eq!(outcome.ok(), "hello\n");
}

#[test]
fn a_kernel_path_need_not_be_utf8() {
    let folder = TempDir::new().unwrap();
    let kernel = folder.path().join(OsStr::from_bytes(b"vmlinux-\xff\x1b"));
    fs::copy(&*PAYLOAD, &kernel).unwrap();
    let run = |scenario: &str| {
        let cmdline = format!("payload={scenario}");
        Guest::bare()
            .option("--kernel", &kernel)
            .option("--memory", "64M")
            .option("--cmdline", cmdline)
    };
    assert_eq!(run("hello").run().ok(), "hello\n");
    // A file of text has no place for it, and says so.
    let printed = run("hello").flag("--print-config").run();
    printed.misused(&["configuration cannot be written", "UTF-8"]);
    let guest = run("halt").option("--name", "odd").start();
    guest.wait_for("halting");
    for list in [beside(&guest, "ps").flag("--json").run(), beside(&guest, "ps").run()] {
        assert!(list.ok().contains("vmlinux-\u{FFFD}"), "{}", list.stdout);
        assert!(!list.stdout.contains('\x1b'), "{}", list.stdout);
    }
    guest.signal(libc::SIGTERM);
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 143, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
}

#[test]
fn a_runtime_directory_that_cannot_be_used_comes_with_a_hint() {
    let hull = |subcommand: &str| {
        let guest = if subcommand == "run" { Guest::new("hello") } else { Guest::hull(subcommand) };
        guest.variable("XDG_RUNTIME_DIR", "/dev/null")
    };
    for guest in [hull("run").option("--name", "a"), hull("ps"), hull("stop").flag("a")] {
        let outcome = guest.run();
        outcome.failed(&["runtime directory /dev/null/hull", "hint: set XDG_RUNTIME_DIR"]);
    }
}

#[test]
fn doctor_only_looks() {
    let folder = TempDir::new().unwrap();
    let outcome = Guest::hull("doctor").variable("XDG_RUNTIME_DIR", folder.path()).run();
    assert!(outcome.stdout.contains("runtime directory"), "{}", outcome.stdout);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn timings_have_keys_of_one_kind() {
    let outcome = Guest::new("hello").flag("--timings=json").run();
    assert_eq!(outcome.ok(), "hello\n");
    let json = &outcome.stderr;
    assert!(json.contains("\"vm_created_ns\":") && json.contains("\"end_ns\":"), "{json}");
    assert_eq!(*json, json.to_lowercase());
}

#[test]
fn help_and_manual_are_where_one_looks() {
    let help = Guest::hull("help").run();
    assert!(help.ok().contains("doctor"), "{}", help.stdout);
    let help = Guest::hull("help").flag("run").run();
    assert!(help.ok().contains("--on-reboot"), "{}", help.stdout);
    let manual = Guest::hull("man").run();
    let titles = manual.ok().lines().filter(|line| line.starts_with(".TH ")).count();
    assert_eq!(titles, 1);
    let subcommands = [
        "run",
        "api",
        "firecracker",
        "ps",
        "pause",
        "resume",
        "stop",
        "config",
        "events",
        "metrics",
        "set-disk",
        "set-net",
        "balloon",
        "doctor",
        "completions",
        "man",
    ];
    for subcommand in subcommands {
        let section = format!("\n.SH \"hull {subcommand}\"\n");
        assert!(manual.stdout.contains(&section), "no section of {subcommand}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = Guest::hull("completions").flag(shell).run();
        for word in ["set-disk", "rx-rate", "until", "device-error"] {
            assert!(script.ok().contains(word), "no {word} in the completions of {shell}");
        }
    }
}

#[test]
fn a_command_line_that_is_too_long_is_a_usage_error() {
    let outcome = Guest::new(&format!("hello {}", "x".repeat(3000))).run();
    outcome.misused(&["the kernel command line has 3", "hint: shorten --cmdline"]);
}
