//! Reading snapshots, and making one of a diff and what it is a diff to.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::aside::{find, labelled};
use super::memory::{has, has_more};
use super::store::{Taken, disks};
use super::verify::Written;
use super::{
    Base, Files, Header, MEMORY, MemoryHeader, PAGES, Progress, State, StateError, StoreError,
    read, store,
};
use crate::machine::{Origin, Source};
use crate::memory::{Contents, Layer, PAGE_SIZE, Runs};

/// Most snapshots that one can stand on.
const DEEPEST: usize = 64;

/// Why a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The state cannot be read.
    #[error("{}", path.display())]
    State {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: StateError,
    },
    /// The memory file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The memory file is not the state's.
    #[error("the memory file {} is not the one that was written with this state: {reason}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The base of a diff cannot be read.
    #[error(
        "it is a diff, and what it is a diff to cannot be had; name the folder of that if it was moved"
    )]
    Base(#[source] Box<LoadError>),
    /// The base of a diff is another snapshot by now.
    #[error("{} is another snapshot than the one that this is a diff to", .0.display())]
    OtherBase(PathBuf),
    /// It is a diff to what a pager has.
    #[error(
        "{} has only what changed since its guest went on from a pager; it has to be laid over the memory file \
         of that first", .0.display()
    )]
    Part(PathBuf),
    /// Diffs stand on diffs without end.
    #[error("there are more than {DEEPEST} diffs, one over the other; merge some")]
    Deep,
    /// Not what was written.
    #[error("{} is damaged: it is not what was written", .0.display())]
    Damaged(PathBuf),
    /// Whether it is what was written cannot be seen.
    #[error("{} was written by an earlier version of Hull, without a sum to compare it with", .0.display())]
    NoSum(PathBuf),
}

/// Reads what a machine goes on from. Disks that changed since are warned of. `base` is where what a diff is
/// a diff to is now, if it was moved.
///
/// # Errors
/// [`LoadError`].
pub fn load(files: &Files, base: Option<&Files>) -> Result<Origin, LoadError> {
    let mut state = state(files)?;
    let layers = layers(files, &mut state, base, &mut Chain::new())?;
    warn_of_disks(&state.header);
    let base = Base {
        id: state.header.memory.id.clone(),
        state: files.state.clone(),
        memory: files.memory.clone(),
    };
    let memory = Source::Layers(layers);
    Ok(Origin::new(state, memory, Some(base)))
}

/// Reads what a machine goes on from whose memory a process brings that listens at `pager`. Disks that
/// changed since are warned of.
///
/// # Errors
/// [`LoadError`]. Whether the memory is the state's is seen when the machine is made.
pub fn load_paged(path: &Path, pager: PathBuf) -> Result<Origin, LoadError> {
    let failed = |source| LoadError::State { path: path.to_owned(), source };
    let mut state = read(path).map_err(failed)?;
    diff_pages(&mut state.parts).map_err(failed)?;
    warn_of_disks(&state.header);
    Ok(Origin::new(state, Source::Pager(pager), None))
}

fn state(files: &Files) -> Result<State, LoadError> {
    read(&files.state).map_err(|source| LoadError::State { path: files.state.clone(), source })
}

/// A snapshot's memory file, that of what it is a diff to, and so on.
type Chain = Vec<Written>;

/// The memory files of a snapshot, its own first, and then those of what it stands on.
///
/// # Errors
/// As of [`load`].
pub(super) fn chain(files: &Files, base: Option<&Files>) -> Result<Chain, LoadError> {
    let mut chain = Chain::new();
    layers(files, &mut state(files)?, base, &mut chain)?;
    Ok(chain)
}

/// What a memory file stands for that says of itself to be the diff's at `files`: alone it is not all of memory.
///
/// # Errors
/// As of [`load`].
pub(super) fn of_diff(files: &Files, file: &File) -> Result<Option<Vec<Layer>>, LoadError> {
    let Ok(mut state) = state(files) else { return Ok(None) };
    if !state.parts.iter().any(is_list) || labelled(file) != Some(state.header.memory.id.clone()) {
        return Ok(None);
    }
    layers(files, &mut state, None, &mut Chain::new()).map(Some)
}

/// The layers of a snapshot's memory, the lowest first. The list of a diff's pages is taken out of the state.
/// Adds the file to `chain`, and then those of what it stands on.
fn layers(
    files: &Files,
    state: &mut State,
    elsewhere: Option<&Files>,
    chain: &mut Chain,
) -> Result<Vec<Layer>, LoadError> {
    let header = &state.header.memory;
    if chain.len() > DEEPEST {
        return Err(LoadError::Deep);
    }
    let path = find(&files.memory, &header.aside);
    let failed = |source| LoadError::Read { path: path.clone(), source };
    let other = |reason: String| LoadError::Memory { path: path.clone(), reason };
    let file = super::store::open(&path).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    if len != header.size {
        return Err(other(format!("it is {len} bytes long, the guest had {}", header.size)));
    }
    let labelled = labelled(&file);
    let file = Arc::new(file);
    let known = |layers: &[Layer]| {
        has(&Contents::new(header.size, layers), &header.samples).map_err(failed)
    };
    let whole = [Layer::of_data(Arc::clone(&file)).map_err(failed)?];
    let pages = diff_pages(&mut state.parts)
        .map_err(|source| LoadError::State { path: files.state.clone(), source })?;
    // A diff may have been folded by somebody else into what it is a diff to, which says that it is that one.
    if pages.is_none() && labelled.is_some_and(|id| id != header.id) {
        return Err(other("it is another snapshot's".to_owned()));
    }
    let (file_of, sum) = (Arc::clone(&file), header.sum);
    chain.push(Written { path: path.clone(), file: file_of, pages: pages.clone(), sum });
    let outside = |pages: &Runs| header.samples.iter().any(|sample| !pages.contains(sample.page));
    if pages.as_ref().is_none_or(outside) && known(&whole)? {
        return Ok(whole.into());
    }
    let others = || other("its pages are others".to_owned());
    let Some(pages) = pages else { return Err(others()) };
    if pages.end() > header.size / PAGE_SIZE {
        return Err(others());
    }
    let Some(base) = header.base.as_ref() else {
        // Nothing is known of what it was to be laid over, but that there was something.
        if !has_more(&Contents::new(header.size, &whole), &pages).map_err(failed)? {
            return Err(LoadError::Part(path.clone()));
        }
        return if known(&whole)? { Ok(whole.into()) } else { Err(others()) };
    };
    let below = elsewhere.cloned().unwrap_or_else(|| base.files(&files.state));
    let (id, mut layers) = base_layers(&below, &[&base.id, &header.id], header.size, chain)?;
    if id == base.id {
        layers.push(Layer::new(file, &pages));
    }
    if known(&layers)? { Ok(layers) } else { Err(others()) }
}

/// The layers of the snapshot that has one of these ids, and which one: a diff may have been merged into what
/// it was a diff to.
fn base_layers(
    files: &Files,
    ids: &[&str],
    size: u64,
    chain: &mut Chain,
) -> Result<(String, Vec<Layer>), LoadError> {
    let boxed = |error| LoadError::Base(Box::new(error));
    let mut state = state(files).map_err(boxed)?;
    let MemoryHeader { id, size: found, .. } = state.header.memory.clone();
    if !ids.contains(&id.as_str()) || found != size {
        return Err(LoadError::OtherBase(files.state.clone()));
    }
    let layers = layers(files, &mut state, None, chain).map_err(|error| match error {
        LoadError::Deep => error,
        error => boxed(error),
    })?;
    Ok((id, layers))
}

/// True if a diff to this can be gone on from, as far as can be seen without its memory.
pub(super) fn stands(base: &Base) -> bool {
    let (mut files, mut ids) = (base.files(Path::new("")), vec![base.id.clone()]);
    for _ in 1..DEEPEST {
        let Ok(State { header, .. }) = read(&files.state) else { return false };
        let memory = header.memory;
        if !ids.contains(&memory.id) || !find(&files.memory, &memory.aside).exists() {
            return false;
        }
        let Some(below) = memory.base else { return true };
        files = below.files(&files.state);
        ids = vec![below.id, memory.id];
    }
    false
}

/// True if it says which pages a diff has.
fn is_list(part: &super::Part) -> bool {
    part.owner == MEMORY && part.payload.kind == PAGES
}

/// The pages that a diff has, if it is one.
fn diff_pages(parts: &mut Vec<super::Part>) -> Result<Option<Runs>, StateError> {
    let Some(place) = parts.iter().position(is_list) else { return Ok(None) };
    let payload = parts.swap_remove(place).payload;
    let bytes = payload.expect(PAGES, 1).map_err(|err| StateError::Invalid(err.to_string()))?;
    let runs = Runs::from_bytes(bytes);
    runs.map(Some).ok_or_else(|| StateError::Invalid("the list of pages makes no sense".to_owned()))
}

fn warn_of_disks(header: &Header) {
    for (before, now) in header.disks.iter().zip(disks(&header.config)) {
        if *before != now && before.path.as_os_str().as_bytes() == now.path.as_os_str().as_bytes() {
            tracing::warn!(
                disk = before.name,
                path = %before.path.display(),
                "the disk was changed since the snapshot; its guest does not know that"
            );
        }
    }
}

/// Why snapshots cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// They cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The result cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Makes a whole snapshot at `target` of the diff `files` and all that it stands on. `target` may be the diff
/// itself, or what it is a diff to: machines that run from them keep what they have.
///
/// # Errors
/// [`MergeError`]; what was there is as it was then.
pub fn merge(
    files: &Files,
    base: Option<&Files>,
    target: &Files,
    progress: Progress<'_>,
) -> Result<Header, MergeError> {
    let mut state = state(files)?;
    let layers = layers(files, &mut state, base, &mut Chain::new())?;
    let State { header, parts } = state;
    let contents = Contents::new(header.memory.size, &layers);
    let Header { created_ms, host, config, disks, memory, .. } = header;
    let id = Some(memory.id);
    let taken = Taken { id, created_ms, host, parts, config, disks, contents, diff: None };
    Ok(store(taken, target, progress)?)
}
