//! A file or named pipe that metrics are written to, a line of JSON at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};

use super::{Group, Shape};

/// Where to, and what goes into each line beside the metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SinkOptions {
    /// The file or named pipe.
    pub path: PathBuf,
    /// Name of the machine, if it is to be there.
    pub id: Option<String>,
    /// Words of the user's.
    pub properties: BTreeMap<String, String>,
}

/// The open file.
#[derive(Debug)]
pub struct Sink {
    file: File,
    options: SinkOptions,
    shape: Shape,
    missed: u64,
    /// What a full pipe did not take of the last line.
    rest: Vec<u8>,
}

impl Sink {
    /// Opens the file, and makes it if there is none. Nobody waits for the reader of a pipe.
    ///
    /// # Errors
    /// The system's reason.
    pub fn open(options: SinkOptions) -> io::Result<Sink> {
        // For reading as well: a pipe that nobody reads yet can be opened so.
        let file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&options.path)?;
        Ok(Sink { file, options, shape: Shape::default(), missed: 0, rest: Vec::new() })
    }

    /// Writes what is new in `groups`.
    ///
    /// # Errors
    /// The system's reason; of kind `WouldBlock` if a pipe is full: one line waits then, and what a
    /// second one would have said is part of the third.
    pub(super) fn write(&mut self, groups: &[Group]) -> io::Result<()> {
        self.write_rest().inspect_err(|_| self.missed += 1)?;
        let mut line = self.shape.news(groups);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        line.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        if let Some(id) = &self.options.id {
            line.insert("id".into(), json!(id));
        }
        if !self.options.properties.is_empty() {
            line.insert("properties".into(), json!(self.options.properties));
        }
        if let Some(Json::Object(logger)) = line.get_mut("logger") {
            logger.insert("missed_metrics_count".into(), json!(self.missed));
        }
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        self.rest = text;
        let written = self.write_rest();
        let waits = |err: &io::Error| err.kind() == io::ErrorKind::WouldBlock;
        if written.as_ref().is_err_and(|err| !waits(err)) {
            self.rest.clear();
            self.missed += 1;
        } else {
            // Written, or the next thing that will be.
            self.shape.told(groups);
            self.missed = 0;
        }
        written
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.rest.drain(..written)),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }
}
