use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::x86_64::interrupts::MAX_VIRTIO_DEVICES;
use crate::x86_64::{MAX_VCPUS, interrupts};

fn config(cpus: u8, devices: usize) -> AcpiConfig {
    AcpiConfig {
        cpus,
        virtio: (0..devices).filter_map(VirtioSlot::new).collect(),
        serial: true,
        i8042: false,
        vmgenid: true,
        vmclock: true,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn number(bytes: &[u8], offset: usize, size: usize) -> u64 {
    bytes[offset..offset + size].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn table<'a>(tables: &'a AcpiTables, signature: &[u8; 4]) -> &'a AcpiTable {
    tables.tables.iter().find(|table| &table.signature == signature).expect("table is there")
}

fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    table(&build(config).unwrap(), b"DSDT").bytes.clone()
}

proptest! {
    #[test]
    fn checksums_lengths_and_places_hold(
        cpus in 1..=MAX_VCPUS,
        devices in 0..=MAX_VIRTIO_DEVICES,
        flags in 0u8..16,
    ) {
        let mut config = config(cpus, devices);
        config.serial = flags & 1 != 0;
        config.i8042 = flags & 2 != 0;
        config.vmgenid = flags & 4 != 0;
        config.vmclock = flags & 8 != 0;
        let tables = build(&config).unwrap();
        let mut end = layout::ACPI_START;
        for table in &tables.tables {
            prop_assert!(table.address >= end);
            prop_assert_eq!(table.address % 16, 0);
            end = table.address + table.bytes.len() as u64;
            prop_assert_eq!(sum(&table.bytes), 0);
            if &table.signature != b"RSD " {
                prop_assert_eq!(&table.bytes[..4], &table.signature);
                prop_assert_eq!(number(&table.bytes, 4, 4), table.bytes.len() as u64);
            }
        }
        prop_assert!(end <= layout::ACPI_END);
    }
}

#[test]
fn a_kernel_finds_every_table_from_the_rsdp() {
    let tables = build(&config(2, 3)).unwrap();
    let at = |address: u64| {
        tables.tables.iter().find(|table| table.address == address).expect("table is there")
    };
    let rsdp = at(tables.rsdp());
    assert_eq!(&rsdp.bytes[..8], b"RSD PTR ");
    assert_eq!(rsdp.bytes[15], 2);
    assert_eq!(sum(&rsdp.bytes[..20]), 0);
    let xsdt = at(number(&rsdp.bytes, 24, 8));
    let entries: Vec<_> =
        xsdt.bytes[36..].chunks(8).map(|entry| at(number(entry, 0, 8)).signature).collect();
    assert_eq!(entries, [*b"FACP", *b"APIC"]);
    let fadt = table(&tables, b"FACP");
    assert_eq!(&at(number(&fadt.bytes, 140, 8)).signature, b"DSDT");
}

/// Offsets from ACPI 6.5, table 5.9.
#[test]
fn the_fadt_is_hardware_reduced_with_reset_and_sleep_registers() {
    let fadt = table(&build(&config(1, 0)).unwrap(), b"FACP").bytes.clone();
    assert_eq!(fadt.len(), 276);
    assert_eq!(fadt[8], 6);
    let flags = number(&fadt, 112, 4);
    assert_ne!(flags & 1 << 20, 0, "HW_REDUCED_ACPI");
    assert_ne!(flags & 1 << 10, 0, "RESET_REG_SUP");
    assert_ne!(flags & 1 << 4, 0, "PWR_BUTTON is a control method");
    assert_eq!(number(&fadt, 109, 2), 0x24, "IAPC_BOOT_ARCH");
    let io_port = |offset| {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1], "one byte of I/O space");
        number(&fadt, offset + 4, 8)
    };
    assert_eq!(io_port(116), 0x64);
    assert_eq!(fadt[128], 0xFE);
    assert_eq!(io_port(244), u64::from(interrupts::SLEEP_CONTROL_PORT));
    assert_eq!(io_port(256), u64::from(interrupts::SLEEP_STATUS_PORT));

    let with_i8042 = AcpiConfig { i8042: true, ..config(1, 0) };
    let fadt = table(&build(&with_i8042).unwrap(), b"FACP").bytes.clone();
    assert_eq!(number(&fadt, 109, 2), 0x26);
}

#[test]
fn the_madt_lists_each_cpu_once_and_one_ioapic() {
    let madt = table(&build(&config(MAX_VCPUS, 0)).unwrap(), b"APIC").bytes.clone();
    assert_eq!(number(&madt, 36, 4), layout::LOCAL_APIC);
    let mut rest = &madt[44..];
    let (mut ids, mut ioapics) = (Vec::new(), 0);
    while let [kind, length, ..] = *rest {
        match kind {
            0 => {
                assert_eq!(rest[2], rest[3], "UID and APIC id");
                assert_eq!(number(rest, 4, 4), 1, "enabled");
                ids.push(rest[3]);
            }
            1 => {
                assert_eq!(number(rest, 4, 4), layout::IOAPIC);
                ioapics += 1;
            }
            _ => {}
        }
        rest = &rest[usize::from(length)..];
    }
    assert_eq!(ids, (0..MAX_VCPUS).collect::<Vec<_>>());
    assert_eq!(ioapics, 1);
}

#[test]
fn the_dsdt_has_what_the_machine_has() {
    let full = AcpiConfig { i8042: true, ..config(2, 1) };
    let bare = AcpiConfig { cpus: 1, ..AcpiConfig::default() };
    // EISA ids: PNP0501, PNP0303.
    let serial = [0x41, 0xD0, 0x05, 0x01];
    let keyboard = [0x41, 0xD0, 0x03, 0x03];
    for part in [&b"LNRO0005"[..], b"VMGENCTR", b"AMZNC10C", b"C001", &serial, &keyboard] {
        assert!(contains(&dsdt(&full), part), "{part:?}");
        assert!(!contains(&dsdt(&bare), part), "{part:?}");
    }
    for part in [&b"_S5_"[..], b"ACPI0013", b"PWRB", b"C000"] {
        assert!(contains(&dsdt(&bare), part), "{part:?}");
    }
    // \_S5: a package of four whose first element is the byte 5.
    assert!(contains(&dsdt(&bare), &[b'S', b'5', b'_', 0x12, 8, 4, 0x0A, 5]));
}

#[test]
fn each_virtio_device_has_its_window_and_line() {
    let config = config(1, MAX_VIRTIO_DEVICES);
    let dsdt = dsdt(&config);
    for slot in &config.virtio {
        // Memory32Fixed, read-write; then an extended interrupt: consumer, edge, one line.
        let mut resources = vec![0x86, 9, 0, 1];
        resources.extend((slot.address as u32).to_le_bytes());
        resources.extend(0x1000u32.to_le_bytes());
        resources.extend([0x89, 6, 0, 0b0011, 1]);
        resources.extend(slot.gsi.to_le_bytes());
        assert!(contains(&dsdt, &resources), "{slot:?}");
    }
}

#[test]
fn the_event_method_reads_once_and_notifies_by_bit() {
    let dsdt = dsdt(&config(1, 0));
    // Store(EVTS, Local0)
    assert!(contains(&dsdt, b"\x70EVTS\x60"));
    assert_eq!(dsdt.windows(4).filter(|part| part == b"EVTS").count(), 2, "field and one read");
    // If (And (Local0, bit)) { Notify (\_SB.name, 0x80) }
    for (bit, name) in [(&[1u8][..], b"PWRB"), (&[0x0A, 2], b"VGID"), (&[0x0A, 4], b"VCLK")] {
        let mut code = vec![0x7B, 0x60];
        code.extend(bit);
        code.extend([0, 0x86]);
        code.extend(b"\\\x2E_SB_");
        code.extend(name);
        code.extend([0x0A, 0x80]);
        assert!(contains(&dsdt, &code), "{name:?}");
    }
}

#[test]
fn tables_are_written_where_they_say() {
    let ranges = layout::ram_ranges(layout::MIN_RAM);
    let ranges: Vec<_> = ranges.into_iter().map(|(start, size)| (start, size as usize)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let tables = build(&config(1, 1)).unwrap();
    tables.write(&memory).unwrap();
    for table in &tables.tables {
        let mut bytes = vec![0; table.bytes.len()];
        memory.read_slice(&mut bytes, GuestAddress(table.address)).unwrap();
        assert_eq!(bytes, table.bytes);
    }

    let too_small = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    assert!(matches!(
        tables.write(&too_small),
        Err(AcpiError::Write { address: layout::ACPI_START, .. })
    ));
}
