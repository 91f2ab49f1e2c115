//! Memory files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Sample, Sum};
use crate::memory::{Contents, PAGE_SIZE, Runs, shared_out};

/// Pages that a writer takes at a time: as much as stays in the processor's caches between reading and writing.
const PIECE: u64 = (256 << 10) / PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
static ZEROES: [u8; PAGE] = [0; PAGE];

/// Is told of bytes that are done, and of how many there are, from several threads.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Writes `contents` to `file`, which is new and empty: all of them, or with `pages` what is in those. Of
/// all what is zero stays a hole; of `pages` it is written, for it may be another in what lies below. Returns
/// the bytes that were written, and what they come to.
///
/// # Errors
/// A file cannot be read or written.
pub fn save(
    contents: &Contents,
    pages: Option<&Runs>,
    file: &File,
    progress: Progress<'_>,
) -> io::Result<(u64, Sum)> {
    file.set_len(contents.pages() * PAGE_SIZE)?;
    // Without a layer there is nothing but zeroes.
    let there =
        contents.pieces().iter().map(|piece| piece.extent.at..piece.extent.at + piece.extent.len);
    let runs = pages.cloned().unwrap_or_else(|| Runs::new(there));
    let total = runs.pages();
    let parts = runs.pieces(PIECE);
    let done = AtomicU64::new(0);
    let written = shared_out(&parts, Vec::new, |buffer, part| {
        let written = copy(contents, part.clone(), pages.is_some(), file, buffer)?;
        let len = part.end - part.start;
        let done = done.fetch_add(len, Ordering::Relaxed) + len;
        progress(done * PAGE_SIZE, total * PAGE_SIZE);
        Ok(written)
    })?;
    let add = |(bytes, sum), (more, other)| (bytes + more, sum + other);
    Ok(written.into_iter().fold((0, Sum::default()), add))
}

/// Writes `part`. `buffer` is what the last one left.
fn copy(
    contents: &Contents,
    part: Range<u64>,
    zeroes: bool,
    file: &File,
    buffer: &mut Vec<u8>,
) -> io::Result<(u64, Sum)> {
    let len = (part.end - part.start) as usize * PAGE;
    buffer.resize(buffer.len().max(len), 0);
    let bytes = &mut buffer[..len];
    let mut known = part.start;
    for piece in contents.within(part.clone()) {
        let at = (piece.extent.at - part.start) as usize * PAGE;
        let len = piece.extent.len as usize * PAGE;
        bytes[(known - part.start) as usize * PAGE..at].fill(0);
        known = piece.extent.at + piece.extent.len;
        piece.file.read_exact_at(&mut bytes[at..at + len], piece.extent.from * PAGE_SIZE)?;
    }
    bytes[(known - part.start) as usize * PAGE..].fill(0);
    let start = part.start * PAGE_SIZE;
    if zeroes {
        file.write_all_at(bytes, start)?;
        return Ok((bytes.len() as u64, Sum::of(part.start, bytes)));
    }
    let pages = bytes.chunks_exact(PAGE).zip(0u64..);
    let written = pages.filter(|(page, _)| *page != ZEROES).map(|(_, n)| n..n + 1);
    let written = Runs::new(written);
    let mut sum = Sum::default();
    for run in written.iter() {
        let (from, to) = (run.start as usize * PAGE, run.end as usize * PAGE);
        file.write_all_at(&bytes[from..to], start + run.start * PAGE_SIZE)?;
        sum = sum + Sum::of(part.start + run.start, &bytes[from..to]);
    }
    Ok((written.pages() * PAGE_SIZE, sum))
}

/// Pages by which memory is known.
const SAMPLES: u64 = 16;

/// Some pages of a memory file that have data, evenly over it.
///
/// # Errors
/// The file cannot be read.
pub(super) fn samples_of_file(file: &File, size: u64) -> io::Result<Vec<Sample>> {
    let mut samples: Vec<Sample> = Vec::new();
    let mut bytes = [0; PAGE];
    for n in 0..SAMPLES {
        let from = libc::off_t::try_from(size / SAMPLES * n);
        let from = from.map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: lseek has no memory arguments.
        let found = unsafe { libc::lseek(file.as_raw_fd(), from, libc::SEEK_DATA) };
        // There is none behind the last.
        let Ok(found) = u64::try_from(found) else { break };
        let page = found / PAGE_SIZE;
        if samples.last().is_none_or(|last| last.page < page) {
            file.read_exact_at(&mut bytes, page * PAGE_SIZE)?;
            samples.push(Sample::new(page, &bytes));
        }
    }
    Ok(samples)
}

/// Most pages that are looked at for a sample: what is zero is a hole in many a file.
const LOOKS: u64 = 1024;

/// Some pages of `contents` that are not zero, half of them in `changed` and half not, evenly over each.
///
/// # Errors
/// A layer cannot be read.
pub(super) fn samples_of(contents: &Contents, changed: &Runs) -> io::Result<Vec<Sample>> {
    let there =
        contents.pieces().iter().map(|piece| piece.extent.at..piece.extent.at + piece.extent.len);
    let others = Runs::new(there).without(changed);
    let mut samples = Vec::new();
    for set in [changed, &others] {
        let most = samples.len() + SAMPLES as usize / 2;
        // Coarse first, then finer, so that few looks are enough where most pages have something.
        let steps = [SAMPLES / 2, SAMPLES * 4, LOOKS].map(|n| (set.pages() / n).max(1) as usize);
        for step in steps {
            for page in set.iter().flatten().step_by(step) {
                let known = samples.iter().any(|sample: &Sample| sample.page == page);
                if samples.len() < most && !known {
                    samples.extend(sample(contents, page)?);
                }
            }
        }
    }
    Ok(samples)
}

fn sample(contents: &Contents, page: u64) -> io::Result<Option<Sample>> {
    let mut bytes = [0; PAGE];
    contents.read_page(page, &mut bytes)?;
    Ok((bytes != ZEROES).then(|| Sample::new(page, &bytes)))
}

/// True if `contents` have something beside `pages` that is not zero.
///
/// # Errors
/// A layer cannot be read.
pub(super) fn has_more(contents: &Contents, pages: &Runs) -> io::Result<bool> {
    let there =
        contents.pieces().iter().map(|piece| piece.extent.at..piece.extent.at + piece.extent.len);
    let mut bytes = [0; PAGE];
    for page in Runs::new(there).without(pages).iter().flatten() {
        contents.read_page(page, &mut bytes)?;
        if bytes != ZEROES {
            return Ok(true);
        }
    }
    Ok(false)
}

/// True if `contents` have all of these pages as they were.
///
/// # Errors
/// A layer cannot be read, or is too short.
pub(super) fn has(contents: &Contents, samples: &[Sample]) -> io::Result<bool> {
    let mut bytes = [0; PAGE];
    for sample in samples {
        if sample.page >= contents.pages() {
            return Ok(false);
        }
        contents.read_page(sample.page, &mut bytes)?;
        if !sample.is(&bytes) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Sample {
    fn new(page: u64, bytes: &[u8; PAGE]) -> Sample {
        Sample { page, hash: blake3::hash(bytes).to_hex()[..32].to_owned() }
    }

    /// True if the page is as it was.
    pub(crate) fn is(&self, bytes: &[u8; PAGE]) -> bool {
        Sample::new(self.page, bytes) == *self
    }
}
