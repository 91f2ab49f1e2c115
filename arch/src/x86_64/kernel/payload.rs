//! The compressed kernel inside a `bzImage`.
//!
//! Linux appends the unpacked size as 4 little-endian bytes to every format but gzip, which has
//! it at its end anyway (`scripts/Makefile.lib`, `size_append`). So it is known before anything
//! is unpacked, and memory is taken once, within the bound.

use std::error::Error;
use std::io::Read;

use flate2::read::GzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::Stream;

use super::{PayloadError, elf};

/// No kernel unpacks to more bytes than this.
pub const MAX_UNPACKED_SIZE: u64 = 512 << 20;

/// Memory that the XZ decoder may take, in bytes: the dictionary of a kernel is 128 MiB at most.
const XZ_MEMORY_LIMIT: u64 = 256 << 20;
/// What a block of LZ4's legacy frame unpacks to, at most.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: u32 = 0x184C_2102;
/// Length of the appended size.
const TRAILER: usize = 4;

/// How a payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: an ELF file.
    None,
    /// gzip.
    Gzip,
    /// LZ4, in the legacy frame.
    Lz4,
    /// Zstandard.
    Zstd,
    /// XZ, with the x86 branch filter.
    Xz,
    /// bzip2; recognised, not unpacked.
    Bzip2,
    /// LZMA (before XZ); recognised, not unpacked.
    Lzma,
    /// LZO; recognised, not unpacked.
    Lzo,
}

impl Compression {
    /// By the magic at the start of `payload`.
    pub fn of(payload: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (&elf::MAGIC, Compression::None),
            (&[0x1F, 0x8B], Compression::Gzip),
            (&[0x02, 0x21, 0x4C, 0x18], Compression::Lz4),
            (&[0x28, 0xB5, 0x2F, 0xFD], Compression::Zstd),
            (b"\xFD7zXZ\0", Compression::Xz),
            (b"BZh", Compression::Bzip2),
            (&[0x5D, 0x00, 0x00], Compression::Lzma),
            (b"\x89LZO\0\r\n", Compression::Lzo),
        ];
        MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map(|&(_, kind)| kind)
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
            Self::Xz => "XZ",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "LZMA",
            Self::Lzo => "LZO",
        }
    }
}

/// Unpacks `payload`, trailing size included, to at most `limit` bytes.
///
/// What comes out starts with ELF's magic; nothing else of it has been checked.
///
/// # Errors
///
/// See [`PayloadError`].
pub fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, PayloadError> {
    let compression = Compression::of(payload).ok_or_else(|| PayloadError::Unknown {
        start: payload.iter().copied().take(8).collect(),
    })?;
    let unpacked = match compression {
        Compression::None => payload.to_vec(),
        Compression::Bzip2 | Compression::Lzma | Compression::Lzo => {
            return Err(PayloadError::Unsupported { name: compression.name() });
        }
        packed => Packed::new(packed, payload, limit)?.unpack()?,
    };
    if unpacked.starts_with(&elf::MAGIC) { Ok(unpacked) } else { Err(PayloadError::NotElf) }
}

/// A compressed payload with its size known.
struct Packed<'a> {
    compression: Compression,
    data: &'a [u8],
    size: usize,
}

impl<'a> Packed<'a> {
    fn new(compression: Compression, payload: &'a [u8], limit: u64) -> Result<Self, PayloadError> {
        let (data, trailer) =
            payload.split_last_chunk::<TRAILER>().ok_or_else(|| PayloadError::Corrupt {
                name: compression.name(),
                source: "it is shorter than its own size field".into(),
            })?;
        let size = u32::from_le_bytes(*trailer);
        if u64::from(size) > limit {
            return Err(PayloadError::TooLarge { limit });
        }
        let data = if compression == Compression::Gzip { payload } else { data };
        // A u32 fits a usize on every target this crate builds for.
        Ok(Self { compression, data, size: size as usize })
    }

    fn corrupt(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> PayloadError {
        PayloadError::Corrupt { name: self.compression.name(), source: source.into() }
    }

    fn unpack(&self) -> Result<Vec<u8>, PayloadError> {
        match self.compression {
            Compression::Lz4 => self.lz4(),
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(self.data)
                    .map_err(|e| self.corrupt(e))?;
                self.read_all(decoder.single_frame())
            }
            Compression::Xz => {
                let stream =
                    Stream::new_stream_decoder(XZ_MEMORY_LIMIT, 0).map_err(|e| self.corrupt(e))?;
                self.read_all(XzDecoder::new_stream(self.data, stream))
            }
            _ => self.read_all(GzDecoder::new(self.data)),
        }
    }

    /// Reads a decoder to its end, which has to come after exactly the promised bytes.
    fn read_all(&self, mut decoder: impl Read) -> Result<Vec<u8>, PayloadError> {
        let mut unpacked = vec![0; self.size];
        let mut filled = 0;
        while let Some(rest) = unpacked.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match decoder.read(rest).map_err(|e| self.corrupt(e))? {
                0 => return Err(self.mismatch(filled)),
                count => filled += count,
            }
        }
        // The end of the stream is where checksums are compared.
        match decoder.read(&mut [0]).map_err(|e| self.corrupt(e))? {
            0 => Ok(unpacked),
            _ => Err(self.mismatch(self.size + 1)),
        }
    }

    fn mismatch(&self, got: usize) -> PayloadError {
        PayloadError::SizeMismatch { expected: self.size as u64, got: got as u64 }
    }

    /// LZ4's legacy frame: a magic, then blocks, each after its compressed length. Frames may
    /// follow one another.
    fn lz4(&self) -> Result<Vec<u8>, PayloadError> {
        let mut unpacked = vec![0; self.size];
        let mut filled = 0;
        let mut rest = self.data;
        while let Some((head, tail)) = rest.split_first_chunk::<4>() {
            rest = tail;
            let length = u32::from_le_bytes(*head);
            if length == LZ4_MAGIC {
                continue;
            }
            let (block, tail) = rest
                .split_at_checked(length as usize)
                .ok_or_else(|| self.corrupt("a block runs over the end"))?;
            rest = tail;
            let room = unpacked.get_mut(filled..).unwrap_or_default();
            let room = match room.len() {
                0..=LZ4_BLOCK => room,
                _ => &mut room[..LZ4_BLOCK],
            };
            filled += lz4_flex::block::decompress_into(block, room).map_err(|e| self.corrupt(e))?;
        }
        if filled == self.size { Ok(unpacked) } else { Err(self.mismatch(filled)) }
    }
}
