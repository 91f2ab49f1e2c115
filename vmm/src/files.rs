//! Files by their identity: whether two paths are one, whether one is still ours. Sockets by paths of
//! any length. And how many files may be open.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Longest path of a socket, in bytes: `sun_path` without its NUL.
const LONGEST_SOCKET_PATH: usize = 107;

/// A path of a socket that fits into a socket's address.
#[derive(Debug)]
pub struct SocketPath {
    path: PathBuf,
    // The short path leads through it.
    _folder: Option<File>,
}

impl SocketPath {
    /// Another path for `path` if that is too long.
    ///
    /// # Errors
    /// Its folder cannot be opened.
    pub fn of(path: &Path) -> io::Result<SocketPath> {
        let long = path.as_os_str().as_bytes().len() > LONGEST_SOCKET_PATH;
        let (Some(folder), Some(name), true) = (path.parent(), path.file_name(), long) else {
            return Ok(SocketPath { path: path.to_owned(), _folder: None });
        };
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        let here = Path::new(".");
        let folder = if folder.as_os_str().is_empty() { here } else { folder };
        let folder = File::options().read(true).custom_flags(flags).open(folder)?;
        let path = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        Ok(SocketPath { path, _folder: Some(folder) })
    }

    /// The path, good for as long as this lives.
    pub fn as_path(&self) -> &Path {
        &self.path
    }
}

/// What two paths of one file have in common; `None` if there is none at `path`.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::metadata(path).ok()?;
    // Of a device its number counts: any number of nodes may stand for it.
    let block = file.file_type().is_block_device();
    Some(if block { (0, file.rdev()) } else { (file.dev(), file.ino()) })
}

/// Removes the file at `path` if it is the one on that device with that inode number, as far as can
/// be known without holding its folder. Async-signal-safe, and made of calls that the filter of `main` lets pass.
pub fn remove_if_same(path: &CStr, (device, inode): (u64, u64)) {
    // SAFETY: the path is valid; stat is plain data, which the call fills.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        let (call, flags) = (libc::SYS_newfstatat, libc::AT_SYMLINK_NOFOLLOW);
        if libc::syscall(call, libc::AT_FDCWD, path.as_ptr(), &raw mut stat, flags) == 0
            && (stat.st_dev, stat.st_ino) == (device, inode)
        {
            libc::unlink(path.as_ptr());
        }
    }
}

/// Descriptors that a machine with a socket device may need: 1023 connections and its own.
const MANY: libc::rlim_t = 4096;

/// Raises the number of files that this process may have open, as far as it may be raised: the usual
/// 1024 are kept low for programs that select(2).
pub(crate) fn allow_many() {
    // SAFETY: the structure is plain data, which the first call fills.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && limit.rlim_cur < MANY {
            limit.rlim_cur = MANY.min(limit.rlim_max);
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn long_paths_are_reached_through_their_directory() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("d".repeat(200));
        fs::create_dir(&long).unwrap();
        let short = SocketPath::of(&long.join("s")).unwrap();
        assert!(short.as_path().as_os_str().len() < 40);
        fs::write(short.as_path(), "here").unwrap();
        assert_eq!(fs::read(long.join("s")).unwrap(), b"here");
        assert_eq!(SocketPath::of(Path::new("a/b")).unwrap().as_path(), Path::new("a/b"));
    }
}
