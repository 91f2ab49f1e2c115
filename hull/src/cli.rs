//! The command line.

mod disk;
mod fork;
mod manual;
mod run;
mod snapshot;
mod verbs;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmm::seccomp;

use crate::exit::Code;
use crate::logging::Level;
use crate::session::ApiSocket;

pub use disk::{DiskArgs, DiskCommand};
pub use fork::{CloneArgs, ForkArgs, PoolArgs, ShapeOption};
pub use manual::{CompletionsArgs, completions, man};
pub use run::{Format, RunArgs, UsageError, console, leading_path, read_option};
pub use snapshot::{RestoreArgs, SnapshotArgs, SnapshotCommand};
pub use verbs::{
    BalloonArgs, EventsArgs, MachineArgs, MetricsArgs, PsArgs, SetDiskArgs, SetNetArgs, ShowArgs,
    StopArgs,
};

/// Result of a subcommand.
pub type Result<T = Code> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A thin, hard shell around a Linux kernel: microVMs on KVM.
#[derive(Debug, Parser)]
#[command(name = "hull", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// What `hull` does.
//
// The options of each are described when it is meant. So are doc comments of their types, which
// would come in the place of those here.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub enum Command {
    /// Start a machine and stay with it until it ends
    Run(Box<RunArgs>),
    /// Serve the REST API on a Unix socket, for a machine to be configured and started there
    Api(ApiArgs),
    /// Be Firecracker: its command line, its API, its exit codes
    #[command(disable_help_flag = true, disable_version_flag = true)]
    Firecracker(FirecrackerCommand),
    /// List the machines that run
    Ps(PsArgs),
    /// Halt a machine
    Pause(MachineArgs),
    /// Let a machine go on that was halted
    Resume(MachineArgs),
    /// Save a machine as two files, or show what was saved
    Snapshot(SnapshotArgs),
    /// Let a saved machine go on, and stay with it until it ends
    Restore(Box<RestoreArgs>),
    /// Make copies of a machine, each of which runs for itself
    Fork(Box<ForkArgs>),
    /// Go on as a copy that is handed over on standard input
    #[command(hide = true)]
    Clone(CloneArgs),
    /// Keep processes ready for machines that are forked
    Pool(PoolArgs),
    /// Press a machine's power button; end it if that does not help
    Stop(StopArgs),
    /// Show how a machine is configured
    Config(ShowArgs),
    /// Follow what happens to a machine
    Events(EventsArgs),
    /// Show what a machine counts: exits, requests, bytes, errors
    Metrics(MetricsArgs),
    /// Give a disk of a running machine another file or limit, or its size anew
    SetDisk(SetDiskArgs),
    /// Limit a network card of a running machine
    SetNet(SetNetArgs),
    /// Show or change how much memory a running machine's guest lends to the host
    Balloon(BalloonArgs),
    /// Make overlays of disks, show them, fold them into their base
    Disk(DiskArgs),
    /// Check this host: KVM, permissions, TAP, io_uring, limits
    Doctor(DoctorArgs),
    /// Print shell completions
    Completions(CompletionsArgs),
    /// Print the manual page
    Man,
}

// Options of every command that stays with a machine.
#[derive(Debug, Args)]
pub struct ProcessArgs {
    /// System call filters: on, log (log what they would refuse) or off [default: on]
    #[arg(long, value_name = "MODE")]
    pub seccomp: Option<Seccomp>,
    /// What is logged to standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    pub log: Level,
    /// Write the process id to this file; it is removed at the end
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
}

// How a machine is reached that has its configuration already.
#[derive(Debug, Args)]
pub struct ReachArgs {
    /// Where the REST API is served [default: the machine's name in the runtime directory]
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Serve no API: nobody can pause, change or stop the machine but by signals
    #[arg(long, conflicts_with = "api_sock")]
    pub no_api: bool,
}

impl ReachArgs {
    /// Where the API is to be.
    pub fn socket(&self) -> ApiSocket<'_> {
        match &self.api_sock {
            _ if self.no_api => ApiSocket::Nowhere,
            Some(path) => ApiSocket::At(path),
            None => ApiSocket::ByName,
        }
    }
}

// Options of `hull api`.
#[derive(Debug, Args)]
pub struct ApiArgs {
    /// Where the API is served
    #[arg(long, value_name = "PATH")]
    pub sock: PathBuf,
    /// Name of the machine [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Make the VM, its memory and its vCPUs now, for a machine of this shape [default: 1 CPU, 128M]
    #[arg(long, value_name = "[cpus=NUMBER][,memory=SIZE][,huge-pages]", num_args = 0..=1, require_equals = true,
        default_missing_value = "")]
    pub ready: Option<String>,
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = 51_200)]
    pub max_body: usize,
    /// Most bytes of the metadata [default: those of a body]
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,
}

// `hull firecracker`: everything behind it is Firecracker's.
#[derive(Debug, Args)]
pub struct FirecrackerCommand {
    /// Options of Firecracker; --help lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
    pub arguments: Vec<std::ffi::OsString>,
}

/// `--seccomp`.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Seccomp {
    /// Refused calls end the process
    #[default]
    On,
    /// Refused calls are logged by the kernel
    Log,
    /// No filters
    Off,
}

impl Seccomp {
    /// What it is called on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Seccomp::On => "on",
            Seccomp::Log => "log",
            Seccomp::Off => "off",
        }
    }
}

impl From<Seccomp> for seccomp::Mode {
    fn from(mode: Seccomp) -> seccomp::Mode {
        match mode {
            Seccomp::On => seccomp::Mode::On,
            Seccomp::Log => seccomp::Mode::Log,
            Seccomp::Off => seccomp::Mode::Off,
        }
    }
}

/// Whole milliseconds of a time in seconds. Nothing if it is none.
pub fn millis(seconds: f64) -> Option<u64> {
    let time = Duration::try_from_secs_f64(seconds).ok()?;
    u64::try_from(time.as_millis()).ok()
}

// Options of `hull doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_is_well_formed() {
        Cli::command().debug_assert();
    }
}
