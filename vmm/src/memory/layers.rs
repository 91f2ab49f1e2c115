//! Immutable layers of RAM, and what they come to together.
//!
//! ```text
//!   private pages      what the guest wrote since          (the mapping itself)
//!   layer n            pages that were frozen last         (a memfd)
//!   …
//!   layer 1            a diff                              (a file)
//!   layer 0            a full snapshot, or a kernel        (a file)
//!   nothing            zeroes
//! ```
//!
//! A page is what the highest layer that has it says. Pages of RAM are numbered through all its ranges;
//! a memory file has page n at n times the page size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::PAGE_SIZE;
use super::runs::Runs;

/// Holes that are smaller than this many pages are taken for data: each mapping costs some microseconds.
const SMALL_HOLE: u64 = (256 << 10) / PAGE_SIZE;
/// Most extents of one file; with more, what lies between counts as data as well.
const MOST_EXTENTS: usize = 2048;

/// Pages of RAM that are neighbours in a file too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first page of RAM.
    pub at: u64,
    /// Number of pages.
    pub len: u64,
    /// The first page of the file.
    pub from: u64,
}

/// A file that nobody changes, and the pages of RAM that it has.
#[derive(Clone, Debug)]
pub struct Layer {
    pub(super) file: Arc<File>,
    pub(super) extents: Vec<Extent>,
    /// Somebody may want to change the file: it is held under a lease, and given up then.
    pub(super) leased: bool,
}

impl Layer {
    /// The pages of a memory file.
    pub fn new(file: Arc<File>, pages: &Runs) -> Layer {
        let extent =
            |run: Range<u64>| Extent { at: run.start, len: run.end - run.start, from: run.start };
        Layer { file, extents: pages.iter().map(extent).collect(), leased: false }
    }

    /// What of a memory file is not a hole, or only a small one.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn of_data(file: Arc<File>) -> io::Result<Layer> {
        let pages = data(&file)?;
        Ok(Layer::new(file, &pages))
    }

    /// The file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// True if it has no page.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// True if somebody may want to change its file.
    pub fn is_leased(&self) -> bool {
        self.leased
    }

    /// Which pages it has and where, as bytes: their set ([`Runs::to_bytes`]) in front of which are 4 bytes with the
    /// length of that, and for each page range of RAM that is somewhere else in the file three numbers of 8
    /// bytes: all little-endian. A file with pages in their own places has only the first.
    pub fn to_bytes(&self) -> Vec<u8> {
        let pages = self.pages().to_bytes();
        let mut bytes = (pages.len() as u32).to_le_bytes().to_vec();
        bytes.extend(pages);
        if self.extents.iter().any(|extent| extent.at != extent.from) {
            for Extent { at, len, from } in &self.extents {
                [at, len, from].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
            }
        }
        bytes
    }

    /// From bytes. Nothing if they are none of a layer.
    pub fn from_bytes(file: Arc<File>, bytes: &[u8]) -> Option<Layer> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (pages, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        let layer = Layer::new(file, &Runs::from_bytes(pages)?);
        if rest.is_empty() {
            return Some(layer);
        }
        let (numbers, []) = rest.as_chunks::<8>() else { return None };
        let (extents, []) = numbers.as_chunks::<3>() else { return None };
        let extents: Vec<Extent> = extents
            .iter()
            .map(|numbers| numbers.map(u64::from_le_bytes))
            .map(|[at, len, from]| Extent { at, len, from })
            .collect();
        let fits = |extent: &Extent| {
            let ends = [extent.at, extent.from].map(|start| start.checked_add(extent.len));
            extent.len > 0 && ends.iter().all(Option::is_some)
        };
        if !extents.iter().all(fits) {
            return None;
        }
        let in_order = extents.is_sorted_by(|a, b| a.at + a.len <= b.at);
        let shifted = Layer { extents, ..layer };
        // They are two ways to say the same.
        (in_order && shifted.pages() == Runs::from_bytes(pages)?).then_some(shifted)
    }

    /// The pages that it has.
    pub fn pages(&self) -> Runs {
        Runs::new(self.extents.iter().map(|extent| extent.at..extent.at + extent.len))
    }
}

/// The pages of a file that have data, and small holes between them.
pub(super) fn data(file: &File) -> io::Result<Runs> {
    let seek = |from: u64, whence| -> io::Result<Option<u64>> {
        let from = libc::off_t::try_from(from).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: lseek has no memory arguments.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
        match u64::try_from(found) {
            Ok(found) => Ok(Some(found)),
            // There is no data behind this.
            Err(_) => match io::Error::last_os_error() {
                err if err.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                err => Err(err),
            },
        }
    };
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(start) = seek(at, libc::SEEK_DATA)? {
        let Some(end) = seek(start, libc::SEEK_HOLE)? else { break };
        let pages = start / PAGE_SIZE..end.div_ceil(PAGE_SIZE);
        let full = runs.len() >= MOST_EXTENTS;
        match runs.last_mut() {
            Some(last) if full || pages.start - last.end.min(pages.start) < SMALL_HOLE => {
                last.end = pages.end;
            }
            _ => runs.push(pages),
        }
        at = end;
    }
    Ok(Runs::new(runs))
}

/// Pages of RAM and where they are.
#[derive(Clone, Debug)]
pub struct Piece {
    /// The pages.
    pub extent: Extent,
    /// The file that has them.
    pub file: Arc<File>,
}

/// What RAM holds, as far as that lies in layers.
#[derive(Clone, Debug)]
pub struct Contents {
    pages: u64,
    pieces: Vec<Piece>,
}

impl Contents {
    /// What `layers`, of which the first is the lowest, come to in RAM of this many bytes.
    pub fn new<'a>(size: u64, layers: impl IntoIterator<Item = &'a Layer>) -> Contents {
        let pages = size / PAGE_SIZE;
        let mut map: BTreeMap<u64, Piece> = BTreeMap::new();
        for layer in layers {
            for extent in &layer.extents {
                let extent =
                    Extent { len: extent.len.min(pages.saturating_sub(extent.at)), ..*extent };
                if extent.len > 0 {
                    cut(&mut map, extent.at..extent.at + extent.len);
                    map.insert(extent.at, Piece { extent, file: Arc::clone(&layer.file) });
                }
            }
        }
        Contents { pages, pieces: map.into_values().collect() }
    }

    /// The same over other layers, of which the first is the lowest, in RAM of this many bytes.
    pub fn over(self, size: u64, below: &[Layer]) -> Contents {
        let one =
            |piece: Piece| Layer { file: piece.file, extents: vec![piece.extent], leased: false };
        let above: Vec<Layer> = self.pieces.into_iter().map(one).collect();
        Contents::new(size, below.iter().chain(&above))
    }

    /// Size of RAM in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The pieces, in order; what lies between is zero.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The parts of pieces that are in `range`.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + '_ {
        let Range { start, end: stop } = range;
        let end = |piece: &Piece| piece.extent.at + piece.extent.len;
        let first = self.pieces.partition_point(|piece| end(piece) <= start);
        let rest = self.pieces.get(first..).unwrap_or_default();
        let there = move |piece: &&Piece| piece.extent.at < stop && start < stop;
        rest.iter().take_while(there).map(move |piece| {
            let at = piece.extent.at.max(start);
            let len = end(piece).min(stop) - at;
            let from = piece.extent.from + (at - piece.extent.at);
            Piece { extent: Extent { at, len, from }, file: Arc::clone(&piece.file) }
        })
    }

    /// Reads one page. False if it is zero because no layer has it.
    ///
    /// # Errors
    /// The file cannot be read, or is too short.
    pub fn read_page(&self, page: u64, bytes: &mut [u8; PAGE_SIZE as usize]) -> io::Result<bool> {
        match self.within(page..page + 1).next() {
            Some(piece) => {
                piece.file.read_exact_at(bytes, piece.extent.from * PAGE_SIZE)?;
                Ok(true)
            }
            None => {
                bytes.fill(0);
                Ok(false)
            }
        }
    }
}

/// Takes `range` out of the pieces.
fn cut(map: &mut BTreeMap<u64, Piece>, range: Range<u64>) {
    let before = map.range(..range.start).next_back().map(|(_, piece)| piece.clone());
    if let Some(piece) = before {
        let end = piece.extent.at + piece.extent.len;
        if end > range.start {
            if let Some(left) = map.get_mut(&piece.extent.at) {
                left.extent.len = range.start - piece.extent.at;
            }
            keep_end(map, &piece, range.end);
        }
    }
    let inside: Vec<u64> = map.range(range.clone()).map(|(&at, _)| at).collect();
    for at in inside {
        if let Some(piece) = map.remove(&at) {
            keep_end(map, &piece, range.end);
        }
    }
}

/// Puts back what `piece` has from `start`.
fn keep_end(map: &mut BTreeMap<u64, Piece>, piece: &Piece, start: u64) {
    let Extent { at, len, from } = piece.extent;
    if at + len > start {
        let extent = Extent { at: start, len: at + len - start, from: from + (start - at) };
        map.insert(start, Piece { extent, file: Arc::clone(&piece.file) });
    }
}

impl Layer {
    /// Takes pages out of it that nobody looks for here any more.
    pub(super) fn cover(&mut self, pages: &Runs) {
        if self.extents.iter().all(|extent| extent.at == extent.from) {
            let rest = self.pages().without(pages);
            *self = Layer { leased: self.leased, ..Layer::new(Arc::clone(&self.file), &rest) };
        } else {
            pages.iter().for_each(|run| self.remove(run));
        }
    }

    /// Takes pages out of it.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        let mut kept = Vec::with_capacity(self.extents.len() + 1);
        for extent in &self.extents {
            let end = extent.at + extent.len;
            if extent.at < range.start {
                kept.push(Extent { len: end.min(range.start) - extent.at, ..*extent });
            }
            if end > range.end {
                let at = extent.at.max(range.end);
                kept.push(Extent { at, len: end - at, from: extent.from + (at - extent.at) });
            }
        }
        self.extents = kept;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    /// A layer whose pages say which layer they are of, and which page.
    fn layer(number: u64, pages: &Runs, shift: u64) -> Layer {
        let file = tempfile::tempfile().unwrap();
        let mut layer = Layer::new(Arc::new(file), pages);
        for extent in &mut layer.extents {
            extent.from += shift;
            for n in 0..extent.len {
                let bytes = (number << 32 | (extent.at + n)).to_le_bytes();
                layer.file.write_all_at(&bytes, (extent.from + n) * PAGE_SIZE).unwrap();
            }
        }
        layer.file.set_len((PAGES + shift) * PAGE_SIZE).unwrap();
        layer
    }

    fn read(contents: &Contents, page: u64) -> u64 {
        let mut bytes = [0; PAGE_SIZE as usize];
        contents.read_page(page, &mut bytes).unwrap();
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    }

    fn runs() -> impl Strategy<Value = Runs> {
        prop::collection::btree_set(0u64..PAGES + 4, 0..30)
            .prop_map(|pages| Runs::new(pages.into_iter().map(|page| page..page + 1)))
    }

    proptest! {
        #[test]
        fn the_highest_layer_counts(
            sets in prop::collection::vec((runs(), 0u64..3), 0..5), from in 0u64..PAGES, len in 0u64..9)
        {
            let layers: Vec<Layer> =
                sets.iter().zip(1..).map(|((set, shift), n)| layer(n, set, *shift)).collect();
            let contents = Contents::new(PAGES * PAGE_SIZE, &layers);
            for page in 0..PAGES {
                let expected = sets.iter().rposition(|(set, _)| set.contains(page));
                let expected = expected.map_or(0, |n| (n as u64 + 1) << 32 | page);
                prop_assert_eq!(read(&contents, page), expected);
            }
            let mut last = 0;
            for piece in contents.pieces() {
                prop_assert!(piece.extent.len > 0 && piece.extent.at >= last);
                last = piece.extent.at + piece.extent.len;
            }
            prop_assert!(last <= PAGES);
            for piece in contents.within(from..from + len) {
                prop_assert!(piece.extent.at >= from && piece.extent.len > 0);
                prop_assert!(piece.extent.at + piece.extent.len <= from + len);
            }
        }

        #[test]
        fn bytes_bring_them_back(set in runs(), shift in 0u64..3, holes in runs()) {
            let mut layer = layer(1, &set, shift);
            layer.cover(&holes);
            let again = Layer::from_bytes(Arc::clone(&layer.file), &layer.to_bytes()).unwrap();
            prop_assert_eq!(again.extents, layer.extents);
        }

        #[test]
        fn other_bytes_do_no_harm(
            mut bytes in prop::collection::vec(any::<u8>(), 0..80), short in any::<bool>())
        {
            if short && bytes.len() > 4 {
                bytes[..4].copy_from_slice(&3u32.to_le_bytes());
            }
            if let Some(layer) = Layer::from_bytes(Arc::new(tempfile::tempfile().unwrap()), &bytes) {
                let contents = Contents::new(PAGES * PAGE_SIZE, [&layer]);
                prop_assert!(contents.pieces().len() <= layer.extents.len());
            }
        }

        #[test]
        fn pages_can_be_taken_out(set in runs(), from in 0u64..PAGES, len in 0u64..20) {
            let mut layer = layer(1, &set, 1);
            layer.remove(from..from + len);
            let contents = Contents::new(PAGES * PAGE_SIZE, [&layer]);
            for page in 0..PAGES {
                let there = set.contains(page) && !(from..from + len).contains(&page);
                prop_assert_eq!(read(&contents, page), if there { 1 << 32 | page } else { 0 });
            }
        }
    }

    #[test]
    fn what_is_far_apart_in_a_file_is_apart() {
        let file = tempfile::tempfile().unwrap();
        for page in [0u64, 3, 500, 900] {
            file.write_all_at(&[1], page * PAGE_SIZE).unwrap();
        }
        file.set_len(1000 * PAGE_SIZE).unwrap();
        let pages = data(&file).unwrap();
        assert_eq!(pages, Runs::new([0..4, 500..501, 900..901]));
    }
}
