//! The PC keyboard controller: its reset line, and, where a machine has one, a keyboard that nobody
//! sits at and whose Ctrl, Alt and Del can be pressed.
//!
//! Linux resets an x86 machine by writing 0xfe ("pulse output line 0", which is wired to the CPU's
//! reset pin) to port 0x64; ACPI's RESET_REG points there too. Without a keyboard, reads return 0:
//! nothing to read, input buffer empty, so that a driver that waits for the latter goes on.
//!
//! With one, it is what Linux's i8042 and atkbd drivers ask for: the controller's commands that touch
//! its configuration and its tests, and the keyboard's commands, each of which is acknowledged. After
//! the IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller", and the AT keyboard's
//! scan code sets 1 and 2.

use std::collections::VecDeque;

use crate::virtio::device::{Payload, RestoreError};

/// Port offset of the command and status register from the data port 0x60.
const COMMAND_OFFSET: u64 = 4;
/// "Pulse output line 0 low": CPU reset.
const RESET_CPU: u8 = 0xfe;

// Commands to the controller.
const READ_CONFIGURATION: u8 = 0x20;
const WRITE_CONFIGURATION: u8 = 0x60;
const DISABLE_AUX: u8 = 0xa7;
const ENABLE_AUX: u8 = 0xa8;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT_PORT: u8 = 0xd0;
const WRITE_OUTPUT_PORT: u8 = 0xd1;
const WRITE_KEYBOARD_OUTPUT: u8 = 0xd2;
const WRITE_AUX: u8 = 0xd4;

const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;
/// Clock line stuck low: there is nothing at the auxiliary port.
const PORT_TEST_FAILED: u8 = 0x01;
/// The reset line is high, the gate for address line 20 open.
const OUTPUT_PORT: u8 = 0x03;

// Bits of the status.
const OUTPUT_FULL: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const LAST_WAS_COMMAND: u8 = 1 << 3;
const UNLOCKED: u8 = 1 << 4;

// Bits of the configuration.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const SELF_TESTED: u8 = 1 << 2;
const KEYBOARD_DISABLED: u8 = 1 << 4;
const AUX_DISABLED: u8 = 1 << 5;
/// Scan codes of set 2 become those of set 1.
const TRANSLATE: u8 = 1 << 6;

// The keyboard's side.
const ACKNOWLEDGED: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const KEYBOARD_PASSED: u8 = 0xaa;
const SET_LEDS: u8 = 0xed;
const SCAN_CODE_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const ENABLE_SCANNING: u8 = 0xf4;
const DISABLE_SCANNING: u8 = 0xf5;
const DEFAULTS: u8 = 0xf6;
const RESET_KEYBOARD: u8 = 0xff;
/// What a keyboard with 83 (then 101) keys says it is, untranslated and translated.
const IDENTITY: [u8; 2] = [0xab, 0x83];
const TRANSLATED_IDENTITY: [u8; 2] = [0xab, 0x41];

/// Most bytes that wait to be read. A keyboard has 16, and what does not fit is not typed.
const BUFFER: usize = 32;

/// Make codes of Ctrl, Alt and Del: in set 1 and in set 2.
const CTRL_ALT_DEL: [(&[u8], &[u8]); 3] =
    [(&[0x1d], &[0x14]), (&[0x38], &[0x11]), (&[0xe0, 0x53], &[0xe0, 0x71])];

/// What an access asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// The guest pulsed the CPU's reset line.
    pub reset: bool,
    /// The interrupt line of the keyboard is to be raised.
    pub interrupt: bool,
}

/// Register model of the controller.
#[derive(Clone, Debug, Default)]
pub struct I8042 {
    keyboard: Option<Keyboard>,
}

/// Who the next byte at the data port is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Awaited {
    #[default]
    Keyboard,
    Configuration,
    OutputPort,
    KeyboardOutput,
    Aux,
}

#[derive(Clone, Debug)]
struct Keyboard {
    configuration: u8,
    /// The last write went to the command port.
    commanded: bool,
    awaited: Awaited,
    /// The keyboard was given a command and takes the next byte as its value.
    value_follows: Option<u8>,
    scanning: bool,
    output: VecDeque<u8>,
}

impl Default for Keyboard {
    fn default() -> Keyboard {
        Keyboard {
            configuration: KEYBOARD_INTERRUPT | SELF_TESTED | AUX_DISABLED | TRANSLATE,
            commanded: false,
            awaited: Awaited::Keyboard,
            value_follows: None,
            scanning: true,
            output: VecDeque::new(),
        }
    }
}

impl I8042 {
    /// Length of the port range in bytes: 0x60 to 0x64.
    pub const LEN: u64 = 5;

    /// A controller with a keyboard, or with nothing but its reset line.
    pub fn new(keyboard: bool) -> I8042 {
        I8042 { keyboard: keyboard.then(Keyboard::default) }
    }

    /// Reads `data` at `offset` from port 0x60.
    #[must_use]
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Effect {
        data.fill(0);
        let (Some(keyboard), Some(byte)) = (&mut self.keyboard, data.first_mut()) else {
            return Effect::default();
        };
        match offset {
            0 => {
                *byte = keyboard.output.pop_front().unwrap_or(0);
                Effect { interrupt: keyboard.interrupts(), reset: false }
            }
            COMMAND_OFFSET => {
                *byte = keyboard.status();
                Effect::default()
            }
            _ => Effect::default(),
        }
    }

    /// Writes `data` at `offset` from port 0x60.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Some(&byte) = data.first() else { return Effect::default() };
        if offset == COMMAND_OFFSET && byte == RESET_CPU {
            return Effect { reset: true, interrupt: false };
        }
        let Some(keyboard) = &mut self.keyboard else { return Effect::default() };
        let was_empty = keyboard.output.is_empty();
        match offset {
            0 => keyboard.data(byte),
            COMMAND_OFFSET => keyboard.command(byte),
            _ => {}
        }
        Effect { interrupt: was_empty && keyboard.interrupts(), reset: false }
    }

    /// Presses Ctrl, Alt and Del and lets them go again. Returns what is to be done, or `None` if
    /// there is no keyboard or the guest does not listen to it.
    #[must_use]
    pub fn ctrl_alt_del(&mut self) -> Option<Effect> {
        let keyboard = self.keyboard.as_mut()?;
        if !keyboard.scanning || keyboard.configuration & KEYBOARD_DISABLED != 0 {
            return None;
        }
        let was_empty = keyboard.output.is_empty();
        let translated = keyboard.configuration & TRANSLATE != 0;
        for (set_1, set_2) in CTRL_ALT_DEL {
            keyboard.push(if translated { set_1 } else { set_2 });
        }
        for (set_1, set_2) in CTRL_ALT_DEL.iter().rev() {
            let (prefix, key) = if translated { (set_1, 0x80) } else { (set_2, 0) };
            // The code that is let go is marked in its last byte, or by a byte before it.
            let Some((last, before)) = prefix.split_last() else { continue };
            keyboard.push(before);
            if !translated {
                keyboard.push(&[0xf0]);
            }
            keyboard.push(&[last | key]);
        }
        Some(Effect { interrupt: was_empty && keyboard.interrupts(), reset: false })
    }
}

const KIND: &str = "i8042";
const VERSION: u16 = 1;

impl I8042 {
    /// The controller, as a payload: nothing if there is no keyboard.
    pub fn save(&self) -> Payload {
        let mut bytes = Vec::new();
        if let Some(keyboard) = &self.keyboard {
            bytes.extend([
                keyboard.configuration,
                keyboard.commanded.into(),
                keyboard.awaited as u8,
                keyboard.value_follows.unwrap_or_default(),
                keyboard.scanning.into(),
            ]);
            bytes.extend(&keyboard.output);
        }
        Payload { kind: KIND, version: VERSION, bytes }
    }

    /// Takes a saved state of a controller like this.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is changed then.
    pub fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let invalid = |reason| RestoreError::Invalid { kind: KIND, reason };
        let bytes = payload.expect(KIND, VERSION)?;
        let keyboard = match (&mut self.keyboard, bytes) {
            (None, []) => return Ok(()),
            (Some(keyboard), [_, ..]) => keyboard,
            _ => return Err(invalid("a keyboard is there or is not, other than here")),
        };
        let (&[configuration, commanded, awaited, value, scanning], output) =
            bytes.split_first_chunk::<5>().ok_or_else(|| invalid("it is too short"))?;
        if commanded > 1 || scanning > 1 {
            return Err(invalid("a flag is neither set nor clear"));
        }
        if output.len() > BUFFER {
            return Err(invalid("more bytes wait than fit"));
        }
        let awaited = [
            Awaited::Keyboard,
            Awaited::Configuration,
            Awaited::OutputPort,
            Awaited::KeyboardOutput,
            Awaited::Aux,
        ]
        .into_iter()
        .find(|known| *known as u8 == awaited)
        .ok_or_else(|| invalid("it waits for something unknown"))?;
        if awaited != Awaited::Keyboard && commanded == 0 {
            return Err(invalid("it waits for what no command asked for"));
        }
        let value_follows = match value {
            // No command is 0.
            0 => None,
            SET_LEDS | SET_RATE | SCAN_CODE_SET => Some(value),
            _ => return Err(invalid("a command has a value that it has not")),
        };
        *keyboard = Keyboard {
            configuration,
            commanded: commanded != 0,
            awaited,
            value_follows,
            scanning: scanning != 0,
            output: output.iter().copied().collect(),
        };
        Ok(())
    }
}

impl Keyboard {
    fn status(&self) -> u8 {
        let full = if self.output.is_empty() { 0 } else { OUTPUT_FULL };
        let command = if self.commanded { LAST_WAS_COMMAND } else { 0 };
        UNLOCKED | full | command | (self.configuration & SYSTEM_FLAG)
    }

    /// There is something to read, and the guest wants to be told.
    fn interrupts(&self) -> bool {
        !self.output.is_empty() && self.configuration & KEYBOARD_INTERRUPT != 0
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= BUFFER {
            self.output.extend(bytes);
        }
    }

    fn command(&mut self, command: u8) {
        self.commanded = true;
        self.awaited = Awaited::Keyboard;
        match command {
            READ_CONFIGURATION => self.push(&[self.configuration]),
            WRITE_CONFIGURATION => self.awaited = Awaited::Configuration,
            DISABLE_AUX => self.configuration |= AUX_DISABLED,
            ENABLE_AUX => self.configuration &= !AUX_DISABLED,
            TEST_AUX => self.push(&[PORT_TEST_FAILED]),
            SELF_TEST => {
                self.configuration |= SELF_TESTED;
                self.push(&[SELF_TEST_PASSED]);
            }
            TEST_KEYBOARD => self.push(&[PORT_TEST_PASSED]),
            DISABLE_KEYBOARD => self.configuration |= KEYBOARD_DISABLED,
            ENABLE_KEYBOARD => self.configuration &= !KEYBOARD_DISABLED,
            READ_OUTPUT_PORT => self.push(&[OUTPUT_PORT]),
            WRITE_OUTPUT_PORT => self.awaited = Awaited::OutputPort,
            WRITE_KEYBOARD_OUTPUT => self.awaited = Awaited::KeyboardOutput,
            WRITE_AUX => self.awaited = Awaited::Aux,
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        self.commanded = false;
        match std::mem::take(&mut self.awaited) {
            Awaited::Configuration => self.configuration = byte,
            Awaited::KeyboardOutput => self.push(&[byte]),
            // Nothing is at the auxiliary port, and the gate of address line 20 stays open.
            Awaited::Aux | Awaited::OutputPort => {}
            Awaited::Keyboard => {
                // A byte for the keyboard switches it on.
                self.configuration &= !KEYBOARD_DISABLED;
                self.keyboard(byte);
            }
        }
    }

    fn keyboard(&mut self, byte: u8) {
        if let Some(command) = self.value_follows.take() {
            self.push(&[ACKNOWLEDGED]);
            // Asked for by 0: which set it is.
            if command == SCAN_CODE_SET && byte == 0 {
                self.push(&[2]);
            }
            return;
        }
        match byte {
            SET_LEDS | SET_RATE | SCAN_CODE_SET => {
                self.value_follows = Some(byte);
                self.push(&[ACKNOWLEDGED]);
            }
            IDENTIFY => {
                let translated = self.configuration & TRANSLATE != 0;
                self.push(&[ACKNOWLEDGED]);
                self.push(if translated { &TRANSLATED_IDENTITY } else { &IDENTITY });
            }
            ENABLE_SCANNING | DEFAULTS => {
                self.scanning = true;
                self.push(&[ACKNOWLEDGED]);
            }
            DISABLE_SCANNING => {
                self.scanning = false;
                self.push(&[ACKNOWLEDGED]);
            }
            RESET_KEYBOARD => {
                self.scanning = true;
                self.output.clear();
                self.push(&[ACKNOWLEDGED, KEYBOARD_PASSED]);
            }
            // Other commands set modes of single keys, which nobody presses.
            0xef..=0xff => self.push(&[ACKNOWLEDGED]),
            _ => self.push(&[RESEND]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::golden;

    fn drain(i8042: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let (mut status, mut byte) = ([0], [0]);
            let _ = i8042.read(COMMAND_OFFSET, &mut status);
            if status[0] & OUTPUT_FULL == 0 {
                return bytes;
            }
            let effect = i8042.read(0, &mut byte);
            bytes.push(byte[0]);
            let _ = i8042.read(COMMAND_OFFSET, &mut status);
            // As long as there is more, each byte is told of.
            assert_eq!(effect.interrupt, status[0] & OUTPUT_FULL != 0);
        }
    }

    #[test]
    fn only_fe_to_the_command_port_resets() {
        for keyboard in [false, true] {
            let mut i8042 = I8042::new(keyboard);
            assert!(i8042.write(4, &[0xfe]).reset);
            assert!(!i8042.write(0, &[0xfe]).reset);
            assert!(!i8042.write(4, &[0xd1]).reset);
            assert!(!i8042.write(4, &[]).reset);
        }
        let mut status = [0xff];
        assert_eq!(I8042::default().read(4, &mut status), Effect::default());
        assert_eq!(status, [0]);
        assert_eq!(I8042::default().ctrl_alt_del(), None);
    }

    #[test]
    fn a_driver_finds_a_controller_and_a_keyboard() {
        let mut i8042 = I8042::new(true);
        assert!(i8042.write(4, &[READ_CONFIGURATION]).interrupt);
        let before = drain(&mut i8042);
        assert_eq!(before, [0x65]);
        // Interrupts off while the driver probes.
        let _ = i8042.write(4, &[WRITE_CONFIGURATION]);
        let _ = i8042.write(0, &[before[0] & !KEYBOARD_INTERRUPT]);
        assert!(!i8042.write(4, &[SELF_TEST]).interrupt);
        let mut byte = [0];
        let _ = i8042.read(0, &mut byte);
        assert_eq!(byte[0], SELF_TEST_PASSED);
        let _ = i8042.write(4, &[WRITE_CONFIGURATION]);
        let _ = i8042.write(0, &[before[0]]);
        for (sent, answer) in [
            (&[RESET_KEYBOARD][..], &[0xfa, 0xaa][..]),
            (&[IDENTIFY], &[0xfa, 0xab, 0x41]),
            (&[SET_LEDS, 0x07], &[0xfa, 0xfa]),
            (&[SCAN_CODE_SET, 0], &[0xfa, 0xfa, 2]),
            (&[0x12], &[RESEND]),
        ] {
            for &byte in sent {
                let _ = i8042.write(0, &[byte]);
            }
            assert_eq!(drain(&mut i8042), answer, "{sent:x?}");
        }
    }

    #[test]
    fn ctrl_alt_del_is_typed_in_either_set() {
        let mut i8042 = I8042::new(true);
        assert_eq!(i8042.ctrl_alt_del(), Some(Effect { interrupt: true, reset: false }));
        let codes = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
        assert_eq!(drain(&mut i8042), codes);
        let _ = i8042.write(4, &[WRITE_CONFIGURATION]);
        let _ = i8042.write(0, &[KEYBOARD_INTERRUPT]);
        assert!(i8042.ctrl_alt_del().is_some());
        let codes = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
        assert_eq!(drain(&mut i8042), codes);
        let _ = i8042.write(0, &[DISABLE_SCANNING]);
        assert_eq!(i8042.ctrl_alt_del(), None);
    }

    #[test]
    fn what_nobody_reads_does_not_grow() {
        let mut i8042 = I8042::new(true);
        for byte in (0..=255).cycle().take(10_000) {
            let _ = i8042.write(0, &[byte]);
            let _ = i8042.write(4, &[byte & 0x7f]);
            let _ = i8042.ctrl_alt_del();
        }
        assert!(i8042.keyboard.unwrap().output.len() <= BUFFER);
    }

    #[test]
    fn a_saved_controller_goes_on_where_it_was() {
        let mut controller = I8042::new(true);
        let _ = controller.write(4, &[WRITE_CONFIGURATION]);
        let half = controller.save();
        let mut other = I8042::new(true);
        other.restore(&half).unwrap();
        assert_eq!(other.save(), half);
        let _ = other.write(0, &[KEYBOARD_INTERRUPT]);
        assert!(other.ctrl_alt_del().is_some_and(|effect| effect.interrupt));
        let full = other.save();
        controller.restore(&full).unwrap();
        let mut byte = [0];
        let _ = controller.read(0, &mut byte);
        assert_eq!(byte[0], CTRL_ALT_DEL[0].1[0]);
        assert!(I8042::new(false).restore(&full).is_err());
        assert!(controller.restore(&I8042::new(false).save()).is_err());
    }

    /// A controller that waits for a byte of the host's, whose keyboard waits for one too.
    fn busy() -> I8042 {
        let mut controller = I8042::new(true);
        for (offset, byte) in [(0, SET_LEDS), (4, DISABLE_AUX), (4, WRITE_CONFIGURATION)] {
            let _ = controller.write(offset, &[byte]);
        }
        assert!(controller.ctrl_alt_del().is_some());
        controller
    }

    #[test]
    fn the_payload_is_as_it_was() {
        let golden = "65 01 01 ed 01 fa 1d38e053 e0d3b89d";
        golden::check(&busy().save(), "i8042", 1, golden, |payload| {
            let mut controller = I8042::new(true);
            controller.restore(payload).map(|()| controller.save())
        });
        golden::check(&I8042::new(false).save(), "i8042", 1, "", |payload| {
            let mut controller = I8042::new(false);
            controller.restore(payload).map(|()| controller.save())
        });
    }

    #[test]
    fn what_cannot_have_been_saved_is_refused() {
        for (place, value) in [(1, 2), (1, 0), (2, 5), (3, 1), (3, IDENTIFY), (4, 2)] {
            let mut wrong = busy().save();
            wrong.bytes[place] = value;
            assert!(I8042::new(true).restore(&wrong).is_err(), "{value:#x} at {place}");
        }
    }

    /// An access, or the three keys.
    #[derive(Clone, Debug)]
    enum Step {
        Read(u64),
        Write(u64, u8),
        Keys,
    }

    fn step() -> impl Strategy<Value = Step> {
        let port = prop::sample::select(vec![0, COMMAND_OFFSET, 0, COMMAND_OFFSET, 2]);
        let byte = prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![
                READ_CONFIGURATION,
                WRITE_CONFIGURATION,
                WRITE_OUTPUT_PORT,
                WRITE_KEYBOARD_OUTPUT,
                WRITE_AUX,
                SET_LEDS,
                SCAN_CODE_SET,
                SET_RATE,
                IDENTIFY,
                DISABLE_SCANNING,
                0,
            ])
        ];
        prop_oneof![
            3 => port.clone().prop_map(Step::Read),
            5 => (port, byte).prop_map(|(port, byte)| Step::Write(port, byte)),
            1 => Just(Step::Keys),
        ]
    }

    fn take(controller: &mut I8042, step: &Step) -> (Option<Effect>, u8) {
        let mut byte = [0];
        let effect = match *step {
            Step::Read(offset) => Some(controller.read(offset, &mut byte)),
            Step::Write(offset, byte) => Some(controller.write(offset, &[byte])),
            Step::Keys => controller.ctrl_alt_del(),
        };
        (effect, byte[0])
    }

    proptest! {
        #[test]
        fn a_copy_behaves_like_the_original(
            keyboard in prop::bool::weighted(0.9),
            before in prop::collection::vec(step(), 0..60),
            after in prop::collection::vec(step(), 0..60))
        {
            let mut controller = I8042::new(keyboard);
            for step in &before {
                take(&mut controller, step);
            }
            let saved = controller.save();
            // It takes the place of whatever was there.
            let mut copy = if keyboard { busy() } else { I8042::new(false) };
            copy.restore(&saved).unwrap();
            prop_assert_eq!(copy.save(), saved);
            for step in &after {
                prop_assert_eq!(take(&mut copy, step), take(&mut controller, step), "{:?}", step);
            }
            prop_assert_eq!(copy.save(), controller.save());
        }

        #[test]
        fn bytes_are_taken_whole_or_not_at_all(
            changes in prop::collection::vec((0usize..6, 0u8..8), 0..3), len in 0usize..60)
        {
            let mut payload = busy().save();
            for (place, value) in changes {
                payload.bytes[place] = value;
            }
            if len < 50 {
                payload.bytes.resize(len, b'x');
            }
            let mut controller = I8042::new(true);
            match controller.restore(&payload) {
                Ok(()) => prop_assert_eq!(controller.save(), payload),
                Err(_) => prop_assert_eq!(controller.save(), I8042::new(true).save()),
            }
        }
    }
}
