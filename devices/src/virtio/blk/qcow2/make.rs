//! Making an image that stands on another: header, refcounts of what is there, and an L1 table that leads nowhere.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::check::MAX_CLUSTERS;
use super::header::{CLUSTER_BITS, MAGIC, MAX_L1, MAX_NAME, V3_LEN, extension, l1_needed};
use super::open::longest;
use crate::virtio::blk::file::lock;
use crate::virtio::blk::overlay::{OverlayError, aside, seen_from, settle};

/// Clusters of 64 KiB, QEMU's own choice.
const USUAL_BITS: u32 = 16;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Clusters of the header, the refcount table and the only refcount block.
const BEFORE_L1: u64 = 3;

/// Makes an image of `size` bytes at `path`, where nothing is yet, over the image at `base`, an absolute path. It is
/// there as a whole or not at all, and locked. Nothing is synced.
pub(super) fn make(path: &Path, base: &Path, size: u64) -> Result<File, OverlayError> {
    let failed = |source: io::Error| match source.kind() {
        ErrorKind::AlreadyExists => OverlayError::Exists(path.to_owned()),
        _ => OverlayError::File { verb: "make", path: path.to_owned(), source },
    };
    let unfit = |reason: &str| {
        let (path, reason) = (base.to_owned(), reason.to_owned());
        OverlayError::Unfit { path, reason }
    };
    let name = seen_from(path, base);
    let name =
        name.to_str().ok_or_else(|| unfit("an image names it, and its path is not UTF-8"))?;
    // What has a colon before its first slash is no file to QEMU.
    let name = if name.contains(':') && !name.starts_with('/') {
        format!("./{name}")
    } else {
        name.to_owned()
    };
    if name.len() > MAX_NAME as usize {
        return Err(unfit(&format!(
            "an image names it, and its path is longer than {MAX_NAME} bytes"
        )));
    }
    let aside = aside(path).map_err(failed)?;
    let made = File::options().read(true).write(true).create_new(true).mode(0o600).open(&aside);
    let made = made.map_err(failed)?;
    let written = Layout::of(size)
        .write(&made, &name)
        .and_then(|()| lock(&made, false))
        .and_then(|()| settle(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written.map_err(failed)?;
    Ok(made)
}

/// Where an empty image has what.
struct Layout {
    size: u64,
    cluster_bits: u32,
    l1_entries: u64,
    l1_clusters: u64,
}

impl Layout {
    /// With the smallest clusters from the usual ones on in which the image can be opened when it is full.
    fn of(size: u64) -> Layout {
        let fits = |bits: &u32| longest(1 << (bits + 10), size) >> bits < MAX_CLUSTERS;
        let cluster_bits = (USUAL_BITS..*CLUSTER_BITS.end()).find(fits);
        let cluster_bits = cluster_bits.unwrap_or(*CLUSTER_BITS.end());
        let l1_entries = l1_needed(size, cluster_bits);
        let l1_clusters = (l1_entries * 8).div_ceil(1 << cluster_bits);
        Layout { size, cluster_bits, l1_entries, l1_clusters }
    }

    fn at(&self, cluster: u64) -> u64 {
        cluster << self.cluster_bits
    }

    fn write(&self, file: &File, base: &str) -> io::Result<()> {
        let clusters = BEFORE_L1 + self.l1_clusters;
        // One refcount block tells of as many.
        let most = self.at(1) / 2;
        let l1_entries = u32::try_from(self.l1_entries).unwrap_or(u32::MAX);
        if l1_entries > MAX_L1 || clusters > most {
            return Err(ErrorKind::FileTooLarge.into());
        }
        file.set_len(self.at(clusters))?;
        file.write_all_at(&self.header(l1_entries, base), 0)?;
        file.write_all_at(&self.at(2).to_be_bytes(), self.at(1))?;
        let refcounts: Vec<u8> = (0..clusters).flat_map(|_| 1_u16.to_be_bytes()).collect();
        file.write_all_at(&refcounts, self.at(2))
    }

    /// A header of version 3 with the format of the backing file, and its name.
    fn header(&self, l1_entries: u32, base: &str) -> Vec<u8> {
        const FORMAT: &[u8; 5] = b"qcow2";
        let name = V3_LEN + 8 + FORMAT.len().next_multiple_of(8) + 8;
        let mut header = Vec::with_capacity(name + base.len());
        header.extend(MAGIC);
        header.extend(3_u32.to_be_bytes());
        header.extend((name as u64).to_be_bytes());
        header.extend((base.len() as u32).to_be_bytes());
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(self.size.to_be_bytes());
        // Not encrypted.
        header.extend(0_u32.to_be_bytes());
        header.extend(l1_entries.to_be_bytes());
        header.extend(self.at(BEFORE_L1).to_be_bytes());
        header.extend(self.at(1).to_be_bytes());
        header.extend(1_u32.to_be_bytes());
        // No snapshots, and no features of any kind.
        header.extend([0; 4 + 8 + 3 * 8]);
        header.extend(REFCOUNT_ORDER.to_be_bytes());
        header.extend((V3_LEN as u32).to_be_bytes());
        header.extend(extension::BACKING_FORMAT.to_be_bytes());
        header.extend((FORMAT.len() as u32).to_be_bytes());
        header.extend(FORMAT);
        header.resize(name, 0);
        header.extend(base.as_bytes());
        header
    }
}
