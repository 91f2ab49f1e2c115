//! Log lines on standard error. They end in CR LF while the terminal is in raw mode.

use std::io::{self, Write};

use clap::ValueEnum;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt;

use crate::terminal;

/// What is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Nothing.
    Off,
    /// What ends or breaks something.
    Error,
    /// What may not be what you wanted.
    #[default]
    Warn,
    /// What happens.
    Info,
    /// Details for finding a defect.
    Debug,
    /// Everything.
    Trace,
}

/// Starts logging.
pub fn start(level: Level) {
    let filter = match level {
        Level::Off => return,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    fmt()
        .with_max_level(filter)
        .with_writer(|| Stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .init();
}

struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = if terminal::is_raw() {
            String::from_utf8_lossy(bytes).replace('\n', "\r\n").into_bytes()
        } else {
            bytes.to_vec()
        };
        io::stderr().write_all(b"hull: ")?;
        io::stderr().write_all(&text)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
