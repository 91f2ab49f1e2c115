//! The file of an image as imago sees it: open, locked, of a bounded length, and reached by few system calls.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use libc::iovec;

use super::header::INCOMPATIBLE;
use crate::virtio::blk::DiskFile;
use crate::virtio::blk::worker::transfer;

/// The byte of the header with the dirty bit, and the bit (docs/interop/qcow2, "incompatible_features").
const DIRTY_BYTE: usize = INCOMPATIBLE + 7;
const DIRTY: u8 = 1;

/// A pointer in a table: written when what it leads to is in the file already.
const POINTER_LEN: usize = 8;

/// A file of an image. Copies are the same file.
#[derive(Clone)]
pub(super) struct ImageFile(Arc<Inner>);

struct Inner {
    disk: DiskFile,
    /// Alignment of what is read and written in bytes; above 1 with O_DIRECT.
    align: usize,
    len: AtomicU64,
    /// Nothing is written from here on.
    limit: AtomicU64,
    /// The header has a dirty bit, which imago is not to see: what it tells of was looked after.
    has_dirty_bit: AtomicBool,
    /// The dirty bit is set, by us.
    dirty: Mutex<bool>,
    /// Something was written.
    written: AtomicBool,
    /// The folder that the file was just made in: its name is not on the disk.
    folder: Mutex<Option<File>>,
    helper: CommonStorageHelper,
}

impl ImageFile {
    pub(super) fn new(disk: DiskFile) -> ImageFile {
        let align = if disk.direct() { disk.block_size() as usize } else { 1 };
        let len = disk.len();
        ImageFile(Arc::new(Inner {
            disk,
            align,
            len: AtomicU64::new(len),
            limit: AtomicU64::new(len),
            has_dirty_bit: AtomicBool::new(false),
            dirty: Mutex::new(false),
            written: AtomicBool::new(false),
            folder: Mutex::new(None),
            helper: CommonStorageHelper::default(),
        }))
    }

    pub(super) fn disk(&self) -> &DiskFile {
        &self.0.disk
    }

    /// Bytes that the file has now.
    pub(super) fn len(&self) -> u64 {
        self.0.len.load(Ordering::Relaxed)
    }

    pub(super) fn align(&self) -> usize {
        self.0.align
    }

    /// Lets the file grow up to this length.
    pub(super) fn set_limit(&self, limit: u64) {
        self.0.limit.store(limit, Ordering::Relaxed);
    }

    /// Nothing of the file is, or gets, behind this offset.
    pub(super) fn limit(&self) -> u64 {
        self.0.limit.load(Ordering::Relaxed)
    }

    /// The header has a dirty bit: it is set while the file is written, and not shown to others here.
    pub(super) fn has_dirty_bit(&self) {
        self.0.has_dirty_bit.store(true, Ordering::Relaxed);
    }

    /// Somebody else set the dirty bit and left it: it goes when the file is closed.
    pub(super) fn was_left_dirty(&self) {
        *self.dirty() = true;
    }

    /// Something was written here since it was opened.
    pub(super) fn was_written(&self) -> bool {
        self.0.written.load(Ordering::Relaxed)
    }

    /// The file was just made in `folder`, which is synced before anything that is written counts.
    pub(super) fn new_in(&self, folder: File) {
        *self.folder() = Some(folder);
    }

    /// It has a name that may not be on the disk.
    pub(super) fn is_new(&self) -> bool {
        self.folder().is_some()
    }

    fn folder(&self) -> MutexGuard<'_, Option<File>> {
        self.0.folder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` bytes from `offset` on; zeroes behind the end.
    pub(super) fn bytes(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read(&mut bytes[..], offset)?;
        Ok(bytes)
    }

    /// Reads into guest memory; what is behind the end of the file is zeroes. Not for O_DIRECT.
    pub(super) fn read_guest(&self, into: &[iovec], offset: u64) -> io::Result<()> {
        let total = super::length(into);
        let mut done = 0;
        while done < total {
            let rest = super::part(into, done, total - done);
            match transfer(libc::preadv2, self.0.disk.fd(), &rest, offset + done, 0) {
                Ok(0) => {
                    super::fill(&rest);
                    return Ok(());
                }
                Ok(read) => done += read,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        Ok(())
    }

    /// Writes guest memory. Not for O_DIRECT.
    pub(super) fn write_guest(&self, from: &[iovec], offset: u64) -> io::Result<()> {
        let total = super::length(from);
        self.before_write(offset, total)?;
        let mut done = 0;
        while done < total {
            let rest = super::part(from, done, total - done);
            match transfer(libc::pwritev2, self.0.disk.fd(), &rest, offset + done, 0) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        self.0.len.fetch_max(offset + total, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the space of these bytes back, if the file system can do that.
    pub(super) fn punch(&self, offset: u64, len: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (Ok(offset), Ok(len)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len))
        else {
            return;
        };
        // SAFETY: no memory is involved. What fails leaves bytes that nobody reads.
        unsafe { libc::fallocate(self.0.disk.fd(), mode, offset, len) };
    }

    /// Waits until what was written is on the disk, and the name of a new file.
    pub(super) fn sync_data(&self) -> io::Result<()> {
        // SAFETY: no memory is involved.
        if unsafe { libc::fdatasync(self.0.disk.fd()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Whoever comes second waits for it as well.
        let mut folder = self.folder();
        if let Some(new_in) = &*folder {
            new_in.sync_all()?;
            *folder = None;
        }
        Ok(())
    }

    /// All that was written is in the file: takes the dirty bit away, if it was set here.
    pub(super) fn set_clean(&self) -> io::Result<()> {
        let mut dirty = self.dirty();
        if *dirty {
            self.sync_data()?;
            self.write_dirty_bit(false)?;
            self.sync_data()?;
            *dirty = false;
        } else if self.is_new() {
            // A snapshot of a machine that wrote nothing names it as well.
            self.sync_data()?;
        }
        Ok(())
    }

    fn dirty(&self) -> MutexGuard<'_, bool> {
        self.0.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that a write stays below the limit, and marks the image before the first: a program that opens it
    /// after we were killed has to look at its refcounts.
    fn before_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.limit()) {
            return Err(io::Error::other("an image would grow beyond what its disk can need"));
        }
        self.0.written.store(true, Ordering::Relaxed);
        if self.0.has_dirty_bit.load(Ordering::Relaxed) {
            let mut dirty = self.dirty();
            if !*dirty {
                self.write_dirty_bit(true)?;
                self.sync_data()?;
                *dirty = true;
            }
        }
        Ok(())
    }

    fn write_dirty_bit(&self, dirty: bool) -> io::Result<()> {
        let len = self.0.align.max(super::SECTOR as usize);
        let mut buf = IoBuffer::new(len, self.0.align)?;
        let bytes = buf.as_mut().into_slice();
        self.pread(bytes, 0)?;
        bytes[DIRTY_BYTE] =
            if dirty { bytes[DIRTY_BYTE] | DIRTY } else { bytes[DIRTY_BYTE] & !DIRTY };
        match self.0.align {
            // What is beside it may be written by others.
            1 => self.pwrite(&bytes[DIRTY_BYTE..=DIRTY_BYTE], DIRTY_BYTE as u64),
            _ => self.pwrite(bytes, 0),
        }
    }

    fn pread(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            // SAFETY: one slice of ours.
            let read =
                unsafe { libc::pread(self.0.disk.fd(), into.as_mut_ptr().cast(), into.len(), at) };
            match usize::try_from(read) {
                Ok(0) => {
                    into.fill(0);
                    return Ok(());
                }
                Ok(read) => {
                    into = &mut into[read..];
                    offset += read as u64;
                }
                Err(_) => interrupted(io::Error::last_os_error())?,
            }
        }
        Ok(())
    }

    fn pwrite(&self, mut from: &[u8], mut offset: u64) -> io::Result<()> {
        while !from.is_empty() {
            let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            // SAFETY: one slice of ours.
            let written =
                unsafe { libc::pwrite(self.0.disk.fd(), from.as_ptr().cast(), from.len(), at) };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    from = &from[written..];
                    offset += written as u64;
                    self.0.len.fetch_max(offset, Ordering::Relaxed);
                }
                Err(_) => interrupted(io::Error::last_os_error())?,
            }
        }
        Ok(())
    }
}

fn interrupted(err: io::Error) -> io::Result<()> {
    if err.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(err) }
}

impl fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ImageFile").field(&self.0.disk.path()).finish()
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.disk.path().display())
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.0.align
    }

    fn req_align(&self) -> usize {
        self.0.align
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut at = offset;
        for mut buf in bufv.into_inner() {
            self.pread(&mut buf, at)?;
            if self.0.has_dirty_bit.load(Ordering::Relaxed)
                && let Some(byte) = (DIRTY_BYTE as u64).checked_sub(at)
                && let Some(byte) = buf.get_mut(byte as usize)
            {
                *byte &= !DIRTY;
            }
            at += buf.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.before_write(offset, bufv.len())?;
        if bufv.len() <= POINTER_LEN.max(self.0.align) as u64 {
            self.sync_data()?;
        }
        let mut at = offset;
        for buf in bufv.into_inner() {
            self.pwrite(&buf, at)?;
            at += buf.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }
}
