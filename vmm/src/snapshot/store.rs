//! Writing the two files of a snapshot so that nothing is ever half there.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::virtio::device::Payload;

use super::aside::Aside;
use super::load::{LoadError, of_diff, stands};
use super::memory::{samples_of, samples_of_file, save};
use super::{
    Base, DiskHeader, Header, MEMORY, MemoryHeader, PAGES, Part, Progress, State, StateError, read,
    write,
};
use crate::config::VmConfig;
use crate::memory::{Contents, Layer, PAGE_SIZE, Runs};
use crate::random;

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

/// Why a snapshot is not written.
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
    /// The state cannot be written.
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
    /// There is a folder, or a device.
    #[error("{} is not a file", .0.display())]
    NotAFile(PathBuf),
    /// The machine itself runs from this file.
    #[error("{} is in use by the machine itself", .0.display())]
    InUse(PathBuf),
    /// A file that is there already has the memory of another guest.
    #[error("{} is there already, and is {found} bytes long; the guest has {expected}", path.display())]
    OtherSize {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The guest's RAM in bytes.
        expected: u64,
    },
    /// A file that is there already is a diff's, and what that stands on cannot be had.
    #[error("what changed cannot be laid over {}", path.display())]
    Below {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<LoadError>,
    },
    /// The host has no random numbers.
    #[error("the host refused random numbers")]
    Random(#[source] io::Error),
}

/// A machine at one moment.
#[derive(Debug)]
pub struct Taken {
    /// Its id if it has one already: it was a diff, and becomes whole.
    pub id: Option<String>,
    /// When that was, in milliseconds since 1970.
    pub created_ms: u64,
    /// Where, as [`this_host`] says it.
    pub host: Option<String>,
    /// Its states.
    pub parts: Vec<Part>,
    /// How it was configured.
    pub config: VmConfig,
    /// Its disks at that moment.
    pub disks: Vec<DiskHeader>,
    /// Its memory.
    pub contents: Contents,
    /// What changed since another snapshot, for one that holds nothing else.
    pub diff: Option<Diff>,
}

/// What changed since another snapshot.
#[derive(Debug)]
pub struct Diff {
    /// The pages.
    pub pages: Runs,
    /// That one.
    pub base: Option<Base>,
    /// Nothing is known of memory but these pages: a pager has the rest.
    pub partial: bool,
}

/// Writes a snapshot. Both files are on the disk when this returns; until then, and whatever happens, what
/// was at these paths can be loaded as before, or this one already.
///
/// A diff whose memory file is there already becomes a whole snapshot in its place.
///
/// # Errors
/// [`StoreError`]; nothing new is left then.
pub fn store(taken: Taken, files: &Files, progress: Progress<'_>) -> Result<Header, StoreError> {
    let Taken { id, created_ms, host, mut parts, config, disks, contents, diff } = taken;
    check(&config, files)?;
    let size = contents.pages() * PAGE_SIZE;
    let gone = |diff: &Diff| !diff.partial && diff.base.as_ref().is_some_and(|base| !stands(base));
    let diff = diff.filter(|diff| {
        let gone = gone(diff);
        if gone {
            tracing::warn!(
                "nothing can stand on the last snapshot any more; all of the memory is saved"
            );
        }
        !gone
    });
    let (contents, diff) = match diff {
        Some(diff) => laid_over(contents, diff, files)?,
        None => (contents, None),
    };
    let aside = word().map_err(StoreError::Random)?;
    let id = id.map_or_else(word, Ok).map_err(StoreError::Random)?;
    let (mut state_file, mut memory_file) =
        (Aside::new(&files.state, &aside)?, Aside::new(&files.memory, &aside)?);
    let pages = diff.as_ref().map(|diff| &diff.pages);
    let (data, sum) =
        save(&contents, pages, &memory_file.file, progress).map_err(memory_file.failed("write"))?;
    let samples = match pages {
        Some(pages) => samples_of(&contents, pages),
        None => samples_of_file(&memory_file.file, size),
    };
    let samples = samples.map_err(memory_file.failed("read back"))?;
    super::aside::label(&memory_file.file, &id);
    drop(contents);
    let base = diff.and_then(|Diff { pages, base, .. }| {
        let payload = Payload { kind: PAGES, version: 1, bytes: pages.to_bytes() };
        parts.push(Part { owner: MEMORY.to_owned(), payload });
        base.map(|base| base.seen_from(&files.state))
    });
    let header = Header {
        hull: env!("CARGO_PKG_VERSION").to_owned(),
        created_ms,
        host,
        disks,
        config,
        memory: MemoryHeader { id, aside, size, data, sum: Some(sum), samples, base },
    };
    let state = State { header, parts };
    let failed = |source| StoreError::State { path: files.state.clone(), source };
    let bytes = write(&state).map_err(failed)?;
    io::Write::write_all(&mut &state_file.file, &bytes).map_err(state_file.failed("write"))?;
    // Both at once: the file system writes its journal once for both.
    std::thread::scope(|scope| {
        let memory = scope.spawn(|| memory_file.sync());
        let state = state_file.sync();
        memory.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).and(state)
    })?;
    let alone = state_file.alone()?;
    // With it the pair counts: it says where the memory is.
    state_file.place()?;
    // What happens in one folder reaches the disk in the order in which it happened.
    let apart = !state_file.is_beside(&memory_file);
    let placed =
        if apart { memory_file.sync_folder().and(state_file.sync_folder()) } else { Ok(()) };
    let placed = placed.and_then(|()| memory_file.place()).and_then(|()| memory_file.sync_folder());
    if placed.is_err() {
        memory_file.keep();
    }
    drop(alone);
    placed?;
    memory_file.clean();
    state_file.clean();
    Ok(state.header)
}

fn check(config: &VmConfig, files: &Files) -> Result<(), StoreError> {
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
    Ok(())
}

/// What a diff comes to with the memory file that is at its path already, if there is one.
fn laid_over(
    contents: Contents,
    diff: Diff,
    files: &Files,
) -> Result<(Contents, Option<Diff>), StoreError> {
    let path = &files.memory;
    let failed = |source| StoreError::File { verb: "read", path: path.to_owned(), source };
    let file = match open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok((contents, Some(diff))),
        file => file.map_err(failed)?,
    };
    let expected = contents.pages() * PAGE_SIZE;
    let there = file.metadata().map_err(failed)?;
    if !there.is_file() {
        return Err(StoreError::NotAFile(path.to_owned()));
    }
    if there.len() != expected {
        let path = path.to_owned();
        return Err(StoreError::OtherSize { path, found: there.len(), expected });
    }
    if !diff.partial {
        // All of it is known here, also what that file should say.
        return Ok((contents, None));
    }
    let refused = |error| StoreError::Below { path: path.clone(), source: Box::new(error) };
    let below = match of_diff(files, &file).map_err(refused)? {
        Some(layers) => layers,
        None => vec![Layer::of_data(Arc::new(file)).map_err(failed)?],
    };
    Ok((contents.over(expected, &below), None))
}

/// Letters and digits that nobody else has.
///
/// # Errors
/// The host has no random numbers.
pub fn word() -> io::Result<String> {
    let mut bytes = [0; 16];
    random::fill(&mut bytes)?;
    Ok(format!("{:032x}", u128::from_le_bytes(bytes)))
}

impl Base {
    /// With paths as they are written into the state file of a diff: of neighbours relative, so that they
    /// can be moved together.
    fn seen_from(self, diff: &Path) -> Base {
        let folder = |path: &Path| Some(path.parent()?.to_owned());
        let shorten = |path: PathBuf| -> PathBuf {
            let short = || {
                let (own, other) = (folder(diff)?, folder(&path)?);
                if own == other {
                    return Some(PathBuf::from(path.file_name()?));
                }
                let neighbours = folder(&own).is_some() && folder(&own) == folder(&other);
                neighbours.then(|| {
                    Path::new("..").join(other.file_name()?).join(path.file_name()?).into()
                })?
            };
            short().unwrap_or(path)
        };
        Base { id: self.id, state: shorten(self.state), memory: shorten(self.memory) }
    }

    /// Its files, for the diff with this state file.
    pub fn files(&self, diff: &Path) -> Files {
        let folder = diff.parent().unwrap_or(Path::new(""));
        Files { state: folder.join(&self.state), memory: folder.join(&self.memory) }
    }
}

/// Which start of which host this is, if the kernel says (Linux, Documentation/admin-guide/sysctl/kernel.rst).
pub fn this_host() -> Option<String> {
    static HOST: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim_end().to_owned())
    };
    HOST.get_or_init(read).clone()
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The disks of a machine as they are now.
pub fn disks(config: &VmConfig) -> Vec<DiskHeader> {
    let disk = |(n, disk): (usize, &crate::config::DiskConfig)| {
        let file = fs::metadata(disk.file()).ok();
        let modified = file.as_ref().map_or(0, |file| {
            let seconds = u64::try_from(file.mtime()).unwrap_or_default();
            seconds.saturating_mul(1_000_000_000).saturating_add(file.mtime_nsec() as u64)
        });
        DiskHeader {
            name: config.disk_name(n),
            path: disk.file().to_owned(),
            size: file.map_or(0, |file| file.len()),
            modified_ns: modified,
        }
    };
    config.disk.iter().enumerate().map(disk).collect()
}

/// Opens a file to be read, and waits for nobody: it may be a pipe.
pub(super) fn open(path: &Path) -> io::Result<fs::File> {
    fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// Removes a snapshot, the state first, and what was left beside it. Machines that run from it go on. With
/// `damaged` also one that cannot be read.
///
/// # Errors
/// There is none, or a file cannot be removed.
pub fn remove(files: &Files, damaged: bool) -> Result<(), StoreError> {
    let memory = match read(&files.state) {
        Ok(state) => super::aside::find(&files.memory, &state.header.memory.aside),
        Err(_) if damaged => files.memory.clone(),
        Err(source) => return Err(StoreError::State { path: files.state.clone(), source }),
    };
    for path in [&files.state, &memory, &files.memory] {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::File { verb: "remove", path: path.clone(), source });
            }
            _ => {}
        }
    }
    super::aside::clean(&files.state);
    super::aside::clean(&files.memory);
    Ok(())
}
