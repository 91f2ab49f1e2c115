//! Sets of pages, as runs of neighbours.

use std::ops::Range;

/// Most ranges that are taken from bytes, which may say anything. Freezing leaves 4,096.
const MOST: usize = 1 << 20;

/// A set of pages by their numbers: ranges in order, none empty, no two that touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(Vec<Range<u64>>);

impl Runs {
    /// The set of these ranges, which come in order. They may touch or overlap.
    pub fn new(ranges: impl IntoIterator<Item = Range<u64>>) -> Runs {
        let mut runs = Runs::default();
        for range in ranges {
            runs.push(range);
        }
        runs
    }

    /// The first pages, so many.
    pub fn first(pages: u64) -> Runs {
        Runs::new(std::iter::once(0..pages))
    }

    /// Adds pages of which none is in front of the last range's first.
    pub fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is no page.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// The page behind the last one.
    pub fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.end)
    }

    /// True if `page` is one of them.
    pub fn contains(&self, page: u64) -> bool {
        let place = self.0.partition_point(|range| range.end <= page);
        self.0.get(place).is_some_and(|range| range.start <= page)
    }

    /// The parts of `range` that are in the set.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.0.partition_point(|own| own.end <= range.start);
        let rest = self.0.get(first..).unwrap_or_default();
        rest.iter()
            .take_while(move |own| own.start < range.end)
            .map(move |own| own.start.max(range.start)..own.end.min(range.end))
            .filter(|part| !part.is_empty())
    }

    /// The same in parts of at most `most` pages that do not cross its multiples.
    pub fn pieces(&self, most: u64) -> Vec<Range<u64>> {
        let mut pieces = Vec::new();
        for run in &self.0 {
            let mut at = run.start;
            while at < run.end {
                let end = ((at / most + 1) * most).min(run.end);
                pieces.push(at..end);
                at = end;
            }
        }
        pieces
    }

    /// The pages that are in this set or in `other`.
    pub fn union(&self, other: &Runs) -> Runs {
        let (mut left, mut right) = (self.0.iter().peekable(), other.0.iter().peekable());
        let mut union = Runs::default();
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start <= b.start => left.next(),
                (_, Some(_)) => right.next(),
                (_, None) => left.next(),
            };
            match next {
                Some(range) => union.push(range.clone()),
                None => return union,
            }
        }
    }

    /// The pages that are in this set and not in `other`.
    pub fn without(&self, other: &Runs) -> Runs {
        let mut rest = Runs::default();
        for run in &self.0 {
            let mut at = run.start;
            for gone in other.within(run.clone()) {
                rest.push(at..gone.start);
                at = gone.end;
            }
            rest.push(at..run.end);
        }
        rest
    }

    /// The same and what lies between, so that there are no more than `most` ranges (at least one): the
    /// smallest gaps go, all of one size together.
    pub fn coalesced(self, most: usize) -> Runs {
        let surplus = self.0.len().saturating_sub(most.max(1));
        if surplus == 0 {
            return self;
        }
        let gap = |pair: &[Range<u64>]| match pair {
            [a, b] => b.start - a.end,
            _ => 0,
        };
        let mut gaps: Vec<u64> = self.0.windows(2).map(gap).collect();
        let (_, &mut limit, _) = gaps.select_nth_unstable(surplus - 1);
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(most);
        for range in self.0 {
            match runs.last_mut() {
                Some(last) if range.start - last.end <= limit => last.end = range.end,
                _ => runs.push(range),
            }
        }
        Runs(runs)
    }

    /// The same and what lies between ranges that are at most `most` pages apart, if none of that is in `other`.
    pub fn bridged(&self, most: u64, other: &Runs) -> Runs {
        let mut bridged = Runs::default();
        for range in &self.0 {
            let end = bridged.end();
            let gap = end..range.start;
            let is_bridge = range.start - end <= most && !bridged.is_empty();
            let start =
                if is_bridge && other.within(gap).next().is_none() { end } else { range.start };
            bridged.push(start..range.end);
        }
        bridged
    }

    /// As bytes: pages up to a run and pages in it, in turn; each number in groups of seven bits, lowest
    /// first, all but the last with the highest bit set (LEB128).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut put = |mut value: u64| {
            while value >= 0x80 {
                bytes.push(value as u8 | 0x80);
                value >>= 7;
            }
            bytes.push(value as u8);
        };
        let mut at = 0;
        for range in &self.0 {
            put(range.start - at);
            put(range.end - range.start);
            at = range.end;
        }
        bytes
    }

    /// From bytes. Nothing if they are none of a set, or of one with more than 2^20 ranges.
    pub fn from_bytes(bytes: &[u8]) -> Option<Runs> {
        let mut bytes = bytes.iter();
        let mut next = || -> Option<Option<u64>> {
            let (mut value, mut shift) = (0u64, 0);
            loop {
                let Some(&byte) = bytes.next() else {
                    return if shift == 0 { Some(None) } else { None };
                };
                if shift > 56 {
                    return None;
                }
                value |= u64::from(byte & 0x7f) << shift;
                if byte & 0x80 == 0 {
                    return Some(Some(value));
                }
                shift += 7;
            }
        };
        let (mut runs, mut at) = (Vec::new(), 0u64);
        while let Some(gap) = next()? {
            let len = next()??;
            if len == 0 || (gap == 0 && !runs.is_empty()) {
                return None;
            }
            let start = at.checked_add(gap)?;
            at = start.checked_add(len)?;
            if runs.len() == MOST {
                return None;
            }
            runs.push(start..at);
        }
        Some(Runs(runs))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(runs: &Runs) -> BTreeSet<u64> {
        runs.iter().flatten().collect()
    }

    fn runs(pages: &BTreeSet<u64>) -> Runs {
        Runs::new(pages.iter().map(|&page| page..page + 1))
    }

    fn pages() -> impl Strategy<Value = BTreeSet<u64>> {
        prop::collection::btree_set(0u64..200, 0..100)
    }

    proptest! {
        #[test]
        fn they_are_sets(a in pages(), b in pages(), from in 0u64..210, len in 0u64..100) {
            let (x, y) = (runs(&a), runs(&b));
            prop_assert_eq!(set(&x), a.clone());
            prop_assert_eq!(x.pages(), a.len() as u64);
            prop_assert_eq!(set(&x.union(&y)), a.union(&b).copied().collect::<BTreeSet<_>>());
            prop_assert_eq!(x.without(&y), runs(&a.difference(&b).copied().collect()));
            prop_assert_eq!(x.union(&y), runs(&a.union(&b).copied().collect()));
            prop_assert_eq!(x.contains(from), a.contains(&from));
            let within: BTreeSet<u64> = x.within(from..from + len).flatten().collect();
            prop_assert_eq!(within, a.range(from..from + len).copied().collect::<BTreeSet<_>>());
        }

        #[test]
        fn bytes_bring_them_back(a in pages(), far in any::<u32>()) {
            let x = Runs::new(runs(&a).iter().map(|r| r.start + u64::from(far)..r.end + u64::from(far)));
            prop_assert_eq!(Runs::from_bytes(&x.to_bytes()), Some(x));
        }

        #[test]
        fn other_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Some(runs) = Runs::from_bytes(&bytes) {
                prop_assert!(runs.iter().all(|range| !range.is_empty()));
                prop_assert_eq!(Runs::new(runs.iter()), runs);
            }
        }

        #[test]
        fn bridges_are_short_and_touch_nothing(a in pages(), b in pages(), most in 0u64..20) {
            let (x, y) = (runs(&a), runs(&b));
            let bridged = x.bridged(most, &y);
            prop_assert!(set(&bridged).is_superset(&a));
            let added = bridged.without(&x);
            prop_assert!(added.iter().all(|gap| gap.end - gap.start <= most));
            prop_assert!(added.iter().all(|gap| y.within(gap).next().is_none()));
            let ranges: Vec<_> = bridged.iter().collect();
            for pair in ranges.windows(2) {
                let gap = pair[0].end..pair[1].start;
                prop_assert!(gap.end - gap.start > most || y.within(gap).next().is_some());
            }
        }

        #[test]
        fn few_ranges_hold_all_of_many(a in pages(), most in 1usize..20) {
            let x = runs(&a);
            let few = x.clone().coalesced(most);
            prop_assert!(few.len() <= most);
            prop_assert!(set(&few).is_superset(&a));
            prop_assert_eq!(few.end(), x.end());
        }
    }
}
