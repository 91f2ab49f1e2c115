//! The hook of a Linux guest: waits until it is told that the machine goes on as a copy, and makes it one that
//! is its own. docs/fork.md says what it is told.
//!
//!     guest-hook [PORT]
//!
//! It goes on listening: connections end when a machine is copied, sockets that listen do not.

mod linux;
mod message;
mod net;

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use message::{Message, Resumed, VERSION};

/// Where it listens, unless it is told otherwise.
const PORT: u32 = 1024;
/// Longest message, in bytes.
const LONGEST: usize = 16 << 10;
/// The host's address: nobody else is listened to.
const HOST: u32 = 2;

fn main() -> ExitCode {
    let port = match std::env::args().nth(1).map(|word| word.parse()) {
        None => PORT,
        Some(Ok(port)) => port,
        Some(Err(_)) => {
            eprintln!("usage: guest-hook [PORT]");
            return ExitCode::from(2);
        }
    };
    let listener = match linux::listen(port) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("guest-hook: cannot listen on port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("guest-hook: listening on port {port}");
    loop {
        match linux::accept(&listener) {
            Ok((stream, HOST)) => serve(stream),
            Ok(_) => {}
            // Of the one that would have been next: it is gone.
            Err(error) => eprintln!("guest-hook: {error}"),
        }
    }
}

fn serve(mut stream: File) {
    let answer = match read(&mut stream).and_then(|line| obey(&line)) {
        Ok(()) => serde_json::json!({ "hull": VERSION, "ready": {} }),
        Err(why) => {
            eprintln!("guest-hook: {why}");
            serde_json::json!({ "hull": VERSION, "error": why })
        }
    };
    // Who does not wait for it any more has no use for it.
    let _ = stream.write_all(format!("{answer}\n").as_bytes());
}

/// One line, without its end.
fn read(stream: &mut File) -> Result<Vec<u8>, String> {
    let mut line = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let len = match stream.read(&mut piece) {
            Ok(0) => return Err("the message has no end".to_owned()),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("no message: {error}")),
        };
        line.extend(piece.get(..len).unwrap_or_default());
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok(line);
        }
        if line.len() > LONGEST {
            return Err("the message is too long".to_owned());
        }
    }
}

fn obey(line: &[u8]) -> Result<(), String> {
    let message: Message = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    match message {
        Message { hull: VERSION, resumed: Some(resumed) } => become_it(&resumed),
        Message { hull: VERSION, resumed: None } => Err("nothing is asked".to_owned()),
        Message { hull, .. } => Err(format!("version {hull} is not known here; {VERSION} is")),
    }
}

/// Does all of it that can be done, the seed first, and says what could not.
fn become_it(resumed: &Resumed) -> Result<(), String> {
    let mut failed = Vec::new();
    let mut step = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error}"));
        }
    };
    step("seed", resumed.seed().and_then(|seed| linux::reseed(&seed)));
    step("time", linux::set_time(resumed.time_ns));
    if let Some(name) = &resumed.hostname {
        step("hostname", linux::set_hostname(name));
    }
    if !resumed.net.is_empty() {
        match net::cards() {
            Ok(cards) => {
                for net in &resumed.net {
                    step(&net.id, net::configure(&cards, net));
                }
            }
            Err(error) => step("network cards", Err(error)),
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
}
