//! Measures Hull, its peers and the bare floor on the same payload guests, interleaved in one run,
//! so that what disturbs the machine disturbs all of them alike. Medians; ratios; absolute numbers
//! only to be complete.
//!
//! `bench run` measures, `bench compare` sets two JSON files of earlier runs side by side.

mod api;
mod block;
mod boot;
mod compare;
mod counter;
mod fork;
mod host;
mod limits;
mod memory;
mod net;
mod overlay;
mod peer;
mod peers;
mod report;
mod sample;
mod snapshot;
mod system;
mod turns;
mod vsock;

use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use system::{Programs, System};

/// Anything that goes wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
#[command(about = "Measures Hull against its peers and the bare floor")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Runs benches and prints a table.
    Run(RunOptions),
    /// Compares two JSON files of earlier runs, by their ratios.
    Compare {
        /// The earlier run.
        before: PathBuf,
        /// The later run.
        after: PathBuf,
    },
    /// Fetches Firecracker into the cache and prints where it is.
    Peers,
    /// Serves the network transfers of tests/run-bench-linux: port 7001 gives bytes, port 7002 fetches them.
    Peer {
        /// Address to listen at.
        address: std::net::IpAddr,
        /// Bytes that each connection is given.
        bytes: usize,
    },
}

/// What to measure, and how often.
#[derive(Args)]
pub struct RunOptions {
    /// Benches to run: boot, kernel50, memory, blk, overlay, vsock, limits, net (or its parts net-send,
    /// net-receive, net-echo), api (or api-start, api-memory, api-latency), snapshot (or
    /// snapshot-load, snapshot-restore, snapshot-full, snapshot-diff, snapshot-speed), fork (or fork-call,
    /// fork-pause, fork-many). All if none is named.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Systems to run: hull, firecracker, qemu, floor.
    #[arg(long, value_delimiter = ',', default_value = "hull,firecracker,qemu,floor")]
    systems: Vec<String>,
    /// Runs of each boot; other benches take a fraction of it.
    #[arg(long, default_value_t = 40)]
    runs: usize,
    /// Writes all numbers to this file; the last one named counts.
    #[arg(long, overrides_with = "json")]
    json: Option<PathBuf>,
    /// Hull's binary; by default the one beside this program.
    #[arg(long)]
    hull: Option<PathBuf>,
    /// A payload already built; by default tests/payload/build makes one.
    #[arg(long)]
    payload: Option<PathBuf>,
    /// Where disk images and snapshots go: a real file system, not tmpfs.
    #[arg(long)]
    scratch: Option<PathBuf>,
}

const BENCHES: [&str; 25] = [
    "boot",
    "kernel50",
    "memory",
    "blk",
    "overlay",
    "net",
    "net-send",
    "net-receive",
    "net-echo",
    "vsock",
    "limits",
    "api",
    "api-start",
    "api-memory",
    "api-latency",
    "snapshot",
    "snapshot-load",
    "snapshot-restore",
    "snapshot-full",
    "snapshot-diff",
    "snapshot-speed",
    "fork",
    "fork-call",
    "fork-pause",
    "fork-many",
];

impl RunOptions {
    fn wants(&self, bench: &str) -> bool {
        let whole = bench.split_once('-').map_or(bench, |(whole, _)| whole);
        self.only.is_empty() || self.only.iter().any(|name| name == bench || name == whole)
    }
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Action::Run(options) => run(&options),
        Action::Compare { before, after } => compare::print(&before, &after),
        Action::Peer { address, bytes } => peer::serve(address, bytes),
        Action::Peers => std::env::current_dir()
            .map_err(Into::into)
            .and_then(|root| peers::firecracker(&root))
            .map(|path| println!("{}", path.display())),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &RunOptions) -> Result<()> {
    for name in &options.only {
        if !BENCHES.contains(&name.as_str()) {
            return Err(format!("no bench is called {name}").into());
        }
    }
    let systems = options
        .systems
        .iter()
        .map(|name| System::parse(name).ok_or_else(|| format!("no system is called {name}").into()))
        .collect::<Result<Vec<_>>>()?;
    let programs = locate(options, &systems)?;
    let mut report = report::Report::new(host::describe(&programs));
    let start = host::Clock::now();

    if options.wants("boot") {
        boot::cpu_time(&programs, &systems, options.runs, &mut report)?;
    }
    if options.wants("kernel50") {
        boot::large_kernel(&programs, &systems, options.runs, &mut report)?;
    }
    if options.wants("memory") {
        memory::private_dirty(&programs, &systems, options.runs.div_ceil(8), &mut report)?;
    }
    if options.wants("blk") {
        block::run(&programs, &systems, options.runs.div_ceil(5), &mut report)?;
    }
    if options.wants("overlay") && systems.contains(&System::Hull) {
        overlay::run(&programs, options.runs.div_ceil(3), &mut report)?;
    }
    net::run(&programs, &systems, options, &mut report)?;
    if options.wants("vsock") {
        vsock::run(&programs, &systems, options.runs.div_ceil(5), &mut report)?;
    }
    if options.wants("limits") {
        limits::run(&programs, &systems, options.runs.div_ceil(20), &mut report)?;
    }
    api::run(&programs, &systems, options, &mut report)?;
    snapshot::run(&programs, &systems, options, &mut report)?;
    fork::run(&programs, &systems, options, &mut report)?;

    report.host.stolen = start.stolen();
    report.print();
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_vec_pretty(&report)?)?;
        println!("numbers: {}", file.display());
    }
    Ok(())
}

/// Finds, builds or fetches what the systems to be measured need.
fn locate(options: &RunOptions, systems: &[System]) -> Result<Programs> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?;
    let beside = std::env::current_exe()?.parent().map(Path::to_path_buf).unwrap_or_default();
    let payload = match &options.payload {
        Some(path) => path.clone(),
        None => {
            let output = Command::new(root.join("tests/payload/build")).output()?;
            if !output.status.success() {
                let reason = String::from_utf8_lossy(&output.stderr).into_owned();
                return Err(format!("the payload does not build: {reason}").into());
            }
            PathBuf::from(String::from_utf8(output.stdout)?.trim())
        }
    };
    let scratch = options.scratch.clone().unwrap_or_else(|| root.join("target/bench"));
    std::fs::create_dir_all(&scratch)?;
    let firecracker = match systems.contains(&System::Firecracker) {
        true => peers::firecracker(&root)?,
        false => PathBuf::new(),
    };
    let mut programs = Programs {
        hull: options.hull.clone().unwrap_or_else(|| beside.join("hull")),
        floor: beside.join("floor"),
        qemu: peers::qemu(),
        firecracker,
        payload,
        scratch,
    };
    for system in systems {
        if let Some(program) = programs.missing(*system) {
            return Err(format!("{} is not there: build or install it", program.display()).into());
        }
    }
    for program in [&mut programs.hull, &mut programs.floor, &mut programs.firecracker] {
        if program.exists() {
            *program = copied(program, &programs.scratch)?;
        }
    }
    Ok(programs)
}

/// A copy of a program, written in one go as one that was installed. A linker writes its output in
/// pieces, in pages of their own in the cache, and a program that was just linked takes more page
/// faults to start (140 against 124) until it is read anew.
fn copied(program: &Path, folder: &Path) -> Result<PathBuf> {
    let name = program.file_name().ok_or("a program has no name")?;
    let copy = folder.join(name);
    if copy != *program {
        // Not over one that may be running.
        let _ = std::fs::remove_file(&copy);
        std::fs::copy(program, &copy)?;
    }
    std::fs::File::open(&copy)?.sync_all()?;
    Ok(copy)
}
