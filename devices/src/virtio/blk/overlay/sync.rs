//! Which blocks an overlay has is in its file twice.
//!
//! - The **bitmap** holds after a power cut: a bit is set only once the block's data is on the disk. A flush does
//!   that: sync the data, write the bits, sync them.
//! - The **second bitmap** is written without a sync, behind the data and before a write is answered. It holds for as
//!   long as the host is not started anew, as the page cache does, and later if somebody noted that all of the file
//!   was synced. So a machine that is paused, saved or forked does not wait for the disk, and one that is killed has
//!   lost nothing that it said was written. The note that says in which start of the host it holds is written when the
//!   file is opened, while that bitmap is empty.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use super::bitmap::{Aligned, UNNOTED, UNSAVED};
use super::format::{BITMAP_START, NO_ID, NOTE_START};
use super::open::{boot_id, random};
use super::{Id, Note, Overlay, PAGE};

/// Bits at one moment, on their way to the disk.
#[derive(Default)]
pub(in crate::virtio::blk) struct Bits {
    pages: Vec<(u64, Box<Aligned>)>,
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pages of bits", self.pages.len())
    }
}

impl Bits {
    /// What is to be written where, one page after the other.
    pub(in crate::virtio::blk) fn last(&self) -> Option<(u64, &[u8])> {
        self.pages.last().map(|(offset, page)| (*offset, &page.0[..]))
    }

    /// The last page was written.
    pub(in crate::virtio::blk) fn done(&mut self) {
        self.pages.pop();
    }

    pub(in crate::virtio::blk) fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }
}

impl Note {
    /// That the second bitmap holds from now on, under a name of its own, and of what below all is on the disk.
    pub(super) fn new(synced: &[Id]) -> io::Result<Note> {
        Ok(Note { boot: boot_id(), stamp: random()?, synced: synced.to_vec(), committing: false })
    }

    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        file.write_all_at(&aligned(&self.to_page()[..]).0, NOTE_START)
    }
}

impl Overlay {
    /// True if a flush has only to sync the top.
    #[cfg(test)]
    pub(in crate::virtio::blk) fn is_saved(&self) -> bool {
        self.is_base_synced() && !self.bitmap.has(UNSAVED)
    }

    /// True if all below is on the disk.
    pub(in crate::virtio::blk) fn is_base_synced(&self) -> bool {
        self.base_synced.load(Ordering::Relaxed)
    }

    /// What has to be synced before anything that this disk flushes counts: files below that may be in the page
    /// cache only, and the folder that the top was made in.
    pub(in crate::virtio::blk) fn unsynced_below(&self) -> Vec<RawFd> {
        if self.is_base_synced() {
            return Vec::new();
        }
        self.layers
            .iter()
            .filter(|layer| layer.unsynced)
            .map(|layer| &layer.file)
            .chain(&self.folder)
            .map(|file| file.as_raw_fd())
            .collect()
    }

    /// The files of [`Overlay::unsynced_below`] were synced: the page that says so is to be written.
    pub(in crate::virtio::blk) fn base_is_synced(&self) -> Bits {
        self.base_synced.store(true, Ordering::Relaxed);
        if self.layers.iter().all(|layer| layer.stamp == NO_ID) {
            return Bits::default();
        }
        Bits { pages: vec![(NOTE_START, aligned(&self.note(false).to_page()[..]))] }
    }

    /// The bits that are not on the disk, as they are now; the data that they tell of has to be synced before
    /// they are written.
    pub(in crate::virtio::blk) fn unsaved(&self) -> Bits {
        let at = |page: usize| BITMAP_START + (page * PAGE) as u64;
        let pages = self.bitmap.take(UNSAVED).map(|(page, bits)| (at(page), bits));
        Bits { pages: pages.collect() }
    }

    /// Bits that were taken could not be written, or the data could not be synced.
    pub(in crate::virtio::blk) fn not_saved(&self) {
        self.written.store(true, Ordering::Relaxed);
        let unsynced = self.folder.is_some() || self.layers.iter().any(|layer| layer.unsynced);
        self.base_synced.fetch_and(!unsynced, Ordering::Relaxed);
        // Which were taken is not kept: each page with bits counts as one.
        self.bitmap.mark_all(UNSAVED);
    }

    pub(super) fn note(&self, committing: bool) -> Note {
        let committing = committing || self.committing;
        let synced = if self.is_base_synced() {
            let stamps = self.layers.iter().rev().skip(1).map(|layer| layer.stamp);
            stamps.filter(|stamp| *stamp != NO_ID).collect()
        } else {
            self.vouched.clone()
        };
        Note { boot: self.boot, stamp: self.stamp, synced, committing }
    }

    /// True if somebody who is killed now would lose what was written to blocks that were not in the overlay. Without
    /// a name for this start of the host nothing can be done about it.
    pub(in crate::virtio::blk) fn has_unnoted(&self) -> bool {
        self.boot.is_some() && self.bitmap.has_unnoted()
    }

    /// What has to be written to the second bitmap: the data that it tells of are in the page cache.
    pub(in crate::virtio::blk) fn unnoted(&self) -> Bits {
        let at = |page: usize| self.header.noted_start() + (page * PAGE) as u64;
        let pages = self.bitmap.take(UNNOTED).map(|(page, bits)| (at(page), bits));
        Bits { pages: pages.collect() }
    }

    /// What [`Overlay::unnoted`] gave could not be written.
    pub(in crate::virtio::blk) fn not_noted(&self, err: &io::Error) {
        self.bitmap.mark_all(UNNOTED);
        if !self.complained.swap(true, Ordering::Relaxed) {
            let path = self.path.display();
            tracing::warn!(%path, %err, "what is not flushed may be lost if this process is killed");
        }
    }

    /// Writes what is not there into the second bitmap. Waits for no disk, unless writes go past the page cache.
    ///
    /// # Errors
    /// A write failed.
    pub fn note_bits(&self) -> io::Result<()> {
        if self.read_only || !self.bitmap.has(UNNOTED) {
            return Ok(());
        }
        if self.boot.is_none() {
            // Whether the second bitmap holds could not be seen later.
            return self.save();
        }
        let written = self.write(&mut self.unnoted());
        if let Err(err) = &written {
            self.not_noted(err);
        }
        written
    }

    fn write(&self, bits: &mut Bits) -> io::Result<()> {
        while let Some((offset, page)) = bits.last() {
            self.top_layer().file.write_all_at(page, offset)?;
            bits.done();
        }
        Ok(())
    }

    /// Makes everything that was written durable, and waits for it.
    ///
    /// # Errors
    /// A write or sync failed; what is not on the disk is still known then.
    pub fn save(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let saved = self.try_save();
        if saved.is_err() {
            self.not_saved();
        }
        saved
    }

    fn try_save(&self) -> io::Result<()> {
        let file = &self.top_layer().file;
        let mut below = Bits::default();
        if !self.is_base_synced() {
            for fd in self.unsynced_below() {
                sync_all(fd)?;
            }
            below = self.base_is_synced();
        }
        let mut bits = self.unsaved();
        if self.written.swap(false, Ordering::Relaxed) || !bits.is_empty() {
            sync(file.as_raw_fd())?;
        }
        if bits.is_empty() && below.is_empty() {
            return Ok(());
        }
        self.write(&mut bits)?;
        self.write(&mut below)?;
        sync(file.as_raw_fd())
    }

    /// As [`Overlay::save`], at the end of a machine: what the guest wrote last it wrote before.
    ///
    /// # Errors
    /// As of [`Overlay::save`].
    pub fn close(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let file = &self.top_layer().file;
        let before = modified(file);
        self.save()?;
        // A snapshot knows its disks by the time of their last write, and bits are none.
        before.map_or(Ok(()), |before| set_modified(file, before))
    }
}

fn aligned(bytes: &[u8]) -> Box<Aligned> {
    let mut page = Box::new(Aligned([0; PAGE]));
    let len = bytes.len().min(PAGE);
    page.0[..len].copy_from_slice(&bytes[..len]);
    page
}

pub(super) fn sync(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::fdatasync(fd) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// With times of files, by which an overlay knows its base, and names in folders.
fn sync_all(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is involved.
    match unsafe { libc::fsync(fd) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

pub(super) fn modified(file: &File) -> Option<libc::timespec> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata().ok()?;
    Some(libc::timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() })
}

pub(super) fn set_modified(file: &File, time: libc::timespec) -> io::Result<()> {
    let omit = libc::timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
    // SAFETY: two valid times.
    match unsafe { libc::futimens(file.as_raw_fd(), [omit, time].as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
