//! One connection: a Unix socket on one side, ports and credit on the other.
//!
//! ```text
//!   host connects: Line ── CONNECT p ──> Requested ── RESPONSE ──┐
//!   guest connects: (Connecting, while the listener is busy) ────┴─> Open
//!   Open ── the guest is done, and its bytes are not ──> Draining ──> gone
//!     any ── broken, refused, over ──> Resetting ── RST is out ──> gone
//! ```

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::iovec;

use super::packet::{FromGuest, NEITHER, NO_RECEIVE, NO_SEND, Op, Ports, ToGuest};
use crate::virtio::device::Interest;
use crate::virtio::iobuf::IoBuf;

/// Bytes of one connection that are passed to the guest before another has its turn.
pub(super) const PIECE: u64 = 128 << 10;

/// Elements of one sendmsg(2).
const ELEMENTS: usize = 64;

const NOTHING: iovec = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

/// A line that asks for a port is no longer than this, in bytes. The longest sensible one has 19.
const LONGEST_LINE: usize = 32;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A program of the host is to say which port it wants.
    Line,
    /// A program of the host that the guest wants to reach has too many before it.
    Connecting,
    /// The guest is to say whether it takes the connection.
    Requested,
    /// Bytes flow.
    Open,
    /// The guest is through with it, the host has not taken all of its bytes.
    Draining,
    /// The guest is to be told that it is over; nothing else is left.
    Resetting,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Fate {
    /// It goes on.
    Stays,
    /// It goes on, and takes the data of the packet by [`Connection::pass_on`].
    Takes,
    /// It is over, and the guest has to be told.
    Reset,
    /// It is over for the guest; the host still has bytes to take.
    Drain,
    /// It is over, and all know.
    Gone,
}

/// What a program of the host wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Not said yet.
    Unfinished,
    /// This port of the guest.
    Port(u32),
    /// Something else, or nothing any more.
    Nonsense,
}

#[derive(Debug)]
pub(super) struct Connection {
    socket: Option<OwnedFd>,
    pub(super) ports: Ports,
    pub(super) state: State,
    /// What the io thread waits for on the socket.
    pub(super) watched: Option<Interest>,
    /// Ticks until it is given up; 0 if nothing is waited for.
    pub(super) patience: u16,
    /// There may be bytes to be read, or their end.
    readable: bool,
    /// REQUEST has not been sent.
    pub(super) request: bool,
    /// RESPONSE has not been sent.
    response: bool,
    /// The guest is to learn how much room there is.
    update: bool,
    /// The guest is to be asked for room, or was and has not given any.
    ask: bool,
    asked: bool,
    /// What guest and host do not do any more, and what the guest was told of the latter.
    guest_shutdown: u32,
    host_shutdown: u32,
    told_shutdown: u32,
    /// The guest's room (virtio 1.3 § 5.10.6.3), and what was sent to it.
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    /// The room here; what came, what the host took, and what the guest was told of that.
    buffer: u32,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
    /// Bytes of the guest's that the host has not taken, at most `buffer`.
    backlog: VecDeque<u8>,
}

impl Connection {
    fn new(socket: Option<OwnedFd>, state: State, ports: Ports, buffer: u32) -> Connection {
        Connection {
            socket,
            ports,
            state,
            watched: None,
            patience: 0,
            readable: true,
            request: false,
            response: false,
            update: false,
            ask: false,
            asked: false,
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            buffer,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            told: Wrapping(0),
            backlog: VecDeque::new(),
        }
    }

    /// A program of the host came. Up to `buffer` bytes of the guest's may wait for it.
    pub(super) fn from_host(socket: OwnedFd, buffer: u32) -> Connection {
        Connection::new(Some(socket), State::Line, Ports::default(), buffer)
    }

    /// The guest asks for a connection; without a socket it is to be tried again.
    pub(super) fn from_guest(
        request: &FromGuest,
        socket: Option<OwnedFd>,
        buffer: u32,
    ) -> Connection {
        let state = if socket.is_some() { State::Open } else { State::Connecting };
        let mut connection = Connection::new(socket, state, request.ports, buffer);
        connection.response = true;
        connection.take_credit(request);
        connection
    }

    /// The listener has room now.
    pub(super) fn connected(&mut self, socket: OwnedFd) {
        self.socket = Some(socket);
        self.state = State::Open;
        self.patience = 0;
    }

    pub(super) fn fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Closes the socket, which nobody may watch any more.
    pub(super) fn close(&mut self) {
        self.socket = None;
        self.backlog = VecDeque::new();
    }

    /// What has to be watched.
    pub(super) fn interest(&self) -> Option<Interest> {
        self.socket
            .as_ref()
            .map(|_| if self.backlog.is_empty() { Interest::Readable } else { Interest::Both })
    }

    /// Reads the line that a program of the host begins with, and nothing of what follows it.
    pub(super) fn line(&self) -> Line {
        let Some(fd) = self.fd() else { return Line::Nonsense };
        let mut bytes = [0; LONGEST_LINE];
        let seen = match receive(fd, &mut bytes, libc::MSG_PEEK) {
            Ok(seen) => seen,
            Err(err) if is_temporary(&err) => return Line::Unfinished,
            Err(_) => return Line::Nonsense,
        };
        match bytes[..seen].iter().position(|&byte| byte == b'\n') {
            Some(end) => {
                let port = asked_port(&bytes[..end]);
                match receive(fd, &mut bytes[..=end], 0) {
                    Ok(_) => port.map_or(Line::Nonsense, Line::Port),
                    Err(_) => Line::Nonsense,
                }
            }
            None if seen == LONGEST_LINE || hung_up(fd) => Line::Nonsense,
            None if seen == 0 => Line::Nonsense,
            None => Line::Unfinished,
        }
    }

    /// Room that the guest has, in bytes. Nonsense counts as none.
    fn credit(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    fn take_credit(&mut self, header: &FromGuest) {
        self.guest_buffer = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            (self.ask, self.asked) = (false, false);
        }
    }

    /// True if there may be something to be read that the guest has no room for. It says so by itself
    /// when it has; only one that does not, for long, is asked.
    pub(super) fn is_stalled(&self) -> bool {
        self.may_read() && self.credit() == 0 && !self.asked
    }

    /// Asks the guest for room.
    pub(super) fn ask_for_room(&mut self) {
        self.ask = true;
    }

    /// A packet of this connection came, with `len` bytes of data.
    pub(super) fn packet(&mut self, header: &FromGuest, len: u64) -> Fate {
        self.take_credit(header);
        match (self.state, header.op) {
            (_, Some(Op::Reset)) if self.backlog.is_empty() => Fate::Gone,
            // It was sent in good order before.
            (State::Open, Some(Op::Reset)) => {
                self.guest_shutdown = NEITHER;
                Fate::Drain
            }
            (State::Resetting, _) => Fate::Stays,
            (State::Requested, Some(Op::Response)) if !self.request => self.accepted(),
            (State::Open, Some(Op::Data)) => self.admit(len),
            (State::Open, Some(Op::Shutdown)) => self.shut_down(header.flags),
            (State::Open, Some(Op::CreditUpdate)) => Fate::Stays,
            (State::Open, Some(Op::CreditRequest)) => {
                self.update = true;
                Fate::Stays
            }
            _ => Fate::Reset,
        }
    }

    /// The guest took the connection.
    fn accepted(&mut self) -> Fate {
        self.state = State::Open;
        self.patience = 0;
        let Some(fd) = self.fd() else { return Fate::Reset };
        let answer = format!("OK {}\n", self.ports.host);
        match send(fd, &[answer.as_bytes()]) {
            Ok(sent) if sent == answer.len() => Fate::Stays,
            // Nothing was written before, so there is room for a few bytes.
            Ok(_) => Fate::Reset,
            Err(err) if is_temporary(&err) => Fate::Reset,
            // It does not listen, but may have said something.
            Err(_) => {
                self.host_left();
                Fate::Stays
            }
        }
    }

    /// The guest sends `len` bytes: has it the room, and does it still send?
    fn admit(&mut self, len: u64) -> Fate {
        let waiting = u64::from((self.received - self.forwarded).0);
        if self.guest_shutdown & NO_SEND != 0 || waiting + len > u64::from(self.buffer) {
            return Fate::Reset;
        }
        // It fits, as it is within the buffer.
        self.received += len as u32;
        Fate::Takes
    }

    /// Passes data on that was admitted, and keeps what the host does not take.
    pub(super) fn pass_on(&mut self, parts: &mut [IoBuf]) {
        if self.socket.is_none() {
            // A packet behind these broke the rules.
            return;
        }
        let mut rest = parts;
        while self.backlog.is_empty() && self.host_shutdown & NO_RECEIVE == 0 && !rest.is_empty() {
            let Some(socket) = &self.socket else { break };
            match send_parts(socket, rest) {
                Ok(sent) => {
                    self.count_forwarded(sent);
                    rest = advance(rest, sent);
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.host_left(),
            }
        }
        for part in rest {
            let len = part.len() as usize;
            if self.host_shutdown & NO_RECEIVE != 0 {
                // Nobody takes it. The guest is told, and what is on its way may come.
                self.count_forwarded(len);
                continue;
            }
            let start = self.backlog.len();
            self.backlog.resize(start + len, 0);
            let (front, back) = self.backlog.as_mut_slices();
            let split = front.len();
            let read = part.read(&mut front[start.min(split)..]);
            part.read(&mut back[(start + read).saturating_sub(split)..]);
        }
    }

    fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded += bytes as u32;
        // Half of the room is left when this is said, so that the guest need not stop.
        self.update |= (self.forwarded - self.told).0 >= self.buffer / 2;
    }

    /// The host does not receive any more.
    fn host_left(&mut self) {
        self.host_shutdown |= NO_RECEIVE;
        let lost = std::mem::take(&mut self.backlog).len();
        self.count_forwarded(lost);
    }

    /// The guest will not receive, or not send, any more.
    fn shut_down(&mut self, flags: u32) -> Fate {
        self.guest_shutdown |= flags & NEITHER;
        if self.guest_shutdown == NEITHER {
            return if self.backlog.is_empty() { Fate::Reset } else { Fate::Drain };
        }
        if let Some(fd) = self.fd() {
            if self.guest_shutdown & NO_RECEIVE != 0 {
                shut(fd, libc::SHUT_RD);
            }
            if self.guest_shutdown & NO_SEND != 0 && self.backlog.is_empty() {
                shut(fd, libc::SHUT_WR);
            }
        }
        Fate::Stays
    }

    /// Something happened to the socket.
    pub(super) fn on_event(&mut self) -> Fate {
        self.readable = true;
        if !self.backlog.is_empty() {
            self.drain();
        }
        if self.state == State::Draining && self.backlog.is_empty() {
            return Fate::Gone;
        }
        // Nothing is read any more that would end.
        let deaf = self.guest_shutdown & NO_RECEIVE != 0 || self.host_shutdown & NO_SEND != 0;
        if deaf && self.state == State::Open && self.fd().is_some_and(hung_up) {
            self.end(NEITHER);
        }
        Fate::Stays
    }

    /// Passes on what waits for the host, as far as it takes it.
    fn drain(&mut self) {
        while !self.backlog.is_empty() {
            let Some(fd) = self.fd() else { return };
            let (front, back) = self.backlog.as_slices();
            match send(fd, &[front, back]) {
                Ok(sent) => {
                    self.backlog.drain(..sent);
                    self.count_forwarded(sent);
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.host_left(),
            }
        }
        self.backlog = VecDeque::new();
        if let Some(fd) = self.fd().filter(|_| self.guest_shutdown & NO_SEND != 0) {
            shut(fd, libc::SHUT_WR);
        }
    }

    /// The host does not do `what` any more.
    fn end(&mut self, what: u32) {
        self.host_shutdown |= what;
        if what & NO_RECEIVE != 0 {
            self.host_left();
        }
    }

    /// A read ended with `result`, where `header` was in front of what was read.
    pub(super) fn after_read(&mut self, result: io::Result<u64>, header: &ToGuest) {
        match result {
            Ok(0) => {
                self.readable = false;
                // A program that is gone does not receive either.
                let gone = self.fd().is_none_or(hung_up);
                self.end(if gone { NEITHER } else { NO_SEND });
            }
            Ok(read) => {
                self.sent += read as u32;
                self.told(header);
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.readable = false;
                self.end(NEITHER);
            }
        }
    }

    /// How many bytes may be read for the guest now: 0 if there are none, or no room.
    pub(super) fn readable(&self) -> u64 {
        if self.may_read() { u64::from(self.credit()).min(PIECE) } else { 0 }
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.state == State::Open
            && self.guest_shutdown & NO_RECEIVE == 0
            && self.host_shutdown & NO_SEND == 0
    }

    /// True if there is something for the guest.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.state {
            State::Resetting => true,
            State::Requested => self.request,
            State::Open => {
                self.response
                    || self.update
                    || self.host_shutdown != self.told_shutdown
                    || self.ask
                    || (self.may_read() && self.credit() > 0)
            }
            State::Line | State::Connecting | State::Draining => false,
        }
    }

    /// The next packet for the guest that has no data.
    pub(super) fn control(&mut self) -> Option<ToGuest> {
        let take = |flag: &mut bool| std::mem::replace(flag, false);
        let op = match self.state {
            State::Resetting => Op::Reset,
            State::Requested if take(&mut self.request) => Op::Request,
            State::Open if take(&mut self.response) => Op::Response,
            State::Open if self.host_shutdown != self.told_shutdown => {
                self.told_shutdown = self.host_shutdown;
                Op::Shutdown
            }
            State::Open if self.update => Op::CreditUpdate,
            State::Open if take(&mut self.ask) => {
                self.asked = true;
                Op::CreditRequest
            }
            _ => return None,
        };
        let flags = if op == Op::Shutdown { self.host_shutdown } else { 0 };
        let header = ToGuest { flags, ..self.header(op) };
        self.told(&header);
        Some(header)
    }

    /// The header of a packet of this connection.
    pub(super) fn header(&self, op: Op) -> ToGuest {
        ToGuest { buffer: self.buffer, forwarded: self.forwarded.0, ..ToGuest::new(op, self.ports) }
    }

    /// The guest has `header`.
    fn told(&mut self, header: &ToGuest) {
        self.told = Wrapping(header.forwarded);
        self.update = false;
    }

    /// True if the guest was told that the host is done in both directions, and has not agreed.
    pub(super) fn waits_for_the_end(&self) -> bool {
        self.state == State::Open && self.told_shutdown == NEITHER
    }
}

/// The port in `CONNECT PORT`, in the forms that Firecracker takes.
fn asked_port(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let word = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    if !word.eq_ignore_ascii_case("CONNECT") || words.next().is_some() || !digits {
        return None;
    }
    port.parse().ok()
}

fn is_temporary(err: &io::Error) -> bool {
    matches!(err.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn receive(fd: RawFd, bytes: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the buffer is valid for its length. No address is asked for.
    let got = unsafe { libc::recv(fd, bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Sends some of `parts`, without a signal where nobody receives.
fn send(fd: RawFd, parts: &[&[u8]]) -> io::Result<usize> {
    let mut list = [NOTHING; 2];
    for (slot, part) in list.iter_mut().zip(parts) {
        *slot = iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
    }
    // SAFETY: the list describes bytes that are borrowed until the call returns.
    unsafe { send_list(fd, &list) }
}

/// Sends some of chains that are held.
fn send_parts(socket: &OwnedFd, parts: &[IoBuf]) -> io::Result<usize> {
    let mut list = [NOTHING; ELEMENTS];
    let elements = parts.iter().flat_map(IoBuf::iovecs);
    let count = list.iter_mut().zip(elements).map(|(slot, element)| *slot = *element).count();
    // SAFETY: the list describes guest RAM.
    unsafe { send_list(socket.as_raw_fd(), &list[..count]) }
}

/// Drops the first `count` bytes of `parts`, and parts without any more.
fn advance(mut parts: &mut [IoBuf], mut count: usize) -> &mut [IoBuf] {
    while let Some((first, _)) = parts.split_first_mut() {
        let step = first.len().min(count as u64);
        first.advance(step);
        count -= step as usize;
        if !first.is_empty() {
            break;
        }
        parts = &mut parts[1..];
    }
    parts
}

/// Sends some of `list`.
///
/// # Safety
/// Its elements are readable.
unsafe fn send_list(fd: RawFd, list: &[iovec]) -> io::Result<usize> {
    // SAFETY: msghdr is plain data; what it points to is the caller's promise.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = list.as_ptr().cast_mut();
        message.msg_iovlen = list.len();
        libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn shut(fd: RawFd, how: libc::c_int) {
    // SAFETY: the call has no memory arguments. It fails only if the other side is gone.
    unsafe { libc::shutdown(fd, how) };
}

/// True if the other side of `fd` neither sends nor receives any more.
fn hung_up(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: 0, revents: 0 };
    // SAFETY: one element, which the call may write to. It does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_ask_for_a_port() {
        for (line, port) in [
            ("CONNECT 52", 52),
            ("connect 0", 0),
            ("CONNECT 4294967295\r", u32::MAX),
            (" Connect\t7 ", 7),
        ] {
            assert_eq!(asked_port(line.as_bytes()), Some(port), "{line}");
        }
        let bad: [&[u8]; 11] = [
            b"",
            b"CONNECT",
            b"CONNECT ",
            b"CONNECT x",
            b"CONNECT -1",
            b"CONNECT +1",
            b"CONNECT 4294967296",
            b"CONNECT 1 2",
            b"CONNEC 1",
            b"CONNECT1",
            b"CONNECT \xff\xfe",
        ];
        for line in bad {
            assert_eq!(asked_port(line), None, "{line:?}");
        }
    }

    #[test]
    fn credit_survives_wrapping_and_nonsense() {
        let mut connection = Connection::new(None, State::Open, Ports::default(), 1024);
        connection.sent = Wrapping(5);
        connection.guest_forwarded = Wrapping(u32::MAX - 4);
        connection.guest_buffer = 100;
        assert_eq!(connection.credit(), 90);
        connection.guest_buffer = 9;
        assert_eq!(connection.credit(), 0, "the guest took room back");
        // It says that it has read more than it got.
        connection.guest_forwarded = Wrapping(6);
        connection.guest_buffer = 1000;
        assert_eq!(connection.credit(), 0);
    }
}
