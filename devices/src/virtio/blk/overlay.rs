//! A disk that stands on another: what is written goes into a sparse file of its own, the overlay; what was
//! not written is read from the file below, the base, which may be an overlay itself.
//!
//! - this file: a chain of files as one disk, and which of them has each block;
//! - [`bitmap`]: which blocks the top has;
//! - [`format`]: header and note of an overlay's file;
//! - [`make`], [`open`], [`describe`]: making, opening and looking at the files of a chain;
//! - [`sync`]: what of the bitmap is on the disk, and when it may be;
//! - [`freeze`]: an overlay that becomes the base of others while its machine goes on;
//! - [`fold`]: making one file of several.
//!
//! What a queue does with it is the worker's business (`cow`).
//!
//! ```text
//!   read  ──> owners[block] ──┬──> overlay  (the top: the only file that is written)
//!   write ──> top, and then   ├──> overlay, frozen
//!             owners[block]   └──> raw file or block device
//! ```

mod bitmap;
mod describe;
mod fold;
mod format;
mod freeze;
mod make;
mod open;
mod sync;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

pub use describe::{Described, LayerInfo, describe};
pub use fold::{Progress, commit, flatten};
pub use format::{BaseRef, DEEPEST, FormatError, Header, Id, VERSION};
pub use freeze::{Base, Frozen, MOST_LAYERS, Way, freeze};
pub(super) use freeze::{absolute, run_to_absorb};
pub use make::{BaseFormat, create, looks_like_overlay};
pub(super) use make::{aside, seen_from, settle};
pub(super) use open::folder_of;

pub use format::BLOCK;
pub(super) use sync::Bits;

use super::OpenError;
use super::qcow2::Qcow2Error;
use bitmap::{Bitmap, zeroed};
pub(super) use format::Note;
use format::PAGE;

/// Why an overlay cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A file cannot be opened, measured or locked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no overlay, or not whole.
    #[error("{} cannot be used as an overlay", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: FormatError,
    },
    /// A file cannot be read or written.
    #[error("cannot {verb} {}", path.display())]
    File {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The base has another length than it had.
    #[error("{} has {found} bytes; it had {expected} when {} was made over it", path.display(), overlay.display())]
    BaseLength {
        /// The base.
        path: PathBuf,
        /// What stands on it.
        overlay: PathBuf,
        /// Its length.
        found: u64,
        /// Its length then.
        expected: u64,
    },
    /// The base was written.
    #[error("{} was written after {} was made over it, whose contents would be a mixture", path.display(), overlay.display())]
    BaseWritten {
        /// The base.
        path: PathBuf,
        /// What stands on it.
        overlay: PathBuf,
    },
    /// The base is another overlay.
    #[error("{} is another overlay than the one that {} was made over", path.display(), overlay.display())]
    OtherBase {
        /// The base.
        path: PathBuf,
        /// What stands on it.
        overlay: PathBuf,
    },
    /// An overlay was named with a base that is not its own.
    #[error("{} stands on {}, not on {}", overlay.display(), path.display(), named.display())]
    NotItsBase {
        /// The overlay.
        overlay: PathBuf,
        /// Its base.
        path: PathBuf,
        /// The base that was named.
        named: PathBuf,
    },
    /// Too many files.
    #[error("{} stands on {DEEPEST} files already; fold some by `hull disk commit`", .0.display())]
    Deep(PathBuf),
    /// What is to be a raw base looks like an overlay. A guest can make its disk look so.
    #[error("{} looks like an overlay, and was not said to be one", .0.display())]
    Ambiguous(PathBuf),
    /// An image cannot be opened.
    #[error(transparent)]
    Image(#[from] Qcow2Error),
    /// There is a file already.
    #[error("{} is there already", .0.display())]
    Exists(PathBuf),
    /// The disk cannot be part of a chain.
    #[error("{} cannot have an overlay: {reason}", path.display())]
    Unfit {
        /// The disk.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// One file of a chain.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    file: Arc<File>,
    path: PathBuf,
    /// Where block 0 is.
    start: u64,
    /// Of an overlay.
    header: Option<Header>,
    /// Names what its second bitmap tells.
    stamp: Id,
    /// Parts of it may not be on the disk.
    unsynced: bool,
}

/// Which file of a chain has each block, by its place in the chain: one look, however long the chain is. Blocks
/// that the lowest file has cost no memory.
struct Owners(Box<[AtomicU8]>);

impl std::fmt::Debug for Owners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} blocks", self.0.len())
    }
}

impl Owners {
    /// All blocks are the lowest file's.
    fn new(blocks: u64) -> io::Result<Owners> {
        zeroed(blocks).map(Owners)
    }

    fn get(&self, block: u64) -> u8 {
        self.0.get(block as usize).map_or(0, |owner| owner.load(Ordering::Relaxed))
    }

    fn set(&self, block: u64, owner: u8) {
        if let Some(slot) = self.0.get(block as usize) {
            slot.store(owner, Ordering::Relaxed);
        }
    }

    /// Blocks from `first` up to `end` that have the same owner as `first`.
    fn run(&self, first: u64, end: u64) -> u64 {
        let blocks = self.0.get(first as usize..end as usize).unwrap_or_default();
        let owner = self.get(first);
        let same = blocks.iter().take_while(|slot| slot.load(Ordering::Relaxed) == owner);
        (same.count() as u64).max(1)
    }
}

/// What a look at a block needs of its file. All of a chain are a few cache lines; what a [`Layer`] has is not.
#[derive(Clone, Copy, Debug)]
struct Spot {
    fd: RawFd,
    /// Where block 0 is.
    start: u64,
}

impl Spot {
    /// Of each file.
    fn of(layers: &[Layer]) -> Box<[Spot]> {
        layers.iter().map(|layer| Spot { fd: layer.file.as_raw_fd(), start: layer.start }).collect()
    }
}

/// Where bytes of a disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) fd: RawFd,
    pub(super) offset: u64,
    /// So many bytes are there in a row.
    pub(super) len: u64,
}

/// An open, locked chain of files. The top can be written, unless it was opened read-only.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    header: Header,
    /// The lowest first.
    layers: Vec<Layer>,
    spots: Box<[Spot]>,
    owners: Arc<Owners>,
    read_only: bool,
    direct: bool,
    block_size: u32,
    /// Blocks that the top has.
    bitmap: Bitmap,
    /// Something was written since the top was synced.
    written: AtomicBool,
    /// All that is below is on the disk.
    base_synced: AtomicBool,
    /// That the second bitmap cannot be written was said.
    complained: AtomicBool,
    /// This start of the host, if it is known: the second bitmap holds in it, and the file's note says so.
    boot: Option<Id>,
    /// Names what the second bitmap tells.
    stamp: Id,
    /// Somebody began to fold it into its base, and did not come to the end.
    committing: bool,
    /// What the note says of the files below.
    vouched: Vec<Id>,
    /// The folder that the top was just made in.
    folder: Option<Arc<File>>,
}

impl Overlay {
    /// Length of the disk in bytes.
    pub fn len(&self) -> u64 {
        self.header.size
    }

    /// Never true: a disk has at least one sector.
    pub fn is_empty(&self) -> bool {
        self.header.size == 0
    }

    /// Smallest unit of a transfer in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Nothing is ever written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Transfers go past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Where the top is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The top's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Files of the chain, the top included.
    pub fn depth(&self) -> usize {
        self.layers.len()
    }

    /// Blocks that the top has.
    pub fn allocated(&self) -> u64 {
        self.bitmap.count()
    }

    /// Place of the top in the chain.
    fn top(&self) -> u8 {
        // A chain has at most DEEPEST files.
        self.layers.len().saturating_sub(1) as u8
    }

    fn top_layer(&self) -> &Layer {
        // A chain has a base and a top.
        &self.layers[self.layers.len() - 1]
    }

    pub(super) fn fd(&self) -> RawFd {
        self.top_layer().file.as_raw_fd()
    }

    /// Where the top has what is at `offset` of the disk.
    pub(super) fn in_top(&self, offset: u64) -> u64 {
        self.top_layer().start + offset
    }

    /// Where the bytes from `offset` on are, at most `len` of them, and as many as are in a row.
    pub(super) fn place(&self, offset: u64, len: u64) -> Place {
        let (first, end) = (offset / BLOCK, (offset + len).div_ceil(BLOCK));
        let row = match end - first {
            0 | 1 => len,
            _ => ((first + self.owners.run(first, end)) * BLOCK - offset).min(len),
        };
        let spot = self.spots[usize::from(self.owners.get(first)).min(self.spots.len() - 1)];
        Place { fd: spot.fd, offset: spot.start + offset, len: row }
    }

    /// The top has this block.
    pub(super) fn has(&self, block: u64) -> bool {
        self.owners.get(block) == self.top()
    }

    /// The top has all of these blocks.
    pub(super) fn has_all(&self, mut blocks: std::ops::Range<u64>) -> bool {
        blocks.all(|block| self.has(block))
    }

    /// The top has these blocks from now on: their data is in its file.
    pub(super) fn own(&self, blocks: std::ops::Range<u64>) {
        let top = self.top();
        for block in blocks {
            if self.owners.get(block) != top {
                self.owners.set(block, top);
                self.bitmap.add(block);
            }
        }
    }

    /// The top is about to be synced.
    pub(super) fn is_being_synced(&self) {
        self.written.store(false, Ordering::Relaxed);
    }

    /// Something was written to the top.
    pub(super) fn wrote(&self) {
        self.written.store(true, Ordering::Relaxed);
    }
}
