//! Saving machines and going on from them.

mod diff;
mod full;
mod load;
pub mod machine;
mod restore;
mod speed;

use crate::report::Report;
use crate::system::{Guest, Programs, System};
use crate::turns::Turns;
use crate::{Result, RunOptions};
use machine::Saved;

/// A guest that prints line ends without end: it is heard as soon as it goes on, and a monitor that
/// waits for whole lines does not. The ticks between two are few for that, and enough for a pipe to
/// hold what it prints until it is paused.
pub const TALKER: &str = "payload=spin say=1 byte=10 every=20000";
/// What it prints first.
pub const TALKS: &str = "hello\n";
/// What it prints from then on.
pub const LINE_END: u8 = b'\n';
/// What a guest prints that does what is typed from then on.
const READY: &str = "ready\n";

/// A snapshot by each system of a guest that has printed `says`.
fn saved(programs: &Programs, systems: &[System], guest: &Guest, says: &str) -> Result<Vec<Saved>> {
    let saved = |system: &System| {
        Saved::of(programs, *system, guest, says)
            .map_err(|error| format!("a snapshot by {}: {error}", system.name()).into())
    };
    systems.iter().map(saved).collect()
}

/// All parts that are wanted, on the systems that have snapshots, or a way to go on.
pub fn run(
    programs: &Programs,
    systems: &[System],
    options: &RunOptions,
    report: &mut Report,
) -> Result<()> {
    let with_files = System::like_firecracker(systems);
    let turns = |runs| Turns { systems: &with_files, runs };
    let runs = options.runs;
    if options.wants("snapshot-load") {
        load::run(programs, turns(runs), report)?;
    }
    if options.wants("snapshot-restore") {
        let with_floor = |system: &System| matches!(system, System::Hull | System::Floor);
        let systems: Vec<System> = systems.iter().copied().filter(with_floor).collect();
        restore::run(programs, Turns { systems: &systems, runs: runs.div_ceil(2) }, report)?;
    }
    if options.wants("snapshot-full") {
        full::run(programs, turns(runs.div_ceil(4)), report)?;
    }
    if options.wants("snapshot-diff") {
        diff::run(programs, turns(runs.div_ceil(4)), report)?;
    }
    if options.wants("snapshot-speed") {
        speed::run(programs, turns(runs.div_ceil(8).max(3)), report)?;
    }
    Ok(())
}
