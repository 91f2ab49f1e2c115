//! Options of the commands that save machines and let them go on.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use vmm::machine::Clock;

use super::{ProcessArgs, ReachArgs};

// Options of `hull snapshot`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    pub command: Option<SnapshotCommand>,
    /// Name of the machine, or the socket of its API
    #[arg(value_name = "NAME|SOCKET", required = true)]
    pub machine: Option<OsString>,
    /// Folder for the files `state` and `memory`, which is made if there is none
    #[arg(value_name = "DIR", required = true)]
    pub folder: Option<PathBuf>,
    /// Save only what changed since it was saved last, or since it went on from a snapshot
    #[arg(long)]
    pub diff: bool,
    /// End the machine when it is saved
    #[arg(long)]
    pub stop: bool,
    /// Even if there are diffs to the snapshot that is replaced
    #[arg(short, long)]
    pub force: bool,
}

// What else there is to be done with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List the snapshots in a folder
    Ls {
        /// The folder that has their folders
        #[arg(value_name = "DIR", default_value = ".")]
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a whole snapshot of a diff and what it is a diff to
    Merge {
        /// Folder of the diff
        #[arg(value_name = "DIFF")]
        folder: PathBuf,
        /// Where the result goes: a new folder, or that of the base [default: DIFF]
        #[arg(long, value_name = "DIR")]
        into: Option<PathBuf>,
        /// Folder of what it is a diff to, if that was moved
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// Even if there are other diffs to what is replaced
        #[arg(short, long)]
        force: bool,
    },
    /// Remove snapshots. Machines that run from them go on
    Rm {
        /// Their folders
        #[arg(value_name = "DIR", required = true)]
        folders: Vec<PathBuf>,
        /// Even if there are diffs to them, or they are damaged
        #[arg(short, long)]
        force: bool,
    },
    /// Read all of snapshots, and of what they are diffs to, and see that each byte is as it was written
    Verify {
        /// Their folders
        #[arg(value_name = "DIR", required = true)]
        folders: Vec<PathBuf>,
        /// Folder of what they are diffs to, if that was moved
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what a snapshot says of itself
    Show {
        /// Its state file, or its folder
        #[arg(value_name = "FILE|DIR")]
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// What becomes of a guest's clocks.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ClockArg {
    Resume,
    Advance,
}

impl From<ClockArg> for Clock {
    fn from(clock: ClockArg) -> Clock {
        match clock {
            ClockArg::Resume => Clock::Resume,
            ClockArg::Advance => Clock::Advance,
        }
    }
}

const RESTORE_EXAMPLES: &str = "\
Examples:
  hull snapshot web ./warm
  hull restore ./warm --name web-2 --net net0=tap7 --disk root=/srv/copy.img";

// Options of `hull restore`.
#[derive(Debug, Args)]
#[command(after_help = RESTORE_EXAMPLES)]
pub struct RestoreArgs {
    /// Folder of the snapshot, with the files `state` and `memory`
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Folder of what the snapshot is a diff to, if that was moved
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// Socket of a process that brings the memory page by page (userfaultfd), instead of the file
    #[arg(long, value_name = "SOCKET", conflicts_with = "base")]
    pub pager: Option<PathBuf>,
    /// Name of the machine [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Another file for a disk
    #[arg(short, long, value_name = "ID=FILE")]
    pub disk: Vec<String>,
    /// Another TAP interface for a network card
    #[arg(short, long, value_name = "ID=TAP")]
    pub net: Vec<String>,
    /// Another MAC address for a network card. A driver that runs does not look again: with --hook the guest is given it
    #[arg(long, value_name = "ID=MAC")]
    pub mac: Vec<String>,
    /// Another socket for the vsock device
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// Another address for the guest's vsock device
    #[arg(long, value_name = "CID")]
    pub cid: Option<u64>,
    /// The guest's clocks: go on where they were, or move on by the time that passed
    #[arg(long, value_name = "HOW", default_value = "resume")]
    pub clock: ClockArg,
    /// The guest's console: tty, stdio, file=PATH or off [default: auto]
    #[arg(long, value_name = "OPTIONS")]
    pub console: Option<String>,
    /// Write down which memory the guest touches, until it ends or for so many seconds
    #[arg(long, value_name = "FILE[,after=SECONDS]")]
    pub record: Option<String>,
    /// Fetch what was written down before the guest touches it, so many bytes a second [default: 256M]
    #[arg(long, value_name = "FILE[,rate=BYTES]")]
    pub prefetch: Option<String>,
    /// A file, in JSON, that its metadata service has to say at first [default: what it was started with]
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Tell the hook that listens in the guest on this port [default: 1024] that it is a copy
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true,
        default_missing_value = "1024", conflicts_with = "paused")]
    pub hook: Option<u32>,
    /// A host name that the hook gives the guest
    #[arg(long, value_name = "NAME", requires = "hook")]
    pub hostname: Option<String>,
    /// How long that may take, in seconds [default: 5]
    #[arg(long, value_name = "SECONDS", requires = "hook")]
    pub hook_timeout: Option<f64>,
    /// An address that the hook gives a network card, and the gateway behind it
    #[arg(long, value_name = "ID=ADDRESS/PREFIX[,GATEWAY]", requires = "hook")]
    pub ip: Vec<String>,
    /// Leave it paused
    #[arg(long)]
    pub paused: bool,
    #[command(flatten)]
    pub reach: ReachArgs,
    #[command(flatten)]
    pub process: ProcessArgs,
}
