//! The floor: the least that any monitor does for the same work, so that benches can say how far
//! above it a monitor is. Nothing here is careful, general or safe against its input; it runs
//! files of ours.
//!
//! - `floor boot PAYLOAD MIB COMMAND-LINE` makes a VM, runs the payload to its first write to a
//!   port, and exits.
//! - `floor save PAYLOAD MIB COMMAND-LINE FOLDER` runs the payload to the end of its first line, and
//!   leaves its memory and its state in two files of the folder.
//! - `floor restore FOLDER` makes a VM that goes on from there, and passes on the first byte it writes.
//! - `floor adopt FOLDER` makes a VM, says so, and goes on from there when it is told to: what a process that
//!   was made beforehand has left to do.
//! - `floor pread FILE SIZE COUNT BUFFERS [direct]` reads at random offsets, into each of that many
//!   buffers in turn, and prints ticks per read.
//! - `floor pwrite FILE SIZE COUNT FLUSH [direct]` writes likewise, with an fdatasync every FLUSH.
//! - `floor tapwrite NAME SIZE COUNT` sends frames to a TAP and prints ticks per frame.

mod boot;
mod io;
mod machine;
mod saved;

use std::process::ExitCode;

/// Anything that goes wrong, in words: there is nobody to handle it but the person who reads it.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments.as_slice() {
        ["boot", payload, mib, command_line] => boot::run(payload, mib, command_line),
        ["save", payload, mib, command_line, folder] => {
            saved::save(payload, mib, command_line, folder)
        }
        ["restore", folder] => saved::restore(folder),
        ["adopt", folder] => saved::adopt(folder),
        ["pread", file, size, count, buffers] => {
            io::read_at_random(file, size, count, buffers, false)
        }
        ["pread", file, size, count, buffers, "direct"] => {
            io::read_at_random(file, size, count, buffers, true)
        }
        ["pwrite", file, size, count, flush] => {
            io::write_at_random(file, size, count, flush, false)
        }
        ["pwrite", file, size, count, flush, "direct"] => {
            io::write_at_random(file, size, count, flush, true)
        }
        ["tapwrite", name, size, count] => io::send_frames(name, size, count),
        _ => Err(
            "usage: floor boot PAYLOAD MIB COMMAND-LINE | save PAYLOAD MIB COMMAND-LINE FOLDER | \
                  restore FOLDER | adopt FOLDER | pread FILE SIZE COUNT BUFFERS [direct] | \
                  pwrite FILE SIZE COUNT FLUSH [direct] | tapwrite NAME SIZE COUNT"
                .into(),
        ),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}
