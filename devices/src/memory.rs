//! Guest memory as devices see it: one alias for the `vm-memory` type, and the translation from a
//! guest-physical range to host memory.
//!
//! Mapping, unmapping and dirty state are `vmm/memory`'s business. Ranges stay mapped at one host
//! address for the life of a machine (a fork or restore maps other pages *over* them), so a host
//! pointer obtained here is good for as long as the [`Memory`] it came from is held.

use std::sync::Arc;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

/// The concrete guest memory type. Every crate names it through this alias.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    len: u64,
    host: *mut u8,
}

/// A shared handle on guest RAM that translates guest-physical ranges to host pointers.
///
/// Cloning is cheap; the mapping lives as long as any clone.
#[derive(Clone, Debug)]
pub struct Memory {
    regions: Arc<[Region]>,
    guest: Arc<GuestMemory>,
}

// SAFETY: the pointers in `regions` point into mappings owned by `guest`, which is Send and Sync;
// nothing in here dereferences them, and whoever does treats the memory as shared with the guest.
unsafe impl Send for Memory {}
// SAFETY: as above; the region list itself is never modified after construction.
unsafe impl Sync for Memory {}

impl Memory {
    /// Wraps `guest`, whose regions must not change afterwards.
    pub fn new(guest: Arc<GuestMemory>) -> Memory {
        let regions = guest
            .iter()
            .map(|region| Region {
                start: region.start_addr().0,
                len: region.len(),
                host: region.as_volatile_slice().map_or(std::ptr::null_mut(), |slice| {
                    slice
                        .get_slice(0, 1)
                        .map_or(std::ptr::null_mut(), |s| s.ptr_guard_mut().as_ptr())
                }),
            })
            .filter(|region| !region.host.is_null())
            .collect();
        Memory { regions, guest }
    }

    /// The underlying `vm-memory` object, for callers that copy rather than map.
    pub fn guest(&self) -> &Arc<GuestMemory> {
        &self.guest
    }

    /// Host address of the `len` bytes at guest-physical address `gpa`, or `None` unless all of
    /// them lie in one RAM region. A `len` of 0 is never in RAM.
    #[inline]
    pub fn host_range(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        if len == 0 {
            return None;
        }
        for region in self.regions.iter() {
            let offset = gpa.wrapping_sub(region.start);
            if offset < region.len && len <= region.len - offset {
                // SAFETY: offset < region.len, so the result stays inside the region's mapping.
                return Some(unsafe { region.host.add(offset as usize) });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> Memory {
        Memory::new(Arc::new(
            GuestMemory::from_ranges(&[
                (GuestAddress(0), 0x2000),
                (GuestAddress(0x1_0000_0000), 0x1000),
            ])
            .unwrap(),
        ))
    }

    #[test]
    fn translates_only_what_lies_in_one_region() {
        let mem = memory();
        assert!(mem.host_range(0, 0x2000).is_some());
        assert!(mem.host_range(0, 0x2001).is_none());
        assert!(mem.host_range(0x1fff, 1).is_some());
        assert!(mem.host_range(0x2000, 1).is_none());
        assert!(mem.host_range(0x10, 0).is_none());
        assert!(mem.host_range(u64::MAX, 1).is_none());
        assert!(mem.host_range(u64::MAX - 1, u64::MAX).is_none());
        assert!(mem.host_range(0x1_0000_0fff, 1).is_some());
        assert!(mem.host_range(0x1_0000_0fff, 2).is_none());
    }

    #[test]
    fn host_pointer_sees_what_the_guest_wrote() {
        let mem = memory();
        mem.guest().write_obj(0x55u8, GuestAddress(0x1234)).unwrap();
        let ptr = mem.host_range(0x1234, 1).unwrap();
        // SAFETY: host_range vouches for one byte.
        assert_eq!(unsafe { ptr.read_volatile() }, 0x55);
    }
}
