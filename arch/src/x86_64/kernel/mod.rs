//! Kernel images: what a file is, what of it goes where, and where execution begins.
//!
//! Two kinds of image boot: an ELF `vmlinux` (or any other 64-bit ELF that is linked at or above
//! 1 MiB), and the `bzImage` that distributions ship, whose payload is unpacked into such an ELF
//! or which is entered itself. Only headers are read here, however large the file is: loading the
//! segments is the caller's.
//!
//! Files are hostile: every number in them is checked before it is used, and nothing is allocated
//! by a length in a file without a bound.

mod bzimage;
mod elf;
mod error;
mod identify;
mod payload;

use std::io::{Cursor, Read, Seek, SeekFrom};

pub use self::bzimage::{BzImage, SetupHeader};
pub use self::elf::{ElfKernel, Segment};
pub use self::error::{KernelError, PayloadError};
pub use self::payload::{Compression, MAX_UNPACKED_SIZE, unpack};

/// A kernel image, by what its headers say.
#[derive(Clone, Debug)]
pub enum KernelImage {
    /// A 64-bit x86 ELF, to be loaded by its segments.
    Elf(ElfKernel),
    /// A Linux `bzImage`.
    BzImage(BzImage),
}

impl KernelImage {
    /// Reads the headers of `image` and tells what it is.
    ///
    /// The position of `image` is not kept. It is read at most a few hundred KiB.
    ///
    /// # Errors
    ///
    /// An image that is empty, truncated, inconsistent, for another architecture, or no kernel at
    /// all; or that cannot be read.
    pub fn parse<R: Read + Seek>(image: &mut R) -> Result<Self, KernelError> {
        let mut source = Source::new(image)?;
        let head = source.head()?;
        if head.starts_with(&elf::MAGIC) {
            return Ok(Self::Elf(elf::parse(&mut source)?));
        }
        if bzimage::has_setup_header(&head) {
            return Ok(Self::BzImage(bzimage::parse(&mut source, &head)?));
        }
        Err(identify::explain(&head))
    }

    /// [`KernelImage::parse`] for an image in memory, such as an unpacked payload.
    ///
    /// # Errors
    ///
    /// As [`KernelImage::parse`].
    pub fn parse_bytes(image: &[u8]) -> Result<Self, KernelError> {
        Self::parse(&mut Cursor::new(image))
    }
}

/// How much of the start of a file is looked at to tell what it is: enough for the superblock of
/// an ext file system, which people do pass as a kernel.
const HEAD_SIZE: usize = 0x1000;

/// A file with a known length, read at offsets.
struct Source<'a, R> {
    reader: &'a mut R,
    length: u64,
}

impl<'a, R: Read + Seek> Source<'a, R> {
    fn new(reader: &'a mut R) -> Result<Self, KernelError> {
        let length = reader.seek(SeekFrom::End(0)).map_err(KernelError::read_at(0))?;
        Ok(Self { reader, length })
    }

    /// The first bytes: [`HEAD_SIZE`], or all of a shorter file.
    fn head(&mut self) -> Result<Vec<u8>, KernelError> {
        if self.length == 0 {
            return Err(KernelError::Empty);
        }
        self.read(0, self.length.min(HEAD_SIZE as u64), "the header")
    }

    /// Reads `size` bytes at `offset`, which the caller has bounded; `what` is what they are.
    fn read(&mut self, offset: u64, size: u64, what: &'static str) -> Result<Vec<u8>, KernelError> {
        self.check(offset, size, what)?;
        let read_error = KernelError::read_at(offset);
        let length = usize::try_from(size).map_err(|_| KernelError::TooLarge { what, size })?;
        let mut bytes = vec![0; length];
        self.reader
            .seek(SeekFrom::Start(offset))
            .and_then(|_| self.reader.read_exact(&mut bytes))
            .map_err(read_error)?;
        Ok(bytes)
    }

    /// Whether the file has `size` bytes at `offset`.
    fn check(&self, offset: u64, size: u64, what: &'static str) -> Result<(), KernelError> {
        let need = offset.saturating_add(size);
        if need > self.length {
            return Err(KernelError::Truncated { what, need, have: self.length });
        }
        Ok(())
    }
}

/// Little-endian numbers at offsets in a slice that is known to be long enough; zero outside it.
trait Fields {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N];

    fn u8_at(&self, offset: usize) -> u8 {
        u8::from_le_bytes(self.array(offset))
    }
    fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }
    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }
    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.array(offset))
    }
}

impl Fields for [u8] {
    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        offset
            .checked_add(N)
            .and_then(|end| self.get(offset..end))
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests;
