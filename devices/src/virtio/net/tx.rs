//! Sending: each request is one frame, written to the TAP straight from guest memory.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::metrics::NetMetrics;
use super::mmds::Service;
use super::tap::Tap;
use super::{Drops, HEADER, MAX_FRAME};
use crate::rate::RateLimiter;
use crate::virtio::device::{BATCH, Fault, Interest, Reactor};
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Chain, Queue, QueueError, QueueState};

/// The sending half of a queue pair.
pub(super) struct Sender {
    queue: Queue,
    index: u16,
    tap: Tap,
    chain: Chain,
    /// The TAP had no room; readiness is waited for.
    blocked: bool,
    limit: Option<RateLimiter>,
    drops: Drops,
    metrics: Arc<NetMetrics>,
}

/// Why sending paused.
enum Pause {
    /// Everything is sent.
    Empty,
    /// The TAP has no room.
    Blocked,
    /// Others have to have their turn.
    Batch,
    /// The limit is reached for so long.
    Later(Duration),
}

impl Sender {
    pub(super) fn new(
        queue: Queue,
        index: u16,
        tap: Tap,
        limit: Option<RateLimiter>,
        metrics: Arc<NetMetrics>,
    ) -> Sender {
        let (chain, drops) = (Chain::default(), Drops::new("sent"));
        Sender { queue, index, tap, chain, blocked: false, limit, drops, metrics }
    }

    pub(super) fn set_limit(&mut self, limit: Option<RateLimiter>) {
        self.limit = limit;
    }

    /// Frames are sent or not taken, so nothing is in flight.
    pub(super) fn stop(self, reactor: &mut dyn Reactor) -> QueueState {
        if self.blocked {
            reactor.unwatch(self.tap.waiting_fd());
        }
        self.queue.state()
    }

    /// The TAP has room again.
    pub(super) fn on_writable(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        if std::mem::take(&mut self.blocked) {
            // Watched anew when it is full again: that reports room which came in between.
            reactor.unwatch(self.tap.waiting_fd());
            self.send(service, reactor);
        }
    }

    /// Sends what the driver has made available, up to a batch. What is for `service` goes there.
    pub(super) fn send(&mut self, service: Option<&mut Service>, reactor: &mut dyn Reactor) {
        if self.blocked {
            return;
        }
        self.queue.disable_kicks();
        self.metrics.tx_queue_event_count.count();
        match self.run(service) {
            Ok(Pause::Empty) => {}
            Ok(Pause::Batch) => reactor.again(self.index),
            Ok(Pause::Later(wait)) => {
                self.metrics.tx_rate_limiter_throttled.count();
                reactor.later(self.index, wait);
            }
            Ok(Pause::Blocked) => {
                self.metrics.tx_remaining_reqs_count.count();
                self.blocked = true;
                let (fd, token) = (self.tap.waiting_fd(), u32::from(self.index));
                if let Err(err) = reactor.watch(fd, token, Interest::Writable) {
                    reactor.fault(Fault::Backend(err));
                }
            }
            Err(err) => reactor.fault(Fault::Queue(self.index, err)),
        }
        self.queue.notify();
    }

    fn run(&mut self, mut service: Option<&mut Service>) -> Result<Pause, QueueError> {
        for _ in 0..BATCH {
            if let Some(limit) = &self.limit
                && self.queue.has_available()?
                && let Err(wait) = limit.ready(Instant::now())
            {
                return Ok(Pause::Later(wait));
            }
            let Some(head) = self.queue.pop(&mut self.chain)? else {
                if self.queue.enable_kicks()? {
                    continue;
                }
                if let Some(limit) = &self.limit {
                    limit.idle();
                }
                return Ok(Pause::Empty);
            };
            let taken = service.as_mut().is_some_and(|service| service.take(&self.chain.readable));
            let sent = if taken { Ok(()) } else { write(&self.tap, &self.chain.readable) };
            match sent {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    self.queue.undo(&[head]);
                    return Ok(Pause::Blocked);
                }
                // The TAP is down or gone, or did not like the header: a frame may get lost.
                Err(err) => self.lost(&err),
                Ok(()) => {
                    self.metrics.tx_packets_count.count();
                    self.metrics.tx_bytes_count.add(self.chain.readable.len() - HEADER);
                }
            }
            if let Some(limit) = &self.limit {
                limit.charge(self.chain.readable.len().saturating_sub(HEADER));
            }
            self.queue.complete(head, 0);
        }
        Ok(Pause::Batch)
    }

    fn lost(&mut self, err: &io::Error) {
        match err.raw_os_error() {
            Some(libc::EMSGSIZE) => self.metrics.tx_malformed_frames.count(),
            _ => self.metrics.tap_write_fails.count(),
        }
        self.metrics.tx_fails.count();
        self.drops.count(err);
    }
}

/// Writes one frame. The kernel checks the header's contents.
fn write(tap: &Tap, frame: &IoBuf) -> io::Result<()> {
    if !(HEADER..=MAX_FRAME).contains(&frame.len()) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let buffers = frame.iovecs();
    loop {
        // SAFETY: the list describes guest RAM of a chain that is held; a chain has no more
        // elements than writev(2) takes.
        let sent =
            unsafe { libc::writev(tap.fd(), buffers.as_ptr(), buffers.len() as libc::c_int) };
        if sent >= 0 {
            return Ok(());
        }
        let err = io::Error::last_os_error();
        if err.kind() != io::ErrorKind::Interrupted {
            return Err(err);
        }
    }
}
