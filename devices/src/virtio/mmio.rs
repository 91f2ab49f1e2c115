//! Registers of the virtio MMIO transport, version 2 (virtio 1.3 § 4.2.2), as a plain value.
//!
//! A register access goes in; what the machine has to do comes out as an [`Effect`]. Interrupt
//! status and acknowledge are not here: they are atomic (see
//! [`Interrupt`](super::queue::Interrupt)), so that the two exits that each interrupt costs take no
//! lock. The configuration space is bytes with a generation: the device publishes it, the driver
//! reads it from here.

mod saved;

use super::features;
use super::queue::QueueState;

/// Register offsets (virtio 1.3 § 4.2.2).
pub mod reg {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_LEN_HIGH: u64 = 0xb4;
    pub const SHM_BASE_LOW: u64 = 0xb8;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (virtio 1.3 § 2.1).
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Status bits, and those that have to be set before each (§ 3.1.1).
const ORDER: [(u32, u32); 3] = [
    (status::DRIVER, status::ACKNOWLEDGE),
    (status::FEATURES_OK, status::ACKNOWLEDGE | status::DRIVER),
    (status::DRIVER_OK, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK),
];

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "HULL": any value identifies the vendor (§ 4.2.2.1).
const VENDOR: u32 = u32::from_le_bytes(*b"HULL");

/// What the machine has to do after a register write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready: start the queues that are [`Registers::ready_queues`].
    Activate,
    /// The driver reset the device: stop its queues, then call [`Registers::finish_reset`]. The
    /// writing vCPU waits until then (§ 4.2.3.1.1: status reads 0 when the reset is complete).
    Reset,
    /// The driver notified a queue, and no ioeventfd took it.
    Notify(u16),
    /// The driver wrote the configuration space.
    Config {
        /// Offset in the configuration space in bytes.
        offset: u64,
        /// The bytes, 1 to 8.
        data: Vec<u8>,
    },
    /// The driver did what § 4.2.2.2 forbids; the write had no effect.
    Ignored(&'static str),
}

/// The register file of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    device_id: u32,
    device_features: u64,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<QueueState>,
    status: u32,
    config: Vec<u8>,
    generation: u32,
}

impl Registers {
    /// Registers after power-on. `device_features` are the device's own bits, `queue_sizes` the
    /// maximum size of each queue in descriptors.
    pub fn new(
        device_id: u32,
        device_features: u64,
        queue_sizes: &[u16],
        config: Vec<u8>,
    ) -> Registers {
        Registers {
            device_id,
            device_features: device_features | features::TRANSPORT,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: queue_sizes.iter().map(|&max| Self::fresh_queue(max)).collect(),
            status: 0,
            config,
            generation: 0,
        }
    }

    fn fresh_queue(max_size: u16) -> QueueState {
        QueueState { max_size, size: max_size, ..QueueState::default() }
    }

    /// Device status bits.
    pub fn status(&self) -> u32 {
        self.status
    }

    /// True if the device needs a reset before it can be used again.
    pub fn is_broken(&self) -> bool {
        self.status & status::NEEDS_RESET != 0
    }

    /// Feature bits that driver and device agreed on.
    pub fn negotiated(&self) -> u64 {
        self.driver_features
    }

    /// Index and configuration of each queue that the driver made ready.
    pub fn ready_queues(&self) -> impl Iterator<Item = (u16, QueueState)> + '_ {
        let event_idx_enabled = self.driver_features & features::EVENT_IDX != 0;
        (0u16..)
            .zip(&self.queues)
            .filter(|(_, queue)| queue.ready)
            .map(move |(index, queue)| (index, QueueState { event_idx_enabled, ..*queue }))
    }

    /// Remembers how far a stopped queue had come.
    pub fn set_progress(&mut self, index: u16, state: QueueState) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.next_avail = state.next_avail;
            queue.next_used = state.next_used;
        }
    }

    /// Puts everything but the configuration space back to power-on (§ 2.4).
    pub fn finish_reset(&mut self) {
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.status = 0;
        for queue in &mut self.queues {
            *queue = Self::fresh_queue(queue.max_size);
        }
    }

    /// Sets DEVICE_NEEDS_RESET. Returns true if the driver is to be told by a configuration
    /// interrupt (§ 2.1.2: only once DRIVER_OK is set).
    #[must_use]
    pub fn needs_reset(&mut self) -> bool {
        self.status |= status::NEEDS_RESET;
        self.status & status::DRIVER_OK != 0
    }

    /// The device changed its configuration space. The driver is to be told by a configuration
    /// interrupt.
    pub fn publish_config(&mut self, config: Vec<u8>) {
        self.config = config;
        self.generation = self.generation.wrapping_add(1);
    }

    /// Reads a register. Registers take aligned accesses of 4 bytes (§ 4.2.2.2), other ones read
    /// as 0; the configuration space takes any.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = at.checked_add(i).and_then(|i| self.config.get(i)).copied().unwrap_or(0);
            }
        } else if let (4, true) = (data.len(), offset.is_multiple_of(4)) {
            data.copy_from_slice(&self.register(offset).to_le_bytes());
        }
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_sel as usize);
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::DEVICE_ID => self.device_id,
            reg::VENDOR_ID => VENDOR,
            reg::DEVICE_FEATURES => half(self.device_features, self.device_features_sel),
            reg::QUEUE_SIZE_MAX => queue.map_or(0, |q| u32::from(q.max_size)),
            reg::QUEUE_READY => queue.map_or(0, |q| u32::from(q.ready)),
            reg::STATUS => self.status,
            reg::CONFIG_GENERATION => self.generation,
            // § 4.2.2: a region that does not exist has length and base of all ones.
            reg::SHM_LEN_LOW | reg::SHM_LEN_HIGH | reg::SHM_BASE_LOW | reg::SHM_BASE_HIGH => {
                u32::MAX
            }
            _ => 0,
        }
    }

    /// Writes a register.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            return if self.status & status::DRIVER == 0 {
                Effect::Ignored("configuration written before the driver announced itself")
            } else {
                Effect::Config { offset: at, data: data.to_vec() }
            };
        }
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset.is_multiple_of(4) => {
                self.write_register(offset, u32::from_le_bytes(bytes))
            }
            _ => Effect::Ignored("register access is not 4 aligned bytes"),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) -> Effect {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES => return self.write_features(value),
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_NOTIFY => {
                return match u16::try_from(value) {
                    Ok(index) if usize::from(index) < self.queues.len() => Effect::Notify(index),
                    _ => Effect::Ignored("notification of a queue that does not exist"),
                };
            }
            reg::STATUS => return self.write_status(value),
            reg::QUEUE_SIZE
            | reg::QUEUE_READY
            | reg::QUEUE_DESC_LOW
            | reg::QUEUE_DESC_HIGH
            | reg::QUEUE_DRIVER_LOW
            | reg::QUEUE_DRIVER_HIGH
            | reg::QUEUE_DEVICE_LOW
            | reg::QUEUE_DEVICE_HIGH => return self.write_queue(offset, value),
            _ => return Effect::Ignored("write to a register that cannot be written"),
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) -> Effect {
        if self.status & status::DRIVER == 0 || self.status & status::FEATURES_OK != 0 {
            return Effect::Ignored("features written outside negotiation");
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => return Effect::Ignored("feature selector above 1"),
        }
        Effect::None
    }

    fn write_queue(&mut self, offset: u64, value: u32) -> Effect {
        // A running queue keeps what it was checked with; only a reset makes it configurable again.
        let configurable = self.status & status::FEATURES_OK != 0
            && self.status & (status::DRIVER_OK | status::NEEDS_RESET) == 0;
        if !configurable {
            return Effect::Ignored("queue configured before FEATURES_OK or after DRIVER_OK");
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return Effect::Ignored("configuration of a queue that does not exist");
        };
        if offset == reg::QUEUE_READY {
            queue.ready = value & 1 != 0;
            return Effect::None;
        }
        if queue.ready {
            return Effect::Ignored("configuration of a queue that is ready");
        }
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            // A size above the maximum is stored as 0, which no queue can start with.
            reg::QUEUE_SIZE => {
                let size = u16::try_from(value).ok().filter(|&size| size <= queue.max_size);
                queue.size = size.unwrap_or(0);
            }
            reg::QUEUE_DESC_LOW => queue.desc_table = low(queue.desc_table),
            reg::QUEUE_DESC_HIGH => queue.desc_table = high(queue.desc_table),
            reg::QUEUE_DRIVER_LOW => queue.avail_ring = low(queue.avail_ring),
            reg::QUEUE_DRIVER_HIGH => queue.avail_ring = high(queue.avail_ring),
            reg::QUEUE_DEVICE_LOW => queue.used_ring = low(queue.used_ring),
            _ => queue.used_ring = high(queue.used_ring),
        }
        Effect::None
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // § 2.1.1: the driver must not clear bits, NEEDS_RESET is the device's.
        let new = (value & 0xff & !status::NEEDS_RESET) | (self.status & status::NEEDS_RESET);
        if new & self.status != self.status {
            return Effect::Ignored("status bits cleared without a reset");
        }
        let set = new & !self.status;
        for (bit, needs) in ORDER {
            if set & bit != 0 && new & needs != needs {
                return Effect::Ignored("status bits set out of order");
            }
        }
        let mut accepted = new;
        if set & status::FEATURES_OK != 0 {
            let known = self.driver_features & !self.device_features == 0;
            if !known || self.driver_features & features::VERSION_1 == 0 {
                // § 2.2.2: FEATURES_OK stays clear when the subset is not acceptable.
                accepted &= !(status::FEATURES_OK | status::DRIVER_OK);
            }
        }
        let activate =
            accepted & !self.status & status::DRIVER_OK != 0 && accepted & status::NEEDS_RESET == 0;
        self.status = accepted;
        if activate { Effect::Activate } else { Effect::None }
    }
}

fn half(value: u64, selector: u32) -> u32 {
    match selector {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
