//! qcow2 images for tests, which need no program for that.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Bytes of a cluster.
pub const CLUSTER: usize = 1 << 16;

/// An empty image of version 3 (QEMU's docs/interop/qcow2): header, refcount table, refcount block, L1 table. Its
/// disk has `size` bytes; `backing` is the name of what it stands on, and the format.
pub fn image(size: u64, backing: Option<(&str, &str)>) -> Vec<u8> {
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if let Some((name, format)) = backing {
        put(8, &200_u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(104, &0xe279_2aca_u32.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
        put(200, name.as_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    image
}

/// The files that the disk in the image at `path` is made of, the highest first. Each says that what it stands on is
/// an image.
///
/// # Errors
/// One is not there, or says something else.
pub fn chain(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut chain = vec![path.to_owned()];
    let mut below = backing(path)?;
    while let Some(next) = below {
        below = backing(&next)?;
        chain.push(next);
        if chain.len() > 64 {
            return Err(io::Error::other(format!("{chain:?}")));
        }
    }
    Ok(chain)
}

fn backing(path: &Path) -> io::Result<Option<PathBuf>> {
    let image = fs::read(path)?;
    let (start, len) = (be64(&image, 8) as usize, be32(&image, 16) as usize);
    if start == 0 {
        return Ok(None);
    }
    if image[104..117] != *b"\xe2\x79\x2a\xca\0\0\0\x05qcow2" {
        return Err(io::Error::other(format!("{}: its backing file is no image", path.display())));
    }
    let name = Path::new(OsStr::from_bytes(&image[start..start + len]));
    Ok(Some(path.parent().unwrap_or(Path::new("")).join(name)))
}

/// The disk in the image at `path`, whose clusters are of the usual size and not compressed, and what it stands on.
///
/// # Errors
/// As of [`chain`].
pub fn disk(path: &Path) -> io::Result<Vec<u8>> {
    let mut disk = Vec::new();
    for path in chain(path)?.iter().rev() {
        let image = fs::read(path)?;
        disk.resize(be64(&image, 24) as usize, 0);
        let table = |at: u64| image[at as usize..].chunks_exact(8).map(|entry| be64(entry, 0));
        let l1 = table(be64(&image, 40)).take(be32(&image, 36) as usize);
        for (slot, l2) in l1.enumerate().filter(|(_, entry)| *entry != 0) {
            let l2 = table(l2 & OFFSET).take(CLUSTER / 8);
            for (index, entry) in l2.enumerate().filter(|(_, entry)| *entry != 0) {
                let at = (slot * CLUSTER / 8 + index) * CLUSTER;
                let Some(cluster) = disk.get_mut(at..at + CLUSTER) else { continue };
                match entry & 1 {
                    0 => {
                        let data = (entry & OFFSET) as usize;
                        cluster.copy_from_slice(&image[data..data + CLUSTER]);
                    }
                    _ => cluster.fill(0),
                }
            }
        }
    }
    Ok(disk)
}

/// Where an entry of a table leads to.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn be32(bytes: &[u8], at: usize) -> u32 {
    (be64(bytes, at) >> 32) as u32
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
