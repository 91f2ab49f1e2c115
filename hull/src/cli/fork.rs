//! Options of the commands that copy machines.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser};
use serde::Deserialize;
use vmm::config::ByteSize;
use vmm::machine::Shape;

use super::Seccomp;
use crate::logging::Level;

const FORK_EXAMPLES: &str = "\
Examples:
  hull fork web -n 3                                    # web-1, web-2, web-3
  hull fork ./warm -n 3                                 # the same of one that was saved there
  hull fork web -n 20 --name job-{n} --net net0=tap{n}  # {n} is 1 to 20
  hull fork web -n 20 --hook --hostname job-{n} --net net0=tap{n} --ip net0=10.0.{n}.2/30";

// Options of `hull fork`.
#[derive(Debug, Args)]
#[command(after_help = FORK_EXAMPLES)]
pub struct ForkArgs {
    /// Name of the machine or the socket of its API, or the folder of a snapshot
    #[arg(value_name = "NAME|SOCKET|DIR")]
    pub machine: OsString,
    /// Folder of what the snapshot is a diff to, if that was moved
    #[arg(long, value_name = "DIR")]
    pub base: Option<PathBuf>,
    /// How many copies
    #[arg(short = 'n', long, value_name = "NUMBER", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub count: u32,
    /// What they are called; in this and what follows {n} is a copy's number
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Another TAP interface for a network card
    #[arg(long, value_name = "ID=TAP")]
    pub net: Vec<String>,
    /// The network namespace in which interfaces are opened
    #[arg(long, value_name = "FILE")]
    pub netns: Option<String>,
    /// A file for a copy's disk: one that is there is used as it is, else it is made
    /// [default: beside the machine's own, called after the copy]
    #[arg(short, long, value_name = "ID=FILE")]
    pub disk: Vec<String>,
    /// The folder for copies of disks [default: where the disks are]
    #[arg(long, value_name = "FOLDER")]
    pub disks_in: Option<PathBuf>,
    /// Remove copies of disks when their machine ends
    #[arg(long)]
    pub rm: bool,
    /// Another socket for the vsock device [default: the machine's, with a dot and the copy's name]
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<String>,
    /// A file for the guest's console [default: it goes nowhere]
    #[arg(long, value_name = "FILE")]
    pub console_file: Option<String>,
    /// A file, in JSON, that a copy's metadata service has to say at first [default: nothing]
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<String>,
    /// Tell the hook that listens in the guest on this port [default: 1024], and wait until it is ready
    #[arg(long, value_name = "PORT", num_args = 0..=1, require_equals = true,
        default_missing_value = "1024", conflicts_with = "paused")]
    pub hook: Option<u32>,
    /// How long that may take, in seconds [default: 5]
    #[arg(long, value_name = "SECONDS", requires = "hook")]
    pub hook_timeout: Option<f64>,
    /// A host name that the hook gives the guest
    #[arg(long, value_name = "NAME", requires = "hook")]
    pub hostname: Option<String>,
    /// An address that the hook gives a network card, and the gateway behind it
    #[arg(long, value_name = "ID=ADDRESS/PREFIX[,GATEWAY]", requires = "hook")]
    pub ip: Vec<String>,
    /// Another MAC address for a network card of the first copy; each next has the next. A driver that runs does not
    /// look again: with --hook the guest is given it
    #[arg(long, value_name = "ID=MAC")]
    pub mac: Vec<String>,
    /// Leave the machine halted, as it was copied
    #[arg(long)]
    pub template: bool,
    /// Leave the copies halted
    #[arg(long)]
    pub paused: bool,
    /// Socket of the pool that makes the processes [default: `hull pool`'s, else they are made here]
    #[arg(long, value_name = "SOCKET")]
    pub pool: Option<PathBuf>,
    /// How long a copy may take to run, in seconds; its hook has its own time [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Make the processes here, with these system call filters: on, log or off [default: the pool's, else on]
    #[arg(long, value_name = "MODE", conflicts_with = "pool")]
    pub seccomp: Option<Seccomp>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

// Options of `hull clone`.
#[derive(Debug, Parser)]
#[command(name = "clone")]
pub struct CloneArgs {
    #[arg(long, value_name = "MODE", default_value = "on")]
    pub seccomp: Seccomp,
    #[arg(long, requires = "memory")]
    pub cpus: Option<u32>,
    #[arg(long, requires = "cpus")]
    pub memory: Option<u64>,
    #[arg(long)]
    pub huge_pages: bool,
    #[arg(long)]
    pub asked: bool,
}

impl CloneArgs {
    /// What is to be made beforehand.
    pub fn shape(&self) -> Option<Shape> {
        let (cpus, memory) = self.cpus.zip(self.memory)?;
        Some(Shape { cpus, memory, huge_pages: self.huge_pages })
    }
}

const POOL_EXAMPLES: &str = "\
Examples:
  hull pool                                       # eight for guests of 1 CPU and 128 MiB
  hull pool --keep number=32,cpus=2,memory=512M --keep number=4,memory=2G";

// Options of `hull pool`.
#[derive(Debug, Args)]
#[command(after_help = POOL_EXAMPLES)]
pub struct PoolArgs {
    /// Keep so many processes ready for machines with so many CPUs and so much memory
    /// [default: number=8,cpus=1,memory=128M]
    #[arg(long, value_name = "OPTIONS")]
    pub keep: Vec<String>,
    /// Keep so many for machines of other shapes, which have no VM yet
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=4096))]
    pub blank: u32,
    /// Where machines that are forked ask for them [default: .pool in the runtime directory]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// System call filters of the copies, whatever those of the machines are: on, log (log what they would
    /// refuse) or off
    #[arg(long, value_name = "MODE", default_value = "on")]
    pub seccomp: Seccomp,
    /// What is logged to standard error
    #[arg(long, value_name = "LEVEL", default_value = "warn")]
    pub log: Level,
}

/// What a machine is like that is made before anybody says more of it.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct ShapeOption {
    cpus: u32,
    memory: ByteSize,
    huge_pages: bool,
}

impl Default for ShapeOption {
    fn default() -> ShapeOption {
        ShapeOption { cpus: 1, memory: ByteSize(128 << 20), huge_pages: false }
    }
}

impl From<ShapeOption> for Shape {
    fn from(option: ShapeOption) -> Shape {
        let ShapeOption { cpus, memory, huge_pages } = option;
        Shape { cpus, memory: memory.0, huge_pages }
    }
}
