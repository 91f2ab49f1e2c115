//! A qcow2 image as a disk: versions 2 and 3, with what they stand on.
//!
//! [imago](imago) reads and writes the format. Around it is what a monitor needs whose guests and images are hostile:
//!
//! - [`header`]: what an image says of itself, checked before imago sees it;
//! - [`check`]: whether its tables agree, before it is written;
//! - [`file`]: the open and locked file that imago works on, which never opens another;
//! - [`open`]: both, for an image and for what it stands on;
//! - [`make`]: making an image that stands on another;
//! - [`freeze`]: an image that others come to stand on while its machine goes on.
//!
//! Every call may wait for a disk or for another call: they are made on threads for that
//! ([`Action::Call`](crate::virtio::device::Action)). Reads and writes pass each other; what takes clusters away
//! waits until nobody uses any.

mod check;
mod file;
pub(super) mod freeze;
mod header;
mod make;
mod open;

use std::io;
use std::path::Path;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::io_buffers::IoBuffer;
use imago::{FormatAccess, ShallowMapping};
use libc::iovec;

pub use check::Found;
use file::ImageFile;
pub use header::{BackingName, Header, MAGIC};
use open::Layer;
pub use open::{Access, Described, Qcow2Error, describe, looks_like_qcow2};

use super::SECTOR;
use super::request::ByteRange;

/// Most bytes that are copied at a time, in memory of ours.
const COPIED: u64 = 1 << 20;

/// An open, locked image.
#[derive(Debug)]
pub struct Qcow2 {
    /// Whoever reads or writes shares it. Alone is who takes away clusters that others may be about to use.
    image: RwLock<FormatAccess<ImageFile>>,
    file: ImageFile,
    header: Header,
    /// There are clusters that are freed when they are written: compressed ones, and such that may have other users.
    may_free: bool,
    /// What it stands on, the lowest first, with the lengths of the disks of those that are images.
    below: Vec<(ImageFile, Option<u64>)>,
    /// So many images are below that forks put there.
    forked: u32,
    /// It had no cluster of the disk when it was opened.
    was_empty: bool,
}

impl Qcow2 {
    /// Opens the image at `path`, and with [`Access::backing`] what it stands on. All of them are locked as raw disks
    /// are. The refcounts of one that is to be written are mended if they are too low.
    ///
    /// # Errors
    /// [`Qcow2Error`].
    pub fn open(path: &Path, access: Access) -> Result<Qcow2, Qcow2Error> {
        Qcow2::of(Layer::open(path, access)?, access.forked)
    }

    fn of(layer: Layer, forked: u32) -> Result<Qcow2, Qcow2Error> {
        let (file, header) = (layer.file.clone(), layer.header.clone());
        let below = layer.files_below();
        let forked = forked.min(below.len() as u32);
        let (image, found) = layer.start()?;
        let may_free = found.compressed > 0 || found.not_alone > 0;
        let was_empty = found.data == 0 && found.zeroes == 0;
        let image = RwLock::new(image);
        Ok(Qcow2 { image, file, header, may_free, below, forked, was_empty })
    }

    /// Opens an image and closes it again, without a look at its tables: whether a machine could have it. Changes
    /// nothing.
    ///
    /// # Errors
    /// [`Qcow2Error`].
    pub fn try_open(path: &Path, access: Access) -> Result<(), Qcow2Error> {
        Layer::open(path, access).map(drop)
    }

    /// Length of the disk in bytes, a multiple of the sector size.
    pub fn len(&self) -> u64 {
        self.header.size
    }

    /// Never true: a disk has at least one sector.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The lowest of the files that it is made of.
    pub(super) fn lowest(&self) -> &Path {
        self.below.first().map_or(&self.file, |(file, _)| file).disk().path()
    }

    pub(super) fn disk(&self) -> &super::DiskFile {
        self.file.disk()
    }

    /// Reads from `offset` of the disk on. Returns how many bytes, at least one.
    pub(super) fn read(&self, into: &[iovec], offset: u64) -> io::Result<u32> {
        let image = self.shared();
        let total = length(into);
        let mut done = 0;
        while done < total {
            let rest = total - done;
            let (mapping, len) = image.get_shallow_mapping(offset + done, rest)?;
            done += match mapping {
                ShallowMapping::Raw { storage, offset, .. } if storage.align() == 1 => {
                    storage.read_guest(&part(into, done, len), offset)?;
                    len
                }
                ShallowMapping::Zero { .. } => {
                    fill(&part(into, done, len));
                    len
                }
                ShallowMapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {
                    // Compressed, below, or of another alignment than the guest's memory.
                    let len = len.clamp(1, COPIED).min(rest);
                    let mut copy = IoBuffer::new(len as usize, self.file.align())?;
                    image.read(&mut copy, offset + done)?;
                    scatter(copy.as_ref().into_slice(), &part(into, done, len));
                    len
                }
            };
        }
        Ok(done as u32)
    }

    /// Writes from `offset` of the disk on. Returns how many bytes, at least one. With `durable` they are on the disk
    /// then.
    pub(super) fn write(&self, from: &[iovec], offset: u64, durable: bool) -> io::Result<u32> {
        let image = self.shared();
        let frees = self.may_free && frees(&image, offset, length(from))?;
        if frees {
            drop(image);
            let image = self.alone();
            self.put(&image, from, offset)?;
            save(&image)?;
        } else {
            self.put(&image, from, offset)?;
            if durable {
                save(&image)?;
            }
        }
        Ok(length(from) as u32)
    }

    fn put(&self, image: &FormatAccess<ImageFile>, from: &[iovec], offset: u64) -> io::Result<()> {
        let total = length(from);
        let mut done = 0;
        while done < total {
            let (at, rest) = (offset + done, total - done);
            if self.file.align() > 1 {
                let len = rest.min(COPIED);
                let mut copy = IoBuffer::new(len as usize, self.file.align())?;
                gather(&part(from, done, len), copy.as_mut().into_slice());
                image.write(&copy, at)?;
                done += len;
                continue;
            }
            let mapping = image.prepare_data_mapping(at, rest, true)?;
            let len = mapping.length().min(rest);
            mapping.storage().write_guest(&part(from, done, len), mapping.offset())?;
            image.commit_data_mapping(mapping)?;
            done += len;
        }
        Ok(())
    }

    /// Discards or zeroes a range. With `durable` its zeroes are on the disk when this returns.
    pub(super) fn range(&self, range: ByteRange, durable: bool) -> io::Result<u32> {
        let ByteRange { offset, len, zero, unmap } = range;
        let end = offset + len;
        let cluster = self.header.cluster_size();
        // Whole clusters; the last of the disk may be cut short.
        let inner_start = offset.next_multiple_of(cluster).min(end);
        let inner_end = if end == self.len() { end } else { end - end % cluster }.max(inner_start);
        let inner = inner_end - inner_start;
        // Version 2 knows no clusters that are zeroes; those that are not there are what is below.
        let has_zeroes = self.header.version >= 3;
        let freed = inner > 0 && unmap && (has_zeroes || self.header.backing.is_none());
        if freed {
            self.free(inner_start, inner)?;
        }
        if !zero {
            return Ok(0);
        }
        let zero = |image: &FormatAccess<ImageFile>| {
            if !freed && !has_zeroes {
                return write_zeroes(image, offset, len);
            }
            if !freed && inner > 0 {
                image.write_zeroes(inner_start, inner)?;
            }
            write_zeroes(image, offset, inner_start - offset)?;
            write_zeroes(image, inner_end, end - inner_end)
        };
        if self.may_free {
            let image = self.alone();
            zero(&image)?;
            save(&image)?;
        } else {
            let image = self.shared();
            zero(&image)?;
            if durable {
                save(&image)?;
            }
        }
        Ok(0)
    }

    /// Makes whole clusters read as zeroes, and gives their space back.
    fn free(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut image = self.alone();
        let mut holes = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let (mapping, len) = image.get_shallow_mapping(at, offset + len - at)?;
            // What is not writable has other users.
            if let ShallowMapping::Raw { offset, writable: true, .. } = mapping {
                holes.push((offset, len));
            }
            if len == 0 {
                break;
            }
            at += len;
        }
        match self.header.version {
            2 => image.discard_to_backing(offset, len)?,
            _ => image.discard_to_zero(offset, len)?,
        }
        save(&image)?;
        for (offset, len) in holes {
            // The last cluster of the disk may be cut short, in the file it is whole.
            self.file.punch(offset, len.next_multiple_of(self.header.cluster_size()));
        }
        Ok(())
    }

    /// Makes everything that was written durable.
    pub(super) fn save(&self) -> io::Result<()> {
        save(&self.shared())
    }

    /// The disk is not used for now: makes all durable, and takes the mark away that it is being written. Whoever opens
    /// or copies the file then has a whole image. The next write puts the mark back.
    pub(super) fn close(&self) -> io::Result<()> {
        let image = self.alone();
        image.flush()?;
        self.file.set_clean()
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.image.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImageFile>> {
        self.image.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if let Err(err) = self.close() {
            tracing::error!(path = %self.disk().path().display(), %err, "the last writes to a qcow2 image are not on it");
        }
    }
}

fn save(image: &FormatAccess<ImageFile>) -> io::Result<()> {
    image.flush()?;
    image.sync()
}

/// True if a write to this range may free clusters.
///
/// imago 0.2.6 hands such a cluster out anew for a table before its old place in the tables is changed in the file:
/// after a kill the old entry would lead into the new table. So whoever frees clusters is alone until all of it is on
/// the disk.
fn frees(image: &FormatAccess<ImageFile>, offset: u64, len: u64) -> io::Result<bool> {
    let mut done = 0;
    while done < len {
        let (mapping, mapped) = image.get_shallow_mapping(offset + done, len - done)?;
        match mapping {
            ShallowMapping::Raw { writable: true, .. }
            | ShallowMapping::Zero { explicit: false, .. }
            | ShallowMapping::Indirect { .. } => done += mapped.max(1),
            _ => return Ok(true),
        }
    }
    Ok(false)
}

/// Writes zeroes as data, where there are none.
fn write_zeroes(image: &FormatAccess<ImageFile>, offset: u64, len: u64) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let at = offset + done;
        let (mapping, mapped) = image.get_shallow_mapping(at, len - done)?;
        let step = if matches!(mapping, ShallowMapping::Zero { .. }) {
            mapped.max(1)
        } else {
            let zeroes = &super::pending::ZEROES;
            let step = mapped.clamp(1, zeroes.len() as u64).min(len - done);
            image.write(&zeroes[..step as usize], at)?;
            step
        };
        done += step;
    }
    Ok(())
}

/// Bytes of a list of buffers.
fn length(list: &[iovec]) -> u64 {
    list.iter().map(|iov| iov.iov_len as u64).sum()
}

/// `len` bytes of a list behind its first `skip`.
fn part(list: &[iovec], skip: u64, len: u64) -> Vec<iovec> {
    let (mut skip, mut len) = (skip as usize, len as usize);
    let mut parts = Vec::with_capacity(list.len());
    for iov in list {
        if skip >= iov.iov_len {
            skip -= iov.iov_len;
            continue;
        }
        let iov_len = (iov.iov_len - skip).min(len);
        if iov_len == 0 {
            break;
        }
        // SAFETY: skip is below the length of the buffer.
        let iov_base = unsafe { iov.iov_base.cast::<u8>().add(skip) }.cast();
        parts.push(iovec { iov_base, iov_len });
        len -= iov_len;
        skip = 0;
    }
    parts
}

/// Makes all bytes of the buffers 0.
fn fill(list: &[iovec]) {
    for iov in list {
        // SAFETY: a buffer in guest RAM, mapped while its request runs; the guest may do with it what it likes.
        unsafe { std::ptr::write_bytes(iov.iov_base.cast::<u8>(), 0, iov.iov_len) };
    }
}

/// Copies bytes into buffers that have as many.
fn scatter(mut from: &[u8], into: &[iovec]) {
    for iov in into {
        let (now, rest) = from.split_at(iov.iov_len.min(from.len()));
        // SAFETY: as above; memory of ours never overlaps guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), iov.iov_base.cast(), now.len()) };
        from = rest;
    }
}

/// Copies buffers into memory of the same length.
fn gather(from: &[iovec], mut into: &mut [u8]) {
    for iov in from {
        let (now, rest) = into.split_at_mut(iov.iov_len.min(into.len()));
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(iov.iov_base.cast(), now.as_mut_ptr(), now.len());
        }
        into = rest;
    }
}

#[cfg(test)]
pub(super) mod tests;
