//! CPUs, memory and clocks.

use std::thread;
use std::time::{Duration, Instant};

use super::{Case, check};
use crate::guest::{Failure, Guest, Machine};
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("cpus::one", |site| cpus(site, 1)),
    ("cpus::two", |site| cpus(site, 2)),
    ("cpus::eight", |site| cpus(site, 8)),
    ("memory::smallest", |site| memory(site, "128M", 128)),
    ("memory::gigabyte", |site| memory(site, "1G", 1024)),
    ("memory::across_the_hole", memory_across_the_hole),
    ("clock::tsc", |site| clock(site, "tsc")),
    ("clock::kvm_clock", |site| clock(site, "kvm-clock")),
];

fn cpus(site: &Site, count: u32) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.option("--cpus", count.to_string()).boot()?;
    guest.expect("nproc", &count.to_string())?;
    guest.expect("grep -c ^processor /proc/cpuinfo", &count.to_string())?;
    // One socket, one thread a core: what Hull's CPUID leaves say.
    guest.expect("grep '^cpu cores' /proc/cpuinfo | uniq", &format!("cpu cores\t: {count}"))?;
    // Work runs on every one of them at once, and each takes its own timer interrupts.
    let line = "n=0; while [ $n -lt $(nproc) ]; do (i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done) & n=$((n+1)); done; wait";
    guest.run(line)?;
    let ticked = "grep LOC: /proc/interrupts | awk '{ n = 0; for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) if ($i > 0) n++; print n }'";
    guest.expect(ticked, &count.to_string())?;
    guest.power_off()
}

/// The guest's own figure for its memory, in MiB, with what its kernel keeps for itself.
fn total_matches(total_kib: &str, given_mib: u32) -> bool {
    let reserve = 64 + given_mib / 32;
    total_kib.parse::<u32>().is_ok_and(|kib| {
        let total = kib / 1024;
        total <= given_mib && total + reserve >= given_mib
    })
}

fn memory(site: &Site, option: &'static str, mib: u32) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.memory(option).boot()?;
    let total = guest.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    check(total_matches(&total, mib), || format!("{total} KiB in a guest of {mib} MiB"))?;
    guest.power_off()
}

/// 3.5 GiB do not fit below the hole at 3 GiB: the rest is above 4 GiB.
fn memory_across_the_hole(site: &Site) -> Result<(), Failure> {
    let mut guest = Machine::new(site)?.memory("3584M").boot()?;
    let total = guest.run("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    check(total_matches(&total, 3584), || format!("{total} KiB in a guest of 3584 MiB"))?;
    let high = guest.run("grep -c '^1[0-9a-f]*-1[0-9a-f]* : System RAM' /proc/iomem")?;
    check(high != "0", || guest.failure("no RAM above 4 GiB").to_string())?;
    // Linux hands out high memory first: this lands above 4 GiB.
    guest.run("dd if=/dev/urandom of=/tmp/a bs=1M count=16 2>/dev/null && cp /tmp/a /tmp/b")?;
    guest.run("[ \"$(md5sum </tmp/a)\" = \"$(md5sum </tmp/b)\" ]")?;
    guest.power_off()
}

/// The guest keeps the clock source it was told to, and its seconds are the host's.
fn clock(site: &Site, source: &str) -> Result<(), Failure> {
    let words = format!("clocksource={source} tsc=reliable");
    let mut guest = Machine::new(site)?.option("--cpus", "2").cmdline(words).boot()?;
    let current = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
    guest.expect(current, source)?;
    let uptime = |guest: &mut Guest| -> Result<f64, Failure> {
        Ok(guest.run("cut -d' ' -f1 /proc/uptime")?.parse()?)
    };
    let started = Instant::now();
    let before = uptime(&mut guest)?;
    let asked = started.elapsed();
    thread::sleep(Duration::from_secs(4));
    let restarted = Instant::now();
    let after = uptime(&mut guest)?;
    let answered = restarted.elapsed();
    let passed = after - before;
    let wall = started.elapsed().as_secs_f64();
    // Each reading happened somewhere between its question and its answer.
    let slack = asked.as_secs_f64() + answered.as_secs_f64() + 0.2;
    check((passed - wall).abs() <= slack, || {
        format!("{passed:.2} s passed in the guest, {wall:.2} s outside (± {slack:.2} s)")
    })?;
    guest.expect(current, source)?;
    guest.power_off()
}
