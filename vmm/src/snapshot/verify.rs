//! Whether memory files are, to the last byte, what was written.

use std::fs::File;
use std::ops::{Add, Range};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use twox_hash::XxHash3_128;

use super::load::{LoadError, chain};
use super::{Files, Progress};
use crate::memory::{Layer, PAGE_SIZE, Runs, shared_out};

/// Pages that are read at a time.
const PIECE: u64 = (256 << 10) / PAGE_SIZE;
const PAGE: usize = PAGE_SIZE as usize;

/// What pages come to, whoever adds them up, in whatever order, and whether or not those that are zero are
/// among them: the sum, modulo 2^128, of each page's XXH3-128 with its number as the seed. It finds accidents, at
/// the speed of copying; whoever can change the memory file on purpose can change the state, which has this.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u128);

impl Sum {
    /// Of pages from the number `first` on.
    pub(super) fn of(first: u64, bytes: &[u8]) -> Sum {
        let pages = bytes.chunks_exact(PAGE).zip(first..);
        let pages = pages.filter(|(page, _)| **page != [0; PAGE]);
        pages.map(|(page, n)| Sum(XxHash3_128::oneshot_with_seed(n, page))).fold(Sum(0), Sum::add)
    }
}

impl Add for Sum {
    type Output = Sum;

    fn add(self, other: Sum) -> Sum {
        Sum(self.0.wrapping_add(other.0))
    }
}

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Sum, D::Error> {
        let text = String::deserialize(deserializer)?;
        let sum = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        sum.map(Sum).ok_or_else(|| serde::de::Error::custom("a sum has 32 hexadecimal digits"))
    }
}

/// The memory file of one snapshot, as its state speaks of it.
pub(super) struct Written {
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    /// Its pages, if it is a diff.
    pub(super) pages: Option<Runs>,
    pub(super) sum: Option<Sum>,
}

/// A memory file that is as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// The file.
    pub memory: PathBuf,
    /// Bytes of it that were read: all but the holes; of a diff those of its pages.
    pub bytes: u64,
}

/// Reads all of a snapshot, and of what it stands on: the snapshot itself is the first. `base` is where what a
/// diff is a diff to is now, if it was moved.
///
/// # Errors
/// [`LoadError`]: it could not be gone on from, or is not as it was written.
pub fn verify(
    files: &Files,
    base: Option<&Files>,
    progress: Progress<'_>,
) -> Result<Vec<Verified>, LoadError> {
    let read = |written: Written| {
        let Written { path, file, pages, sum } = written;
        // Of a diff's base it would be one that goes through the diff's folder.
        let path = path.canonicalize().unwrap_or(path);
        let failed = |source| LoadError::Read { path: path.clone(), source };
        let expected = sum.ok_or_else(|| LoadError::NoSum(path.clone()))?;
        let pages = match pages {
            Some(pages) => pages,
            None => Layer::of_data(Arc::clone(&file)).map_err(failed)?.pages(),
        };
        Ok((path, file, pages, expected))
    };
    let all = chain(files, base)?.into_iter().map(read).collect::<Result<Vec<_>, LoadError>>()?;
    let done = AtomicU64::new(0);
    let total: u64 = all.iter().map(|(_, _, pages, _)| pages.pages()).sum();
    let more = |pages: u64| {
        let done = done.fetch_add(pages, Ordering::Relaxed) + pages;
        progress(done * PAGE_SIZE, total * PAGE_SIZE);
    };
    let compare = |(memory, file, pages, expected): (PathBuf, Arc<File>, Runs, Sum)| match sum_of(
        &file, &pages, &more,
    ) {
        Ok(sum) if sum == expected => Ok(Verified { memory, bytes: pages.pages() * PAGE_SIZE }),
        Ok(_) => Err(LoadError::Damaged(memory)),
        Err(source) => Err(LoadError::Read { path: memory, source }),
    };
    all.into_iter().map(compare).collect()
}

fn sum_of(file: &File, pages: &Runs, more: &(dyn Fn(u64) + Sync)) -> std::io::Result<Sum> {
    let sums = shared_out(&pages.pieces(PIECE), Vec::new, |buffer, part: &Range<u64>| {
        let pages = part.end - part.start;
        buffer.resize(pages as usize * PAGE, 0);
        file.read_exact_at(buffer, part.start * PAGE_SIZE)?;
        more(pages);
        Ok(Sum::of(part.start, buffer))
    })?;
    Ok(sums.into_iter().fold(Sum::default(), Sum::add))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_of_pages_and_their_places() {
        let mut bytes = vec![0; 3 * PAGE];
        (bytes[0], bytes[2 * PAGE + 7]) = (1, 2);
        let whole = Sum::of(5, &bytes);
        let last = Sum::of(7, &bytes[2 * PAGE..]);
        assert_eq!(whole, last + Sum::of(5, &bytes[..PAGE]));
        assert_ne!(whole, Sum::of(6, &bytes));
        assert_eq!(Sum::of(0, &[0; PAGE]), Sum::default());
        bytes.swap(0, 2 * PAGE);
        assert_ne!(whole, Sum::of(5, &bytes));
    }

    #[test]
    fn a_sum_is_written_and_read() {
        let sum = Sum::of(1, &[1; PAGE]);
        let text = serde_json::to_string(&sum).unwrap();
        assert_eq!(serde_json::from_str::<Sum>(&text).unwrap(), sum);
        for wrong in
            ["\"\"", "\"00\"", &format!("\"{}\"", "g".repeat(32)), &text.replace('"', "\"0")]
        {
            serde_json::from_str::<Sum>(wrong).unwrap_err();
        }
    }
}
