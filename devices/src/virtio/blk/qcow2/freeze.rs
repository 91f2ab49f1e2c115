//! An image that becomes the backing file of others while its machine goes on: an external snapshot, as QEMU calls it.
//!
//! ```text
//!   before   machine ──> image ──> …        after   machine ──> fresh ──┐
//!                                                   child   ──> fresh ──┴─> what was the image ──> …
//! ```
//!
//! Each fresh image names what it stands on, with its format: any program that reads the format reads the disk.
//! A machine that halts closes its images, so that all of them are on the disk before anybody stands on them, and a
//! flush of whoever does waits for its own file alone. When forks have put [`MOST_LAYERS`] images one over the other,
//! the highest become one, as overlays do.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::io_buffers::IoBuffer;
use imago::{FormatAccess, ShallowMapping};

use super::file::ImageFile;
use super::make::make;
use super::open::{Layer, read_header};
use super::{COPIED, Qcow2};
use crate::virtio::blk::file::{go_direct, lock, reopened, share};
use crate::virtio::blk::overlay::{
    Base, Frozen, MOST_LAYERS, OverlayError, Way, absolute, folder_of, run_to_absorb,
};
use crate::virtio::blk::{DiskFile, OpenError};

/// Makes a fresh image at `path` over `base`, the highest of whose files is an image.
pub(in crate::virtio::blk) fn over(
    base: &Base,
    path: &Path,
    direct: bool,
) -> Result<Qcow2, OverlayError> {
    let Way::Image { forked } = base.way else { return Err(base.unfit("it is no image")) };
    let Some(file) = base.files.last() else { return Err(base.unfit("it has no file")) };
    let image = DiskFile::of_image(reopened(file, &base.path)?, &base.path, true, false)?;
    let size = read_header(&ImageFile::new(image), &base.path)?.size;
    let failed = |source| OverlayError::File { verb: "open", path: path.to_owned(), source };
    let folder = File::open(folder_of(path)).map_err(failed)?;
    let file = make(path, &base.path, size)?;
    let opened = (|| {
        if direct {
            go_direct(&file).map_err(failed)?;
        }
        let top = DiskFile::of_image(file, path, false, direct)?;
        Ok(Qcow2::of(Layer::over(top, base.files.clone(), forked)?, forked)?)
    })();
    match &opened {
        Ok(image) => image.file.new_in(folder),
        Err(_) => drop(fs::remove_file(path)),
    }
    opened
}

/// Turns `image`, of which no queue runs, into a base that others share, and makes a fresh one over it at `fresh` for
/// the machine itself. One that has nothing of its own is left as it is: others stand on what it stands on.
pub(in crate::virtio::blk) fn freeze(image: &Qcow2, fresh: &Path) -> Result<Frozen, OverlayError> {
    let path = image.disk().path();
    let failed = |source| OverlayError::File { verb: "write", path: path.to_owned(), source };
    // What others read is in the file.
    image.close().map_err(failed)?;
    if let Some((below, Some(size))) = image.below.last()
        && *size == image.len()
        && image.has_nothing()
    {
        let path = absolute(below.disk().path())?;
        let files = readers(image.below.iter().map(|(file, _)| file))?;
        let base = Base::of_images(path, files, image.forked.max(1));
        return Ok(Frozen { disk: None, made: Vec::new(), base, before: None });
    }
    // It may have been on its way to the disk when it was opened, and version 2 has no mark that it is synced for.
    image.file.sync_data().map_err(failed)?;
    let before = Arc::new(image.disk().file().try_clone().map_err(failed)?);
    let mut made = Vec::new();
    let frozen = (|| {
        let merged;
        let top = if (image.forked as usize) + 1 < MOST_LAYERS {
            image
        } else {
            let mut name = fresh.file_name().unwrap_or_default().to_owned();
            name.push(".base");
            let path = fresh.with_file_name(name);
            merged = absorbed(image, &path)?;
            made.push(path);
            &merged
        };
        let path = absolute(top.disk().path())?;
        share(top.disk().file(), &path)?;
        let files = readers(top.below.iter().map(|(file, _)| file).chain([&top.file]))?;
        let base = Base::of_images(path, files, top.forked + 1);
        let disk = over(&base, fresh, image.disk().direct())?;
        Ok((disk, base))
    })();
    match frozen {
        Ok((disk, base)) => {
            Ok(Frozen { disk: Some(disk.into()), made, base, before: Some(before) })
        }
        Err(err) => {
            made.iter().for_each(|path| drop(fs::remove_file(path)));
            let _ = lock(&before, false);
            Err(err)
        }
    }
}

/// What others stand on of an image that nobody writes, and which was opened for reading only.
pub(in crate::virtio::blk) fn base_of(image: &Qcow2) -> Result<Base, OverlayError> {
    let path = absolute(image.disk().path())?;
    let failed = |source| OverlayError::File { verb: "sync", path: path.clone(), source };
    // Whoever wrote it may not have.
    image.file.sync_data().map_err(failed)?;
    let files = readers(image.below.iter().map(|(file, _)| file).chain([&image.file]))?;
    Ok(Base::of_images(path, files, image.forked + 1))
}

/// The files of these for whoever else, who cannot write them.
fn readers<'a>(files: impl Iterator<Item = &'a ImageFile>) -> Result<Vec<Arc<File>>, OpenError> {
    files.map(|file| reopened(file.disk().file(), file.disk().path()).map(Arc::new)).collect()
}

/// The highest of the images that forks have put one over the other in one at `path`, over the rest: as many as of a
/// chain of overlays.
fn absorbed(image: &Qcow2, path: &Path) -> Result<Qcow2, OverlayError> {
    let all: Vec<_> = image.below.iter().map(|(file, _)| file).chain([&image.file]).collect();
    // Those that forks have put there, and the one that they stand on.
    let forked = &all[image.below.len().saturating_sub(image.forked as usize)..];
    let counts: Vec<u64> = forked.iter().map(|file| file.len()).collect();
    let taken = run_to_absorb(&counts);
    let kept = &all[..all.len() - taken];
    let Some(under) = kept.last() else { return Err(OverlayError::Deep(path.to_owned())) };
    let left = (forked.len() - taken) as u32;
    let files = readers(kept.iter().copied())?;
    let base = Base::of_images(absolute(under.disk().path())?, files, left);
    let merged = over(&base, path, false)?;
    let copied = copy(image, &merged, taken).and_then(|()| merged.close());
    let copied = copied.and_then(|()| merged.file.sync_data());
    copied.map_err(|source| {
        let _ = fs::remove_file(path);
        OverlayError::File { verb: "write", path: path.to_owned(), source }
    })?;
    Ok(merged)
}

/// Copies what the highest `depth` files of `image` have, which nobody writes.
fn copy(image: &Qcow2, merged: &Qcow2, depth: usize) -> io::Result<()> {
    let (from, to) = (image.shared(), merged.shared());
    let align = image.file.align();
    let mut at = 0;
    while at < image.len() {
        let (content, len) = content(&from, depth, at, image.len() - at)?;
        let len = len.max(1);
        match content {
            Content::Below => at += len,
            Content::Zeroes => {
                to.write_zeroes(at, len)?;
                at += len;
            }
            Content::Data => {
                let len = len.min(COPIED);
                let mut bytes = IoBuffer::new(len as usize, align)?;
                from.read(&mut bytes, at)?;
                to.write(&bytes, at)?;
                at += len;
            }
        }
    }
    Ok(())
}

/// What the highest files of a chain have of a range.
enum Content {
    Data,
    Zeroes,
    Below,
}

/// What the highest `depth` files have from `offset` on, and of how many bytes that is so, at most `len`.
fn content(
    image: &FormatAccess<ImageFile>,
    depth: usize,
    offset: u64,
    len: u64,
) -> io::Result<(Content, u64)> {
    let (mapping, run) = image.get_shallow_mapping(offset, len)?;
    match mapping {
        ShallowMapping::Indirect { layer, offset, .. } if depth > 1 => {
            content(layer, depth - 1, offset, run)
        }
        ShallowMapping::Indirect { .. } => Ok((Content::Below, run)),
        ShallowMapping::Zero { .. } => Ok((Content::Zeroes, run)),
        ShallowMapping::Eof { .. } => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok((Content::Data, run)),
    }
}

impl Base {
    fn of_images(path: PathBuf, files: Vec<Arc<File>>, forked: u32) -> Base {
        Base { path, files, unsynced: false, way: Way::Image { forked } }
    }
}

impl Qcow2 {
    /// It has no cluster of the disk.
    fn has_nothing(&self) -> bool {
        self.was_empty && !self.file.was_written()
    }
}
