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
use std::sync::atomic::{AtomicBool, Ordering};

use super::bitmap::Bitmap;
use super::fold::copy;
use super::format::{NO_ID, PAGE};
use super::make::{Under, aside, make, settle};
use super::open::{folder_of, header_of, raw_layer};
use super::{Header, Layer, Note, OpenError, Overlay, OverlayError, Owners, Spot};
use crate::virtio::blk::file::{go_direct, lock, reopened, share};
use crate::virtio::blk::qcow2::freeze as image;
use crate::virtio::blk::{Backing, DiskFile};

/// Files that a chain may have before its highest overlays are made one.
pub const MOST_LAYERS: usize = 16;

/// How somebody gets a disk of its own over a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As an overlay.
    Overlay,
    /// As a copy that the file system makes of the only file, which has no name.
    Reflink,
    /// As a qcow2 image whose backing file is the highest file.
    Image {
        /// So many images are below it that forks put there, and name what they stand on.
        forked: u32,
    },
}

impl Way {
    const OVERLAY: &str = "ovl";
    const IMAGE: &str = "qcow2";

    /// How the names of such files end.
    pub fn extension(self) -> &'static str {
        match self {
            Way::Overlay => Way::OVERLAY,
            Way::Reflink => "img",
            Way::Image { .. } => Way::IMAGE,
        }
    }
}

/// What others stand on: files that nobody writes any more, in this process or handed over to another.
#[derive(Clone, Debug)]
pub struct Base {
    /// Where the highest of them is; absolute.
    pub path: PathBuf,
    /// They, the lowest first, open for reading. As long as one of these descriptors is open, here or elsewhere,
    /// nobody gets the file for writing.
    pub files: Vec<Arc<File>>,
    /// Some of it may not be on the disk yet.
    pub unsynced: bool,
    /// How a disk over it is made.
    pub way: Way,
}

impl Base {
    /// That of a disk which nobody writes, and which was opened for reading only.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn of(disk: &Backing) -> Result<Base, OverlayError> {
        let path = absolute(disk.path())?;
        let files = match disk {
            Backing::Raw(file) => vec![Arc::new(reopened(file.file(), &path)?)],
            Backing::Overlay(overlay) => readers(overlay.layers.iter())?,
            Backing::Qcow2(image) => return image::base_of(image),
        };
        // Whoever wrote it may not have flushed it.
        Ok(Base { path, files, unsynced: true, way: Way::Overlay })
    }

    /// Makes a disk at `path`, where nothing is, that begins as this one, and opens it.
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left then.
    pub fn copy(&self, path: &Path, direct: bool) -> Result<Backing, OverlayError> {
        let copied = match self.way {
            Way::Overlay => self.over(path, direct),
            Way::Reflink => self.cloned(path, direct),
            Way::Image { .. } => image::over(self, path, direct).map(Backing::from),
        };
        if copied.as_ref().is_err_and(|err| !matches!(err, OverlayError::Exists(_))) {
            let _ = fs::remove_file(path);
        }
        copied
    }

    fn over(&self, path: &Path, direct: bool) -> Result<Backing, OverlayError> {
        drop(make(path, &self.under()?)?);
        let mut overlay = Overlay::open_over(path, self.files.clone(), false, direct)?;
        let folder = File::open(folder_of(path));
        overlay.new_in(folder.map_err(|source| OverlayError::File {
            verb: "open the folder of",
            path: path.to_owned(),
            source,
        })?);
        Ok(overlay.into())
    }

    fn cloned(&self, path: &Path, direct: bool) -> Result<Backing, OverlayError> {
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::AlreadyExists => OverlayError::Exists(path.to_owned()),
            _ => OverlayError::File { verb: "make", path: path.to_owned(), source },
        };
        let Some(file) = self.files.last() else { return Err(self.unfit("it has no file")) };
        reflink(file, path).map_err(failed)?;
        // No flush of the guest syncs the folder.
        File::open(folder_of(path)).and_then(|folder| folder.sync_all()).map_err(failed)?;
        Ok(DiskFile::open(path, false, direct)?.into())
    }

    pub(in crate::virtio::blk) fn unfit(&self, reason: &str) -> OverlayError {
        OverlayError::Unfit { path: self.path.clone(), reason: reason.to_owned() }
    }

    fn under(&self) -> Result<Under, OverlayError> {
        let Some(file) = self.files.last() else { return Err(self.unfit("it has no file")) };
        let header = if self.files.len() > 1 { Some(header_of(file, &self.path)?) } else { None };
        let size = match &header {
            Some(header) => header.size,
            None => DiskFile::of_shared(reopened(file, &self.path)?, &self.path, false)?.len(),
        };
        let (file, unsynced) = (Arc::clone(file), self.unsynced);
        Ok(Under { path: self.path.clone(), file, header, size, unsynced })
    }
}

/// A disk that others can stand on.
#[derive(Debug)]
pub struct Frozen {
    /// What the machine goes on with in place of what it had, if it cannot keep that.
    pub disk: Option<Backing>,
    /// Files that were made on the way, beside that of `disk`.
    pub made: Vec<PathBuf>,
    /// What others stand on.
    pub base: Base,
    /// What the machine had, with which it may go on after all.
    pub(in crate::virtio::blk) before: Option<Arc<File>>,
}

impl Frozen {
    /// Has everything be as it was: nobody stands on it.
    pub fn undo(mut self) {
        let path = self.disk.take().map(|disk| disk.path().to_owned());
        for path in path.iter().chain(&self.made) {
            let _ = fs::remove_file(path);
        }
        self.base.files.clear();
        if let Some(file) = self.before.filter(|_| path.is_some())
            && let Err(error) = lock(&file, false)
        {
            tracing::warn!(%error, path = %self.base.path.display(), "a disk is not locked any more");
        }
    }

    /// How the names of files end that copies of `disk` have.
    pub fn extension(disk: &Backing) -> &'static str {
        if disk.image().is_some() { Way::IMAGE } else { Way::OVERLAY }
    }

    /// The name of the lowest file: what a person knows the disk by.
    pub fn known_as(disk: &Backing) -> &Path {
        match disk {
            Backing::Raw(file) => file.path(),
            Backing::Overlay(overlay) => &overlay.layers[0].path,
            Backing::Qcow2(image) => image.lowest(),
        }
    }
}

/// Turns the top of `disk`, of which no queue runs, into a base that others share, and makes a fresh overlay at
/// `fresh` for the machine itself, or a fresh image over an image. Where the file system can share data between files, the machine keeps its raw
/// disk, and what others stand on is a copy.
///
/// # Errors
/// [`OverlayError`]; the disk is as it was then.
pub fn freeze(disk: &Backing, fresh: &Path) -> Result<Frozen, OverlayError> {
    if disk.read_only() {
        let reason = "it is read-only, and can be shared as it is".to_owned();
        return Err(OverlayError::Unfit { path: disk.path().to_owned(), reason });
    }
    match disk {
        Backing::Raw(file) => match clone_raw(file, fresh)? {
            Some(frozen) => Ok(frozen),
            None => freeze_raw(file, fresh),
        },
        Backing::Overlay(overlay) => freeze_overlay(overlay, fresh),
        Backing::Qcow2(image) => image::freeze(image, fresh),
    }
}

pub(in crate::virtio::blk) fn absolute(path: &Path) -> Result<PathBuf, OverlayError> {
    fs::canonicalize(path).map_err(|source| OverlayError::File {
        verb: "find",
        path: path.to_owned(),
        source,
    })
}

/// The files of these for whoever else, who cannot write them.
fn readers<'a>(layers: impl Iterator<Item = &'a Layer>) -> Result<Vec<Arc<File>>, OpenError> {
    layers.map(|layer| reopened(&layer.file, &layer.path).map(Arc::new)).collect()
}

/// A copy that shares its data with the disk, if there can be one. It loses its name at once.
fn clone_raw(disk: &DiskFile, aside: &Path) -> Result<Option<Frozen>, OverlayError> {
    let failed = |source| OverlayError::File { verb: "make", path: aside.to_owned(), source };
    if !disk.is_file() {
        return Ok(None);
    }
    match reflink(disk.file(), aside) {
        Ok(()) => {}
        Err(err) if cannot(&err) => return Ok(None),
        Err(err) if err.kind() == ErrorKind::AlreadyExists => {
            return Err(OverlayError::Exists(aside.to_owned()));
        }
        Err(err) => return Err(failed(err)),
    }
    let file = File::open(aside);
    fs::remove_file(aside).map_err(failed)?;
    let files = vec![Arc::new(file.map_err(failed)?)];
    let base = Base { path: absolute(disk.path())?, files, unsynced: false, way: Way::Reflink };
    Ok(Some(Frozen { disk: None, made: Vec::new(), base, before: None }))
}

fn freeze_raw(disk: &DiskFile, fresh: &Path) -> Result<Frozen, OverlayError> {
    let path = absolute(disk.path())?;
    let failed = |source| {
        let path = path.clone();
        OpenError::Host { what: "copy the descriptor of", path, source }
    };
    let before = Arc::new(disk.file().try_clone().map_err(failed)?);
    share(&before, &path)?;
    let frozen = over_raw(disk, &path, fresh);
    match frozen {
        Ok((disk, base)) => {
            Ok(Frozen { disk: Some(disk.into()), made: Vec::new(), base, before: Some(before) })
        }
        Err(err) => {
            let _ = lock(&before, false);
            Err(err)
        }
    }
}

fn over_raw(disk: &DiskFile, path: &Path, fresh: &Path) -> Result<(Overlay, Base), OverlayError> {
    let file = Arc::new(reopened(disk.file(), path)?);
    let under = Under {
        path: path.to_owned(),
        file: Arc::clone(&file),
        header: None,
        size: disk.len(),
        unsynced: true,
    };
    // With flags of its own: whoever the base is handed over to reads it through the page cache.
    let copy = DiskFile::of_shared(reopened(disk.file(), path)?, path, disk.direct())?;
    let block_size = copy.block_size();
    let mut layer = raw_layer(copy, path.to_owned());
    if disk.direct() {
        let failed = |source| OverlayError::File { verb: "open", path: path.to_owned(), source };
        go_direct(&layer.file).map_err(failed)?;
    }
    layer.unsynced = true;
    let owners = owners(disk.len(), path)?;
    let top = made(fresh, &under)?;
    let overlay = Overlay::over(vec![layer], top, fresh, owners, disk.direct(), block_size, &[]);
    if overlay.is_err() {
        let _ = fs::remove_file(fresh);
    }
    let base = Base { path: path.to_owned(), files: vec![file], unsynced: true, way: Way::Overlay };
    Ok((overlay?, base))
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
        let last = &below[below.len() - 1];
        let base = Base {
            path: absolute(&last.path)?,
            files: readers(below.iter())?,
            unsynced: last.unsynced && !overlay.is_base_synced(),
            way: Way::Overlay,
        };
        return Ok(Frozen { disk: None, made: Vec::new(), base, before: None });
    }
    let mut made = Vec::new();
    let merged;
    let top = if overlay.layers.len() < MOST_LAYERS {
        overlay
    } else {
        let mut name = fresh.file_name().unwrap_or_default().to_owned();
        name.push(".base");
        let path = fresh.with_file_name(name);
        merged = absorbed(overlay, &path)?;
        made.push(path);
        &merged
    };
    top.note_bits().map_err(failed)?;
    let before = Arc::clone(&overlay.top_layer().file);
    let path = absolute(&top.path)?;
    let shared = share(&top.top_layer().file, &path).map_err(OverlayError::from);
    let frozen = shared.and_then(|()| over_overlay(top, &path, fresh));
    match frozen {
        Ok((mut disk, base)) => {
            if !made.is_empty() {
                disk.base_synced = AtomicBool::new(false);
            }
            Ok(Frozen { disk: Some(disk.into()), made, base, before: Some(before) })
        }
        Err(err) => {
            made.iter().for_each(|path| drop(fs::remove_file(path)));
            let _ = lock(&before, false);
            Err(err)
        }
    }
}

fn over_overlay(
    overlay: &Overlay,
    path: &Path,
    fresh: &Path,
) -> Result<(Overlay, Base), OverlayError> {
    // Its time, by which it is known, is in the page cache only although its data were flushed.
    let unsynced = true;
    let files = readers(overlay.layers.iter())?;
    let under = Under {
        path: path.to_owned(),
        file: Arc::clone(&overlay.top_layer().file),
        header: Some(overlay.header.clone()),
        size: overlay.len(),
        unsynced,
    };
    let mut layers = overlay.layers.clone();
    for layer in &mut layers {
        layer.unsynced &= !overlay.is_base_synced();
    }
    if let Some(base) = layers.last_mut() {
        // What is above reads it, by flags of its own.
        base.file = Arc::new(reopened(&base.file, path)?);
        if overlay.direct {
            let failed =
                |source| OverlayError::File { verb: "open", path: path.to_owned(), source };
            go_direct(&base.file).map_err(failed)?;
        }
        base.path = path.to_owned();
        base.unsynced = unsynced;
        base.stamp = if overlay.boot.is_some() { overlay.stamp } else { NO_ID };
    }
    let mut vouched = overlay.note(false).synced;
    vouched.sort_unstable();
    let (owners, direct) = (Arc::clone(&overlay.owners), overlay.direct);
    let top = made(fresh, &under)?;
    let disk = Overlay::over(layers, top, fresh, owners, direct, overlay.block_size, &vouched);
    if disk.is_err() {
        let _ = fs::remove_file(fresh);
    }
    let base = Base { path: path.to_owned(), files, unsynced, way: Way::Overlay };
    Ok((disk?, base))
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
        let note = Note::new(vouched).map_err(failed)?;
        note.write(&file).map_err(failed)?;
        if direct {
            go_direct(&file).map_err(failed)?;
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
            bitmap: Bitmap::new(header.bitmap_pages()).map_err(failed)?,
            header,
            spots: Spot::of(&layers),
            layers,
            owners,
            read_only: false,
            direct,
            block_size,
            written: AtomicBool::new(true),
            base_synced: AtomicBool::new(false),
            complained: AtomicBool::new(false),
            boot: note.boot,
            stamp: note.stamp,
            committing: false,
            vouched: vouched.to_vec(),
            folder: Some(Arc::new(folder)),
        })
    }
}

/// How many of the highest files of a chain are to be made one, by how many blocks of each can be seen.
pub(in crate::virtio::blk) fn run_to_absorb(counts: &[u64]) -> usize {
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
        go_direct(&merged.top_layer().file).map_err(failed)?;
    }
    Ok(Overlay { direct: overlay.direct, ..merged })
}

/// `FICLONE` of `linux/fs.h`.
const FICLONE: libc::c_ulong = 0x4004_9409;

/// The file system cannot share data between these files.
fn cannot(err: &io::Error) -> bool {
    let known = [libc::EOPNOTSUPP, libc::EXDEV, libc::EINVAL, libc::ENOTTY, libc::ENOSYS];
    err.raw_os_error().is_some_and(|code| known.contains(&code))
}

/// Makes the file at `path`, where nothing is, share all data of `source`.
fn reflink(source: &File, path: &Path) -> io::Result<()> {
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
