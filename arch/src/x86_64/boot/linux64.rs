//! The 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`, version 2.15, "64-bit Boot
//! Protocol"; `zero-page.rst`).

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::cpu_state::{self, PageSize};
use super::{BootError, Entry, EntryMode, Initrd, write, write_cmdline};
use crate::x86_64::kernel::SetupHeader;
use crate::x86_64::layout;

/// "HdrS", the magic of a setup header.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xAA55;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
/// The protocol we speak, for images that bring no header.
const PROTOCOL_VERSION: u16 = 0x020F;
/// `loadflags`: the kernel lies at 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// Alignment of a `vmlinux`, which has no header to say it.
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// What the protocol tells a kernel.
#[derive(Clone, Copy, Debug)]
pub struct LinuxBoot<'a> {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Guest-physical address of the 64-bit entry.
    pub entry: u64,
    /// The command line without NUL.
    pub cmdline: &'a [u8],
    /// The initrd, if there is one.
    pub initrd: Option<Initrd>,
    /// The setup header of the bzImage that the kernel came from; `None` for a `vmlinux`.
    pub header: Option<&'a SetupHeader>,
    /// Guest-physical address of the ACPI RSDP, if there are ACPI tables.
    pub rsdp: Option<u64>,
    /// First address behind all that the kernel needs of memory before it has page tables of its
    /// own.
    pub kernel_end: u64,
    /// Size of the pages that the initial page tables map.
    pub page_size: PageSize,
}

/// Writes GDT, page tables, command line and zero page, and says how to enter.
///
/// # Errors
///
/// A command line that the kernel does not take, an entry point above the mapped 4 GiB, or RAM
/// that does not reach to the end of the tables (1 MiB).
pub fn write_boot<M: GuestMemoryBackend>(
    memory: &M,
    boot: &LinuxBoot<'_>,
) -> Result<Entry, BootError> {
    if boot.entry >= layout::HOLE_END {
        return Err(BootError::EntryOutOfReach { address: boot.entry });
    }
    let cmdline_max = boot.header.map_or(layout::CMDLINE_SIZE - 1, |header| {
        let size = header.0.cmdline_size;
        // A u32 fits a usize on every target this crate builds for.
        size as usize
    });
    write_cmdline(memory, boot.cmdline, cmdline_max)?;
    write(memory, "the zero page", ZeroPage::new(boot).as_slice(), layout::ZERO_PAGE)?;
    write(memory, "the GDT", &cpu_state::gdt(EntryMode::Long), layout::GDT)?;
    let tables = cpu_state::page_tables(boot.page_size, boot.kernel_end);
    write(memory, "the page tables", &tables, layout::PAGE_TABLES)?;
    Ok(Entry { mode: EntryMode::Long, address: boot.entry, info: layout::ZERO_PAGE })
}

/// `struct boot_params`.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: `boot_params` is `repr(C, packed)` and has integer fields only: no padding, and every
// bit pattern is a value.
unsafe impl ByteValued for ZeroPage {}

impl ZeroPage {
    fn new(boot: &LinuxBoot<'_>) -> Self {
        let mut params = boot_params::default();
        match boot.header {
            Some(header) => params.hdr = header.0,
            None => {
                params.hdr.header = HEADER_MAGIC;
                params.hdr.boot_flag = BOOT_FLAG;
                params.hdr.version = PROTOCOL_VERSION;
                params.hdr.loadflags = LOADED_HIGH;
                params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
                params.hdr.cmdline_size = layout::CMDLINE_SIZE as u32 - 1;
            }
        }
        params.hdr.type_of_loader = LOADER_UNDEFINED;
        // A list in guest memory that the file has no business pointing into.
        params.hdr.setup_data = 0;
        params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
        if let Some(initrd) = boot.initrd {
            (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.address);
            (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initrd.size);
        }
        params.acpi_rsdp_addr = boot.rsdp.unwrap_or(0);

        let map = layout::e820(boot.ram_size);
        // The map has at most seven entries, the page room for 128.
        params.e820_entries = map.len() as u8;
        for (slot, entry) in params.e820_table.iter_mut().zip(map) {
            *slot =
                boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind as u32 };
        }
        Self(params)
    }
}

/// The low and the high 32 bits.
fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
