//! The runtime directory: which machines run, by name, and a socket to talk to each.
//!
//! There is no daemon. A machine holds a lock on `NAME.json` for as long as it lives and removes
//! its files when it ends; what a killed machine leaves is recognised by the missing lock and
//! replaced or removed by whoever comes by.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use api_server::{ServerError, Socket};
use serde::{Deserialize, Serialize};

/// How long a name may be held by somebody who only clears away what a dead machine left. That takes
/// microseconds, unless the scheduler steps in.
const SWEEP: Duration = Duration::from_secs(3);

/// Largest record that is read, in bytes; ours are far smaller.
const LONGEST_RECORD: u64 = 64 * 1024;

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
    /// The kernel file; JSON has no place for bytes that are not UTF-8.
    pub kernel: String,
    /// The socket of its API; empty if there is none.
    #[serde(default)]
    pub api: PathBuf,
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
    /// The socket of its API cannot be had.
    #[error(transparent)]
    Socket(#[from] ServerError),
}

impl RuntimeError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            RuntimeError::NameTaken(name) => {
                Some(format!("`hull ps` lists the machines, `hull stop {name}` ends this one"))
            }
            RuntimeError::NoSuchMachine { .. } | RuntimeError::Socket(_) => None,
            RuntimeError::Directory { .. } => Some(
                "set XDG_RUNTIME_DIR to a directory that this user may write, as a login session \
                 has one; a machine without --name runs without it"
                    .to_owned(),
            ),
        }
    }
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
pub struct Entry(Files);

/// The files of an entry; whoever has them has the lock on `NAME.json`, which makes the entry count.
#[derive(Debug)]
struct Files {
    directory: PathBuf,
    name: String,
    record: File,
}

impl Entry {
    /// Takes `record.name` in `directory`. Listens on the socket of its API, if that is to be there:
    /// who comes before it is served waits.
    ///
    /// # Errors
    /// [`RuntimeError`]; nothing is left then.
    pub fn create(
        directory: &Path,
        record: &Record,
    ) -> Result<(Entry, Option<Socket>), RuntimeError> {
        let failed = |source| RuntimeError::Directory { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let files = Files::take(directory, &record.name)
            .map_err(failed)?
            .ok_or_else(|| RuntimeError::NameTaken(record.name.clone()))?;
        // First, so that who finds the record finds the socket. What a dead machine left is replaced.
        let path = socket_path(directory, &record.name);
        let socket = (record.api == path).then(|| Socket::bind(&path)).transpose()?;
        files.write(record).map_err(failed)?;
        Ok((Entry(files), socket))
    }

    /// Says something else of the machine, whose name stays.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn update(&self, record: &Record) -> io::Result<()> {
        self.0.write(record)
    }
}

impl Files {
    /// Takes `name`, unless another machine has it.
    fn take(directory: &Path, name: &str) -> io::Result<Option<Files>> {
        let path = record_path(directory, name);
        let patience = Instant::now() + SWEEP;
        loop {
            let record = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            if !lock(&record)? {
                // Held by a machine, or for a moment by who removes what a dead one left.
                let owner = read_record(&record).map(|record| record.pid);
                if owner.is_some_and(runs_elsewhere) || Instant::now() >= patience {
                    return Ok(None);
                }
                std::thread::sleep(Duration::from_millis(5));
                continue;
            }
            // Between opening and locking its last owner may have removed it.
            if is_at(&record, &path) {
                let (directory, name) = (directory.to_owned(), name.to_owned());
                return Ok(Some(Files { directory, name, record }));
            }
        }
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        let text = serde_json::to_string(record)?;
        let mut file = &self.record;
        // Cut only what is there: some file systems write a file that was cut to disk at once.
        if file.metadata()?.len() > 0 {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
        }
        file.write_all(text.as_bytes())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = fs::remove_file(socket_path(&self.directory, &self.name));
        let _ = fs::remove_file(record_path(&self.directory, &self.name));
    }
}

/// The files of the machine called `name`.
pub fn paths(directory: &Path, name: &str) -> [PathBuf; 2] {
    [socket_path(directory, name), record_path(directory, name)]
}

fn record_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.json"))
}

/// Where the API of the machine called `name` is served, unless somebody wants it elsewhere.
pub fn socket_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.sock"))
}

/// Locks `file`. Returns false if somebody else holds the lock.
///
/// # Errors
/// The system has no such locks there.
pub fn lock(file: &File) -> io::Result<bool> {
    // SAFETY: flock has no memory arguments.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        err if err.kind() == io::ErrorKind::WouldBlock => Ok(false),
        err => Err(err),
    }
}

/// True if `file` is what `path` names now.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(now)) => (ours.dev(), ours.ino()) == (now.dev(), now.ino()),
        _ => false,
    }
}

/// What a file that was just opened records; nothing while a machine that starts has not written it.
fn read_record(file: &File) -> Option<Record> {
    let mut text = String::new();
    file.take(LONGEST_RECORD).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// True if `pid` is a process, and not this one: in a container, the next boot may get the same id.
fn runs_elsewhere(pid: i32) -> bool {
    // SAFETY: sends nothing; only looks whether it could.
    let sent = || unsafe { libc::kill(pid, 0) } == 0;
    let ours = i32::try_from(std::process::id()).is_ok_and(|id| id == pid);
    pid > 0 && !ours && (sent() || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM))
}

/// Removes what a dead machine left at `path`. `record` was opened there and is locked: as long as
/// it is still what `path` names, nobody can take the name.
fn sweep(path: &Path, record: &File) {
    if is_at(record, path) {
        let _ = fs::remove_file(path.with_extension("sock"));
        let _ = fs::remove_file(path);
    }
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
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&path);
        let Ok(file) = file else { continue };
        match lock(&file) {
            Ok(true) => sweep(&path, &file),
            Ok(false) => records.extend(read_record(&file)),
            Err(_) => {}
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vmm::files::SocketPath;

    use super::*;

    fn record(directory: &Path, name: &str) -> Record {
        Record {
            name: name.into(),
            // A process, and not this one: a record that names its reader is one of an earlier boot.
            pid: std::os::unix::process::parent_id() as i32,
            started: 1,
            cpus: 1,
            memory: 2,
            kernel: "k".into(),
            api: socket_path(directory, name),
        }
    }

    #[test]
    fn a_name_is_taken_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap();
        let again = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap_err();
        assert_eq!(again.to_string(), "a machine named \"a\" runs already");
        assert_eq!(list(dir.path()).unwrap(), [record(dir.path(), "a")]);
        let missing = find(dir.path(), "b").unwrap_err().to_string();
        assert_eq!(missing, "no machine named \"b\" runs; there are: a");
        drop(entry);
        assert!(list(dir.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        Entry::create(dir.path(), &record(dir.path(), "a")).unwrap();
    }

    /// What a machine that was killed leaves.
    fn remains(directory: &Path, name: &str) {
        drop(std::os::unix::net::UnixListener::bind(socket_path(directory, name)).unwrap());
        let text =
            serde_json::to_vec(&Record { pid: i32::MAX, ..record(directory, name) }).unwrap();
        fs::write(record_path(directory, name), text).unwrap();
    }

    #[test]
    fn what_a_dead_machine_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        remains(dir.path(), "a");
        assert!(list(dir.path()).unwrap().is_empty());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_machine_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        remains(dir.path(), "a");
        let _entry = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [record(dir.path(), "a")]);
    }

    #[test]
    fn a_sweeper_that_comes_late_leaves_the_next_machine_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = record_path(dir.path(), "a");
        let entry = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap();
        let opened = File::open(&path).unwrap();
        drop(entry);
        let _entry = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap();
        assert!(lock(&opened).unwrap());
        sweep(&path, &opened);
        assert_eq!(list(dir.path()).unwrap(), [record(dir.path(), "a")]);
        assert!(socket_path(dir.path(), "a").exists());
    }

    #[test]
    fn a_sweeper_at_work_does_not_have_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = record_path(dir.path(), "a");
        remains(dir.path(), "a");
        let opened = File::open(&path).unwrap();
        assert!(lock(&opened).unwrap());
        std::thread::scope(|scope| {
            let starting =
                scope.spawn(|| Entry::create(dir.path(), &record(dir.path(), "a")).map(drop));
            std::thread::sleep(Duration::from_millis(100));
            sweep(&path, &opened);
            drop(opened);
            starting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn names_are_taken_and_given_back_while_others_look() {
        let dir = tempfile::tempdir().unwrap();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        list(dir.path()).unwrap();
                    }
                });
            }
            let rounds = || -> Result<(), RuntimeError> {
                for _ in 0..1000 {
                    let entry = Entry::create(dir.path(), &record(dir.path(), "a"))?;
                    std::thread::yield_now();
                    assert!(is_at(&entry.0.0.record, &record_path(dir.path(), "a")));
                    std::os::unix::net::UnixStream::connect(socket_path(dir.path(), "a")).unwrap();
                }
                Ok(())
            };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(rounds));
            over.store(true, Ordering::Relaxed);
            result.unwrap().unwrap();
        });
    }

    #[test]
    fn an_entry_that_cannot_be_made_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // Not a socket that could be replaced.
        fs::create_dir(socket_path(dir.path(), "a")).unwrap();
        let err = Entry::create(dir.path(), &record(dir.path(), "a")).unwrap_err();
        assert!(matches!(err, RuntimeError::Socket(ServerError::NotASocket(_))), "{err}");
        assert!(!record_path(dir.path(), "a").exists());
    }

    #[test]
    fn clients_wait_for_a_machine_that_is_not_up_yet() {
        // Far longer than a socket's address.
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("d".repeat(200));
        let entry = Entry::create(&dir, &record(&dir, "a")).unwrap();
        let path = SocketPath::of(&socket_path(&dir, "a")).unwrap();
        std::os::unix::net::UnixStream::connect(path.as_path()).unwrap();
        drop(entry);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn no_directory_means_no_machines() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("none")).unwrap().is_empty());
    }
}
