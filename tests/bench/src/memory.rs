//! What a guest that does nothing costs in memory.

use crate::Result;
use crate::host::sync;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::system::{Guest, Programs, System};
use std::time::Duration;

const BENCH: &str = "private dirty memory";

/// Private dirty memory of the process half a second after the guest's first output.
pub fn private_dirty(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    eprintln!("memory: {runs} runs each");
    let guest = Guest::new("payload=spin");
    let mut seen = vec![Vec::new(); systems.len()];
    // Pages of a file that has just been built, or cached, are dirty until they are on disk, and
    // would count as the process's own.
    for system in systems.iter().filter(|system| **system != System::Floor) {
        Running::start(programs, *system, &guest)?.wait_for("hello")?;
    }
    sync();
    for _ in 0..runs {
        for (place, system) in systems.iter().enumerate() {
            // The floor ends at its first output.
            if *system == System::Floor {
                continue;
            }
            let mut running = Running::start(programs, *system, &guest)?;
            running.wait_for("hello")?;
            std::thread::sleep(Duration::from_millis(500));
            seen[place].push(private_dirty_of(running.id())?);
        }
    }
    for (system, values) in systems.iter().zip(seen) {
        report.add(BENCH, system.name(), "kB", values);
    }
    let ratio = report.ratio(BENCH, "hull", "firecracker");
    report.target(BENCH, "hull ÷ firecracker", ratio, Bound::AtMost(1.0));
    Ok(())
}

/// Private dirty memory of a process, in kB.
pub fn private_dirty_of(process: u32) -> Result<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let kilobytes = rollup
        .lines()
        .find_map(|line| line.strip_prefix("Private_Dirty:"))
        .and_then(|rest| rest.split_whitespace().next())
        .ok_or("smaps_rollup without Private_Dirty")?;
    Ok(kilobytes.parse()?)
}
