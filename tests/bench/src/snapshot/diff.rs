//! A snapshot of what changed, and how long the guest stands still for it.

use super::machine::{Machine, Saved};
use crate::Result;
use crate::report::{Bound, Report};
use crate::system::{Guest, Programs};
use crate::turns::Turns;
use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

const PAUSE: &str = "Diff of 8 MiB in 2 GiB, pause";
const WITHOUT: &str = "no Diff, pause";
const CALL: &str = "Diff of 8 MiB in 2 GiB, request";
const DISK: &str = "Diff of 8 MiB in 2 GiB, on disk";
const GUEST: &str = "payload=work size=4K dirty=8M";
const MIB: u32 = 2048;
/// Longest pause, in ms.
const TARGET: f64 = 20.0;
/// How long the guest is left alone, for what a pause is without a Diff.
const ALONE: Duration = Duration::from_millis(100);
/// How long it takes at most to go from an answer back to the clock.
const BACK: Duration = Duration::from_millis(10);

/// A machine goes on from a full snapshot, its guest dirties memory, and a Diff is taken as it runs.
/// The pause is the longest time between two looks of the guest at its clock, the whole of the
/// requests being within; the request's time is what the client sees of the one that writes.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    let guest = Guest { mib: Some(MIB), ..Guest::new(GUEST) };
    let saved = super::saved(programs, turns.systems, &guest, super::READY)?;
    let per_ms = ticks_per_ms();
    let benches = [(PAUSE, "ms"), (WITHOUT, "ms"), (CALL, "ms"), (DISK, "MiB")];
    turns.take(report, benches, |place, system| {
        let diff = Saved::new(programs)?;
        let mut machine = Machine::restored(programs, system, &saved[place])?;
        machine.running.typed("d")?;
        std::thread::sleep(ALONE);
        let without = machine.running.result_typed("p", "pause")?;
        std::thread::sleep(BACK);
        let call = machine.save_running("Diff", &diff)?;
        let pause = machine.running.result_typed("p", "pause")?;
        let disk = diff.allocated()? as f64 / f64::from(1 << 20);
        Ok([pause / per_ms, without / per_ms, call.as_secs_f64() * 1e3, disk])
    })?;
    let pause = report.median(PAUSE, "hull");
    report.target(PAUSE, "hull, ms", pause, Bound::AtMost(TARGET));
    Ok(())
}

/// Ticks of the TSC in a millisecond, which are the guest's as well.
fn ticks_per_ms() -> f64 {
    // SAFETY: reads a counter.
    let ticks = || unsafe { _rdtsc() };
    let (begun, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(50));
    (ticks() - first) as f64 / (begun.elapsed().as_secs_f64() * 1e3)
}
