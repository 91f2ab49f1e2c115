//! The guest-physical memory map: where RAM lies, and where everything else does.
//!
//! Constants here are guest-physical addresses or sizes in bytes. `vmm` maps memory and places
//! devices by them; the boot, ACPI and MP modules place their tables by them.
//!
//! ```text
//!             0 ┌──────────────────────────────────────────┐
//!        0x6000 │ PVH start info, memory map, module list  │
//!        0x7000 │ zero page (struct boot_params)           │
//!        0x8ff0 │ initial stack, growing down              │  RAM
//!        0x9000 │ initial page tables, 6 pages             │
//!      0x2_0000 │ GDT, kernel command line (2048 bytes)    │
//!      0x9_fc00 ├──────────────────────────────────────────┤
//!      0xf_0000 │ MP floating pointer and table            │  RAM, reserved
//!      0xf_0700 │ ACPI: RSDP, then the tables              │  in e820
//!     0x10_0000 ├──────────────────────────────────────────┤
//!               │ kernel, from 1 MiB up                    │  RAM
//!               │ … initrd, as high as possible            │
//!   0xc000_0000 ├──────────────────────────────────────────┤  3 GiB, or end of RAM
//!   0xcfff_e000 │ VMGenID page                             │  slots of their own,
//!   0xcfff_f000 │ VMClock page                             │  reserved in e820
//!   0xd000_0000 │ boot timer (write 123)                   │
//!   0xd000_1000 │ virtio-mmio, 17 windows of 4 KiB         │  MMIO
//!   0xfec0_0000 │ IOAPIC                                   │
//!   0xfee0_0000 │ local APIC                               │
//!   0xfeff_c000 │ KVM identity map page, then its TSS      │  reserved in e820
//! 0x1_0000_0000 ├──────────────────────────────────────────┤  4 GiB
//!               │ the rest of RAM                          │  RAM
//!               └──────────────────────────────────────────┘
//! ```

use vm_memory::GuestAddress;

use super::interrupts;

/// Size of a page, in bytes.
pub const PAGE_SIZE: u64 = 0x1000;

/// Where RAM stops below 4 GiB, and the hole for MMIO begins.
pub const HOLE_START: u64 = 0xC000_0000;
/// Where the hole for MMIO ends, and RAM goes on.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The least RAM a machine can have: the tables below 1 MiB, and as much again for a kernel.
pub const MIN_RAM: u64 = 2 << 20;
/// The most RAM a machine can have: KVM takes just under 2^31 pages in a slot. What the CPU can
/// address may be less, and is the caller's to check.
pub const MAX_RAM: u64 = 1 << 43;

/// The Global Descriptor Table that vCPU 0 starts with.
pub const GDT: u64 = 0x2_0000;
/// `struct hvm_start_info` of the PVH protocol; its memory map and module list follow it.
pub const PVH_START_INFO: u64 = 0x6000;
/// `struct boot_params` of the Linux boot protocol, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// The stack pointer vCPU 0 starts with.
pub const BOOT_STACK: u64 = 0x8FF0;
/// The page tables vCPU 0 starts with in long mode: PML4, PDPT, and up to four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated. In the page of the GDT: each page that is touched here is
/// a page of every machine.
pub const CMDLINE: u64 = 0x2_0100;
/// Room for the command line in bytes, its NUL included: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_SIZE: usize = 2048;

/// End of the conventional memory that a kernel may use below 1 MiB. A PC keeps its extended BIOS
/// data area from here on.
pub const LOW_RAM_END: u64 = 0x9_FC00;
/// The MP floating pointer, at the start of the BIOS area that kernels scan for it.
pub const MP_TABLE: u64 = 0xF_0000;
/// End of the room for the MP table.
pub const MP_TABLE_END: u64 = 0xF_0700;
/// The ACPI RSDP, where a kernel that was not told its address also looks for it. A small machine's
/// tables share a page with its MP table.
pub const ACPI_START: u64 = MP_TABLE_END;
/// End of the room for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// The lowest address for anything a user supplies: kernel and initrd.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// The page with the VM generation id. See [`super::ids`].
pub const VMGENID_PAGE: u64 = 0xCFFF_E000;
/// The page with the VMClock structure. See [`super::ids`].
pub const VMCLOCK_PAGE: u64 = 0xCFFF_F000;

/// A guest writes [`BOOT_TIMER_VALUE`] here as one byte once it reached userspace (Firecracker's
/// convention).
pub const BOOT_TIMER: u64 = 0xD000_0000;
/// Size of the boot timer's window in bytes.
pub const BOOT_TIMER_SIZE: u64 = PAGE_SIZE;
/// The byte that counts at [`BOOT_TIMER`]; others mean nothing.
pub const BOOT_TIMER_VALUE: u8 = 123;

/// The window of the first virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = 0xD000_1000;
/// Size of one virtio-mmio window in bytes; they lie one behind the other.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// The IOAPIC that KVM emulates.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// The local APIC of each vCPU.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;

/// The page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xFEFF_C000;
/// The three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xFEFF_D000;
/// Size in bytes of what KVM keeps from [`KVM_IDENTITY_MAP`] on.
pub const KVM_RESERVED_SIZE: u64 = 4 * PAGE_SIZE;

/// The ranges of guest-physical memory that `size` bytes of RAM occupy, in ascending order, as
/// (start, length in bytes): from 0 up to the hole, then from 4 GiB on.
///
/// `size` is taken as at most [`MAX_RAM`]; a size of 0 gives no range.
pub fn ram_ranges(size: u64) -> Vec<(GuestAddress, u64)> {
    let size = size.min(MAX_RAM);
    let low = size.min(HOLE_START);
    [(0, low), (HOLE_END, size - low)]
        .into_iter()
        .filter(|&(_, length)| length > 0)
        .map(|(start, length)| (GuestAddress(start), length))
        .collect()
}

/// The first address after all RAM, for a machine with `size` bytes of RAM.
pub fn ram_end(size: u64) -> u64 {
    ram_ranges(size).last().map_or(0, |&(start, length)| start.0 + length)
}

/// The end of RAM below the hole, for a machine with `size` bytes of RAM.
pub fn low_ram_end(size: u64) -> u64 {
    size.min(HOLE_START)
}

/// What a range of the memory map is, with the numbers that e820 and PVH give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// RAM for the kernel to use.
    Ram = 1,
    /// Not for the kernel to allocate from.
    Reserved = 2,
}

/// One entry of the memory map a kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryMapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes, never 0.
    pub size: u64,
    /// RAM or not.
    pub kind: MemoryKind,
}

/// The memory map that a kernel is given, for `size` bytes of RAM: ascending, without overlaps.
///
/// It is handed over as e820 in the zero page or as the memory map of PVH's start info.
pub fn e820(size: u64) -> Vec<MemoryMapEntry> {
    let entry = |start, end, kind| MemoryMapEntry { start, size: end - start, kind };
    let mut map = vec![
        entry(0, LOW_RAM_END, MemoryKind::Ram),
        entry(LOW_RAM_END, HIGH_RAM_START, MemoryKind::Reserved),
    ];
    for (start, length) in ram_ranges(size) {
        let end = start.0 + length;
        let start = start.0.max(HIGH_RAM_START);
        if start < end {
            map.push(entry(start, end, MemoryKind::Ram));
        }
    }
    map.push(entry(VMGENID_PAGE, VMCLOCK_PAGE + PAGE_SIZE, MemoryKind::Reserved));
    map.push(entry(KVM_IDENTITY_MAP, KVM_IDENTITY_MAP + KVM_RESERVED_SIZE, MemoryKind::Reserved));
    map.sort_by_key(|entry| entry.start);
    map
}

/// Where one virtio-mmio device is found by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// First address of its window of [`VIRTIO_MMIO_SIZE`] bytes.
    pub address: u64,
    /// Its interrupt: edge-triggered, active high, not shared.
    pub gsi: u32,
}

impl VirtioSlot {
    /// The slot of device `index`, or `None` when the machine has no such slot: it has
    /// [`interrupts::MAX_VIRTIO_DEVICES`].
    pub fn new(index: usize) -> Option<Self> {
        let gsi = interrupts::virtio_gsi(index)?;
        let offset = u64::try_from(index).ok()? * VIRTIO_MMIO_SIZE;
        Some(Self { address: VIRTIO_MMIO_START + offset, gsi })
    }

    /// The kernel command line option that declares this device to a kernel that does not read
    /// ACPI: `virtio_mmio.device=<size>@<address>:<irq>` (Linux, `virtio_mmio.c`).
    pub fn cmdline_option(&self) -> String {
        format!("virtio_mmio.device={}K@{:#x}:{}", VIRTIO_MMIO_SIZE / 1024, self.address, self.gsi)
    }
}

// The fixed places must not run into each other.
const _: () = {
    assert!(PAGE_TABLES + 6 * PAGE_SIZE <= GDT);
    assert!(GDT + 0x100 <= CMDLINE);
    assert!(CMDLINE + CMDLINE_SIZE as u64 <= LOW_RAM_END);
    assert!(PVH_START_INFO + PAGE_SIZE <= ZERO_PAGE);
    assert!(ZERO_PAGE + PAGE_SIZE <= BOOT_STACK);
    assert!(BOOT_STACK < PAGE_TABLES);
    assert!(HOLE_START <= VMGENID_PAGE);
    assert!(VMGENID_PAGE + PAGE_SIZE <= VMCLOCK_PAGE);
    assert!(VMCLOCK_PAGE + PAGE_SIZE <= BOOT_TIMER);
    assert!(BOOT_TIMER + BOOT_TIMER_SIZE <= VIRTIO_MMIO_START);
    assert!(VIRTIO_MMIO_START + interrupts::MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_SIZE <= IOAPIC);
    assert!(KVM_IDENTITY_MAP + KVM_RESERVED_SIZE <= HOLE_END);
};

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn ram_adds_up_and_stays_out_of_the_hole(pages in 0..MAX_RAM / PAGE_SIZE) {
            let size = pages * PAGE_SIZE;
            let ranges = ram_ranges(size);
            prop_assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), size);
            for (start, length) in ranges {
                prop_assert!(start.0 + length <= HOLE_START || start.0 >= HOLE_END);
            }
        }

        #[test]
        fn the_memory_map_is_sorted_and_disjoint(pages in MIN_RAM / PAGE_SIZE..MAX_RAM / PAGE_SIZE) {
            let size = pages * PAGE_SIZE;
            let map = e820(size);
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].size <= pair[1].start);
            }
            let usable: u64 =
                map.iter().filter(|e| e.kind == MemoryKind::Ram).map(|e| e.size).sum();
            prop_assert_eq!(usable, size - (HIGH_RAM_START - LOW_RAM_END));
        }

        #[test]
        fn usable_memory_is_backed(pages in MIN_RAM / PAGE_SIZE..MAX_RAM / PAGE_SIZE) {
            let size = pages * PAGE_SIZE;
            let ram = ram_ranges(size);
            for entry in e820(size).into_iter().filter(|e| e.kind == MemoryKind::Ram) {
                prop_assert!(ram.iter().any(|&(start, length)| start.0 <= entry.start
                    && entry.start + entry.size <= start.0 + length));
            }
        }
    }

    #[test]
    fn ram_crosses_the_hole_at_three_gib() {
        assert!(ram_ranges(0).is_empty());
        assert_eq!(ram_ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_ranges((3 << 30) + PAGE_SIZE),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), PAGE_SIZE)]
        );
        assert_eq!(ram_ranges(u64::MAX).iter().map(|r| r.1).sum::<u64>(), MAX_RAM);
    }

    #[test]
    fn tables_lie_outside_usable_memory() {
        for address in [ACPI_START, MP_TABLE, VMGENID_PAGE, VMCLOCK_PAGE, KVM_TSS] {
            let map = e820(8 << 30);
            let entry = map.iter().find(|e| (e.start..e.start + e.size).contains(&address));
            assert_eq!(entry.map(|e| e.kind), Some(MemoryKind::Reserved), "{address:#x}");
        }
    }

    #[test]
    fn virtio_slots_end_with_the_interrupts() {
        let slots: Vec<_> = (0..).map_while(VirtioSlot::new).collect();
        assert_eq!(slots.len(), interrupts::MAX_VIRTIO_DEVICES);
        assert_eq!(slots[0], VirtioSlot { address: 0xD000_1000, gsi: 6 });
        assert_eq!(slots[16], VirtioSlot { address: 0xD001_1000, gsi: 23 });
        assert_eq!(slots[0].cmdline_option(), "virtio_mmio.device=4K@0xd0001000:6");
    }
}
