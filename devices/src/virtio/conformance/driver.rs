//! The driver's side of a [`Harness`]: registers, rings and buffers.

use vm_memory::{Bytes, GuestAddress};

use super::{AVAIL, Buffer, FIRST_BUFFER, Harness, NEXT, RAM, RING_STRIDE, RINGS, USED, WRITE};
use crate::virtio::device::Device;
use crate::virtio::features;
use crate::virtio::mmio::{reg, status};

/// The driver's view of one queue.
#[derive(Debug, Default, Clone)]
pub(super) struct Ring {
    size: u16,
    base: u64,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    avail: u16,
    /// Where `avail` stood when the device's wish for notifications was last looked at.
    notified: u16,
    used: u16,
}

impl Ring {
    pub(super) fn new(index: u16, size: u16) -> Ring {
        Ring {
            size,
            base: RINGS + u64::from(index) * RING_STRIDE,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            notified: 0,
            used: 0,
        }
    }
}

impl<D: Device> Harness<D> {
    /// Reads a 4-byte register.
    pub fn read_register(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a 4-byte register and does what follows from it.
    pub fn write_register(&mut self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    /// Negotiates `wanted` up to FEATURES_OK. Returns whether the device accepted.
    pub fn negotiate(&mut self, wanted: u64) -> bool {
        self.write_register(reg::STATUS, status::ACKNOWLEDGE);
        self.write_register(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2 {
            self.write_register(reg::DRIVER_FEATURES_SEL, half);
            self.write_register(reg::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write_register(reg::STATUS, ok);
        self.read_register(reg::STATUS) & status::FEATURES_OK != 0
    }

    /// Feature bits that are offered.
    pub fn offered(&mut self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.write_register(reg::DEVICE_FEATURES_SEL, half);
            all | u64::from(self.read_register(reg::DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// Initialises the device with everything that it offers.
    pub fn activate(&mut self) {
        let offered = self.offered();
        self.activate_with(offered);
    }

    /// Initialises the device with these feature bits and all of its queues.
    pub fn activate_with(&mut self, wanted: u64) {
        assert!(self.negotiate(wanted), "features {wanted:#x} were refused");
        for index in 0..self.rings.len() as u16 {
            self.set_up_queue(index, None);
        }
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write_register(reg::STATUS, ok);
        self.run();
    }

    /// Gives queue `index` rings of `size` descriptors (its maximum if `None`), emptied.
    pub fn set_up_queue(&mut self, index: u16, size: Option<u16>) {
        self.write_register(reg::QUEUE_SEL, u32::from(index));
        let max = self.read_register(reg::QUEUE_SIZE_MAX) as u16;
        let ring = Ring::new(index, size.unwrap_or(max));
        let base = ring.base;
        let zeros = vec![0; RING_STRIDE as usize];
        self.memory.guest().write_slice(&zeros, GuestAddress(base)).unwrap();
        self.write_register(reg::QUEUE_SIZE, u32::from(ring.size));
        let areas = [
            (reg::QUEUE_DESC_LOW, base),
            (reg::QUEUE_DRIVER_LOW, base + AVAIL),
            (reg::QUEUE_DEVICE_LOW, base + USED),
        ];
        for (low, gpa) in areas {
            self.write_register(low, gpa as u32);
            self.write_register(low + 4, (gpa >> 32) as u32);
        }
        self.write_register(reg::QUEUE_READY, 1);
        self.rings[usize::from(index)] = ring;
    }

    /// Resets the device as a driver does.
    pub fn reset(&mut self) {
        self.write_register(reg::STATUS, 0);
        assert_eq!(self.read_register(reg::STATUS), 0, "reset did not complete");
    }

    /// Writes to guest memory.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, gpa: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn buffer(&mut self, len: u32) -> u64 {
        let step = u64::from(len).next_multiple_of(16);
        if self.next_buffer + step > RAM {
            self.next_buffer = FIRST_BUFFER;
        }
        let gpa = self.next_buffer;
        self.next_buffer += step;
        gpa
    }

    /// A buffer of `len` zero bytes for the device to write to: address and length.
    pub fn writable(&mut self, len: u32) -> (u64, u32) {
        let gpa = self.buffer(len);
        self.write(gpa, &vec![0; len as usize]);
        (gpa, len)
    }

    /// A buffer with `bytes` for the device to read: address and length.
    pub fn readable(&mut self, bytes: &[u8]) -> (u64, u32) {
        let gpa = self.buffer(bytes.len() as u32);
        self.write(gpa, bytes);
        (gpa, bytes.len() as u32)
    }

    /// Writes descriptor `index` of queue `queue` as it is.
    pub fn descriptor(
        &mut self,
        queue: u16,
        index: u16,
        gpa: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.rings[usize::from(queue)].base + 16 * u64::from(index);
        self.write(at, &descriptor_bytes(gpa, len, flags, next));
    }

    /// Makes `head` available in queue `queue`, whatever it is.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = ring.base + AVAIL + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        let (index_at, index) = (ring.base + AVAIL + 2, ring.avail);
        self.write(slot, &head.to_le_bytes());
        self.write(index_at, &index.to_le_bytes());
    }

    /// Sets the available index of queue `queue`, wherever it stood.
    pub fn set_available_index(&mut self, queue: u16, index: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        ring.avail = index;
        let at = ring.base + AVAIL + 2;
        self.write(at, &index.to_le_bytes());
    }

    /// Sets the flags that ask for no interrupts (without EVENT_IDX).
    pub fn set_available_flags(&mut self, queue: u16, flags: u16) {
        let at = self.rings[usize::from(queue)].base + AVAIL;
        self.write(at, &flags.to_le_bytes());
    }

    /// Asks for an interrupt when the used entry with this index is published (with EVENT_IDX);
    /// [`Harness::used`] asks for the next one.
    pub fn set_used_event(&mut self, queue: u16, index: u16) {
        let ring = &self.rings[usize::from(queue)];
        let at = ring.base + AVAIL + 4 + 2 * u64::from(ring.size);
        self.write(at, &index.to_le_bytes());
    }

    /// Makes a chain of `buffers` available in queue `queue` without a notification. Returns its
    /// head.
    ///
    /// # Panics
    /// The queue has no descriptors left.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let at = ring.free.len().checked_sub(buffers.len()).expect("no descriptors left");
        let chain: Vec<u16> = ring.free.split_off(at);
        for (i, &(gpa, len, write)) in buffers.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = if write { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            self.descriptor(queue, chain[i], gpa, len, flags, next.unwrap_or(0));
        }
        let head = chain[0];
        self.rings[usize::from(queue)].chains[usize::from(head)] = chain;
        self.make_available(queue, head);
        head
    }

    /// Notifies queue `queue` of what was made available since the last call, if the device wants
    /// that (virtio 1.3 § 2.7.10). Returns whether it did.
    pub fn notify(&mut self, queue: u16) -> bool {
        let ring = &mut self.rings[usize::from(queue)];
        let (old, new) = (std::mem::replace(&mut ring.notified, ring.avail), ring.avail);
        let used = ring.base + USED;
        let event_at = used + 4 + 8 * u64::from(ring.size);
        let word = |at| u16::from_le_bytes(self.read(at, 2).try_into().unwrap());
        let wanted = if self.registers.negotiated() & features::EVENT_IDX != 0 {
            new.wrapping_sub(word(event_at)).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            word(used) & 1 == 0
        };
        if wanted {
            self.kick(queue);
        }
        wanted
    }

    /// Notifies queue `queue`, whether the device wants it or not; [`Harness::run`] delivers it.
    pub fn kick(&mut self, queue: u16) {
        self.write_register(reg::QUEUE_NOTIFY, u32::from(queue));
    }

    /// Number of descriptors of queue `queue` that the driver may use.
    pub fn free_descriptors(&self, queue: u16) -> usize {
        self.rings[usize::from(queue)].free.len()
    }

    /// Index of the used ring of queue `queue` as the device published it.
    pub fn used_index(&self, queue: u16) -> u16 {
        let at = self.rings[usize::from(queue)].base + USED + 2;
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    /// Takes the next used entry of queue `queue`: head and bytes written.
    ///
    /// # Panics
    /// The device used something that was not available.
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let published = self.used_index(queue);
        let ring = &self.rings[usize::from(queue)];
        if ring.used == published {
            return None;
        }
        let at = ring.base + USED + 4 + 8 * u64::from(ring.used % ring.size);
        let entry = u64::from_le_bytes(self.read(at, 8).try_into().unwrap());
        let (head, written) = (entry as u32 as u16, (entry >> 32) as u32);
        let ring = &mut self.rings[usize::from(queue)];
        ring.used = ring.used.wrapping_add(1);
        let next = ring.used;
        let chain = std::mem::take(&mut ring.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} was used but is not available");
        ring.free.extend(chain);
        self.set_used_event(queue, next);
        Some((head, written))
    }

    /// Makes a chain available, notifies if that is wanted, runs the device, and returns the bytes that it says it
    /// wrote, or `None` if it did not use the chain.
    pub fn request(&mut self, queue: u16, buffers: &[Buffer]) -> Option<u32> {
        let head = self.offer(queue, buffers);
        self.notify(queue);
        self.run();
        let (used, written) = self.used(queue)?;
        assert_eq!(used, head, "another chain was used");
        Some(written)
    }

    /// How often the interrupt line fired since the last call.
    pub fn interrupts(&mut self) -> u64 {
        self.interrupt.acknowledge(u32::MAX);
        self.irq.read().unwrap_or(0)
    }
}

/// The 16 bytes of a descriptor.
pub fn descriptor_bytes(gpa: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let word =
        u128::from(gpa) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    word.to_le_bytes()
}
