//! The first serial port: a 16550A as a plain value.
//!
//! `vm-superio` models the registers; this module gives its two side effects back to the caller as
//! values (bytes to send, an interrupt to raise), so that the caller owns the output and the
//! interrupt line.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::serial::NoEvents;
use vm_superio::{Serial as Registers, SerialState, Trigger};

use crate::virtio::device::{Payload, RestoreError};

const KIND: &str = "serial";
const VERSION: u16 = 1;

/// Remembers that the model asked for an interrupt.
struct Flag(Arc<AtomicBool>);

impl Trigger for Flag {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// What a register write led to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// A byte that the guest sent.
    pub output: Option<u8>,
    /// The interrupt line is to be pulsed.
    pub interrupt: bool,
    /// The guest took the last received byte: there is room for more input.
    pub input_drained: bool,
}

/// A 16550A UART.
pub struct Serial {
    registers: Registers<Flag, NoEvents, Vec<u8>>,
    // Shared with the model's trigger only; atomic so that the whole value can change threads.
    interrupt: Arc<AtomicBool>,
    /// Interrupt enable register, as the driver wrote it.
    enabled: u8,
    /// Registers 0 and 1 are the divisor latch.
    divisor_latch: bool,
}

impl Default for Serial {
    fn default() -> Self {
        Serial::new()
    }
}

impl Serial {
    /// Length of the port range in bytes.
    pub const LEN: u64 = 8;

    /// A port as it is after power-on.
    pub fn new() -> Serial {
        let interrupt = Arc::new(AtomicBool::new(false));
        let registers = Registers::new(Flag(Arc::clone(&interrupt)), Vec::new());
        Serial { registers, interrupt, enabled: 0, divisor_latch: false }
    }

    /// Reads a register. Accesses wider than a byte read ones above it, as on an 8-bit bus.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) -> Effect {
        data.fill(0xff);
        let mut effect = Effect::default();
        if let (Ok(offset), Some(byte)) = (u8::try_from(offset), data.first_mut()) {
            let had_input = self.registers.fifo_capacity() < FIFO_LEN;
            *byte = self.registers.read(offset);
            // A UART goes on saying "data available" while there is data; the model says it once
            // after each arrival. A driver that takes its leave in between, as Linux does after
            // 256 bytes, would never come back for the rest.
            let pending =
                self.enabled & ENABLE_RECEIVED != 0 && self.registers.fifo_capacity() < FIFO_LEN;
            if offset == IDENTIFICATION && *byte & 0x0f == IDENTIFY_NONE && pending {
                *byte = *byte & 0xf0 | IDENTIFY_RECEIVED;
            }
            effect.input_drained = had_input && self.registers.fifo_capacity() == FIFO_LEN;
        }
        effect.interrupt = self.take_interrupt();
        effect
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let (Ok(offset), Some(&byte)) = (u8::try_from(offset), data.first()) {
            match offset {
                1 if !self.divisor_latch => self.enabled = byte,
                LINE_CONTROL => self.divisor_latch = byte & DIVISOR_LATCH != 0,
                _ => {}
            }
            // The error cases are a failing trigger (infallible here), a failing writer (a Vec does
            // not fail) and a full receive FIFO in loopback mode, where the byte is lost as it
            // would be on a real UART.
            let _ = self.registers.write(offset, byte);
        }
        let out = self.registers.writer_mut();
        Effect { output: out.pop(), interrupt: self.take_interrupt(), input_drained: false }
    }

    /// Bytes of input that would fit now, 0 to 64.
    pub fn input_room(&self) -> usize {
        self.registers.fifo_capacity()
    }

    /// Gives the guest up to [`Serial::input_room`] bytes of `input`. Returns how many it took, and
    /// whether the interrupt line is to be pulsed.
    pub fn input(&mut self, input: &[u8]) -> (usize, bool) {
        let take = input.len().min(self.input_room());
        // In loopback mode the line is disconnected and the model takes nothing; the bytes are gone
        // as they would be on a wire.
        let _ = self.registers.enqueue_raw_bytes(&input[..take]);
        (take, self.take_interrupt())
    }

    fn take_interrupt(&mut self) -> bool {
        self.interrupt.swap(false, Ordering::Relaxed)
    }

    /// The registers and the bytes that the guest has not read yet, as a payload.
    pub fn save(&self) -> Payload {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.registers.state();
        let mut bytes = vec![
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
        ];
        bytes.extend(in_buffer);
        Payload { kind: KIND, version: VERSION, bytes }
    }

    /// Takes a saved state.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing is changed then.
    pub fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let invalid = |reason| RestoreError::Invalid { kind: KIND, reason };
        let bytes = payload.expect(KIND, VERSION)?;
        let (&registers, in_buffer) =
            bytes.split_first_chunk::<9>().ok_or_else(|| invalid("it is too short"))?;
        let [low, high, enabled, identification, control, status, modem, modem_status, scratch] =
            registers;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enabled,
            interrupt_identification: identification,
            line_control: control,
            line_status: status,
            modem_control: modem,
            modem_status,
            scratch,
            in_buffer: in_buffer.to_vec(),
        };
        check(&state).map_err(invalid)?;
        let trigger = Flag(Arc::clone(&self.interrupt));
        self.registers = Registers::from_state(&state, trigger, NoEvents, Vec::new())
            .map_err(|_| invalid("more bytes wait than fit"))?;
        self.interrupt.store(false, Ordering::Relaxed);
        self.enabled = enabled;
        self.divisor_latch = control & DIVISOR_LATCH != 0;
        Ok(())
    }
}

/// Whether a driver and a line can have led the registers to this.
fn check(state: &SerialState) -> Result<(), &'static str> {
    let fresh = SerialState::default();
    let received = if state.in_buffer.is_empty() { 0 } else { STATUS_RECEIVED };
    if state.interrupt_enable & !ENABLE_ALL != 0 {
        return Err("interrupts are enabled that there are not");
    }
    if !IDENTIFICATIONS.contains(&state.interrupt_identification) {
        return Err("an interrupt is pending that there is not");
    }
    // Nothing else in these two ever changes.
    if state.line_status != fresh.line_status | received {
        return Err("the line's status is not that of what was received");
    }
    if state.modem_status != fresh.modem_status {
        return Err("the modem's status is not the one that it has");
    }
    Ok(())
}

/// Receive FIFO of the model in bytes.
const FIFO_LEN: usize = 0x40;

/// Interrupt identification register (read), and its values "none" and "received data available".
const IDENTIFICATION: u8 = 2;
const IDENTIFY_NONE: u8 = 1;
const IDENTIFY_RECEIVED: u8 = 4;
/// What the model has there: "none", or any of "transmitter empty" and "received data available".
const IDENTIFICATIONS: [u8; 4] = [IDENTIFY_NONE, 2, IDENTIFY_RECEIVED, 2 | IDENTIFY_RECEIVED];
/// Line control register, and its bit by which registers 0 and 1 are the divisor latch.
const LINE_CONTROL: u8 = 3;
const DIVISOR_LATCH: u8 = 1 << 7;
/// "Received data available", in the interrupt enable register.
const ENABLE_RECEIVED: u8 = 1;
/// All interrupts of a 16550A, in that register.
const ENABLE_ALL: u8 = 0x0f;
/// "Received data available", in the line status register.
const STATUS_RECEIVED: u8 = 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::golden;

    #[test]
    fn output_comes_back_as_a_value() {
        let mut serial = Serial::new();
        assert_eq!(serial.write(0, b"a").output, Some(b'a'));
        assert_eq!(serial.write(7, b"a").output, None);
        assert_eq!(serial.write(0, &[]).output, None);
    }

    #[test]
    fn input_raises_an_interrupt_once_enabled_and_reports_when_drained() {
        let mut serial = Serial::new();
        assert_eq!(serial.input(b"x"), (1, false), "receive interrupt still disabled");
        assert!(serial.write(1, &[1]).interrupt || serial.input(b"y").1);
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(&byte, b"x");
        while serial.input_room() < FIFO_LEN {
            let effect = serial.read(0, &mut byte);
            assert_eq!(effect.input_drained, serial.input_room() == FIFO_LEN);
        }
    }

    #[test]
    fn data_stays_announced_while_there_is_some() {
        let mut serial = Serial::new();
        serial.write(1, &[1]);
        serial.input(b"abc");
        let mut byte = [0];
        for _ in 0..3 {
            // Asked twice on purpose: the answer does not depend on having been given.
            for _ in 0..2 {
                serial.read(2, &mut byte);
                assert_eq!(byte[0] & 0x0f, 4);
            }
            serial.read(0, &mut byte);
        }
        serial.read(2, &mut byte);
        assert_eq!(byte[0] & 0x0f, 1);
        serial.input(b"d");
        serial.write(1, &[0]);
        serial.read(2, &mut byte);
        serial.read(2, &mut byte);
        assert_eq!(byte[0] & 0x0f, 1, "the interrupt is not enabled");
    }

    #[test]
    fn a_saved_port_goes_on_where_it_was() {
        let mut serial = Serial::new();
        serial.write(1, &[1]);
        serial.write(7, b"s");
        serial.input(b"abc");
        let saved = serial.save();
        let mut other = Serial::new();
        other.restore(&saved).unwrap();
        assert_eq!(other.save(), saved);
        let mut byte = [0];
        other.read(7, &mut byte);
        assert_eq!(&byte, b"s");
        for expected in b"abc" {
            other.read(2, &mut byte);
            assert_eq!(byte[0] & 0x0f, 4);
            other.read(0, &mut byte);
            assert_eq!(byte[0], *expected);
        }
        for len in [0, 8, 9 + FIFO_LEN + 1] {
            let wrong = Payload { bytes: vec![0; len], ..saved.clone() };
            assert!(other.restore(&wrong).is_err(), "{len}");
        }
    }

    /// A port with DLAB and loopback set, bytes to be read, and both interrupts pending.
    fn busy() -> Serial {
        let mut serial = Serial::new();
        serial.write(1, &[3]);
        serial.input(b"abc");
        for (offset, value) in [(3, 0x80), (0, 1), (1, 2), (4, 0x1b), (7, 0x5a)] {
            serial.write(offset, &[value]);
        }
        serial
    }

    #[test]
    fn the_payload_is_as_it_was() {
        let golden = "01 02 03 06 80 61 1b b0 5a 616263";
        golden::check(&busy().save(), "serial", 1, golden, |payload| {
            let mut serial = Serial::new();
            serial.restore(payload).map(|()| serial.save())
        });
    }

    #[test]
    fn what_cannot_have_been_saved_is_refused() {
        for (place, value) in [(2, 0x13), (3, 0), (3, 3), (3, 0xc1), (5, 0x60), (5, 0xe1), (7, 0)] {
            let mut wrong = busy().save();
            wrong.bytes[place] = value;
            assert!(Serial::new().restore(&wrong).is_err(), "{value:#x} at {place}");
        }
        let mut silent = busy().save();
        silent.bytes.truncate(9);
        assert!(Serial::new().restore(&silent).is_err(), "data, and none there");
    }

    /// An access to a register, or input.
    #[derive(Clone, Debug)]
    enum Step {
        Read(u64),
        Write(u64, Vec<u8>),
        Input(Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let byte = prop_oneof![2 => any::<u8>(), 1 => 0u8..8, 1 => Just(0x80), 1 => Just(0x10)];
        prop_oneof![
            4 => (0u64..9).prop_map(Step::Read),
            4 => (0u64..9, byte).prop_map(|(offset, byte)| Step::Write(offset, vec![byte])),
            1 => Just(Step::Write(0, Vec::new())),
            2 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Input),
        ]
    }

    fn take(serial: &mut Serial, step: &Step) -> (Effect, u8, (usize, bool), usize) {
        let (mut effect, mut byte, mut taken) = (Effect::default(), [0], (0, false));
        match step {
            Step::Read(offset) => effect = serial.read(*offset, &mut byte),
            Step::Write(offset, data) => effect = serial.write(*offset, data),
            Step::Input(bytes) => taken = serial.input(bytes),
        }
        (effect, byte[0], taken, serial.input_room())
    }

    proptest! {
        #[test]
        fn a_copy_behaves_like_the_original(
            before in prop::collection::vec(step(), 0..60),
            after in prop::collection::vec(step(), 0..60))
        {
            let mut serial = Serial::new();
            for step in &before {
                take(&mut serial, step);
            }
            let saved = serial.save();
            // It takes the place of whatever was there.
            let mut copy = busy();
            copy.restore(&saved).unwrap();
            prop_assert_eq!(copy.save(), saved);
            for step in &after {
                prop_assert_eq!(take(&mut copy, step), take(&mut serial, step), "{:?}", step);
            }
            prop_assert_eq!(copy.save(), serial.save());
        }

        #[test]
        fn bytes_are_taken_whole_or_not_at_all(
            changes in prop::collection::vec((0usize..12, any::<u8>()), 0..3), len in 0usize..90)
        {
            let mut payload = busy().save();
            for (place, value) in changes {
                payload.bytes[place] = value;
            }
            if len < 80 {
                payload.bytes.resize(len, b'x');
            }
            let mut serial = Serial::new();
            match serial.restore(&payload) {
                Ok(()) => prop_assert_eq!(serial.save(), payload),
                Err(_) => prop_assert_eq!(serial.save(), Serial::new().save()),
            }
        }
    }

    #[test]
    fn takes_no_more_than_fits() {
        let mut serial = Serial::new();
        assert_eq!(serial.input(&[b'z'; 100]).0, 64);
        assert_eq!(serial.input(&[b'z'; 100]).0, 0);
    }

    #[test]
    fn odd_accesses_do_not_panic() {
        let mut serial = Serial::new();
        for offset in [0, 1, 7, 8, 255, 256, u64::MAX] {
            for len in 0..9 {
                serial.write(offset, &vec![0xa5; len]);
                serial.read(offset, &mut vec![0; len]);
            }
        }
    }
}
