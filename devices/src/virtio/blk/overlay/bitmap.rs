//! Which blocks the top has, as bits, and what is to be done for each page of them.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::format::{BLOCKS_PER_PAGE, PAGE};

/// The page has bits that are not on the disk.
pub(super) const UNSAVED: u8 = 1;
/// The page has bits that are not in the second bitmap.
pub(super) const UNNOTED: u8 = 2;

/// A page that O_DIRECT takes.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(super) struct Aligned(pub(super) [u8; PAGE]);

/// The bits of the top, as its file has them. Pages that nothing was written to cost no memory.
pub(super) struct Bitmap {
    bits: Box<[AtomicU8]>,
    /// What is to be done for each page.
    pages: Box<[AtomicU8]>,
    /// Bits that are set.
    count: AtomicU64,
    /// Some page is [`UNNOTED`].
    unnoted: AtomicBool,
}

impl std::fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} blocks", self.count())
    }
}

impl Bitmap {
    /// With so many pages, and no bit set.
    pub(super) fn new(pages: u64) -> io::Result<Bitmap> {
        Ok(Bitmap {
            bits: zeroed(pages.saturating_mul(PAGE as u64))?,
            pages: zeroed(pages)?,
            count: AtomicU64::new(0),
            unnoted: AtomicBool::new(false),
        })
    }

    /// Bits that are set.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Sets the bit of a block that the file is known to have.
    pub(super) fn load(&self, block: u64) {
        self.set(block);
    }

    /// Sets the bit of a block that is new.
    pub(super) fn add(&self, block: u64) {
        if self.set(block)
            && let Some(page) = self.pages.get((block / BLOCKS_PER_PAGE) as usize)
        {
            page.fetch_or(UNSAVED | UNNOTED, Ordering::Relaxed);
            self.unnoted.store(true, Ordering::Relaxed);
        }
    }

    fn set(&self, block: u64) -> bool {
        let mask = 1 << (block % 8);
        let byte = self.bits.get((block / 8) as usize);
        let is_new = byte.is_some_and(|bits| bits.fetch_or(mask, Ordering::Relaxed) & mask == 0);
        self.count.fetch_add(is_new.into(), Ordering::Relaxed);
        is_new
    }

    /// Marks a page.
    pub(super) fn mark(&self, page: usize, flag: u8) {
        self.pages[page].fetch_or(flag, Ordering::Relaxed);
        if flag & UNNOTED != 0 {
            self.unnoted.store(true, Ordering::Relaxed);
        }
    }

    /// Marks each page that has a bit.
    pub(super) fn mark_all(&self, flag: u8) {
        for page in 0..self.pages.len() {
            if self.in_page(page).iter().any(|bits| bits.load(Ordering::Relaxed) != 0) {
                self.mark(page, flag);
            }
        }
    }

    /// True if some page is marked so.
    pub(super) fn has(&self, flag: u8) -> bool {
        self.pages.iter().any(|flags| flags.load(Ordering::Relaxed) & flag != 0)
    }

    /// True if some page is [`UNNOTED`], without a look at each.
    pub(super) fn has_unnoted(&self) -> bool {
        self.unnoted.load(Ordering::Relaxed)
    }

    /// The pages that are marked so, with their bits as they are now. They are not marked any more.
    pub(super) fn take(&self, flag: u8) -> impl Iterator<Item = (usize, Box<Aligned>)> {
        if flag & UNNOTED != 0 {
            self.unnoted.store(false, Ordering::Relaxed);
        }
        let marked = move |flags: &AtomicU8| {
            // Most are not, and a page that is only read stays shared among processors.
            flags.load(Ordering::Relaxed) & flag != 0
                && flags.fetch_and(!flag, Ordering::Relaxed) & flag != 0
        };
        let pages = self.pages.iter().enumerate().filter(move |(_, flags)| marked(flags));
        pages.map(|(page, _)| (page, self.copy(page)))
    }

    fn copy(&self, page: usize) -> Box<Aligned> {
        let mut copy = Box::new(Aligned([0; PAGE]));
        for (byte, bits) in copy.0.iter_mut().zip(self.in_page(page)) {
            *byte = bits.load(Ordering::Relaxed);
        }
        copy
    }

    fn in_page(&self, page: usize) -> &[AtomicU8] {
        self.bits.get(page * PAGE..(page + 1) * PAGE).unwrap_or_default()
    }
}

/// So many zeroes, which cost no memory until they are written.
pub(super) fn zeroed(len: u64) -> io::Result<Box<[AtomicU8]>> {
    let out = || io::Error::from(io::ErrorKind::OutOfMemory);
    let len = usize::try_from(len).map_err(|_| out())?;
    let layout = std::alloc::Layout::array::<AtomicU8>(len).map_err(|_| out())?;
    if len == 0 {
        return Ok(Box::default());
    }
    // SAFETY: the layout has a length above 0; zeroes are valid atomics; the slice is of just this
    // allocation, which a box of this type frees by the same layout.
    unsafe {
        let bytes = std::alloc::alloc_zeroed(layout).cast::<AtomicU8>();
        if bytes.is_null() {
            return Err(out());
        }
        Ok(Box::from_raw(std::ptr::slice_from_raw_parts_mut(bytes, len)))
    }
}
