//! What a snapshot leaves behind in the machine that was saved.

use super::machine::{Machine, Saved};
use crate::Result;
use crate::host::sync;
use crate::report::{Bound, Report};
use crate::system::{Guest, Programs, System};
use crate::turns::Turns;

/// Working sets in MiB, how often they are written over in one sample, and the least speed afterwards,
/// where one is asked for.
const SETS: [(u32, u32, Option<f64>); 2] = [(1, 100, Some(0.95)), (64, 1, None)];
/// Samples before the snapshot, and after it.
const SAMPLES: usize = 25;

/// How fast the guest writes over a working set after a full snapshot that was taken as it ran, by
/// how fast it was before in the same machine. Of either the fastest sample counts: what a snapshot
/// leaves behind slows all of them down, who else is on the machine only some.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    for (mib, rounds, target) in SETS {
        let bench = format!("speed in {mib} MiB, after a snapshot");
        let guest = Guest::new(&format!("payload=work size={mib}M rounds={rounds}"));
        turns.take(report, [(&bench, "÷ before")], |_, system| {
            one(programs, system, &guest).map(|ratio| [ratio])
        })?;
        if let Some(least) = target {
            let seen = report.median(&bench, "hull");
            report.target(&bench, "hull, ÷ before", seen, Bound::AtLeast(least));
        }
    }
    Ok(())
}

fn one(programs: &Programs, system: System, guest: &Guest) -> Result<f64> {
    let saved = Saved::new(programs)?;
    let mut machine = Machine::start(programs, system, guest, super::READY)?;
    // The first one warms the caches.
    machine.running.typed("s")?;
    let before = ticks(&mut machine)?;
    machine.save_running("Full", &saved)?;
    // Whoever leaves that to the kernel has it done meanwhile otherwise.
    sync();
    let after = ticks(&mut machine)?;
    Ok(before / after)
}

/// Ticks of a round, the least of some samples.
fn ticks(machine: &mut Machine) -> Result<f64> {
    let mut sample = || machine.running.result_typed("s", "ticks");
    (1..SAMPLES).try_fold(sample()?, |least, _| Ok(sample()?.min(least)))
}
