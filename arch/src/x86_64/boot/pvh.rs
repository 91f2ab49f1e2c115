//! The PVH boot protocol (Xen, `public/arch-x86/hvm/start_info.h` and `docs/misc/pvh.pandoc`).

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::{BootError, Entry, EntryMode, Initrd, cpu_state, write, write_cmdline};
use crate::x86_64::layout;

/// "xEn3" with the top bit of the E set.
const MAGIC: u32 = 0x336E_C578;
/// The version with a memory map.
const VERSION: u32 = 1;

/// Where the module list lies, behind the start info.
const MODULES: u64 = layout::PVH_START_INFO + 0x100;
/// Where the memory map lies, behind the module list.
const MEMORY_MAP: u64 = layout::PVH_START_INFO + 0x200;

/// What the protocol tells a kernel.
#[derive(Clone, Copy, Debug)]
pub struct PvhBoot<'a> {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// Guest-physical address of the PVH entry.
    pub entry: u64,
    /// The command line without NUL.
    pub cmdline: &'a [u8],
    /// The initrd, if there is one.
    pub initrd: Option<Initrd>,
    /// Guest-physical address of the ACPI RSDP, if there are ACPI tables.
    pub rsdp: Option<u64>,
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct StartInfo(hvm_start_info);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Module(hvm_modlist_entry);
#[derive(Clone, Copy)]
#[repr(transparent)]
struct MapEntry(hvm_memmap_table_entry);

// SAFETY: `repr(C)` integers, each at a multiple of its size and 56 bytes in all: no padding, and
// every bit pattern is a value.
unsafe impl ByteValued for StartInfo {}
// SAFETY: four 64-bit integers: no padding, and every bit pattern is a value.
unsafe impl ByteValued for Module {}
// SAFETY: two 64-bit and two 32-bit integers: no padding, and every bit pattern is a value.
unsafe impl ByteValued for MapEntry {}

/// Writes GDT, command line, start info, module list and memory map, and says how to enter.
///
/// # Errors
///
/// A command line that is too long, an entry point that 32-bit code cannot have, or RAM that does
/// not reach to the end of the tables (1 MiB).
pub fn write_boot<M: GuestMemoryBackend>(
    memory: &M,
    boot: &PvhBoot<'_>,
) -> Result<Entry, BootError> {
    if boot.entry >= layout::HOLE_END {
        return Err(BootError::EntryOutOfReach { address: boot.entry });
    }
    write_cmdline(memory, boot.cmdline, layout::CMDLINE_SIZE - 1)?;
    write(memory, "the GDT", &cpu_state::gdt(EntryMode::Protected), layout::GDT)?;

    if let Some(initrd) = boot.initrd {
        let module = Module(hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        });
        write(memory, "the PVH module list", module.as_slice(), MODULES)?;
    }
    let map: Vec<u8> = layout::e820(boot.ram_size)
        .into_iter()
        .flat_map(|entry| {
            let entry = MapEntry(hvm_memmap_table_entry {
                addr: entry.start,
                size: entry.size,
                type_: entry.kind as u32,
                reserved: 0,
            });
            entry.as_slice().to_vec()
        })
        .collect();
    write(memory, "the PVH memory map", &map, MEMORY_MAP)?;

    let info = StartInfo(hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        nr_modules: boot.initrd.is_some().into(),
        modlist_paddr: if boot.initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: boot.rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: (map.len() / size_of::<MapEntry>()) as u32,
        reserved: 0,
    });
    write(memory, "the PVH start info", info.as_slice(), layout::PVH_START_INFO)?;
    Ok(Entry { mode: EntryMode::Protected, address: boot.entry, info: layout::PVH_START_INFO })
}
