//! Images that are built here byte by byte, read and written, killed and corrupted.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::DeflateEncoder;
use libc::iovec;
use proptest::prelude::*;
use tempfile::TempDir;

mod contents;
mod forks;
mod hostile;
mod model;
mod opening;

use super::*;

const WRITE: Access = Access { read_only: false, direct: false, backing: false, forked: 0 };
const READ: Access = Access { read_only: true, ..WRITE };

/// What a cluster of the disk has.
#[derive(Clone, Debug)]
enum Content {
    Data(Vec<u8>),
    Compressed(Vec<u8>),
    Zero,
}

/// What an image is built from. Nothing of imago is used for that.
#[derive(Clone, Debug)]
struct Builder {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    clusters: BTreeMap<u64, Content>,
    backing: Option<(String, Option<String>)>,
    extensions: Vec<(u32, Vec<u8>)>,
    encryption: u32,
    snapshots: u32,
    incompatible: u64,
}

impl Builder {
    fn new(version: u32, cluster_bits: u32, size: u64) -> Builder {
        Builder {
            version,
            cluster_bits,
            refcount_order: 4,
            size,
            clusters: BTreeMap::new(),
            backing: None,
            extensions: Vec::new(),
            encryption: 0,
            snapshots: 0,
            incompatible: 0,
        }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    fn filled(&self, byte: u8) -> Vec<u8> {
        (0..self.cluster()).map(|at| byte ^ (at >> 7) as u8).collect()
    }

    fn with(mut self, index: u64, content: Content) -> Builder {
        self.clusters.insert(index, content);
        self
    }

    /// The image: header, refcount table, one refcount block, L1 table, then L2 tables and data.
    fn build(&self) -> Vec<u8> {
        let cluster = self.cluster();
        let per_l2 = cluster as u64 / 8;
        let l1_entries = self.size.div_ceil(per_l2 * cluster as u64);
        let l1_clusters = (l1_entries as usize * 8).div_ceil(cluster);
        let bits = 1 << self.refcount_order;
        let blocks = 8;
        let first = 2 + blocks + l1_clusters;
        let mut image = vec![0; first * cluster];
        let put = |image: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let mut l1 = vec![0_u64; l1_entries as usize];
        let mut shared = BTreeMap::new();
        for (&index, content) in &self.clusters {
            let slot = (index / per_l2) as usize;
            if l1[slot] == 0 {
                let table = image.len();
                l1[slot] = table as u64 | 1 << 63;
                image.resize(table + cluster, 0);
            }
            let table = (l1[slot] & !(1 << 63)) as usize;
            let at = image.len();
            let entry = match content {
                Content::Zero => 1,
                Content::Data(data) => {
                    image.extend(data);
                    at as u64 | 1 << 63
                }
                Content::Compressed(data) => {
                    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::best());
                    deflated.write_all(data).unwrap();
                    let deflated = deflated.finish().unwrap();
                    // Not at the start of a sector.
                    let offset = at + 7;
                    image.resize(offset, 0);
                    image.extend(&deflated);
                    image.resize(image.len().next_multiple_of(cluster), 0);
                    let sectors = (offset % 512 + deflated.len()).div_ceil(512) - 1;
                    for cluster in at / cluster..image.len() / cluster {
                        shared.insert(cluster, 1);
                    }
                    offset as u64 | (sectors as u64) << (62 - (self.cluster_bits - 8)) | 1 << 62
                }
            };
            put(&mut image, table + (index % per_l2) as usize * 8, &entry.to_be_bytes());
        }
        for (slot, entry) in l1.iter().enumerate() {
            put(&mut image, (2 + blocks) * cluster + slot * 8, &entry.to_be_bytes());
        }
        let used = image.len() / cluster;
        let per_block = cluster * 8 / bits;
        assert!(used <= per_block * blocks, "the image is too large to be built");
        for block in 0..blocks {
            let at = ((2 + block) * cluster) as u64;
            put(&mut image, cluster + block * 8, &at.to_be_bytes());
        }
        for index in 0..used {
            set_refcount(&mut image[2 * cluster..], index, bits);
        }
        let header = self.header(cluster, l1_entries as u32, blocks);
        put(&mut image, 0, &header);
        image
    }

    fn header(&self, cluster: usize, l1_entries: u32, blocks: usize) -> Vec<u8> {
        let mut header = Vec::new();
        let extensions: usize =
            self.extensions().iter().map(|(_, data)| 8 + data.len().next_multiple_of(8)).sum();
        let start = if self.version == 2 { 72 } else { 104 };
        let name = self.backing.as_ref().map_or("", |(name, _)| name);
        header.extend(MAGIC);
        header.extend(self.version.to_be_bytes());
        let offset = if name.is_empty() { 0 } else { start + extensions + 8 };
        header.extend((offset as u64).to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(self.size.to_be_bytes());
        header.extend(self.encryption.to_be_bytes());
        header.extend(l1_entries.to_be_bytes());
        header.extend(((2 + blocks) as u64 * cluster as u64).to_be_bytes());
        header.extend((cluster as u64).to_be_bytes());
        header.extend(1_u32.to_be_bytes());
        header.extend(self.snapshots.to_be_bytes());
        header.extend(0_u64.to_be_bytes());
        if self.version > 2 {
            header.extend(self.incompatible.to_be_bytes());
            header.extend([0; 16]);
            header.extend(self.refcount_order.to_be_bytes());
            header.extend(104_u32.to_be_bytes());
        }
        for (kind, data) in self.extensions() {
            header.extend(kind.to_be_bytes());
            header.extend((data.len() as u32).to_be_bytes());
            header.extend(&data);
            header.resize(header.len().next_multiple_of(8), 0);
        }
        header.extend([0; 8]);
        header.extend(name.as_bytes());
        header
    }

    fn extensions(&self) -> Vec<(u32, Vec<u8>)> {
        let format = self.backing.as_ref().and_then(|(_, format)| format.clone());
        let format = format.map(|format| (0xe279_2aca, format.into_bytes()));
        self.extensions.iter().cloned().chain(format).collect()
    }

    /// The disk without what is below.
    fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; self.size as usize];
        for (index, content) in &self.clusters {
            let at = *index as usize * self.cluster();
            let end = (at + self.cluster()).min(disk.len());
            if let Content::Data(data) | Content::Compressed(data) = content {
                disk[at..end].copy_from_slice(&data[..end - at]);
            }
        }
        disk
    }

    fn write(&self, path: &Path) {
        fs::write(path, self.build()).unwrap();
    }
}

fn set_refcount(blocks: &mut [u8], index: usize, bits: usize) {
    match bits {
        8.. => blocks[(index + 1) * bits / 8 - 1] = 1,
        _ => blocks[index * bits / 8] |= 1 << (index * bits % 8),
    }
}

/// A bit of everything.
fn mixed(version: u32, cluster_bits: u32) -> Builder {
    let size = 20 << cluster_bits;
    let builder = Builder::new(version, cluster_bits, size - 512);
    let (a, b, c) = (builder.filled(1), builder.filled(2), builder.filled(3));
    let builder = builder
        .with(0, Content::Data(a.clone()))
        .with(1, Content::Data(b))
        .with(3, Content::Compressed(c))
        .with(4, Content::Compressed(a.clone()))
        .with(19, Content::Data(a));
    if version == 2 { builder } else { builder.with(6, Content::Zero) }
}

/// An image in which nothing was written.
pub(in super::super) fn empty(size: u64) -> Vec<u8> {
    Builder::new(3, 12, size).build()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn iov(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn try_read(image: &Qcow2, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let bytes = vec![0xee; len];
    // Buffers that end where no cluster does.
    let (a, b) = bytes.split_at(len / 3);
    let mut done = 0;
    while done < len as u64 {
        let list = [iov(a), iov(b)];
        done += u64::from(image.read(&part(&list, done, len as u64 - done), offset + done)?);
    }
    Ok(bytes)
}

fn read(image: &Qcow2, offset: u64, len: usize) -> Vec<u8> {
    try_read(image, offset, len).unwrap()
}

fn try_write(image: &Qcow2, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let (a, b) = bytes.split_at(bytes.len() / 3);
    let (list, len) = ([iov(a), iov(b)], bytes.len() as u64);
    let mut done = 0;
    while done < len {
        let rest = part(&list, done, len - done);
        done += u64::from(image.write(&rest, offset + done, false)?);
    }
    Ok(())
}

fn whole(image: &Qcow2) -> Vec<u8> {
    read(image, 0, image.len() as usize)
}

fn refused(path: &Path, access: Access) -> String {
    Qcow2::try_open(path, access).expect_err("it opens").to_string()
}

fn is_dirty(path: &Path) -> bool {
    describe(path).unwrap().header.is_dirty()
}

/// A disk as it may be: of each sector, the byte that it is filled with, or one of several after it was written and
/// not flushed.
struct Model {
    now: Vec<u8>,
    may: Vec<Vec<u8>>,
}

impl Model {
    fn set(&mut self, sector: u64, byte: u8) {
        let (now, may) = (&mut self.now[sector as usize], &mut self.may[sector as usize]);
        may.push(*now);
        *now = byte;
    }

    fn saved(&mut self) {
        self.may.iter_mut().for_each(Vec::clear);
    }
}

fn sectors(bytes: &[u8]) -> Vec<u8> {
    let sector = |bytes: &[u8]| {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a sector is mixed");
        bytes[0]
    };
    bytes.chunks(512).map(sector).collect()
}
