//! The header of a qcow2 image (QEMU's docs/interop/qcow2, "Header" and "Header extensions"), read and
//! checked before anything else looks at the image.
//!
//! What a library finds in a header that went through here is of a size that can be kept in memory, inside of the
//! file, and of a kind that it knows.

use std::ops::Range;

/// The first bytes of an image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes of a version 2 header, and of a version 3 one without what may follow.
const V2_LEN: usize = 72;
pub(super) const V3_LEN: usize = 104;

/// Bits of a cluster: 512 bytes is the format's limit, 2 MiB is QEMU's.
pub(super) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

/// Entries of an L1 table: QEMU's limit of 32 MiB.
pub(super) const MAX_L1: u32 = (32 << 20) / 8;

/// Bytes of a refcount table: QEMU's limit.
const MAX_REFTABLE: u64 = 8 << 20;

/// The format's limit for the name of a backing file.
pub(super) const MAX_NAME: u32 = 1023;

/// Bytes of an entry in the table of feature names.
const FEATURE_NAME_LEN: usize = 48;

/// Offset of the incompatible features, whose first byte with flags is the last of 8.
pub(super) const INCOMPATIBLE: usize = 72;

/// Incompatible features.
mod incompatible {
    pub(super) const DIRTY: u64 = 1;
    pub(super) const CORRUPT: u64 = 1 << 1;
    pub(super) const DATA_FILE: u64 = 1 << 2;
    pub(super) const COMPRESSION: u64 = 1 << 3;
    pub(super) const EXTENDED_L2: u64 = 1 << 4;
}

/// Types of header extensions.
pub(super) mod extension {
    pub(super) const END: u32 = 0;
    pub(in super::super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(super) const DATA_FILE: u32 = 0x4441_5441;
}

/// The file that an image says it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name as the image has it.
    pub name: String,
    /// Its format, if the image says that.
    pub format: Option<String>,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Length of the disk in bytes.
    pub size: u64,
    /// Base-2 logarithm of the bytes in a cluster, 9 to 21.
    pub cluster_bits: u32,
    /// Base-2 logarithm of the bits in a refcount, 0 to 6.
    pub refcount_order: u32,
    /// Snapshots that are inside of the image.
    pub snapshots: u32,
    /// Method of encryption; 0 is none.
    pub encryption: u32,
    /// The incompatible features; 0 in version 2.
    pub incompatible: u64,
    /// What it stands on.
    pub backing: Option<BackingName>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Where the active L1 table is, and how many entries it has.
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    /// Where the refcount table is, and how many clusters it has.
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
}

/// The cluster size that the first bytes of an image tell of, in bytes: as much has to be read for
/// [`Header::parse`].
///
/// # Errors
/// It is no image, or one with clusters that nobody can read.
pub(super) fn first_cluster(start: &[u8; 512]) -> Result<usize, String> {
    if start[..4] != MAGIC {
        return Err("it does not begin with the qcow2 magic".into());
    }
    let bits = be32(start, 20);
    if !CLUSTER_BITS.contains(&bits) {
        return Err(format!("its clusters have 2^{bits} bytes; 2^9 to 2^21 are possible"));
    }
    Ok(1 << bits)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|field| field.try_into().ok()).map_or(0, u64::from_be_bytes)
}

impl Header {
    /// Reads the header in the first cluster of an image whose file has `file_len` bytes. What is said to be in the
    /// file is in it.
    ///
    /// # Errors
    /// What is wrong with it, as a clause about the image.
    pub(super) fn parse(first: &[u8], file_len: u64) -> Result<Header, String> {
        let version = be32(first, 4);
        if !(2..=3).contains(&version) {
            return Err(format!("it is of version {version}; 2 and 3 are known"));
        }
        let cluster_bits = be32(first, 20);
        let (incompatible, refcount_order, header_len) = match version {
            2 => (0, 4, V2_LEN as u32),
            _ => (be64(first, INCOMPATIBLE), be32(first, 96), be32(first, 100)),
        };
        let fits = header_len as usize <= first.len() && header_len.is_multiple_of(8);
        if version == 3 && (!fits || (header_len as usize) < V3_LEN) {
            return Err(format!("its header has {header_len} bytes"));
        }
        let mut header = Header {
            version,
            size: be64(first, 24),
            cluster_bits,
            refcount_order,
            snapshots: be32(first, 60),
            encryption: be32(first, 32),
            incompatible,
            backing: None,
            data_file: None,
            l1_offset: be64(first, 40),
            l1_entries: be32(first, 36),
            reftable_offset: be64(first, 48),
            reftable_clusters: be32(first, 56),
        };
        let name = backing_name(first)?;
        let end = match &name {
            Some((range, _)) if range.start >= header_len as usize => range.start,
            _ => first.len(),
        };
        let mut format = None;
        header.extensions(first, header_len as usize..end, &mut format)?;
        header.backing = name.map(|(_, name)| BackingName { name, format });
        header.tables_are_in(file_len)?;
        Ok(header)
    }

    /// Looks at the extensions that are in `range` of the first cluster.
    fn extensions(
        &mut self,
        first: &[u8],
        range: Range<usize>,
        format: &mut Option<String>,
    ) -> Result<(), String> {
        let mut at = range.start;
        while at + 8 <= range.end {
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            at += 8;
            if kind == extension::END {
                return Ok(());
            }
            let data = at
                .checked_add(len)
                .filter(|end| *end <= range.end)
                .and_then(|end| first.get(at..end))
                .ok_or("a header extension is longer than its header")?;
            let text = || {
                String::from_utf8(data.to_vec())
                    .map_err(|_| "a name in its header is not UTF-8".to_owned())
            };
            match kind {
                extension::BACKING_FORMAT if format.is_some() => {
                    return Err("it names the format of its backing file twice".into());
                }
                extension::BACKING_FORMAT => *format = Some(text()?),
                extension::DATA_FILE => self.data_file = Some(text()?),
                extension::FEATURE_NAMES if !len.is_multiple_of(FEATURE_NAME_LEN) => {
                    return Err("its table of feature names is cut off".into());
                }
                _ => {}
            }
            at += len.next_multiple_of(8);
        }
        // Of an image without extensions the name of the backing file may follow at once.
        Ok(())
    }

    /// Checks sizes and places.
    fn tables_are_in(&self, file_len: u64) -> Result<(), String> {
        if self.refcount_order > 6 {
            return Err(format!("its refcounts have 2^{} bits", self.refcount_order));
        }
        if self.size == 0 || !self.size.is_multiple_of(super::SECTOR) {
            return Err(format!(
                "its disk has {} bytes, which is not a multiple of {} above 0",
                self.size,
                super::SECTOR
            ));
        }
        if self.l1_entries > MAX_L1 {
            return Err(format!("its L1 table has {} entries, above {MAX_L1}", self.l1_entries));
        }
        if u64::from(self.l1_entries) < self.l1_needed() {
            return Err(format!(
                "its L1 table has {} entries; a disk of {} bytes needs {}",
                self.l1_entries,
                self.size,
                self.l1_needed()
            ));
        }
        let reftable = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable == 0 || reftable > MAX_REFTABLE {
            return Err(format!("its refcount table has {reftable} bytes"));
        }
        let l1 = u64::from(self.l1_entries) * 8;
        let file_len = file_len.next_multiple_of(self.cluster_size());
        for (what, offset, len) in
            [("L1", self.l1_offset, l1), ("refcount", self.reftable_offset, reftable)]
        {
            let end = offset.checked_add(len);
            let in_file = end.is_some_and(|end| end <= file_len);
            if offset == 0 || !offset.is_multiple_of(self.cluster_size()) || !in_file {
                return Err(format!("its {what} table is not where one can be, at {offset:#x}"));
            }
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries that the L1 table needs for a disk of this size.
    fn l1_needed(&self) -> u64 {
        l1_needed(self.size, self.cluster_bits)
    }

    /// Whoever wrote it last has not closed it: refcounts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Somebody found that it contradicts itself.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Why this image cannot be a disk, if it cannot, as a clause about it; `write` if the disk is to be written.
    pub(super) fn refused(&self, write: bool) -> Option<String> {
        let other = self.incompatible & !(incompatible::EXTENDED_L2 * 2 - 1);
        Some(match self {
            _ if self.is_corrupt() => {
                "it is marked as corrupt; `qemu-img check -r all` may mend a copy of it".into()
            }
            Header { encryption: 1.., .. } => {
                "it is encrypted; `qemu-img convert` makes one that is not".into()
            }
            _ if self.incompatible & incompatible::DATA_FILE != 0 || self.data_file.is_some() => {
                let name = self.data_file.as_deref().unwrap_or("");
                format!(
                    "it has an external data file, {name:?}, which is not opened; \
                     `qemu-img convert` makes an image of one file"
                )
            }
            _ if self.incompatible & incompatible::COMPRESSION != 0 => {
                "it is compressed by another method than zlib; `qemu-img convert -o compression_type=zlib` \
                 makes one that is"
                    .into()
            }
            _ if self.incompatible & incompatible::EXTENDED_L2 != 0 => {
                "it has extended L2 entries; `qemu-img convert -o extended_l2=off` makes one without"
                    .into()
            }
            _ if other != 0 => format!("it has features that are not known, {other:#x}"),
            Header { snapshots: 1.., .. } if write => format!(
                "it has {} snapshots inside and can only be read; \
                 `qemu-img snapshot -d` deletes one, `qemu-img convert` makes an image without",
                self.snapshots
            ),
            _ => return None,
        })
    }
}

/// Entries that the L1 table of a disk of `size` bytes needs.
pub(super) fn l1_needed(size: u64, cluster_bits: u32) -> u64 {
    size.div_ceil(1 << (2 * cluster_bits - 3))
}

/// The name of the backing file, and where it is.
fn backing_name(first: &[u8]) -> Result<Option<(Range<usize>, String)>, String> {
    let (offset, len) = (be64(first, 8), be32(first, 16));
    if offset == 0 {
        return Ok(None);
    }
    if len == 0 || len > MAX_NAME {
        return Err(format!("the name of its backing file has {len} bytes"));
    }
    let name = usize::try_from(offset)
        .ok()
        .and_then(|start| Some(start..start.checked_add(len as usize)?))
        .and_then(|range| Some((range.clone(), first.get(range)?)));
    let (range, name) = name.ok_or("the name of its backing file is not in its first cluster")?;
    let name = String::from_utf8(name.to_vec())
        .map_err(|_| "the name of its backing file is not UTF-8")?;
    Ok(Some((range, name)))
}
