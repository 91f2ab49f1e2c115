//! The `hull` command: a microVM from the command line.
//!
//! This crate is what a person sees: options, terminal, messages, exit codes. Machines are `vmm`'s.

#![cfg_attr(not(test), no_main)]

mod api;
mod cli;
mod client;
mod clone;
mod disks;
mod doctor;
mod entry;
mod exit;
mod firecracker;
mod hook;
mod host;
mod keyvalue;
mod last_words;
mod logging;
mod nursery;
mod pidfile;
mod pool;
mod ps;
mod report;
mod restore;
mod run;
mod runtime;
mod saved;
mod session;
mod snapshots;
mod spinner;
mod stop;
mod streams;
mod table;
mod terminal;

use std::ffi::{OsString, c_char, c_int};
use std::time::Instant;

use clap::Parser;

use crate::cli::{Cli, CloneArgs, Command};
use crate::exit::Code;

/// The entry point as C knows it. Before a Rust `main`, std would read `/proc/self/maps` for the place
/// of the main thread's stack and give every thread a second one, only to say a few words more when
/// a stack overflows. A machine that lives for milliseconds notices. The rest of what std does is here.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub extern "C" fn main(_arguments: c_int, _vector: *const *const c_char) -> c_int {
    // The first thing of all: `--timings` counts from here.
    let start = Instant::now();
    share_one_heap();
    entry::populate_heap();
    open_standard_streams();
    // A reader that goes away is an error of the write, not the end of the process.
    // SAFETY: sets a disposition, before there is a second thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    last_words::install_panic_hook();
    let code = run_command(start);
    streams::finish();
    // Flushes standard output as well.
    std::process::exit(code.into());
}

fn run_command(start: Instant) -> Code {
    if firecracker::is_meant(std::env::args_os().next()) {
        return firecracker::firecracker(std::env::args_os(), start);
    }
    // Not through all of our own options, whose descriptions alone take longer than what is to be done.
    let mut arguments = std::env::args_os().skip(1);
    let verb = arguments.next().unwrap_or_default();
    if verb == "firecracker" {
        let name = std::iter::once(OsString::from("firecracker"));
        return firecracker::firecracker(name.chain(arguments), start);
    }
    if verb == nursery::CLONE {
        let args = CloneArgs::parse_from(std::iter::once(verb).chain(arguments));
        return end(clone::clone(&args, start));
    }
    let cli = Cli::parse();
    end(match cli.command {
        Command::Run(args) => run::run(*args, start),
        Command::Api(args) => api::api(&args),
        Command::Firecracker(args) => {
            let name = OsString::from("firecracker");
            Ok(firecracker::firecracker(std::iter::once(name).chain(args.arguments), start))
        }
        Command::Ps(args) => ps::ps(&args),
        Command::Pause(args) => client::set_paused(&args, true),
        Command::Resume(args) => client::set_paused(&args, false),
        Command::Snapshot(args) => snapshots::snapshot(&args),
        Command::Disk(args) => disks::disk(&args),
        Command::Restore(args) => restore::restore(&args, start),
        Command::Fork(args) => client::fork(&args),
        Command::Clone(args) => clone::clone(&args, start),
        Command::Pool(args) => pool::pool(&args),
        Command::Stop(args) => stop::stop(&args),
        Command::Config(args) => client::config(&args),
        Command::Events(args) => client::events(&args),
        Command::Metrics(args) => client::metrics(&args),
        Command::SetDisk(args) => client::set_disk(&args),
        Command::SetNet(args) => client::set_net(&args),
        Command::Balloon(args) => client::balloon(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions(args) => cli::completions(&args),
        Command::Man => cli::man(),
    })
}

/// What the process ends with; what is wrong is printed.
fn end(result: cli::Result) -> Code {
    result.unwrap_or_else(|err| {
        report::print(err.as_ref());
        report::exit_code(err.as_ref())
    })
}

/// Puts `/dev/null` in the place of a standard stream that the caller closed: a file of the machine's
/// would get its number, and what is printed would land there.
fn open_standard_streams() {
    for fd in 0..3 {
        // SAFETY: neither call touches memory of ours; the lowest free number is the one asked for.
        unsafe {
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
}

/// Lets all threads share one heap. An arena of its own costs each thread four system calls and
/// some private pages at its first allocation, and no thread of Hull allocates where it matters.
fn share_one_heap() {
    // SAFETY: called before there is a second thread; the parameters are plain numbers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
