//! Files by their identity: whether two paths are one, whether one is still ours. And how many may be
//! open.

use std::ffi::CStr;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

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
