//! Address ranges to devices: port I/O and MMIO exits are looked up here.
//!
//! A bus is filled while a machine is assembled and does not change while it runs, so a look-up
//! takes no lock. What a range leads to is the caller's type; this module knows only addresses.

use std::fmt;

/// A range of addresses `start..start + len`, and the name that errors call it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// First address (port number or guest-physical address).
    pub start: u64,
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What occupies the range, for error messages.
    pub name: String,
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}..{:#x}", self.name, self.start, self.start + self.len)
    }
}

/// Why a range could not be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices claim the same address.
    #[error("{new} overlaps {existing}")]
    Overlap {
        /// The range that was refused.
        new: Range,
        /// The range that is there already.
        existing: Range,
    },
    /// A range is empty or passes the end of the address space.
    #[error("{name}: a range of {len:#x} bytes at {start:#x} is not valid")]
    Invalid {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// What should have occupied it.
        name: String,
    },
}

/// Sorted, non-overlapping address ranges, each leading to a `T`.
#[derive(Debug)]
pub struct Bus<T> {
    entries: Vec<(Range, T)>,
}

impl<T> Default for Bus<T> {
    fn default() -> Self {
        Bus { entries: Vec::new() }
    }
}

impl<T> Bus<T> {
    /// Puts `target` at `start..start + len`.
    ///
    /// # Errors
    /// [`BusError::Overlap`] names both ranges; the bus is unchanged.
    pub fn insert(&mut self, start: u64, len: u64, name: &str, target: T) -> Result<(), BusError> {
        let end = start.checked_add(len).filter(|_| len > 0).ok_or_else(|| BusError::Invalid {
            start,
            len,
            name: name.to_owned(),
        })?;
        let new = Range { start, len, name: name.to_owned() };
        let at = self.entries.partition_point(|(range, _)| range.start < start);
        let neighbours = [at.checked_sub(1), Some(at)];
        for (existing, _) in neighbours.into_iter().flatten().filter_map(|i| self.entries.get(i)) {
            if existing.start < end && start < existing.start + existing.len {
                return Err(BusError::Overlap { new, existing: existing.clone() });
            }
        }
        self.entries.insert(at, (new, target));
        Ok(())
    }

    /// The target of the range that holds `address`, and the offset of `address` in it.
    #[inline]
    pub fn find(&self, address: u64) -> Option<(&T, u64)> {
        let at = self.entries.partition_point(|(range, _)| range.start <= address);
        let (range, target) = self.entries.get(at.checked_sub(1)?)?;
        let offset = address - range.start;
        (offset < range.len).then_some((target, offset))
    }

    /// All ranges in ascending order with their targets.
    pub fn iter(&self) -> impl Iterator<Item = (&Range, &T)> {
        self.entries.iter().map(|(range, target)| (range, target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_by_address_with_offset() {
        let mut bus = Bus::default();
        bus.insert(0x3f8, 8, "com1", 1).unwrap();
        bus.insert(0x60, 5, "i8042", 2).unwrap();
        assert_eq!(bus.find(0x3f8), Some((&1, 0)));
        assert_eq!(bus.find(0x3ff), Some((&1, 7)));
        assert_eq!(bus.find(0x400), None);
        assert_eq!(bus.find(0x64), Some((&2, 4)));
        assert_eq!(bus.find(0x65), None);
        assert_eq!(bus.find(0), None);
    }

    #[test]
    fn overlap_names_both_ranges() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x1000, "disk", 1).unwrap();
        let err = bus.insert(0x1fff, 2, "net", 2).unwrap_err();
        assert_eq!(err.to_string(), "net at 0x1fff..0x2001 overlaps disk at 0x1000..0x2000");
        assert!(bus.insert(0, 0, "none", 3).is_err());
        assert!(bus.insert(u64::MAX, 2, "wraps", 3).is_err());
    }

    proptest! {
        #[test]
        fn agrees_with_a_linear_search(
            ranges in proptest::collection::vec((0u64..200, 1u64..20), 0..20), probe in 0u64..240)
        {
            let mut bus = Bus::default();
            let mut model: Vec<(u64, u64)> = Vec::new();
            for (start, len) in ranges {
                let free = model.iter().all(|&(s, l)| start + len <= s || s + l <= start);
                prop_assert_eq!(bus.insert(start, len, "r", start).is_ok(), free);
                if free { model.push((start, len)); }
            }
            let expected = model.iter().find(|&&(s, l)| probe >= s && probe < s + l)
                .map(|&(s, _)| (s, probe - s));
            prop_assert_eq!(bus.find(probe).map(|(&s, o)| (s, o)), expected);
        }
    }
}
