//! virtio-balloon under a stock driver, which numbers its queues by what was agreed on.

use std::thread;
use std::time::{Duration, Instant};

use super::{Case, check};
use crate::guest::{Failure, Guest, Machine, STEP};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("balloon::inflates", inflates),
    ("balloon::reports", |site| reports(site, "reporting")),
    ("balloon::reports_beside_statistics", |site| reports(site, "stats-interval=1,reporting")),
];

const MIB: u64 = 1024;

/// What the guest has of the host's memory, in KiB.
fn resident(guest: &Guest) -> Result<u64, Failure> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", guest.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or("no VmRSS")?.parse()?)
}

/// A guest that has used 100 MiB and uses them no more.
fn used(site: &Site, balloon: &str) -> Result<Guest, Failure> {
    let mut guest = Machine::new(site)?.option("--balloon", balloon).boot()?;
    guest.run("mount -t tmpfs tmp /tmp; dd if=/dev/zero of=/tmp/x bs=1M count=100 2>/dev/null")?;
    guest.run("rm /tmp/x")?;
    Ok(guest)
}

/// Waits until the guest has `least` KiB less than `before`.
fn falls(guest: &Guest, before: u64, least: u64) -> Result<(), Failure> {
    let deadline = Instant::now() + STEP;
    loop {
        let now = resident(guest)?;
        if now + least <= before {
            return Ok(());
        }
        check(Instant::now() < deadline, || {
            guest.failure(&format!("{before} KiB before, {now} KiB after")).to_string()
        })?;
        thread::sleep(Duration::from_millis(200));
    }
}

fn inflates(site: &Site) -> Result<(), Failure> {
    let mut guest = used(site, "size=64M")?;
    let before = resident(&guest)?;
    guest.run("insmod /modules/virtio_balloon.ko")?;
    // Some of what it gives was never touched.
    falls(&guest, before, 30 * MIB)?;
    let inflated = "n=0; until grep -q 'balloon_inflate 16384' /proc/vmstat; do sleep 0.2; n=$((n+1)); [ $n -lt 300 ] || break; done; grep balloon_ /proc/vmstat";
    let said = guest.run(inflated)?;
    check(said.contains("balloon_inflate 16384"), || said.clone())?;
    // The driver gives all of it back when it goes.
    guest.run("rmmod virtio_balloon")?;
    let said = guest.run("grep balloon_deflate /proc/vmstat")?;
    check(said.ends_with(" 16384"), || said.clone())?;
    guest.run("dd if=/dev/urandom of=/tmp/x bs=1M count=64 2>/dev/null")?;
    guest.run("a=$(md5sum </tmp/x); b=$(md5sum </tmp/x); [ \"$a\" = \"$b\" ]")?;
    guest.power_off()
}

/// Memory that the guest freed goes back to the host without its being asked for it.
fn reports(site: &Site, balloon: &str) -> Result<(), Failure> {
    let mut guest = used(site, balloon)?;
    let before = resident(&guest)?;
    guest.run("insmod /modules/virtio_balloon.ko")?;
    falls(&guest, before, 80 * MIB)?;
    // It is there when it is wanted again.
    guest.run("dd if=/dev/urandom of=/tmp/x bs=1M count=64 2>/dev/null")?;
    guest.run("a=$(md5sum </tmp/x); b=$(md5sum </tmp/x); [ \"$a\" = \"$b\" ]")?;
    guest.power_off()
}
