//! Registers that vCPU 0 starts with, and the tables in memory they refer to.
//!
//! Values in, values out: where a register keeps something of what KVM gave a new vCPU, the
//! caller passes that in and gets the whole back.

use kvm_bindings::{kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use super::{Entry, EntryMode};
use crate::x86_64::layout::{self, PAGE_SIZE};

/// Selector of the code segment: `__BOOT_CS` of the Linux boot protocol.
const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segments: `__BOOT_DS` of the Linux boot protocol.
const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
const TSS_SELECTOR: u16 = 0x20;
/// Length of the GDT in bytes: two unused entries, code, data, TSS in two.
const GDT_SIZE: usize = 6 * 8;
/// Limit of a segment that spans 4 GiB, in bytes less one.
const FLAT_LIMIT: u32 = u32::MAX;

const RFLAGS_RESERVED: u64 = 1 << 1;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
const PTE_LARGE: u64 = 1 << 7;

/// The pages that the initial page tables map memory with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 2 MiB, which every 64-bit CPU has: six pages of tables.
    Mib2,
    /// 1 GiB: two pages of tables. Only if the guest's CPUID has it.
    Gib1,
}

impl PageSize {
    /// The largest that a CPU with these CPUID entries has (leaf 0x8000_0001 EDX, bit 26).
    pub fn largest(cpuid: &[kvm_cpuid_entry2]) -> Self {
        let has_1gib =
            cpuid.iter().any(|leaf| leaf.function == 0x8000_0001 && leaf.edx & (1 << 26) != 0);
        if has_1gib { Self::Gib1 } else { Self::Mib2 }
    }
}

/// The page tables for [`layout::PAGE_TABLES`], which map memory one to one up to `end` at least: 1
/// to 4 whole GiB. Every GiB costs a guest page, and a kernel replaces them at once.
pub fn page_tables(page_size: PageSize, end: u64) -> Vec<u8> {
    const GIB: u64 = 1 << 30;
    const ENTRIES: usize = 512;
    const TABLE: u64 = PTE_PRESENT | PTE_WRITABLE;
    const LEAF: u64 = PTE_PRESENT | PTE_WRITABLE | PTE_LARGE;
    let pdpt = layout::PAGE_TABLES + PAGE_SIZE;
    let directories = pdpt + PAGE_SIZE;

    let gibs = end.div_ceil(GIB).clamp(1, 4) as usize;
    let pages = match page_size {
        PageSize::Gib1 => 2,
        PageSize::Mib2 => 2 + gibs,
    };
    // Sized beforehand: this is on the way of every start.
    let mut bytes = vec![0; pages * PAGE_SIZE as usize];
    let mut put = |table: usize, index: usize, entry: u64| {
        let at = (table * ENTRIES + index) * 8;
        bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    put(0, 0, pdpt | TABLE);
    for gib in 0..gibs {
        match page_size {
            PageSize::Gib1 => put(1, gib, (gib as u64 * GIB) | LEAF),
            PageSize::Mib2 => {
                put(1, gib, (directories + gib as u64 * PAGE_SIZE) | TABLE);
                for page in 0..ENTRIES {
                    put(2 + gib, page, ((gib * ENTRIES + page) as u64) << 21 | LEAF);
                }
            }
        }
    }
    bytes
}

/// A flat segment. `type_` is the descriptor's type (Intel SDM vol. 3 § 3.4.5.1).
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        selector,
        limit: FLAT_LIMIT,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// Code: execute, read, accessed.
fn code_segment(mode: EntryMode) -> kvm_segment {
    let code = segment(CODE_SELECTOR, 0xB);
    match mode {
        EntryMode::Long => kvm_segment { l: 1, db: 0, ..code },
        EntryMode::Protected => code,
    }
}

/// Data: read, write, accessed.
fn data_segment() -> kvm_segment {
    segment(DATA_SELECTOR, 0x3)
}

/// A task state segment, marked busy as the CPU requires of a loaded one. Nothing uses it.
fn task_segment() -> kvm_segment {
    kvm_segment {
        selector: TSS_SELECTOR,
        limit: 0x67,
        type_: 0xB,
        present: 1,
        ..Default::default()
    }
}

/// The 8-byte descriptor of a segment (Intel SDM vol. 3 § 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    let bit = |value: u8, position: u32| u64::from(value) << position;
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | bit(segment.type_, 40)
        | bit(segment.s, 44)
        | bit(segment.dpl, 45)
        | bit(segment.present, 47)
        | (limit >> 16 & 0xF) << 48
        | bit(segment.avl, 52)
        | bit(segment.l, 53)
        | bit(segment.db, 54)
        | bit(segment.g, 55)
        | (base >> 24 & 0xFF) << 56
}

/// The GDT for [`layout::GDT`], with the segments that [`sregs`] loads.
pub fn gdt(mode: EntryMode) -> [u8; GDT_SIZE] {
    let entries = [
        0,
        0,
        descriptor(&code_segment(mode)),
        descriptor(&data_segment()),
        descriptor(&task_segment()),
        0,
    ];
    let mut bytes = [0; GDT_SIZE];
    for (target, entry) in bytes.chunks_exact_mut(8).zip(entries) {
        target.copy_from_slice(&entry.to_le_bytes());
    }
    bytes
}

/// General registers for `entry`, for `KVM_SET_REGS`.
pub fn regs(entry: &Entry) -> kvm_regs {
    let regs = kvm_regs { rip: entry.address, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.mode {
        EntryMode::Long => {
            kvm_regs { rsi: entry.info, rsp: layout::BOOT_STACK, rbp: layout::BOOT_STACK, ..regs }
        }
        EntryMode::Protected => kvm_regs { rbx: entry.info, ..regs },
    }
}

/// Segment and control registers for `entry`, for `KVM_SET_SREGS`. `reset` is what
/// `KVM_GET_SREGS` gave for the new vCPU: its APIC base and interrupt bitmap are kept.
pub fn sregs(entry: &Entry, reset: kvm_sregs) -> kvm_sregs {
    let data = data_segment();
    let mut sregs = kvm_sregs {
        cs: code_segment(entry.mode),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task_segment(),
        cr0: CR0_PE | CR0_ET,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..reset
    };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = GDT_SIZE as u16 - 1;
    // Any exception before the kernel has an IDT of its own is a triple fault.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    if entry.mode == EntryMode::Long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    sregs
}

/// Floating point state after reset of the FPU, for `KVM_SET_FPU`: all exceptions masked,
/// 64-bit precision.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..Default::default() }
}

/// The local APIC's state with its two local lines wired as on a PC: LINT0 to the PIC (ExtINT),
/// LINT1 to NMI. Mask and polarity stay as they are. `lapic` is what `KVM_GET_LAPIC` gave.
pub fn with_local_lines(mut lapic: kvm_lapic_state) -> kvm_lapic_state {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u8 = 4;
    const MODE_EXTINT: u8 = 7;
    // The delivery mode is bits 8 to 10 of the register: bits 0 to 2 of its second byte.
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        let byte = &mut lapic.regs[register + 1];
        *byte = (*byte & !0x7) | mode as std::ffi::c_char;
    }
    lapic
}
