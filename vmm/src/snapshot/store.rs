//! Writing the two files of a snapshot so that nothing is ever half there, and reading them back.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{DiskHeader, Header, MemoryError, State, StateError, read, save_memory, write};
use crate::config::VmConfig;
use crate::machine::{Frozen, Origin};

/// Where a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// Its state file.
    pub state: PathBuf,
    /// Its memory file.
    pub memory: PathBuf,
}

impl Files {
    /// Those of a snapshot that has a folder to itself.
    pub fn within(folder: &Path) -> Files {
        Files { state: folder.join("state"), memory: folder.join("memory") }
    }
}

/// Why a snapshot is not written, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file cannot be made, written or moved into its place.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The memory cannot be written.
    #[error("{}", path.display())]
    Memory {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: MemoryError,
    },
    /// The state cannot be written or read.
    #[error("{}", path.display())]
    State {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: StateError,
    },
    /// Both files have one path.
    #[error("state and memory cannot be one file: {}", .0.display())]
    Same(PathBuf),
    /// The machine itself runs from this file.
    #[error("{} is in use by the machine itself", .0.display())]
    InUse(PathBuf),
}

/// A file beside the one that it is to replace. Gone when dropped, unless it was put in its place.
struct Aside {
    file: File,
    path: PathBuf,
    target: PathBuf,
    placed: bool,
}

impl Aside {
    fn new(target: &Path) -> Result<Aside, StoreError> {
        let mut name = OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(format!(".{}.new", std::process::id()));
        let path = target.with_file_name(name);
        let mut options = File::options();
        // What a guest has in its memory is for nobody else.
        let options = options.read(true).write(true).create(true).truncate(true).mode(0o600);
        match options.open(&path) {
            Ok(file) => Ok(Aside { file, path, target: target.to_owned(), placed: false }),
            Err(source) => Err(StoreError::File { verb: "make", path, source }),
        }
    }

    fn failed(&self, verb: &'static str) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = self.target.clone();
        move |source| StoreError::File { verb, path, source }
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(self.failed("write out"))
    }

    fn place(mut self) -> Result<(), StoreError> {
        fs::rename(&self.path, &self.target).map_err(self.failed("move into its place"))?;
        self.placed = true;
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = File::open(folder.unwrap_or(Path::new(".")));
        folder.and_then(|folder| folder.sync_all()).map_err(self.failed("write out the folder of"))
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes the snapshot of a machine that does not move. Both files are on the disk when this returns;
/// until then, what was at these paths is as it was, but that the memory file may be the new one when
/// the machine below loses its power just before the state file is.
///
/// `progress` is called with bytes of memory done, from several threads.
///
/// # Errors
/// [`StoreError`]; nothing new is left then.
pub fn store(
    frozen: Frozen,
    config: &VmConfig,
    files: &Files,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Header, StoreError> {
    if files.state == files.memory {
        return Err(StoreError::Same(files.state.clone()));
    }
    for path in [&files.state, &files.memory] {
        let used = crate::files::identity(path).is_some_and(|this| {
            config.files().any(|other| crate::files::identity(other) == Some(this))
        });
        if used {
            return Err(StoreError::InUse(path.clone()));
        }
    }
    let (state_file, memory_file) = (Aside::new(&files.state)?, Aside::new(&files.memory)?);
    let memory = save_memory(&frozen.image, &memory_file.file, progress)
        .map_err(|source| StoreError::Memory { path: files.memory.clone(), source })?;
    // The machine may go on being looked at, and ended; its memory is not needed any more.
    drop(frozen.image);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let header = Header {
        hull: env!("CARGO_PKG_VERSION").to_owned(),
        created_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        config: config.clone(),
        memory,
        disks: disks(config),
    };
    let state = State { header, parts: frozen.parts };
    let failed = |source| StoreError::State { path: files.state.clone(), source };
    let bytes = write(&state).map_err(failed)?;
    io::Write::write_all(&mut &state_file.file, &bytes).map_err(state_file.failed("write"))?;
    memory_file.sync()?;
    state_file.sync()?;
    // The state last: with it the pair counts.
    memory_file.place()?;
    state_file.place()?;
    Ok(state.header)
}

/// The disks as they are now.
fn disks(config: &VmConfig) -> Vec<DiskHeader> {
    let disk = |(n, disk): (usize, &crate::config::DiskConfig)| {
        let file = fs::metadata(&disk.path).ok();
        let modified = file.as_ref().map_or(0, |file| {
            let seconds = u64::try_from(file.mtime()).unwrap_or_default();
            seconds.saturating_mul(1_000_000_000).saturating_add(file.mtime_nsec() as u64)
        });
        DiskHeader {
            name: config.disk_name(n),
            path: disk.path.clone(),
            size: file.map_or(0, |file| file.len()),
            modified_ns: modified,
        }
    };
    config.disk.iter().enumerate().map(disk).collect()
}

/// Reads what a machine goes on from. Disks that changed since are warned of.
///
/// # Errors
/// [`StoreError`]. Whether the memory is the state's is seen when the machine is made.
pub fn load(files: &Files) -> Result<Origin, StoreError> {
    let state = read(&files.state)
        .map_err(|source| StoreError::State { path: files.state.clone(), source })?;
    let memory = File::open(&files.memory).map_err(|source| StoreError::File {
        verb: "open",
        path: files.memory.clone(),
        source,
    })?;
    for (before, now) in state.header.disks.iter().zip(disks(&state.header.config)) {
        if *before != now && before.path.as_os_str().as_bytes() == now.path.as_os_str().as_bytes() {
            tracing::warn!(
                disk = before.name,
                path = %before.path.display(),
                "the disk was changed since the snapshot; its guest does not know that"
            );
        }
    }
    Ok(Origin { state, memory })
}
