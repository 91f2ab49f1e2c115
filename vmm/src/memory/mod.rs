//! Guest memory: the only owner of its mappings.
//!
//! Nothing else calls `mmap`, `madvise` or `fallocate` on guest RAM. A machine that is booted from
//! a kernel has anonymous private RAM; page-aligned kernel segments are mapped over it,
//! copy-on-write, from the kernel file ([`GuestRam::map_file`]), so that starting does not cost
//! what the kernel weighs, and machines share what the kernel does not patch.
//!
//! RAM is a list of immutable layers and what the guest wrote since ([`layers`]). A machine that goes on
//! where another was saved maps that one's files; freezing makes a layer of what was written ([`freeze`]).
//!
//! What a balloon gives back goes through a [`Discarder`].
//!
//! Two pages that carry the machine's identity (VMGenID, VMClock) lie outside RAM in a slot of
//! their own.

mod discard;
mod freeze;
mod layers;
mod mapping;
mod pagemap;
mod pager;
mod runs;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout;
use devices::memory::{GuestMemory, Memory};
use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Address, GuestAddress, GuestRegionMmap};

use crate::config::MemoryConfig;
use crate::hypervisor::{HypervisorError, Vm};
pub use discard::Discarder;
use freeze::Stack;
pub use freeze::{Image, SharedRam, sealed_copy, shared_out};
pub use layers::{Contents, Extent, Layer, Piece};
pub use mapping::Mapping;
pub use pager::{Check, LOOK_EVERY, PagerError, PagerHealth};
pub use runs::Runs;

/// Size of a guest and host page in bytes.
pub const PAGE_SIZE: u64 = layout::PAGE_SIZE;

/// Bytes of the slot that holds the identity pages.
const ID_PAGES_LEN: u64 = 2 * PAGE_SIZE;

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused to reserve address space or memory.
    #[error("cannot map {size} bytes of guest memory at {gpa:#x}{huge}")]
    Map {
        /// Guest-physical address of the range.
        gpa: u64,
        /// Length in bytes.
        size: u64,
        /// " with huge pages", or nothing.
        huge: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The ranges do not form a memory map.
    #[error("guest memory layout is not valid: {0}")]
    Layout(String),
    /// A kernel segment could not be mapped or read.
    #[error("cannot load {len} bytes of the kernel at {gpa:#x}")]
    Load {
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
        /// The system's reason.
        source: io::Error,
    },
    /// The hypervisor refused a slot.
    #[error("cannot give the guest its memory")]
    Slot(#[source] HypervisorError),
}

/// RAM and identity pages of one machine.
///
/// Field order matters: `memory` refers to the mappings and goes first.
#[derive(Debug)]
pub struct GuestRam {
    huge_pages: bool,
    memory: Memory,
    ranges: Ranges,
    stack: Arc<Mutex<Stack>>,
    pager: pager::Slot,
    id_pages: Mapping,
}

/// The mappings that RAM is made of, which live as long as somebody has them.
pub type Ranges = Arc<Vec<(GuestAddress, Mapping)>>;

impl GuestRam {
    /// Reserves `size` bytes of RAM, a multiple of the page size, laid out as
    /// [`arch::layout::ram_ranges`] says. Memory is taken from the host when it is touched.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the host refuses.
    pub fn new(size: u64, huge_pages: bool) -> Result<GuestRam, MemoryError> {
        let mut ranges = Vec::new();
        for (gpa, len) in layout::ram_ranges(size) {
            let mapping = Mapping::anonymous(len, huge_pages).map_err(|source| {
                let huge = if huge_pages { " with huge pages" } else { "" };
                MemoryError::Map { gpa: gpa.raw_value(), size: len, huge, source }
            })?;
            ranges.push((gpa, mapping));
        }
        let id_pages = Mapping::anonymous(ID_PAGES_LEN, false).map_err(|source| {
            MemoryError::Map { gpa: layout::VMGENID_PAGE, size: ID_PAGES_LEN, huge: "", source }
        })?;
        let memory = Memory::new(Arc::new(Self::guest_memory(&ranges)?));
        let (ranges, stack, pager) = (Arc::new(ranges), Arc::default(), Arc::default());
        Ok(GuestRam { huge_pages, memory, ranges, stack, pager, id_pages })
    }

    /// As [`GuestRam::new`], in a file that other machines can have as it is: to freeze this RAM for the first time
    /// nothing is copied.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the host refuses.
    pub fn forkable(size: u64) -> Result<GuestRam, MemoryError> {
        let ram = GuestRam::new(size, false)?;
        let failed = |source| MemoryError::Map { gpa: 0, size, huge: "", source };
        let file = freeze::memfd(size).map_err(failed)?;
        freeze::share_all(&ram.ranges, &file).map_err(failed)?;
        ram.stack.lock().unwrap_or_else(PoisonError::into_inner).live = Some(Arc::new(file));
        Ok(ram)
    }

    /// RAM as a configuration has it.
    ///
    /// # Errors
    /// As of [`GuestRam::new`].
    pub fn of(config: &MemoryConfig) -> Result<GuestRam, MemoryError> {
        match config.forkable {
            true => GuestRam::forkable(config.size.0),
            false => GuestRam::new(config.size.0, config.huge_pages),
        }
    }

    /// The `vm-memory` view of `ranges`.
    fn guest_memory(ranges: &[(GuestAddress, Mapping)]) -> Result<GuestMemory, MemoryError> {
        let layout = |err: String| MemoryError::Layout(err);
        let mut regions = Vec::new();
        for (gpa, mapping) in ranges {
            // SAFETY: the pointer is a mapping of this length, which the GuestRam keeps: it drops
            // after the view, and devices that hold the view are stopped before the machine drops.
            let region = unsafe {
                MmapRegionBuilder::new(mapping.len())
                    .with_raw_mmap_pointer(mapping.as_ptr())
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                    .build()
            }
            .map_err(|err| layout(err.to_string()))?;
            let region = GuestRegionMmap::new(region, *gpa)
                .ok_or_else(|| layout(format!("a range at {:#x} wraps", gpa.raw_value())))?;
            regions.push(region);
        }
        GuestMemory::from_regions(regions).map_err(|err| layout(err.to_string()))
    }

    /// The view that devices and loaders use. It must not outlive this `GuestRam`.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// True if files are best mapped over this RAM: its pages are 4 KiB. Where the host gives it
    /// 2 MiB pages, asked for or transparently, a mapped file would cut them up, and each of its
    /// pages would cost the guest a fault of its own: a stock kernel then boots slower by more than
    /// copying it takes.
    pub fn maps_files(&self) -> bool {
        let live = self.stack.lock().unwrap_or_else(PoisonError::into_inner).live.is_some();
        !self.huge_pages && !live && !transparent_huge_pages()
    }

    /// Total bytes of RAM.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|(_, mapping)| mapping.len() as u64).sum()
    }

    /// Writes `bytes` into the identity page at guest-physical address `gpa`. Bytes that do not
    /// fit are an error.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] if the range is not in the identity pages.
    pub fn write_id_page(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        gpa.checked_sub(layout::VMGENID_PAGE)
            .and_then(|offset| usize::try_from(offset).ok())
            .and_then(|offset| self.id_pages.bytes_mut().get_mut(offset..)?.get_mut(..bytes.len()))
            .ok_or_else(|| MemoryError::Layout(format!("{gpa:#x} is not an identity page")))?
            .copy_from_slice(bytes);
        Ok(())
    }

    /// Tells the hypervisor where guest memory is. To be called once, before vCPUs exist: with
    /// vCPUs each slot costs milliseconds.
    ///
    /// # Errors
    /// [`MemoryError::Slot`].
    pub fn register(&self, vm: &dyn Vm) -> Result<(), MemoryError> {
        let id_pages = (GuestAddress(layout::VMGENID_PAGE), &self.id_pages);
        let ranges = self.ranges.iter().map(|(gpa, mapping)| (*gpa, mapping));
        for (slot, (gpa, mapping)) in (0u32..).zip(ranges.chain([id_pages])) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa.raw_value(),
                memory_size: mapping.len() as u64,
                userspace_addr: mapping.as_ptr() as u64,
            };
            // SAFETY: the mapping is this GuestRam's, and the machine drops its VM before it.
            unsafe { vm.set_memory_slot(region) }.map_err(MemoryError::Slot)?;
        }
        Ok(())
    }

    /// Maps `len` bytes of `file` from `offset` copy-on-write over RAM at `gpa`. All three are
    /// multiples of the page size. The file must not change while the machine lives, unless it is
    /// `leased`: whoever holds the lease calls [`GuestRam::detach_file`] before he gives it up.
    ///
    /// # Errors
    /// [`MemoryError::Load`]; RAM is then as before.
    pub fn map_file(
        &mut self,
        file: &File,
        offset: u64,
        gpa: u64,
        len: u64,
        leased: bool,
    ) -> Result<(), MemoryError> {
        let error = |source| MemoryError::Load { gpa, len, source };
        let ranges = self.ranges.iter().map(|(start, mapping)| (*start, mapping));
        let (start, mapping) = find(ranges, gpa, len)
            .ok_or_else(|| error(io::Error::from_raw_os_error(libc::EFAULT)))?;
        let at = gpa - start.raw_value();
        let kept = file.try_clone().map_err(error)?;
        mapping.overlay_file(at, len, file, offset).map_err(error)?;
        let extent = Extent {
            at: self.page(gpa).unwrap_or_default(),
            len: len / PAGE_SIZE,
            from: offset / PAGE_SIZE,
        };
        let layer = Layer { file: Arc::new(kept), extents: vec![extent], leased };
        self.stack.lock().unwrap_or_else(PoisonError::into_inner).layers.push(layer);
        Ok(())
    }

    /// Number of the page of RAM at `gpa`, through all ranges.
    fn page(&self, gpa: u64) -> Option<u64> {
        let mut first = 0;
        for (start, mapping) in self.ranges.iter() {
            let len = mapping.len() as u64;
            match gpa.checked_sub(start.raw_value()) {
                Some(at) if at < len => return Some((first + at) / PAGE_SIZE),
                _ => first += len,
            }
        }
        None
    }

    /// Maps what `layers` come to, of which the first is the lowest, over RAM that nobody wrote yet. Nobody
    /// may change their files as long as the machine lives. Small pieces are copied where there are very
    /// many, and all of them where RAM is made of huge pages.
    ///
    /// # Errors
    /// [`MemoryError::Load`]; RAM may be partly mapped then.
    pub fn map_layers(&mut self, layers: Vec<Layer>) -> Result<(), MemoryError> {
        let contents = Contents::new(self.size(), &layers);
        let mut lens: Vec<u64> = contents.pieces().iter().map(|piece| piece.extent.len).collect();
        let copied = if self.huge_pages {
            u64::MAX
        } else if lens.len() > MOST_PIECES {
            let place = lens.len() - MOST_PIECES;
            *lens.select_nth_unstable(place).1
        } else {
            0
        };
        let (mut first, mut to_copy) = (0, Vec::new());
        for (start, mapping) in self.ranges.iter() {
            let pages = mapping.len() as u64 / PAGE_SIZE;
            for piece in contents.within(first..first + pages) {
                let Extent { at, len, from } = piece.extent;
                let (at, bytes) = ((at - first) * PAGE_SIZE, len * PAGE_SIZE);
                if len < copied {
                    to_copy.extend(parts(at, bytes).map(|(n, len)| {
                        (mapping, n, len, Arc::clone(&piece.file), from * PAGE_SIZE + (n - at))
                    }));
                    continue;
                }
                mapping.overlay_file(at, bytes, &piece.file, from * PAGE_SIZE).map_err(
                    |source| MemoryError::Load { gpa: start.raw_value() + at, len: bytes, source },
                )?;
            }
            first += pages;
        }
        shared_out(
            &to_copy,
            || (),
            |(), (mapping, at, len, file, from)| {
                let (at, len) = (*at as usize, *len as usize);
                // SAFETY: the piece lies in the mapping, which no guest runs on yet; no two pieces have a
                // byte in common.
                let bytes =
                    unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().add(at), len) };
                file.read_exact_at(bytes, *from)
            },
        )
        .map_err(|source| MemoryError::Load { gpa: 0, len: self.size(), source })?;
        // What was copied is frozen as long as it is there; what the guest gave back of it is gone.
        if !self.huge_pages {
            self.stack.lock().unwrap_or_else(PoisonError::into_inner).layers = layers;
        }
        Ok(())
    }

    /// What is needed to freeze RAM and to write it out. The mappings stay as long as this is kept.
    pub fn image(&self) -> Image {
        let (ranges, stack) = (Arc::clone(&self.ranges), Arc::clone(&self.stack));
        Image { ranges, stack, pager: Arc::clone(&self.pager), huge_pages: self.huge_pages }
    }

    /// Copies `gpa..gpa + len` out of the leased file that it maps, so that the file may change, shrink
    /// even. (Private copies of the pages would not do: truncation takes them away as well.) The
    /// machine must be paused, and nobody may be freezing it. Blocks for as long as copying takes, about
    /// 0.3 s per GiB.
    ///
    /// # Errors
    /// [`MemoryError::Load`] if the host has no memory for it.
    pub fn detach_file(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let error = |source| MemoryError::Load { gpa, len, source };
        let mut stack = self.stack.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.page(gpa).unwrap_or_default();
        let pages = first..first + len / PAGE_SIZE;
        let maps =
            |layer: &Layer| layer.leased && layer.pages().within(pages.clone()).next().is_some();
        if !stack.layers.iter().any(maps) {
            // It was frozen, and lies in a layer of the machine's own.
            return Ok(());
        }
        let (start, mapping) =
            find(self.ranges.iter().map(|(start, mapping)| (*start, mapping)), gpa, len)
                .ok_or_else(|| error(io::Error::from_raw_os_error(libc::EFAULT)))?;
        mapping.detach(gpa - start.raw_value(), len).map_err(error)?;
        for layer in stack.layers.iter_mut().filter(|layer| layer.leased) {
            layer.remove(pages.clone());
        }
        stack.layers.retain(|layer| !layer.extents.is_empty());
        Ok(())
    }
}

/// Most pieces of layers that are mapped: each is a mapping, of which a process may have some ten
/// thousand, and costs some microseconds.
const MOST_PIECES: usize = 4096;

/// `len` bytes from `at` in parts that threads can share out.
fn parts(at: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    const PART: u64 = 4 << 20;
    (0..len.div_ceil(PART)).map(move |n| (at + n * PART, PART.min(len - n * PART)))
}

/// True if the host backs anonymous memory with 2 MiB pages without being asked.
fn transparent_huge_pages() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|modes| modes.contains("[always]"))
}

/// The range that holds all of `gpa..gpa + len`.
fn find<'a, M: std::ops::Deref<Target = Mapping> + 'a>(
    mut ranges: impl Iterator<Item = (GuestAddress, M)>,
    gpa: u64,
    len: u64,
) -> Option<(GuestAddress, M)> {
    ranges.find(|(start, mapping)| {
        gpa.checked_sub(start.raw_value())
            .and_then(|at| at.checked_add(len))
            .is_some_and(|end| end <= mapping.len() as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    #[test]
    fn ram_spans_the_hole() {
        let size = layout::HOLE_START + (64 << 20);
        let ram = GuestRam::new(size, false).unwrap();
        assert_eq!(ram.size(), size);
        assert!(ram.memory().host_range(layout::HOLE_START - 1, 1).is_some());
        assert!(ram.memory().host_range(layout::HOLE_START, 1).is_none());
        assert!(ram.memory().host_range(layout::HOLE_END, 1).is_some());
    }

    #[test]
    fn ram_is_congruent_with_huge_pages() {
        let ram = GuestRam::new(8 << 20, false).unwrap();
        let host = ram.memory().host_range(0, 1).unwrap() as usize;
        assert_eq!(host % (2 << 20), 0);
    }

    #[test]
    fn file_is_mapped_copy_on_write_and_can_be_detached() {
        let mut ram = GuestRam::new(4 << 20, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7u8; 3 * 4096]).unwrap();
        ram.map_file(&file, 4096, 0x10_0000, 8192, true).unwrap();
        let guest = Arc::clone(ram.memory().guest());
        let read = |gpa| guest.read_obj::<u8>(GuestAddress(gpa)).unwrap();
        assert_eq!((read(0xf_ffff), read(0x10_0000), read(0x10_1fff)), (0, 7, 7));
        assert_eq!(read(0x10_2000), 0);
        guest.write_obj(9u8, GuestAddress(0x10_0000)).unwrap();
        ram.detach_file(0x10_0000, 8192).unwrap();
        file.set_len(0).unwrap();
        assert_eq!((read(0x10_0000), read(0x10_0001)), (9, 7));
    }

    #[test]
    fn a_file_outside_ram_is_refused() {
        let mut ram = GuestRam::new(4 << 20, false).unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(ram.map_file(&file, 0, (4 << 20) - 4096, 8192, false).is_err());
        assert!(ram.map_file(&file, 0, !0xfff, 8192, false).is_err());
    }

    #[test]
    fn identity_pages_take_only_what_fits() {
        let mut ram = GuestRam::new(4 << 20, false).unwrap();
        ram.write_id_page(layout::VMGENID_PAGE, &[1; 16]).unwrap();
        ram.write_id_page(layout::VMCLOCK_PAGE, &[1; 4096]).unwrap();
        assert!(ram.write_id_page(layout::VMCLOCK_PAGE, &[1; 4097]).is_err());
        assert!(ram.write_id_page(0, &[1]).is_err());
    }
}
