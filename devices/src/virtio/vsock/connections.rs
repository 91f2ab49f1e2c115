//! All connections of a device: who is who, who has something for the guest, who waits too long.
//!
//! The guest decides how many packets need an answer, and how slowly it takes answers. So answers
//! are not queued: each connection knows what it owes (a few flags), and it is asked when there is
//! room, in turn. Only refusals of what belongs to no connection are a queue; when that is full,
//! no more packets are taken from the guest.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::connection::{Connection, Fate, Line, State};
use super::host::Listener;
use super::metrics::VsockMetrics;
use super::packet::{FromGuest, HOST_CID, Op, Ports, ToGuest};
use super::reset::TransportReset;
use super::rx::Receiver;
use crate::virtio::device::{BATCH, Call, Fault, Reactor};
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Chain, Queue};

/// Connections of one machine.
pub(super) const MOST: usize = 1023;

/// Refusals that wait for the guest.
pub(super) const MOST_REFUSALS: usize = 256;

/// Connections that this process wants and that have not begun.
const MOST_CALLS: usize = 16;

/// Connections that are accepted in a row.
const ACCEPT_BATCH: usize = 64;

/// What [`Reactor::watch`] calls the listening socket; connections go by their number.
pub(super) const LISTENER: u32 = 4095;

/// Ports of the host's side for programs that connect: from here, up to twice as much.
const FIRST_PORT: u32 = 1 << 30;

/// How often waiting connections are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long a program may take to say what it wants, the guest to answer, and a listener to have
/// room: 2 s.
pub(super) const ANSWER_TICKS: u16 = 40;
/// How long the guest may take to agree that a connection is over: 8 s, as Linux waits.
pub(super) const CLOSE_TICKS: u16 = 160;

/// Bytes of a connection that may wait for the host, while there are few.
const BUFFER: u32 = 256 << 10;
/// The same while there are many.
const SMALL_BUFFER: u32 = 64 << 10;
/// From here on there are many.
const MANY: usize = 128;

#[derive(Debug)]
pub(super) struct Connections {
    listener: Listener,
    guest: u64,
    /// By number; empty places are in `free`.
    places: Vec<Option<Connection>>,
    free: Vec<u16>,
    by_ports: HashMap<Ports, u16>,
    /// Who has something for the guest, in turn, and whether a place is in it already.
    ready: VecDeque<u16>,
    queued: Vec<bool>,
    refusals: VecDeque<ToGuest>,
    next_port: u32,
    /// Programs may be waiting to be accepted.
    acceptable: bool,
    /// Connections that this process wants, which begin when those of programs do.
    calls: VecDeque<Call>,
    /// A timer is set.
    ticking: bool,
    /// How far the guest is with closing what is gone.
    pub(super) reset: TransportReset,
    metrics: Arc<VsockMetrics>,
}

impl Connections {
    pub(super) fn new(listener: Listener, guest: u64, metrics: Arc<VsockMetrics>) -> Connections {
        Connections {
            listener,
            guest,
            places: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            queued: Vec::new(),
            refusals: VecDeque::new(),
            next_port: FIRST_PORT,
            acceptable: false,
            calls: VecDeque::new(),
            ticking: false,
            reset: TransportReset::default(),
            metrics,
        }
    }

    pub(super) fn guest(&self) -> u64 {
        self.guest
    }

    /// Closes all connections. None may be watched.
    pub(super) fn clear(&mut self) {
        let open = self.places.iter().flatten().count() as u64;
        self.metrics.conns_killed.add(open);
        self.metrics.conns_removed.add(open);
        self.places.clear();
        self.free.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.queued.clear();
        self.refusals.clear();
        self.reset = TransportReset::default();
    }

    /// The machine ended: the listening socket's file goes, unless it is to stay.
    pub(super) fn end(&mut self) {
        self.listener.end();
    }

    /// A worker begins, perhaps after a pause.
    pub(super) fn start(&mut self, reactor: &mut dyn Reactor) -> io::Result<()> {
        self.ticking = false;
        self.acceptable = true;
        reactor.watch(self.listener.fd(), LISTENER, crate::virtio::device::Interest::Readable)?;
        for place in 0..self.places.len() as u16 {
            if let Some(connection) = self.at(place) {
                connection.watched = None;
            }
            self.settle(place, Fate::Stays, reactor);
        }
        if self.reset.holds() || !self.calls.is_empty() {
            self.tick_later(reactor);
        }
        Ok(())
    }

    /// A worker ends, perhaps for a pause.
    pub(super) fn stop(&mut self, reactor: &mut dyn Reactor) {
        reactor.unwatch(self.listener.fd());
        for connection in self.places.iter_mut().flatten() {
            if let (Some(fd), Some(_)) = (connection.fd(), connection.watched.take()) {
                reactor.unwatch(fd);
            }
        }
    }

    /// Closes all connections and has the guest told. None may be watched.
    pub(super) fn lose(&mut self) {
        self.clear();
        self.reset = TransportReset::new();
    }

    /// Closes all connections and has the guest told.
    pub(super) fn reset_transport(&mut self, reactor: &mut dyn Reactor) {
        self.remove_all(reactor);
        self.lose();
        self.tick_later(reactor);
    }

    /// Goes on telling the guest, through its event queue. Returns whether others are to wait.
    pub(super) fn advance_reset(
        &mut self,
        events: &mut Queue,
        chain: &mut Chain,
        reactor: &mut dyn Reactor,
    ) -> Result<bool, Fault> {
        if self.reset.advance(events, chain)? {
            // What began when nobody waited any more.
            self.remove_all(reactor);
            self.tick_later(reactor);
        }
        Ok(self.reset.holds())
    }

    fn remove_all(&mut self, reactor: &mut dyn Reactor) {
        for place in 0..self.places.len() as u16 {
            self.remove(place, reactor);
        }
    }

    fn at(&mut self, place: u16) -> Option<&mut Connection> {
        self.places.get_mut(usize::from(place))?.as_mut()
    }

    /// A place for a connection. Where there is none, the program that has not said for longest what
    /// it wants gives up its own.
    fn allocate(&mut self, reactor: &mut dyn Reactor) -> Option<u16> {
        if self.free.is_empty() && self.places.len() < MOST {
            self.places.push(None);
            self.queued.push(false);
            self.free.push(self.places.len() as u16 - 1);
        }
        if self.free.is_empty() {
            let silent = (0..).zip(&self.places).filter_map(|(place, connection)| {
                let connection = connection.as_ref().filter(|c| c.state == State::Line)?;
                Some((connection.patience, place))
            });
            let (_, place) = silent.min()?;
            self.remove(place, reactor);
        }
        self.free.pop()
    }

    fn remove(&mut self, place: u16, reactor: &mut dyn Reactor) {
        self.close(place, reactor);
        let Some(connection) = self.places.get_mut(usize::from(place)).and_then(Option::take)
        else {
            return;
        };
        if self.by_ports.get(&connection.ports) == Some(&place) {
            self.by_ports.remove(&connection.ports);
        }
        self.free.push(place);
        self.metrics.conns_removed.count();
    }

    /// Closes the socket at `place`, which keeps its connection.
    fn close(&mut self, place: u16, reactor: &mut dyn Reactor) {
        let Some(connection) = self.at(place) else { return };
        if let (Some(fd), Some(_)) = (connection.fd(), connection.watched.take()) {
            reactor.unwatch(fd);
        }
        connection.close();
    }

    /// Bytes that may wait for the host in a new connection.
    fn buffer(&self) -> u32 {
        if self.places.len() - self.free.len() < MANY { BUFFER } else { SMALL_BUFFER }
    }

    /// Does what follows from what became of the connection at `place`.
    fn settle(&mut self, place: u16, fate: Fate, reactor: &mut dyn Reactor) {
        let Some(connection) = self.at(place) else { return };
        match fate {
            Fate::Stays | Fate::Takes => {}
            Fate::Gone => return self.remove(place, reactor),
            Fate::Reset => {
                self.metrics.conns_killed.count();
                let Some(connection) = self.at(place) else { return };
                connection.state = State::Resetting;
                connection.patience = 0;
                self.close(place, reactor);
            }
            Fate::Drain => {
                // The guest may use its port again.
                connection.state = State::Draining;
                connection.patience = 0;
                let (ports, refusal) = (connection.ports, connection.header(Op::Reset));
                self.by_ports.remove(&ports);
                self.refusals.push_back(refusal);
            }
        }
        let Some(connection) = self.at(place) else { return };
        let wanted = connection.interest();
        let waits = connection.patience > 0 || connection.is_stalled();
        if connection.wants_to_send() {
            self.enqueue(place);
        }
        if waits {
            self.tick_later(reactor);
        }
        let Some(connection) = self.at(place) else { return };
        if connection.watched != wanted
            && let Some(fd) = connection.fd()
        {
            if connection.watched.is_some() {
                reactor.unwatch(fd);
            }
            connection.watched = wanted;
            if let Some(interest) = wanted
                && reactor.watch(fd, u32::from(place), interest).is_err()
            {
                connection.watched = None;
                self.settle(place, Fate::Reset, reactor);
            }
        }
    }

    fn enqueue(&mut self, place: u16) {
        if let Some(queued) = self.queued.get_mut(usize::from(place)).filter(|queued| !**queued) {
            *queued = true;
            self.ready.push_back(place);
        }
    }

    fn tick_later(&mut self, reactor: &mut dyn Reactor) {
        if !self.ticking {
            self.ticking = true;
            reactor.set_timer(TICK);
        }
    }

    /// The listening socket or the one at place `token` is ready.
    pub(super) fn on_event(&mut self, token: u32, reactor: &mut dyn Reactor) {
        if token == LISTENER {
            self.acceptable = true;
            return;
        }
        let place = token as u16;
        match self.at(place).map(|connection| connection.state) {
            Some(State::Line) => self.read_line(place, reactor),
            Some(_) => {
                let fate = self.at(place).map_or(Fate::Stays, Connection::on_event);
                self.settle(place, fate, reactor);
            }
            None => {}
        }
    }

    /// Time passed.
    pub(super) fn on_timer(&mut self, reactor: &mut dyn Reactor) {
        self.ticking = false;
        self.reset.tick();
        if self.reset.holds() {
            self.tick_later(reactor);
        }
        for place in 0..self.places.len() as u16 {
            let Some(connection) = self.at(place) else { continue };
            if connection.is_stalled() {
                connection.ask_for_room();
                self.settle(place, Fate::Stays, reactor);
            }
            let Some(connection) = self.at(place).filter(|connection| connection.patience > 0)
            else {
                continue;
            };
            connection.patience -= 1;
            let over = connection.patience == 0;
            let fate = match connection.state {
                State::Connecting => self.connect_again(place, over),
                _ if !over => Fate::Stays,
                State::Line => Fate::Gone,
                // The guest has not heard of it.
                State::Requested if connection.request => Fate::Gone,
                _ => Fate::Reset,
            };
            self.settle(place, fate, reactor);
        }
    }

    /// This process wants a connection. It begins with the next [`Connections::accept`]. One more than there
    /// may be is closed.
    pub(super) fn call(&mut self, call: Call) {
        if self.calls.len() < MOST_CALLS {
            self.calls.push_back(call);
        }
    }

    fn begin(&mut self, call: Call, reactor: &mut dyn Reactor) {
        // The other holders of the socket only pass the message on.
        let Ok(socket) = call.socket.try_clone() else { return };
        let buffer = self.buffer();
        let Some(place) = self.allocate(reactor) else { return };
        self.put(place, Connection::from_host(socket, buffer));
        let ticks = call.patience.as_millis().div_ceil(TICK.as_millis());
        self.request(place, call.port, u16::try_from(ticks).unwrap_or(u16::MAX).max(1), reactor);
    }

    /// Accepts programs that wait. Returns whether there may be more.
    pub(super) fn accept(&mut self, reactor: &mut dyn Reactor) -> bool {
        while let Some(call) = self.calls.pop_front() {
            self.begin(call, reactor);
        }
        for _ in 0..ACCEPT_BATCH {
            if !self.acceptable {
                return false;
            }
            match self.listener.accept() {
                Ok(Some(socket)) => self.welcome(socket, reactor),
                Ok(None) => self.acceptable = false,
                // Others may have closed descriptors by then.
                Err(err) if is_shortage(&err) => {
                    self.tick_later(reactor);
                    return false;
                }
                // Of the one that would have been next: it is gone.
                Err(_) => {}
            }
        }
        self.acceptable
    }

    fn welcome(&mut self, socket: OwnedFd, reactor: &mut dyn Reactor) {
        let buffer = self.buffer();
        // Where there is no place, the socket is closed.
        let Some(place) = self.allocate(reactor) else { return };
        let mut connection = Connection::from_host(socket, buffer);
        connection.patience = ANSWER_TICKS;
        self.put(place, connection);
        self.read_line(place, reactor);
    }

    fn put(&mut self, place: u16, connection: Connection) {
        if let Some(slot) = self.places.get_mut(usize::from(place)) {
            *slot = Some(connection);
            self.metrics.conns_added.count();
        }
    }

    /// The program at `place` may have said which port it wants.
    fn read_line(&mut self, place: u16, reactor: &mut dyn Reactor) {
        let port = match self.at(place).map(|connection| connection.line()) {
            Some(Line::Port(port)) => port,
            Some(Line::Unfinished) => return self.settle(place, Fate::Stays, reactor),
            Some(Line::Nonsense) | None => return self.settle(place, Fate::Gone, reactor),
        };
        self.request(place, port, ANSWER_TICKS, reactor);
    }

    /// The guest is asked to take the connection at `place`, within so many ticks.
    fn request(&mut self, place: u16, port: u32, ticks: u16, reactor: &mut dyn Reactor) {
        let Some(ports) = self.free_port(port) else {
            return self.settle(place, Fate::Gone, reactor);
        };
        if let Some(connection) = self.at(place) {
            connection.ports = ports;
            connection.state = State::Requested;
            connection.request = true;
            connection.patience = ticks;
            self.by_ports.insert(ports, place);
        }
        self.settle(place, Fate::Stays, reactor);
    }

    /// A port of the host's side that has no connection to `guest`.
    fn free_port(&mut self, guest: u32) -> Option<Ports> {
        (0..=MOST).find_map(|_| {
            let ports = Ports { host: self.next_port, guest };
            self.next_port = FIRST_PORT | (self.next_port + 1) & (FIRST_PORT - 1);
            (!self.by_ports.contains_key(&ports)).then_some(ports)
        })
    }

    /// True if another packet may be taken from the guest: what it may have to be told has room.
    pub(super) fn has_room(&self) -> bool {
        self.refusals.len() < MOST_REFUSALS
    }

    /// The guest sent a packet with this much behind its header. There must be
    /// [room](Connections::has_room). Returns the place of the connection that takes its data.
    pub(super) fn packet(
        &mut self,
        header: &FromGuest,
        behind: u64,
        reactor: &mut dyn Reactor,
    ) -> Option<u16> {
        // A driver goes on with the address that it had until it comes to the event that its
        // connections are gone.
        let between_us = header.source == self.guest && header.destination == HOST_CID;
        if !header.stream || !between_us {
            self.refuse(header);
            return None;
        }
        let Some(&place) = self.by_ports.get(&header.ports) else {
            match header.op {
                Some(Op::Request) => self.connect(header, reactor),
                _ => self.refuse(header),
            }
            return None;
        };
        let len = u64::from(header.len);
        let fate = match self.at(place) {
            Some(connection) if len <= behind => connection.packet(header, len),
            _ => Fate::Reset,
        };
        if fate == Fate::Takes {
            return Some(place);
        }
        self.settle(place, fate, reactor);
        None
    }

    /// Passes data on that the connection at `place` takes.
    pub(super) fn pass_on(&mut self, place: u16, data: &mut [IoBuf], reactor: &mut dyn Reactor) {
        if let Some(connection) = self.at(place) {
            connection.pass_on(data);
        }
        self.settle(place, Fate::Stays, reactor);
    }

    fn refuse(&mut self, header: &FromGuest) {
        // An answer to an answer would go on for ever.
        if header.op != Some(Op::Reset) {
            self.refusals.push_back(header.refusal());
            self.metrics.refused_count.count();
        }
    }

    /// The guest wants to reach a program of the host.
    fn connect(&mut self, request: &FromGuest, reactor: &mut dyn Reactor) {
        let buffer = self.buffer();
        let socket = match self.listener.connect(request.ports.host) {
            Ok(socket) => Some(socket),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => None,
            Err(_) => return self.refuse(request),
        };
        let Some(place) = self.allocate(reactor) else { return self.refuse(request) };
        let mut connection = Connection::from_guest(request, socket, buffer);
        if connection.state == State::Connecting {
            connection.patience = ANSWER_TICKS;
        }
        self.put(place, connection);
        self.by_ports.insert(request.ports, place);
        self.settle(place, Fate::Stays, reactor);
    }

    /// Tries again what failed because too many programs waited, for the last time if `last`.
    fn connect_again(&mut self, place: u16, last: bool) -> Fate {
        let Some(port) = self.at(place).map(|connection| connection.ports.host) else {
            return Fate::Stays;
        };
        match self.listener.connect(port) {
            Ok(socket) => {
                if let Some(connection) = self.at(place) {
                    connection.connected(socket);
                }
                Fate::Stays
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock && !last => Fate::Stays,
            Err(_) => Fate::Reset,
        }
    }

    /// Gives the guest what there is for it, as long as it has buffers. Returns whether there is
    /// more that it has buffers for.
    pub(super) fn deliver(
        &mut self,
        rx: &mut Receiver,
        reactor: &mut dyn Reactor,
    ) -> Result<bool, Fault> {
        for _ in 0..BATCH {
            if self.refusals.is_empty() && self.ready.is_empty() {
                return Ok(false);
            }
            if !rx.hold(1)? {
                return Ok(false);
            }
            if let Some(refusal) = self.refusals.pop_front() {
                rx.put(&refusal);
            } else if let Some(place) = self.ready.pop_front() {
                if let Some(queued) = self.queued.get_mut(usize::from(place)) {
                    *queued = false;
                }
                let fate = self.serve(place, rx)?;
                self.settle(place, fate, reactor);
            }
        }
        Ok(true)
    }

    /// Gives the guest one packet of the connection at `place`, or a piece of its stream.
    fn serve(&mut self, place: u16, rx: &mut Receiver) -> Result<Fate, Fault> {
        let Some(connection) = self.at(place) else { return Ok(Fate::Stays) };
        if let Some(header) = connection.control() {
            rx.put(&header);
            if connection.state == State::Resetting {
                return Ok(Fate::Gone);
            }
            if connection.waits_for_the_end() && connection.patience == 0 {
                connection.patience = CLOSE_TICKS;
            }
            return Ok(Fate::Stays);
        }
        let most = connection.readable();
        if let (1.., Some(fd)) = (most, connection.fd()) {
            rx.hold(most)?;
            let header = connection.header(Op::Data);
            let result = rx.read(fd, most, &header);
            let failed = |err: &io::Error| {
                !matches!(err.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
            };
            let failed = result.as_ref().is_err_and(failed);
            connection.after_read(result, &header);
            // The guest can begin with it while there is more.
            rx.notify();
            if failed {
                self.metrics.rx_read_fails.count();
            }
        }
        Ok(Fate::Stays)
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.places.iter().flatten().count()
    }
}

fn is_shortage(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
