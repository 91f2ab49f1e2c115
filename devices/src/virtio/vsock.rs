//! Virtio socket device (virtio 1.3 § 5.10): streams between the guest and programs of the host,
//! which find them on Unix sockets, as with Firecracker.
//!
//! ```text
//!   host: connect PATH, "CONNECT 52\n" ─────────> guest: listens on port 52
//!         <── "OK 1073741824\n", then bytes
//!   host: listens on PATH_9000 <───────────────── guest: connects to CID 2, port 9000
//!
//!   queue 0  receive   <── connections: readv from sockets into the guest's buffers   rx
//!   queue 1  transmit  ──> connections: sendmsg to sockets from the guest's buffers
//!   queue 2  event     <── "the transport was reset"
//! ```
//!
//! One worker serves all. A pause keeps connections: the worker gives them back to the device when
//! it goes, and the next one goes on with them. A driver's reset closes them. They are no part of a
//! saved state: a device that is restored has none, and tells the guest so, whose address may be
//! another one ([`reset`]).

mod connection;
mod connections;
mod host;
mod metrics;
mod packet;
mod reset;
mod rx;
mod tx;

use std::io;
use std::sync::{Arc, mpsc};

use super::Kind;
use super::device::{Device, Fault, Message, Payload, Reactor, RestoreError, Worker};
use super::queue::{Chain, Queue, QueueState};
use crate::metrics::{Metrics, Set};
use connections::Connections;
pub use host::{LONGEST_PATH, ListenError, Listener, connect};
pub use metrics::VsockMetrics;
use rx::{RX, Receiver};
use tx::{Sender, TX};

const NAME: &str = "virtio-vsock";
const VERSION: u16 = 1;
const QUEUES: [u16; 3] = [256, 256, 64];
const EVENT: u16 = 2;

/// Smallest address of a guest; those below have meanings of their own (§ 5.10.4).
pub const FIRST_CID: u64 = 3;
/// Largest address of a guest: 32 bits are used, of which all ones mean any address.
pub const LAST_CID: u64 = 0xffff_fffe;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (§ 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    /// Here while no worker has them.
    connections: Option<Box<Connections>>,
    returned: mpsc::Receiver<Box<Connections>>,
    give_back: mpsc::Sender<Box<Connections>>,
    metrics: Arc<VsockMetrics>,
}

impl Vsock {
    /// A device whose guest has the address `cid`, [`FIRST_CID`] to [`LAST_CID`]. Programs reach it
    /// through `listener`, whose file stays when the machine ends if `keep` says so.
    pub fn new(mut listener: Listener, cid: u64, keep: bool) -> Vsock {
        listener.keep_at_end(keep);
        let (give_back, returned) = mpsc::channel();
        let metrics = Arc::<VsockMetrics>::default();
        let connections = Connections::new(listener, cid, Arc::clone(&metrics));
        Vsock { cid, connections: Some(Box::new(connections)), returned, give_back, metrics }
    }

    /// The connections, if no worker has them.
    fn connections(&mut self) -> Option<&mut Box<Connections>> {
        if let Ok(returned) = self.returned.try_recv() {
            self.connections = Some(returned);
        }
        self.connections.as_mut()
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        // A running worker gets the message as well.
        match (message, self.connections()) {
            (Message::TransportReset, Some(connections)) => connections.lose(),
            (Message::Call(call), Some(connections)) => connections.call(call.clone()),
            _ => {}
        }
        None
    }

    fn worker(&mut self, _group: usize, _negotiated: u64) -> io::Result<Box<dyn Worker>> {
        self.connections();
        // Missing only if an io thread hangs with them.
        let connections = self.connections.take().ok_or(io::ErrorKind::ResourceBusy)?;
        Ok(Box::new(VsockWorker {
            connections: Some(connections),
            give_back: self.give_back.clone(),
            metrics: Arc::clone(&self.metrics),
            started: false,
            rx: None,
            tx: None,
            event: None,
            chain: Chain::default(),
            broken: false,
        }))
    }

    fn metrics(&self) -> Vec<Set> {
        vec![("vsock", Arc::clone(&self.metrics) as Arc<dyn Metrics>)]
    }

    fn reset(&mut self) {
        if let Some(connections) = self.connections() {
            connections.clear();
        }
    }

    fn end(&mut self) {
        if let Some(connections) = self.connections() {
            connections.end();
        }
    }

    fn save(&self) -> Payload {
        // The address is configuration, and connections do not outlive their machine.
        Payload { kind: NAME, version: VERSION, bytes: Vec::new() }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        if !payload.expect(NAME, VERSION)?.is_empty() {
            return Err(RestoreError::Invalid { kind: NAME, reason: "it is not empty" });
        }
        // The driver's connections were with another machine's programs. Without one it still has
        // to read its address again. A reset that it was not told of there is part of this one.
        if let Some(connections) = self.connections() {
            connections.lose();
        }
        Ok(())
    }
}

struct VsockWorker {
    // There until it is dropped.
    connections: Option<Box<Connections>>,
    give_back: mpsc::Sender<Box<Connections>>,
    metrics: Arc<VsockMetrics>,
    /// Sockets are watched.
    started: bool,
    rx: Option<Receiver>,
    tx: Option<Sender>,
    event: Option<Queue>,
    chain: Chain,
    /// The device needs a reset.
    broken: bool,
}

/// Which queues are to be looked at again.
#[derive(Default)]
struct Unfinished {
    rx: bool,
    tx: bool,
}

impl VsockWorker {
    /// Does all that can be done now, up to a batch of each kind.
    fn work(&mut self, reactor: &mut dyn Reactor) {
        if self.broken {
            return;
        }
        match self.advance(reactor) {
            Ok(unfinished) => {
                if unfinished.rx {
                    reactor.again(RX);
                }
                if unfinished.tx {
                    reactor.again(TX);
                }
            }
            Err(fault) => {
                self.broken = true;
                reactor.fault(fault);
            }
        }
        if let Some(rx) = &mut self.rx {
            rx.notify();
        }
        if let Some(tx) = &mut self.tx {
            tx.notify();
        }
        if let Some(event) = &mut self.event {
            event.notify();
        }
    }

    fn advance(&mut self, reactor: &mut dyn Reactor) -> Result<Unfinished, Fault> {
        let mut unfinished = Unfinished::default();
        if let (Some(connections), Some(event)) = (&mut self.connections, &mut self.event)
            && connections.advance_reset(event, &mut self.chain, reactor)?
        {
            return Ok(unfinished);
        }
        if let Some(connections) = &mut self.connections {
            unfinished.rx |= connections.accept(reactor);
        }
        unfinished.tx = self.send(reactor)?;
        if let (Some(connections), Some(rx)) = (&mut self.connections, &mut self.rx) {
            let stalled = !connections.has_room();
            unfinished.rx |= connections.deliver(rx, reactor)?;
            // What stopped the guest is out of its way.
            let sending = self.tx.as_ref().is_some_and(|tx| tx.pending);
            unfinished.tx |= stalled && sending && connections.has_room();
        }
        Ok(unfinished)
    }

    /// Takes up to a batch of the guest's packets. Returns whether there may be more.
    fn send(&mut self, reactor: &mut dyn Reactor) -> Result<bool, Fault> {
        let (Some(tx), Some(connections)) = (&mut self.tx, &mut self.connections) else {
            return Ok(false);
        };
        tx.send(connections, reactor)
    }
}

impl Worker for VsockWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, reactor: &mut dyn Reactor) {
        let Some(connections) = &mut self.connections else { return };
        match index {
            RX => {
                let metrics = Arc::clone(&self.metrics);
                self.rx = Some(Receiver::new(queue, connections.guest(), metrics));
            }
            TX => self.tx = Some(Sender::new(queue, Arc::clone(&self.metrics))),
            _ => self.event = Some(queue),
        }
        if !std::mem::replace(&mut self.started, true)
            && let Err(err) = connections.start(reactor)
        {
            self.broken = true;
            reactor.fault(Fault::Backend(err));
        }
    }

    fn stop_queue(&mut self, index: u16, reactor: &mut dyn Reactor) -> Option<QueueState> {
        if let Some(connections) = &mut self.connections
            && std::mem::replace(&mut self.started, false)
        {
            connections.stop(reactor);
        }
        let state = match index {
            RX => self.rx.take().map(Receiver::stop),
            TX => self.tx.take().map(Sender::stop),
            _ => self.event.take().map(|queue| queue.state()),
        };
        Some(state.unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        if let Some(tx) = self.tx.as_mut().filter(|_| index == TX) {
            tx.pending = true;
            self.metrics.tx_queue_event_count.count();
        }
        if index == RX {
            self.metrics.rx_queue_event_count.count();
        }
        self.work(reactor);
    }

    fn on_event(&mut self, token: u32, reactor: &mut dyn Reactor) {
        if let Some(connections) = self.connections.as_mut().filter(|_| !self.broken) {
            connections.on_event(token, reactor);
        }
        self.work(reactor);
    }

    fn on_timer(&mut self, reactor: &mut dyn Reactor) {
        if let Some(connections) = self.connections.as_mut().filter(|_| !self.broken) {
            connections.on_timer(reactor);
        }
        self.work(reactor);
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        match (message, &mut self.connections) {
            (Message::TransportReset, Some(connections)) => connections.reset_transport(reactor),
            (Message::Call(call), Some(connections)) => connections.call(call),
            _ => return,
        }
        self.work(reactor);
    }
}

impl Drop for VsockWorker {
    fn drop(&mut self) {
        if let Some(connections) = self.connections.take() {
            // Fails only if the device is gone, and then nobody goes on.
            let _ = self.give_back.send(connections);
        }
    }
}

#[cfg(test)]
mod tests;
