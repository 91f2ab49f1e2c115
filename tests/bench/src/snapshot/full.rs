//! A full snapshot of a machine most of whose memory was never touched.

use super::machine::{Machine, Saved};
use crate::Result;
use crate::report::{Bound, Report};
use crate::system::{Guest, Programs};
use crate::turns::Turns;

const TIME: &str = "full snapshot of 128 MiB, 10 touched";
const DISK: &str = "full snapshot of 128 MiB, on disk";
const GUEST: &str = "payload=spin dirty=10M";
/// What the guest prints when it has touched them.
const SAYS: &str = "hello";

/// From the request to write the snapshot of a paused machine to the answer, and what its memory file
/// takes on the disk.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    let guest = Guest::new(GUEST);
    turns.take(report, [(TIME, "ms"), (DISK, "MiB")], |_, system| {
        let saved = Saved::new(programs)?;
        let mut machine = Machine::start(programs, system, &guest, SAYS)?;
        machine.pause()?;
        let time = machine.save("Full", &saved)?;
        Ok([time.as_secs_f64() * 1e3, saved.allocated()? as f64 / f64::from(1 << 20)])
    })?;
    let ratio = report.ratio(TIME, "hull", "firecracker");
    report.target(TIME, "hull ÷ firecracker", ratio, Bound::AtMost(0.1));
    let disk = report.median(DISK, "hull");
    report.target(DISK, "hull, MiB", disk, Bound::AtMost(11.0));
    Ok(())
}
