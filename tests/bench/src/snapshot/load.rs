//! Going on as an orchestrator has it: a new process, its API, one request.

use super::machine::Machine;
use super::{LINE_END, TALKER, TALKS};
use crate::Result;
use crate::api::http::request;
use crate::counter::Counter;
use crate::report::{Bound, Report};
use crate::system::{Guest, Programs, System};
use crate::turns::Turns;
use std::time::{Duration, Instant};

const WALL: &str = "load by API, exec to output";
const REQUEST: &str = "load by API, request to output";
const READY: &str = "load by API, VM ready, request to output";
const CPU: &str = "load by API, exec to output, cpu";
/// For a process to come to rest.
const REST: Duration = Duration::from_millis(30);
/// Of Firecracker's time.
const TARGET: f64 = 0.25;

/// From exec to the guest's first byte: connect(2) every 50 µs, `PUT /snapshot/load` with
/// `resume_vm`, and what the guest has to say. Files are in the page cache.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    let guest = Guest::new(TALKER);
    let saved = super::saved(programs, turns.systems, &guest, TALKS)?;
    turns.take(report, [(WALL, "ms"), (REQUEST, "ms"), (CPU, "ms")], |place, system| {
        let request = request("PUT", "/snapshot/load", &saved[place].load().to_string());
        let mut counter = Counter::open()?;
        let mut machine = Machine::idle(programs, system)?;
        let begun = Instant::now();
        machine.client.send(&request)?;
        let wall = machine.running.wait_for_first(LINE_END)?;
        let asked = begun.elapsed();
        let cpu = counter.read()?;
        machine.client.expected(204)?;
        Ok([wall, asked, cpu].map(|time| time.as_secs_f64() * 1e3))
    })?;
    if let Some(place) = turns.systems.iter().position(|system| *system == System::Hull) {
        let turns = Turns { systems: &[System::Hull], ..turns };
        turns.take(report, [(READY, "ms")], |_, _| {
            let request = request("PUT", "/snapshot/load", &saved[place].load().to_string());
            let mut machine = Machine::ready(programs)?;
            std::thread::sleep(REST);
            let begun = Instant::now();
            machine.client.send(&request)?;
            machine.running.wait_for_first(LINE_END)?;
            let asked = begun.elapsed();
            machine.client.expected(204)?;
            Ok([asked.as_secs_f64() * 1e3])
        })?;
    }
    let ratio = report.ratio(WALL, "hull", "firecracker");
    report.target(WALL, "hull ÷ firecracker", ratio, Bound::AtMost(TARGET));
    Ok(())
}
