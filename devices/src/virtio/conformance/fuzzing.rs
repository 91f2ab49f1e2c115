//! Bytes to driver behaviour: the entry for fuzzers and for the random-driver test.

use super::{FIRST_BUFFER, Harness, RAM, RINGS, RINGS_LEN};
use crate::rate::{Bucket, Limits, RateLimiter};
use crate::virtio::device::{Device, Message, Traffic};
use crate::virtio::mmio::reg;

/// Operations in one run, so that a long input stays quick.
const MAX_STEPS: usize = 400;

/// Input that is consumed from the front; zeros follow its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    fn bytes(&mut self, max: usize) -> Vec<u8> {
        let len = usize::from(self.byte()) % (max + 1);
        (0..len).map(|_| self.byte()).collect()
    }

    /// An address, usually in RAM.
    fn gpa(&mut self) -> u64 {
        match self.byte() {
            0..200 => FIRST_BUFFER + u64::from(self.u16()) * 8,
            200..240 => RINGS + u64::from(self.u16()) * 4,
            240..250 => RAM - u64::from(self.byte()),
            _ => self.u64(),
        }
    }

    /// A length, usually small.
    fn len(&mut self) -> u32 {
        match self.byte() {
            0..160 => u32::from(self.byte()),
            160..240 => u32::from(self.u16()),
            _ => self.u32(),
        }
    }

    /// Descriptor flags and index, usually within reason.
    fn link(&mut self) -> (u16, u16) {
        match self.byte() {
            byte @ 0..240 => (u16::from(byte) & 7, u16::from(byte >> 3) & 15),
            _ => (self.u16(), self.u16()),
        }
    }
}

/// Drives `device` as `data` says: a driver that does anything in any order. Panics only if the
/// device (or its transport) does something that it must not do.
pub fn fuzz<D: Device>(device: D, data: &[u8]) {
    let mut input = Input(data);
    let mut harness = Harness::new(device);
    let queues = harness.device().queues().len() as u16;
    let offered = harness.offered();
    // Most inputs are to reach the device and not only its registers.
    if input.byte() < 240 {
        let refused = if input.byte() < 128 { 0 } else { input.u64() };
        harness.activate_with(offered & !refused | crate::virtio::features::VERSION_1);
    }
    for _ in 0..MAX_STEPS {
        if input.0.is_empty() {
            break;
        }
        let operation = input.byte() % 16;
        let queue = u16::from(input.byte()) % queues;
        match operation {
            0 => {
                let offset = u64::from(input.byte()) * 4 % 0x120;
                let value = input.u32();
                harness.write_register(offset, value);
            }
            1 => {
                let (offset, data) = (u64::from(input.u16()) % 0x200, input.bytes(16));
                harness.write_bytes(offset, &data);
                let mut data = data;
                harness.registers().read(offset, &mut data);
            }
            2 => {
                let value = input.u32() & 0xff;
                harness.write_register(reg::STATUS, value);
            }
            3 => {
                harness.reset();
                harness.activate();
            }
            4..7 => {
                let (index, gpa, len) = (u16::from(input.byte()) % 16, input.gpa(), input.len());
                let (flags, next) = input.link();
                harness.descriptor(queue, index, gpa, len, flags, next);
            }
            7..9 => {
                let head = u16::from(input.byte()) % 17;
                harness.make_available(queue, head);
            }
            9 => {
                let index = input.u16();
                harness.set_available_index(queue, index);
            }
            10 => {
                let at = input.gpa();
                let bytes = input.bytes(64);
                let fits = |start: u64, len: u64| {
                    at >= start && at - start <= len - bytes.len().min(len as usize) as u64
                };
                if fits(0, RAM) || fits(RINGS, RINGS_LEN) {
                    harness.write(at, &bytes);
                }
            }
            11 => {
                harness.kick(queue);
                harness.turn();
            }
            12 => {
                let hold = input.byte() & 1 != 0;
                harness.hold_operations(hold);
                match input.byte() % 3 {
                    0 => harness.fail_operation(libc::EIO),
                    1 => harness.finish_operation(),
                    _ => harness.run(),
                };
            }
            13 => {
                harness.pause();
                harness.registers_can_be_moved();
                harness.resume();
            }
            14 => {
                let message = match input.byte() & 7 {
                    4..8 => rate_limit(&mut input),
                    0 => Message::Input(input.bytes(255)),
                    2 => balloon(&mut input),
                    3 => Message::TransportReset,
                    _ => Message::Resize { columns: input.u16(), rows: input.u16() },
                };
                if let Some(config) = harness.device_mut().update(&message) {
                    harness.registers.publish_config(config);
                }
                harness.message(&message);
            }
            _ => {
                harness.expire_timers();
                harness.run();
            }
        }
    }
}

/// A change to a balloon.
fn balloon(input: &mut Input<'_>) -> Message {
    match input.byte() & 1 {
        0 => Message::BalloonTarget(input.u32()),
        _ => Message::StatisticsInterval(std::time::Duration::from_secs(input.byte().into())),
    }
}

/// A limit that is soon reached, or none.
fn rate_limit(input: &mut Input<'_>) -> Message {
    let traffic = match input.byte() % 3 {
        0 => Traffic::All,
        1 => Traffic::Received,
        _ => Traffic::Sent,
    };
    let mut bucket = || {
        let size = u64::from(input.byte());
        Some(Bucket { size, one_time_burst: u64::from(input.byte()), refill_ms: 1 << 20 })
    };
    let limits = Limits { bandwidth: bucket(), ops: bucket() };
    Message::RateLimit(traffic, RateLimiter::new(limits, std::time::Instant::now()))
}
