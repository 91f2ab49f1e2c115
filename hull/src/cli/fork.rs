//! Options of the commands that copy machines.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

const FORK_EXAMPLES: &str = "\
Examples:
  hull fork web -n 3                                    # web-1, web-2, web-3
  hull fork web -n 20 --name job-{n} --net net0=tap{n}  # {n} is 1 to 20";

// Options of `hull fork`.
#[derive(Debug, Args)]
#[command(after_help = FORK_EXAMPLES)]
pub struct ForkArgs {
    /// Name of the machine, or the socket of its API
    #[arg(value_name = "NAME|SOCKET")]
    pub machine: OsString,
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
    /// Another file for a disk
    #[arg(short, long, value_name = "ID=FILE")]
    pub disk: Vec<String>,
    /// Another socket for the vsock device [default: the machine's, with a dot and the copy's name]
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<String>,
    /// A file for the guest's console [default: it goes nowhere]
    #[arg(long, value_name = "FILE")]
    pub console_file: Option<String>,
    /// Leave the machine halted, as it was copied
    #[arg(long)]
    pub template: bool,
    /// Leave the copies halted
    #[arg(long)]
    pub paused: bool,
    /// Socket of the pool that makes the processes [default: `hull pool`'s, else they are made here]
    #[arg(long, value_name = "SOCKET")]
    pub pool: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
