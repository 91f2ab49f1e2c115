//! The REST API: what it costs to have one, and how fast it answers while the machine is busy.

mod hang;
pub mod http;
mod latency;
mod memory;
mod start;

use crate::report::Report;
use crate::system::{Programs, System};
use crate::{Result, RunOptions};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// All parts that are wanted, on the systems that have this API.
pub fn run(
    programs: &Programs,
    systems: &[System],
    options: &RunOptions,
    report: &mut Report,
) -> Result<()> {
    let systems = System::like_firecracker(systems);
    if options.wants("api-start") {
        start::run(programs, &systems, options.runs, report)?;
    }
    if options.wants("api-memory") {
        memory::run(programs, &systems, options.runs.div_ceil(8), report)?;
    }
    if options.wants("api-latency") {
        latency::run(programs, &systems, options.runs.div_ceil(8).max(3), report)?;
    }
    Ok(())
}

/// A folder for sockets: its path is short, and it is in memory as `/run` is.
pub fn folder() -> Result<TempDir> {
    Ok(tempfile::tempdir_in("/dev/shm")?)
}

/// The command that serves the API on `socket`, as an orchestrator gives it.
pub fn command(programs: &Programs, system: System, socket: &Path) -> Command {
    let mut command = Command::new(programs.program(system));
    if system == System::Hull {
        command.env("XDG_RUNTIME_DIR", "/dev/shm").arg("firecracker");
    }
    command.arg("--api-sock").arg(socket);
    command
}
