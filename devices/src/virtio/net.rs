//! Virtio network card (virtio 1.3 § 5.1) on TAP interfaces.
//!
//! ```text
//!   pair k:  queue 2k   receive   <── readv ── TAP descriptor k     rx
//!            queue 2k+1 transmit  ── writev ──> (the same)          tx
//!   control: queue 2n, where there are n > 1 pairs                  control
//! ```
//!
//! Frames are never copied here: the kernel reads and writes guest memory, and does the checksums
//! and the segmentation that either side leaves to the other. What is for the metadata service, where
//! a card has one, is copied, and stays here.

mod control;
mod metrics;
pub mod mmds;
mod rx;
pub mod tap;
mod tx;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use control::ControlWorker;
pub use metrics::{MmdsMetrics, NetMetrics};
use mmds::Service;
use rx::{PATIENCE, Receiver};
use serde_json::Value;
use tap::Tap;
use tx::Sender;

use super::Kind;
use super::device::{Device, Message, Payload, Reactor, RestoreError, Traffic, Worker};
use super::queue::{Chain, Queue, QueueState};
use crate::metrics::{Metrics, Set};
use crate::rate::RateLimiter;

const NAME: &str = "virtio-net";
const VERSION: u16 = 1;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;

/// Most queue pairs of one card.
pub const MAX_PAIRS: usize = 16;

/// Bytes of the header in front of each frame (§ 5.1.6), with `num_buffers`.
pub const HEADER: u64 = 12;
/// Longest frame in bytes with its header: an IP packet of 65535 bytes, Ethernet header, VLAN tag,
/// and room to spare.
const MAX_FRAME: u64 = 65562 + HEADER;
/// Bytes to be held for a frame that the host has not segmented (§ 5.1.6.3.1).
const LARGEST_OFFLOADED: u64 = 65562;
/// Ethernet header with a VLAN tag, in bytes.
const ETHERNET: u64 = 18;

/// Feature bits (§ 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const GUEST_UFO: u64 = 1 << 10;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const HOST_UFO: u64 = 1 << 14;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const MQ: u64 = 1 << 22;

    /// What the kernel does for any TAP: it takes whatever the guest leaves to it, and hands over
    /// what [`offloads`](super::offloads) says.
    pub(super) const TAP: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_UFO | GUEST;
    const GUEST: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
}

/// What a network card is made of.
#[derive(Debug)]
pub struct NetOptions {
    /// One TAP queue per queue pair, all of the same interface, 1 to [`MAX_PAIRS`].
    pub taps: Vec<Tap>,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// Largest packet in bytes without Ethernet header, told to the guest (§ 5.1.4: at least 68).
    /// Without it the guest assumes 1500.
    pub mtu: Option<u16>,
}

/// Why a network card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// There are too few or too many queue pairs.
    #[error("{0} queue pairs are not between 1 and {MAX_PAIRS}")]
    Pairs(usize),
    /// The MTU is below what virtio allows.
    #[error("an MTU of {0} bytes is not between 68 and 65535")]
    Mtu(u16),
    /// A card with several queue pairs was to have a metadata service.
    #[error("a card with {0} queue pairs cannot have a metadata service; it has to have one")]
    MmdsPairs(usize),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    taps: Vec<Tap>,
    mac: [u8; 6],
    /// Somebody asked for this address: it is not that of a saved card.
    keeps_mac: bool,
    mtu: Option<u16>,
    sizes: Vec<u16>,
    /// Queue pairs that the driver uses: 1 until it asks for more.
    pairs: Arc<AtomicU16>,
    limits: NetLimits,
    mmds: Option<mmds::Options>,
    /// What the metadata service has to say.
    metadata: Arc<Value>,
    /// The service of a worker that stopped, with its connections, for the next one.
    paused: (mpsc::Sender<Box<Service>>, mpsc::Receiver<Box<Service>>),
    metrics: Arc<NetMetrics>,
    /// What the metadata service counts.
    mmds_metrics: Arc<MmdsMetrics>,
}

/// What limits the traffic of all queue pairs together: bytes are those of Ethernet frames, and each
/// frame is an operation. A frame that was left unsegmented is one.
#[derive(Clone, Debug, Default)]
struct NetLimits {
    received: Option<RateLimiter>,
    sent: Option<RateLimiter>,
}

impl NetLimits {
    fn set(&mut self, traffic: Traffic, limit: Option<RateLimiter>) {
        match traffic {
            Traffic::All => {}
            Traffic::Received => self.received = limit,
            Traffic::Sent => self.sent = limit,
        }
    }
}

impl Net {
    /// A network card.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(options: NetOptions) -> Result<Net, NetError> {
        let NetOptions { taps, mac, mtu } = options;
        if !(1..=MAX_PAIRS).contains(&taps.len()) {
            return Err(NetError::Pairs(taps.len()));
        }
        if let Some(mtu) = mtu.filter(|&mtu| mtu < 68) {
            return Err(NetError::Mtu(mtu));
        }
        let mut sizes = vec![QUEUE_SIZE; taps.len() * 2];
        if taps.len() > 1 {
            sizes.push(CONTROL_QUEUE_SIZE);
        }
        let pairs = Arc::new(AtomicU16::new(1));
        let (limits, metadata) = (NetLimits::default(), Arc::default());
        let paused = mpsc::channel();
        Ok(Net {
            taps,
            mac,
            keeps_mac: false,
            mtu,
            sizes,
            pairs,
            limits,
            mmds: None,
            metadata,
            paused,
            metrics: Arc::default(),
            mmds_metrics: Arc::default(),
        })
    }

    /// Has the card keep its address when it goes on where one was saved that may have had another. The driver is
    /// told then that its configuration changed.
    pub fn keep_mac(&mut self) {
        self.keeps_mac = true;
    }

    /// Gives the guest a metadata service on this card. Its contents come by
    /// [`Message::Metadata`]; until then nothing is found.
    ///
    /// A connection has to stay with one queue pair, which a guest with several does not care for.
    ///
    /// # Errors
    /// [`NetError::MmdsPairs`].
    pub fn set_mmds(&mut self, options: mmds::Options) -> Result<(), NetError> {
        if self.taps.len() > 1 {
            return Err(NetError::MmdsPairs(self.taps.len()));
        }
        self.mmds = Some(options);
        Ok(())
    }

    /// Limits what the guest receives or sends; a card has no limit for [`Traffic::All`].
    pub fn set_limit(&mut self, traffic: Traffic, limit: Option<RateLimiter>) {
        self.limits.set(traffic, limit);
    }

    /// Largest frame with header that the TAP can deliver to a driver that agreed on `negotiated`.
    fn largest_frame(&self, negotiated: u64) -> u64 {
        let segments = feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_UFO;
        if negotiated & segments != 0 {
            return LARGEST_OFFLOADED;
        }
        let mtu = self.taps.iter().map(Tap::mtu).chain(self.mtu).max().unwrap_or_default();
        HEADER + ETHERNET + u64::from(mtu)
    }

    /// The pairs that the driver uses, now that it has agreed on `negotiated`.
    fn used_pairs(&self, negotiated: u64) -> u16 {
        if negotiated & feature::MQ == 0 { 1 } else { self.pairs.load(Ordering::Relaxed) }
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        let mtu = if self.mtu.is_some() { feature::MTU } else { 0 };
        let pairs = if self.taps.len() > 1 { feature::CTRL_VQ | feature::MQ } else { 0 };
        feature::TAP | feature::MAC | feature::MRG_RXBUF | mtu | pairs
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn groups(&self) -> Vec<Range<u16>> {
        let count = self.sizes.len() as u16;
        (0..count).step_by(2).map(|first| first..count.min(first + 2)).collect()
    }

    fn config(&self) -> Vec<u8> {
        // § 5.1.4: mac, status, max_virtqueue_pairs, mtu.
        let mut config = self.mac.to_vec();
        config.extend([0, 0]);
        config.extend((self.taps.len() as u16).to_le_bytes());
        config.extend(self.mtu.unwrap_or_default().to_le_bytes());
        config
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        match message {
            Message::RateLimit(traffic, limit) => self.set_limit(*traffic, limit.clone()),
            Message::Metadata(contents) => self.metadata = Arc::clone(contents),
            _ => {}
        }
        None
    }

    fn worker(&mut self, group: usize, negotiated: u64) -> io::Result<Box<dyn Worker>> {
        let multi_queue = negotiated & feature::MQ != 0;
        // § 5.1.2: without MQ the control queue comes right after the one pair.
        let control = if multi_queue { self.taps.len() } else { 1 };
        let (Some(tap), false) = (self.taps.get(group), group == control) else {
            return Ok(Box::new(ControlWorker {
                taps: self.taps.clone(),
                multi_queue,
                pairs: Arc::clone(&self.pairs),
                index: group as u16 * 2,
                queue: None,
                chain: Chain::default(),
            }));
        };
        if group == 0 {
            tap.set_offloads(offloads(negotiated))?;
            enable_pairs(&self.taps, self.used_pairs(negotiated))?;
        }
        let service = self.mmds.clone().map(|options| {
            let contents = Arc::clone(&self.metadata);
            if let Ok(mut service) = self.paused.1.try_recv() {
                service.go_on(contents);
                return service;
            }
            let mtu = self.mtu.unwrap_or(u16::MAX).min(tap.mtu());
            let metrics = Arc::clone(&self.mmds_metrics);
            Box::new(Service::new(options, contents, self.mac, mtu, metrics))
        });
        Ok(Box::new(PairWorker {
            service,
            paused: self.paused.0.clone(),
            tap: tap.clone(),
            mergeable: negotiated & feature::MRG_RXBUF != 0,
            largest: self.largest_frame(negotiated),
            limits: self.limits.clone(),
            metrics: Arc::clone(&self.metrics),
            rx: None,
            tx: None,
        }))
    }

    fn metrics(&self) -> Vec<Set> {
        let own = Arc::clone(&self.metrics) as Arc<dyn Metrics>;
        let service = Arc::clone(&self.mmds_metrics) as Arc<dyn Metrics>;
        let service = self.mmds.as_ref().map(|_| ("mmds", service));
        std::iter::once(("net", own)).chain(service).collect()
    }

    fn reset(&mut self) {
        self.pairs.store(1, Ordering::Relaxed);
        // Another driver knows nothing of the connections of the one before.
        while self.paused.1.try_recv().is_ok() {}
    }

    fn save(&self) -> Payload {
        let mut bytes = self.pairs.load(Ordering::Relaxed).to_le_bytes().to_vec();
        // The driver has read it, and need not do so again: it may have been made up of a name.
        bytes.extend(self.mac);
        Payload { kind: NAME, version: VERSION, bytes }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let invalid = |reason| RestoreError::Invalid { kind: NAME, reason };
        let bytes = <[u8; 8]>::try_from(payload.expect(NAME, VERSION)?)
            .map_err(|_| invalid("it is not 8 bytes long"))?;
        let [low, high, mac @ ..] = bytes;
        let pairs = u16::from_le_bytes([low, high]);
        if !(1..=self.taps.len()).contains(&usize::from(pairs)) {
            return Err(invalid("it uses more queue pairs than this card has"));
        }
        self.pairs.store(pairs, Ordering::Relaxed);
        if !self.keeps_mac {
            self.mac = mac;
        }
        Ok(())
    }
}

/// Makes the kernel deliver frames to the first `pairs` of `taps` and not to the others, which the
/// driver does not look at (§ 5.1.6.5.5).
fn enable_pairs(taps: &[Tap], pairs: u16) -> io::Result<()> {
    (0..).zip(taps).try_for_each(|(index, tap): (u16, &Tap)| tap.set_enabled(index < pairs))
}

/// TUN_F_* bits: what the kernel may leave to a driver that agreed on `negotiated`. A bit without
/// the one that it needs (§ 5.1.3.1) counts as not negotiated.
fn offloads(negotiated: u64) -> u32 {
    let bit = |feature: u64, bit: u32| if negotiated & feature != 0 { bit } else { 0 };
    let segments = bit(feature::GUEST_TSO4, libc::TUN_F_TSO4)
        | bit(feature::GUEST_TSO6, libc::TUN_F_TSO6)
        | bit(feature::GUEST_UFO, libc::TUN_F_UFO);
    let ecn = if segments & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) != 0 {
        bit(feature::GUEST_ECN, libc::TUN_F_TSO_ECN)
    } else {
        0
    };
    match bit(feature::GUEST_CSUM, libc::TUN_F_CSUM) {
        0 => 0,
        csum => csum | segments | ecn,
    }
}

/// Frames that got lost, logged when their number doubles.
struct Drops {
    what: &'static str,
    count: u64,
}

impl Drops {
    fn new(what: &'static str) -> Drops {
        Drops { what, count: 0 }
    }

    fn count(&mut self, err: &io::Error) {
        self.count += 1;
        if self.count.is_power_of_two() {
            tracing::debug!(%err, what = self.what, dropped = self.count, "frame dropped");
        }
    }
}

/// The worker of one queue pair.
struct PairWorker {
    tap: Tap,
    mergeable: bool,
    largest: u64,
    limits: NetLimits,
    metrics: Arc<NetMetrics>,
    rx: Option<Receiver>,
    tx: Option<Sender>,
    service: Option<Box<Service>>,
    /// Where the service goes when the last queue stops.
    paused: mpsc::Sender<Box<Service>>,
}

impl PairWorker {
    fn receive(&mut self, reactor: &mut dyn Reactor) {
        if let Some(rx) = &mut self.rx {
            rx.on_kick(self.service.as_deref_mut(), reactor);
        }
        self.look_after_service(reactor);
    }

    fn send(&mut self, reactor: &mut dyn Reactor) {
        if let Some(tx) = &mut self.tx {
            tx.send(self.service.as_deref_mut(), reactor);
        }
        self.look_after_service(reactor);
    }

    /// Hands over what the service has for the guest, and has its clock looked at in time.
    fn look_after_service(&mut self, reactor: &mut dyn Reactor) {
        if self.service.as_mut().is_some_and(|service| service.touched()) {
            self.run_service(reactor);
        }
    }

    fn run_service(&mut self, reactor: &mut dyn Reactor) {
        let (Some(service), Some(rx)) = (&mut self.service, &mut self.rx) else { return };
        let mut next = service.tick();
        if service.frame().is_some() {
            rx.receive(Some(service), reactor);
            next = service.tick();
        }
        if let Some(delay) = next {
            // There is one timer for both.
            let delay = if rx.waits() { delay.min(PATIENCE) } else { delay };
            reactor.set_timer(delay.max(SERVICE_TICK));
        }
    }
}

/// How often the service's clock is looked at, at most.
const SERVICE_TICK: Duration = Duration::from_millis(5);

/// Receive queues have even indices, transmit queues odd ones.
fn is_receive(index: u16) -> bool {
    index.is_multiple_of(2)
}

impl Worker for PairWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, reactor: &mut dyn Reactor) {
        let tap = self.tap.clone();
        if is_receive(index) {
            let (mergeable, largest) = (self.mergeable, self.largest);
            let metrics = Arc::clone(&self.metrics);
            let mut rx = Receiver::new(queue, index, tap, mergeable, largest, metrics, reactor);
            rx.set_limit(self.limits.received.clone());
            self.rx = Some(rx);
        } else {
            self.tx = Some(Sender::new(
                queue,
                index,
                tap,
                self.limits.sent.clone(),
                Arc::clone(&self.metrics),
            ));
        }
    }

    fn stop_queue(&mut self, index: u16, reactor: &mut dyn Reactor) -> Option<QueueState> {
        let state = if is_receive(index) {
            self.rx.take().map(|rx| rx.stop(reactor))
        } else {
            self.tx.take().map(|tx| tx.stop(reactor))
        };
        if self.rx.is_none()
            && self.tx.is_none()
            && let Some(service) = self.service.take()
        {
            // Without a device there is nobody who could go on.
            let _ = self.paused.send(service);
        }
        Some(state.unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        if is_receive(index) {
            self.receive(reactor);
        } else {
            self.send(reactor);
        }
    }

    fn on_event(&mut self, token: u32, reactor: &mut dyn Reactor) {
        // The token is the index of the queue that waits.
        let service = self.service.as_deref_mut();
        if token.is_multiple_of(2) {
            if let Some(rx) = &mut self.rx {
                rx.on_readable(service, reactor);
            }
        } else if let Some(tx) = &mut self.tx {
            tx.on_writable(service, reactor);
        }
        self.look_after_service(reactor);
    }

    fn on_timer(&mut self, reactor: &mut dyn Reactor) {
        if let Some(rx) = &mut self.rx {
            rx.on_timer(self.service.as_deref_mut(), reactor);
        }
        self.run_service(reactor);
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        let (traffic, limit) = match (message, &mut self.service) {
            (Message::RateLimit(traffic, limit), _) => (traffic, limit),
            (Message::Metadata(contents), Some(service)) => return service.set_contents(contents),
            _ => return,
        };
        self.limits.set(traffic, limit.clone());
        match (traffic, &mut self.rx, &mut self.tx) {
            (Traffic::Received, Some(rx), _) => {
                rx.set_limit(limit);
                self.receive(reactor);
            }
            (Traffic::Sent, _, Some(tx)) => {
                tx.set_limit(limit);
                self.send(reactor);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
