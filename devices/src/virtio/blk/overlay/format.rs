//! What an overlay's file says of itself: the header, which never changes, and the note, which does.
//! docs/disks.md describes both byte by byte. Everything here is bytes in, values out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::virtio::blk::SECTOR;

/// Bytes of a page of the file: the header is one, so is the note, and the bitmaps are whole pages.
pub(super) const PAGE: usize = 4096;
/// Bytes of a block, the unit of what an overlay has.
pub const BLOCK: u64 = 4096;
/// Blocks that a page of a bitmap tells of.
pub(super) const BLOCKS_PER_PAGE: u64 = PAGE as u64 * 8;
/// Where the note is.
pub(super) const NOTE_START: u64 = PAGE as u64;
/// Where the bitmap is.
pub(super) const BITMAP_START: u64 = 2 * PAGE as u64;
/// What the start of the data is a multiple of in a new file. The page cache keeps what is written together in pages of up
/// to that length, as it does with a raw disk, if it is aligned alike; from another start it has more and smaller ones.
const DATA_ALIGNMENT: u64 = 1 << 20;
/// The version that this code reads and writes.
pub const VERSION: u32 = 1;
/// Most files of a chain, the lowest included.
pub const DEEPEST: usize = 64;
/// Most bytes of a disk.
const LARGEST: u64 = 64 << 40;

const MAGIC: [u8; 8] = *b"HULLOVL\0";
const NOTE_MAGIC: [u8; 8] = *b"HULLNOT\0";
const SUM_LEN: usize = 32;
/// Behind magic, version and checksum.
const FIELDS: usize = 12 + SUM_LEN;
const FLAG_BASE_IS_OVERLAY: u32 = 1;
const FLAG_COMMITTING: u32 = 1;
/// Longest path of a base in bytes.
pub(super) const LONGEST_PATH: usize = 3072;

/// Sixteen bytes that nobody else has, or that name one start of a host.
pub type Id = [u8; 16];

/// What is not known, or not there.
pub(super) const NO_ID: Id = [0; 16];

/// Why bytes are no overlay.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are others.
    #[error("it is not an overlay")]
    Magic,
    /// Written by a later Hull.
    #[error("it has version {0} of the format; this Hull knows version {VERSION}")]
    Version(u32),
    /// The file ends too early.
    #[error("it is cut off: it has {found} bytes of {expected}")]
    Truncated {
        /// Its length.
        found: u64,
        /// The length it was made with.
        expected: u64,
    },
    /// The header is not what was written.
    #[error("it is damaged: its header has another checksum")]
    Checksum,
    /// The header contradicts itself.
    #[error("it is damaged: {0}")]
    Invalid(&'static str),
}

/// What an overlay stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseRef {
    /// Where it is; a relative path starts at the overlay's folder.
    pub path: PathBuf,
    /// It is an overlay itself, with this id.
    pub overlay: Option<Id>,
    /// Its length in bytes.
    pub len: u64,
    /// When it was written last, in nanoseconds since 1970.
    pub modified_ns: u64,
    /// The start of the host in which it may not have been on the disk yet, if it may not.
    pub unsynced: Option<Id>,
}

/// The header of an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which overlay this is.
    pub id: Id,
    /// Bytes of the disk.
    pub size: u64,
    /// Files below this one.
    pub depth: u32,
    /// What it stands on.
    pub base: BaseRef,
    /// Where block 0 is.
    data_start: u64,
}

impl Header {
    /// Of a new file.
    pub(super) fn new(id: Id, size: u64, depth: u32, base: BaseRef) -> Header {
        let mut header = Header { id, size, depth, base, data_start: 0 };
        header.data_start = header.bitmaps_end().next_multiple_of(DATA_ALIGNMENT);
        header
    }

    /// Blocks of the disk; the last may be cut short.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Pages of the bitmap.
    pub(super) fn bitmap_pages(&self) -> u64 {
        self.blocks().div_ceil(BLOCKS_PER_PAGE)
    }

    /// Where the second bitmap is: of what is not known to be on the disk.
    pub(super) fn noted_start(&self) -> u64 {
        BITMAP_START + self.bitmap_pages() * PAGE as u64
    }

    /// Where block 0 is.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    fn bitmaps_end(&self) -> u64 {
        self.noted_start() + self.bitmap_pages() * PAGE as u64
    }

    /// Length of the file.
    pub fn file_len(&self) -> u64 {
        self.data_start() + self.size
    }

    /// The header as it is in the file.
    ///
    /// # Errors
    /// It is none that [`Header::parse`] would take.
    pub(super) fn to_page(&self) -> Result<Box<[u8; PAGE]>, FormatError> {
        let mut page = Box::new([0; PAGE]);
        let path = self.base.path.as_os_str().as_bytes();
        let mut writer = Writer { page: &mut page, at: FIELDS };
        writer.put(&self.id);
        writer.put(&self.size.to_le_bytes());
        writer.put(&(BLOCK as u32).to_le_bytes());
        writer.put(&self.depth.to_le_bytes());
        writer.put(&self.data_start().to_le_bytes());
        let flags = if self.base.overlay.is_some() { FLAG_BASE_IS_OVERLAY } else { 0 };
        writer.put(&flags.to_le_bytes());
        writer.put(&self.base.overlay.unwrap_or(NO_ID));
        writer.put(&self.base.len.to_le_bytes());
        writer.put(&self.base.modified_ns.to_le_bytes());
        writer.put(&self.base.unsynced.unwrap_or(NO_ID));
        writer.put(&(path.len() as u32).to_le_bytes());
        self.check(path)?;
        writer.put(path);
        seal(&mut page, MAGIC);
        Ok(page)
    }

    /// Reads the first page of a file of `len` bytes.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn parse(page: &[u8], len: u64) -> Result<Header, FormatError> {
        if page.get(..MAGIC.len()) != Some(&MAGIC) {
            return Err(FormatError::Magic);
        }
        let page: &[u8; PAGE] = page
            .first_chunk()
            .ok_or(FormatError::Truncated { found: len, expected: PAGE as u64 })?;
        let version = u32::from_le_bytes([8, 9, 10, 11].map(|at| page[at]));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        if !is_sealed(page) {
            return Err(FormatError::Checksum);
        }
        let mut reader = Reader { page, at: FIELDS };
        let (id, size) = (reader.id(), reader.long());
        let (block, depth, data_start) = (reader.word(), reader.word(), reader.long());
        let (flags, base_id) = (reader.word(), reader.id());
        let (base_len, modified_ns, unsynced) = (reader.long(), reader.long(), reader.id());
        let path_len = reader.word() as usize;
        let path = page.get(reader.at..).and_then(|rest| rest.get(..path_len));
        let path = path.ok_or(FormatError::Invalid("the path of its base has no end"))?;
        if u64::from(block) != BLOCK {
            return Err(FormatError::Invalid("its blocks have another size"));
        }
        if flags & !FLAG_BASE_IS_OVERLAY != 0 {
            return Err(FormatError::Invalid("it has unknown flags"));
        }
        let header = Header {
            id,
            size,
            depth,
            base: BaseRef {
                path: PathBuf::from(OsStr::from_bytes(path)),
                overlay: (flags & FLAG_BASE_IS_OVERLAY != 0).then_some(base_id),
                len: base_len,
                modified_ns,
                unsynced: Some(unsynced).filter(|id| *id != NO_ID),
            },
            data_start,
        };
        header.check(path)?;
        if len < header.file_len() {
            return Err(FormatError::Truncated { found: len, expected: header.file_len() });
        }
        Ok(header)
    }

    fn check(&self, path: &[u8]) -> Result<(), FormatError> {
        if self.size == 0 || !self.size.is_multiple_of(SECTOR) || self.size > LARGEST {
            return Err(FormatError::Invalid("no disk has this size"));
        }
        if !(1..DEEPEST as u32).contains(&self.depth) {
            return Err(FormatError::Invalid("it stands on too many files"));
        }
        if (self.depth > 1) != self.base.overlay.is_some() {
            return Err(FormatError::Invalid("what it stands on is not as deep as it says"));
        }
        if path.is_empty() || path.len() > LONGEST_PATH || path.contains(&0) {
            return Err(FormatError::Invalid("the path of its base is none"));
        }
        let is_page = self.data_start.is_multiple_of(PAGE as u64);
        if !is_page || !(self.bitmaps_end()..=LARGEST).contains(&self.data_start) {
            return Err(FormatError::Invalid("its data start where they cannot"));
        }
        Ok(())
    }
}

/// What changes beside the data: what is in the page cache only, and what is known of the base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::virtio::blk) struct Note {
    /// The start of the host in which the second bitmap holds; in another, what it tells of may never have
    /// reached the disk.
    pub(in crate::virtio::blk) boot: Option<Id>,
    /// Names what the second bitmap tells.
    pub(in crate::virtio::blk) stamp: Id,
    /// Stamps of files below, of which all is on the disk, the second bitmap included.
    pub(in crate::virtio::blk) synced: Vec<Id>,
    /// This is being folded into its base, which changes by it.
    pub(in crate::virtio::blk) committing: bool,
}

impl Note {
    pub(in crate::virtio::blk) fn to_page(&self) -> Box<[u8; PAGE]> {
        let mut page = Box::new([0; PAGE]);
        let mut writer = Writer { page: &mut page, at: FIELDS };
        writer.put(&self.boot.unwrap_or(NO_ID));
        writer.put(&self.stamp);
        let flags = if self.committing { FLAG_COMMITTING } else { 0 };
        writer.put(&flags.to_le_bytes());
        let synced = &self.synced[..self.synced.len().min(DEEPEST)];
        writer.put(&(synced.len() as u32).to_le_bytes());
        for id in synced {
            writer.put(id);
        }
        seal(&mut page, NOTE_MAGIC);
        page
    }

    /// Nothing is noted in a page that is not whole.
    pub(in crate::virtio::blk) fn parse(page: &[u8]) -> Note {
        let Some(page) = page.first_chunk::<PAGE>() else { return Note::default() };
        if page[..NOTE_MAGIC.len()] != NOTE_MAGIC || !is_sealed(page) {
            return Note::default();
        }
        let mut reader = Reader { page, at: FIELDS };
        let (boot, stamp) = (reader.id(), reader.id());
        let (flags, count) = (reader.word(), reader.word() as usize);
        let synced = (0..count.min(DEEPEST)).map(|_| reader.id()).collect();
        Note {
            boot: Some(boot).filter(|id| *id != NO_ID),
            stamp,
            synced,
            committing: flags & FLAG_COMMITTING != 0,
        }
    }
}

/// Adds magic, version and checksum.
fn seal(page: &mut [u8; PAGE], magic: [u8; 8]) {
    page[..8].copy_from_slice(&magic);
    page[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let sum = sum(page);
    page[12..FIELDS].copy_from_slice(&sum);
}

fn is_sealed(page: &[u8; PAGE]) -> bool {
    page[12..FIELDS] == sum(page)
}

/// Of everything but the checksum itself.
fn sum(page: &[u8; PAGE]) -> [u8; SUM_LEN] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&page[..12]).update(&page[FIELDS..]);
    *hasher.finalize().as_bytes()
}

struct Writer<'a> {
    page: &'a mut [u8; PAGE],
    at: usize,
}

impl Writer<'_> {
    /// Bytes that do not fit are left out; what is written here always fits.
    fn put(&mut self, bytes: &[u8]) {
        if let Some(room) = self.page.get_mut(self.at..self.at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
        self.at += bytes.len();
    }
}

struct Reader<'a> {
    page: &'a [u8; PAGE],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let bytes = self.page.get(self.at..).and_then(|rest| rest.first_chunk());
        self.at += N;
        bytes.copied().unwrap_or([0; N])
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn id(&mut self) -> Id {
        self.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        let base = BaseRef {
            path: "../base.ovl".into(),
            overlay: Some([9; 16]),
            len: 4711,
            modified_ns: 1 << 60,
            unsynced: Some([1; 16]),
        };
        Header::new([7; 16], (1 << 30) + 512, 2, base)
    }

    #[test]
    fn what_is_written_is_read() {
        let header = header();
        let page = header.to_page().unwrap();
        assert_eq!(Header::parse(&page[..], header.file_len()), Ok(header.clone()));
        assert_eq!(header.data_start() % DATA_ALIGNMENT, 0);
        let found = header.file_len() - 1;
        let expected = header.file_len();
        assert_eq!(
            Header::parse(&page[..], found),
            Err(FormatError::Truncated { found, expected })
        );
        let note = Note {
            boot: Some([3; 16]),
            stamp: [4; 16],
            synced: vec![[5; 16], [6; 16]],
            committing: true,
        };
        assert_eq!(Note::parse(&note.to_page()[..]), note);
        assert_eq!(Note::parse(&[0; PAGE]), Note::default());
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        let mut page = header().to_page().unwrap();
        page[8] = 2;
        assert_eq!(Header::parse(&page[..], 1 << 40), Err(FormatError::Version(2)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let cases: [fn(&mut Header); 9] = [
            |header| header.size = 0,
            |header| header.size = 513,
            |header| header.size = LARGEST + SECTOR,
            |header| header.depth = 0,
            |header| header.depth = DEEPEST as u32,
            |header| header.base.path = "".into(),
            |header| header.data_start = header.bitmaps_end() - PAGE as u64,
            |header| header.data_start += 512,
            |header| header.data_start = 0_u64.wrapping_sub(PAGE as u64),
        ];
        for change in cases {
            let mut header = header();
            change(&mut header);
            assert!(header.to_page().is_err(), "{header:?}");
        }
    }

    #[test]
    fn data_may_start_anywhere_behind_the_bitmaps() {
        let mut header = header();
        header.data_start = header.bitmaps_end().next_multiple_of(64 << 10);
        assert_ne!(header.data_start % DATA_ALIGNMENT, 0);
        let page = header.to_page().unwrap();
        assert_eq!(Header::parse(&page[..], header.file_len()), Ok(header));
    }

    proptest! {
        #[test]
        fn each_bit_counts(bit in 0..PAGE * 8) {
            let mut page = header().to_page().unwrap();
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::parse(&page[..], 1 << 40).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), len: u64, seal_it: bool)
        {
            let mut page = [0; PAGE];
            page[..bytes.len()].copy_from_slice(&bytes);
            if seal_it {
                seal(&mut page, MAGIC);
            }
            if let Ok(header) = Header::parse(&page, len) {
                prop_assert!(header.file_len() <= len);
            }
            let _ = Header::parse(&bytes, len);
            seal(&mut page, NOTE_MAGIC);
            let _ = Note::parse(&page);
        }
    }
}
