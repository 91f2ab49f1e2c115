use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

mod restored;

use super::connections::{ANSWER_TICKS, CLOSE_TICKS, MOST, MOST_REFUSALS};
use super::packet::{HOST_CID, NEITHER, NO_RECEIVE, NO_SEND, Op};
use super::*;
use crate::virtio::conformance::{Buffer, Harness, Probe, conformance};
use crate::virtio::device::Call;
use crate::virtio::mmio::{reg, status};

const CID: u64 = 5;
/// Room that the test's guest says it has.
const ROOM: u32 = 256 << 10;

fn device() -> (Vsock, TempDir) {
    device_of(CID)
}

/// The device of a guest with address `cid`.
fn device_of(cid: u64) -> (Vsock, TempDir) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let listener = Listener::open(&folder.path().join("v")).unwrap();
    (Vsock::new(listener, cid, false), folder)
}

#[derive(Clone, Copy, Debug)]
struct Packet {
    source: u64,
    destination: u64,
    from: u32,
    to: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buffer: u32,
    forwarded: u32,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.to_le_bytes());
        bytes.extend(self.destination.to_le_bytes());
        for word in [self.from, self.to, self.len] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buffer, self.forwarded] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: &[u8]) -> Packet {
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |n, &byte| n << 8 | u64::from(byte))
        };
        Packet {
            source: number(0, 8),
            destination: number(8, 8),
            from: number(16, 4) as u32,
            to: number(20, 4) as u32,
            len: number(24, 4) as u32,
            kind: number(28, 2) as u16,
            op: number(30, 2) as u16,
            flags: number(32, 4) as u32,
            buffer: number(36, 4) as u32,
            forwarded: number(40, 4) as u32,
        }
    }
}

/// A packet of the guest's.
fn packet(op: Op, guest: u32, host: u32) -> Packet {
    Packet {
        source: CID,
        destination: HOST_CID,
        from: guest,
        to: host,
        len: 0,
        kind: 1,
        op: op as u16,
        flags: 0,
        buffer: ROOM,
        forwarded: 0,
    }
}

/// A guest with a driver that knows packets.
struct Guest {
    harness: Harness<Vsock>,
    folder: TempDir,
    /// Receive buffers by head: address, bytes.
    offered: HashMap<u16, (u64, u32)>,
    /// Unused receive buffers.
    spare: Vec<(u64, u32)>,
}

impl Guest {
    /// A guest with `buffers` receive buffers of `size` bytes.
    fn new(buffers: u32, size: u32) -> Guest {
        Guest::with(u64::MAX, buffers, size)
    }

    /// The same, whose driver does not want features beside these.
    fn with(features: u64, buffers: u32, size: u32) -> Guest {
        let (device, folder) = device();
        let mut harness = Harness::new(device);
        let offered = harness.offered();
        harness.activate_with(offered & features);
        let spare = (0..buffers).map(|_| harness.writable(size)).collect();
        let mut guest = Guest { harness, folder, offered: HashMap::new(), spare };
        guest.offer();
        guest
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("v")
    }

    fn listen(&self, port: u32) -> UnixListener {
        let listener = UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    }

    /// Offers all unused receive buffers.
    fn offer(&mut self) {
        for (gpa, len) in std::mem::take(&mut self.spare) {
            let head = self.harness.offer(0, &[(gpa, len, true)]);
            self.offered.insert(head, (gpa, len));
        }
        self.harness.notify(0);
        self.harness.run();
    }

    /// Takes packets out of the receive queue without offering new buffers.
    fn take(&mut self) -> Vec<(Packet, Vec<u8>)> {
        self.harness.run();
        let mut taken = Vec::new();
        while let Some((head, written)) = self.harness.used(0) {
            let (gpa, len) = self.offered.remove(&head).unwrap();
            assert!((44..=len).contains(&written), "{written} of {len} bytes");
            let bytes = self.harness.read(gpa, written);
            let packet = Packet::parse(&bytes);
            assert_eq!(packet.len + 44, written);
            assert_eq!(packet.source, HOST_CID);
            if packet.op != Op::Reset as u16 {
                assert_eq!(packet.destination, self.harness.device().cid);
            }
            taken.push((packet, bytes[44..].to_vec()));
            self.spare.push((gpa, len));
        }
        taken
    }

    /// Takes packets, offers buffers again, until there is nothing more.
    fn receive(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let mut some = self.take();
            if some.is_empty() {
                return all;
            }
            all.append(&mut some);
            self.offer();
        }
    }

    /// The one packet that came.
    fn one(&mut self, op: Op) -> Packet {
        let came = self.receive();
        let [(packet, _)] = came.as_slice() else { panic!("{came:?} is not one packet") };
        assert_eq!(packet.op, op as u16, "{packet:?}");
        *packet
    }

    fn nothing(&mut self) {
        let came = self.receive();
        assert!(came.is_empty(), "{came:?}");
    }

    fn offer_packet(&mut self, packet: &Packet, data: &[u8]) {
        let len = if packet.len == 0 { data.len() as u32 } else { packet.len };
        let header = Packet { len, ..*packet }.bytes();
        let (gpa, len) = self.harness.readable(&header);
        let mut chain: Vec<Buffer> = vec![(gpa, len, false)];
        if !data.is_empty() {
            let (gpa, len) = self.harness.readable(data);
            chain.push((gpa, len, false));
        }
        self.harness.offer(1, &chain);
    }

    fn send(&mut self, packet: Packet, data: &[u8]) {
        self.offer_packet(&packet, data);
        self.harness.notify(1);
        self.harness.run();
        assert_eq!(self.harness.used(1).map(|(_, written)| written), Some(0), "not taken");
        assert!(self.harness.take_fault().is_none());
    }

    /// A connection from the guest's `port` to a program at `host`: its socket.
    fn connect(&mut self, port: u32, host: u32) -> UnixStream {
        let listener = self.listen(host);
        self.send(packet(Op::Request, port, host), b"");
        let answer = self.one(Op::Response);
        assert_eq!((answer.from, answer.to, answer.kind), (host, port, 1));
        assert!(answer.buffer > 0);
        let (program, _) = listener.accept().unwrap();
        program.set_nonblocking(true).unwrap();
        std::fs::remove_file(self.folder.path().join(format!("v_{host}"))).unwrap();
        program
    }

    /// A program that connects and says `line`.
    fn program(&self, line: &[u8]) -> UnixStream {
        let mut program = UnixStream::connect(self.path()).unwrap();
        program.write_all(line).unwrap();
        program.set_nonblocking(true).unwrap();
        program
    }

    /// A connection from a program to the guest's `port`: its socket and the host's port.
    fn accept(&mut self, port: u32) -> (UnixStream, u32) {
        let mut program = self.program(format!("CONNECT {port}\n").as_bytes());
        let request = self.one(Op::Request);
        assert_eq!(request.to, port);
        assert!(read(&mut program).unwrap().is_empty());
        self.send(packet(Op::Response, port, request.from), b"");
        let answer = read(&mut program).unwrap();
        assert_eq!(answer, format!("OK {}\n", request.from).into_bytes());
        self.nothing();
        (program, request.from)
    }

    fn connections(&mut self) -> usize {
        self.harness.pause();
        let count = self.harness.device_mut().connections().unwrap().count();
        self.harness.resume();
        self.harness.run();
        count
    }

    fn ticks(&mut self, count: u16) {
        for _ in 0..count {
            self.harness.expire_timers();
        }
        self.harness.run();
    }
}

/// What `program` can read now; `None` at the end.
fn read(program: &mut UnixStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match program.read(&mut piece) {
            Ok(0) if all.is_empty() => return None,
            Ok(0) => return Some(all),
            Ok(len) => all.extend(&piece[..len]),
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Some(all),
            Err(err) => panic!("{err}"),
        }
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| ((at + seed) * 31 % 251) as u8).collect()
}

fn data(came: &[(Packet, Vec<u8>)]) -> Vec<u8> {
    let data = came.iter().filter(|(packet, _)| packet.op == Op::Data as u16);
    data.flat_map(|(_, bytes)| bytes.clone()).collect()
}

conformance!(
    device,
    Probe {
        queue: 1,
        // Not answered, so that no receive buffers are needed.
        request: |harness| {
            let (gpa, len) = harness.readable(&packet(Op::Reset, 1, 2).bytes());
            vec![(gpa, len, false)]
        },
        check: |_, written| assert_eq!(written, 0),
        stimulus: |harness| {
            if harness.read_register(reg::STATUS) & status::NEEDS_RESET == 0 {
                let (gpa, len) = harness.readable(&packet(Op::Request, 1, 2).bytes());
                harness.offer(1, &[(gpa, len, false)]);
                harness.kick(1);
                harness.run();
            }
            harness.message(&Message::TransportReset);
        },
    }
);

#[test]
fn the_guest_learns_its_address() {
    let guest = Guest::new(4, 4096);
    assert_eq!(guest.harness.read_register(reg::CONFIG), CID as u32);
    assert_eq!(guest.harness.read_register(reg::CONFIG + 4), 0);
}

#[test]
fn the_guest_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1025, 9000);
    guest.send(packet(Op::Data, 1025, 9000), b"from the guest");
    assert_eq!(read(&mut program).unwrap(), b"from the guest");
    program.write_all(b"from the host").unwrap();
    let came = guest.receive();
    assert_eq!(came.len(), 1);
    assert_eq!(came[0].0.op, Op::Data as u16);
    assert_eq!((came[0].0.from, came[0].0.to), (9000, 1025));
    assert_eq!(came[0].0.forwarded, 14);
    assert_eq!(came[0].1, b"from the host");
}

#[test]
fn a_program_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let (mut program, port) = guest.accept(52);
    assert_eq!(port, 1 << 30);
    program.write_all(b"hello").unwrap();
    assert_eq!(data(&guest.receive()), b"hello");
    guest.send(packet(Op::Data, 52, port), b"hello yourself");
    assert_eq!(read(&mut program).unwrap(), b"hello yourself");
    let (_other, next) = guest.accept(52);
    assert_eq!(next, port + 1);
}

#[test]
fn bytes_behind_the_line_are_not_lost() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.program(b"CONNECT 7\nearly bytes");
    let request = guest.one(Op::Request);
    // Even where the program is gone by the time that the guest answers.
    program.write_all(b", and more").unwrap();
    drop(program);
    guest.send(packet(Op::Response, 7, request.from), b"");
    let came = guest.receive();
    assert_eq!(data(&came), b"early bytes, and more");
    // It cannot receive and will not send.
    let last = came.last().unwrap().0;
    assert_eq!((last.op, last.flags), (Op::Shutdown as u16, NEITHER));
}

#[test]
fn lines_come_in_pieces_or_not_at_all() {
    let mut guest = Guest::new(64, 4096);
    let mut slow = guest.program(b"CON");
    let mut silent = guest.program(b"");
    guest.nothing();
    // Others do not wait for them.
    let (_quick, _) = guest.accept(1);
    slow.write_all(b"NECT 5").unwrap();
    guest.nothing();
    slow.write_all(b"2\n").unwrap();
    assert_eq!(guest.one(Op::Request).to, 52);
    for line in [
        "\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT 99999999999\n",
        "CONNECT 1 2\n",
        "CONNECT 00000000000000000000000000000000000000001\n",
    ] {
        let mut program = guest.program(line.as_bytes());
        guest.nothing();
        assert!(matches!(program.read(&mut [0; 9]), Ok(0) | Err(_)), "{line:?} was taken");
    }
    drop(guest.program(b"CONNECT 4"));
    guest.nothing();
    assert_eq!(guest.connections(), 3);
    guest.ticks(ANSWER_TICKS - 1);
    assert_eq!(read(&mut silent), Some(Vec::new()));
    guest.ticks(1);
    assert_eq!(read(&mut silent), None, "a silent program is closed");
    assert_eq!(read(&mut slow), None, "the guest did not answer");
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 1);
}

/// A call to the guest's `port`, and this process's end of it.
fn call(port: u32, patience: Duration) -> (Message, UnixStream) {
    let (own, device) = UnixStream::pair().unwrap();
    own.set_nonblocking(true).unwrap();
    device.set_nonblocking(true).unwrap();
    (Message::Call(Call { port, socket: Arc::new(device.into()), patience }), own)
}

#[test]
fn this_process_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let (message, mut own) = call(52, Duration::from_secs(5));
    guest.harness.message(&message);
    drop(message);
    let request = guest.one(Op::Request);
    assert_eq!(request.to, 52);
    guest.send(packet(Op::Response, 52, request.from), b"");
    guest.send(packet(Op::Data, 52, request.from), b"hello");
    let came = read(&mut own).unwrap();
    assert_eq!(came, format!("OK {}\nhello", request.from).into_bytes());
    own.write_all(b"hello yourself").unwrap();
    assert_eq!(data(&guest.receive()), b"hello yourself");
    drop(own);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
}

#[test]
fn a_call_that_nobody_answers_ends_when_it_said() {
    let mut guest = Guest::new(16, 4096);
    let (message, mut refused) = call(52, Duration::from_secs(5));
    guest.harness.message(&message);
    drop(message);
    let request = guest.one(Op::Request);
    guest.send(packet(Op::Reset, 52, request.from), b"");
    assert_eq!(read(&mut refused), None);
    // Longer and shorter than a program would wait.
    for ticks in [2 * ANSWER_TICKS, 1] {
        let (message, mut own) = call(52, 50 * Duration::from_millis(ticks.into()));
        guest.harness.message(&message);
        drop(message);
        assert_eq!(guest.one(Op::Request).to, 52);
        guest.ticks(ticks - 1);
        assert_eq!(read(&mut own), Some(Vec::new()));
        guest.ticks(1);
        assert_eq!(read(&mut own), None);
        guest.one(Op::Reset);
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_that_refuses() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.program(b"CONNECT 52\n");
    let request = guest.one(Op::Request);
    guest.send(packet(Op::Reset, 52, request.from), b"");
    assert_eq!(read(&mut program), None);
    assert_eq!(guest.connections(), 0);
    guest.nothing();
}

#[test]
fn a_host_that_does_not_listen() {
    let mut guest = Guest::new(16, 4096);
    guest.send(packet(Op::Request, 1, 9), b"");
    let answer = guest.one(Op::Reset);
    assert_eq!((answer.from, answer.to), (9, 1));
    // A file that is no socket, and a socket that nobody listens on.
    std::fs::write(guest.folder.path().join("v_9"), "").unwrap();
    drop(UnixListener::bind(guest.folder.path().join("v_10")).unwrap());
    for port in [9, 10] {
        guest.send(packet(Op::Request, 1, port), b"");
        guest.one(Op::Reset);
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_guest_stops_where_its_credit_ends() {
    let mut guest = Guest::new(16, 4096);
    let listener = guest.listen(9);
    guest.send(packet(Op::Request, 1, 9), b"");
    let room = guest.one(Op::Response).buffer;
    let mut program = listener.accept().unwrap().0;
    program.set_nonblocking(true).unwrap();
    // Two sockets' worth, of which the program reads nothing.
    let (mut sent, mut told) = (0u32, 0u32);
    let mut expected = Vec::new();
    while sent - told < room {
        let bytes = pattern(50_000.min(room - (sent - told)) as usize, sent as usize);
        guest.send(packet(Op::Data, 1, 9), &bytes);
        sent += bytes.len() as u32;
        expected.extend(bytes);
        for (update, _) in guest.receive() {
            assert_eq!((update.op, update.buffer), (Op::CreditUpdate as u16, room));
            told = update.forwarded;
        }
        assert!(sent < 8 << 20, "a program that reads nothing takes everything");
    }
    guest.nothing();
    // The program reads: nothing is lost, and there is room again.
    let mut got = Vec::new();
    while got.len() < expected.len() {
        got.extend(read(&mut program).unwrap());
        guest.harness.run();
    }
    assert_eq!(got, expected);
    let updates = guest.receive();
    assert_eq!(updates.last().unwrap().0.forwarded, sent);
    // What does not fit into socket and room costs the connection.
    let bytes = pattern(room as usize / 2, 0);
    for _ in 0..8 {
        guest.offer_packet(&packet(Op::Data, 1, 9), &bytes);
    }
    guest.harness.kick(1);
    let came = guest.receive();
    assert!(came.iter().any(|(packet, _)| packet.op == Op::Reset as u16), "{came:?}");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_host_stops_where_the_guests_credit_ends() {
    let mut guest = Guest::new(32, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(Packet { buffer: 10_000, ..packet(Op::CreditUpdate, 1, 9) }, b"");
    let bytes = pattern(30_000, 3);
    program.write_all(&bytes).unwrap();
    let mut got = data(&guest.receive());
    assert_eq!(got.len(), 10_000);
    guest.ticks(1);
    guest.one(Op::CreditRequest);
    guest.ticks(10);
    guest.nothing();
    guest.send(Packet { buffer: 10_000, ..packet(Op::CreditUpdate, 1, 9) }, b"");
    guest.nothing();
    let more = Packet { buffer: 10_000, forwarded: 4_000, ..packet(Op::CreditUpdate, 1, 9) };
    guest.send(more, b"");
    got.extend(data(&guest.receive()));
    assert_eq!(got.len(), 14_000);
    guest.send(Packet { buffer: 50_000, ..more }, b"");
    got.extend(data(&guest.receive()));
    assert_eq!(got, bytes);
    guest.send(packet(Op::CreditRequest, 1, 9), b"");
    guest.one(Op::CreditUpdate);
}

#[test]
fn buffers_of_any_shape_are_filled() {
    for (count, size) in [(3, 45), (7, 1000), (16, 4096), (2, 70_000)] {
        let mut guest = Guest::new(count, size);
        let mut program = guest.connect(1, 9);
        let bytes = pattern(150_000, 1);
        program.write_all(&bytes[..5]).unwrap();
        let mut got = data(&guest.receive());
        assert_eq!(got.len(), 5);
        let mut rest = &bytes[5..];
        while got.len() < bytes.len() {
            let len = program.write(rest).unwrap_or(0);
            rest = &rest[len..];
            got.extend(data(&guest.receive()));
            let update = Packet { forwarded: got.len() as u32, ..packet(Op::CreditUpdate, 1, 9) };
            guest.send(update, b"");
        }
        assert!(got == bytes, "{count} buffers of {size}");
    }
    // The header in pieces, as a driver may lay it out.
    let mut guest = Guest::new(0, 0);
    let (gpa, _) = guest.harness.writable(4096);
    let pieces: Vec<Buffer> =
        [(0, 10), (10, 33), (43, 2), (45, 100)].map(|(at, len)| (gpa + at, len, true)).to_vec();
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.harness.offer(0, &pieces);
    guest.harness.notify(0);
    guest.harness.run();
    assert_eq!(guest.harness.used(0).map(|(_, written)| written), Some(44));
    assert_eq!(Packet::parse(&guest.harness.read(gpa, 44)).op, Op::Reset as u16);
}

#[test]
fn the_host_closes_one_direction_and_then_the_other() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    program.write_all(b"last words").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    let came = guest.receive();
    assert_eq!(data(&came), b"last words");
    assert_eq!((came[1].0.op, came[1].0.flags), (Op::Shutdown as u16, NO_SEND));
    // The guest may still talk.
    guest.send(packet(Op::Data, 1, 9), b"answer");
    assert_eq!(read(&mut program).unwrap(), b"answer");
    guest.nothing();
    drop(program);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
    // What is on its way does no harm.
    guest.send(packet(Op::Data, 1, 9), b"too late");
    guest.nothing();
    guest.send(packet(Op::Reset, 1, 9), b"");
    assert_eq!(guest.connections(), 0);
    guest.nothing();
}

#[test]
fn the_host_stops_reading() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    program.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(packet(Op::Data, 1, 9), b"for nobody");
    assert_eq!(guest.one(Op::Shutdown).flags, NO_RECEIVE);
    program.write_all(b"still here").unwrap();
    assert_eq!(data(&guest.receive()), b"still here");
}

#[test]
fn the_guest_closes_one_direction_and_then_the_other() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(packet(Op::Data, 1, 9), b"last words");
    guest.send(Packet { flags: NO_SEND, ..packet(Op::Shutdown, 1, 9) }, b"");
    assert_eq!(read(&mut program).unwrap(), b"last words");
    assert_eq!(read(&mut program), None);
    program.write_all(b"answer").unwrap();
    assert_eq!(data(&guest.receive()), b"answer");
    guest.send(Packet { flags: NO_RECEIVE, ..packet(Op::Shutdown, 1, 9) }, b"");
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 0);
    assert!(program.write_all(b"x").is_err());
}

#[test]
fn the_guest_stops_reading() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(Packet { flags: NO_RECEIVE, ..packet(Op::Shutdown, 1, 9) }, b"");
    assert!(program.write_all(b"x").is_err());
    guest.send(packet(Op::Data, 1, 9), b"still here");
    assert_eq!(read(&mut program).unwrap(), b"still here");
    drop(program);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
}

#[test]
fn what_a_guest_sent_arrives_after_it_closed() {
    for op in [Op::Shutdown, Op::Reset] {
        let mut guest = Guest::new(16, 4096);
        let mut program = guest.connect(1, 9);
        let mut expected = Vec::new();
        // More than the socket takes.
        for number in 0..8 {
            let bytes = pattern(50_000, number);
            guest.send(packet(Op::Data, 1, 9), &bytes);
            expected.extend(bytes);
            guest.receive();
        }
        guest.send(Packet { flags: NEITHER, ..packet(op, 1, 9) }, b"");
        guest.one(Op::Reset);
        // The port is free for another.
        let _other = guest.connect(1, 9);
        let mut got = Vec::new();
        while let Some(bytes) = read(&mut program) {
            got.extend(bytes);
            guest.harness.run();
        }
        assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
        assert_eq!(guest.connections(), 1);
    }
}

#[test]
fn a_guest_that_does_not_agree_to_an_end() {
    let mut guest = Guest::new(16, 4096);
    drop(guest.connect(1, 9));
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
    guest.ticks(CLOSE_TICKS - 1);
    guest.nothing();
    guest.ticks(1);
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 0);
}

#[test]
fn breaches_cost_the_connection_and_no_other() {
    let mut guest = Guest::new(16, 4096);
    let mut other = guest.connect(2, 10);
    type Breach = fn(Packet) -> Packet;
    let breaches: [(&str, Breach); 6] = [
        ("a second request", |p| Packet { op: Op::Request as u16, ..p }),
        ("an answer to nothing", |p| Packet { op: Op::Response as u16, ..p }),
        ("an unknown operation", |p| Packet { op: 77, ..p }),
        ("operation 0", |p| Packet { op: 0, ..p }),
        ("less than it says", |p| Packet { op: Op::Data as u16, len: 100, ..p }),
        ("more than fits", |p| Packet { op: Op::Data as u16, len: u32::MAX, ..p }),
    ];
    for (what, breach) in breaches {
        let mut program = guest.connect(1, 9);
        guest.send(breach(packet(Op::Data, 1, 9)), b"some bytes");
        let reset = guest.one(Op::Reset);
        assert_eq!((reset.from, reset.to), (9, 1), "{what}");
        assert_eq!(read(&mut program), None, "{what}");
        assert_eq!(guest.connections(), 1, "{what}");
    }
    let mut program = guest.connect(1, 9);
    guest.send(Packet { flags: NO_SEND, ..packet(Op::Shutdown, 1, 9) }, b"");
    guest.send(packet(Op::Data, 1, 9), b"after the end");
    guest.one(Op::Reset);
    assert_eq!(read(&mut program), None);
    guest.send(packet(Op::Data, 2, 10), b"unharmed");
    assert_eq!(read(&mut other).unwrap(), b"unharmed");
}

#[test]
fn packets_that_belong_to_nothing() {
    let mut guest = Guest::new(16, 4096);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(packet(op, 1, 9), b"");
        guest.one(Op::Reset);
    }
    guest.send(packet(Op::Reset, 1, 9), b"");
    guest.nothing();
    guest.send(Packet { source: CID + 1, ..packet(Op::Request, 1, 9) }, b"");
    assert_eq!(guest.one(Op::Reset).destination, CID + 1, "back to where it came from");
    let _listener = guest.listen(9);
    guest.send(Packet { kind: 2, ..packet(Op::Request, 1, 9) }, b"");
    let reset = guest.one(Op::Reset);
    assert_eq!((reset.kind, reset.destination), (2, CID));
    // Shorter than a header.
    let (gpa, _) = guest.harness.readable(&[1; 44]);
    assert_eq!(guest.harness.request(1, &[(gpa, 43, false)]), Some(0));
    guest.nothing();
    // Another machine's address; the answer comes from there.
    guest.send(Packet { destination: 77, ..packet(Op::Request, 1, 9) }, b"");
    guest.harness.run();
    let (head, written) = guest.harness.used(0).unwrap();
    let (gpa, _) = guest.offered[&head];
    let reset = Packet::parse(&guest.harness.read(gpa, written));
    assert_eq!((reset.source, reset.op), (77, Op::Reset as u16));
}

#[test]
fn a_flood_without_buffers_stops_by_itself() {
    let mut guest = Guest::new(0, 0);
    let mut taken = 0;
    for number in 0..2000u32 {
        if guest.harness.free_descriptors(1) == 0 {
            break;
        }
        guest.offer_packet(&packet(Op::Data, number, 9), b"");
        guest.harness.notify(1);
        guest.harness.run();
        while guest.harness.used(1).is_some() {
            taken += 1;
        }
    }
    assert_eq!(taken, MOST_REFUSALS, "the rest waits in the queue");
    // With buffers it goes on, and every packet is answered.
    guest.spare = (0..64).map(|_| guest.harness.writable(4096)).collect();
    guest.offer();
    let answers = guest.receive().len();
    while guest.harness.used(1).is_some() {
        taken += 1;
    }
    assert_eq!(answers, taken);
    assert!(taken > MOST_REFUSALS + 200);

    // The same with packets of a connection: it owes few answers, however often it is asked.
    let mut guest = Guest::new(4, 4096);
    let _program = guest.connect(1, 9);
    for _ in 0..5000 {
        guest.send(packet(Op::CreditRequest, 1, 9), b"");
    }
    assert_eq!(guest.harness.used_index(0), 5, "an answer to the request, four updates");
    assert_eq!(guest.take().len(), 4);
    guest.offer();
    assert_eq!(guest.receive().len(), 1, "all others were one");
}

#[test]
fn many_connections_at_once() {
    let mut guest = Guest::new(128, 4096);
    let listener = guest.listen(9);
    let mut streams = HashMap::new();
    for number in 0..1000u32 {
        if number % 2 == 0 {
            guest.send(packet(Op::Request, 5000 + number, 9), b"");
            guest.one(Op::Response);
            streams.insert((9, 5000 + number), listener.accept().unwrap().0);
        } else {
            let (program, host) = guest.accept(7);
            streams.insert((host, 7), program);
        }
    }
    assert_eq!(guest.connections(), 1000);
    // Each says its own number, both ways at once.
    for (&(host, port), program) in &mut streams {
        program.set_nonblocking(true).unwrap();
        program.write_all(format!("{host}/{port}").as_bytes()).unwrap();
        guest.send(packet(Op::Data, port, host), format!("{port}/{host}").as_bytes());
    }
    let mut heard = HashMap::new();
    for (packet, bytes) in guest.receive() {
        assert_eq!(packet.op, Op::Data as u16);
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text, format!("{}/{}", packet.from, packet.to));
        heard.insert((packet.from, packet.to), text);
    }
    assert_eq!(heard.len(), 1000);
    for (&(host, port), program) in &mut streams {
        assert_eq!(read(program).unwrap(), format!("{port}/{host}").into_bytes());
    }
    // There is a limit, and it costs only those who come too late.
    for number in 1000..MOST as u32 {
        guest.send(packet(Op::Request, 5000 + number, 9), b"");
        guest.one(Op::Response);
    }
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.one(Op::Reset);
    let mut late = guest.program(b"CONNECT 7\n");
    guest.nothing();
    assert!(matches!(late.read(&mut [0; 9]), Ok(0) | Err(_)));
    drop(streams);
    let ends = guest.receive();
    assert_eq!(ends.len(), 1000);
    for (end, _) in ends {
        assert_eq!((end.op, end.flags), (Op::Shutdown as u16, NEITHER));
        guest.send(packet(Op::Reset, end.to, end.from), b"");
    }
    assert_eq!(guest.connections(), MOST - 1000);
}

#[test]
fn silent_programs_make_place() {
    let mut guest = Guest::new(16, 4096);
    let mut silent = Vec::new();
    for _ in 0..MOST {
        silent.push(guest.program(b""));
        guest.harness.run();
    }
    assert_eq!(guest.connections(), MOST);
    let _program = guest.connect(1, 9);
    let (_other, _) = guest.accept(4);
    assert_eq!(guest.connections(), MOST);
    let closed = silent.iter_mut().filter_map(|program| read(program).is_none().then_some(()));
    assert_eq!(closed.count(), 2);
}

#[test]
fn connections_have_turns() {
    let mut guest = Guest::new(16, 1044);
    let mut programs: Vec<UnixStream> = (0..4).map(|n| guest.connect(100 + n, 9)).collect();
    for program in &mut programs {
        program.write_all(&pattern(150_000, 0)).unwrap();
    }
    // Of the first half of what comes, each has its part.
    let mut bytes = [0u32; 4];
    while bytes.iter().sum::<u32>() < 300_000 {
        for (packet, _) in guest.take() {
            bytes[packet.to as usize - 100] += packet.len;
        }
        guest.offer();
    }
    assert!(bytes.iter().all(|&bytes| bytes >= 60_000), "{bytes:?}");
}

#[test]
fn a_pause_keeps_connections_and_a_reset_does_not() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    let (mut other, port) = guest.accept(52);
    guest.harness.pause();
    program.write_all(b"while paused").unwrap();
    let mut late = guest.program(b"CONNECT 8\n");
    assert_eq!(read(&mut other), Some(Vec::new()));
    guest.harness.resume();
    let came = guest.receive();
    assert_eq!(data(&came), b"while paused");
    assert!(came.iter().any(|(p, _)| p.op == Op::Request as u16 && p.to == 8));
    guest.send(packet(Op::Data, 52, port), b"after it");
    assert_eq!(read(&mut other).unwrap(), b"after it");
    // A backlog lives through it as well.
    let mut expected = Vec::new();
    for number in 0..8 {
        let bytes = pattern(50_000, number);
        guest.send(packet(Op::Data, 1, 9), &bytes);
        expected.extend(bytes);
        guest.receive();
    }
    guest.harness.pause();
    guest.harness.resume();
    guest.harness.run();
    let mut got = Vec::new();
    while got.len() < expected.len() {
        got.extend(read(&mut program).unwrap());
        guest.harness.run();
    }
    assert!(got == expected);
    // Deadlines go on.
    guest.ticks(ANSWER_TICKS);
    assert_eq!(read(&mut late), None);

    guest.harness.reset();
    assert_eq!(read(&mut program), None);
    assert_eq!(read(&mut other), None);
    guest.harness.activate();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_transport_reset_is_told_and_closes_everything() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    let (gpa, len) = guest.harness.writable(8);
    guest.harness.message(&Message::TransportReset);
    assert_eq!(read(&mut program), None);
    assert_eq!(guest.harness.used(2), None);
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), Some(4));
    assert_eq!(guest.harness.read(gpa, 4), TRANSPORT_RESET);
    assert_eq!(guest.connections(), 0);
    // Told while paused, and told once.
    guest.harness.pause();
    guest.harness.device_mut().update(&Message::TransportReset);
    guest.harness.resume();
    guest.harness.run();
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), Some(4));
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), None);
}

#[test]
fn a_busy_program_is_asked_again() {
    let mut guest = Guest::new(16, 4096);
    let path = guest.folder.path().join("v_9");
    let listener = UnixListener::bind(&path).unwrap();
    // SAFETY: the call has no memory arguments.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    let _first = UnixStream::connect(&path).unwrap();
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.nothing();
    guest.ticks(3);
    guest.nothing();
    listener.accept().unwrap();
    guest.ticks(1);
    guest.one(Op::Response);
    // It never has room: the guest is told in the end.
    guest.send(packet(Op::Request, 2, 9), b"");
    guest.ticks(ANSWER_TICKS);
    assert_eq!(guest.one(Op::Reset).to, 2);
}

#[test]
fn the_socket_goes_with_the_machine() {
    let (mut device, folder) = device();
    assert!(folder.path().join("v").exists());
    device.end();
    assert!(!folder.path().join("v").exists());
    // Whoever had connected is let go.
    let guest = Guest::new(4, 4096);
    let mut program = guest.program(b"CONNECT 1\n");
    program.set_nonblocking(false).unwrap();
    program.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    drop(guest.harness);
    assert!(matches!(program.read(&mut [0; 1]), Ok(0) | Err(_)));
}
