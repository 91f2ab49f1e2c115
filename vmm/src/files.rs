//! Whether two paths are one file.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What two paths of one file have in common; `None` if there is none at `path`.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    let file = std::fs::metadata(path).ok()?;
    // Of a device its number counts: any number of nodes may stand for it.
    let block = file.file_type().is_block_device();
    Some(if block { (0, file.rdev()) } else { (file.dev(), file.ino()) })
}
