//! Going on from the command line, against the least that it takes.

use super::{LINE_END, TALKER, TALKS};
use crate::Result;
use crate::counter::Counter;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::system::{Guest, Programs, System};
use crate::turns::Turns;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// RAM of the guests, in MiB, and what they are called.
const SIZES: [(u32, &str); 3] = [(128, "128 MiB"), (2048, "2 GiB"), (8192, "8 GiB")];
/// Of the floor's time.
const TARGET: f64 = 1.5;

/// From exec to the guest's first byte. A guest has touched little of its memory, so that the files
/// are holes for the most part; the rest is in the page cache.
pub fn run(programs: &Programs, turns: Turns<'_>, report: &mut Report) -> Result<()> {
    for (mib, size) in SIZES {
        let wall = format!("restore {size}, exec to output");
        let cpu = format!("{wall}, cpu");
        let guest = Guest { mib: Some(mib), ..Guest::new(TALKER) };
        let saved = super::saved(programs, turns.systems, &guest, TALKS)?;
        turns.take(report, [(&wall, "ms"), (&cpu, "ms")], |place, system| {
            let folder = crate::api::folder()?;
            let command = command(programs, system, saved[place].folder(), &folder);
            let mut counter = Counter::open()?;
            let mut running = Running::spawn(command, folder)?;
            let wall = running.wait_for_first(LINE_END)?;
            let cpu = counter.read()?;
            Ok([wall, cpu].map(|time| time.as_secs_f64() * 1e3))
        })?;
        let ratio = report.ratio(&wall, "hull", "floor");
        report.target(&wall, "hull ÷ floor", ratio, Bound::AtMost(TARGET));
    }
    Ok(())
}

fn command(programs: &Programs, system: System, saved: &Path, runtime: &TempDir) -> Command {
    let mut command = Command::new(programs.program(system));
    command.arg("restore").arg(saved);
    if system == System::Hull {
        command.env("XDG_RUNTIME_DIR", runtime.path()).args(["--console", "stdio"]);
    }
    command
}
