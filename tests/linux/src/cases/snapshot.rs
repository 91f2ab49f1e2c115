//! Machines that are saved and go on.

use std::path::Path;
use std::process::Command;

use super::{Case, check};
use crate::guest::{Failure, Guest, Machine};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("snapshot::goes_on_where_it_was", goes_on_where_it_was),
    ("snapshot::rounds_under_load", rounds_under_load),
];

fn hull(site: &Site, guest: &Guest, arguments: &[&str]) -> Result<(), Failure> {
    let mut command = Command::new(&site.hull);
    let output = command.args(arguments).env("XDG_RUNTIME_DIR", guest.runtime()).output()?;
    check(output.status.success(), || format!("hull {arguments:?}: {output:?}"))
}

fn saved(site: &Site, guest: &Guest, name: &str, folder: &Path) -> Result<(), Failure> {
    let folder = folder.to_str().ok_or("the path is not UTF-8")?;
    hull(site, guest, &["snapshot", "--stop", name, folder])
}

/// What is in memory and what programs were at is there afterwards; the kernel sees that it is another
/// machine, and is not told of a CPU that hung.
fn goes_on_where_it_was(site: &Site) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let mut guest = Machine::with_kernel(site, "generic.vmlinuz", "generic.initramfs")?
        .option("--name", "first")
        .option("--cpus", "2")
        .flag("--rng")
        .boot()?;
    guest.run("echo kept >/dev/shm/note")?;
    guest.run("(while :; do echo x >>/dev/shm/ticks; sleep 0.1; done) & echo $! >/dev/shm/pid")?;
    saved(site, &guest, "first", folder.path())?;
    guest.wait_success()?;
    let mut guest = Machine::restored(site, folder.path())?.start_restored()?;
    guest.expect("cat /dev/shm/note", "kept")?;
    guest.run("kill -0 $(cat /dev/shm/pid)")?;
    let ticks = "wc -l </dev/shm/ticks";
    let before: u64 = guest.run(ticks)?.parse()?;
    guest.run("sleep 1")?;
    let after: u64 = guest.run(ticks)?.parse()?;
    check(after > before, || format!("{before} ticks, and then {after}: timers stand still"))?;
    guest.run("dd if=/dev/hwrng of=/dev/null bs=16 count=1 2>/dev/null || :")?;
    let log = guest.run("dmesg")?;
    check(log.contains("crng reseeded due to virtual machine fork"), || {
        format!("the kernel does not know that it is a copy: {log}")
    })?;
    for trouble in ["soft lockup", "rcu_sched self-detected", "clocksource: Marking"] {
        check(!log.contains(trouble), || format!("{trouble}: {log}"))?;
    }
    guest.power_off()
}

/// Saved and gone on from again and again while the disk is written to: what is read back is what was
/// written.
fn rounds_under_load(site: &Site) -> Result<(), Failure> {
    const ROUNDS: usize = 5;
    let image = super::disk::root_disk(site)?;
    let folder = tempfile::tempdir()?;
    let mut guest =
        Machine::new(site)?.disk(image.path(), ",root").option("--name", "round0").boot()?;
    guest.run("dd if=/dev/urandom of=/dev/shm/data bs=1M count=4 2>/dev/null")?;
    let sum = guest.run("md5sum </dev/shm/data")?;
    guest.run(
        "(while :; do cp /dev/shm/data /root/copy.new; sync; mv /root/copy.new /root/copy; \
         echo >>/dev/shm/copies; done) & :",
    )?;
    for round in 0..ROUNDS {
        let place = folder.path().join(round.to_string());
        saved(site, &guest, &format!("round{round}"), &place)?;
        guest.wait_success()?;
        let name = format!("round{}", round + 1);
        guest = Machine::restored(site, &place)?.option("--name", &name).start_restored()?;
        guest.run("sleep 1; [ ! -e /root/copy ] || cmp /dev/shm/data /root/copy")?;
        guest.expect("md5sum </dev/shm/data", &sum)?;
    }
    guest.run("[ $(wc -l </dev/shm/copies) -gt 1 ]")?;
    let log = guest.run("dmesg")?;
    for trouble in ["soft lockup", "I/O error", "EXT4-fs error"] {
        check(!log.contains(trouble), || format!("{trouble}: {log}"))?;
    }
    guest.kill()
}
