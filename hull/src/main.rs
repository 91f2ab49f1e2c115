//! The `hull` command: a microVM from the command line.
//!
//! This crate is what a person sees: options, terminal, messages, exit codes. Machines are `vmm`'s.

mod cli;
mod doctor;
mod exit;
mod host;
mod keyvalue;
mod logging;
mod ps;
mod report;
mod run;
mod runtime;
mod stop;
mod terminal;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    // The first thing of all: `--timings` counts from here.
    let start = Instant::now();
    share_one_heap();
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(args) => run::run(*args, start),
        Command::Ps(args) => ps::ps(&args),
        Command::Stop(args) => stop::stop(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Completions(args) => cli::completions(&args),
        Command::Man => cli::man(),
    };
    match result {
        Ok(code) => code.into(),
        Err(err) => {
            report::print(err.as_ref());
            report::exit_code(err.as_ref()).into()
        }
    }
}

/// Lets all threads share one heap. An arena of its own costs each thread four system calls and
/// some private pages at its first allocation, and no thread of Hull allocates where it matters.
fn share_one_heap() {
    // SAFETY: called before there is a second thread; the parameters are plain numbers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
