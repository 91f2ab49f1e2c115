//! What can be wrong with a kernel image.

use std::io;

/// Why a file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file could not be read.
    #[error("cannot read the kernel image at offset {offset:#x}")]
    Read {
        /// Where in the file, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The file has no bytes.
    #[error("the kernel image is empty")]
    Empty,
    /// The file ends before something its headers promise.
    #[error("the kernel image is truncated: {what} would end at byte {need}, the file has {have}")]
    Truncated {
        /// What lies beyond the end.
        what: &'static str,
        /// Where it ends, in bytes.
        need: u64,
        /// Length of the file in bytes.
        have: u64,
    },
    /// A kernel, but not for a 64-bit x86 machine.
    #[error("the kernel image is for {arch}, this machine is 64-bit x86")]
    WrongArchitecture {
        /// The architecture it is for.
        arch: String,
    },
    /// Not a kernel.
    #[error("the file is not a kernel image: it looks like {looks_like}")]
    NotAKernel {
        /// What it is instead.
        looks_like: String,
    },
    /// A kernel image whose headers contradict themselves or cannot be used.
    #[error("the kernel image is malformed: {0}")]
    Malformed(String),
    /// A `bzImage` that is too old to be entered in 64-bit mode.
    #[error(
        "the kernel's boot protocol is {major}.{minor:02}, at least 2.12 is needed (Linux 3.8)"
    )]
    OldProtocol {
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// Something is larger than any real kernel has it.
    #[error("the kernel image is malformed: {what} has {size} bytes")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
    },
    /// The payload of a `bzImage` could not be unpacked.
    #[error("cannot unpack the kernel in the bzImage")]
    Payload(#[from] PayloadError),
}

impl KernelError {
    /// For `map_err`: a read at `offset` failed.
    pub(super) fn read_at(offset: u64) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { offset, source }
    }
}

/// Why the payload of a `bzImage` cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// A compression that Linux offers and Hull does not unpack. The image can still be entered
    /// itself.
    #[error("its payload is compressed with {name}, which is not supported")]
    Unsupported {
        /// The name of the compression.
        name: &'static str,
    },
    /// No compression that Linux offers.
    #[error("its payload starts with {start:02x?}, which is no known compression")]
    Unknown {
        /// The first bytes.
        start: Vec<u8>,
    },
    /// The compressed data is broken.
    #[error("its {name} payload is corrupt")]
    Corrupt {
        /// The name of the compression.
        name: &'static str,
        /// What the decoder said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Unpacking gives another size than the image says.
    #[error("its payload unpacks to {got} bytes, {expected} are promised")]
    SizeMismatch {
        /// Bytes promised.
        expected: u64,
        /// Bytes unpacked.
        got: u64,
    },
    /// Unpacking gives, or would give, more than is allowed.
    #[error("its payload unpacks to more than {limit} bytes")]
    TooLarge {
        /// The bound in bytes.
        limit: u64,
    },
    /// What was unpacked is no ELF file.
    #[error("its payload is not an ELF file")]
    NotElf,
}
