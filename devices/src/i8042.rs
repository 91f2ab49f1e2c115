//! The one thing that is left of the PC keyboard controller: its reset line.
//!
//! Linux resets an x86 machine by writing 0xfe ("pulse output line 0", which is wired to the CPU's
//! reset pin) to port 0x64; ACPI's RESET_REG points there too. Reads return a status of 0: nothing
//! to read, input buffer empty, so that a driver that waits for "input buffer empty" goes on.

/// Port offset of the command and status register from the data port 0x60.
const COMMAND_OFFSET: u64 = 4;
/// "Pulse output line 0 low": CPU reset.
const RESET_CPU: u8 = 0xfe;

/// Register model of the controller. Holds no state.
#[derive(Clone, Copy, Debug, Default)]
pub struct I8042;

impl I8042 {
    /// Length of the port range in bytes: 0x60 to 0x64.
    pub const LEN: u64 = 5;

    /// Reads `data` at `offset` from port 0x60.
    pub fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Writes `data` at `offset` from port 0x60. Returns true if the guest asked for a reset.
    #[must_use]
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        offset == COMMAND_OFFSET && data.first() == Some(&RESET_CPU)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fe_to_the_command_port_resets() {
        assert!(I8042.write(4, &[0xfe]));
        assert!(!I8042.write(0, &[0xfe]));
        assert!(!I8042.write(4, &[0xd1]));
        assert!(!I8042.write(4, &[]));
        let mut status = [0xff];
        I8042.read(4, &mut status);
        assert_eq!(status, [0]);
    }
}
