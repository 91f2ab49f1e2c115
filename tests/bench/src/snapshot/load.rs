//! Going on as an orchestrator has it: a new process, its API, one request.

use super::machine::Machine;
use super::{LINE_END, TALKER, TALKS};
use crate::Result;
use crate::api::http::request;
use crate::counter::Counter;
use crate::report::{Bound, Report};
use crate::system::{Guest, Programs};
use crate::turns::Turns;

const WALL: &str = "load by API, exec to output";
const CPU: &str = "load by API, exec to output, cpu";
/// Of Firecracker's time.
const TARGET: f64 = 0.25;

/// From exec to the guest's first byte: connect(2) every 50 µs, `PUT /snapshot/load` with
/// `resume_vm`, and what the guest has to say. Files are in the page cache.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    let guest = Guest::new(TALKER);
    let saved = super::saved(programs, turns.systems, &guest, TALKS)?;
    turns.take(report, [(WALL, "ms"), (CPU, "ms")], |place, system| {
        let request = request("PUT", "/snapshot/load", &saved[place].load().to_string());
        let mut counter = Counter::open()?;
        let mut machine = Machine::idle(programs, system)?;
        machine.client.send(&request)?;
        let wall = machine.running.wait_for_first(LINE_END)?;
        let cpu = counter.read()?;
        machine.client.expected(204)?;
        Ok([wall, cpu].map(|time| time.as_secs_f64() * 1e3))
    })?;
    let ratio = report.ratio(WALL, "hull", "firecracker");
    report.target(WALL, "hull ÷ firecracker", ratio, Bound::AtMost(TARGET));
    Ok(())
}
