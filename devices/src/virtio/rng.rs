//! Virtio entropy device (virtio 1.3 § 5.4): fills the driver's buffers from getrandom(2).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Kind;
use super::device::{
    BATCH, Device, Fault, Message, Payload, Reactor, RestoreError, Traffic, Worker,
};
use super::iobuf::IoBuf;
use super::queue::{Chain, Queue, QueueError, QueueState};
use crate::metrics;
use crate::metrics::{Counter, Metrics, Set};
use crate::rate::RateLimiter;

const NAME: &str = "virtio-rng";
const VERSION: u16 = 1;
const QUEUES: [u16; 1] = [64];

/// Most bytes that one request gets: a driver asks for a few dozen, and a hostile one must not keep
/// the io thread busy with gigabytes. The used length says how many came (§ 5.4.6).
const MAX_REQUEST: u64 = 64 * 1024;

metrics! {
    /// What a source of entropy counts.
    pub struct RngMetrics {
        /// Requests that were answered.
        entropy_event_count: Counter,
        /// Random bytes that were given.
        entropy_bytes: Counter,
        /// Requests that got fewer bytes since the host's generator failed.
        host_rng_fails: Counter,
        /// Times that requests had to wait for the rate limit.
        entropy_rate_limiter_throttled: Counter,
    }
}

/// The device. It has no state of its own.
#[derive(Debug, Default)]
pub struct Rng {
    limit: Option<RateLimiter>,
    metrics: Arc<RngMetrics>,
}

impl Rng {
    /// A device whose bytes and requests are limited.
    pub fn new(limit: Option<RateLimiter>) -> Rng {
        Rng { limit, metrics: Arc::default() }
    }
}

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        if let Message::RateLimit(Traffic::All, limit) = message {
            self.limit.clone_from(limit);
        }
        None
    }

    fn worker(&mut self, _group: usize, _negotiated: u64) -> io::Result<Box<dyn Worker>> {
        let (limit, metrics) = (self.limit.clone(), Arc::clone(&self.metrics));
        Ok(Box::new(RngWorker { limit, metrics, ..RngWorker::default() }))
    }

    fn metrics(&self) -> Vec<Set> {
        vec![("entropy", Arc::clone(&self.metrics) as Arc<dyn Metrics>)]
    }

    fn save(&self) -> Payload {
        Payload { kind: NAME, version: VERSION, bytes: Vec::new() }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        match payload.expect(NAME, VERSION)? {
            [] => Ok(()),
            _ => Err(RestoreError::Invalid { kind: NAME, reason: "it has no state of its own" }),
        }
    }
}

#[derive(Default)]
struct RngWorker {
    queue: Option<Queue>,
    chain: Chain,
    limit: Option<RateLimiter>,
    metrics: Arc<RngMetrics>,
}

/// Why serving stopped.
enum Next {
    /// There are no more requests.
    Idle,
    /// The others' turn.
    Again,
    /// The limit is reached for so long.
    Later(Duration),
}

impl RngWorker {
    /// Serves up to a batch of requests.
    fn serve(
        queue: &mut Queue,
        chain: &mut Chain,
        limit: Option<&RateLimiter>,
        metrics: &RngMetrics,
    ) -> Result<Next, QueueError> {
        queue.disable_kicks();
        for _ in 0..BATCH {
            if let Some(limit) = limit
                && queue.has_available()?
                && let Err(wait) = limit.ready(Instant::now())
            {
                metrics.entropy_rate_limiter_throttled.count();
                return Ok(Next::Later(wait));
            }
            let Some(head) = queue.pop(chain)? else {
                if queue.enable_kicks()? {
                    continue;
                }
                if let Some(limit) = limit {
                    limit.idle();
                }
                return Ok(Next::Idle);
            };
            chain.writable.truncate(MAX_REQUEST);
            let filled = fill(&mut chain.writable);
            queue.complete(head, filled);
            metrics.entropy_event_count.count();
            metrics.entropy_bytes.add(filled.into());
            if !chain.writable.is_empty() {
                metrics.host_rng_fails.count();
            }
            if let Some(limit) = limit {
                limit.charge(u64::from(filled));
            }
        }
        Ok(Next::Again)
    }
}

impl Worker for RngWorker {
    fn start_queue(&mut self, _index: u16, queue: Queue, _reactor: &mut dyn Reactor) {
        self.queue = Some(queue);
    }

    fn stop_queue(&mut self, _index: u16, _reactor: &mut dyn Reactor) -> Option<QueueState> {
        Some(self.queue.take().map(|queue| queue.state()).unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        let Some(queue) = &mut self.queue else { return };
        match Self::serve(queue, &mut self.chain, self.limit.as_ref(), &self.metrics) {
            Ok(Next::Idle) => {}
            Ok(Next::Again) => reactor.again(index),
            Ok(Next::Later(wait)) => reactor.later(index, wait),
            Err(err) => reactor.fault(Fault::Queue(index, err)),
        }
        queue.notify();
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        if let Message::RateLimit(Traffic::All, limit) = message {
            self.limit = limit;
            self.on_kick(0, reactor);
        }
    }
}

/// Fills `buf` with random bytes. Returns how many.
fn fill(buf: &mut IoBuf) -> u32 {
    let mut filled = 0u32;
    while let Some(iov) = buf.iovecs().first() {
        // SAFETY: the element describes writable guest RAM of this length.
        let got = unsafe { libc::getrandom(iov.iov_base, iov.iov_len, 0) };
        // The kernel's generator cannot fail once seeded; EINTR on large requests is retried.
        match usize::try_from(got) {
            Ok(got) => {
                buf.advance(got as u64);
                filled += got as u32;
            }
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;
    use crate::rate::{Bucket, Limits};
    use crate::virtio::conformance::{Harness, conformance};

    conformance!(Rng::default);

    #[test]
    fn fills_what_was_asked_for_and_no_more() {
        let mut harness = Harness::new(Rng::default());
        harness.activate();
        let (gpa, len) = harness.writable(64);
        let used = harness.request(0, &[(gpa, 32, true)]);
        assert_eq!(used, Some(32));
        let bytes = harness.read(gpa, len);
        assert!(bytes[..32].iter().any(|&b| b != 0));
        assert!(bytes[32..].iter().all(|&b| b == 0));
    }

    #[test]
    fn the_payload_is_as_it_was() {
        golden::check(&Rng::default().save(), "virtio-rng", 1, "", |payload| {
            let mut rng = Rng::default();
            rng.restore(payload).map(|()| rng.save())
        });
    }

    #[test]
    fn a_gigantic_request_is_cut() {
        let mut harness = Harness::new(Rng::default());
        harness.activate();
        let used = harness.request(0, &[(0x10000, 0x20000, true)]);
        assert_eq!(used, Some(MAX_REQUEST as u32));
    }

    /// A bucket that does not fill while a test runs.
    fn slow(size: u64) -> Option<RateLimiter> {
        let bucket = Bucket { size, one_time_burst: 0, refill_ms: 1 << 30 };
        let limits = Limits { bandwidth: Some(bucket), ops: None };
        RateLimiter::new(limits, Instant::now())
    }

    #[test]
    fn a_limit_holds_requests_up_and_another_one_lets_them_go() {
        let mut harness = Harness::new(Rng::new(slow(40)));
        harness.activate();
        let served = |harness: &mut Harness<Rng>| {
            let (gpa, _) = harness.writable(32);
            harness.offer(0, &[(gpa, 32, true)]);
            harness.kick(0);
            harness.run();
            std::iter::from_fn(|| harness.used(0)).count()
        };
        assert_eq!([served(&mut harness), served(&mut harness)], [1, 1], "the second is on credit");
        assert_eq!(served(&mut harness), 0);
        assert!(harness.expire_timers(), "nobody looks at the queue again");
        harness.run();
        assert_eq!(harness.used(0), None, "the bucket is still empty");
        // A reset does not fill the bucket.
        harness.reset();
        harness.activate();
        assert_eq!(served(&mut harness), 0);
        harness.pause();
        harness.resume();
        assert_eq!(served(&mut harness), 0);
        let message = Message::RateLimit(Traffic::All, slow(1000));
        harness.device_mut().update(&message);
        harness.message(&message);
        assert_eq!(std::iter::from_fn(|| harness.used(0)).count(), 2);
        let message = Message::RateLimit(Traffic::All, None);
        harness.device_mut().update(&message);
        harness.message(&message);
        for _ in 0..100 {
            assert_eq!(served(&mut harness), 1);
        }
    }
}
