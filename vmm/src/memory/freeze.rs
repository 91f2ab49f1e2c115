//! Making a layer of what the guest wrote.
//!
//! Pages that are private to this process are copied into a memfd of the machine's own, which is then
//! mapped copy-on-write in their place: the memory that they took is free, and what they held cannot
//! change any more, whatever the guest writes next. It takes about as long as copying them.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::layers::{Contents, Layer, data};
use super::mapping::Mapping;
use super::pagemap::{Kind, Pagemap};
use super::pager::Slot;
use super::runs::Runs;
use super::{PAGE_SIZE, Ranges};

/// Threads that copy.
const COPIERS: usize = 2;
/// Pages that one takes at a time.
const PIECE: u64 = (2 << 20) / PAGE_SIZE;
/// Most layers that are left as they are; with more, all but the lowest become one.
const MOST_LAYERS: usize = 32;
/// Pages that one looks at at a time.
const LOOK: u64 = (64 << 20) / PAGE_SIZE;
/// Most pieces that freezing makes of memory at once; with more, pages between are copied as well.
const MOST_MAPPINGS: usize = 4096;
/// Pages without anything in them that may lie between others which are mapped at once: a mapping costs each machine
/// some 10 us, and such a page nothing, unless somebody reads it.
const BRIDGE: u64 = 64;
/// Most pieces that memory is left in; with more, all layers but the lowest become one. Each is a mapping and what
/// lies between may be another, of which the kernel allows a process 65,530.
const MOST_PIECES: usize = 16_384;

const PAGE: usize = PAGE_SIZE as usize;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Layers of one machine's RAM.
#[derive(Debug, Default)]
pub(super) struct Stack {
    /// From elsewhere; the first is the lowest.
    pub(super) layers: Vec<Layer>,
    /// What was frozen here, above them all. Only freezing writes it.
    own: Option<Own>,
    /// Pages that were frozen since the last snapshot that was written.
    changed: Runs,
    /// All of RAM is in this file, which the guest writes: nothing was frozen yet.
    pub(super) live: Option<Arc<File>>,
}

#[derive(Debug)]
struct Own {
    file: Arc<File>,
    pages: Runs,
    /// It may have pages that are not among those: writing it failed once.
    is_torn: bool,
}

/// RAM of a machine as others go on from it.
#[derive(Clone, Debug)]
pub struct SharedRam {
    /// Its layers, the lowest first. Nobody changes them.
    pub layers: Vec<Layer>,
    /// Bytes that were copied for it.
    pub copied: u64,
}

/// RAM of a machine as somebody else sees who writes it out. It keeps the mappings.
#[derive(Clone, Debug)]
pub struct Image {
    pub(super) ranges: Ranges,
    pub(super) stack: Arc<Mutex<Stack>>,
    pub(super) pager: Slot,
    /// Pages cannot be replaced: they are from the host's pool of huge ones.
    pub(super) huge_pages: bool,
}

/// Maps a file that is as long as RAM in its place: what is written is in the file.
pub(super) fn share_all(ranges: &Ranges, file: &File) -> io::Result<()> {
    let mut first = 0;
    for (_, mapping) in ranges.iter() {
        let len = mapping.len() as u64;
        mapping.share_file(0, len, file, first)?;
        first += len;
    }
    Ok(())
}

/// A memfd of this many bytes that nothing can shorten or lengthen.
pub(super) fn memfd(size: u64) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"hull".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(size)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
    // SAFETY: fcntl with integer arguments.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A memfd with these bytes that nobody can change.
///
/// # Errors
/// The host has no memory for it.
pub fn sealed_copy(bytes: &[u8]) -> io::Result<File> {
    let file = memfd(bytes.len() as u64)?;
    file.write_all_at(bytes, 0)?;
    seal(&file)?;
    Ok(file)
}

/// Lets nobody write to a memfd any more (fcntl(2)).
fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: fcntl with integer arguments.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Does `work` for each of `items`, by [`COPIERS`] threads, each of which has a tool of its own. Results come
/// in no order.
pub fn shared_out<I: Sync, T: Send, W>(
    items: &[I],
    tool: impl Fn() -> W + Sync,
    work: impl Fn(&mut W, &I) -> io::Result<T> + Sync,
) -> io::Result<Vec<T>> {
    let next = AtomicUsize::new(0);
    let one = || -> io::Result<Vec<T>> {
        let (mut tool, mut done) = (tool(), Vec::new());
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push(work(&mut tool, item)?);
        }
        Ok(done)
    };
    // A thread costs as much as the copying of some pages.
    if items.len() < COPIERS * 2 {
        return one();
    }
    std::thread::scope(|scope| {
        // Where there is no thread to be had, one does it all.
        let start = |_| std::thread::Builder::new().spawn_scoped(scope, one).ok();
        let others: Vec<_> = (1..COPIERS).filter_map(start).collect();
        let mut all = one();
        for other in others {
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            all = all.and_then(|mut all| {
                all.extend(other?);
                Ok(all)
            });
        }
        all
    })
}

/// Makes pages of a mapping that begins with the `first` one zero.
fn clear(mapping: &Mapping, first: u64, pages: Range<u64>) -> io::Result<()> {
    if pages.is_empty() {
        return Ok(());
    }
    mapping.clear((pages.start - first) * PAGE_SIZE, (pages.end - pages.start) * PAGE_SIZE)
}

/// What several threads found, which each have theirs in order.
fn in_order(found: Vec<Vec<Range<u64>>>) -> Runs {
    let mut found: Vec<Range<u64>> = found.into_iter().flatten().collect();
    found.sort_unstable_by_key(|run| run.start);
    Runs::new(found)
}

impl Stack {
    pub(super) fn all(&self) -> impl Iterator<Item = Layer> + '_ {
        let own = self.own.as_ref().map(|own| Layer::new(Arc::clone(&own.file), &own.pages));
        self.layers.iter().cloned().chain(own)
    }

    /// The pages that layers have.
    fn covered(&self) -> Runs {
        self.all().fold(Runs::default(), |covered, layer| covered.union(&layer.pages()))
    }
}

impl Image {
    fn stack(&self) -> MutexGuard<'_, Stack> {
        // What a panic left behind is at most a layer that is mapped and not noted.
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size of RAM in bytes.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|(_, mapping)| mapping.len() as u64).sum()
    }

    /// Where pages are mapped: their address, and how many of them are there behind one another.
    pub(super) fn host(&self, page: u64) -> Option<(*mut u8, u64)> {
        let mut at = page.checked_mul(PAGE_SIZE)?;
        for (_, mapping) in self.ranges.iter() {
            let len = mapping.len() as u64;
            if at < len {
                return Some((mapping.as_ptr().wrapping_add(at as usize), (len - at) / PAGE_SIZE));
            }
            at -= len;
        }
        None
    }

    /// Makes all that RAM holds a matter of layers. The guest and its devices must be halted; afterwards
    /// they may go on, and what they write is not seen in [`Image::contents`]. Returns the number of pages
    /// that were copied.
    ///
    /// # Errors
    /// The host has no memory for it. RAM holds what it held, and what was done counts: it can be tried
    /// again.
    pub fn freeze(&self) -> io::Result<u64> {
        Ok(self.freeze_at_most(u64::MAX)?.unwrap_or_default())
    }

    fn freeze_at_most(&self, most: u64) -> io::Result<Option<u64>> {
        let mut stack = self.stack();
        if let Some(file) = stack.live.clone() {
            if self.size() / PAGE_SIZE > most {
                return Ok(None);
            }
            let pages = self.settle(&file)?;
            stack.live = None;
            stack.changed = pages.clone();
            stack.own = Some(Own { file, pages, is_torn: false });
            return Ok(Some(0));
        }
        if self.huge_pages {
            // They stay where they are, and so belong to the next layer too.
            stack.own = None;
        }
        // Where something lies below that is not known here, a zero counts as well.
        let unknown = self.huge_pages || self.is_lazy();
        let covered = if unknown { Runs::first(self.size() / PAGE_SIZE) } else { stack.covered() };
        let mut private = self.private(&covered)?;
        for leased in stack.layers.iter().filter(|layer| layer.leased) {
            // Nobody shall have to wait until all of it was written.
            private = private.union(&leased.pages());
        }
        if private.is_empty() {
            return Ok(Some(0));
        }
        let pieces: usize = stack.all().map(|layer| layer.extents.len()).sum();
        let too_many = stack.layers.len() > MOST_LAYERS || pieces + private.len() > MOST_PIECES;
        if too_many {
            let own = stack.own.iter().map(|own| own.pages.clone());
            let upper = stack.layers.iter().skip(1).map(Layer::pages).chain(own);
            private = upper.fold(private, |all, pages| all.union(&pages));
        }
        if private.pages() > most {
            return Ok(None);
        }
        let file = match &stack.own {
            Some(own) => Arc::clone(&own.file),
            None => Arc::new(memfd(self.size())?),
        };
        // What lies between need not be here yet, and must not be waited for.
        let most = if self.is_lazy() { MOST_PIECES } else { MOST_MAPPINGS };
        let private = private.coalesced(most);
        let was_torn = stack.own.as_ref().is_some_and(|own| own.is_torn);
        let bridge = if was_torn { 0 } else { BRIDGE };
        let pieces = private.bridged(bridge, &covered).pieces(PIECE);
        let done = Mutex::new(Vec::with_capacity(pieces.len()));
        let moved = shared_out(
            &pieces,
            || (),
            |(), piece| {
                self.replace(piece.clone(), &private, &file)?;
                done.lock().unwrap_or_else(PoisonError::into_inner).push(piece.clone());
                Ok(())
            },
        );
        let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.sort_unstable_by_key(|piece| piece.start);
        let done = Runs::new(done);
        let before = stack.own.take().map(|own| own.pages).unwrap_or_default();
        let is_torn = was_torn || moved.is_err();
        stack.own = Some(Own { file, pages: before.union(&done), is_torn });
        let copied = done.iter().flat_map(|piece| private.within(piece).collect::<Vec<_>>());
        stack.changed = stack.changed.union(&Runs::new(copied));
        moved?;
        stack.layers.retain(|layer| !layer.leased);
        if too_many {
            stack.layers.truncate(1);
        }
        Ok(Some(private.pages()))
    }

    /// Maps the file that RAM lies in copy-on-write from now on. Returns the pages that it has.
    fn settle(&self, file: &File) -> io::Result<Runs> {
        let pages = data(file)?;
        let mapped = self.map_private(file, &pages);
        if mapped.is_err() && share_all(&self.ranges, file).is_err() {
            // Parts of memory are in the file, and parts are not: what the guest writes next would be nowhere.
            tracing::error!(
                "the guest's memory can be mapped neither as it was nor as it is to be"
            );
            std::process::abort();
        }
        mapped.map(|()| pages)
    }

    fn map_private(&self, file: &File, pages: &Runs) -> io::Result<()> {
        let mut first = 0;
        for (_, mapping) in self.ranges.iter() {
            let range = first..first + mapping.len() as u64 / PAGE_SIZE;
            let mut at = range.start;
            for run in pages.within(range.clone()) {
                // A look at a hole would make a page of it.
                clear(mapping, first, at..run.start)?;
                let (place, len) = ((run.start - first) * PAGE_SIZE, run.end - run.start);
                mapping.overlay_file(place, len * PAGE_SIZE, file, run.start * PAGE_SIZE)?;
                at = run.end;
            }
            clear(mapping, first, at..range.end)?;
            first = range.end;
        }
        Ok(())
    }

    /// [`Image::freeze`], and what RAM holds then as layers for other machines, the lowest first. None of them
    /// changes any more, whoever tries: what is frozen here next goes elsewhere. Nothing is done and nothing
    /// returned if more than `most` pages have to be copied or mapped otherwise for that.
    ///
    /// # Errors
    /// As of [`Image::freeze`].
    pub fn share(&self, most: u64) -> io::Result<Option<SharedRam>> {
        let Some(pages) = self.freeze_at_most(most)? else { return Ok(None) };
        let copied = pages * PAGE_SIZE;
        let mut stack = self.stack();
        let Some(own) = stack.own.take() else {
            return Ok(Some(SharedRam { layers: stack.layers.clone(), copied }));
        };
        if let Err(err) = seal(&own.file) {
            stack.own = Some(own);
            return Err(err);
        }
        let layer = Layer::new(own.file, &own.pages);
        if self.huge_pages {
            // It is a copy, which nothing here is mapped from.
            let layers = stack.layers.iter().cloned().chain([layer]).collect();
            return Ok(Some(SharedRam { layers, copied }));
        }
        for lower in &mut stack.layers {
            lower.cover(&own.pages);
        }
        stack.layers.retain(|layer| !layer.is_empty());
        stack.layers.push(layer);
        Ok(Some(SharedRam { layers: stack.layers.clone(), copied }))
    }

    /// Pages that are mapped: of what lies in files or with a pager, those that were touched.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn touched(&self) -> io::Result<Runs> {
        self.pages_of(Kind::There)
    }

    /// Has pages mapped as if the guest had read them. What is not RAM is left out.
    ///
    /// # Errors
    /// The host has no memory for it, or cannot read it.
    pub fn fetch(&self, pages: Range<u64>) -> io::Result<()> {
        let mut at = pages.start;
        while at < pages.end {
            let Some((host, len)) = self.host(at) else { break };
            let len = len.min(pages.end - at);
            // SAFETY: pages of a mapping that this image keeps, which are read and not changed.
            let result = unsafe {
                libc::madvise(host.cast(), (len * PAGE_SIZE) as usize, libc::MADV_POPULATE_READ)
            };
            match (result, io::Error::last_os_error()) {
                (0, _) => at += len,
                (_, err) if err.kind() == io::ErrorKind::Interrupted => {}
                (_, err) => return Err(err),
            }
        }
        Ok(())
    }

    /// The pages of a kind.
    fn pages_of(&self, kind: Kind) -> io::Result<Runs> {
        let pagemap = Pagemap::open()?;
        let all = Runs::first(self.size() / PAGE_SIZE);
        let found = shared_out(
            &all.pieces(LOOK),
            || (),
            |(), piece| {
                let (mut found, mut at) = (Vec::new(), piece.start);
                while at < piece.end {
                    let Some((host, len)) = self.host(at) else { break };
                    let len = len.min(piece.end - at);
                    let start = host.addr() as u64;
                    let number = |address: u64| at + (address - start) / PAGE_SIZE;
                    for run in pagemap.pages(start..start + len * PAGE_SIZE, kind)? {
                        found.push(number(run.start)..number(run.end));
                    }
                    at += len;
                }
                Ok(found)
            },
        )?;
        Ok(in_order(found))
    }

    /// Pages that no layer has as they are: written here, and not zero where that goes without saying.
    fn private(&self, covered: &Runs) -> io::Result<Runs> {
        let private = self.pages_of(Kind::Private)?;
        let found = shared_out(
            &private.pieces(PIECE),
            || (),
            |(), piece| {
                let counts = |page: &u64| covered.contains(*page) || !self.is_zero(*page);
                Ok(piece.clone().filter(counts).map(|page| page..page + 1).collect())
            },
        )?;
        Ok(in_order(found))
    }

    /// True for a page that is there and zero. The guest is halted.
    fn is_zero(&self, page: u64) -> bool {
        self.host(page).is_some_and(|(host, _)| {
            // SAFETY: a page of the mapping, which nobody changes as long as the guest is halted.
            let bytes = unsafe { std::slice::from_raw_parts(host, PAGE) };
            bytes == ZEROES
        })
    }

    /// Copies those of pages that are `private` into `file`, and maps them all there: the others hold nothing.
    fn replace(&self, piece: Range<u64>, private: &Runs, file: &File) -> io::Result<()> {
        let mut at = piece.start;
        while at < piece.end {
            let Some((host, len)) = self.host(at) else { break };
            let len = len.min(piece.end - at);
            let (bytes, offset) = ((len * PAGE_SIZE) as usize, at * PAGE_SIZE);
            for run in private.within(at..at + len) {
                let start = ((run.start - at) * PAGE_SIZE) as usize;
                let size = ((run.end - run.start) * PAGE_SIZE) as usize;
                // SAFETY: pages of the mapping, and the guest is halted.
                let written = unsafe { std::slice::from_raw_parts(host.add(start), size) };
                file.write_all_at(written, run.start * PAGE_SIZE)?;
            }
            if !self.huge_pages {
                let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
                // SAFETY: pages of a mapping that this image keeps, which nobody looks at meanwhile;
                // they hold afterwards what they held before.
                let mapped = unsafe {
                    libc::mmap(host.cast(), bytes, prot, flags, file.as_raw_fd(), offset)
                };
                if mapped == libc::MAP_FAILED {
                    return Err(io::Error::last_os_error());
                }
            }
            at += len;
        }
        Ok(())
    }

    /// What RAM held when it was frozen last.
    pub fn contents(&self) -> Contents {
        let layers: Vec<Layer> = self.stack().all().collect();
        Contents::new(self.size(), &layers)
    }

    /// Pages that were frozen since [`Image::saved`] said that all before is safe.
    pub fn changed(&self) -> Runs {
        self.stack().changed.clone()
    }

    /// What was frozen is in a snapshot: the next one may hold what changes from here on.
    pub fn saved(&self) {
        let mut stack = self.stack();
        stack.changed = Runs::default();
        if self.huge_pages {
            stack.own = None;
        }
    }
}
