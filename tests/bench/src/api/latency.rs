//! How fast requests are answered while a vCPU never rests and a disk is saturated, or hangs.

use super::hang::Hanging;
use super::http::{Client, PATIENCE, request};
use crate::Result;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::{Running, median};
use crate::system::{Disk, Engine, Guest, Programs, System};
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Requests of a kind in one run, on one connection.
const REQUESTS: usize = 2000;
/// Bytes of the disk, most of them a hole.
const DISK: u64 = 256 << 20;
/// Time that the load has to get under way.
const SETTLE: Duration = Duration::from_millis(300);
/// Least reads of the disk in a second that count as load.
const LOAD: f64 = 1000.0;
/// What Hull has to reach at the median, in µs.
const TARGET: f64 = 1000.0;
/// The system that gave up, in tables.
const SILENT: &str = "no answer within, µs";

/// No limit in effect, but another one each time as far as the monitor knows.
const LIMIT: &str = r#"{ "drive_id": "disk", "rate_limiter": { "bandwidth": { "size": 1099511627776, "refill_time": 100 } } }"#;

/// What is asked; Firecracker has no `GET /metrics`.
const KINDS: [(&str, &str, &str, u16, bool); 4] = [
    ("GET", "/", "", 200, true),
    ("GET", "/machine-config", "", 200, true),
    ("GET", "/metrics", "", 200, false),
    ("PATCH", "/drives/disk", LIMIT, 204, true),
];

/// What the disk does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    /// Reads, as fast as 32 at a time go.
    Saturated,
    /// Reads that never come back.
    Hangs,
}

/// Latencies of one kind of request, in µs; `None` if one of them was not answered.
type Latencies = Option<Vec<f64>>;

/// Median and 99th percentile under both loads.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let image = programs.scratch.join("api.img");
    File::create(&image)?.set_len(DISK)?;
    let outcome = under(Load::Saturated, programs, systems, runs, &image, report);
    std::fs::remove_file(&image)?;
    outcome?;
    let hanging = programs.scratch.join("hanging");
    std::fs::create_dir_all(&hanging)?;
    under(Load::Hangs, programs, systems, 1, &hanging, report)
}

fn variants(system: System, load: Load) -> &'static [(&'static str, Engine)] {
    match (system, load) {
        // Its other engine waits elsewhere.
        (System::Firecracker, Load::Hangs) => {
            &[("firecracker", Engine::Default), ("firecracker-async", Engine::Ring)]
        }
        (System::Firecracker, Load::Saturated) => &[("firecracker", Engine::Default)],
        _ => &[("hull", Engine::Default)],
    }
}

fn under(
    load: Load,
    programs: &Programs,
    systems: &[System],
    runs: usize,
    place: &Path,
    report: &mut Report,
) -> Result<()> {
    let state = if load == Load::Saturated { "disk saturated" } else { "disk hangs" };
    eprintln!("API latency, {state}: {runs} runs each");
    let variants: Vec<_> = systems
        .iter()
        .flat_map(|system| variants(*system, load).iter().map(|variant| (*system, *variant)))
        .collect();
    let mut medians = vec![[const { Vec::new() }; KINDS.len()]; variants.len()];
    let mut tails = medians.clone();
    let mut silent = vec![[false; KINDS.len()]; variants.len()];
    for _ in 0..runs {
        for (index, (system, (name, engine))) in variants.iter().enumerate() {
            let seen = undisturbed(|| one(load, programs, *system, *engine, place))
                .map_err(|error| format!("API latency, {state}, {name}: {error}"))?;
            for (kind, latencies) in seen.into_iter().enumerate() {
                match latencies {
                    Some(times) => {
                        medians[index][kind].extend(median(&times));
                        tails[index][kind].extend(percentile(times, 99));
                    }
                    None => silent[index][kind] = true,
                }
            }
        }
    }
    for (kind, (method, path, ..)) in KINDS.iter().enumerate() {
        let bench = format!("API {method} {path}, {state}");
        for (index, (_, (name, _))) in variants.iter().enumerate() {
            if silent[index][kind] {
                report.add(&bench, name, SILENT, vec![PATIENCE.as_secs_f64() * 1e6]);
            } else {
                report.add(&bench, name, "µs", std::mem::take(&mut medians[index][kind]));
                let tail = std::mem::take(&mut tails[index][kind]);
                report.add(&format!("{bench}, p99"), name, "µs", tail);
            }
        }
        let hull = report.median(&bench, "hull");
        report.target(&bench, "hull, µs at the median", hull, Bound::AtMost(TARGET));
    }
    Ok(())
}

fn percentile(mut values: Vec<f64>, percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied()
}

/// The latencies of each kind; empty where the system does not have it.
fn one(
    load: Load,
    programs: &Programs,
    system: System,
    engine: Engine,
    place: &Path,
) -> Result<[Latencies; KINDS.len()]> {
    // Ended after the file system is gone: who waits for it cannot end before.
    let mut running = None;
    match load {
        Load::Saturated => asked(load, programs, system, engine, place, &mut running),
        Load::Hangs => Hanging::mounted(place, DISK, |file, waiting| {
            let seen = asked(load, programs, system, engine, file, &mut running)?;
            match waiting.load(Ordering::Relaxed) {
                0 => Err("the guest has read nothing: nothing hangs".into()),
                _ => Ok(seen),
            }
        }),
    }
}

fn asked(
    load: Load,
    programs: &Programs,
    system: System,
    engine: Engine,
    image: &Path,
    running: &mut Option<Running>,
) -> Result<[Latencies; KINDS.len()]> {
    let folder = super::folder()?;
    let socket = folder.path().join("api.sock");
    let file = folder.path().join("machine.json");
    let disk = Disk { path: image.to_owned(), engine, direct: false, overlay: None };
    // One vCPU that asks and looks for answers without a pause, for longer than this takes.
    let guest =
        Guest { disk: Some(disk), ..Guest::new("payload=blk op=read depth=32 count=1000000000") };
    let metrics = folder.path().join("metrics.json");
    File::create(&metrics)?;
    let mut config = guest.description(&programs.payload);
    config["metrics"] = json!({ "metrics_path": metrics });
    serde_json::to_writer(File::create(&file)?, &config)?;
    let mut command = super::command(programs, system, &socket);
    command.args(["--level", "Error", "--config-file"]).arg(&file);
    *running = Some(Running::spawn(command, folder)?);
    std::thread::sleep(SETTLE);
    if load == Load::Saturated {
        flush(&socket)?;
    }
    let start = Instant::now();
    let mut latencies = [const { Some(Vec::new()) }; KINDS.len()];
    for ((method, path, body, status, everywhere), times) in KINDS.iter().zip(&mut latencies) {
        if system == System::Firecracker && !everywhere {
            continue;
        }
        *times = latency(&socket, &request(method, path, body), *status)?;
    }
    if load == Load::Saturated {
        let rate = flushed(&socket, &metrics)? / start.elapsed().as_secs_f64();
        if rate < LOAD {
            return Err(format!("the disk had {rate:.0} reads a second: no load").into());
        }
    }
    Ok(latencies)
}

/// µs from sending a request to having its answer.
fn latency(socket: &Path, request: &[u8], status: u16) -> Result<Latencies> {
    let mut client = Client::to(socket)?;
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let start = Instant::now();
        match client.ask(request)? {
            None => return Ok(None),
            Some(answer) if answer.status == status => {}
            Some(answer) => {
                return Err(format!("status {} instead of {status}", answer.status).into());
            }
        }
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(Some(times))
}

/// Has the metrics written.
fn flush(socket: &Path) -> Result<()> {
    let body = r#"{ "action_type": "FlushMetrics" }"#;
    Client::to(socket)?.expect(204, "PUT", "/actions", body)
}

/// Reads of the disk from one [`flush`] to this one.
fn flushed(socket: &Path, metrics: &Path) -> Result<f64> {
    flush(socket)?;
    let text = std::fs::read_to_string(metrics)?;
    let last: Value = serde_json::from_str(text.lines().last().unwrap_or_default())?;
    last["block"]["read_count"].as_f64().ok_or_else(|| "no read_count in the metrics".into())
}
