//! The runtime directory: which machines run, by name, and a socket to talk to each.
//!
//! There is no daemon. A machine holds a lock on `NAME.json` for as long as it lives and removes
//! its files when it ends; what a killed machine leaves is recognised by the missing lock and
//! replaced or removed by whoever comes by.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vmm::machine::{Command, Handle, Service};

/// What `NAME.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Name of the machine.
    pub name: String,
    /// Process id of its monitor.
    pub pid: i32,
    /// Seconds since 1970 when it started.
    pub started: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// The kernel file.
    pub kernel: PathBuf,
}

/// Why a machine could not be given its name.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Another machine has it.
    #[error("a machine named {0:?} runs already")]
    NameTaken(String),
    /// No machine has it.
    #[error("no machine named {name:?} runs{others}")]
    NoSuchMachine {
        /// The name asked for.
        name: String,
        /// The names there are, or nothing.
        others: String,
    },
    /// The directory cannot be used.
    #[error("cannot use the runtime directory {}", path.display())]
    Directory {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The runtime directory: `$XDG_RUNTIME_DIR/hull`, else `/run/hull`.
pub fn directory() -> PathBuf {
    std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| PathBuf::from("/run"))
        .join("hull")
}

/// A machine's place in the runtime directory, given back when dropped.
#[derive(Debug)]
pub struct Entry {
    directory: PathBuf,
    name: String,
    // The lock on it is what makes the entry count.
    _file: File,
}

impl Entry {
    /// Takes `record.name` in `directory`.
    ///
    /// # Errors
    /// [`RuntimeError::NameTaken`] or [`RuntimeError::Directory`].
    pub fn create(directory: &Path, record: &Record) -> Result<Entry, RuntimeError> {
        let failed = |source| RuntimeError::Directory { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let path = directory.join(format!("{}.json", record.name));
        let (mut file, stale) = loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map_err(failed)?;
            if !lock(&file) {
                return Err(RuntimeError::NameTaken(record.name.clone()));
            }
            // Between opening and locking its last owner may have removed it.
            let ours = file.metadata().map_err(failed)?;
            let same = |now: fs::Metadata| (ours.dev(), ours.ino()) == (now.dev(), now.ino());
            if fs::metadata(&path).is_ok_and(same) {
                break (file, ours.len());
            }
        };
        let entry = |file| Entry {
            directory: directory.to_owned(),
            name: record.name.clone(),
            _file: file,
        };
        let text = serde_json::to_string(record).map_err(|err| failed(err.into()))?;
        // Cut only what is there: some file systems write a file that was cut to disk at once.
        if stale > 0 {
            file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))).map_err(failed)?;
        }
        file.write_all(text.as_bytes()).map_err(failed)?;
        Ok(entry(file))
    }

    /// The control socket of this machine, mode 0600.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn control_socket(&self) -> io::Result<ControlSocket> {
        let path = socket_path(&self.directory, &self.name);
        let socket = match UnixDatagram::bind(&path) {
            Err(err) if err.kind() == io::ErrorKind::AddrInUse => {
                // Ours by the lock: a socket that is there belonged to a machine that is gone.
                fs::remove_file(&path)?;
                UnixDatagram::bind(&path)?
            }
            bound => bound?,
        };
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        socket.set_nonblocking(true)?;
        Ok(ControlSocket { socket })
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let _ = fs::remove_file(socket_path(&self.directory, &self.name));
        let _ = fs::remove_file(self.directory.join(format!("{}.json", self.name)));
    }
}

fn socket_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// Locks `file` unless somebody else holds it.
fn lock(file: &File) -> bool {
    // SAFETY: flock has no memory arguments.
    unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 }
}

/// The machines in `directory` that are alive, by name. What dead ones left is removed.
///
/// # Errors
/// The directory cannot be read. That there is none means that there are no machines.
pub fn list(directory: &Path) -> Result<Vec<Record>, RuntimeError> {
    let failed = |source| RuntimeError::Directory { path: directory.to_owned(), source };
    let entries = match fs::read_dir(directory) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Ok(mut file) = File::options().read(true).write(true).open(&path) else { continue };
        if lock(&file) {
            let _ = fs::remove_file(path.with_extension("sock"));
            let _ = fs::remove_file(&path);
            continue;
        }
        let mut text = String::new();
        // A machine that is just starting has not written its record yet.
        if file.read_to_string(&mut text).is_ok()
            && let Ok(record) = serde_json::from_str::<Record>(&text)
        {
            records.push(record);
        }
    }
    records.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(records)
}

/// The machine called `name`.
///
/// # Errors
/// [`RuntimeError::NoSuchMachine`] lists the names that there are.
pub fn find(directory: &Path, name: &str) -> Result<Record, RuntimeError> {
    let records = list(directory)?;
    if let Some(record) = records.iter().find(|record| record.name == name) {
        return Ok(record.clone());
    }
    let names: Vec<&str> = records.iter().map(|record| record.name.as_str()).collect();
    let others =
        if names.is_empty() { String::new() } else { format!("; there are: {}", names.join(", ")) };
    Err(RuntimeError::NoSuchMachine { name: name.to_owned(), others })
}

/// A request over the control socket: one datagram of JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Press the power button.
    PowerButton,
    /// End the machine.
    Quit,
}

/// Sends `request` to the machine called `name`. The machine does not answer: what follows is seen
/// by its process.
///
/// # Errors
/// The machine has no socket, or does not take the request.
pub fn send(directory: &Path, name: &str, request: Request) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    let text = serde_json::to_vec(&request)?;
    socket.send_to(&text, socket_path(directory, name)).map(|_| ())
}

/// The machine's side of its control socket.
#[derive(Debug)]
pub struct ControlSocket {
    socket: UnixDatagram,
}

impl Service for ControlSocket {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn on_ready(&mut self, machine: &Handle) {
        let mut bytes = [0; 256];
        let Ok(len) = self.socket.recv(&mut bytes) else { return };
        let command = match serde_json::from_slice(&bytes[..len]) {
            Ok(Request::PowerButton) => Command::PowerButton,
            Ok(Request::Quit) => Command::Quit,
            Err(err) => {
                tracing::warn!(%err, "request on the control socket not understood");
                return;
            }
        };
        machine.send(
            command,
            Box::new(|reply| {
                if let Err(refusal) = reply {
                    tracing::warn!(%refusal, "request on the control socket refused");
                }
            }),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> Record {
        Record {
            name: name.into(),
            pid: std::process::id() as i32,
            started: 1,
            cpus: 1,
            memory: 2,
            kernel: "k".into(),
        }
    }

    #[test]
    fn a_name_is_taken_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::create(dir.path(), &record("a")).unwrap();
        let again = Entry::create(dir.path(), &record("a")).unwrap_err();
        assert_eq!(again.to_string(), "a machine named \"a\" runs already");
        assert_eq!(list(dir.path()).unwrap(), [record("a")]);
        let missing = find(dir.path(), "b").unwrap_err().to_string();
        assert_eq!(missing, "no machine named \"b\" runs; there are: a");
        drop(entry);
        assert!(list(dir.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        Entry::create(dir.path(), &record("a")).unwrap();
    }

    #[test]
    fn what_a_dead_machine_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::create(dir.path(), &record("a")).unwrap();
        let _socket = entry.control_socket().unwrap();
        let Entry { _file: file, .. } = &entry;
        // SAFETY: flock has no memory arguments.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
        assert!(list(dir.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_directory_means_no_machines() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("none")).unwrap().is_empty());
    }
}
