//! Machines that are saved and go on.

use std::path::Path;
use std::process::Command;

use super::{Case, check};
use crate::guest::{Failure, Guest, Machine};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[("snapshot::goes_on_where_it_was", goes_on_where_it_was)];

/// What a kernel's log has of a machine that is not well.
const TROUBLE: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls",
    "blocked for more than",
    "Marking clocksource",
    "BUG:",
    "WARNING: CPU",
    "Oops",
    "Call Trace",
    "I/O error",
    "EXT4-fs error",
    "EXT4-fs warning",
    "is not a head",
];

/// Saves the machine of the name `saved`.
pub fn save(site: &Site, guest: &Guest, options: &[&str], folder: &Path) -> Result<(), Failure> {
    let mut command = Command::new(&site.hull);
    command.arg("snapshot").args(options).arg("saved").arg(folder);
    let output = command.env("XDG_RUNTIME_DIR", guest.runtime()).output()?;
    check(output.status.success(), || {
        guest.failure(&format!("{command:?}: {output:?}")).to_string()
    })
}

/// Returns the kernel's log since it was cleared, which must have none of [`TROUBLE`].
pub fn healthy(guest: &mut Guest) -> Result<String, Failure> {
    let log = guest.run("dmesg")?;
    match TROUBLE.iter().find(|words| log.contains(**words)) {
        Some(words) => Err(format!("the guest's log has {words:?}:\n{log}").into()),
        None => Ok(log),
    }
}

/// A machine that is saved goes on. What is in memory and what programs were at when it was saved is
/// there in the one that goes on from the files, and nothing that came later; the kernel sees that it
/// is another machine, and is not told of a CPU that hung.
fn goes_on_where_it_was(site: &Site) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let mut guest = Machine::with_kernel(site, "generic.vmlinuz", "generic.initramfs")?
        .option("--name", "saved")
        .option("--cpus", "2")
        .flag("--rng")
        .boot()?;
    // What it thinks of the CPU is another matter: the lab's is inconsistent in its eyes.
    guest.run("dmesg -c >/dev/null; echo kept >/dev/shm/note")?;
    // One on each CPU.
    for cpu in [0, 1] {
        let tick = format!("while :; do echo x >>/dev/shm/ticks-{cpu}; usleep 100000; done");
        guest.run(&format!("taskset {} sh -c '{tick}' & :", cpu + 1))?;
    }
    let ticking = |guest: &mut Guest| -> Result<(), Failure> {
        for cpu in [0, 1] {
            let ticks = format!("wc -l </dev/shm/ticks-{cpu}");
            let before: u64 = guest.run(&ticks)?.parse()?;
            guest.run("sleep 1")?;
            let after: u64 = guest.run(&ticks)?.parse()?;
            check(after > before, || format!("CPU {cpu} stands still at {before} ticks"))?;
        }
        Ok(())
    };
    save(site, &guest, &[], folder.path())?;
    guest.run("echo later >/dev/shm/later")?;
    ticking(&mut guest)?;
    healthy(&mut guest)?;
    guest.kill()?;

    let mut guest = Machine::restored(site, folder.path())?.start_restored()?;
    guest.expect("cat /dev/shm/note", "kept")?;
    guest.run("[ ! -e /dev/shm/later ]")?;
    ticking(&mut guest)?;
    guest.run("dd if=/dev/hwrng of=/dev/null bs=16 count=1 2>/dev/null || :")?;
    let log = healthy(&mut guest)?;
    check(log.contains("crng reseeded due to virtual machine fork"), || {
        format!("the kernel does not know that it is a copy: {log}")
    })?;
    guest.power_off()
}
