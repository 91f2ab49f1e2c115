//! How machines end, start over, listen to their console and live side by side.

use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::{Case, check};
use crate::guest::{BOOT, Failure, Guest, Machine, READY};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("lifecycle::poweroff", poweroff),
    ("lifecycle::reboot_exits", reboot_exits),
    ("lifecycle::reboot_restarts", reboot_restarts),
    ("lifecycle::stop_presses_the_button", stop_presses_the_button),
    ("lifecycle::terminate", terminate),
    ("lifecycle::two_at_once", two_at_once),
    ("console::input_is_complete", input_is_complete),
];

/// Through ACPI S5, with nothing in the runtime directory afterwards.
fn poweroff(site: &Site) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.start("poweroff")?;
    guest.wait_success()?;
    nothing_left(&guest)
}

fn nothing_left(guest: &Guest) -> Result<(), Failure> {
    let mut left = Vec::new();
    let hull = guest.runtime().join("hull");
    if hull.is_dir() {
        for entry in std::fs::read_dir(hull)? {
            left.push(entry?.file_name());
        }
    }
    check(left.is_empty(), || guest.failure(&format!("left behind: {left:?}")).to_string())
}

fn reboot_exits(site: &Site) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.start("reboot")?;
    guest.wait_success()
}

/// The same process boots the same machine again, with its disk and its memory fresh.
fn reboot_restarts(site: &Site) -> Result<(), Failure> {
    let image = super::disk::root_disk(site)?;
    let mut guest = Machine::new(site)?
        .disk(image.path(), ",root")
        .option("--on-reboot", "restart")
        .flag("--rng")
        .boot()?;
    let id = guest.id();
    for round in 1..=2 {
        guest.run(&format!("echo {round} >>/root/rounds; touch /dev/shm/here"))?;
        guest.send("sync; reboot -f\n")?;
        guest.wait_for(READY, BOOT)?;
        guest.run("[ ! -e /dev/shm/here ]")?;
    }
    guest.expect("tr '\\n' ' ' </root/rounds", "1 2")?;
    check(guest.id() == id, || "the process changed".into())?;
    guest.power_off()
}

/// `hull stop NAME`: the guest's drivers see a power button, its init ends it in order.
fn stop_presses_the_button(site: &Site) -> Result<(), Failure> {
    let image = super::disk::root_disk(site)?;
    let mut guest =
        Machine::new(site)?.disk(image.path(), ",root").option("--name", "pressed").boot()?;
    // Written, but not synced: only an orderly end brings it to the disk.
    guest.run("echo unsynced >/root/note")?;
    let hull = |arguments: &[&str]| {
        Command::new(&site.hull).args(arguments).env("XDG_RUNTIME_DIR", guest.runtime()).output()
    };
    let list = hull(&["ps"])?;
    check(String::from_utf8_lossy(&list.stdout).contains("pressed"), || {
        format!("hull ps does not show the machine: {list:?}")
    })?;
    let stop = hull(&["stop", "pressed"])?;
    check(stop.status.success(), || format!("hull stop: {stop:?}"))?;
    guest.wait_success()?;
    nothing_left(&guest)?;

    let mut guest = Machine::new(site)?.disk(image.path(), ",root").boot()?;
    guest.expect("cat /root/note", "unsynced")?;
    guest.power_off()
}

/// SIGTERM and SIGINT end Hull at once, not cleanly for the guest but for the host.
fn terminate(site: &Site) -> Result<(), Failure> {
    for signal in [Signal::TERM, Signal::INT] {
        let network = site.network();
        let mut guest = Machine::new(site)?.option("--net", network.option("")).boot()?;
        let id = i32::try_from(guest.id()).ok().and_then(Pid::from_raw);
        kill_process(id.ok_or("no process id")?, signal)?;
        let status = guest.wait()?;
        check(!status.success(), || format!("ended by {signal:?} with status 0"))?;
        check(status.code().is_some(), || format!("{signal:?} killed Hull: {status}"))?;
        nothing_left(&guest)?;
    }
    Ok(())
}

/// Two machines with a disk and a network each, alive at the same time.
fn two_at_once(site: &Site) -> Result<(), Failure> {
    let boot = |name: &str| -> Result<_, Failure> {
        let image = super::disk::root_disk(site)?;
        let network = site.network();
        let guest = Machine::new(site)?
            .disk(image.path(), ",root")
            .option("--net", network.option(""))
            .cmdline(network.cmdline())
            .cmdline(format!("hull.name={name}"))
            .start("script")?;
        Ok((guest, image, network, name.to_owned()))
    };
    let mut machines = [boot("first")?, boot("second")?];
    for (guest, ..) in &mut machines {
        guest.wait_for(READY, BOOT)?;
    }
    for (guest, _, network, name) in &mut machines {
        guest.expect("hostname", name)?;
        guest.run(&format!("echo {name} >/root/name && sync"))?;
        guest.run(&format!("ping -c 2 -w 20 {} >/dev/null", network.host()))?;
    }
    for (guest, _, _, name) in &mut machines {
        guest.expect("cat /root/name", name)?;
    }
    for (guest, ..) in machines {
        guest.power_off()?;
    }
    Ok(())
}

/// A paste larger than the UART's and the terminal's buffers arrives whole, and comes back whole.
fn input_is_complete(site: &Site) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.boot()?;
    let line = |number: usize| format!("{number:06} {}\n", "0123456789abcdef".repeat(3));
    let text: String = (0..600).map(line).collect();
    guest.send("cat >/tmp/paste; echo pasted\n")?;
    // `cat` has the terminal now; end of file is Ctrl-D at the start of a line.
    std::thread::sleep(Duration::from_millis(500));
    guest.send(&text)?;
    guest.send("\x04")?;
    guest.wait_for("pasted\n", BOOT)?;
    guest.expect("wc -c </tmp/paste", &text.len().to_string())?;
    let back = guest.run("cat /tmp/paste")?;
    check(back == text.trim(), || "the paste came back changed".into())?;
    guest.power_off()
}
