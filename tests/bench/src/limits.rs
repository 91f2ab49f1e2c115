//! Rate limits: what a guest gets of a limit, in percent of it, when it wants more than that.
//!
//! A bucket holds a tenth of a second's tokens and is full at the start. What it held is taken off,
//! so that what is left is the rate.

use crate::Result;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::{Running, Sample};
use crate::system::{Disk, Engine, Guest, Programs, System};
use serde_json::{Value, json};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use testnet::{self as tap, Link};

/// Seconds that a limit is held for.
const SECONDS: u64 = 3;
/// Milliseconds in which a bucket fills.
const REFILL: u64 = 100;
/// How far a rate may be from its limit, in percent of it.
const OFF: f64 = 5.0;
/// Bytes of a request for entropy.
const ENTROPY: u64 = 4096;
/// Bytes of a frame whose bytes are limited, and of one that is only counted.
const FRAMES: [usize; 2] = [1500, 64];

/// What is limited.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Device {
    Read,
    Write,
    Send,
    Receive,
    Entropy,
}

/// The tokens of a bucket.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tokens {
    Bytes,
    Operations,
}

/// A limit: the device, what is counted, how much of it a second.
type Limit = (Device, Tokens, u64);

const LIMITS: [Limit; 18] = [
    (Device::Read, Tokens::Bytes, 4 << 20),
    (Device::Read, Tokens::Bytes, 64 << 20),
    (Device::Read, Tokens::Operations, 500),
    (Device::Read, Tokens::Operations, 10_000),
    (Device::Write, Tokens::Bytes, 4 << 20),
    (Device::Write, Tokens::Operations, 500),
    (Device::Send, Tokens::Bytes, 1 << 20),
    (Device::Send, Tokens::Bytes, 16 << 20),
    (Device::Send, Tokens::Operations, 500),
    (Device::Send, Tokens::Operations, 5000),
    (Device::Receive, Tokens::Bytes, 1 << 20),
    (Device::Receive, Tokens::Bytes, 16 << 20),
    (Device::Receive, Tokens::Operations, 500),
    (Device::Receive, Tokens::Operations, 5000),
    (Device::Entropy, Tokens::Bytes, 256 << 10),
    (Device::Entropy, Tokens::Bytes, 2 << 20),
    (Device::Entropy, Tokens::Operations, 100),
    (Device::Entropy, Tokens::Operations, 1000),
];

/// Characters a second that a console may print; the vCPU takes up to 100 µs for one.
const PRINTED: [u64; 2] = [1000, 4000];

/// All limits on the systems that have them, each as Firecracker's configuration file says it.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let systems = System::like_firecracker(systems);
    eprintln!("limits: {runs} runs each");
    let image = programs.scratch.join("limits.img");
    File::create(&image)?.set_len(64 << 20)?;
    let outcome = tap::in_namespace(false, || {
        for limit in LIMITS {
            one(programs, &systems, runs, &image, limit, report)?;
        }
        Ok(())
    });
    std::fs::remove_file(&image)?;
    outcome?;
    if systems.contains(&System::Hull) {
        PRINTED.into_iter().try_for_each(|rate| console(programs, runs, rate, report))?;
    }
    Ok(())
}

fn one(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    image: &Path,
    limit: Limit,
    report: &mut Report,
) -> Result<()> {
    let bench = name(limit);
    let mut seen = vec![Vec::new(); systems.len()];
    for _ in 0..runs {
        for (place, system) in systems.iter().enumerate() {
            let value = undisturbed(|| measure(programs, *system, image, limit))
                .map_err(|error| format!("{bench}, {}: {error}", system.name()))?;
            seen[place].push(value);
        }
    }
    for (system, values) in systems.iter().zip(seen) {
        report.add(&bench, system.name(), "% of it", values);
    }
    hold(&bench, report);
    Ok(())
}

/// The worst run counts, not the median.
fn hold(bench: &str, report: &mut Report) {
    let row = report.rows.iter().find(|row| row.bench == bench && row.system == "hull");
    let worst = row.and_then(|row| {
        row.runs.iter().map(|percent| (percent - 100.0).abs()).max_by(f64::total_cmp)
    });
    report.target(bench, "hull, % off", worst, Bound::AtMost(OFF));
}

fn name((device, tokens, rate): Limit) -> String {
    let device = match device {
        Device::Read => "blk read",
        Device::Write => "blk write",
        Device::Send => "net send",
        Device::Receive => "net receive",
        Device::Entropy => "rng",
    };
    match tokens {
        Tokens::Operations => format!("limit {device}, {rate} ops/s"),
        Tokens::Bytes if rate >= 1 << 20 => format!("limit {device}, {} MiB/s", rate >> 20),
        Tokens::Bytes => format!("limit {device}, {} KiB/s", rate >> 10),
    }
}

/// What the guest got, in percent of the limit.
fn measure(programs: &Programs, system: System, image: &Path, limit: Limit) -> Result<f64> {
    let (device, tokens, rate) = limit;
    let burst = rate * REFILL / 1000;
    let frame = FRAMES[usize::from(tokens == Tokens::Operations)];
    let each = match (tokens, device) {
        (Tokens::Operations, _) => 1,
        (_, Device::Send | Device::Receive) => frame as u64,
        (_, Device::Entropy) => ENTROPY,
        (_, Device::Read | Device::Write) => 4096,
    };
    let count = (rate * SECONDS + burst).div_ceil(each);
    let scenario = match device {
        Device::Read => format!("payload=blk op=read depth=8 count={count}"),
        Device::Write => format!("payload=blk op=write depth=8 count={count}"),
        Device::Send => format!("payload=net op=tx size={frame} depth=64 count={count}"),
        Device::Receive => format!("payload=net op=rx count={count}"),
        Device::Entropy => format!("payload=rng size={ENTROPY} count={count}"),
    };
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let file = folder.path().join("machine.json");
    let config = described(programs, image, device, &scenario, limiter(tokens, burst));
    serde_json::to_writer(File::create(&file)?, &config)?;
    let mut command = Command::new(programs.program(system));
    if system == System::Hull {
        command.env("XDG_RUNTIME_DIR", "/dev/shm").arg("firecracker");
    }
    command.args(["--no-api", "--level", "Error", "--config-file"]).arg(&file);
    let mut running = Running::spawn(command, folder)?;
    let (sample, done) = if device == Device::Receive {
        let first = running.wait_for("ready")?;
        let sample = flooded(running, first, frame)?;
        // Ticks are between the first frame and the last.
        let frames = sample.result("frames")?;
        (sample, frames - 1.0)
    } else {
        let first = running.wait_for("result")?;
        (running.finish(first)?, count as f64)
    };
    if done < count as f64 - 1.0 {
        return Err(format!("{done} operations instead of {count}").into());
    }
    let seconds = sample.result("ticks")? * done / ticks_per_second();
    Ok((done * each as f64 - burst as f64) / seconds / rate as f64 * 100.0)
}

/// A limiter in Firecracker's form.
fn limiter(tokens: Tokens, burst: u64) -> Value {
    let kind = if tokens == Tokens::Bytes { "bandwidth" } else { "ops" };
    json!({ kind: { "size": burst, "refill_time": REFILL } })
}

fn described(
    programs: &Programs,
    image: &Path,
    device: Device,
    scenario: &str,
    limiter: Value,
) -> Value {
    let disk =
        Disk { path: image.to_owned(), engine: Engine::Default, direct: false, overlay: None };
    let mut guest = Guest::new(scenario);
    match device {
        Device::Read | Device::Write => guest.disk = Some(disk),
        Device::Send | Device::Receive => guest.tap = Some(tap::NAME.to_owned()),
        Device::Entropy => {}
    }
    let mut config = guest.description(&programs.payload);
    match device {
        Device::Read | Device::Write => config["drives"][0]["rate_limiter"] = limiter,
        Device::Send => config["network-interfaces"][0]["tx_rate_limiter"] = limiter,
        Device::Receive => config["network-interfaces"][0]["rx_rate_limiter"] = limiter,
        Device::Entropy => config["entropy"] = json!({ "rate_limiter": limiter }),
    }
    config
}

/// Runs a guest to its end while frames come faster than its limit lets them in.
fn flooded(running: Running, first: Duration, size: usize) -> Result<Sample> {
    let link = Link::open()?;
    let frame = tap::frame(size, b"");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<Sample> {
        let flood = scope.spawn(|| -> std::result::Result<(), String> {
            while !over.load(Ordering::Relaxed) {
                for _ in 0..32 {
                    link.send(&frame).map_err(|error| error.to_string())?;
                }
                // Two processors, for the guest, its monitor and this.
                std::thread::sleep(Duration::from_millis(1));
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
    })
}

/// What a guest may print. Firecracker has no such limit in this version.
fn console(programs: &Programs, runs: usize, rate: u64, report: &mut Report) -> Result<()> {
    let bench = format!("limit console, {rate} B/s");
    let mut values = Vec::new();
    for _ in 0..runs {
        values.push(undisturbed(|| printed(programs, rate))?);
    }
    report.add(&bench, "hull", "% of it", values);
    hold(&bench, report);
    Ok(())
}

fn printed(programs: &Programs, rate: u64) -> Result<f64> {
    let burst = rate * REFILL / 1000;
    let mut command = Command::new(&programs.hull);
    command.env("XDG_RUNTIME_DIR", "/dev/shm").arg("run").arg("--console");
    command.arg(format!("stdio,device=serial,rate={burst}/{REFILL}ms"));
    command.args(["--cpus", "1", "--memory", "128M", "--kernel"]).arg(&programs.payload);
    // More than it gets rid of.
    command.args(["--cmdline", "payload=serialflood size=100M"]);
    let mut running = Running::spawn(command, tempfile::tempdir_in("/dev/shm")?)?;
    let first = running.wait_for_bytes(2 * burst as usize)?;
    let last = running.wait_for_bytes(first.0 + (rate * SECONDS) as usize)?;
    let seconds = (last.1 - first.1).as_secs_f64();
    Ok((last.0 - first.0) as f64 / seconds / rate as f64 * 100.0)
}

/// The guest's clock, which is this processor's.
fn ticks_per_second() -> f64 {
    static RATE: std::sync::OnceLock<f64> = std::sync::OnceLock::new();
    *RATE.get_or_init(|| {
        // SAFETY: every processor that a guest runs on has a time stamp counter.
        let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
        let (start, first) = (Instant::now(), ticks());
        std::thread::sleep(Duration::from_millis(500));
        (ticks() - first) as f64 / start.elapsed().as_secs_f64()
    })
}
