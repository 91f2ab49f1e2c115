//! A split virtqueue (virtio 1.3 § 2.7), seen from the driver. Interrupts stay suppressed unless
//! asked for; the used ring is polled.

use super::mmio::Transport;
use crate::machine::{fence, read, write};

/// The driver's side of one queue.
#[derive(Clone, Copy)]
pub struct Queue {
    /// Its number on the device.
    pub index: u16,
    /// Entries, a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Whether VIRTIO_F_EVENT_IDX was agreed on.
    pub events: bool,
    /// Notifications sent.
    pub kicks: u64,
    interrupts: bool,
    next_available: u16,
    published: u16,
    next_used: u16,
}

impl Queue {
    /// The largest queue for which there is space.
    pub const SIZE_LIMIT: u16 = 256;
    /// Memory of one queue: descriptor table, available ring and used ring on pages of their own.
    pub const BYTES: u64 = 3 * 4096;

    /// A queue in zeroed memory.
    pub fn new(index: u16, size: u16, memory: u64, events: bool) -> Self {
        let mut queue = Queue {
            index,
            size,
            descriptors: memory,
            available: memory + 4096,
            used: memory + 8192,
            events,
            ..Queue::absent()
        };
        queue.want_interrupts(false);
        queue
    }

    /// A queue of no entries.
    pub fn absent() -> Self {
        Queue {
            index: 0,
            size: 0,
            descriptors: 0,
            available: 0,
            used: 0,
            events: false,
            kicks: 0,
            interrupts: false,
            next_available: 0,
            published: 0,
            next_used: 0,
        }
    }

    /// Asks for an interrupt at the next completion, or for none.
    pub fn want_interrupts(&mut self, wanted: bool) {
        self.interrupts = wanted;
        if self.events {
            self.arm();
        } else {
            write(self.available, u16::from(!wanted));
        }
    }

    /// Sets used_event: at the next completion, or as far away as it goes.
    #[inline]
    fn arm(&self) {
        let distance = if self.interrupts { 0 } else { 0x8000 };
        let at = self.available + 4 + 2 * u64::from(self.size);
        write(at, self.next_used.wrapping_add(distance));
    }

    /// Fills in a descriptor.
    #[inline]
    pub fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        describe_at(self.descriptors, index, address, length, flags, next);
    }

    /// Puts a chain into the available ring, which the device does not see before `publish`.
    #[inline]
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        write(self.available + 4 + 2 * slot, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Moves the available index without having offered anything.
    pub fn jump(&mut self, distance: u16) {
        self.next_available = self.next_available.wrapping_add(distance);
    }

    /// Shows the device what was offered, and notifies it if it wants to be.
    #[inline]
    pub fn publish(&mut self, device: &Transport) {
        let (old, new) = (self.published, self.next_available);
        if old == new {
            return;
        }
        if self.events {
            self.arm();
        }
        core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::Release);
        write(self.available + 2, new);
        self.published = new;
        fence();
        let wanted = if self.events {
            let event: u16 = read(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            read::<u16>(self.used) & 1 == 0
        };
        if wanted {
            self.kicks += 1;
            device.notify(self.index);
        }
    }

    /// The next completion: head of the chain and bytes written.
    #[inline]
    pub fn poll(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        self.next_used = self.next_used.wrapping_add(1);
        Some((read::<u32>(at) as u16, read(at + 4)))
    }

    /// Waits for the next completion, at most `patience` ticks.
    pub fn wait(&mut self, patience: u64) -> Option<(u16, u32)> {
        let start = crate::machine::ticks();
        loop {
            if let Some(done) = self.poll() {
                return Some(done);
            }
            if crate::machine::ticks() - start > patience {
                return None;
            }
            core::hint::spin_loop();
        }
    }

    /// The device's index into the used ring.
    #[inline]
    pub fn used_index(&self) -> u16 {
        read(self.used + 2)
    }
}

/// Fills in the descriptor with number `index` of the table at `table`.
#[inline]
pub fn describe_at(table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
    let at = table + 16 * u64::from(index);
    write(at, address);
    write(at + 8, u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48);
}
