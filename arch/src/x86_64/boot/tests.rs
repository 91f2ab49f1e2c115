use kvm_bindings::{kvm_cpuid_entry2, kvm_lapic_state, kvm_sregs};
use linux_loader::bootparam::setup_header;
use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::cpu_state::PageSize;
use super::linux64::LinuxBoot;
use super::placement::{Extent, PlacementError};
use super::pvh::PvhBoot;
use super::*;
use crate::x86_64::kernel::SetupHeader;

const MIB: u64 = 1 << 20;

fn memory() -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), layout::MIN_RAM as usize)]).unwrap()
}

fn bytes<const N: usize>(memory: &GuestMemoryMmap<()>, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

fn u32_at(memory: &GuestMemoryMmap<()>, address: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, address))
}

fn u64_at(memory: &GuestMemoryMmap<()>, address: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, address))
}

fn linux(cmdline: &[u8]) -> LinuxBoot<'_> {
    LinuxBoot {
        ram_size: 128 * MIB,
        entry: 16 * MIB,
        cmdline,
        initrd: Some(Initrd { address: 0x700_0000, size: 0x1234 }),
        header: None,
        rsdp: Some(layout::ACPI_START),
        kernel_end: 32 * MIB,
        page_size: PageSize::Mib2,
    }
}

/// Offsets from `Documentation/arch/x86/zero-page.rst` and `boot.rst`.
#[test]
fn the_zero_page_tells_everything() {
    let memory = memory();
    let entry = linux64::write_boot(&memory, &linux(b"console=ttyS0")).unwrap();
    assert_eq!(entry, Entry { mode: EntryMode::Long, address: 16 * MIB, info: 0x7000 });
    let page = layout::ZERO_PAGE;
    assert_eq!(u64_at(&memory, page + 0x70), layout::ACPI_START);
    assert_eq!(bytes(&memory, page + 0x202), *b"HdrS");
    assert_eq!(bytes(&memory, page + 0x1FE), [0x55, 0xAA]);
    assert_eq!(bytes(&memory, page + 0x210), [0xFF]);
    assert_eq!(u32_at(&memory, page + 0x218), 0x700_0000);
    assert_eq!(u32_at(&memory, page + 0x21C), 0x1234);
    assert_eq!(u32_at(&memory, page + 0x228), layout::CMDLINE as u32);
    assert_eq!(u32_at(&memory, page + 0x238), 2047);
    assert_eq!(bytes(&memory, layout::CMDLINE), *b"console=ttyS0\0");

    let map = layout::e820(128 * MIB);
    let [entries] = bytes(&memory, page + 0x1E8);
    assert_eq!(usize::from(entries), map.len());
    for (entry, at) in map.iter().zip((page + 0x2D0..).step_by(20)) {
        assert_eq!(u64_at(&memory, at), entry.start);
        assert_eq!(u64_at(&memory, at + 8), entry.size);
        assert_eq!(u32_at(&memory, at + 16), entry.kind as u32);
    }
}

#[test]
fn a_bzimage_keeps_its_header_but_for_what_a_loader_fills_in() {
    let memory = memory();
    let header = SetupHeader(setup_header {
        header: 0x5372_6448,
        version: 0x20F,
        init_size: 0x123_4000,
        xloadflags: 0x7F,
        setup_data: 0xDEAD_0000,
        cmdline_size: 10,
        ..Default::default()
    });
    let mut boot = linux(b"0123456789");
    boot.header = Some(&header);
    linux64::write_boot(&memory, &boot).unwrap();
    assert_eq!(u32_at(&memory, layout::ZERO_PAGE + 0x260), 0x123_4000);
    assert_eq!(bytes(&memory, layout::ZERO_PAGE + 0x236), [0x7F, 0]);
    assert_eq!(u64_at(&memory, layout::ZERO_PAGE + 0x250), 0, "setup_data");
    assert_eq!(bytes(&memory, layout::ZERO_PAGE + 0x210), [0xFF]);

    boot.cmdline = b"0123456789a";
    let error = linux64::write_boot(&memory, &boot).unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { length: 11, max: 10 }), "{error}");
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    let memory = memory();
    let longest = vec![b'a'; 2047];
    linux64::write_boot(&memory, &linux(&longest)).unwrap();
    let too_long = vec![b'a'; 2048];
    let error = linux64::write_boot(&memory, &linux(&too_long)).unwrap_err();
    assert!(matches!(error, BootError::CmdlineTooLong { length: 2048, max: 2047 }), "{error}");
    let error = linux64::write_boot(&memory, &linux(b"quiet\0init=/bin/sh")).unwrap_err();
    assert!(matches!(error, BootError::CmdlineNul { position: 5 }), "{error}");
}

#[test]
fn entries_above_four_gib_are_refused() {
    let memory = memory();
    let boot = LinuxBoot { entry: 1 << 32, ..linux(b"") };
    let error = linux64::write_boot(&memory, &boot).unwrap_err();
    assert!(matches!(error, BootError::EntryOutOfReach { .. }), "{error}");
    let pvh = PvhBoot { ram_size: MIB, entry: 1 << 32, cmdline: b"", initrd: None, rsdp: None };
    let error = pvh::write_boot(&memory, &pvh).unwrap_err();
    assert!(matches!(error, BootError::EntryOutOfReach { .. }), "{error}");
}

#[test]
fn missing_memory_is_an_error_that_names_the_table() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
    let error = linux64::write_boot(&memory, &linux(b"")).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the command line at 0x20100");
}

/// Offsets from Xen's `start_info.h`.
#[test]
fn the_pvh_start_info_leads_to_map_module_and_command_line() {
    let memory = memory();
    let initrd = Some(Initrd { address: 0x700_0000, size: 0x1234 });
    let boot = PvhBoot {
        ram_size: 5 << 30,
        entry: 0x100_0000,
        cmdline: b"quiet",
        initrd,
        rsdp: Some(layout::ACPI_START),
    };
    let entry = pvh::write_boot(&memory, &boot).unwrap();
    assert_eq!(entry.mode, EntryMode::Protected);
    let info = entry.info;
    assert_eq!(u32_at(&memory, info), 0x336E_C578);
    assert_eq!(u32_at(&memory, info + 4), 1);
    assert_eq!(u32_at(&memory, info + 12), 1);
    let modules = u64_at(&memory, info + 16);
    assert_eq!(u64_at(&memory, modules), 0x700_0000);
    assert_eq!(u64_at(&memory, modules + 8), 0x1234);
    assert_eq!(bytes(&memory, u64_at(&memory, info + 24)), *b"quiet\0");
    assert_eq!(u64_at(&memory, info + 32), layout::ACPI_START);
    let map = layout::e820(5 << 30);
    assert_eq!(u32_at(&memory, info + 48) as usize, map.len());
    for (entry, at) in map.iter().zip((u64_at(&memory, info + 40)..).step_by(24)) {
        assert_eq!(u64_at(&memory, at), entry.start);
        assert_eq!(u64_at(&memory, at + 8), entry.size);
        assert_eq!(u32_at(&memory, at + 16), entry.kind as u32);
    }
    // Everything is in front of the zero page's place.
    assert!(u64_at(&memory, info + 40) + map.len() as u64 * 24 <= layout::ZERO_PAGE);
}

/// Walks the page tables as the CPU would.
fn translate(tables: &[u8], address: u64) -> Option<u64> {
    let entry = |table: u64, index: u64| {
        let offset = (table - layout::PAGE_TABLES + index * 8) as usize;
        let value = u64::from_le_bytes(tables.get(offset..offset + 8)?.try_into().ok()?);
        (value & 1 != 0).then_some(value)
    };
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    let pml4e = entry(layout::PAGE_TABLES, address >> 39 & 511)?;
    let pdpte = entry(pml4e & ADDRESS, address >> 30 & 511)?;
    if pdpte & 0x80 != 0 {
        return Some((pdpte & ADDRESS) + (address & ((1 << 30) - 1)));
    }
    let pde = entry(pdpte & ADDRESS, address >> 21 & 511)?;
    assert_ne!(pde & 0x80, 0);
    Some((pde & ADDRESS) + (address & ((1 << 21) - 1)))
}

#[test]
fn what_a_kernel_needs_is_mapped_one_to_one() {
    let ends = [0, 32 * MIB, 1 << 30, (1 << 30) + 1, 3 << 30, 4 << 30, u64::MAX];
    for (size, end) in [PageSize::Mib2, PageSize::Gib1].iter().flat_map(|s| ends.map(|e| (*s, e))) {
        let tables = cpu_state::page_tables(size, end);
        assert!(tables.len() <= 6 * 4096);
        let last = end.clamp(1 << 30, 4 << 30) - 1;
        for address in [0, 0x7123, 16 * MIB, (1 << 30) - 1, last] {
            assert_eq!(translate(&tables, address), Some(address), "{size:?} {address:#x}");
        }
        assert_eq!(translate(&tables, 4 << 30), None);
        assert_eq!(translate(&tables, 1 << 39), None);
    }
}

#[test]
fn large_pages_follow_cpuid() {
    let leaf = |edx| kvm_cpuid_entry2 { function: 0x8000_0001, edx, ..Default::default() };
    assert_eq!(PageSize::largest(&[leaf(1 << 26)]), PageSize::Gib1);
    assert_eq!(PageSize::largest(&[leaf(!(1 << 26))]), PageSize::Mib2);
    assert_eq!(PageSize::largest(&[]), PageSize::Mib2);
}

#[test]
fn long_mode_is_entered_as_the_protocol_says() {
    let entry = Entry { mode: EntryMode::Long, address: 16 * MIB, info: layout::ZERO_PAGE };
    let regs = cpu_state::regs(&entry);
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (16 * MIB, layout::ZERO_PAGE, 2));
    let reset = kvm_sregs { apic_base: 0xFEE0_0900, cr0: 0x6000_0010, ..Default::default() };
    let sregs = cpu_state::sregs(&entry, reset);
    assert_eq!(sregs.apic_base, 0xFEE0_0900);
    assert_eq!((sregs.cr0, sregs.cr4), (0x8000_0011, 0x20));
    assert_eq!((sregs.cr3, sregs.efer), (layout::PAGE_TABLES, 0x500));
    assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
    for segment in [sregs.ds, sregs.es, sregs.ss] {
        assert_eq!((segment.selector, segment.type_), (0x18, 3));
    }
    // The descriptors in memory are those that the segments were loaded from.
    let gdt = cpu_state::gdt(EntryMode::Long);
    assert_eq!(usize::from(sregs.gdt.limit) + 1, gdt.len());
    let descriptor = |selector: u16| {
        let at = usize::from(selector);
        u64::from_le_bytes(gdt[at..at + 8].try_into().unwrap())
    };
    assert_eq!(descriptor(sregs.cs.selector), 0x00AF_9B00_0000_FFFF);
    assert_eq!(descriptor(sregs.ds.selector), 0x00CF_9300_0000_FFFF);
    assert_eq!(descriptor(sregs.tr.selector), 0x0000_8B00_0000_0067);
}

#[test]
fn pvh_enters_flat_protected_mode_without_paging() {
    let entry = Entry { mode: EntryMode::Protected, address: 0x100_0000, info: 0x6000 };
    let regs = cpu_state::regs(&entry);
    assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, 0x6000, 2));
    let sregs = cpu_state::sregs(&entry, kvm_sregs { cr4: 0x20, ..Default::default() });
    assert_eq!((sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer), (0x11, 0, 0, 0));
    assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, u32::MAX));
    let gdt = cpu_state::gdt(EntryMode::Protected);
    assert_eq!(gdt[0x10..0x18], 0x00CF_9B00_0000_FFFFu64.to_le_bytes());
}

#[test]
fn local_lines_get_their_delivery_mode_only() {
    let mut lapic = kvm_lapic_state::default();
    lapic.regs[0x350 + 2] = 1;
    let lapic = cpu_state::with_local_lines(lapic);
    assert_eq!(lapic.regs[0x350..0x354], [0, 7, 1, 0]);
    assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
    let fpu = cpu_state::fpu();
    assert_eq!((fpu.fcw, fpu.mxcsr), (0x37F, 0x1F80));
}

#[test]
fn what_collides_is_named_on_both_sides() {
    let kernel = || Extent::new("kernel segment 0", 16 * MIB, 8 * MIB);
    let initrd = |start| Extent::new("the initrd", start, MIB);
    placement::check(128 * MIB, &[kernel(), initrd(24 * MIB)]).unwrap();
    let message = |ram, extents: &[Extent]| placement::check(ram, extents).unwrap_err().to_string();
    assert_eq!(
        message(128 * MIB, &[kernel(), initrd(23 * MIB)]),
        "the initrd (0x1700000..0x1800000) overlaps kernel segment 0 (0x1000000..0x1800000)"
    );
    assert_eq!(
        message(128 * MIB, &[initrd(MIB - 1)]),
        "the initrd (0xfffff..0x1fffff) overlaps the boot tables (0x0..0x100000)"
    );
    assert_eq!(
        message(20 * MIB, &[kernel()]),
        "kernel segment 0 (0x1000000..0x1800000) lies outside the guest's memory: \
         RAM is 0x0..0x1400000"
    );
    let hole = message(8 << 30, &[Extent::new("kernel segment 1", (3 << 30) - 1, 2)]);
    assert_eq!(
        hole,
        "kernel segment 1 (0xbfffffff..0xc0000001) overlaps the hole for devices \
         (0xc0000000..0x100000000)"
    );
    placement::check(8 << 30, &[Extent::new("kernel segment 2", 4 << 30, MIB)]).unwrap();
    assert!(placement::check(8 << 30, &[Extent::new("x", u64::MAX, u64::MAX)]).is_err());
}

#[test]
fn an_initrd_goes_to_the_top_below_what_the_kernel_allows() {
    let kernel = Extent::new("the kernel", 16 * MIB, 16 * MIB);
    let place = |ram, size, max| placement::initrd_address(ram, size, max, &kernel);
    assert_eq!(place(128 * MIB, 1, None), Ok(128 * MIB - 4096));
    assert_eq!(place(8 << 30, 4096, None), Ok((3 << 30) - 4096));
    assert_eq!(place(8 << 30, 4096, Some(0x7FFF_FFFF)), Ok((2 << 30) - 4096));
    // Up to the kernel's end, but not into it; then in front of it.
    assert_eq!(place(128 * MIB, 96 * MIB, None), Ok(32 * MIB));
    assert_eq!(place(40 * MIB, 15 * MIB, None), Ok(MIB));
    assert_eq!(
        place(128 * MIB, 96 * MIB + 1, None),
        Err(PlacementError::NoRoomForInitrd { size: 96 * MIB + 1, free: 96 * MIB })
    );
    assert!(place(128 * MIB, u64::MAX, None).is_err());
}

proptest! {
    #[test]
    fn a_placed_initrd_passes_the_check(
        ram_pages in layout::MIN_RAM / 4096..(6u64 << 30) / 4096,
        size in 1..2u64 << 30,
        max in any::<Option<u32>>(),
        start in MIB..2u64 << 30,
        kernel_size in 1..1u64 << 30,
    ) {
        let ram = ram_pages * 4096;
        let kernel = Extent::new("the kernel", start, kernel_size);
        prop_assume!(placement::check(ram, std::slice::from_ref(&kernel)).is_ok());
        if let Ok(address) = placement::initrd_address(ram, size, max, &kernel) {
            prop_assert_eq!(address % 4096, 0);
            prop_assert!(max.is_none_or(|max| address + size - 1 <= max.into()));
            let initrd = Extent::new("the initrd", address, size);
            prop_assert_eq!(placement::check(ram, &[kernel, initrd]), Ok(()));
        }
    }
}
