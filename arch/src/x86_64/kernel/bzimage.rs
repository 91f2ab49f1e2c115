//! `bzImage`: the setup header, and what of the file goes where.
//!
//! Follows the Linux/x86 boot protocol, versions 2.12 to 2.15
//! (`Documentation/arch/x86/boot.rst`).

use std::io::{Read, Seek};

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::super::layout::HIGH_RAM_START;
use super::payload::{self, MAX_UNPACKED_SIZE};
use super::{ElfKernel, Fields, KernelError, KernelImage, PayloadError, Source};

/// Where the setup header lies in the file, in bytes.
const HEADER_OFFSET: usize = 0x1F1;
/// Where the length of the header beyond 0x202 stands: the operand of its first jump.
const HEADER_LENGTH_OFFSET: usize = 0x201;
const BOOT_FLAG_OFFSET: usize = 0x1FE;
const BOOT_FLAG: u16 = 0xAA55;
const MAGIC_OFFSET: usize = 0x202;
const MAGIC: &[u8] = b"HdrS";
const SECTOR: u64 = 512;
/// Setup sectors of an image that says 0, for the sake of very old kernels.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// The oldest protocol with the 64-bit entry.
const MIN_VERSION: u16 = 0x020C;
/// `loadflags`: the protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: there is a 64-bit entry at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry lies in the protected-mode code.
const ENTRY_64_OFFSET: u64 = 0x200;
/// The largest compressed payload, in bytes; bounds what is read.
const MAX_PAYLOAD_SIZE: u64 = 256 << 20;
/// The largest alignment that is believed; kernels have 2 MiB or 16 MiB.
const MAX_ALIGNMENT: u32 = 1 << 30;

/// A bzImage's setup header, for the zero page.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(transparent)]
pub struct SetupHeader(pub setup_header);

// SAFETY: `setup_header` is `repr(C, packed)` and has integer fields only: no padding, and every
// bit pattern is a value.
unsafe impl ByteValued for SetupHeader {}

/// A Linux `bzImage`.
#[derive(Clone, Debug, PartialEq)]
pub struct BzImage {
    /// The setup header as the file has it, without what lies beyond its own end.
    pub header: SetupHeader,
    /// Where the protected-mode code starts in the file, in bytes.
    pub code_offset: u64,
    /// Its length in bytes.
    pub code_size: u64,
    /// Where the compressed kernel starts in the file, in bytes.
    pub payload_offset: u64,
    /// Its length in bytes; 0 if there is none.
    pub payload_size: u64,
    /// Guest-physical address to load the protected-mode code at: where the kernel prefers to
    /// be, rounded up to its alignment. 1 MiB at least.
    pub load_address: u64,
    /// Bytes from [`load_address`](Self::load_address) on that have to be RAM and free, for the
    /// code, the unpacked kernel and its early heap. At least [`code_size`](Self::code_size).
    pub init_size: u64,
    /// The longest command line the kernel takes, in bytes without the NUL.
    pub cmdline_max: u32,
    /// The last address an initrd may occupy.
    pub initrd_addr_max: u32,
}

impl BzImage {
    /// Guest-physical address of the 64-bit entry, when the image itself is loaded at
    /// [`load_address`](Self::load_address).
    pub fn entry(&self) -> u64 {
        self.load_address + ENTRY_64_OFFSET
    }

    /// Unpacks the kernel: the bytes of an ELF file, followed by relocations that mean nothing to
    /// a kernel loaded where it was linked.
    ///
    /// `image` is the file this was parsed from. The result has at most `init_size` bytes, and
    /// never more than [`MAX_UNPACKED_SIZE`].
    ///
    /// # Errors
    ///
    /// A payload that is corrupt, larger than it says, no ELF, or in a format that is not
    /// supported; or a file that cannot be read.
    pub fn unpack_payload<R: Read + Seek>(&self, image: &mut R) -> Result<Vec<u8>, KernelError> {
        let mut source = Source::new(image)?;
        let packed = source.read(self.payload_offset, self.payload_size, "the payload")?;
        let limit = self.init_size.min(MAX_UNPACKED_SIZE);
        Ok(payload::unpack(&packed, limit)?)
    }

    /// [`unpack_payload`](Self::unpack_payload), and the headers of what came out.
    ///
    /// # Errors
    ///
    /// Those of `unpack_payload`, and of [`KernelImage::parse`] for the unpacked kernel.
    pub fn unpack<R: Read + Seek>(
        &self,
        image: &mut R,
    ) -> Result<(Vec<u8>, ElfKernel), KernelError> {
        let unpacked = self.unpack_payload(image)?;
        match KernelImage::parse_bytes(&unpacked)? {
            KernelImage::Elf(elf) => Ok((unpacked, elf)),
            KernelImage::BzImage(_) => Err(PayloadError::NotElf.into()),
        }
    }
}

/// Whether a file that starts with `head` has a setup header.
pub(super) fn has_setup_header(head: &[u8]) -> bool {
    head.u16_at(BOOT_FLAG_OFFSET) == BOOT_FLAG
        && head.get(MAGIC_OFFSET..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Reads the setup header in `head`, which [`has_setup_header`] has seen.
pub(super) fn parse<R: Read + Seek>(
    source: &mut Source<'_, R>,
    head: &[u8],
) -> Result<BzImage, KernelError> {
    let header = setup_header(head)?.0;
    let [minor, major] = header.version.to_le_bytes();
    if header.version < MIN_VERSION {
        return Err(KernelError::OldProtocol { major, minor });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::WrongArchitecture { arch: "32-bit x86".to_owned() });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::Malformed("it does not load at 1 MiB or above".to_owned()));
    }

    let setup_sectors = match header.setup_sects {
        0 => DEFAULT_SETUP_SECTORS,
        sectors => sectors,
    };
    let code_offset = (u64::from(setup_sectors) + 1) * SECTOR;
    let code_size = code_size(source, code_offset, header.syssize)?;
    let payload_size = u64::from(header.payload_length);
    let payload_offset = code_offset + u64::from(header.payload_offset);
    if payload_size > MAX_PAYLOAD_SIZE {
        return Err(KernelError::TooLarge { what: "its payload", size: payload_size });
    }
    source.check(payload_offset, payload_size, "the payload")?;

    let load_address = load_address(&SetupHeader(header))?;
    Ok(BzImage {
        header: SetupHeader(header),
        code_offset,
        code_size,
        payload_offset,
        payload_size,
        load_address,
        init_size: u64::from(header.init_size).max(code_size),
        cmdline_max: header.cmdline_size,
        initrd_addr_max: header.initrd_addr_max,
    })
}

/// The header as far as it says it goes; zero beyond.
fn setup_header(head: &[u8]) -> Result<SetupHeader, KernelError> {
    let stated = MAGIC_OFFSET + usize::from(head.u8_at(HEADER_LENGTH_OFFSET));
    let end = stated.min(HEADER_OFFSET + size_of::<SetupHeader>());
    let bytes = head.get(HEADER_OFFSET..end).ok_or(KernelError::Truncated {
        what: "the setup header",
        need: end as u64,
        have: head.len() as u64,
    })?;
    let mut header = SetupHeader::default();
    // The slice is no longer than the structure, by `min` above.
    if let Some(target) = header.as_mut_slice().get_mut(..bytes.len()) {
        target.copy_from_slice(bytes);
    }
    Ok(header)
}

/// Length of the protected-mode code: `syssize` paragraphs of 16 bytes. The file may have more
/// (a signature), and up to 15 bytes less.
fn code_size<R: Read + Seek>(
    source: &Source<'_, R>,
    offset: u64,
    paragraphs: u32,
) -> Result<u64, KernelError> {
    let size = u64::from(paragraphs) * 16;
    source.check(offset, size.saturating_sub(15), "the protected-mode code")?;
    let size = size.min(source.length.saturating_sub(offset));
    if size <= ENTRY_64_OFFSET {
        return Err(KernelError::Malformed(format!("its protected-mode code has {size} bytes")));
    }
    Ok(size)
}

fn load_address(header: &SetupHeader) -> Result<u64, KernelError> {
    let (preferred, alignment) = (header.0.pref_address, header.0.kernel_alignment);
    let malformed = || {
        KernelError::Malformed(format!(
            "it prefers address {preferred:#x}, alignment {alignment:#x}"
        ))
    };
    if preferred >= u64::from(u32::MAX) {
        return Err(malformed());
    }
    let address = if header.0.relocatable_kernel == 0 {
        preferred
    } else if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        preferred.max(HIGH_RAM_START).next_multiple_of(alignment.into())
    } else {
        return Err(malformed());
    };
    if address < HIGH_RAM_START {
        return Err(malformed());
    }
    Ok(address)
}
