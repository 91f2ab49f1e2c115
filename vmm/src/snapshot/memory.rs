//! Memory files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::MemoryHeader;
use crate::memory::{Image, PAGE_SIZE};

/// Why memory could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} the memory of the guest")]
pub struct MemoryError {
    verb: &'static str,
    source: io::Error,
}

fn failed(verb: &'static str) -> impl FnOnce(io::Error) -> MemoryError {
    move |source| MemoryError { verb, source }
}

/// Threads that write.
const WRITERS: usize = 2;

/// Bytes that a writer takes at a time.
const PIECE: u64 = 4 << 20;

const PAGE: usize = PAGE_SIZE as usize;

/// Writes all of `image` to `file`, which is new and empty: what was never touched, or is zero, stays
/// a hole. Nothing may change the guest's memory meanwhile. `progress` is called with bytes done.
///
/// # Errors
/// [`MemoryError`].
pub fn save(
    image: &Image,
    file: &File,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<MemoryHeader, MemoryError> {
    let size = image.ranges.iter().map(|(_, mapping)| mapping.len() as u64).sum();
    file.set_len(size).map_err(failed("make a file for"))?;
    let pagemap = File::open("/proc/self/pagemap").map_err(failed("look at"))?;
    let (next, data) = (AtomicU64::new(0), AtomicU64::new(0));
    let write = || -> io::Result<()> {
        let mut work = Work { image, file, pagemap: &pagemap, entries: Vec::new() };
        loop {
            let start = next.fetch_add(PIECE, Ordering::Relaxed);
            if start >= size {
                return Ok(());
            }
            let piece = start..size.min(start + PIECE);
            let len = piece.end - piece.start;
            data.fetch_add(work.write(piece)?, Ordering::Relaxed);
            progress(len);
        }
    };
    let outcome: io::Result<()> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..WRITERS).map(|_| scope.spawn(write)).collect();
        let mut outcome = write();
        for other in others {
            let other = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(other);
        }
        outcome
    });
    outcome.map_err(failed("write"))?;
    let samples = samples(file, size).map_err(failed("look at"))?;
    let fingerprint = fingerprint(file, &samples).map_err(failed("read back"))?;
    Ok(MemoryHeader { size, data: data.into_inner(), samples, fingerprint })
}

/// One writer.
struct Work<'a> {
    image: &'a Image,
    file: &'a File,
    pagemap: &'a File,
    entries: Vec<u8>,
}

/// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;

impl Work<'_> {
    /// Writes a piece of the file. Returns the bytes that were not zero.
    fn write(&mut self, piece: Range<u64>) -> io::Result<u64> {
        let (mut first, mut written) = (0, 0);
        for (gpa, mapping) in self.image.ranges.iter() {
            let len = mapping.len() as u64;
            let part = piece.start.max(first)..piece.end.min(first + len);
            if part.start < part.end {
                let at = part.start - first;
                let host = mapping.as_ptr().wrapping_add(at as usize);
                let len = (part.end - part.start) as usize;
                // SAFETY: inside a mapping that the image keeps. The guest is halted, and what it
                // holds is bytes, whatever they are.
                let bytes = unsafe { std::slice::from_raw_parts(host, len) };
                written += self.write_pages(bytes, gpa.0 + at, part.start)?;
            }
            first += len;
        }
        Ok(written)
    }

    /// Writes what is not zero of `bytes`, which are at `gpa`, to `offset`, in runs.
    fn write_pages(&mut self, bytes: &[u8], gpa: u64, offset: u64) -> io::Result<u64> {
        let first_page = bytes.as_ptr() as u64 / PAGE_SIZE;
        self.entries.resize(bytes.len() / PAGE * 8, 0);
        self.pagemap.read_exact_at(&mut self.entries, first_page * 8)?;
        let (mut run, mut written) = (0..0, 0);
        let mut flush = |run: &Range<usize>| -> io::Result<()> {
            written += run.len() as u64;
            self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)
        };
        for (index, (page, entry)) in
            bytes.chunks_exact(PAGE).zip(self.entries.chunks_exact(8)).enumerate()
        {
            let entry = entry.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
            let at = index * PAGE;
            // Of what lies in a file nothing need be there yet; other memory that is not there is zero,
            // and looking at it would make it.
            let touched = entry & (PRESENT | SWAPPED) != 0 || self.in_file(gpa + at as u64);
            if touched && !is_zero(page) {
                if run.end != at {
                    flush(&run)?;
                    run.start = at;
                }
                run.end = at + PAGE;
            }
        }
        flush(&run)?;
        Ok(written)
    }

    fn in_file(&self, gpa: u64) -> bool {
        self.image.overlays.iter().any(|range| range.contains(&gpa))
    }
}

static ZEROES: [u8; PAGE] = [0; PAGE];

fn is_zero(page: &[u8]) -> bool {
    page == ZEROES
}

/// Pages that a fingerprint is made of.
const SAMPLES: u64 = 16;

/// Pages of a memory file by which it is known: some that have data, evenly over the file.
fn samples(file: &File, size: u64) -> io::Result<Vec<u64>> {
    let mut samples = Vec::new();
    for n in 0..SAMPLES {
        let from = libc::off_t::try_from(size / SAMPLES * n);
        let from = from.map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: lseek has no memory arguments.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) };
        // There is none behind the last.
        let Ok(found) = u64::try_from(found) else { break };
        samples.push(found / PAGE_SIZE * PAGE_SIZE);
    }
    samples.dedup();
    Ok(samples)
}

/// Says whether a memory file is the one that a state was written with: a hash (BLAKE3) of some of its
/// pages. Quick, since a restore makes it.
///
/// # Errors
/// The file cannot be read, or is too short.
pub fn fingerprint(file: &File, samples: &[u64]) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut page = [0; PAGE];
    for &at in samples {
        file.read_exact_at(&mut page, at)?;
        hasher.update(&at.to_le_bytes()).update(&page);
    }
    Ok(hasher.finalize().to_hex().to_string())
}
