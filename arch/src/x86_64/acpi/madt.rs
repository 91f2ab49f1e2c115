//! The Multiple APIC Description Table (ACPI 6.5 § 5.2.12).

use super::sdt;
use crate::x86_64::layout::{IOAPIC, LOCAL_APIC};

const REVISION: u8 = 5;
const LOCAL_APIC_ENTRY: u8 = 0;
const IOAPIC_ENTRY: u8 = 1;
const LOCAL_APIC_NMI_ENTRY: u8 = 4;
const ENABLED: u32 = 1;
const ALL_PROCESSORS: u8 = 0xFF;
/// The local line that NMI arrives at.
const LINT1: u8 = 1;

/// The table for `cpus` processors whose UIDs and APIC ids are from 0 on.
///
/// Ids stay below 255, so each processor is an xAPIC entry, x2APIC or not (§ 5.2.12.12). Every
/// interrupt source is the IOAPIC pin of its number, edge-triggered and active high, so there is
/// no override. The PIC that KVM has besides is not declared (PCAT_COMPAT is clear).
pub(super) fn build(cpus: u8) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend((LOCAL_APIC as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    for id in 0..cpus {
        body.extend([LOCAL_APIC_ENTRY, 8, id, id]);
        body.extend(ENABLED.to_le_bytes());
    }
    // The id that KVM's IOAPIC shows in its register, then first address and first GSI.
    body.extend([IOAPIC_ENTRY, 12, 0, 0]);
    body.extend((IOAPIC as u32).to_le_bytes());
    body.extend(0u32.to_le_bytes());
    body.extend([LOCAL_APIC_NMI_ENTRY, 6, ALL_PROCESSORS, 0, 0, LINT1]);
    sdt(*b"APIC", REVISION, &body)
}
