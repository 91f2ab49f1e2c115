//! Receiving: frames are read from the TAP straight into the guest's buffers.
//!
//! Buffers are taken from the ring ahead of frames and held, so that a frame costs one readv(2) and
//! the parsing of as many descriptors as it used. With mergeable buffers enough of them are held
//! for the largest frame that can come, which then may spread over several; what a frame did not
//! use serves the next one. Without buffers nothing is read: the TAP's own queue holds the frames,
//! and drops them when it is full, as a wire would.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libc::iovec;

use super::metrics::NetMetrics;
use super::mmds::Service;
use super::tap::Tap;
use super::{Drops, HEADER};
use crate::rate::RateLimiter;
use crate::virtio::device::{BATCH, Fault, Interest, Reactor};
use crate::virtio::queue::{Chain, MAX_SIZE, Queue, QueueState};

/// Offset of `num_buffers` in the header (virtio 1.3 § 5.1.6).
const NUM_BUFFERS: u64 = 10;

/// Descriptors held at most: readv(2) takes 1024, one chain has up to the queue size of them, and
/// one is the overflow.
const HELD_DESCRIPTORS: usize = 1024 - MAX_SIZE as usize - 1;

/// How long a driver with too few buffers for the largest frame may take to offer more, before
/// frames that fit into what there is are delivered.
pub(super) const PATIENCE: Duration = Duration::from_millis(10);

/// A chain taken from the ring and not yet filled.
struct Held {
    head: u16,
    /// Bytes that it takes.
    len: u64,
    /// Elements of the list of buffers that are its.
    buffers: usize,
}

/// The receiving half of a queue pair.
pub(super) struct Receiver {
    queue: Queue,
    index: u16,
    tap: Tap,
    mergeable: bool,
    /// Bytes to be held before a frame is read.
    enough: u64,
    held: VecDeque<Held>,
    /// The buffers of all held chains, from `first` on, then one byte for overflow.
    buffers: Vec<iovec>,
    first: usize,
    held_bytes: u64,
    chain: Chain,
    /// A frame that is longer than what is held reaches into this byte.
    overflow: Box<u8>,
    /// Frames may be waiting in the TAP.
    readable: bool,
    /// The driver did not offer more within [`PATIENCE`].
    short: bool,
    waiting: bool,
    limit: Option<RateLimiter>,
    /// The limit was reached; the queue is looked at later.
    limited: bool,
    drops: Drops,
    metrics: Arc<NetMetrics>,
}

// SAFETY: the list of buffers points into guest RAM, which stays mapped while `queue` is held, and
// to `overflow`, which moves with it.
unsafe impl Send for Receiver {}

/// Why receiving paused.
enum Pause {
    /// The TAP is empty.
    Empty,
    /// The guest has to offer buffers.
    Starved,
    /// Others have to have their turn.
    Batch,
    /// The limit is reached for so long.
    Later(Duration),
}

impl Receiver {
    /// Starts receiving into `queue`. `largest` is the longest frame that can come, with header.
    pub(super) fn new(
        queue: Queue,
        index: u16,
        tap: Tap,
        mergeable: bool,
        largest: u64,
        metrics: Arc<NetMetrics>,
        reactor: &mut dyn Reactor,
    ) -> Receiver {
        if let Err(err) = reactor.watch(tap.fd(), u32::from(index), Interest::Readable) {
            reactor.fault(Fault::Backend(err));
        }
        Receiver {
            queue,
            index,
            tap,
            mergeable,
            enough: largest,
            held: VecDeque::new(),
            buffers: Vec::new(),
            first: 0,
            held_bytes: 0,
            chain: Chain::default(),
            overflow: Box::default(),
            readable: true,
            short: false,
            waiting: false,
            limit: None,
            limited: false,
            drops: Drops::new("received"),
            metrics,
        }
    }

    pub(super) fn set_limit(&mut self, limit: Option<RateLimiter>) {
        self.limit = limit;
    }

    /// Gives held chains back to the ring.
    pub(super) fn stop(mut self, reactor: &mut dyn Reactor) -> QueueState {
        reactor.unwatch(self.tap.fd());
        let heads: Vec<u16> = self.held.iter().map(|held| held.head).collect();
        self.queue.undo(&heads);
        self.queue.state()
    }

    /// True while a timer is set for a driver that has to offer more.
    pub(super) fn waits(&self) -> bool {
        self.waiting
    }

    /// The TAP has frames.
    pub(super) fn on_readable(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        self.readable = true;
        self.metrics.rx_tap_event_count.count();
        self.receive(service, reactor);
    }

    /// The driver offered buffers, or a wait for the limit is over.
    pub(super) fn on_kick(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        self.limited = false;
        self.metrics.rx_queue_event_count.count();
        self.receive(service, reactor);
    }

    /// The driver took its time to offer buffers.
    pub(super) fn on_timer(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        if std::mem::take(&mut self.waiting) {
            self.short = true;
            self.receive(service, reactor);
            self.short = false;
        }
    }

    /// Passes frames on, up to a batch of them: those of `service` first.
    pub(super) fn receive(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        if self.limited {
            return;
        }
        self.queue.disable_kicks();
        let waited = std::mem::take(&mut self.waiting);
        match self.run(service) {
            Ok(Pause::Empty) => {}
            Ok(Pause::Starved) => {
                self.metrics.no_rx_avail_buffer.count();
                // A driver with a ring that is too small for the largest frame would wait forever.
                self.waiting = self.held_bytes > 0;
                if self.waiting && !waited {
                    reactor.set_timer(PATIENCE);
                }
            }
            Ok(Pause::Batch) => reactor.again(self.index),
            Ok(Pause::Later(wait)) => {
                self.limited = true;
                self.metrics.rx_rate_limiter_throttled.count();
                reactor.later(self.index, wait);
            }
            Err(fault) => reactor.fault(fault),
        }
        self.queue.notify();
    }

    fn run(&mut self, mut service: Option<&mut Service>) -> Result<Pause, Fault> {
        for _ in 0..BATCH {
            let enough = self.hold()?;
            let answer = service.as_deref().and_then(Service::frame);
            if !self.readable && answer.is_none() {
                return Ok(Pause::Empty);
            }
            let fits = answer.is_some_and(|frame| frame.len() as u64 <= self.held_bytes);
            if !enough && !fits && (self.held.is_empty() || !self.short) {
                return Ok(Pause::Starved);
            }
            if let Some(limit) = &self.limit
                && let Err(wait) = limit.ready(Instant::now())
            {
                return Ok(Pause::Later(wait));
            }
            if let Some(frame) = answer {
                let len = self.copy(frame);
                self.deliver(len)?;
                if let Some(service) = &mut service {
                    service.delivered();
                }
                continue;
            }
            match self.read() {
                Ok(len) => self.deliver(len)?,
                Err(err) => match err.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The frame is gone: the buffers are shorter than its header (EINVAL), or the
                    // kernel had no memory for it.
                    Some(libc::EINVAL | libc::EFAULT | libc::ENOMEM) => self.failed(&err),
                    Some(libc::EAGAIN) => {
                        self.readable = false;
                        if let Some(limit) = &self.limit {
                            limit.idle();
                        }
                    }
                    // The interface is gone. Should it come back, readiness is reported anew.
                    _ => {
                        self.failed(&err);
                        self.readable = false;
                    }
                },
            }
        }
        Ok(Pause::Batch)
    }

    /// A frame could not be read.
    fn failed(&mut self, err: &io::Error) {
        self.metrics.tap_read_fails.count();
        self.lost(err);
    }

    fn lost(&mut self, err: &io::Error) {
        self.metrics.rx_fails.count();
        self.drops.count(err);
    }

    /// Takes chains until the next frame fits for sure. Returns false if the ring has too few.
    fn hold(&mut self) -> Result<bool, Fault> {
        loop {
            let enough = if self.mergeable {
                self.held_bytes >= self.enough || self.held_descriptors() > HELD_DESCRIPTORS
            } else {
                !self.held.is_empty()
            };
            if enough {
                return Ok(true);
            }
            let popped = self.queue.pop(&mut self.chain);
            match popped.map_err(|err| Fault::Queue(self.index, err))? {
                Some(head) => self.add(head)?,
                None => {
                    let more = self.queue.enable_kicks();
                    if !more.map_err(|err| Fault::Queue(self.index, err))? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn held_descriptors(&self) -> usize {
        self.buffers.len() - self.first
    }

    /// Adds the chain just taken to what is held.
    fn add(&mut self, head: u16) -> Result<(), Fault> {
        let (len, buffers) = (self.chain.writable.len(), self.chain.writable.iovecs());
        if len == 0 || !self.chain.readable.is_empty() {
            self.queue.complete(head, 0);
            return Err(Fault::Request(self.index, "a receive buffer is not for writing"));
        }
        // The overflow byte goes back to the end.
        self.buffers.pop();
        if self.held.is_empty() {
            self.buffers.clear();
            self.first = 0;
        } else if self.first > HELD_DESCRIPTORS {
            self.buffers.drain(..self.first);
            self.first = 0;
        }
        self.buffers.extend_from_slice(buffers);
        self.held.push_back(Held { head, len, buffers: buffers.len() });
        self.held_bytes += len;
        let overflow: *mut u8 = &raw mut *self.overflow;
        self.buffers.push(iovec { iov_base: overflow.cast(), iov_len: 1 });
        Ok(())
    }

    /// Reads a frame into what is held, and the overflow.
    fn read(&mut self) -> io::Result<u64> {
        let buffers = &self.buffers[self.first..];
        // SAFETY: the list describes guest RAM of held chains and one byte of ours; it has at most
        // 1024 elements.
        let len =
            unsafe { libc::readv(self.tap.fd(), buffers.as_ptr(), buffers.len() as libc::c_int) };
        u64::try_from(len).map_err(|_| io::Error::last_os_error())
    }

    /// Copies `frame` into what is held, as reading it would. Returns its length.
    fn copy(&self, frame: &[u8]) -> u64 {
        let mut rest = frame;
        for buffer in &self.buffers[self.first..] {
            let (part, more) = rest.split_at(rest.len().min(buffer.iov_len));
            // SAFETY: guest RAM of held chains and one byte of ours, of at least this length.
            unsafe {
                std::ptr::copy_nonoverlapping(part.as_ptr(), buffer.iov_base.cast(), part.len());
            }
            rest = more;
        }
        frame.len() as u64
    }

    /// Hands a frame of `len` bytes with header, which lies in the held chains, to the driver.
    fn deliver(&mut self, len: u64) -> Result<(), Fault> {
        if len < HEADER {
            if len == 0 {
                // A socket whose peer closed it. There is nothing to read until that changes.
                self.readable = false;
            }
            return Ok(());
        }
        if let Some(limit) = &self.limit {
            limit.charge(len - HEADER);
        }
        if len > self.held_bytes {
            // It was longer than the buffers: what there is of it is of no use.
            self.lost(&io::Error::from_raw_os_error(libc::EMSGSIZE));
            return Ok(());
        }
        self.metrics.rx_packets_count.count();
        self.metrics.rx_bytes_count.add(len - HEADER);
        let mut covered = 0;
        let count = self.held.iter().take_while(|held| {
            let before = covered;
            covered += held.len;
            before < len
        });
        let count = count.count();
        self.write_num_buffers(count as u16);
        let mut left = len;
        for held in self.held.drain(..count) {
            let used = left.min(held.len);
            left -= used;
            // At most the length of a frame, so it fits.
            self.queue.stage(held.head, used as u32);
            self.held_bytes -= held.len;
            self.first += held.buffers;
        }
        self.queue.publish();
        Ok(())
    }

    /// § 5.1.6.4.1: set also where buffers are not mergeable, to 1. The driver may have split the
    /// header in any way.
    fn write_num_buffers(&mut self, count: u16) {
        let bytes = count.to_le_bytes();
        let mut at = NUM_BUFFERS;
        let mut buffers = self.buffers[self.first..].iter();
        let mut current = buffers.next();
        for byte in bytes {
            while let Some(buffer) = current.filter(|buffer| at >= buffer.iov_len as u64) {
                at -= buffer.iov_len as u64;
                current = buffers.next();
            }
            let Some(buffer) = current else { return };
            // SAFETY: `at` lies within this buffer of guest RAM, since the frame just read has at
            // least a header.
            unsafe { buffer.iov_base.cast::<u8>().add(at as usize).write_volatile(byte) };
            at += 1;
        }
    }
}
