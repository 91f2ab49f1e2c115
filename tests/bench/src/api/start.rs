//! From the start of a process to its first answer.

use super::http::{Client, connected, request};
use crate::Result;
use crate::counter::Counter;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::system::{Programs, System};
use crate::turns::Turns;
use std::time::Instant;

/// The four figures of a start, and the names of their benches.
const BENCHES: [(&str, &str); 4] = [
    ("API start to accept, cpu", "µs"),
    ("API start to accept", "µs"),
    ("API start to first answer, cpu", "µs"),
    ("API start to first answer", "µs"),
];

/// What it costs until the socket accepts a connection, and until `GET /` is answered on it.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let turns = Turns { systems, runs };
    turns.take(report, BENCHES, |_, system| one(programs, system))?;
    for (bench, _) in BENCHES.iter().filter(|(bench, _)| bench.ends_with("cpu")) {
        let ratio = report.ratio(bench, "hull", "firecracker");
        report.target(bench, "hull ÷ firecracker", ratio, Bound::AtMost(1.0));
    }
    Ok(())
}

/// Microseconds, as in [`BENCHES`].
fn one(programs: &Programs, system: System) -> Result<[f64; BENCHES.len()]> {
    let folder = super::folder()?;
    let socket = folder.path().join("api.sock");
    let command = super::command(programs, system, &socket);
    let question = request("GET", "/", "");
    let mut counter = Counter::open()?;
    let begun = Instant::now();
    let _running = Running::spawn(command, folder)?;
    let stream = connected(&socket)?;
    let accepted = (counter.read()?, begun.elapsed());
    let answer = Client::of(stream)?.ask(&question)?;
    let answered = (counter.read()?, begun.elapsed());
    match answer {
        Some(answer) if answer.status == 200 => {}
        other => return Err(format!("GET / was answered with {other:?}").into()),
    }
    Ok([accepted.0, accepted.1, answered.0, answered.1].map(|time| time.as_secs_f64() * 1e6))
}
