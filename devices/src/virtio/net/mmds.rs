//! The metadata service: contents that the host keeps for the guest, read over HTTP through the
//! guest's own network card, without a socket on the host.
//!
//! ```text
//!   guest ── transmit queue ──> tx ── to its address ──> Service: TCP (smoltcp) ── request ──> http
//!                                └─ anything else ─> TAP    │                                   │
//!   guest <── receive queue ─── rx <────────────────────────┘ <─────────────── answer ──────────┘
//! ```
//!
//! The service takes frames and gives frames; it knows of no queue, no descriptor and no clock. What
//! a guest can make it hold is bounded: [`CONNECTIONS`], each with buffers of a fixed size and one
//! answer, and [`OUTBOUND`] frames. While the guest does not take those, what it sends to the service
//! is dropped, as a host whose network is full would do.

#[cfg(any(test, feature = "conformance"))]
mod fuzzing;
mod http;
mod stack;
mod token;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(any(test, feature = "conformance"))]
pub use fuzzing::fuzz;
use serde_json::Value;
use stack::Stack;
pub use token::TokenKey;

use super::{HEADER, MmdsMetrics};
use crate::virtio::iobuf::IoBuf;

/// Where the service is if nothing else is said.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Connections at a time.
const CONNECTIONS: usize = 30;
/// Frames that wait for the guest to take them.
const OUTBOUND: usize = 32;

/// Ethernet header (IEEE 802.3), without a VLAN tag.
const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// An ARP packet for IPv4 over Ethernet (RFC 826).
const ARP_PACKET: usize = 28;
/// Where an IPv4 packet has its destination, and an ARP packet its target.
const IPV4_DESTINATION: usize = ETHERNET + 16;
const ARP_TARGET: usize = ETHERNET + 24;

/// Longest frame that is taken: a guest that leaves segmentation to the device sends all that fits
/// into a window at once, with the longest headers of IPv4 and TCP.
const LONGEST_FRAME: usize = ETHERNET + 60 + 60 + http::LONGEST;

/// What guests have to bring with their requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Version {
    /// Nothing.
    #[default]
    V1,
    /// A token, which the service gives them.
    V2,
}

/// How a card serves metadata.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether tokens are needed.
    pub version: Version,
    /// Address of the service.
    pub address: Ipv4Addr,
    /// Answers are plain text whatever is asked for, as EC2's are.
    pub imds_compat: bool,
    /// The secret behind the tokens.
    pub key: TokenKey,
}

/// Says which frames are the service's.
#[derive(Clone, Copy, Debug)]
struct Classifier {
    address: [u8; 4],
}

impl Classifier {
    /// True for IPv4 packets to the service, and for ARP requests (RFC 826) for it. What else comes
    /// goes its way.
    #[inline]
    fn wants(self, frame: &[u8]) -> bool {
        match frame.get(12..ETHERNET) {
            Some(kind) if kind == IPV4 => has(frame, IPV4_DESTINATION, &self.address),
            Some(kind) if kind == ARP => {
                has(frame, ARP_TARGET, &self.address) && has(frame, ETHERNET + 6, &[0, 1])
            }
            _ => false,
        }
    }
}

fn has(frame: &[u8], at: usize, bytes: &[u8]) -> bool {
    frame.get(at..).is_some_and(|rest| rest.starts_with(bytes))
}

/// The service of one card.
pub(super) struct Service {
    classifier: Classifier,
    stack: Stack,
    /// Something came since the clock was last looked at.
    touched: bool,
    metrics: Arc<MmdsMetrics>,
}

impl Service {
    /// A service without connections. `mtu` is the card's, in bytes.
    pub(super) fn new(
        options: Options,
        contents: Arc<Value>,
        mac: [u8; 6],
        mtu: u16,
        metrics: Arc<MmdsMetrics>,
    ) -> Service {
        let classifier = Classifier { address: options.address.octets() };
        let stack = Stack::new(options, contents, mac, mtu, Arc::clone(&metrics));
        Service { classifier, stack, touched: false, metrics }
    }

    /// Answers what comes from now on from other contents.
    pub(super) fn set_contents(&mut self, contents: Arc<Value>) {
        self.stack.set_contents(contents);
    }

    /// Goes on after a pause, with the contents of now.
    pub(super) fn go_on(&mut self, contents: Arc<Value>) {
        self.stack.set_contents(contents);
        // Frames may wait, and time has passed.
        self.touched = true;
    }

    /// Takes a frame with its header if it is for the service, and returns whether it is.
    #[inline]
    pub(super) fn take(&mut self, frame: &IoBuf) -> bool {
        // As far as the target of an ARP packet.
        let mut start = [0; ARP_TARGET + 4];
        let len = frame.peek(HEADER, &mut start);
        if !self.classifier.wants(&start[..len]) {
            return false;
        }
        self.receive(frame);
        true
    }

    #[cold]
    fn receive(&mut self, frame: &IoBuf) {
        let mut bytes = [0; LONGEST_FRAME];
        let len = frame.len().saturating_sub(HEADER);
        if len > bytes.len() as u64 {
            return self.metrics.rx_accepted_err.count();
        }
        let len = frame.peek(HEADER, &mut bytes);
        // The guest may have changed it since it was looked at.
        if self.classifier.wants(&bytes[..len]) {
            self.metrics.rx_accepted.count();
            self.stack.receive(&bytes[..len], Instant::now());
            self.touched = true;
        }
    }

    /// The next frame for the guest, with its header.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.stack.frame()
    }

    /// The guest has the frame that was next.
    pub(super) fn delivered(&mut self) {
        self.touched = true;
        self.metrics.tx_count.count();
        let frame = self.stack.frame().map_or(0, <[u8]>::len) as u64;
        self.metrics.tx_bytes.add(frame.saturating_sub(HEADER));
        self.stack.delivered(Instant::now());
    }

    /// True once after something came or went.
    pub(super) fn touched(&mut self) -> bool {
        std::mem::take(&mut self.touched)
    }

    /// Time passes: what was lost is sent again, and who is gone is forgotten. Returns when there is
    /// something to be done next, if nothing comes.
    pub(super) fn tick(&mut self) -> Option<Duration> {
        self.stack.tick(Instant::now())
    }
}

#[cfg(test)]
mod tests;
