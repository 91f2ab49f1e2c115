//! Copies of a running machine: how long until one runs, and what a thousand cost.

use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::snapshot::machine::{Machine, Saved};
use crate::snapshot::{LINE_END, TALKER, TALKS};
use crate::system::{Guest, Programs, System};
use crate::{Result, RunOptions};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The parent: 10 MiB of 128 are touched, and it is halted, as its copies are once they have said a word.
const GUEST: &str = "payload=work size=4K dirty=10M";
const MIB: u32 = 128;
/// MiB that a guest has touched when it is forked first.
const TOUCHED: [u32; 3] = [10, 100, 1024];
/// Between two forks, for the copy to come to rest.
const REST: Duration = Duration::from_millis(30);
/// From one look at what a copy says to the next.
const LOOK: Duration = Duration::from_micros(20);
/// How long a process may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Copies that are alive at once.
const MANY: u32 = 1000;

/// As far as a call gets until there is something to be read.
const OUTPUT: &str = "to output";

/// A pool, ended when dropped.
struct Pool {
    process: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Pool {
    /// One that keeps so many processes ready for the parent's copies; with none it makes them as needed.
    fn start(programs: &Programs, number: usize) -> Result<Pool> {
        let folder = crate::api::folder()?;
        let socket = folder.path().join("pool");
        let keep = match number {
            // Of a shape that nobody asks for.
            0 => "number=1,memory=64M".to_owned(),
            number => format!("number={number},memory={MIB}M"),
        };
        let process = Command::new(programs.program(System::Hull))
            .env("XDG_RUNTIME_DIR", folder.path())
            .args(["pool", "--keep", &keep, "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .spawn()?;
        let pool = Pool { process, socket, _folder: folder };
        let begun = Instant::now();
        let id = pool.process.id();
        // One is there for other shapes.
        while children_of(id)? < number.max(1) + 1 {
            if begun.elapsed() > PATIENCE {
                return Err("the pool does not fill".into());
            }
            std::thread::sleep(REST);
        }
        // The last one gets its parts.
        std::thread::sleep(REST * 4);
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        end(self.process.id());
        // It was told to end.
        let _ = self.process.wait();
    }
}

fn children_of(process: u32) -> Result<usize> {
    let children = format!("/proc/{process}/task/{process}/children");
    Ok(std::fs::read_to_string(children)?.split_whitespace().count())
}

/// Has a process end by itself, so that it leaves nothing.
fn end(process: u32) {
    // SAFETY: a signal to a process that this one had made, and that nobody else waits for.
    unsafe { libc::kill(process as libc::pid_t, libc::SIGTERM) };
}

/// Copies, ended when dropped.
#[derive(Default)]
struct Copies(Vec<u32>);

impl Drop for Copies {
    fn drop(&mut self) {
        self.0.iter().for_each(|process| end(*process));
        let begun = Instant::now();
        let there = |process: &u32| Path::new(&format!("/proc/{process}")).exists();
        while self.0.iter().any(there) && begun.elapsed() < PATIENCE {
            std::thread::sleep(REST);
        }
    }
}

impl Copies {
    /// Adds those of an answer, all of which have to be there.
    fn add(&mut self, answer: &Value) -> Result<()> {
        for child in answer["children"].as_array().ok_or("there are no children")? {
            let pid = child["pid"].as_u64().ok_or_else(|| child.to_string())?;
            self.0.push(u32::try_from(pid)?);
        }
        Ok(())
    }
}

/// A halted machine.
fn parent(programs: &Programs) -> Result<Machine> {
    let guest = Guest { mib: Some(MIB), ..Guest::new(GUEST) };
    let mut machine = Machine::start(programs, System::Hull, &guest, "ready\n")?;
    machine.running.typed("d")?;
    machine.running.typed("h")?;
    std::thread::sleep(REST);
    Ok(machine)
}

/// All parts that are wanted. Others have nothing like it.
pub fn run(
    programs: &Programs,
    systems: &[System],
    options: &RunOptions,
    report: &mut Report,
) -> Result<()> {
    if !systems.contains(&System::Hull) {
        return Ok(());
    }
    if options.wants("fork-call") {
        for (what, ready) in [("fork, pool filled", true), ("fork, no pool", false)] {
            calls(programs, what, ready, options.runs, report)?;
        }
        let at_most = |value| Bound::AtMost(value);
        for (row, bound) in [("call", 1.0), ("call, p99", 5.0)] {
            let row = format!("fork, pool filled, {row}");
            report.target(&row, "hull, ms", report.median(&row, "hull"), at_most(bound));
        }
        for (what, ready, bound) in
            [("template, pool filled", true, 2.0), ("template, no pool", false, 1.5)]
        {
            templates(programs, what, ready, options.runs, report)?;
            let row = format!("{what}, {OUTPUT}");
            report.target(
                &row,
                "hull ÷ floor",
                report.ratio(&row, "hull", "floor"),
                at_most(bound),
            );
        }
    }
    if options.wants("fork-pause") {
        for touched in TOUCHED {
            pauses(programs, touched, options.runs.div_ceil(8), report)?;
        }
    }
    if options.wants("fork-many") {
        many(programs, report)?;
    }
    Ok(())
}

/// Copies of a guest that speaks without end, of which the first byte is waited for, in turns with the least that
/// anybody has to do for the same guest: `adopt` of a process that was made beforehand, or else `restore` by a new one.
fn templates(
    programs: &Programs,
    what: &str,
    ready: bool,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let line = format!("{TALKER} dirty=10M");
    let guest = Guest { mib: Some(MIB), ..Guest::new(&line) };
    let saved = Saved::of(programs, System::Floor, &guest, TALKS)?;
    // Some may be taken again.
    let pool = Pool::start(programs, if ready { 2 * runs } else { 0 })?;
    let mut machine = Machine::start(programs, System::Hull, &guest, TALKS)?;
    let folder = crate::api::folder()?;
    let body = json!({ "pool": pool.socket, "template": true, "paused": true }).to_string();
    let answer = machine.client.told(200, "POST", "/fork", &body)?;
    Copies::default().add(&serde_json::from_slice(&answer)?)?;
    let (mut calls, mut outputs, mut floors) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..=runs {
        let floor = if ready { adopted } else { restored };
        let floor = undisturbed(|| floor(programs, saved.folder()))?;
        std::thread::sleep(REST);
        let (call, output) = undisturbed(|| {
            let console = folder.path().join(run.to_string());
            let (call, output, answer) = forked(&mut machine, &pool, &console)?;
            drop(std::fs::remove_file(&console));
            end_at_once(&answer)?;
            std::thread::sleep(REST);
            Ok((call, output))
        })?;
        if run > 0 {
            floors.push(floor);
            calls.push(call);
            outputs.push(output);
        }
    }
    report.add(&format!("{what}, {OUTPUT}"), "floor", "ms", floors);
    report.add(&format!("{what}, {OUTPUT}"), "hull", "ms", outputs);
    add_calls(what, calls, report);
    Ok(())
}

/// Milliseconds until a process that has a VM, a slot and a vCPU maps memory, sets state, and runs to the first byte,
/// from when it is told to.
fn adopted(programs: &Programs, saved: &Path) -> Result<f64> {
    let mut command = Command::new(&programs.floor);
    command.arg("adopt").arg(saved).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let told = child.stdin.take().zip(child.stdout.take());
    let time = told.ok_or("no pipes".into()).and_then(|(mut tell, mut says)| {
        let mut byte = [0];
        says.read_exact(&mut byte)?;
        std::thread::sleep(REST);
        let begun = Instant::now();
        tell.write_all(b"g")?;
        says.read_exact(&mut byte)?;
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    });
    // It would go on for ever.
    let _ = child.kill();
    let _ = child.wait();
    time
}

/// The same of a new process, from before it is made.
fn restored(programs: &Programs, saved: &Path) -> Result<f64> {
    let mut command = Command::new(&programs.floor);
    command.arg("restore").arg(saved);
    let mut running = Running::spawn(command, crate::api::folder()?)?;
    Ok(running.wait_for_first(LINE_END)?.as_secs_f64() * 1e3)
}

/// Has a copy made that writes to `console`. Milliseconds to the answer, and to the first byte; the answer.
fn forked(machine: &mut Machine, pool: &Pool, console: &Path) -> Result<(f64, f64, Value)> {
    let body = json!({ "pool": pool.socket, "overrides": [{ "serial_out_path": console }] });
    let body = body.to_string();
    let begun = Instant::now();
    let answer = machine.client.told(200, "POST", "/fork", &body)?;
    let call = begun.elapsed();
    while !std::fs::metadata(console).is_ok_and(|file| file.len() > 0) {
        if begun.elapsed() > PATIENCE {
            return Err("a copy says nothing".into());
        }
        // Who looks all the time has a processor that the copy may need.
        std::thread::sleep(LOOK);
    }
    let output = begun.elapsed();
    let answer = serde_json::from_slice(&answer)?;
    Ok((call.as_secs_f64() * 1e3, output.as_secs_f64() * 1e3, answer))
}

/// Ends copies that would take a processor from whoever is next.
fn end_at_once(answer: &Value) -> Result<()> {
    let mut copies = Copies::default();
    copies.add(answer)?;
    for process in &copies.0 {
        // SAFETY: a signal to a process that was made for this one.
        unsafe { libc::kill(*process as libc::pid_t, libc::SIGKILL) };
    }
    Ok(())
}

fn add_calls(what: &str, calls: Vec<f64>, report: &mut Report) {
    let mut sorted = calls.clone();
    sorted.sort_by(f64::total_cmp);
    let p99 = sorted.get((sorted.len() * 99 / 100).min(sorted.len().saturating_sub(1))).copied();
    report.add(&format!("{what}, call"), "hull", "ms", calls);
    report.add(&format!("{what}, call, p99"), "hull", "ms", p99.into_iter().collect());
}

/// One copy after the other, one a call.
fn calls(
    programs: &Programs,
    what: &str,
    ready: bool,
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let pool = Pool::start(programs, if ready { runs + 2 } else { 0 })?;
    let mut machine = parent(programs)?;
    let folder = crate::api::folder()?;
    let mut copies = Copies::default();
    let (mut calls, mut outputs, mut pauses) = (Vec::new(), Vec::new(), Vec::new());
    // The first finds what the guest wrote since it booted, and is thrown away: there is a part for it.
    for run in 0..=runs {
        let console = folder.path().join(run.to_string());
        let (call, output, answer) = forked(&mut machine, &pool, &console)?;
        copies.add(&answer)?;
        if run > 0 {
            calls.push(call);
            outputs.push(output);
            pauses.push(answer["pause_us"].as_f64().unwrap_or(f64::NAN) / 1e3);
        }
        std::thread::sleep(REST);
    }
    add_calls(what, calls, report);
    report.add(&format!("{what}, {OUTPUT}"), "hull", "ms", outputs);
    report.add(&format!("{what}, parent's pause"), "hull", "ms", pauses);
    Ok(())
}

/// How long a machine is halted when it is forked first, with so many MiB touched: where its memory is a file, and
/// where it has to be copied; and the next time, when it has touched as much again.
fn pauses(programs: &Programs, touched: u32, runs: usize, report: &mut Report) -> Result<()> {
    let gib = f64::from(touched) / 1024.0;
    let bound = 10.0 + 80.0 * gib;
    let row = |what: &str| format!("fork, pause, {touched} MiB {what}");
    for (what, forkable) in [("of --forkable", true), ("copied", false)] {
        let (mut first, mut next) = (Vec::new(), Vec::new());
        for _ in 0..runs.max(3) {
            let pool = Pool::start(programs, 0)?;
            let mib = Some(2 * touched + 64);
            let line = format!("payload=work size=4K dirty={touched}M");
            let guest = Guest { mib, forkable, ..Guest::new(&line) };
            let mut machine = Machine::start(programs, System::Hull, &guest, "ready\n")?;
            let fork = |machine: &mut Machine| -> Result<(f64, f64)> {
                machine.running.typed("d")?;
                machine.running.wait_for("dirty\n")?;
                std::thread::sleep(REST);
                let body = json!({ "pool": pool.socket, "paused": true }).to_string();
                let answer = machine.client.told(200, "POST", "/fork", &body)?;
                let answer: Value = serde_json::from_slice(&answer)?;
                Copies::default().add(&answer)?;
                let number = |key: &str| answer[key].as_f64().unwrap_or(f64::NAN);
                Ok((number("pause_us") / 1e3, number("copied_bytes") / f64::from(1 << 20)))
            };
            let (pause, copied) = fork(&mut machine)?;
            // What is measured is what it says.
            if (copied >= f64::from(touched)) == forkable {
                return Err(format!("{copied} MiB were copied").into());
            }
            first.push(pause);
            let (pause, copied) = fork(&mut machine)?;
            if copied < f64::from(touched) {
                return Err(format!("{copied} MiB were copied").into());
            }
            next.push(pause);
        }
        report.add(&row(what), "hull", "ms", first);
        if forkable {
            report.add(&row("more, copied"), "hull", "ms", next);
            let seen = report.median(&row(what), "hull");
            report.target(&row(what), "hull, ms", seen, Bound::AtMost(bound));
        }
    }
    let unmapped = (0..runs.max(3)).map(|_| unmapping(touched)).collect::<Result<Vec<_>>>()?;
    report.add(&row("unmapped without a guest"), "floor", "ms", unmapped);
    let copied = (0..runs.max(3)).map(|_| copying(touched)).collect::<Result<Vec<_>>>()?;
    report.add(&row("copied without a guest"), "floor", "ms", copied);
    Ok(())
}

/// Threads that copy, as many as Hull has for it.
const COPIERS: usize = 2;

/// Milliseconds that it takes to copy so many MiB, all of them there, into a new file in memory, with no guest in them.
fn copying(mib: u32) -> Result<f64> {
    let mut bytes = vec![0u8; (mib as usize) << 20];
    bytes.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    // SAFETY: the name is a C string, and the descriptor is fresh.
    let file = unsafe {
        let fd = libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        std::fs::File::from_raw_fd(fd)
    };
    file.set_len(bytes.len() as u64)?;
    let part = bytes.len().div_ceil(COPIERS);
    let begun = Instant::now();
    let copied = std::thread::scope(|scope| {
        let copy = |(n, part_of): (usize, &[u8])| file.write_all_at(part_of, (n * part) as u64);
        let start = |one| scope.spawn(move || copy(one));
        let threads: Vec<_> = bytes.chunks(part).enumerate().map(start).collect();
        threads.into_iter().all(|thread| matches!(thread.join(), Ok(Ok(()))))
    });
    let taken = begun.elapsed();
    if copied { Ok(taken.as_secs_f64() * 1e3) } else { Err("cannot copy".into()) }
}

/// Milliseconds that the kernel takes to map a file in the place of itself that so many MiB of a process are, with no
/// guest in them: the rest of a pause is KVM's, and that of whoever asks.
fn unmapping(mib: u32) -> Result<f64> {
    let len = (mib as usize) << 20;
    let failed = || std::io::Error::last_os_error();
    // SAFETY: a file and a mapping of this function's own, whose pages are touched inside.
    unsafe {
        let fd = libc::memfd_create(c"bench".as_ptr(), libc::MFD_CLOEXEC);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        if fd < 0 || libc::ftruncate(fd, len as libc::off_t) < 0 {
            return Err(failed().into());
        }
        let start = libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0);
        if start == libc::MAP_FAILED {
            return Err(failed().into());
        }
        for page in (0..len).step_by(4096) {
            start.cast::<u8>().add(page).write_volatile(1);
        }
        let begun = Instant::now();
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let mapped = libc::mmap(start, len, protection, flags, fd, 0);
        let taken = begun.elapsed();
        libc::munmap(start, len);
        libc::close(fd);
        if mapped == libc::MAP_FAILED {
            Err(failed().into())
        } else {
            Ok(taken.as_secs_f64() * 1e3)
        }
    }
}

/// A thousand in one call, alive at once.
fn many(programs: &Programs, report: &mut Report) -> Result<()> {
    let pool = Pool::start(programs, 0)?;
    let mut machine = parent(programs)?;
    machine.client = machine.client.patient(PATIENCE * 10)?;
    let mut copies = Copies::default();
    let before = available()?;
    let begun = Instant::now();
    let body = json!({ "count": MANY, "pool": pool.socket }).to_string();
    let answer = machine.client.told(200, "POST", "/fork", &body)?;
    let rate = f64::from(MANY) / begun.elapsed().as_secs_f64();
    copies.add(&serde_json::from_slice(&answer)?)?;
    std::thread::sleep(REST * 30);
    let host = (before - available()?) / f64::from(MANY);
    let private =
        copies.0.iter().map(|process| private_of(*process)).collect::<Result<Vec<_>>>()?;
    let most = private.iter().copied().fold(0.0, f64::max);
    report.add("1,000 copies, made", "hull", "per s", vec![rate]);
    report.add("1,000 copies, private each", "hull", "kB", private);
    report.add("1,000 copies, of the host's memory each", "hull", "kB", vec![host]);
    let bound = Bound::AtMost(1024.0);
    report.target("1,000 copies, private each", "hull, kB at most", Some(most), bound);
    Ok(())
}

/// Kilobytes that the host has left.
fn available() -> Result<f64> {
    kilobytes("/proc/meminfo", &["MemAvailable"])
}

/// Kilobytes that a process has for itself, written or not.
fn private_of(process: u32) -> Result<f64> {
    kilobytes(&format!("/proc/{process}/smaps_rollup"), &["Private_Dirty", "Private_Clean"])
}

fn kilobytes(file: &str, keys: &[&str]) -> Result<f64> {
    let text = std::fs::read_to_string(file)?;
    let value = |line: &str| {
        let (key, value) = line.split_once(':')?;
        let value = value.split_whitespace().next()?.parse::<f64>().ok()?;
        keys.contains(&key).then_some(value)
    };
    Ok(text.lines().filter_map(value).sum())
}
