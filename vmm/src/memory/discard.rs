//! Giving pages of guest RAM back to the host, for the balloon.

use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::balloon::Discard;

use super::GuestRam;
use super::freeze::Stack;

/// Bytes of the pages that RAM is made of when they are from the host's pool.
const HUGE_PAGE: u64 = 2 << 20;

/// A piece of RAM.
#[derive(Debug)]
struct Range {
    gpa: u64,
    host: usize,
    len: u64,
}

impl Range {
    /// The part of `start..start + len` that lies in this range, whose first byte has the number
    /// `first`, in offsets; whole pages of `page` bytes only.
    fn part(&self, first: u64, start: u64, len: u64, page: u64) -> Option<(u64, u64)> {
        let end = start.saturating_add(len).min(first.saturating_add(self.len));
        let begin = start.max(first).checked_sub(first)?.checked_next_multiple_of(page)?;
        let end = end.checked_sub(first)? / page * page;
        (begin < end).then(|| (begin, end - begin))
    }
}

/// Gives pages of one machine's RAM back. Must not be used when its [`GuestRam`] is gone.
///
/// What such a page holds when the guest touches it again is zeroes, or what the kernel's file has
/// there. Pages outside RAM, such as those that carry the machine's identity, are left alone.
#[derive(Debug)]
pub struct Discarder {
    ranges: Vec<Range>,
    page: u64,
    stack: Arc<Mutex<Stack>>,
}

impl GuestRam {
    /// What gives pages of this RAM back to the host. It must not outlive this `GuestRam`.
    pub fn discarder(&self) -> Discarder {
        let range = |(gpa, mapping): &(vm_memory::GuestAddress, super::Mapping)| Range {
            gpa: gpa.0,
            host: mapping.as_ptr() as usize,
            len: mapping.len() as u64,
        };
        // A part of a huge page cannot be given back; ranges begin at whole ones.
        let page = if self.huge_pages { HUGE_PAGE } else { super::PAGE_SIZE };
        let stack = Arc::clone(&self.stack);
        Discarder { ranges: self.ranges.iter().map(range).collect(), page, stack }
    }
}

impl Discarder {
    fn give_back(&self, first: impl Fn(&Range) -> u64, start: u64, len: u64) {
        // Nobody freezes it meanwhile: whoever gives pages back is halted then.
        let live = self.stack.lock().unwrap_or_else(PoisonError::into_inner).live.is_some();
        // Private memory, anonymous or of a file: the page goes, and the file is not changed. In a file of the
        // machine's own it is a hole.
        let advice = if live { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        for range in &self.ranges {
            let Some((offset, len)) = range.part(first(range), start, len, self.page) else {
                continue;
            };
            let at = range.host + offset as usize;
            // SAFETY: the pages lie within a mapping of guest RAM, which Rust code of ours never
            // holds references to; that their contents change at any time is what guest RAM does.
            let result = unsafe { libc::madvise(at as *mut libc::c_void, len as usize, advice) };
            if result != 0 {
                // Kernels before 5.18 do not take huge pages back. The guest has lost nothing.
                let err = std::io::Error::last_os_error();
                tracing::trace!(%err, len, "memory is not given back");
            }
        }
    }
}

impl Discard for Discarder {
    fn discard(&self, gpa: u64, len: u64) {
        self.give_back(|range| range.gpa, gpa, len);
    }

    fn discard_host(&self, start: *const u8, len: usize) {
        self.give_back(|range| range.host as u64, start as u64, len as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arch::layout;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    fn fill(ram: &GuestRam, gpa: u64, len: u64) {
        let bytes = vec![7; len as usize];
        ram.memory().guest().write_slice(&bytes, GuestAddress(gpa)).unwrap();
    }

    fn byte(ram: &GuestRam, gpa: u64) -> u8 {
        ram.memory().guest().read_obj(GuestAddress(gpa)).unwrap()
    }

    /// Bytes of RAM that the host holds, of these.
    fn resident(ram: &GuestRam, gpa: u64, len: u64) -> u64 {
        let host = ram.memory().host_range(gpa, len).unwrap();
        let mut pages = vec![0u8; (len / 4096) as usize];
        // SAFETY: the range is mapped and the vector has a byte for each of its pages.
        let result = unsafe { libc::mincore(host.cast(), len as usize, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count() as u64 * 4096
    }

    #[test]
    fn whole_pages_go_and_nothing_beside_them() {
        let ram = GuestRam::new(8 << 20, false).unwrap();
        fill(&ram, 0, 8 << 20);
        let discarder = ram.discarder();
        discarder.discard(0x1001, 3 * 4096);
        assert_eq!([0x1fff, 0x2000, 0x3fff, 0x4000].map(|gpa| byte(&ram, gpa)), [7, 0, 0, 7]);
        let host = ram.memory().host_range(0x10_0000, 0x10_0000).unwrap();
        discarder.discard_host(host, 0x10_0000);
        assert_eq!(resident(&ram, 0x10_0000, 0x10_0000), 0);
        assert_eq!([0xf_ffff, 0x20_0000].map(|gpa| byte(&ram, gpa)), [7, 7]);
        // Less than a page, and nothing.
        discarder.discard(0x5001, 4096);
        discarder.discard(0x5000, 4095);
        discarder.discard(0x5000, 0);
        assert_eq!(byte(&ram, 0x5000), 7);
    }

    #[test]
    fn what_is_not_ram_is_left_alone() {
        let mut ram = GuestRam::new(layout::HOLE_START + (4 << 20), false).unwrap();
        ram.write_id_page(layout::VMGENID_PAGE, &[9; 4096]).unwrap();
        let discarder = ram.discarder();
        for gpa in [layout::HOLE_START - 4096, layout::HOLE_END] {
            fill(&ram, gpa, 4096);
        }
        fill(&ram, layout::HOLE_START - 8192, 4096);
        for (gpa, len) in [
            (layout::VMGENID_PAGE, 4096),
            (layout::HOLE_START, layout::HOLE_END - layout::HOLE_START),
            (layout::HOLE_END + (4 << 20), u64::MAX),
            (u64::MAX - 4095, u64::MAX),
        ] {
            discarder.discard(gpa, len);
        }
        assert_eq!(byte(&ram, layout::HOLE_START - 1), 7);
        assert_eq!(byte(&ram, layout::HOLE_END), 7);
        assert_eq!(ram.id_pages.bytes_mut()[..4096], [9; 4096]);
        // Over the edges of RAM: what is RAM goes.
        discarder.discard(layout::HOLE_START - 4096, layout::HOLE_END);
        assert_eq!(byte(&ram, layout::HOLE_START - 1), 0);
        assert_eq!(byte(&ram, layout::HOLE_END), 0);
        assert_eq!(byte(&ram, layout::HOLE_START - 8192), 7);
        assert_eq!(ram.id_pages.bytes_mut()[..4096], [9; 4096]);
        // Memory of this process that is not the guest's.
        let own = [5u8; 3 * 4096];
        discarder.discard_host(own.as_ptr(), own.len());
        assert!(own.iter().all(|&byte| byte == 5));
    }

    #[test]
    fn a_mapped_kernel_comes_back_as_its_file() {
        let mut ram = GuestRam::new(4 << 20, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[3u8; 2 * 4096]).unwrap();
        ram.map_file(&file, 0, 0x10_0000, 8192, true).unwrap();
        fill(&ram, 0xf_f000, 4 * 4096);
        ram.discarder().discard(0xf_f000, 4 * 4096);
        let bytes = [0xf_f000, 0x10_0000, 0x10_1fff, 0x10_2000].map(|gpa| byte(&ram, gpa));
        assert_eq!(bytes, [0, 3, 3, 0]);
        let mut text = Vec::new();
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::Read::read_to_end(&mut file, &mut text).unwrap();
        assert!(text.iter().all(|&byte| byte == 3), "the file was changed");
        // A kernel that was copied out of its file is RAM like any other.
        ram.detach_file(0x10_0000, 8192).unwrap();
        ram.discarder().discard(0x10_0000, 8192);
        assert_eq!(byte(&ram, 0x10_0000), 0);
    }

    proptest! {
        /// Offsets are whole pages, inside both the range and what was asked for.
        #[test]
        fn parts_lie_inside(
            first in any::<u64>(), pages in 1u64..100, start in any::<u64>(), len in any::<u64>(),
            near in any::<bool>(), huge in any::<bool>())
        {
            let page = if huge { HUGE_PAGE } else { 4096 };
            let first = first / 2 / page * page;
            let range = Range { gpa: first, host: 0, len: pages * page };
            let (start, len) = if near {
                (first.wrapping_sub(page).wrapping_add(start % (page * 50)), len % (page * 60))
            } else {
                (start, len)
            };
            if let Some((offset, part)) = range.part(first, start, len, page) {
                prop_assert!(offset.is_multiple_of(page) && part.is_multiple_of(page) && part > 0);
                prop_assert!(offset + part <= range.len);
                prop_assert!(first + offset >= start);
                prop_assert!(first + offset + part <= start.saturating_add(len));
            }
        }
    }
}
