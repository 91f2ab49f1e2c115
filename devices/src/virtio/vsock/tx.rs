//! The transmit queue: packets of the guest's, handed to their connections.
//!
//! Data of several packets in a row for one connection goes to its socket in one sendmsg(2), straight
//! from the guest's buffers: a program of the host is then woken once for all of them.

use std::mem;
use std::sync::Arc;

use super::connections::Connections;
use super::metrics::VsockMetrics;
use super::packet::{FromGuest, HEADER_LEN, Op, Ports};
use crate::virtio::device::{BATCH, Fault, Reactor};
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Chain, Queue, QueueState};

/// Index of the queue.
pub(super) const TX: u16 = 1;

/// Bytes and packets that are gathered at most.
const MOST_BYTES: u64 = 256 << 10;
const MOST_PACKETS: usize = 64;

/// The queue, and data on its way to a socket.
pub(super) struct Sender {
    queue: Queue,
    chain: Chain,
    /// The queue may have packets.
    pub(super) pending: bool,
    /// What was gathered: for whom, how much, and in which chains. Nothing is between calls.
    place: u16,
    ports: Ports,
    bytes: u64,
    parts: Vec<IoBuf>,
    heads: Vec<u16>,
    /// Lists to be used again.
    spare: Vec<IoBuf>,
    metrics: Arc<VsockMetrics>,
}

impl Sender {
    pub(super) fn new(queue: Queue, metrics: Arc<VsockMetrics>) -> Sender {
        Sender {
            queue,
            chain: Chain::default(),
            pending: false,
            place: 0,
            ports: Ports::default(),
            bytes: 0,
            parts: Vec::new(),
            heads: Vec::new(),
            spare: Vec::new(),
            metrics,
        }
    }

    pub(super) fn stop(self) -> QueueState {
        self.queue.state()
    }

    /// Tells the driver what was taken.
    pub(super) fn notify(&mut self) {
        self.queue.notify();
    }

    /// Takes up to a batch of packets. Returns whether there may be more.
    pub(super) fn send(
        &mut self,
        connections: &mut Connections,
        reactor: &mut dyn Reactor,
    ) -> Result<bool, Fault> {
        if !self.pending {
            return Ok(false);
        }
        let result = self.take(connections, reactor);
        self.flush(connections, reactor);
        result
    }

    fn take(
        &mut self,
        connections: &mut Connections,
        reactor: &mut dyn Reactor,
    ) -> Result<bool, Fault> {
        let broken = |err| Fault::Queue(TX, err);
        self.queue.disable_kicks();
        for _ in 0..BATCH {
            if !connections.has_room() {
                return Ok(false);
            }
            let Some(head) = self.queue.pop(&mut self.chain).map_err(broken)? else {
                // More may come while this goes out.
                self.flush(connections, reactor);
                if self.queue.enable_kicks().map_err(broken)? {
                    self.queue.disable_kicks();
                    continue;
                }
                self.pending = false;
                return Ok(false);
            };
            self.packet(head, connections, reactor);
        }
        Ok(true)
    }

    /// Hands the packet in the chain just taken to its connection.
    fn packet(&mut self, head: u16, connections: &mut Connections, reactor: &mut dyn Reactor) {
        self.metrics.tx_packets_count.count();
        let mut header = [0; HEADER_LEN];
        if self.chain.readable.read(&mut header) < HEADER_LEN {
            // A packet that is shorter than its header says nothing.
            self.flush(connections, reactor);
            return self.queue.complete(head, 0);
        }
        let header = FromGuest::new(&header);
        // What came before is done before.
        if header.op != Some(Op::Data) || header.ports != self.ports {
            self.flush(connections, reactor);
        }
        let data = &mut self.chain.readable;
        match connections.packet(&header, data.len(), reactor) {
            Some(place) => {
                data.truncate(u64::from(header.len));
                let spare = self.spare.pop().unwrap_or_default();
                self.bytes += data.len();
                self.metrics.tx_bytes_count.add(data.len());
                self.parts.push(mem::replace(data, spare));
                self.heads.push(head);
                (self.place, self.ports) = (place, header.ports);
                if self.bytes >= MOST_BYTES || self.parts.len() >= MOST_PACKETS {
                    self.flush(connections, reactor);
                }
            }
            None => {
                self.flush(connections, reactor);
                self.queue.complete(head, 0);
            }
        }
    }

    /// Passes on what was gathered.
    fn flush(&mut self, connections: &mut Connections, reactor: &mut dyn Reactor) {
        if self.parts.is_empty() {
            return;
        }
        connections.pass_on(self.place, &mut self.parts, reactor);
        self.spare.append(&mut self.parts);
        self.bytes = 0;
        for head in self.heads.drain(..) {
            self.queue.stage(head, 0);
        }
        self.queue.publish();
    }
}
