//! The split virtqueue (virtio 1.3 § 2.7) as a worker uses it.
//!
//! A queue is made once its configuration is final (the driver set DRIVER_OK) and keeps that
//! configuration until it is stopped; the transport refuses changes in between. The addresses of
//! the rings are therefore translated and checked once. What lies *in* the rings is the guest's and
//! is checked at each use: a chain that is not well-formed is a [`QueueError`], after which the
//! device asks for a reset.
//!
//! Suppression of notifications follows § 2.7.7 and § 2.7.10: by index with EVENT_IDX, by flag
//! without.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::iobuf::IoBuf;
use crate::memory::Memory;

/// Configuration and progress of a queue: all that is needed to start it, or to start it again.
pub use virtio_queue::QueueState;

/// Largest queue that any Hull device offers, in descriptors.
pub const MAX_SIZE: u16 = 256;

const DESC_LEN: u64 = 16;
const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Interrupt status bit: a used buffer notification (virtio 1.3 § 4.2.2).
pub const INTERRUPT_USED: u32 = 1;
/// Interrupt status bit: the configuration changed.
pub const INTERRUPT_CONFIG: u32 = 2;

/// How a guest broke the rules of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The driver configured a queue that cannot work.
    #[error("queue configuration: {0}")]
    Config(&'static str),
    /// The available index is further ahead than the ring is long.
    #[error("available index {avail} is more than the queue size ahead of {next}")]
    AvailJump {
        /// Index found in the ring.
        avail: u16,
        /// Index of the next entry to be taken.
        next: u16,
    },
    /// A descriptor index lies outside its table.
    #[error("descriptor index {index} is outside a table of {size}")]
    Index {
        /// The index found.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain is longer than the queue: it loops, or the driver broke § 2.7.5.3.1.
    #[error("descriptor chain at {head} is longer than the queue")]
    TooLong {
        /// Head of the chain.
        head: u16,
    },
    /// A buffer is empty or not in RAM.
    #[error("buffer of {len} bytes at {gpa:#x} is empty or not in RAM")]
    Buffer {
        /// Guest-physical address of the buffer.
        gpa: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable buffer follows a device-writable one (§ 2.7.4.2).
    #[error("a readable buffer follows a writable one in the chain at {head}")]
    Order {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect table is empty, oversized, nested, or its length is not a multiple of 16.
    #[error("indirect table of {len} bytes in the chain at {head} is not valid")]
    Indirect {
        /// Head of the chain.
        head: u16,
        /// Length of the table in bytes.
        len: u32,
    },
    /// The same head was made available twice without being used in between.
    #[error("descriptor {head} is already in use by the device")]
    InFlight {
        /// The head.
        head: u16,
    },
}

/// The interrupt of one device: a status that the driver reads, and an edge.
///
/// One line serves all queues of a device. The status bit is set before the edge fires, so that a
/// driver that comes at once finds it.
#[derive(Clone, Debug)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    irq: Arc<EventFd>,
}

impl Interrupt {
    /// An interrupt that fires `irq` (an irqfd's event).
    pub fn new(irq: EventFd) -> Interrupt {
        Interrupt { status: Arc::new(AtomicU32::new(0)), irq: Arc::new(irq) }
    }

    /// Sets `bits` in the status and fires.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // An eventfd write fails only when its counter is full, and then it is signalled already.
        let _ = self.irq.write(1);
    }

    /// Fires again if the driver has not acknowledged everything: an edge that came while the
    /// machine was paused or saved may be lost.
    pub fn refresh(&self) {
        if self.status() != 0 {
            let _ = self.irq.write(1);
        }
    }

    /// Has these bits pending, and does not fire.
    pub fn restore(&self, bits: u32) {
        self.status.store(bits, Ordering::SeqCst);
    }

    /// Pending status bits.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// The driver acknowledges `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }
}

/// The buffers of one request: what the device reads, then what it writes.
#[derive(Debug, Default)]
pub struct Chain {
    /// Device-readable part.
    pub readable: IoBuf,
    /// Device-writable part.
    pub writable: IoBuf,
}

/// A started queue.
#[derive(Debug)]
pub struct Queue {
    memory: Memory,
    interrupt: Interrupt,
    state: QueueState,
    size: u16,
    event_idx: bool,
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    /// Value of `next_used` when an interrupt was last considered.
    considered_used: Wrapping<u16>,
    /// Heads taken and not yet completed.
    busy: [u64; MAX_SIZE as usize / 64],
    in_flight: u16,
}

// SAFETY: the ring pointers refer to guest RAM kept mapped by `memory`; they are used only through
// `&mut self` or atomics.
unsafe impl Send for Queue {}

/// A descriptor as it lies in memory: two loads, where an array of bytes would be sixteen volatile
/// ones. Packed, since an indirect table may have any alignment (§ 2.7.5.3).
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Words(u64, u64);

#[derive(Clone, Copy)]
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Queue {
    /// Starts a queue as `state` says: from new if its indices are 0, else where it left off.
    ///
    /// # Errors
    /// [`QueueError::Config`] if size, alignment or place of a ring is not valid.
    pub fn new(
        memory: &Memory,
        interrupt: &Interrupt,
        state: QueueState,
    ) -> Result<Queue, QueueError> {
        use virtio_queue::Error as Invalid;
        if state.max_size > MAX_SIZE {
            return Err(QueueError::Config("maximum size is above what devices offer"));
        }
        let checked = virtio_queue::Queue::try_from(state).map_err(|err| {
            QueueError::Config(match err {
                Invalid::InvalidDescTableAlign => "descriptor table is not 16-byte aligned",
                Invalid::InvalidAvailRingAlign => "available ring is not 2-byte aligned",
                Invalid::InvalidUsedRingAlign => "used ring is not 4-byte aligned",
                _ => "size is not a power of two between 1 and the maximum",
            })
        })?;
        if !checked.ready() {
            return Err(QueueError::Config("queue is not ready"));
        }
        let size = u64::from(state.size);
        let area = |gpa: u64, len: u64| {
            memory.host_range(gpa, len).ok_or(QueueError::Config("a ring is not in RAM"))
        };
        // § 2.7: lengths of the three areas, with the EVENT_IDX words.
        let desc = area(state.desc_table, DESC_LEN * size)?;
        let avail = area(state.avail_ring, 6 + 2 * size)?;
        let used = area(state.used_ring, 6 + 8 * size)?;
        Ok(Queue {
            memory: memory.clone(),
            interrupt: interrupt.clone(),
            state,
            size: state.size,
            event_idx: state.event_idx_enabled,
            desc,
            avail,
            used,
            next_avail: Wrapping(state.next_avail),
            next_used: Wrapping(state.next_used),
            considered_used: Wrapping(state.next_used),
            busy: [0; MAX_SIZE as usize / 64],
            in_flight: 0,
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Requests taken and not completed. 0 means that nothing of the guest's is held.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Where the queue stands. Meaningful for a restart only while nothing is in flight.
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.next_avail.0, next_used: self.next_used.0, ..self.state }
    }

    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= 4 + 2 * usize::from(self.size));
        // SAFETY: `avail` has 6 + 2 * size checked bytes, is 2-aligned (page-aligned mapping plus a
        // 2-aligned guest address), every caller's offset is even and at most 4 + 2 * size.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast::<u16>().cast_mut()) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= 4 + 8 * usize::from(self.size));
        // SAFETY: as for `avail_u16`, with 6 + 8 * size bytes, 4-aligned.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast::<u16>()) }
    }

    fn avail_index(&self) -> Result<Wrapping<u16>, QueueError> {
        let avail = Wrapping(u16::from_le(self.avail_u16(2).load(Ordering::Acquire)));
        if (avail - self.next_avail).0 > self.size {
            return Err(QueueError::AvailJump { avail: avail.0, next: self.next_avail.0 });
        }
        Ok(avail)
    }

    /// True if the driver has made something available that is not taken yet.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`].
    pub fn has_available(&self) -> Result<bool, QueueError> {
        Ok(self.avail_index()? != self.next_avail)
    }

    /// Requests that the driver has made available and that are not taken yet.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`].
    pub fn available(&self) -> Result<u16, QueueError> {
        Ok((self.avail_index()? - self.next_avail).0)
    }

    /// Takes the next request: its buffers replace what is in `chain`, its head is returned.
    ///
    /// The head must go back by [`Queue::complete`] (or [`Queue::undo`]).
    ///
    /// # Errors
    /// Any [`QueueError`]: the ring is broken and nothing was taken.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<Option<u16>, QueueError> {
        if self.avail_index()? == self.next_avail {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail.0 & (self.size - 1));
        let head = u16::from_le(self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed));
        if head >= self.size {
            return Err(QueueError::Index { index: head, size: self.size });
        }
        let (word, bit) = (usize::from(head) / 64, 1u64 << (head % 64));
        if self.busy[word] & bit != 0 {
            return Err(QueueError::InFlight { head });
        }
        self.walk(head, chain)?;
        self.busy[word] |= bit;
        self.in_flight += 1;
        self.next_avail += 1;
        Ok(Some(head))
    }

    /// Collects the buffers of the chain that starts at `head`.
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut entries) = (self.desc, self.size);
        let mut index = head;
        let mut indirect = false;
        let mut buffers = 0;
        loop {
            let desc = Self::descriptor(table, entries, index)?;
            if desc.flags & DESC_F_INDIRECT != 0 {
                // § 2.7.5.3: no nesting, no NEXT beside INDIRECT, no more than the queue size.
                let count = desc.len / DESC_LEN as u32;
                let valid = !indirect
                    && desc.flags & DESC_F_NEXT == 0
                    && desc.len.is_multiple_of(DESC_LEN as u32)
                    && (1..=u32::from(self.size)).contains(&count);
                if !valid {
                    return Err(QueueError::Indirect { head, len: desc.len });
                }
                table = self
                    .memory
                    .host_range(desc.gpa, u64::from(desc.len))
                    .ok_or(QueueError::Buffer { gpa: desc.gpa, len: desc.len })?;
                entries = count as u16;
                index = 0;
                indirect = true;
                continue;
            }
            buffers += 1;
            if buffers > self.size {
                return Err(QueueError::TooLong { head });
            }
            let host = self
                .memory
                .host_range(desc.gpa, u64::from(desc.len))
                .ok_or(QueueError::Buffer { gpa: desc.gpa, len: desc.len })?;
            if desc.flags & DESC_F_WRITE != 0 {
                chain.writable.push(host, desc.len);
            } else if chain.writable.is_empty() {
                chain.readable.push(host, desc.len);
            } else {
                return Err(QueueError::Order { head });
            }
            if desc.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            index = desc.next;
        }
    }

    fn descriptor(table: *const u8, entries: u16, index: u16) -> Result<Descriptor, QueueError> {
        if index >= entries {
            return Err(QueueError::Index { index, size: entries });
        }
        // Read once: the guest may change it under us, and what was checked must be what is used.
        // SAFETY: `table` has `entries` descriptors of 16 checked bytes, and index < entries; the
        // type has no alignment.
        let Words(low, high) =
            unsafe { table.cast::<Words>().add(usize::from(index)).read_volatile() };
        let (gpa, rest) = (u64::from_le(low), u64::from_le(high));
        Ok(Descriptor {
            gpa,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        })
    }

    /// Gives the most recently taken requests back, untouched, as if never taken.
    /// `heads` are theirs, in any order.
    pub fn undo(&mut self, heads: &[u16]) {
        for &head in heads {
            self.release(head);
            self.next_avail -= 1;
        }
    }

    fn release(&mut self, head: u16) {
        let (word, bit) = (usize::from(head) / 64, 1u64 << (head % 64));
        debug_assert!(self.busy[word] & bit != 0, "completing a request that was not taken");
        self.busy[word] &= !bit;
        self.in_flight -= 1;
    }

    /// Completes the request `head`: `written` bytes were written to its writable part. The driver
    /// sees it at once; call [`Queue::notify`] after a batch.
    pub fn complete(&mut self, head: u16, written: u32) {
        self.stage(head, written);
        self.publish();
    }

    /// Fills the next used entry without showing it to the driver yet, for a packet that takes
    /// several chains: the driver must see all of them or none (§ 5.1.6.4).
    pub fn stage(&mut self, head: u16, written: u32) {
        self.release(head);
        let slot = usize::from(self.next_used.0 & (self.size - 1));
        let entry = (u64::from(head) | u64::from(written) << 32).to_le();
        // SAFETY: 4 + 8 * slot + 8 <= 6 + 8 * size, which was checked. The ring is 4-aligned only.
        unsafe { self.used.add(4 + 8 * slot).cast::<u64>().write_unaligned(entry) };
        self.next_used += 1;
    }

    /// Shows all staged entries to the driver.
    pub fn publish(&mut self) {
        self.used_u16(2).store(self.next_used.0.to_le(), Ordering::Release);
    }

    /// Interrupts the driver if it wants to know of what was completed since the last call.
    pub fn notify(&mut self) {
        if self.considered_used == self.next_used {
            return;
        }
        // The used index must be visible before the driver's wish is read, or both sides sleep.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let offset = 4 + 2 * usize::from(self.size);
            let event = Wrapping(u16::from_le(self.avail_u16(offset).load(Ordering::Relaxed)));
            // § 2.7.10: has the used index passed `event` since the last time?
            self.next_used - event - Wrapping(1) < self.next_used - self.considered_used
        } else {
            u16::from_le(self.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        };
        self.considered_used = self.next_used;
        if wanted {
            self.interrupt.raise(INTERRUPT_USED);
        }
    }

    /// Asks the driver not to notify while the queue is being worked off.
    pub fn disable_kicks(&mut self) {
        // With EVENT_IDX the driver notifies once per index asked for, so nothing is to be done.
        if !self.event_idx {
            self.used_u16(0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
        }
    }

    /// Asks the driver to notify of the next request. Returns true if one came in the meantime:
    /// it has to be taken now, since it may come without a notification.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`].
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        self.ask_for(self.next_avail);
        self.has_available()
    }

    /// Asks the driver to notify of the next request that it makes available beside those that wait
    /// and are left to wait. Returns how many those are, with any that came in the meantime.
    ///
    /// # Errors
    /// [`QueueError::AvailJump`].
    pub fn enable_kicks_for_more(&mut self) -> Result<u16, QueueError> {
        self.ask_for(self.avail_index()?);
        self.available()
    }

    /// Asks the driver to notify when it fills the available entry with this index.
    fn ask_for(&mut self, index: Wrapping<u16>) {
        if self.event_idx {
            let offset = 4 + 8 * usize::from(self.size);
            self.used_u16(offset).store(index.0.to_le(), Ordering::Relaxed);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
        }
        // The wish must be visible before the index is read once more.
        fence(Ordering::SeqCst);
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
