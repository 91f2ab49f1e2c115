//! The control queue (virtio 1.3 § 5.1.6.5): how many queue pairs the driver uses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::enable_pairs;
use super::tap::Tap;
use crate::virtio::device::{BATCH, Fault, Reactor, Worker};
use crate::virtio::queue::{Chain, Queue, QueueState};

const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

/// The worker of the control queue.
pub(super) struct ControlWorker {
    pub(super) taps: Vec<Tap>,
    /// Whether VQ_PAIRS_SET may be used.
    pub(super) multi_queue: bool,
    pub(super) pairs: Arc<AtomicU16>,
    /// Index of the control queue.
    pub(super) index: u16,
    pub(super) queue: Option<Queue>,
    pub(super) chain: Chain,
}

impl ControlWorker {
    fn serve(&mut self) -> Result<bool, Fault> {
        let Some(mut queue) = self.queue.take() else { return Ok(false) };
        let result = self.run(&mut queue);
        queue.notify();
        self.queue = Some(queue);
        result
    }

    fn run(&mut self, queue: &mut Queue) -> Result<bool, Fault> {
        let index = self.index;
        let broken = |err| Fault::Queue(index, err);
        queue.disable_kicks();
        for _ in 0..BATCH {
            let Some(head) = queue.pop(&mut self.chain).map_err(broken)? else {
                if queue.enable_kicks().map_err(broken)? {
                    continue;
                }
                return Ok(false);
            };
            let answer = if self.command().is_some() { OK } else { ERR };
            let written = self.chain.writable.write(&[answer]);
            queue.complete(head, written as u32);
        }
        Ok(true)
    }

    /// Does what the driver asks. `None` if that is not possible.
    fn command(&mut self) -> Option<()> {
        let mut request = [0; 4];
        let len = self.chain.readable.read(&mut request);
        let [CLASS_MQ, MQ_VQ_PAIRS_SET, low, high] = request else { return None };
        let pairs = u16::from_le_bytes([low, high]);
        let known = (1..=self.taps.len()).contains(&usize::from(pairs));
        if len != request.len() || !known || !self.multi_queue {
            return None;
        }
        enable_pairs(&self.taps, pairs).ok()?;
        self.pairs.store(pairs, Ordering::Relaxed);
        Some(())
    }
}

impl Worker for ControlWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, _reactor: &mut dyn Reactor) {
        // Without MQ the group has a second queue, which does not exist for the driver.
        if index == self.index {
            self.queue = Some(queue);
        }
    }

    fn stop_queue(&mut self, index: u16, _reactor: &mut dyn Reactor) -> Option<QueueState> {
        let queue = if index == self.index { self.queue.take() } else { None };
        Some(queue.map(|queue| queue.state()).unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        if index != self.index {
            return;
        }
        match self.serve() {
            Ok(true) => reactor.again(index),
            Ok(false) => {}
            Err(fault) => reactor.fault(fault),
        }
    }
}
