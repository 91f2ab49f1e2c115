//! The Intel MultiProcessor table, for kernels without ACPI (MP Specification 1.4, chapter 4).
//!
//! It says what the MADT says: the processors, one IOAPIC, and that each interrupt line of the
//! one bus goes to the IOAPIC pin of its number.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::interrupts::IOAPIC_PINS;
use super::layout::{IOAPIC, LOCAL_APIC, MP_TABLE, MP_TABLE_END};

const SPEC_REVISION: u8 = 4;
/// Version of an APIC integrated in the CPU.
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const PROCESSOR_ENABLED: u8 = 1 << 0;
const PROCESSOR_BOOT: u8 = 1 << 1;
const IOAPIC_ENABLED: u8 = 1;

const INTERRUPT_INT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
const BUS_ISA: u8 = 0;
const ALL_LOCAL_APICS: u8 = 0xFF;

const FLOATING_POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

/// The floating pointer and the table, as they stand at [`MP_TABLE`], for `cpus` processors with
/// APIC ids from 0 on. `signature` and `features` are EAX and EDX of CPUID leaf 1.
pub fn build(cpus: u8, signature: u32, features: u32) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };

    for apic_id in 0..cpus {
        let boot = if apic_id == 0 { PROCESSOR_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, apic_id, APIC_VERSION, PROCESSOR_ENABLED | boot];
        entry.extend(signature.to_le_bytes());
        entry.extend(features.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }

    let mut bus = vec![ENTRY_BUS, BUS_ISA];
    bus.extend(b"ISA   ");
    add(&bus);

    // APIC ids are to be unique among local and I/O APICs: the next one is free.
    let ioapic_id = cpus;
    let mut ioapic = vec![ENTRY_IOAPIC, ioapic_id, APIC_VERSION, IOAPIC_ENABLED];
    ioapic.extend((IOAPIC as u32).to_le_bytes());
    add(&ioapic);

    // Polarity and trigger 0: as the bus has it, which for ISA is active high and edge.
    for pin in 0..IOAPIC_PINS as u8 {
        add(&[ENTRY_IO_INTERRUPT, INTERRUPT_INT, 0, 0, BUS_ISA, pin, ioapic_id, pin]);
    }
    for (kind, line) in [(INTERRUPT_EXTINT, 0), (INTERRUPT_NMI, 1)] {
        add(&[ENTRY_LOCAL_INTERRUPT, kind, 0, 0, BUS_ISA, 0, ALL_LOCAL_APICS, line]);
    }

    let mut table = header(entries.len(), count);
    table.extend(entries);
    set_checksum(&mut table, 7);

    let mut bytes = floating_pointer();
    bytes.extend(table);
    bytes
}

/// Writes what [`build`] gives to guest memory.
///
/// # Errors
///
/// Guest memory does not reach to [`MP_TABLE_END`].
pub fn write<M: GuestMemoryBackend>(
    memory: &M,
    cpus: u8,
    signature: u32,
    features: u32,
) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&build(cpus, signature, features), GuestAddress(MP_TABLE))
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((MP_TABLE as u32 + FLOATING_POINTER_SIZE as u32).to_le_bytes());
    // Length in paragraphs, revision, checksum, and five feature bytes: a table is there, and
    // there is no IMCR.
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut bytes, 10);
    bytes
}

fn header(entries_size: usize, entry_count: u16) -> Vec<u8> {
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(((HEADER_SIZE + entries_size) as u16).to_le_bytes());
    bytes.extend([SPEC_REVISION, 0]);
    bytes.extend(b"HULL    ");
    bytes.extend(b"MICROVM     ");
    // No OEM table.
    bytes.extend([0; 6]);
    bytes.extend(entry_count.to_le_bytes());
    bytes.extend((LOCAL_APIC as u32).to_le_bytes());
    // No extended table.
    bytes.extend([0; 4]);
    bytes
}

/// Sets the byte at `position` so that all bytes add up to 0.
fn set_checksum(bytes: &mut [u8], position: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = bytes.get_mut(position) {
        *checksum = checksum.wrapping_sub(sum);
    }
}

// With every processor there can be, the table still fits its room, and its length its field.
const _: () = {
    let entries = super::MAX_VCPUS as usize * 20 + 8 * (2 + IOAPIC_PINS as usize + 2);
    let size = FLOATING_POINTER_SIZE + HEADER_SIZE + entries;
    assert!(size as u64 <= MP_TABLE_END - MP_TABLE && size <= u16::MAX as usize);
};

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_add_up_and_list_every_entry() {
        for cpus in [1, 2, 64] {
            let bytes = build(cpus, 0x600, 0x201);
            let (pointer, table) = bytes.split_at(FLOATING_POINTER_SIZE);
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(sum(pointer), 0);
            assert_eq!(pointer[4..8], 0xF_0010u32.to_le_bytes());
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(sum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());

            let mut kinds = Vec::new();
            let mut rest = &table[HEADER_SIZE..];
            while let Some(&kind) = rest.first() {
                kinds.push(kind);
                rest = &rest[if kind == ENTRY_PROCESSOR { 20 } else { 8 }..];
            }
            assert_eq!(usize::from(u16::from_le_bytes([table[34], table[35]])), kinds.len());
            let processors = kinds.iter().filter(|&&kind| kind == ENTRY_PROCESSOR).count();
            assert_eq!(processors, usize::from(cpus));
            let lines = kinds.iter().filter(|&&kind| kind == ENTRY_IO_INTERRUPT).count();
            assert_eq!(lines, 24);
        }
    }
}
