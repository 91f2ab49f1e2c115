//! TCP behind the service's address, and connections whose requests are answered.
//!
//! ARP is done by hand: the guest is the one neighbour there is, and its address is in each of its
//! frames.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration as StackDuration, Instant as StackInstant};
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::http::{self, LONGEST};
use super::{ARP, ARP_PACKET, CONNECTIONS, ETHERNET, IPV4, OUTBOUND, Options};
use crate::virtio::net::{HEADER, MmdsMetrics};

const PORT: u16 = 80;
/// Bytes on their way to the guest, of one connection.
const SENDING: usize = 8192;
/// Largest packet in bytes, where the card can do it.
const MTU: u16 = 1500;
/// How long the guest may leave what was sent unacknowledged.
const TIMEOUT: StackDuration = StackDuration::from_secs(20);
/// A connection on which nothing happened for so long may have to go for a new one.
const IDLE: Duration = Duration::from_secs(5);

/// Where packets come from and go to.
struct Wire {
    /// The IP packet that is being received.
    inbound: Vec<u8>,
    /// Frames with header, for the guest.
    outbound: VecDeque<Vec<u8>>,
    mtu: usize,
    ours: [u8; 6],
    /// The guest's address, as of its latest frame.
    guest: [u8; 6],
}

impl Wire {
    fn is_full(&self) -> bool {
        self.outbound.len() >= OUTBOUND
    }
}

struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// Room for one packet to the guest.
struct Room<'a> {
    outbound: &'a mut VecDeque<Vec<u8>>,
    ours: [u8; 6],
    guest: [u8; 6],
}

impl phy::TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = started(self.guest, self.ours, IPV4, len);
        let start = frame.len();
        frame.resize(start + len, 0);
        let result = write(&mut frame[start..]);
        self.outbound.push_back(frame);
        result
    }
}

/// True if an IPv4 packet asks for a connection: of SYN and ACK (RFC 9293 § 3.1) it has SYN alone.
fn opens(packet: &[u8]) -> bool {
    let header = packet.first().map_or(0, |byte| usize::from(byte & 15) * 4);
    packet.get(header + 13).is_some_and(|flags| flags & 0x12 == 2)
}

/// Header of the card and of Ethernet, with room for `len` bytes.
fn started(to: [u8; 6], from: [u8; 6], kind: [u8; 2], len: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER as usize + ETHERNET + len);
    // Whole packets with their checksums: nothing to be said about them.
    frame.resize(HEADER as usize, 0);
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind);
    frame
}

impl phy::Device for Wire {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _now: StackInstant) -> Option<(Received<'_>, Room<'_>)> {
        if self.inbound.is_empty() {
            return None;
        }
        let Wire { inbound, outbound, ours, guest, .. } = self;
        Some((Received(inbound), Room { outbound, ours: *ours, guest: *guest }))
    }

    fn transmit(&mut self, _now: StackInstant) -> Option<Room<'_>> {
        if self.is_full() {
            return None;
        }
        Some(Room { outbound: &mut self.outbound, ours: self.ours, guest: self.guest })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // What the guest sends never crossed a wire, and may have its checksums left to the device.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A connection, or the one that waits for its guest.
struct Connection {
    handle: SocketHandle,
    /// The answer, and how much of it the socket has.
    answer: Vec<u8>,
    given: usize,
    /// There is nothing to come behind the answer.
    last: bool,
    /// When something happened last, and what was there then.
    active: Instant,
    seen: (State, usize, usize),
}

/// The service's end of TCP.
pub(super) struct Stack {
    options: Options,
    contents: Arc<Value>,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    epoch: Instant,
    serial: u64,
    metrics: Arc<MmdsMetrics>,
}

impl Stack {
    pub(super) fn new(
        options: Options,
        contents: Arc<Value>,
        mac: [u8; 6],
        mtu: u16,
        metrics: Arc<MmdsMetrics>,
    ) -> Stack {
        let mut ours = mac;
        // Another one than the guest's, as local as can be.
        ours[0] = (ours[0] & !1) | 2;
        ours[5] ^= 0x80;
        let mut wire = Wire {
            inbound: Vec::with_capacity(super::LONGEST_FRAME),
            outbound: VecDeque::new(),
            mtu: mtu.min(MTU).into(),
            ours,
            guest: mac,
        };
        let epoch = Instant::now();
        let config = Config::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut wire, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // The whole internet is the guest, and next door. There is room for one.
            let _ = addresses.push(IpCidr::new(options.address.into(), 0));
        });
        let sockets = SocketSet::new(Vec::new());
        let connections = Vec::new();
        Stack {
            options,
            contents,
            wire,
            interface,
            sockets,
            connections,
            epoch,
            serial: 0,
            metrics,
        }
    }

    pub(super) fn set_contents(&mut self, contents: Arc<Value>) {
        self.contents = contents;
    }

    /// Takes an Ethernet frame, which is for the service.
    pub(super) fn receive(&mut self, frame: &[u8], now: Instant) {
        let (Some(from), Some(packet)) = (frame.get(6..12), frame.get(ETHERNET..)) else { return };
        if self.wire.is_full() {
            return;
        }
        self.wire.guest.copy_from_slice(from);
        if frame[12..ETHERNET] == ARP {
            return self.introduce(packet);
        }
        if opens(packet) {
            self.make_room(now);
        }
        self.wire.inbound.extend_from_slice(packet);
        let at = self.at(now);
        self.interface.poll_ingress_single(at, &mut self.wire, &mut self.sockets);
        self.wire.inbound.clear();
        self.work(now);
    }

    /// Answers an ARP request.
    fn introduce(&mut self, request: &[u8]) {
        let Some(request) = request.get(..ARP_PACKET) else { return };
        // Ethernet and IPv4, with addresses of 6 and 4 bytes.
        if request[..6] != [0, 1, 8, 0, 6, 4] {
            return;
        }
        let (ours, guest) = (self.wire.ours, self.wire.guest);
        let mut frame = started(guest, ours, ARP, ARP_PACKET);
        frame.extend(&request[..6]);
        frame.extend([0, 2]);
        frame.extend(ours);
        frame.extend(self.options.address.octets());
        // Whoever asked, by hardware and by protocol address.
        frame.extend(&request[8..18]);
        self.wire.outbound.push_back(frame);
    }

    /// The next frame for the guest.
    pub(super) fn frame(&self) -> Option<&[u8]> {
        self.wire.outbound.front().map(Vec::as_slice)
    }

    /// The next frame is the guest's.
    pub(super) fn delivered(&mut self, now: Instant) {
        let was_full = self.wire.is_full();
        self.wire.outbound.pop_front();
        if was_full || self.wire.outbound.is_empty() {
            self.work(now);
        }
    }

    /// Does what is due. Returns when something is next, if nothing comes; that is up to the guest
    /// while it does not take what it is sent.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Duration> {
        self.work(now);
        if self.wire.is_full() || self.connections.is_empty() {
            return None;
        }
        let delay = self.interface.poll_delay(self.at(now), &self.sockets)?;
        Some(Duration::from_micros(delay.total_micros()))
    }

    fn at(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.epoch).as_micros();
        StackInstant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    /// Serves connections and sends what that led to.
    fn work(&mut self, now: Instant) {
        let at = self.at(now);
        let mut index = 0;
        while index < self.connections.len() {
            if self.serve(index, now) {
                index += 1;
            } else {
                let gone = self.connections.swap_remove(index);
                self.metrics.connections_destroyed.count();
                self.sockets.remove(gone.handle);
            }
        }
        self.interface.poll_egress(at, &mut self.wire, &mut self.sockets);
    }

    /// Does what can be done for a connection. False if it is over.
    fn serve(&mut self, index: usize, now: Instant) -> bool {
        let Some(connection) = self.connections.get_mut(index) else { return false };
        let socket = self.sockets.get_mut::<Socket>(connection.handle);
        match socket.state() {
            // Nobody else uses the guest's ports: there is nothing to be waited for.
            State::Closed | State::TimeWait => return false,
            State::Listen => return true,
            _ => {}
        }
        if connection.seen == (socket.state(), socket.recv_queue(), socket.send_queue()) {
            // Half a request is not read again with each packet of others.
            return true;
        }
        loop {
            let rest = connection.answer.get(connection.given..).unwrap_or_default();
            if !rest.is_empty() {
                match socket.send_slice(rest) {
                    Ok(count) => connection.given += count,
                    Err(_) => return false,
                }
                if connection.given < connection.answer.len() {
                    break;
                }
                connection.answer = Vec::new();
            }
            if connection.last {
                socket.close();
                break;
            }
            let mut received = [0; LONGEST];
            let Ok(len @ 1..) = socket.peek_slice(&mut received) else { break };
            self.serial += 1;
            let answer =
                http::answer(&self.options, &self.contents, now, self.serial, &received[..len]);
            let Some(answer) = answer else { break };
            // Of what cannot be read nothing is looked at again.
            let consumed = if answer.consumed == 0 { len } else { answer.consumed };
            let _ = socket.recv_slice(&mut received[..consumed]);
            connection.answer = answer.bytes;
            connection.given = 0;
            connection.last = answer.close;
            self.metrics.rx_count.count();
        }
        // What is not all there when the guest has said all it has to say never will be.
        if socket.state() == State::CloseWait && connection.answer.is_empty() {
            socket.close();
        }
        connection.seen = (socket.state(), socket.recv_queue(), socket.send_queue());
        connection.active = now;
        true
    }

    /// Has a socket listen, if there is one to be had.
    fn make_room(&mut self, now: Instant) {
        let listens =
            |c: &Connection| self.sockets.get::<Socket>(c.handle).state() == State::Listen;
        if self.connections.iter().any(listens) {
            return;
        }
        if self.connections.len() >= CONNECTIONS {
            let idle = |c: &&Connection| now.saturating_duration_since(c.active) >= IDLE;
            let all = self.connections.iter();
            let Some(stalest) = all.filter(idle).min_by_key(|c| c.active).map(|c| c.handle) else {
                return;
            };
            self.connections.retain(|connection| connection.handle != stalest);
            self.metrics.connections_destroyed.count();
            self.sockets.remove(stalest);
        }
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(LONGEST), buffer(SENDING));
        socket.set_timeout(Some(TIMEOUT));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        // A new socket with a port can listen.
        if socket.listen(PORT).is_ok() {
            self.metrics.connections_created.count();
            self.connections.push(Connection {
                handle: self.sockets.add(socket),
                answer: Vec::new(),
                given: 0,
                last: false,
                active: now,
                seen: (State::Listen, 0, 0),
            });
        }
    }

    /// Asserts that what is held is bounded.
    #[cfg(any(test, feature = "conformance"))]
    pub(super) fn check(&self) {
        assert!(self.connections.len() <= CONNECTIONS);
        // One answer may come on top, to what arrived when there was room for one.
        assert!(self.wire.outbound.len() <= OUTBOUND + 1);
    }

    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.check();
        let state = |c: &Connection| self.sockets.get::<Socket>(c.handle).state();
        self.connections.iter().filter(|c| state(c) != State::Listen).count()
    }
}
