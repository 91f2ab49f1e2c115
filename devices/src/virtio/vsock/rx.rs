//! The receive queue: buffers that the guest offers for packets.
//!
//! Buffers are taken ahead and held, so that one readv(2) fills several of them: a Linux guest
//! offers 4 KiB each, and a system call for each would cost more than the copy. Headers are written
//! afterwards, when it is known how much came.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use libc::iovec;

use super::metrics::VsockMetrics;
use super::packet::{HEADER_LEN, ToGuest};
use crate::virtio::device::Fault;
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Chain, Queue, QueueState};

/// Index of the queue.
pub(super) const RX: u16 = 0;

/// Elements of one readv(2): with a guest's usual buffers more than [`super::connection::PIECE`].
const ELEMENTS: usize = 64;

/// Another buffer is not taken for fewer bytes than this: a packet costs the guest more than to wait
/// for the rest of a round number.
const TAIL: u64 = 2048;

/// A chain taken from the ring and not yet filled.
struct Held {
    head: u16,
    /// Bytes behind the header.
    room: u64,
    buffer: IoBuf,
}

/// The queue and what is held of it.
pub(super) struct Receiver {
    queue: Queue,
    guest: u64,
    chain: Chain,
    held: VecDeque<Held>,
    room: u64,
    /// Lists to be used again.
    spare: Vec<IoBuf>,
    metrics: Arc<VsockMetrics>,
}

impl Receiver {
    pub(super) fn new(mut queue: Queue, guest: u64, metrics: Arc<VsockMetrics>) -> Receiver {
        // The driver need not say when it offers buffers, until there are none.
        queue.disable_kicks();
        Receiver {
            queue,
            guest,
            chain: Chain::default(),
            held: VecDeque::new(),
            room: 0,
            spare: Vec::new(),
            metrics,
        }
    }

    /// Gives held chains back to the ring.
    pub(super) fn stop(mut self) -> QueueState {
        let heads: Vec<u16> = self.held.iter().map(|held| held.head).collect();
        self.queue.undo(&heads);
        self.queue.state()
    }

    /// Tells the driver what was delivered.
    pub(super) fn notify(&mut self) {
        self.queue.notify();
    }

    /// Holds buffers for about `bytes` of a stream, or all that there are. Returns whether there
    /// is one; if not, the driver will notify of the next.
    pub(super) fn hold(&mut self, bytes: u64) -> Result<bool, Fault> {
        let broken = |err| Fault::Queue(RX, err);
        while self.held.is_empty() || (self.room + TAIL < bytes && self.held.len() < ELEMENTS) {
            match self.queue.pop(&mut self.chain).map_err(broken)? {
                Some(head) => self.add(head)?,
                None if !self.held.is_empty() => break,
                None => {
                    if !self.queue.enable_kicks().map_err(broken)? {
                        return Ok(false);
                    }
                    self.queue.disable_kicks();
                }
            }
        }
        Ok(true)
    }

    /// Adds the chain just taken to what is held.
    fn add(&mut self, head: u16) -> Result<(), Fault> {
        let room = self.chain.writable.len().checked_sub(HEADER_LEN as u64);
        let Some(room) = room.filter(|&room| room > 0 && self.chain.readable.is_empty()) else {
            self.queue.complete(head, 0);
            return Err(Fault::Request(RX, "a receive buffer cannot take a packet"));
        };
        let spare = self.spare.pop().unwrap_or_default();
        let buffer = std::mem::replace(&mut self.chain.writable, spare);
        self.held.push_back(Held { head, room, buffer });
        self.room += room;
        Ok(())
    }

    /// Delivers a packet without data. No effect if nothing is held.
    pub(super) fn put(&mut self, header: &ToGuest) {
        self.deliver(header, 0);
        self.queue.publish();
    }

    /// Reads up to `most` bytes of a stream into what is held, and delivers them behind headers like
    /// `header`. Returns the number of bytes: 0 at the end of the stream. Something must be held,
    /// and `most` must not be 0.
    pub(super) fn read(&mut self, fd: RawFd, most: u64, header: &ToGuest) -> io::Result<u64> {
        let mut list = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; ELEMENTS];
        let count = self.room_in(&mut list, most);
        // SAFETY: the list describes guest RAM of held chains.
        let got = unsafe { libc::readv(fd, list.as_ptr(), count as libc::c_int) };
        let got = u64::try_from(got).map_err(|_| io::Error::last_os_error())?;
        let mut left = got;
        while left > 0 {
            let Some(room) = self.held.front().map(|held| held.room) else { break };
            let len = room.min(left);
            // At most the bytes of one read, so it fits.
            self.deliver(&ToGuest { len: len as u32, ..*header }, len as u32);
            left -= len;
        }
        self.queue.publish();
        Ok(got)
    }

    /// Lists the held space behind headers, `most` bytes of it. Returns the number of elements.
    fn room_in(&self, list: &mut [iovec; ELEMENTS], most: u64) -> usize {
        let (mut count, mut left) = (0, usize::try_from(most).unwrap_or(usize::MAX));
        for held in &self.held {
            let mut skip = HEADER_LEN;
            for element in held.buffer.iovecs() {
                let skipped = skip.min(element.iov_len);
                skip -= skipped;
                let len = (element.iov_len - skipped).min(left);
                if len == 0 {
                    continue;
                }
                let Some(slot) = list.get_mut(count) else { return count };
                // SAFETY: at most the element's length is skipped.
                let base = unsafe { element.iov_base.cast::<u8>().add(skipped) };
                *slot = iovec { iov_base: base.cast(), iov_len: len };
                left -= len;
                count += 1;
            }
        }
        count
    }

    /// Puts a header in front of `len` bytes that lie in the first held chain, and stages it.
    fn deliver(&mut self, header: &ToGuest, len: u32) {
        let Some(mut held) = self.held.pop_front() else { return };
        self.room -= held.room;
        held.buffer.write(&header.bytes(self.guest));
        self.queue.stage(held.head, HEADER_LEN as u32 + len);
        self.metrics.rx_packets_count.count();
        self.metrics.rx_bytes_count.add(len.into());
        self.spare.push(held.buffer);
    }
}
