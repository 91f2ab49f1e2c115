//! Virtio entropy device (virtio 1.3 § 5.4): fills the driver's buffers from getrandom(2).

use std::io;

use super::Kind;
use super::device::{BATCH, Device, Fault, Payload, Reactor, RestoreError, Worker};
use super::iobuf::IoBuf;
use super::queue::{Chain, Queue, QueueError, QueueState};

const NAME: &str = "virtio-rng";
const VERSION: u16 = 1;
const QUEUES: [u16; 1] = [64];

/// Most bytes that one request gets: a driver asks for a few dozen, and a hostile one must not keep
/// the io thread busy with gigabytes. The used length says how many came (§ 5.4.6).
const MAX_REQUEST: u64 = 64 * 1024;

/// The device. It has no state of its own.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn kind(&self) -> Kind {
        Kind::Rng
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn worker(&mut self, _group: usize, _negotiated: u64) -> io::Result<Box<dyn Worker>> {
        Ok(Box::<RngWorker>::default())
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
}

impl RngWorker {
    /// Serves up to a batch of requests. Returns true if more may be waiting.
    fn serve(queue: &mut Queue, chain: &mut Chain) -> Result<bool, QueueError> {
        queue.disable_kicks();
        for _ in 0..BATCH {
            let Some(head) = queue.pop(chain)? else {
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(false);
            };
            chain.writable.truncate(MAX_REQUEST);
            queue.complete(head, fill(&mut chain.writable));
        }
        Ok(true)
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
        match Self::serve(queue, &mut self.chain) {
            Ok(true) => reactor.again(index),
            Ok(false) => {}
            Err(err) => reactor.fault(Fault::Queue(index, err)),
        }
        queue.notify();
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
    use crate::virtio::conformance::{Harness, conformance};

    conformance!(Rng::default);

    #[test]
    fn fills_what_was_asked_for_and_no_more() {
        let mut harness = Harness::new(Rng);
        harness.activate();
        let (gpa, len) = harness.writable(64);
        let used = harness.request(0, &[(gpa, 32, true)]);
        assert_eq!(used, Some(32));
        let bytes = harness.read(gpa, len);
        assert!(bytes[..32].iter().any(|&b| b != 0));
        assert!(bytes[32..].iter().all(|&b| b == 0));
    }

    #[test]
    fn a_gigantic_request_is_cut() {
        let mut harness = Harness::new(Rng);
        harness.activate();
        let used = harness.request(0, &[(0x10000, 0x20000, true)]);
        assert_eq!(used, Some(MAX_REQUEST as u32));
    }
}
