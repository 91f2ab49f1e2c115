//! Whether the tables of an image agree with each other, before it is written (docs/interop/qcow2, "Host cluster
//! management" and "Cluster mapping").
//!
//! Every cluster has one owner: the header, a table, a refcount block, or a cluster of the disk; those that are
//! compressed may share. An image in which two claim the same is refused: whoever wrote the one would write the
//! other, and a guest that writes a table has the image. And each owner is counted: a refcount that is too low,
//! as a machine leaves it that was killed, is raised, because a cluster that seems free would be handed out again. One
//! that is too high wastes space and is left.

use std::io;

use super::file::ImageFile;
use super::header::{Header, be64};

/// Clusters of the largest image that is looked at: 16 TiB at the usual 64 KiB. Two bytes of memory each, where
/// they are used.
pub(super) const MAX_CLUSTERS: u64 = 1 << 28;

/// Offset of an L2 table, a refcount block or a cluster in its entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L1 entry, of an L2 entry and of a refcount table's entry that are to be 0.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFTABLE_RESERVED: u64 = 0x1ff;
/// An L2 entry of a compressed cluster; of one that reads as zeroes.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// What a walk over the tables found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Clusters of the disk that have data in the image.
    pub data: u64,
    /// Those of them that are compressed.
    pub compressed: u64,
    /// Clusters that are noted as zeroes.
    pub zeroes: u64,
    /// Entries of clusters that do not say that nobody else has them.
    pub(super) not_alone: u64,
    /// Refcounts that were too low.
    pub(super) raised: u64,
}

/// Why an image cannot be trusted.
#[derive(Debug)]
pub(super) enum Problem {
    /// A clause about it.
    Corrupt(String),
    Io(io::Error),
}

impl From<io::Error> for Problem {
    fn from(err: io::Error) -> Problem {
        Problem::Io(err)
    }
}

fn corrupt<T>(what: String) -> Result<T, Problem> {
    Err(Problem::Corrupt(what))
}

/// Who has a cluster: how many, and whether they share it.
const ALONE: u16 = 1 << 15;

struct Walk<'a> {
    file: &'a ImageFile,
    header: &'a Header,
    limit: u64,
    owners: Vec<u16>,
    /// Behind the last cluster that has an owner.
    end: u64,
    found: Found,
}

/// Walks over the tables of an image that is only looked at.
pub(super) fn look(file: &ImageFile, header: &Header) -> Result<Found, Problem> {
    let mut walk = Walk::new(file, header)?;
    walk.tables()?;
    Ok(walk.found)
}

/// Checks an image that is to be written, and raises refcounts that are too low.
pub(super) fn repair(file: &ImageFile, header: &Header) -> Result<Found, Problem> {
    let mut walk = Walk::new(file, header)?;
    let reftable = walk.reftable()?;
    walk.tables()?;
    walk.refcounts(&reftable)?;
    Ok(walk.found)
}

impl<'a> Walk<'a> {
    fn new(file: &'a ImageFile, header: &'a Header) -> Result<Walk<'a>, Problem> {
        let limit = file.limit();
        let clusters = limit.div_ceil(header.cluster_size());
        if clusters > MAX_CLUSTERS {
            return corrupt(format!(
                "it may have {clusters} clusters, above {MAX_CLUSTERS}; \
                 `qemu-img convert -o cluster_size=2M` makes one with fewer"
            ));
        }
        let owners = vec![0; clusters as usize];
        let mut walk = Walk { file, header, limit, owners, end: 0, found: Found::default() };
        walk.claim(0, 1, "header")?;
        Ok(walk)
    }

    /// The clusters that have `len` bytes from `offset` on get their only owner.
    fn claim(&mut self, offset: u64, len: u64, what: &str) -> Result<(), Problem> {
        for cluster in self.clusters(offset, len, what)? {
            match self.owners.get_mut(cluster as usize) {
                Some(owner @ 0) => *owner = ALONE | 1,
                _ => {
                    return corrupt(format!(
                        "the {what} at {offset:#x} is where something else is, too"
                    ));
                }
            }
        }
        Ok(())
    }

    /// They get another owner, beside others of its kind.
    fn share(&mut self, offset: u64, len: u64, what: &str) -> Result<(), Problem> {
        for cluster in self.clusters(offset, len, what)? {
            match self.owners.get_mut(cluster as usize) {
                Some(owners) if *owners < ALONE - 1 => *owners += 1,
                _ => {
                    return corrupt(format!(
                        "the {what} at {offset:#x} is where something else is, too"
                    ));
                }
            }
        }
        Ok(())
    }

    fn clusters(
        &mut self,
        offset: u64,
        len: u64,
        what: &str,
    ) -> Result<std::ops::Range<u64>, Problem> {
        let end = offset.checked_add(len).filter(|end| *end <= self.limit);
        let Some(end) = end else {
            return corrupt(format!("the {what} at {offset:#x} is behind the end of the file"));
        };
        let clusters = offset >> self.header.cluster_bits..end.div_ceil(self.header.cluster_size());
        self.end = self.end.max(clusters.end);
        Ok(clusters)
    }

    /// Checks the place that an entry of a table leads to.
    fn aligned(&self, entry: u64, reserved: u64, what: &str) -> Result<u64, Problem> {
        let offset = entry & OFFSET;
        if entry & reserved != 0 || !offset.is_multiple_of(self.header.cluster_size()) {
            return corrupt(format!("the entry {entry:#x} of a {what} is none"));
        }
        Ok(offset)
    }

    /// Claims the refcount table and its blocks. Returns its entries.
    fn reftable(&mut self) -> Result<Vec<u64>, Problem> {
        let header = self.header;
        let len = u64::from(header.reftable_clusters) << header.cluster_bits;
        self.claim(header.reftable_offset, len, "refcount table")?;
        let bytes = self.file.bytes(header.reftable_offset, len as usize)?;
        let mut blocks = Vec::with_capacity(bytes.len() / 8);
        for at in (0..bytes.len()).step_by(8) {
            let offset = self.aligned(be64(&bytes, at), REFTABLE_RESERVED, "refcount table")?;
            if offset != 0 {
                self.claim(offset, header.cluster_size(), "refcount block")?;
            }
            blocks.push(offset);
        }
        Ok(blocks)
    }

    /// Claims what the disk is made of.
    fn tables(&mut self) -> Result<(), Problem> {
        let header = self.header;
        let len = u64::from(header.l1_entries) * 8;
        self.claim(header.l1_offset, len, "L1 table")?;
        let l1 = self.file.bytes(header.l1_offset, len as usize)?;
        for at in (0..l1.len()).step_by(8) {
            // The highest bit says that the refcount is 1.
            let offset = self.aligned(be64(&l1, at), L1_RESERVED, "L1 table")?;
            if offset != 0 {
                self.claim(offset, header.cluster_size(), "L2 table")?;
                self.l2(offset)?;
            }
        }
        Ok(())
    }

    fn l2(&mut self, offset: u64) -> Result<(), Problem> {
        let header = self.header;
        let l2 = self.file.bytes(offset, header.cluster_size() as usize)?;
        for at in (0..l2.len()).step_by(8) {
            let entry = be64(&l2, at);
            if entry == 0 {
                continue;
            }
            if entry & COMPRESSED != 0 {
                let (offset, len) = compressed(entry, header.cluster_bits);
                if entry >> 63 != 0 {
                    return corrupt(format!("the entry {entry:#x} of an L2 table is none"));
                }
                self.share(offset, len, "compressed cluster")?;
                self.found.compressed += 1;
                self.found.data += 1;
                continue;
            }
            let reserved = L2_RESERVED | if header.version == 2 { ZERO } else { 0 };
            let offset = self.aligned(entry, reserved, "L2 table")?;
            if offset != 0 {
                self.claim(offset, header.cluster_size(), "cluster")?;
                self.found.not_alone += u64::from(entry >> 63 == 0);
            }
            match entry & ZERO {
                0 => self.found.data += 1,
                _ => self.found.zeroes += 1,
            }
        }
        Ok(())
    }

    /// Raises what is too low in the refcount blocks.
    fn refcounts(&mut self, blocks: &[u64]) -> Result<(), Problem> {
        let bits = 1_usize << self.header.refcount_order;
        let entries = (self.header.cluster_size() as usize * 8) / bits;
        let used = &self.owners[..self.end as usize];
        for (index, owners) in used.chunks(entries).enumerate() {
            if owners.iter().all(|owners| *owners == 0) {
                continue;
            }
            let Some(&offset) = blocks.get(index).filter(|offset| **offset != 0) else {
                return corrupt("clusters that it uses have no refcount".into());
            };
            let mut block = self.file.bytes(offset, self.header.cluster_size() as usize)?;
            let mut raised = 0;
            for (entry, owners) in owners.iter().enumerate() {
                let owners = u64::from(owners & !ALONE);
                if refcount(&block, entry, bits) >= owners {
                    continue;
                }
                if bits < 16 && owners >> bits != 0 {
                    return corrupt("a cluster has more users than its refcount can tell".into());
                }
                set_refcount(&mut block, entry, bits, owners);
                raised += 1;
            }
            if raised > 0 {
                imago::StorageExt::write(self.file, &block[..], offset)?;
                self.found.raised += raised;
            }
        }
        Ok(())
    }
}

/// Where the data of a compressed cluster is, and how many bytes it may have ("Compressed Clusters Descriptor").
fn compressed(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let bits = 62 - (cluster_bits - 8);
    let descriptor = entry & (COMPRESSED - 1);
    let offset = descriptor & ((1 << bits) - 1);
    let sectors = (descriptor >> bits) + 1;
    (offset, sectors * 512 - offset % 512)
}

/// Refcount `entry` of a block whose refcounts have `bits` bits each. Those below a byte begin at its lowest bit.
fn refcount(block: &[u8], entry: usize, bits: usize) -> u64 {
    match bits {
        1 | 2 | 4 => {
            let bit = entry * bits;
            u64::from(block[bit / 8]) >> (bit % 8) & ((1 << bits) - 1)
        }
        _ => {
            let field = &block[entry * bits / 8..][..bits / 8];
            field.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

fn set_refcount(block: &mut [u8], entry: usize, bits: usize, count: u64) {
    match bits {
        1 | 2 | 4 => {
            let bit = entry * bits;
            let mask = ((1_u8 << bits) - 1) << (bit % 8);
            let byte = &mut block[bit / 8];
            *byte = *byte & !mask | (count as u8) << (bit % 8);
        }
        _ => {
            let bytes = bits / 8;
            block[entry * bytes..][..bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
        }
    }
}
