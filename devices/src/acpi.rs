//! The two ACPI register blocks of a hardware-reduced machine: sleep control and event status.
//!
//! Sleep control and status are the FADT's SLEEP_CONTROL_REG and SLEEP_STATUS_REG (ACPI 6.5
//! § 4.8.3.7): a guest powers off by writing the sleep type of `\_S5` with the enable bit. The
//! event register is Hull's own: the Generic Event Device's method reads it to learn which of the
//! events behind the one GED interrupt happened, and reading clears it.

use crate::virtio::device::{Payload, RestoreError};

const KIND: &str = "acpi";
const VERSION: u16 = 1;

/// SLP_TYPx field, bits 2 to 4 of the sleep control register.
const SLP_TYP_SHIFT: u8 = 2;
/// SLP_EN, bit 5 of the sleep control register.
const SLP_EN: u8 = 1 << 5;
/// Sleep type of `\_S5` (soft off) as the DSDT declares it.
const SLP_TYP_S5: u8 = 5;

/// Events that the guest is told of through the Generic Event Device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// The VM generation ID page changed.
    VmGenId = 1 << 1,
    /// The VMClock page changed.
    VmClock = 1 << 2,
}

/// All events that there are.
const EVENTS: u8 = Event::PowerButton as u8 | Event::VmGenId as u8 | Event::VmClock as u8;

/// Sleep control (offset 0), sleep status (1) and event status (2).
#[derive(Debug, Default)]
pub struct AcpiRegisters {
    events: u8,
}

impl AcpiRegisters {
    /// Length of the port range in bytes.
    pub const LEN: u64 = 3;

    /// Marks `event` as pending. The caller raises the GED interrupt afterwards.
    pub fn raise(&mut self, event: Event) {
        self.events |= event as u8;
    }

    /// Reads one register per byte; the event status register clears when read.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (2, Some(byte)) = (offset, data.first_mut()) {
            *byte = std::mem::take(&mut self.events);
        }
    }

    /// Writes a register. Returns true if the guest powered itself off.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let Some(&value) = data.first() else { return false };
        offset == 0 && value & SLP_EN != 0 && (value >> SLP_TYP_SHIFT) & 7 == SLP_TYP_S5
    }

    /// Pending events, as a payload.
    pub fn save(&self) -> Payload {
        Payload { kind: KIND, version: VERSION, bytes: vec![self.events] }
    }

    /// Takes a saved state.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is changed then.
    pub fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let invalid = |reason| RestoreError::Invalid { kind: KIND, reason };
        let &[events] = payload.expect(KIND, VERSION)? else {
            return Err(invalid("it is not one byte long"));
        };
        if events & !EVENTS != 0 {
            return Err(invalid("it has events that there are not"));
        }
        self.events = events;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    #[test]
    fn s5_with_enable_powers_off() {
        let mut regs = AcpiRegisters::default();
        assert!(regs.write(0, &[(5 << 2) | 0x20]));
        assert!(!regs.write(0, &[5 << 2]), "enable bit missing");
        assert!(!regs.write(0, &[(3 << 2) | 0x20]), "S3 is not offered");
        assert!(!regs.write(1, &[(5 << 2) | 0x20]), "status is not control");
        assert!(!regs.write(0, &[]));
    }

    #[test]
    fn events_accumulate_and_clear_on_read() {
        let mut regs = AcpiRegisters::default();
        regs.raise(Event::PowerButton);
        regs.raise(Event::VmClock);
        let mut byte = [0xff];
        regs.read(2, &mut byte);
        assert_eq!(byte, [0b101]);
        regs.read(2, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    fn pending_events_are_pending_in_a_copy() {
        let mut regs = AcpiRegisters::default();
        regs.raise(Event::PowerButton);
        regs.raise(Event::VmClock);
        let mut copy = AcpiRegisters::default();
        golden::check(&regs.save(), "acpi", 1, "05", |payload| {
            copy.raise(Event::VmGenId);
            copy.restore(payload).map(|()| copy.save())
        });
        let mut byte = [0];
        copy.read(2, &mut byte);
        assert_eq!(byte, [0b101]);
        assert_eq!(copy.save(), AcpiRegisters::default().save());
        for bytes in [vec![], vec![1, 0], vec![8], vec![0xff]] {
            let wrong = Payload { bytes, ..regs.save() };
            assert!(copy.restore(&wrong).is_err(), "{wrong:?}");
        }
        let later = Payload { version: 2, ..regs.save() };
        assert!(copy.restore(&later).is_err());
        assert_eq!(copy.save().bytes, [0]);
    }
}
