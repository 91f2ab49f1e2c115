//! From the start of a process to its first answer.

use super::counter::Counter;
use super::http::{Client, request};
use crate::Result;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::system::{Programs, System};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a process may take until it listens.
const PATIENCE: Duration = Duration::from_secs(10);

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
    eprintln!("API start: {runs} runs each");
    let mut seen = vec![[const { Vec::new() }; BENCHES.len()]; systems.len()];
    for run_number in 0..=runs {
        for (place, system) in systems.iter().enumerate() {
            let values = undisturbed(|| one(programs, *system))
                .map_err(|error| format!("API start, {}: {error}", system.name()))?;
            // The first run warms the caches.
            if run_number > 0 {
                seen[place].iter_mut().zip(values).for_each(|(all, value)| all.push(value));
            }
        }
    }
    for (index, (bench, unit)) in BENCHES.iter().enumerate() {
        for (system, values) in systems.iter().zip(&mut seen) {
            report.add(bench, system.name(), unit, std::mem::take(&mut values[index]));
        }
    }
    for (bench, _) in BENCHES.iter().filter(|(bench, _)| bench.ends_with("cpu")) {
        let ratio = super::ratio(report, bench);
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
    // Without a pause: the other processor is the process's.
    let stream = loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => break stream,
            Err(error) if begun.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => std::hint::spin_loop(),
        }
    };
    let accepted = (counter.read()?, begun.elapsed());
    let answer = Client::of(stream)?.ask(&question)?;
    let answered = (counter.read()?, begun.elapsed());
    match answer {
        Some(answer) if answer.status == 200 => {}
        other => return Err(format!("GET / was answered with {other:?}").into()),
    }
    Ok([accepted.0, accepted.1, answered.0, answered.1].map(|time| time.as_secs_f64() * 1e6))
}
