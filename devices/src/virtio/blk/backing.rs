//! What is behind a disk: one file, or a chain of them.

use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::overlay::{Overlay, OverlayError, Place};
use super::qcow2::{Qcow2, Qcow2Error};
use super::{DiskFile, OpenError};

/// Why there is nothing behind a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A raw file or block device.
    #[error(transparent)]
    Raw(#[from] OpenError),
    /// An overlay.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// An image.
    #[error(transparent)]
    Qcow2(#[from] Qcow2Error),
    /// What nobody said to be raw begins as an image does. A guest can make its raw disk begin so.
    #[error("{} begins like a qcow2 image: format=qcow2 reads it as one, format=raw its bytes as they are", .0.display())]
    Ambiguous(PathBuf),
}

impl DiskError {
    /// The error itself, which is of another type in each case.
    pub fn into_inner(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            DiskError::Raw(err) => err.into(),
            DiskError::Overlay(OverlayError::Open(err)) => err.into(),
            DiskError::Overlay(err) => err.into(),
            DiskError::Qcow2(Qcow2Error::Open(err)) => err.into(),
            DiskError::Qcow2(err) => err.into(),
            DiskError::Ambiguous(_) => self.into(),
        }
    }
}

/// What is behind a disk.
#[derive(Debug)]
pub enum Backing {
    /// A raw file or block device.
    Raw(DiskFile),
    /// An overlay and what is below.
    Overlay(Box<Overlay>),
    /// A qcow2 image and what is below. Operations on it have it for as long as they take.
    Qcow2(Arc<Qcow2>),
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

impl From<Qcow2> for Backing {
    fn from(image: Qcow2) -> Backing {
        Backing::Qcow2(Arc::new(image))
    }
}

impl Backing {
    /// Length in bytes, a multiple of the sector size.
    pub fn len(&self) -> u64 {
        match self {
            Backing::Raw(file) => file.len(),
            Backing::Overlay(overlay) => overlay.len(),
            Backing::Qcow2(image) => image.len(),
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
            // What is not aligned is copied.
            Backing::Qcow2(_) => super::SECTOR as u32,
        }
    }

    /// Nothing is ever written.
    pub fn read_only(&self) -> bool {
        match self {
            Backing::Raw(file) => file.read_only(),
            Backing::Overlay(overlay) => overlay.read_only(),
            Backing::Qcow2(image) => image.disk().read_only(),
        }
    }

    /// Transfers go past the page cache.
    pub fn direct(&self) -> bool {
        match self {
            Backing::Raw(file) => file.direct(),
            Backing::Overlay(overlay) => overlay.direct(),
            Backing::Qcow2(image) => image.disk().direct(),
        }
    }

    /// Where the file is that is written.
    pub fn path(&self) -> &Path {
        match self {
            Backing::Raw(file) => file.path(),
            Backing::Overlay(overlay) => overlay.path(),
            Backing::Qcow2(image) => image.disk().path(),
        }
    }

    /// The overlay, if it is one.
    pub fn overlay(&self) -> Option<&Overlay> {
        match self {
            Backing::Overlay(overlay) => Some(overlay),
            Backing::Raw(_) | Backing::Qcow2(_) => None,
        }
    }

    /// The image, if it is one: it has operations of its own, which are never made on an io thread.
    #[inline]
    pub(super) fn image(&self) -> Option<&Arc<Qcow2>> {
        match self {
            Backing::Qcow2(image) => Some(image),
            Backing::Raw(_) | Backing::Overlay(_) => None,
        }
    }

    /// The file that is written.
    #[inline]
    pub(super) fn fd(&self) -> RawFd {
        match self {
            Backing::Raw(file) => file.fd(),
            Backing::Overlay(overlay) => overlay.fd(),
            Backing::Qcow2(image) => image.disk().fd(),
        }
    }

    /// Where that file has what is at `offset` of the disk.
    #[inline]
    pub(super) fn in_top(&self, offset: u64) -> u64 {
        match self {
            Backing::Raw(_) | Backing::Qcow2(_) => offset,
            Backing::Overlay(overlay) => overlay.in_top(offset),
        }
    }

    /// Where to read what is at `offset` of the disk: at most `len` bytes, and as many as are in a row.
    #[inline]
    pub(super) fn place(&self, offset: u64, len: u64) -> Place {
        match self {
            Backing::Raw(file) => Place { fd: file.fd(), offset, len },
            Backing::Overlay(overlay) => overlay.place(offset, len),
            // Not reached: there is no such place.
            Backing::Qcow2(image) => Place { fd: image.disk().fd(), offset, len },
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
            Backing::Qcow2(image) => image.save(),
        }
    }

    /// What `candidate` is, in the place of this; see [`DiskFile::replaced_by`].
    pub(super) fn replaced_by(&self, candidate: super::Candidate) -> Result<DiskFile, OpenError> {
        match self {
            Backing::Raw(file) => file.replaced_by(candidate),
            Backing::Overlay(_) | Backing::Qcow2(_) => candidate.locked(),
        }
    }
}
