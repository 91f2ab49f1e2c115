//! Making one file of several: an overlay folded into its base, or all of a chain as a raw disk.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::format::{BLOCK, NOTE_START};
use super::make::{aside, settle};
use super::open::{Access, folder_of, modified_ns};
use super::{Overlay, OverlayError, sync};
use crate::virtio::blk::{Backing, DiskFile};

/// Is told how many bytes are done, and of how many.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Most bytes that are copied at a time.
const CHUNK: u64 = 1 << 20;

/// Calls `each` with the offset and length of what `wanted` says of the disk, in pieces of at most [`CHUNK`].
fn pieces<E>(
    disk: &Overlay,
    wanted: impl Fn(u64) -> bool,
    mut each: impl FnMut(u64, u64) -> Result<(), E>,
) -> Result<(), E> {
    let blocks = disk.header.blocks();
    let mut block = 0;
    while block < blocks {
        if !wanted(block) {
            block += 1;
            continue;
        }
        let most = (block + CHUNK / BLOCK).min(blocks);
        let end = (block..most).find(|block| !wanted(*block)).unwrap_or(most);
        let start = block * BLOCK;
        each(start, (end * BLOCK).min(disk.len()) - start)?;
        block = end;
    }
    Ok(())
}

impl Overlay {
    /// Fills `bytes` from `offset` of the disk on.
    pub(in crate::virtio::blk) fn read_at(
        &self,
        mut bytes: &mut [u8],
        mut offset: u64,
    ) -> Result<(), OverlayError> {
        while !bytes.is_empty() {
            let place = self.place(offset, bytes.len() as u64);
            let layer = &self.layers[usize::from(self.owners.get(offset / BLOCK))];
            let failed =
                |source| OverlayError::File { verb: "read", path: layer.path.clone(), source };
            let (now, later) = bytes.split_at_mut(place.len as usize);
            layer.file.read_exact_at(now, place.offset).map_err(failed)?;
            offset += place.len;
            bytes = later;
        }
        Ok(())
    }
}

/// Where a copy goes.
trait Target {
    fn put(&self, bytes: &[u8], offset: u64) -> std::io::Result<()>;
    fn zero(&self, offset: u64, len: u64) -> std::io::Result<()>;
    fn path(&self) -> &Path;
}

impl Target for Overlay {
    fn put(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.top_layer().file.write_all_at(bytes, self.in_top(offset))?;
        self.wrote();
        self.own(offset / BLOCK..(offset + bytes.len() as u64).div_ceil(BLOCK));
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> std::io::Result<()> {
        zero(&self.top_layer().file, self.in_top(offset), len)?;
        self.wrote();
        self.own(offset / BLOCK..(offset + len).div_ceil(BLOCK));
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Target for DiskFile {
    fn put(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.file().write_all_at(bytes, offset)
    }

    fn zero(&self, offset: u64, len: u64) -> std::io::Result<()> {
        zero(self.file(), offset, len)
    }

    fn path(&self) -> &Path {
        DiskFile::path(self)
    }
}

fn zero(file: &File, offset: u64, len: u64) -> std::io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (start, bytes) = (offset as libc::off_t, len as libc::off_t);
    // SAFETY: no memory is involved.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, start, bytes) } == 0 {
        return Ok(());
    }
    file.write_all_at(&vec![0; len as usize], offset)
}

/// Copies what `wanted` says of a disk.
fn copy_to(
    from: &Overlay,
    to: &dyn Target,
    wanted: impl Fn(u64) -> bool + Copy,
    progress: Progress<'_>,
) -> Result<(), OverlayError> {
    let mut total = 0;
    pieces::<OverlayError>(from, wanted, |_, len| {
        total += len;
        Ok(())
    })?;
    let failed = |source| OverlayError::File { verb: "write", path: to.path().to_owned(), source };
    let mut bytes = vec![0; CHUNK as usize];
    let mut done = 0;
    pieces(from, wanted, |offset, len| {
        let bytes = &mut bytes[..len as usize];
        from.read_at(bytes, offset)?;
        match bytes.iter().all(|byte| *byte == 0) {
            true => to.zero(offset, len).map_err(failed)?,
            false => to.put(bytes, offset).map_err(failed)?,
        }
        done += len;
        progress(done, total);
        Ok(())
    })
}

/// Copies what `wanted` says of a disk into the top of another.
pub(super) fn copy(
    from: &Overlay,
    to: &Overlay,
    wanted: impl Fn(u64) -> bool + Copy,
    progress: Progress<'_>,
) -> Result<(), OverlayError> {
    copy_to(from, to, wanted, progress)
}

fn whole(path: &Path, read_only: bool) -> Result<Overlay, OverlayError> {
    let access = Access { read_only, lock: true, ..Access::default() };
    Overlay::open_as(path, access, &mut None)
}

fn sync_folder(path: &Path) -> Result<(), OverlayError> {
    let synced = File::open(folder_of(path)).and_then(|folder| folder.sync_all());
    synced.map_err(|source| OverlayError::File {
        verb: "sync the folder of",
        path: path.to_owned(),
        source,
    })
}

/// Writes all of the disk at `overlay` as a raw file to `output`, where nothing is yet. It is there as a whole, and
/// on the disk, or not at all.
///
/// # Errors
/// [`OverlayError`]; a machine uses the overlay.
pub fn flatten(overlay: &Path, output: &Path, progress: Progress<'_>) -> Result<(), OverlayError> {
    let from = whole(overlay, true)?;
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::AlreadyExists => OverlayError::Exists(output.to_owned()),
        _ => OverlayError::File { verb: "write", path: output.to_owned(), source },
    };
    if fs::symlink_metadata(output).is_ok() {
        return Err(OverlayError::Exists(output.to_owned()));
    }
    let aside = aside(output).map_err(failed)?;
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&aside);
    let file = file.map_err(failed)?;
    let written = (|| {
        file.set_len(from.len()).map_err(failed)?;
        let target = DiskFile::of(file, &aside, false, false)?;
        copy_to(&from, &target, |_| true, progress)?;
        target.file().sync_all().map_err(failed)?;
        settle(&aside, output).map_err(failed)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written.and_then(|()| sync_folder(output))
}

/// Folds the overlay at `path` into its base, which is then the disk; the overlay is removed. Other overlays of
/// the base are of no use afterwards.
///
/// If this ends early, the overlay is as good as before, and folding can be started over: what the base has by then
/// is hidden below it.
///
/// # Errors
/// [`OverlayError`]; a machine uses the overlay or its base.
pub fn commit(path: &Path, progress: Progress<'_>) -> Result<(), OverlayError> {
    let from = whole(path, false)?;
    let failed = |source| OverlayError::File { verb: "write", path: path.to_owned(), source };
    let base = from.layers[from.layers.len() - 2].clone();
    // The base is to be written: the lock for reading goes, and nobody else may have one.
    unlock(&base.file);
    let into: Backing = match &base.header {
        Some(_) => whole(&base.path, false)?.into(),
        None => DiskFile::open(&base.path, false, false)?.into(),
    };
    let written = || {
        let now = base.file.metadata().map(|metadata| modified_ns(&metadata));
        let then = from.header.base.modified_ns;
        then != 0 && !from.committing && now.ok() != Some(then)
    };
    if into.len() != from.len() || written() {
        let reason = "it changed while it was opened".to_owned();
        return Err(OverlayError::Unfit { path: base.path, reason });
    }
    from.save().map_err(failed)?;
    // From here on the base may be newer than the overlay knows it.
    let file = &from.top_layer().file;
    file.write_all_at(&from.note(true).to_page()[..], NOTE_START)
        .and_then(|()| sync::sync(file.as_raw_fd()))
        .map_err(failed)?;
    let top = from.top();
    let wanted = |block| from.owners.get(block) == top;
    let base_failed =
        |source| OverlayError::File { verb: "write", path: base.path.clone(), source };
    match &into {
        Backing::Raw(disk) => {
            copy_to(&from, disk, wanted, progress)?;
            sync::sync(disk.file().as_raw_fd()).map_err(base_failed)?;
        }
        Backing::Overlay(overlay) => {
            copy_to(&from, &**overlay, wanted, progress)?;
            overlay.save().map_err(base_failed)?;
        }
        Backing::Qcow2(_) => {
            // Not reached: it was opened as one of the others.
            let reason = "it is a qcow2 image".to_owned();
            return Err(OverlayError::Unfit { path: base.path, reason });
        }
    }
    fs::remove_file(path).map_err(|source| OverlayError::File {
        verb: "remove",
        path: path.to_owned(),
        source,
    })?;
    sync_folder(path)
}

fn unlock(file: &File) {
    // SAFETY: flock is plain data; all of the file is meant by start and length 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_UNLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: one valid flock. A lock that stays is found by the next one.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
}
