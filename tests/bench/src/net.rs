//! virtio-net, driven by the payload on one side of a TAP and by the bench on the other.

use crate::Result;
use crate::RunOptions;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::{Running, Sample, median, run as run_guest};
use crate::system::{Guest, Programs, System};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use testnet::{self as tap, Link};

const SIZES: [usize; 2] = [64, 1514];
/// Frames on their way at once: a window of a few, as a connection has it, and all that the queue
/// holds.
const DEPTHS: [(usize, &str); 2] = [(8, "depth 8"), (256, "stream")];
const FRAMES: usize = 50_000;
const ECHOES: usize = 2_000;

fn guest(scenario: &str) -> Guest {
    let line = format!("payload=net {scenario}");
    Guest { tap: Some(tap::NAME.to_owned()), ..Guest::new(&line) }
}

/// Sending, receiving and latency on all systems, as far as they are wanted.
pub fn run(
    programs: &Programs,
    systems: &[System],
    options: &RunOptions,
    report: &mut Report,
) -> Result<()> {
    let runs = options.runs.div_ceil(8).max(3);
    let guests: Vec<System> =
        systems.iter().copied().filter(|system| *system != System::Floor).collect();
    tap::in_namespace(false, || {
        if options.wants("net-send") {
            sends(programs, systems, runs, report)?;
        }
        if options.wants("net-receive") {
            receives(programs, &guests, runs, report)?;
        }
        if options.wants("net-echo") {
            echoes(programs, &guests, runs, report)?;
        }
        Ok(())
    })
}

fn sends(programs: &Programs, systems: &[System], runs: usize, report: &mut Report) -> Result<()> {
    for (depth, how) in DEPTHS {
        for size in SIZES {
            eprintln!("net send {size}, {how}: {runs} runs each");
            let bench = format!("net send {size} bytes, {how}");
            measure(systems, runs, report, &bench, "ticks", |system| {
                send(programs, system, size, depth)
            })?;
            let hull = report.median(&bench, "hull");
            let firecracker = ratio(report.median(&bench, "firecracker"), hull);
            report.target(&bench, "firecracker ÷ hull", firecracker, Bound::AtLeast(2.0));
            let floor = ratio(hull, report.median(&bench, "floor"));
            report.target(&bench, "hull ÷ bare write", floor, Bound::AtMost(2.0));
        }
    }
    Ok(())
}

fn receives(
    programs: &Programs,
    guests: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    for size in SIZES {
        eprintln!("net receive {size}: {runs} runs each");
        let bench = format!("net receive {size} bytes");
        measure(guests, runs, report, &bench, "ticks", |system| receive(programs, system, size))?;
        let hull = report.median(&bench, "hull");
        let firecracker = ratio(report.median(&bench, "firecracker"), hull);
        report.target(&bench, "firecracker ÷ hull", firecracker, Bound::AtLeast(1.2));
    }
    Ok(())
}

fn echoes(programs: &Programs, guests: &[System], runs: usize, report: &mut Report) -> Result<()> {
    eprintln!("net latency: {runs} runs each");
    let bench = "net echo, 64 bytes";
    measure(guests, runs, report, bench, "µs", |system| echo(programs, system))?;
    let latency = ratio(report.median(bench, "hull"), report.median(bench, "firecracker"));
    report.target(bench, "hull ÷ firecracker", latency, Bound::AtMost(1.0));
    Ok(())
}

fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.zip(b).map(|(a, b)| a / b)
}

fn measure(
    systems: &[System],
    runs: usize,
    report: &mut Report,
    bench: &str,
    unit: &str,
    one: impl Fn(System) -> Result<f64>,
) -> Result<()> {
    let mut seen = vec![Vec::new(); systems.len()];
    for _ in 0..runs {
        for (place, system) in systems.iter().enumerate() {
            let value = undisturbed(|| one(*system))
                .map_err(|error| format!("{bench}, {}: {error}", system.name()))?;
            seen[place].push(value);
        }
    }
    for (system, values) in systems.iter().zip(seen) {
        report.add(bench, system.name(), unit, values);
    }
    Ok(())
}

/// Ticks per frame that the guest sends.
fn send(programs: &Programs, system: System, size: usize, depth: usize) -> Result<f64> {
    let sample = if system == System::Floor {
        let mut command = Command::new(&programs.floor);
        command.args(["tapwrite", tap::NAME, &size.to_string(), &FRAMES.to_string()]);
        let mut running = Running::spawn(command, tempfile::tempdir()?)?;
        let first = running.wait_for("result")?;
        running.finish(first)?
    } else {
        let guest = guest(&format!("op=tx size={size} depth={depth} count={FRAMES}"));
        run_guest(programs, system, &guest, "result")?
    };
    sample.result("ticks")
}

/// Ticks per frame that the guest receives, while the bench sends as fast as it can.
fn receive(programs: &Programs, system: System, size: usize) -> Result<f64> {
    let guest = guest(&format!("op=rx count={FRAMES}"));
    let link = Link::open()?;
    let mut running = Running::start(programs, system, &guest)?;
    let first = running.wait_for("ready")?;
    let over = AtomicBool::new(false);
    let frame = tap::frame(size, b"");
    let sample = std::thread::scope(|scope| -> Result<Sample> {
        let flood = scope.spawn(|| -> std::result::Result<(), String> {
            while !over.load(Ordering::Relaxed) {
                // In bursts: two cores are not enough for three busy threads.
                for _ in 0..64 {
                    link.send(&frame).map_err(|error| error.to_string())?;
                }
                std::thread::yield_now();
            }
            Ok(())
        });
        let sample = running.finish(first);
        over.store(true, Ordering::Relaxed);
        match flood.join() {
            Ok(outcome) => outcome?,
            Err(_) => return Err("the sender panicked".into()),
        }
        sample
    })?;
    let frames = sample.result("frames")?;
    if frames < FRAMES as f64 {
        return Err(format!("only {frames} frames arrived").into());
    }
    sample.result("ticks")
}

/// Microseconds from sending a frame to having it back, the median of one run.
fn echo(programs: &Programs, system: System) -> Result<f64> {
    let guest = guest("op=ping count=1000000");
    let link = Link::open()?;
    let mut running = Running::start(programs, system, &guest)?;
    let first = running.wait_for("ready")?;
    let (mut times, mut buffer) = (Vec::new(), [0; 2048]);
    for round in 0..ECHOES {
        let text = round.to_le_bytes();
        let start = Instant::now();
        link.send(&tap::frame(64, &text))?;
        loop {
            match link.receive(&mut buffer)? {
                None => return Err("an echo did not come back".into()),
                // The bench hears its own frames too; an echo comes from the guest's address.
                Some(length) if length >= 22 && buffer[6..12] == tap::GUEST => {
                    if buffer[14..22] == text {
                        break;
                    }
                }
                Some(_) => {}
            }
        }
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    link.send(&tap::frame(64, b"end"))?;
    running.finish(first)?;
    median(&times).ok_or_else(|| "no echo".into())
}
