use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

mod closing;
mod connecting;
mod credit;
mod hostile;
mod lifecycle;
mod many;
mod restored;

use super::connections::ANSWER_TICKS;
use super::packet::{HOST_CID, NEITHER, NO_SEND, Op};
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

/// A call to the guest's `port`, and this process's end of it.
fn call(port: u32, patience: Duration) -> (Message, UnixStream) {
    let (own, device) = UnixStream::pair().unwrap();
    own.set_nonblocking(true).unwrap();
    device.set_nonblocking(true).unwrap();
    (Message::Call(Call { port, socket: Arc::new(device.into()), patience }), own)
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
