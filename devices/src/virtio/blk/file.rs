//! The file behind a disk: opened, locked, measured.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::SECTOR;

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {} for {access}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A directory, pipe, socket or character device.
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// Its size is 0 or no whole number of blocks.
    #[error("{} has {size} bytes, which is not a multiple of {block} above 0", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        size: u64,
        /// What it must be a multiple of.
        block: u64,
    },
    /// Somebody else uses it.
    #[error("{} is in use: another machine has it open{}", path.display(), if *read_only { " for writing" } else { "" })]
    Locked {
        /// The file.
        path: PathBuf,
        /// It was to be opened read-only.
        read_only: bool,
    },
    /// A block device that is mounted, or that somebody else has claimed.
    #[error("{} is in use: it is mounted, or somebody else writes to it", path.display())]
    Claimed {
        /// The device.
        path: PathBuf,
    },
    /// It cannot be locked or measured.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// "lock", "measure" or "copy the descriptor of".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// An open, locked disk file. The lock goes with the descriptor.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    len: u64,
    block_size: u32,
    read_only: bool,
    direct: bool,
    /// What two descriptors of one file have in common; of a block device, its number.
    identity: (u64, u64),
}

/// A file that may take the place of another disk's: open and measured, and not locked yet, for it
/// may be the same file after it grew.
#[derive(Debug)]
pub struct Candidate {
    path: PathBuf,
    /// Of a block device: nobody else had claimed it.
    claimed: bool,
    disk: DiskFile,
}

impl Candidate {
    /// Opens the raw disk at `path` as [`DiskFile::open`] does, without a lock.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Candidate, OpenError> {
        let (disk, claimed) = match DiskFile::unlocked(path, read_only, direct, true) {
            Err(OpenError::Claimed { .. }) => {
                (DiskFile::unlocked(path, read_only, direct, false)?, false)
            }
            disk => (disk?, true),
        };
        Ok(Candidate { path: path.to_owned(), claimed, disk })
    }

    /// Locks it, in the place of something else than a raw disk.
    ///
    /// # Errors
    /// Another process has the file.
    pub(super) fn locked(self) -> Result<DiskFile, OpenError> {
        let Candidate { path, claimed, disk } = self;
        if claimed { disk.locked(&path) } else { Err(OpenError::Claimed { path }) }
    }
}

impl DiskFile {
    /// The disk that `candidate` is, in place of this one: this file with another length, or
    /// another file, which is locked. Makes fcntl(2) calls only.
    ///
    /// # Errors
    /// Another process has the other file; there are no descriptors left.
    pub fn replaced_by(&self, candidate: Candidate) -> Result<DiskFile, OpenError> {
        let Candidate { path, claimed, mut disk } = candidate;
        if self.identity == disk.identity {
            // A copy of the descriptor has its lock.
            disk.file = self.file.try_clone().map_err(|source| OpenError::Host {
                what: "copy the descriptor of",
                path,
                source,
            })?;
            return Ok(disk);
        }
        Candidate { path, claimed, disk }.locked()
    }

    /// Opens the raw disk at `path`: read-only, or for writing; past the page cache with `direct`.
    ///
    /// A lock on the open file description keeps a second writer, or a reader beside a writer, in
    /// this and other processes, out. A block device that is written is claimed as well, as mount(8)
    /// does it, whatever node it was opened by.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<DiskFile, OpenError> {
        DiskFile::unlocked(path, read_only, direct, true)?.locked(path)
    }

    /// The raw disk that `file` is, which somebody else opened, or which was opened for a purpose of its own.
    ///
    /// # Errors
    /// As of [`DiskFile::open`].
    pub(super) fn of(
        file: File,
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<DiskFile, OpenError> {
        DiskFile::measured(file, path, read_only, direct)?.of_whole_blocks()?.locked(path)
    }

    /// As [`DiskFile::of`], of a descriptor that has its lock.
    pub(super) fn of_shared(file: File, path: &Path, direct: bool) -> Result<DiskFile, OpenError> {
        DiskFile::measured(file, path, true, direct)?.of_whole_blocks()
    }

    /// The raw disk at `path`, for somebody who only looks.
    pub(super) fn unlocked_reader(path: &Path) -> Result<DiskFile, OpenError> {
        DiskFile::unlocked(path, true, false, false)
    }

    /// The file of an image at `path`, opened and locked as [`DiskFile::open`] does it; of any length.
    pub(super) fn open_image(
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<DiskFile, OpenError> {
        DiskFile::opened(path, read_only, direct, true)?.locked(path)
    }

    /// As [`DiskFile::of`], of the file of an image.
    pub(super) fn of_image(
        file: File,
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<DiskFile, OpenError> {
        DiskFile::measured(file, path, read_only, direct)?.locked(path)
    }

    /// As [`DiskFile::unlocked_reader`], of an image.
    pub(super) fn unlocked_image(path: &Path) -> Result<DiskFile, OpenError> {
        DiskFile::opened(path, true, false, false)
    }

    fn locked(self, path: &Path) -> Result<DiskFile, OpenError> {
        match lock(&self.file, self.read_only) {
            Ok(()) => Ok(self),
            Err(source) => Err(match source.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => {
                    OpenError::Locked { path: path.to_owned(), read_only: self.read_only }
                }
                _ => OpenError::Host { what: "lock", path: path.to_owned(), source },
            }),
        }
    }

    fn unlocked(
        path: &Path,
        read_only: bool,
        direct: bool,
        claim: bool,
    ) -> Result<DiskFile, OpenError> {
        DiskFile::opened(path, read_only, direct, claim)?.of_whole_blocks()
    }

    fn opened(
        path: &Path,
        read_only: bool,
        direct: bool,
        claim: bool,
    ) -> Result<DiskFile, OpenError> {
        let access = if read_only { "reading" } else { "reading and writing" };
        let open = |source| OpenError::Open { path: path.to_owned(), access, source };
        let mut flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        if direct {
            flags |= libc::O_DIRECT;
        }
        if claim && !read_only {
            // Without O_CREAT it means something for block devices only (open(2)).
            flags |= libc::O_EXCL;
        }
        let file =
            File::options().read(true).write(!read_only).custom_flags(flags).open(path).map_err(
                |source| match source.raw_os_error() {
                    // Opening a directory for writing says so before anything can be looked at.
                    Some(libc::EISDIR) => OpenError::Kind { path: path.to_owned() },
                    Some(libc::EBUSY) => OpenError::Claimed { path: path.to_owned() },
                    _ => open(source),
                },
            )?;
        DiskFile::measured(file, path, read_only, direct)
    }

    /// An open file as a disk.
    fn measured(
        mut file: File,
        path: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<DiskFile, OpenError> {
        let measure = |source| OpenError::Host { what: "measure", path: path.to_owned(), source };
        let metadata = file.metadata().map_err(measure)?;
        let kind = metadata.file_type();
        let identity = match kind.is_block_device() {
            true => (0, metadata.rdev()),
            false => (metadata.dev(), metadata.ino()),
        };
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind { path: path.to_owned() });
        }
        let len = file.seek(SeekFrom::End(0)).map_err(measure)?;
        let block_size = if kind.is_block_device() {
            logical_block_size(&file).map_err(measure)?
        } else if direct {
            direct_alignment(&file)
        } else {
            SECTOR as u32
        };
        let path = path.to_owned();
        Ok(DiskFile { file, path, len, block_size, read_only, direct, identity })
    }

    /// Refuses what is not a whole number of blocks.
    fn of_whole_blocks(self) -> Result<DiskFile, OpenError> {
        let DiskFile { len: size, .. } = self;
        let block = u64::from(self.block_size);
        if size == 0 || !size.is_multiple_of(block) {
            return Err(OpenError::Size { path: self.path, size, block });
        }
        Ok(self)
    }

    /// Length in bytes; of a raw disk, a multiple of the sector size.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true: a disk has at least one sector.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Smallest unit of a transfer in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Nothing is ever written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Transfers go past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Of a regular file.
    pub(super) fn is_file(&self) -> bool {
        self.identity.0 != 0
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

pub(super) fn lock(file: &File, read_only: bool) -> io::Result<()> {
    // SAFETY: flock is plain data; all of the file is meant by start and length 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: one valid flock.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets others in beside this process, for reading.
pub(super) fn share(file: &File, path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Host { what: "lock", path: path.to_owned(), source };
    lock(file, true).map_err(failed)
}

/// A descriptor of its own for an open file, for reading only, which keeps writers out.
pub(super) fn reopened(file: &File, path: &Path) -> Result<File, OpenError> {
    let failed = |source| OpenError::Host { what: "open", path: path.to_owned(), source };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    let again = File::options().read(true).custom_flags(flags).open(same).map_err(failed)?;
    share(&again, path)?;
    Ok(again)
}

/// What is read and written by this descriptor goes past the page cache from now on.
pub(super) fn go_direct(file: &File) -> io::Result<()> {
    // SAFETY: no memory is involved.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        if flags < 0 || libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `BLKSSZGET` of `linux/fs.h`.
const BLKSSZGET: libc::c_ulong = 0x1268;

fn logical_block_size(file: &File) -> io::Result<u32> {
    let mut size: libc::c_int = 0;
    // SAFETY: the call stores one int.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u32::try_from(size).unwrap_or(0).max(SECTOR as u32))
}

/// Alignment that O_DIRECT needs on this file; 512 where the kernel does not tell (before 6.1).
pub(super) fn direct_alignment(file: &File) -> u32 {
    // SAFETY: statx is plain data; the empty path with AT_EMPTY_PATH means the descriptor.
    let (result, stat) = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let result = libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut stat,
        );
        (result, stat)
    };
    let known = result == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    if known { stat.stx_dio_offset_align.max(SECTOR as u32) } else { SECTOR as u32 }
}
