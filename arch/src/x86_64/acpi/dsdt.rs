//! The Differentiated System Description Table: every device, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify,
    ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};

use super::{AcpiConfig, GED_EVENT_PORT, sdt, to_bytes};
use crate::x86_64::ids::VMGENID_OFFSET;
use crate::x86_64::interrupts::{
    COM1_GSI, COM1_PORT, COM1_PORT_COUNT, GED_EVENT_POWER_BUTTON, GED_EVENT_VMCLOCK,
    GED_EVENT_VMGENID, GED_GSI, I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_KEYBOARD_GSI,
    PVPANIC_PORT, SLEEP_TYPE_S5,
};
use crate::x86_64::layout::{PAGE_SIZE, VIRTIO_MMIO_SIZE, VMCLOCK_PAGE, VMGENID_PAGE, VirtioSlot};

/// 2 is the first revision with 64-bit integers.
const REVISION: u8 = 2;

/// Notify value of a pressed button and of a changed identity alike: "status change".
const NOTIFY_CHANGED: u8 = 0x80;

pub(super) fn build(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = Vec::new();
    for cpu in 0..config.cpus {
        devices.extend(processor(cpu));
    }
    if config.serial {
        devices.extend(serial());
    }
    if config.i8042 {
        devices.extend(keyboard());
    }
    for (index, slot) in config.virtio.iter().enumerate() {
        devices.extend(virtio(index, slot));
    }
    devices.extend(power_button());
    devices.extend(pvpanic());
    let mut events = vec![(GED_EVENT_POWER_BUTTON, "\\_SB_.PWRB")];
    if config.vmgenid {
        devices.extend(vmgenid());
        events.push((GED_EVENT_VMGENID, "\\_SB_.VGID"));
    }
    if config.vmclock {
        devices.extend(vmclock());
        events.push((GED_EVENT_VMCLOCK, "\\_SB_.VCLK"));
    }
    devices.extend(generic_event_device(&events));

    // Sleep type of \_S5 in the first two elements; the other two are reserved.
    let soft_off = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    let mut body = to_bytes(&Name::new(Path::new("\\_S5_"), &soft_off));
    body.extend(to_bytes(&Scope::new(Path::new("\\_SB_"), vec![&Raw(devices)])));
    sdt(*b"DSDT", REVISION, &body)
}

/// AML that has been encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// An interrupt of ours: a consumer's, edge-triggered, active high, exclusive.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

fn device(path: &str, children: Vec<&dyn Aml>) -> Vec<u8> {
    to_bytes(&Device::new(Path::new(path), children))
}

/// A processor device; its _UID is the one that the MADT gives its local APIC.
fn processor(cpu: u8) -> Vec<u8> {
    device(&format!("C{cpu:03}"), vec![&name("_HID", &"ACPI0007"), &name("_UID", &cpu)])
}

/// COM1, a 16550A.
fn serial() -> Vec<u8> {
    let ports = IO::new(COM1_PORT, COM1_PORT, 1, COM1_PORT_COUNT as u8);
    device(
        "COM1",
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&ports, &interrupt(COM1_GSI)])),
        ],
    )
}

/// The i8042's keyboard, by which a kernel finds the controller.
fn keyboard() -> Vec<u8> {
    let data = IO::new(I8042_DATA_PORT, I8042_DATA_PORT, 1, 1);
    let command = IO::new(I8042_COMMAND_PORT, I8042_COMMAND_PORT, 1, 1);
    let line = interrupt(I8042_KEYBOARD_GSI);
    device(
        "PS2K",
        vec![
            &name("_HID", &EISAName::new("PNP0303")),
            &name("_CRS", &ResourceTemplate::new(vec![&data, &command, &line])),
        ],
    )
}

/// A virtio-mmio transport, under the id Linux has for it (`virtio_mmio.c`).
fn virtio(index: usize, slot: &VirtioSlot) -> Vec<u8> {
    // Both fit: the windows lie below 4 GiB.
    let window = Memory32Fixed::new(true, slot.address as u32, VIRTIO_MMIO_SIZE as u32);
    device(
        &format!("V{index:03}"),
        vec![
            &name("_HID", &"LNRO0005"),
            &name("_UID", &index),
            &name("_CRS", &ResourceTemplate::new(vec![&window, &interrupt(slot.gsi)])),
        ],
    )
}

/// A control method power button (ACPI 6.5 § 4.8.2.2.1.2).
fn power_button() -> Vec<u8> {
    device("PWRB", vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)])
}

/// The paravirtual panic device, under the id that QEMU and Linux have for it
/// (`pvpanic-mmio.c`).
fn pvpanic() -> Vec<u8> {
    let port = IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    device(
        "PEVT",
        vec![&name("_HID", &"QEMU0001"), &name("_CRS", &ResourceTemplate::new(vec![&port]))],
    )
}

/// The VM generation id (Microsoft, "Virtual Machine Generation ID"). Drivers know it by either
/// of two compatible ids.
fn vmgenid() -> Vec<u8> {
    let address = VMGENID_PAGE + VMGENID_OFFSET;
    let (low, high) = (address as u32, (address >> 32) as u32);
    device(
        "VGID",
        vec![
            &name("_HID", &"HULL0001"),
            &name("_CID", &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &name("_DDN", &"VM_Gen_Counter"),
            &name("ADDR", &Package::new(vec![&low, &high])),
        ],
    )
}

/// The VMClock page (Linux, `ptp_vmclock.c`).
fn vmclock() -> Vec<u8> {
    let last = VMCLOCK_PAGE + PAGE_SIZE - 1;
    let page = AddressSpace::<u64>::new_memory(
        AddressSpaceCacheable::Cacheable,
        false,
        VMCLOCK_PAGE,
        last,
        None,
    );
    device(
        "VCLK",
        vec![
            &name("_HID", &"AMZNC10C"),
            &name("_CID", &"VMCLOCK"),
            &name("_DDN", &"VMCLOCK"),
            &name("_CRS", &ResourceTemplate::new(vec![&page])),
        ],
    )
}

/// The Generic Event Device (ACPI 6.5 § 5.6.9). `events` are bits of the event register and the
/// devices to notify of them.
fn generic_event_device(events: &[(u8, &str)]) -> Vec<u8> {
    let register = OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &GED_EVENT_PORT, &ONE);
    let field = Field::new(
        Path::new("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    // One read, into a local, since reading clears.
    let pending = Local(0);
    let mut body = to_bytes(&Store::new(&pending, &Path::new("EVTS")));
    for &(bit, target) in events {
        let is_set = And::new(&ZERO, &pending, &bit);
        let target = Path::new(target);
        let notify = Notify::new(&target, &NOTIFY_CHANGED);
        body.extend(to_bytes(&If::new(&is_set, vec![&notify])));
    }
    device(
        "GED0",
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &ZERO),
            &name("_CRS", &ResourceTemplate::new(vec![&interrupt(GED_GSI)])),
            &register,
            &field,
            &Method::new(Path::new("_EVT"), 1, true, vec![&Raw(body)]),
        ],
    )
}
