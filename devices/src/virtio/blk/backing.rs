//! What is behind a disk: one file, or a chain of them.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use super::overlay::{Overlay, Place};
use super::{DiskFile, OpenError};

/// What is behind a disk.
#[derive(Debug)]
pub enum Backing {
    /// A raw file or block device.
    Raw(DiskFile),
    /// An overlay and what is below.
    Overlay(Box<Overlay>),
}

impl From<DiskFile> for Backing {
    fn from(file: DiskFile) -> Backing {
        Backing::Raw(file)
    }
}

impl From<Overlay> for Backing {
    fn from(overlay: Overlay) -> Backing {
        Backing::Overlay(Box::new(overlay))
    }
}

impl Backing {
    /// Length in bytes, a multiple of the sector size.
    pub fn len(&self) -> u64 {
        match self {
            Backing::Raw(file) => file.len(),
            Backing::Overlay(overlay) => overlay.len(),
        }
    }

    /// Never true: a disk has at least one sector.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Smallest unit of a transfer in bytes.
    pub fn block_size(&self) -> u32 {
        match self {
            Backing::Raw(file) => file.block_size(),
            Backing::Overlay(overlay) => overlay.block_size(),
        }
    }

    /// Nothing is ever written.
    pub fn read_only(&self) -> bool {
        match self {
            Backing::Raw(file) => file.read_only(),
            Backing::Overlay(overlay) => overlay.read_only(),
        }
    }

    /// Transfers go past the page cache.
    pub fn direct(&self) -> bool {
        match self {
            Backing::Raw(file) => file.direct(),
            Backing::Overlay(overlay) => overlay.direct(),
        }
    }

    /// Where the file is that is written.
    pub fn path(&self) -> &Path {
        match self {
            Backing::Raw(file) => file.path(),
            Backing::Overlay(overlay) => overlay.path(),
        }
    }

    /// The overlay, if it is one.
    pub fn overlay(&self) -> Option<&Overlay> {
        match self {
            Backing::Raw(_) => None,
            Backing::Overlay(overlay) => Some(overlay),
        }
    }

    /// The file that is written.
    #[inline]
    pub(super) fn fd(&self) -> RawFd {
        match self {
            Backing::Raw(file) => file.fd(),
            Backing::Overlay(overlay) => overlay.fd(),
        }
    }

    /// Where that file has what is at `offset` of the disk.
    #[inline]
    pub(super) fn in_top(&self, offset: u64) -> u64 {
        match self {
            Backing::Raw(_) => offset,
            Backing::Overlay(overlay) => overlay.in_top(offset),
        }
    }

    /// Where to read what is at `offset` of the disk: at most `len` bytes, and as many as are in a row.
    #[inline]
    pub(super) fn place(&self, offset: u64, len: u64) -> Place {
        match self {
            Backing::Raw(file) => Place { fd: file.fd(), offset, len },
            Backing::Overlay(overlay) => overlay.place(offset, len),
        }
    }

    /// Makes everything that was written durable, and waits for it.
    pub(super) fn save(&self) -> io::Result<()> {
        match self {
            // SAFETY: no memory is involved.
            Backing::Raw(file) => match unsafe { libc::fdatasync(file.fd()) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
            Backing::Overlay(overlay) => overlay.save(),
        }
    }

    /// What `candidate` is, in the place of this; see [`DiskFile::replaced_by`].
    pub(super) fn replaced_by(&self, candidate: super::Candidate) -> Result<DiskFile, OpenError> {
        match self {
            Backing::Raw(file) => file.replaced_by(candidate),
            Backing::Overlay(_) => candidate.locked(),
        }
    }
}
