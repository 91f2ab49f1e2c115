//! Interrupt lines and I/O ports.
//!
//! A line is named by its GSI, which KVM's default routing maps to the IOAPIC pin of the same
//! number, 0 included. All lines of ours are edge-triggered, active high and never shared. They
//! are told to the guest by ACPI, by the MP table and on the kernel command line.

/// Pins of the IOAPIC that KVM emulates, so that GSIs are `0..24`.
pub const IOAPIC_PINS: u32 = 24;

/// The keyboard half of the i8042, where there is one.
pub const I8042_KEYBOARD_GSI: u32 = 1;
/// The first serial port.
pub const COM1_GSI: u32 = 4;
/// The ACPI Generic Event Device: power button, VM generation id, VMClock.
pub const GED_GSI: u32 = 5;
/// The first line of a virtio-mmio device.
pub const FIRST_VIRTIO_GSI: u32 = 6;
/// The mouse half of an i8042. A kernel that probes for one claims this line even if there is
/// none, so it is given to no device.
pub const I8042_AUX_GSI: u32 = 12;

/// How many virtio-mmio devices a machine can have: one line each, from [`FIRST_VIRTIO_GSI`] to
/// the last pin without [`I8042_AUX_GSI`].
pub const MAX_VIRTIO_DEVICES: usize = (IOAPIC_PINS - FIRST_VIRTIO_GSI - 1) as usize;

/// The GSI of virtio-mmio device `index`, or `None` from [`MAX_VIRTIO_DEVICES`] on.
pub fn virtio_gsi(index: usize) -> Option<u32> {
    (FIRST_VIRTIO_GSI..IOAPIC_PINS).filter(|&gsi| gsi != I8042_AUX_GSI).nth(index)
}

/// First port of the first serial port, which has [`COM1_PORT_COUNT`].
pub const COM1_PORT: u16 = 0x3F8;
/// Ports of a 16550.
pub const COM1_PORT_COUNT: u16 = 8;

/// Data port of the i8042.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the i8042, and the ACPI reset register.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Port of the paravirtual panic device.
pub const PVPANIC_PORT: u16 = 0x505;
/// Written to [`I8042_COMMAND_PORT`], pulses the CPU's reset line.
pub const I8042_RESET: u8 = 0xFE;

/// The ACPI `SLEEP_CONTROL_REG`, one byte, written by the guest (ACPI 6.5 § 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The ACPI `SLEEP_STATUS_REG`, one byte (ACPI 6.5 § 4.8.3.7). Bit 7 is WAK_STS.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// SLP_EN in the byte written to [`SLEEP_CONTROL_PORT`]: enter the state that SLP_TYP says.
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYP of soft off, as `\_S5` gives it. It stands in bits 2 to 4 of [`SLEEP_CONTROL_PORT`].
pub const SLEEP_TYPE_S5: u8 = 5;

/// One byte that says which events the Generic Event Device's interrupt stands for: the bits
/// below. Reading it clears it; `_EVT` reads it once per interrupt and notifies each device whose
/// bit was set. The monitor sets a bit first and raises [`GED_GSI`] then, so an event that comes
/// between the read and the next interrupt is never lost.
pub const GED_EVENT_PORT: u16 = 0x602;
/// Bit of [`GED_EVENT_PORT`]: the power button was pressed.
pub const GED_EVENT_POWER_BUTTON: u8 = 1 << 0;
/// Bit of [`GED_EVENT_PORT`]: the VM generation id changed.
pub const GED_EVENT_VMGENID: u8 = 1 << 1;
/// Bit of [`GED_EVENT_PORT`]: the VMClock page changed.
pub const GED_EVENT_VMCLOCK: u8 = 1 << 2;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_line_is_given_twice() {
        let virtio: BTreeSet<_> = (0..MAX_VIRTIO_DEVICES).filter_map(virtio_gsi).collect();
        assert_eq!(virtio.len(), 17);
        for other in [I8042_KEYBOARD_GSI, COM1_GSI, GED_GSI, I8042_AUX_GSI] {
            assert!(!virtio.contains(&other));
        }
        assert!(virtio.iter().all(|&gsi| gsi < IOAPIC_PINS));
        assert_eq!(virtio_gsi(MAX_VIRTIO_DEVICES), None);
    }
}
