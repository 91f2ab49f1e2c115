//! Which machine a command means: one of the runtime directory by its name, or whatever listens on
//! a socket.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::cli::Result;
use crate::runtime;

/// A machine that somebody named.
#[derive(Clone, Debug)]
pub struct Machine {
    /// As the user named it, for messages.
    pub name: String,
    /// The socket of its API; empty if it has none.
    pub socket: PathBuf,
}

/// True if `text` is the path of a socket, and not the name of a machine.
pub fn is_socket(text: &OsStr) -> bool {
    text.as_bytes().contains(&b'/')
}

impl Machine {
    /// The machine that `text` means: a socket if there is a slash in it, else a name.
    ///
    /// # Errors
    /// No machine has this name; the runtime directory cannot be read.
    pub fn find(text: &OsStr) -> Result<Machine> {
        let name = text.to_string_lossy().into_owned();
        if is_socket(text) {
            return Ok(Machine { name, socket: PathBuf::from(text) });
        }
        let record = runtime::find(&runtime::directory(), &name)?;
        Ok(Machine { name, socket: record.api })
    }
}
