//! Whether two paths are one file, and how many files may be open.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What two paths of one file have in common; `None` if there is none at `path`.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::metadata(path).ok()?;
    // Of a device its number counts: any number of nodes may stand for it.
    let block = file.file_type().is_block_device();
    Some(if block { (0, file.rdev()) } else { (file.dev(), file.ino()) })
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
