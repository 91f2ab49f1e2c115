//! The keys that are Hull's on a terminal.

use machine_tests::{Guest, Running};

const HELP: &str = "Ctrl-A x       end the machine\r\n";

/// A guest that sends back what is typed, on a terminal that leaves the keys to it. Whoever waits for
/// its end makes sure that the terminal is as it was before.
fn echo(console: &str) -> Running {
    let (scenario, console) = match console {
        "serial" => ("echo", "tty"),
        _ => ("console", "tty,device=virtio"),
    };
    let guest = Guest::new(scenario).console(console).on_terminal(80, 24).start();
    guest.wait_for("ready");
    assert!(guest.is_raw());
    guest
}

#[test]
fn quit() {
    // The two keys need not come together; a capital is as good.
    for keys in [&["\x01x"][..], &["\x01", "x"], &["\x01X"], &["abc\x01xdef"]] {
        for console in ["serial", "virtio"] {
            let mut guest = echo(console);
            for key in keys {
                guest.write(key);
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            let outcome = guest.finish();
            assert_eq!(outcome.code(), 0, "{keys:?}: {}", outcome.stderr);
            assert_eq!(outcome.stderr, "");
            assert!(outcome.left.is_empty(), "{:?}", outcome.left);
            assert!(!outcome.stdout.contains('\x01'), "{:?}", outcome.stdout);
        }
    }
}

#[test]
fn a_guest_that_does_not_listen_is_ended_all_the_same() {
    for scenario in ["halt", "spin"] {
        let guest = Guest::new(scenario).console("tty").on_terminal(80, 24);
        let mut guest = guest.start();
        guest.wait_for(if scenario == "halt" { "halting" } else { "hello" });
        assert!(guest.is_raw());
        guest.write("more than a serial port takes without anybody who reads it\x01x");
        let outcome = guest.finish();
        assert_eq!(outcome.code(), 0, "{scenario}: {}", outcome.stderr);
        assert!(outcome.left.is_empty(), "{:?}", outcome.left);
    }
}

#[test]
fn help() {
    for console in ["serial", "virtio"] {
        let mut guest = echo(console);
        guest.write("\x01?");
        guest.wait_for(HELP);
        guest.wait_for("Ctrl-A ?       this help\r\n");
        // The guest saw nothing of it, gets what is typed next, and the terminal is its own still.
        assert!(guest.is_raw());
        guest.write("next");
        guest.wait_for("next");
        guest.write("q");
        let outcome = guest.finish();
        assert_eq!(outcome.ok().matches(HELP).count(), 1, "{:?}", outcome.stdout);
        assert!(!outcome.stdout.contains('\x01'), "{:?}", outcome.stdout);
    }
}

#[test]
fn other_keys_are_the_guests() {
    let mut guest = echo("serial");
    // Twice is once for the guest; with a key that is none of Hull's, both are the guest's. Ctrl-C and
    // Ctrl-Z are no signals.
    guest.write("<\x01\x01><\x01c><\x03\x1a>");
    guest.wait_for("<\x01><\x01c><\x03\x1a>");
    guest.write("q");
    assert!(!guest.finish().ok().contains(HELP));
}

#[test]
fn there_are_no_such_keys_without_a_terminal() {
    let mut guest = Guest::new("echo").start();
    guest.wait_for("ready");
    guest.write("<\x01x\x01?>");
    guest.wait_for("<\x01x\x01?>");
    guest.write("q");
    assert!(!guest.finish().ok().contains("Ctrl-A"));
}

#[test]
fn a_terminal_that_is_none() {
    let outcome = Guest::new("hello").console("tty").run();
    outcome.failed(&["hull: --console tty needs a terminal as standard input\n"]);
    assert_eq!(outcome.stdout, "");
}
