//! A disk that becomes the base of others while its machine goes on.
//!
//! ```text
//!   before   machine ──> top ──> …          after   machine ──> fresh ──┐
//!                                                   child   ──> fresh ──┴─> what was the top ──> …
//! ```
//!
//! Nothing is synced: what is in the page cache only is marked as such, and the first flush of whoever stands on
//! it syncs it. A chain that has grown to [`MOST_LAYERS`] files is cut down first: its highest overlays become one,
//! so many that what is copied is at least half as much as what stays is long. Each block is so copied as many
//! times as a chain can double, and a machine may fork as often as it wants.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::fold::copy;
use super::format::{NO_ID, PAGE};
use super::open::{Under, aside, boot_id, folder_of, make, random, raw_layer, settle};
use super::{BaseFormat, Header, Layer, OpenError, Overlay, OverlayError, Owners};
use crate::virtio::blk::file::lock;
use crate::virtio::blk::{Backing, DiskFile};

/// Files that a chain may have before its highest overlays are made one.
pub const MOST_LAYERS: usize = 16;

/// A disk that others can stand on.
#[derive(Debug)]
pub struct Frozen {
    /// What the machine goes on with in place of what it had; nothing if it wrote nothing since the last time,
    /// when it keeps what it has.
    pub disk: Option<Backing>,
    /// Files that were made on the way, beside that of `disk`.
    pub made: Vec<PathBuf>,
    under: Under,
    files: Vec<Arc<File>>,
}

impl Frozen {
    /// Where the base of others is.
    pub fn base(&self) -> &Path {
        &self.under.path
    }

    /// Makes an overlay at `path` for somebody else, who may open it.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn overlay(&self, path: &Path) -> Result<Header, OverlayError> {
        make(path, &self.under).map(|(_, header)| header)
    }

    /// The files below such an overlay, the lowest first, for [`Overlay::open_over`]. They may be open for
    /// writing here: whoever gets them has to be trusted not to.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }
}

/// Turns the top of `disk`, of which no queue runs, into a base that others share, and makes a fresh overlay at
/// `fresh` for the machine itself.
///
/// # Errors
/// [`OverlayError`]; the disk is as it was then.
pub fn freeze(disk: &Backing, fresh: &Path) -> Result<Frozen, OverlayError> {
    if disk.read_only() {
        let reason = "it is read-only, and can be shared as it is".to_owned();
        return Err(OverlayError::Unfit { path: disk.path().to_owned(), reason });
    }
    match disk {
        Backing::Raw(file) => freeze_raw(file, fresh),
        Backing::Overlay(overlay) => freeze_overlay(overlay, fresh),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, OverlayError> {
    fs::canonicalize(path).map_err(|source| OverlayError::File {
        verb: "find",
        path: path.to_owned(),
        source,
    })
}

/// Lets others in beside this process, for reading.
fn share(file: &File, path: &Path) -> Result<(), OverlayError> {
    let failed = |source| OpenError::Host { what: "lock", path: path.to_owned(), source };
    Ok(lock(file, true).map_err(failed)?)
}

fn freeze_raw(disk: &DiskFile, fresh: &Path) -> Result<Frozen, OverlayError> {
    let path = absolute(disk.path())?;
    let failed = |source| {
        let path = path.clone();
        OpenError::Host { what: "copy the descriptor of", path, source }
    };
    let file = Arc::new(disk.file().try_clone().map_err(failed)?);
    let under = Under {
        path: path.clone(),
        file: Arc::clone(&file),
        header: None,
        size: disk.len(),
        unsynced: true,
    };
    let copy = DiskFile::of_shared(file.try_clone().map_err(failed)?, &path, disk.direct())?;
    let block_size = copy.block_size();
    let mut base = raw_layer(copy, path.clone());
    base.unsynced = true;
    let owners = owners(disk.len(), &path)?;
    let top = made(fresh, &under)?;
    share(&file, &path)?;
    let overlay = Overlay::over(vec![base], top, fresh, owners, disk.direct(), block_size, &[])?;
    Ok(Frozen { disk: Some(overlay.into()), made: Vec::new(), under, files: vec![file] })
}

fn owners(size: u64, path: &Path) -> Result<Arc<Owners>, OverlayError> {
    let failed = |source| OverlayError::File {
        verb: "find room for the map of",
        path: path.to_owned(),
        source,
    };
    Ok(Arc::new(Owners::new(size.div_ceil(super::BLOCK)).map_err(failed)?))
}

/// The file of a new overlay.
struct Top {
    file: File,
    header: Header,
    folder: File,
}

fn made(path: &Path, under: &Under) -> Result<Top, OverlayError> {
    let failed =
        |source| OverlayError::File { verb: "open the folder of", path: path.to_owned(), source };
    let folder = File::open(folder_of(path)).map_err(failed)?;
    let (file, header) = make(path, under)?;
    Ok(Top { file, header, folder })
}

fn freeze_overlay(overlay: &Overlay, fresh: &Path) -> Result<Frozen, OverlayError> {
    let failed = |source| OverlayError::File { verb: "write", path: overlay.path.clone(), source };
    if overlay.allocated() == 0 {
        let below = &overlay.layers[..overlay.layers.len() - 1];
        let base = &below[below.len() - 1];
        let under = Under {
            path: absolute(&base.path)?,
            file: Arc::clone(&base.file),
            header: base.header.clone(),
            size: overlay.len(),
            unsynced: base.unsynced && !overlay.is_base_synced(),
        };
        let files = below.iter().map(|layer| Arc::clone(&layer.file)).collect();
        return Ok(Frozen { disk: None, made: Vec::new(), under, files });
    }
    let mut files = Vec::new();
    let merged;
    let overlay = if overlay.layers.len() < MOST_LAYERS {
        overlay
    } else {
        let mut name = fresh.file_name().unwrap_or_default().to_owned();
        name.push(".base");
        let path = fresh.with_file_name(name);
        merged = absorbed(overlay, &path)?;
        files.push(path);
        &merged
    };
    overlay.note_bits().map_err(failed)?;
    let path = absolute(&overlay.path)?;
    let file = Arc::clone(&overlay.top_layer().file);
    let unsynced = overlay.written.load(Ordering::Relaxed) || !overlay.is_saved();
    let under = Under {
        path: path.clone(),
        file: Arc::clone(&file),
        header: Some(overlay.header.clone()),
        size: overlay.len(),
        unsynced,
    };
    let top = made(fresh, &under)?;
    share(&file, &path)?;
    let mut layers = overlay.layers.clone();
    for layer in &mut layers {
        layer.unsynced &= !overlay.is_base_synced();
    }
    if let Some(base) = layers.last_mut() {
        base.path = path;
        base.unsynced = unsynced;
        base.stamp = if overlay.noted.load(Ordering::Relaxed) { overlay.stamp } else { NO_ID };
    }
    let shared: Vec<_> = layers.iter().map(|layer| Arc::clone(&layer.file)).collect();
    let mut vouched = overlay.note(false).synced;
    vouched.sort_unstable();
    let (owners, direct) = (Arc::clone(&overlay.owners), overlay.direct);
    let mut disk = Overlay::over(layers, top, fresh, owners, direct, overlay.block_size, &vouched)?;
    if !files.is_empty() {
        disk.base_synced = AtomicBool::new(false);
    }
    Ok(Frozen { disk: Some(disk.into()), made: files, under, files: shared })
}

impl Overlay {
    /// A new top over open files, of which `owners` says which block is whose.
    fn over(
        mut layers: Vec<Layer>,
        top: Top,
        path: &Path,
        owners: Arc<Owners>,
        direct: bool,
        block_size: u32,
        vouched: &[super::Id],
    ) -> Result<Overlay, OverlayError> {
        let failed = |source| OverlayError::File { verb: "open", path: path.to_owned(), source };
        let Top { file, header, folder } = top;
        if direct {
            super::open::go_direct(&file).map_err(failed)?;
        }
        layers.push(Layer {
            file: Arc::new(file),
            path: path.to_owned(),
            start: header.data_start(),
            header: Some(header.clone()),
            stamp: NO_ID,
            unsynced: false,
        });
        Ok(Overlay {
            path: path.to_owned(),
            pages: (0..header.bitmap_pages()).map(|_| AtomicU8::new(0)).collect(),
            header,
            layers,
            owners,
            read_only: false,
            direct,
            block_size,
            allocated: AtomicU64::new(0),
            written: AtomicBool::new(true),
            base_synced: AtomicBool::new(false),
            noted: AtomicBool::new(false),
            boot: boot_id(),
            stamp: random().map_err(failed)?,
            committing: false,
            vouched: vouched.to_vec(),
            folder: Some(Arc::new(folder)),
        })
    }
}

/// How many of the highest files of a chain are to be made one, by how many blocks of each can be seen.
fn run_to_absorb(counts: &[u64]) -> usize {
    let mut taken = 1;
    let mut blocks = counts.last().copied().unwrap_or_default();
    // The lowest file is not ours.
    while taken + 1 < counts.len() {
        let next = counts[counts.len() - 1 - taken];
        if taken >= 2 && next > 2 * blocks {
            break;
        }
        taken += 1;
        blocks += next;
    }
    taken
}

/// A chain of the highest overlays of `overlay` in one file at `path`, over the others.
fn absorbed(overlay: &Overlay, path: &Path) -> Result<Overlay, OverlayError> {
    let mut counts = vec![0u64; overlay.layers.len()];
    for owner in &overlay.owners.0 {
        if let Some(count) = counts.get_mut(usize::from(owner.load(Ordering::Relaxed))) {
            *count += 1;
        }
    }
    let keep = overlay.layers.len() - run_to_absorb(&counts);
    let below = overlay.layers[..keep].to_vec();
    let base = &below[keep - 1];
    let under = Under {
        path: absolute(&base.path)?,
        file: Arc::clone(&base.file),
        header: base.header.clone(),
        size: overlay.len(),
        unsynced: base.unsynced && !overlay.is_base_synced(),
    };
    let owners = owners(overlay.len(), path)?;
    let place = keep as u8;
    for (block, owner) in overlay.owners.0.iter().enumerate() {
        let owner = owner.load(Ordering::Relaxed);
        if owner != 0 && owner < place {
            owners.set(block as u64, owner);
        }
    }
    let top = made(path, &under)?;
    let vouched = overlay.note(false).synced;
    let copied = Overlay::over(below, top, path, owners, false, overlay.block_size, &vouched)
        .and_then(|merged| {
            let wanted = |block| overlay.owners.get(block) >= place;
            copy(overlay, &merged, wanted, &|_, _| {})?;
            Ok(merged)
        });
    if copied.is_err() {
        let _ = fs::remove_file(path);
    }
    let merged = copied?;
    if overlay.direct {
        let failed = |source| OverlayError::File { verb: "open", path: path.to_owned(), source };
        super::open::go_direct(&merged.top_layer().file).map_err(failed)?;
    }
    Ok(Overlay { direct: overlay.direct, ..merged })
}

/// How a disk came to be a copy of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloned {
    /// A raw file of its own; the file system shares what neither changes.
    Reflink,
    /// An overlay.
    Overlay,
}

/// `FICLONE` of `linux/fs.h`.
const FICLONE: libc::c_ulong = 0x4004_9409;

/// Makes a copy of the raw disk `base` at `path` that costs no copying: by the file system, if it can share data
/// between files, else an overlay.
///
/// # Errors
/// [`OverlayError`]; nothing is left then.
pub fn reflink_or_overlay(base: &Path, path: &Path) -> Result<Cloned, OverlayError> {
    let source = DiskFile::open(base, true, false)?;
    if source.is_file() {
        match reflink(source.file(), path) {
            Ok(()) => return Ok(Cloned::Reflink),
            Err(err) if err.kind() == ErrorKind::AlreadyExists => {
                return Err(OverlayError::Exists(path.to_owned()));
            }
            Err(err) if cannot(&err) => {}
            Err(source) => {
                return Err(OverlayError::File { verb: "make", path: path.to_owned(), source });
            }
        }
    }
    super::create(path, base, BaseFormat::Raw).map(|_| Cloned::Overlay)
}

/// The file system cannot share data between these files.
pub(super) fn cannot(err: &io::Error) -> bool {
    let known = [libc::EOPNOTSUPP, libc::EXDEV, libc::EINVAL, libc::ENOTTY, libc::ENOSYS];
    err.raw_os_error().is_some_and(|code| known.contains(&code))
}

/// Makes the file at `path`, where nothing is, share all data of `source`.
pub(in crate::virtio::blk) fn reflink(source: &File, path: &Path) -> io::Result<()> {
    let aside = aside(path)?;
    let target =
        File::options().read(true).write(true).create_new(true).mode(0o600).open(&aside)?;
    // SAFETY: two descriptors are all that is passed.
    let cloned = match unsafe { libc::ioctl(target.as_raw_fd(), FICLONE, source.as_raw_fd()) } {
        0 => settle(&aside, path),
        _ => Err(io::Error::last_os_error()),
    };
    if cloned.is_err() {
        let _ = fs::remove_file(&aside);
    }
    cloned
}

const _: () = assert!(MOST_LAYERS < super::DEEPEST && PAGE > 0);

#[cfg(test)]
mod tests {
    use super::run_to_absorb;

    #[test]
    fn what_is_absorbed_is_no_more_than_it_has_to_be() {
        assert_eq!(run_to_absorb(&[900, 100, 1, 1]), 2);
        assert_eq!(run_to_absorb(&[900, 1, 1, 1]), 3);
        assert_eq!(run_to_absorb(&[900, 100, 4, 2, 1, 1]), 4);
        assert_eq!(run_to_absorb(&[900, 4, 100, 1]), 3);
        assert_eq!(run_to_absorb(&[900, 4]), 1);
    }

    #[test]
    fn a_chain_does_not_grow_and_copies_little() {
        // A machine that writes one block between forks, of 1 << 20 that can be told apart.
        let (mut counts, mut copied) = (vec![0u64], 0);
        for _ in 0..10_000 {
            counts.push(1);
            if counts.len() >= super::MOST_LAYERS {
                let run = run_to_absorb(&counts);
                let merged: u64 = counts.drain(counts.len() - run..).sum();
                copied += merged;
                counts.push(merged);
            }
            assert!(counts.len() <= super::MOST_LAYERS);
        }
        assert!(copied < 10_000 * 14, "{copied} blocks were copied for 10000");
    }
}
