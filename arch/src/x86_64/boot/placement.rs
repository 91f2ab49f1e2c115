//! Where an initrd goes, and whether all that is loaded has a place of its own in RAM.

use std::fmt;

use crate::x86_64::layout::{self, HIGH_RAM_START, PAGE_SIZE};

/// A named range of guest-physical memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// What it is, as an error names it: "the initrd".
    pub name: String,
    /// Its first address.
    pub start: u64,
    /// Its length in bytes.
    pub size: u64,
}

impl Extent {
    /// A range of `size` bytes from `start` on.
    pub fn new(name: impl Into<String>, start: u64, size: u64) -> Self {
        Self { name: name.into(), start, size }
    }

    fn end(&self) -> u64 {
        self.start.saturating_add(self.size)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:#x}..{:#x})", self.name, self.start, self.end())
    }
}

/// Why something cannot be loaded where it belongs.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlacementError {
    /// Two ranges share memory.
    #[error("{0} overlaps {1}")]
    Overlap(Extent, Extent),
    /// A range is not all RAM.
    #[error("{extent} lies outside the guest's memory: RAM is {ram}")]
    OutsideRam {
        /// The range.
        extent: Extent,
        /// The ranges of RAM, for reading.
        ram: String,
    },
    /// No free room for the initrd.
    #[error("the initrd of {size} bytes does not fit into memory: {free} bytes are free for it")]
    NoRoomForInitrd {
        /// Its length in bytes.
        size: u64,
        /// The largest that would fit.
        free: u64,
    },
}

/// Checks that each of `extents` lies in RAM, that none overlaps another, and that none touches
/// the tables below 1 MiB. `ram_size` is in bytes. Empty extents are left out.
///
/// # Errors
///
/// The first extent that fails, by name, with what it collides with.
pub fn check(ram_size: u64, extents: &[Extent]) -> Result<(), PlacementError> {
    let tables = Extent::new("the boot tables", 0, HIGH_RAM_START);
    let hole = Extent::new(
        "the hole for devices",
        layout::HOLE_START,
        layout::HOLE_END - layout::HOLE_START,
    );
    let ram = layout::ram_ranges(ram_size);
    let extents: Vec<&Extent> = extents.iter().filter(|extent| extent.size > 0).collect();
    for (index, &extent) in extents.iter().enumerate() {
        let in_ram = ram
            .iter()
            .any(|&(start, length)| start.0 <= extent.start && extent.end() <= start.0 + length);
        let earlier = extents.iter().take(index).copied();
        let fixed = [&tables].into_iter().chain((!in_ram).then_some(&hole));
        if let Some(other) = fixed.chain(earlier).find(|other| extent.overlaps(other)) {
            return Err(PlacementError::Overlap(extent.clone(), other.clone()));
        }
        if !in_ram {
            let ranges: Vec<_> = ram
                .iter()
                .map(|&(start, length)| format!("{:#x}..{:#x}", start.0, start.0 + length))
                .collect();
            return Err(PlacementError::OutsideRam {
                extent: extent.clone(),
                ram: ranges.join(" and "),
            });
        }
    }
    Ok(())
}

/// The address for an initrd of `size` bytes: as high as possible below 3 GiB, page-aligned, and
/// clear of `kernel`, which is everything that has to stay free for it.
///
/// `addr_max` is the last address that the kernel takes an initrd at (a bzImage's
/// `initrd_addr_max`), if it has said so.
///
/// # Errors
///
/// There is no room.
pub fn initrd_address(
    ram_size: u64,
    size: u64,
    addr_max: Option<u32>,
    kernel: &Extent,
) -> Result<u64, PlacementError> {
    let ram_end = layout::low_ram_end(ram_size);
    let top = addr_max.map_or(ram_end, |max| ram_end.min(u64::from(max) + 1));
    let above = (kernel.end().max(HIGH_RAM_START), top);
    let below = (HIGH_RAM_START, top.min(kernel.start));
    let mut free = 0;
    for (bottom, top) in [above, below] {
        let bottom = bottom.checked_next_multiple_of(PAGE_SIZE).unwrap_or(u64::MAX);
        let top = top / PAGE_SIZE * PAGE_SIZE;
        let room = top.saturating_sub(bottom);
        if size <= room {
            // Room of whole pages: rounding down cannot reach below the bottom.
            return Ok((top - size) / PAGE_SIZE * PAGE_SIZE);
        }
        free = free.max(room);
    }
    Err(PlacementError::NoRoomForInitrd { size, free })
}
