//! The virtio-mmio transport, version 2: register names and offsets of virtio 1.3 § 4.2.2.

use super::F_VERSION_1;
use super::queue::Queue;
use crate::boot::{Boot, number};
use crate::machine::{read, ticks, write};

/// Register offsets.
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
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
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}
use register::*;

/// Device status bits (§ 2.1).
pub const ACKNOWLEDGE: u32 = 1;
/// See `ACKNOWLEDGE`.
pub const DRIVER: u32 = 2;
/// See `ACKNOWLEDGE`.
pub const DRIVER_OK: u32 = 4;
/// See `ACKNOWLEDGE`.
pub const FEATURES_OK: u32 = 8;
/// See `ACKNOWLEDGE`.
pub const NEEDS_RESET: u32 = 0x40;

const MAGIC_VALUE: u32 = 0x7472_6976;
/// How long a device may take to reset, in ticks: seconds, on anything.
const RESET_PATIENCE: u64 = 1 << 34;

/// One virtio-mmio device.
#[derive(Clone, Copy)]
pub struct Transport {
    /// Address of its registers.
    pub base: u64,
    /// Its interrupt line.
    pub line: u32,
}

impl Transport {
    /// The devices that the command line names, `virtio_mmio.device=SIZE@ADDRESS:IRQ`.
    pub fn all(boot: &Boot) -> impl Iterator<Item = Transport> {
        boot.command_line
            .split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("virtio_mmio.device="))
            .filter_map(|place| {
                let (_, place) = place.split_once('@')?;
                let mut parts = place.split(':');
                let base = number(parts.next()?)?;
                let line = number(parts.next()?)? as u32;
                Some(Transport { base, line })
            })
            .filter(|device| {
                device.get(MAGIC) == MAGIC_VALUE
                    && device.get(VERSION) == 2
                    && device.get(DEVICE_ID) != 0
            })
    }

    /// Reads a register.
    #[inline]
    pub fn get(&self, register: u64) -> u32 {
        read(self.base + register)
    }

    /// Writes a register.
    #[inline]
    pub fn set(&self, register: u64, value: u32) {
        write(self.base + register, value);
    }

    fn set_wide(&self, register: u64, value: u64) {
        self.set(register, value as u32);
        self.set(register + 4, (value >> 32) as u32);
    }

    /// The device id.
    pub fn kind(&self) -> u32 {
        self.get(DEVICE_ID)
    }

    /// The device status.
    pub fn status(&self) -> u32 {
        self.get(STATUS)
    }

    /// Resets the device and waits until it has done so.
    pub fn reset(&self) -> bool {
        self.set(STATUS, 0);
        let start = ticks();
        while self.status() != 0 {
            if ticks() - start > RESET_PATIENCE {
                return false;
            }
        }
        true
    }

    /// The features that the device offers.
    pub fn features(&self) -> u64 {
        self.set(DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.get(DEVICE_FEATURES));
        self.set(DEVICE_FEATURES_SEL, 0);
        high << 32 | u64::from(self.get(DEVICE_FEATURES))
    }

    /// Chooses features, whatever the device offers, without asking whether it agrees.
    pub fn choose_features(&self, features: u64) {
        self.set(DRIVER_FEATURES_SEL, 0);
        self.set(DRIVER_FEATURES, features as u32);
        self.set(DRIVER_FEATURES_SEL, 1);
        self.set(DRIVER_FEATURES, (features >> 32) as u32);
    }

    /// The first half of § 3.1.1: from reset to FEATURES_OK. Returns what was agreed on, `None` if
    /// the device does not reset, is older than virtio 1.0 or refuses.
    pub fn negotiate(&self, wanted: u64) -> Option<u64> {
        if !self.reset() {
            return None;
        }
        self.set(STATUS, ACKNOWLEDGE);
        self.set(STATUS, ACKNOWLEDGE | DRIVER);
        let features = self.features() & wanted;
        self.choose_features(features);
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        (self.status() & FEATURES_OK != 0 && features & F_VERSION_1 != 0).then_some(features)
    }

    /// Tells the device that the driver is ready.
    pub fn driver_ok(&self) {
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Sets up a queue of at most `size` entries with its rings in `memory`, `Queue::BYTES` long
    /// and zeroed. `None` if the device has no such queue or does not enable it.
    pub fn set_up_queue(&self, index: u16, size: u16, memory: u64, events: bool) -> Option<Queue> {
        self.set(QUEUE_SEL, u32::from(index));
        let limit = self.get(QUEUE_SIZE_MAX).min(u32::from(Queue::SIZE_LIMIT));
        if limit == 0 || self.get(QUEUE_READY) != 0 {
            return None;
        }
        let queue = Queue::new(index, size.min(limit as u16), memory, events);
        self.describe_queue(&queue);
        self.set(QUEUE_READY, 1);
        (self.get(QUEUE_READY) == 1).then_some(queue)
    }

    /// Writes size and addresses of a queue, without enabling it.
    pub fn describe_queue(&self, queue: &Queue) {
        self.set(QUEUE_SEL, u32::from(queue.index));
        self.set(QUEUE_SIZE, u32::from(queue.size));
        self.set_wide(QUEUE_DESC, queue.descriptors);
        self.set_wide(QUEUE_DRIVER, queue.available);
        self.set_wide(QUEUE_DEVICE, queue.used);
    }

    /// Notifies a queue.
    #[inline]
    pub fn notify(&self, index: u16) {
        self.set(QUEUE_NOTIFY, u32::from(index));
    }

    /// Reads and acknowledges the interrupt status.
    pub fn acknowledge_interrupt(&self) -> u32 {
        let status = self.get(INTERRUPT_STATUS);
        self.set(INTERRUPT_ACK, status);
        status
    }

    /// Reads from configuration space.
    pub fn config<T: Copy>(&self, offset: u64) -> T {
        read(self.base + CONFIG + offset)
    }

    /// Reads eight bytes from configuration space, in the two accesses that § 4.2.2.2 allows.
    pub fn config_wide(&self, offset: u64) -> u64 {
        u64::from(self.config::<u32>(offset)) | u64::from(self.config::<u32>(offset + 4)) << 32
    }
}
