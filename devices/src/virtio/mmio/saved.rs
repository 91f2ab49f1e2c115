//! The registers as a payload, and back.
//!
//! A payload was made by a machine that ran, so what is in it is what a driver can have led the
//! registers to: anything else was damaged or made up, and is refused. What a driver may get wrong
//! is no reason: a device that asked for a reset because of it goes on asking.

use super::{ORDER, Registers, status};
use crate::virtio::device::{Payload, RestoreError};
use crate::virtio::features;
use crate::virtio::queue::{INTERRUPT_CONFIG, INTERRUPT_USED, QueueState};

const KIND: &str = "transport";
const VERSION: u16 = 2;

/// Alignment of descriptor table, available ring and used ring in bytes (virtio 1.3 § 2.7).
const ALIGNMENT: [u64; 3] = [16, 2, 4];

fn invalid(reason: &'static str) -> RestoreError {
    RestoreError::Invalid { kind: KIND, reason }
}

/// Bytes that are taken from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], RestoreError> {
        self.0.split_off(..len).ok_or_else(|| invalid("it is too short"))
    }

    /// The next `N` bytes; numbers are little-endian.
    fn array<const N: usize>(&mut self) -> Result<[u8; N], RestoreError> {
        self.0
            .split_off(..N)
            .and_then(|field| field.try_into().ok())
            .ok_or_else(|| invalid("it is too short"))
    }

    fn u16(&mut self) -> Result<u16, RestoreError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, RestoreError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, RestoreError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, RestoreError> {
        match self.array()? {
            [flag @ (0 | 1)] => Ok(flag == 1),
            _ => Err(invalid("a flag is neither set nor clear")),
        }
    }
}

impl Registers {
    /// The registers, with `interrupt`, the interrupt status, as a payload. No queue runs.
    pub fn save(&self, interrupt: u32) -> Payload {
        let mut bytes = Vec::new();
        for word in [
            self.device_id,
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
            self.status,
            self.generation,
            interrupt,
        ] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.driver_features.to_le_bytes());
        bytes.extend((self.queues.len() as u16).to_le_bytes());
        for queue in &self.queues {
            for word in [queue.max_size, queue.size, queue.next_avail, queue.next_used] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.push(queue.ready.into());
            for address in [queue.desc_table, queue.avail_ring, queue.used_ring] {
                bytes.extend(address.to_le_bytes());
            }
        }
        bytes.extend((self.config.len() as u32).to_le_bytes());
        bytes.extend(&self.config);
        Payload { kind: KIND, version: VERSION, bytes }
    }

    /// Takes a saved state of this device's registers. `config` is the configuration space that the
    /// device has now. If that is not what the driver was shown, it has another generation, and the
    /// driver is to be told.
    ///
    /// Returns the interrupt status, in which that is pending as well.
    ///
    /// # Errors
    /// [`RestoreError`]: it is another device's, or one with other features or queues than this one
    /// offers, or one that no driver can have led to; nothing is changed then.
    pub fn restore(&mut self, payload: &Payload, config: Vec<u8>) -> Result<u32, RestoreError> {
        let mut fields = Fields(payload.expect(KIND, VERSION)?);
        let mut new = self.clone();
        if fields.u32()? != self.device_id {
            return Err(invalid("it is of another kind of device"));
        }
        new.device_features_sel = fields.u32()?;
        new.driver_features_sel = fields.u32()?;
        new.queue_sel = fields.u32()?;
        new.status = fields.u32()?;
        new.generation = fields.u32()?;
        let mut interrupt = fields.u32()?;
        new.driver_features = fields.u64()?;
        if usize::from(fields.u16()?) != self.queues.len() {
            return Err(invalid("the device had another number of queues"));
        }
        for queue in &mut new.queues {
            if fields.u16()? != queue.max_size {
                return Err(invalid("a queue had another size"));
            }
            queue.size = fields.u16()?;
            queue.next_avail = fields.u16()?;
            queue.next_used = fields.u16()?;
            queue.ready = fields.flag()?;
            queue.desc_table = fields.u64()?;
            queue.avail_ring = fields.u64()?;
            queue.used_ring = fields.u64()?;
        }
        let shown = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
        new.config = fields.bytes(shown)?.to_vec();
        if !fields.0.is_empty() {
            return Err(invalid("it is too long"));
        }
        if interrupt & !(INTERRUPT_USED | INTERRUPT_CONFIG) != 0 {
            return Err(invalid("it has interrupts that there are not"));
        }
        new.check().map_err(invalid)?;
        if new.config != config {
            new.publish_config(config);
            // § 2.1.2: not before the driver listens.
            if new.status & status::DRIVER_OK != 0 {
                interrupt |= INTERRUPT_CONFIG;
            }
        }
        *self = new;
        Ok(interrupt)
    }

    /// Whether a driver can have led a device that offers this to registers like these.
    fn check(&self) -> Result<(), &'static str> {
        if self.status & !0xff != 0 {
            return Err("it has status bits that there are not");
        }
        let skipped = |&(bit, needs)| self.status & bit != 0 && self.status & needs != needs;
        if ORDER.iter().any(skipped) {
            return Err("its status bits were set out of order");
        }
        let negotiated = self.status & status::FEATURES_OK != 0;
        // The driver relies on what it agreed on, and on nothing else of what was offered. Before
        // that it may have written anything.
        if negotiated && self.driver_features & !self.device_features != 0 {
            return Err("its driver uses features that the device does not have here");
        }
        if negotiated && self.driver_features & features::VERSION_1 == 0 {
            return Err("its driver agreed on a legacy device");
        }
        // A broken queue makes the device ask for a reset when it is started.
        let started = self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK;
        for queue in &self.queues {
            if queue.size > queue.max_size {
                return Err("a queue is larger than it can be");
            }
            if queue.ready && !negotiated {
                return Err("a queue was made ready before features were agreed on");
            }
            if queue.next_avail != queue.next_used {
                return Err("a queue has requests in flight");
            }
            if queue.ready && started && !is_sound(queue) {
                return Err("a queue was started that cannot work");
            }
        }
        Ok(())
    }
}

/// Whether size and alignment are such that a queue can be started.
fn is_sound(queue: &QueueState) -> bool {
    let rings = [queue.desc_table, queue.avail_ring, queue.used_ring];
    queue.size.is_power_of_two()
        && rings.iter().zip(ALIGNMENT).all(|(ring, alignment)| ring.is_multiple_of(alignment))
}

#[cfg(test)]
mod tests;
