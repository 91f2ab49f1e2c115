//! The virtio console in place of the serial port.

use machine_tests::Guest;

#[test]
fn input_comes_back() {
    for more in ["", " noevent=1", " indirect=1"] {
        let guest = Guest::new(&format!("console{more}")).console("stdio,device=virtio");
        guest.start().sends_back();
    }
}

#[test]
fn no_input_is_lost() {
    // More than any buffer on the way holds: who types has to wait.
    let mut guest = Guest::new("console").console("stdio,device=virtio").start();
    guest.wait_for("ready\n");
    let text: String = (0..20_000).map(|number| format!("{number:07}\n")).collect();
    guest.write(&text);
    guest.wait_for(&text);
    guest.write("q");
    guest.finish().ok();
}

#[test]
fn no_console_is_no_device() {
    let outcome = Guest::new("console").console("off,device=virtio").run();
    assert_eq!(outcome.ok(), "");
}

#[test]
fn a_window_that_changes() {
    let guest = Guest::new("console").console("tty,device=virtio").on_terminal(80, 24);
    let mut guest = guest.start();
    guest.wait_for("ready");
    guest.resize(132, 50);
    guest.wait_for("size 132 50");
    guest.write("q");
    guest.finish().ok();
}
