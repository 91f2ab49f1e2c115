//! The service against a guest's TCP, which is smoltcp's as well, and against segments that no TCP
//! would send.

use proptest::prelude::*;
use serde_json::json;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::fuzzing::{GUEST, MAC, framed, segment, stack};
use super::*;

/// All that waits for the guest, without headers.
fn drain(stack: &mut Stack, now: Instant) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| {
        let frame = stack.frame()?.to_vec();
        assert_eq!(frame[..HEADER as usize], [0; HEADER as usize]);
        assert_eq!(frame[12..18], MAC);
        stack.delivered(now);
        Some(frame[HEADER as usize..].to_vec())
    })
    .collect()
}

#[derive(Default)]
struct Cable {
    to_guest: Vec<Vec<u8>>,
    to_service: Vec<Vec<u8>>,
}

struct Rx(Vec<u8>);
struct Tx<'a>(&'a mut Vec<Vec<u8>>);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut packet = vec![0; len];
        let result = write(&mut packet);
        self.0.push(packet);
        result
    }
}

impl phy::Device for Cable {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _now: StackInstant) -> Option<(Rx, Tx<'_>)> {
        if self.to_guest.is_empty() {
            return None;
        }
        Some((Rx(self.to_guest.remove(0)), Tx(&mut self.to_service)))
    }

    fn transmit(&mut self, _now: StackInstant) -> Option<Tx<'_>> {
        Some(Tx(&mut self.to_service))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

/// A guest and the service.
struct Pair {
    stack: Stack,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    passed: Duration,
    next_port: u16,
}

impl Pair {
    fn new(contents: Value) -> Pair {
        let mut cable = Cable::default();
        let config = Config::new(HardwareAddress::Ip);
        let mut interface = Interface::new(config, &mut cable, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(Ipv4Addr::from(GUEST).into(), 0)).unwrap();
        });
        let sockets = SocketSet::new(Vec::new());
        let (start, passed, next_port) = (Instant::now(), Duration::ZERO, 1024);
        Pair { stack: stack(contents), cable, interface, sockets, start, passed, next_port }
    }

    fn now(&self) -> Instant {
        self.start + self.passed
    }

    fn connect(&mut self, window: usize) -> SocketHandle {
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(window), buffer(8192));
        socket.set_ack_delay(None);
        self.next_port += 1;
        let remote = (DEFAULT_ADDRESS, 80);
        socket.connect(self.interface.context(), remote, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Lets 20 ms pass, with what both sides have to say.
    fn turn(&mut self) {
        self.passed += Duration::from_millis(20);
        let at = StackInstant::from_micros(self.passed.as_micros() as i64);
        self.interface.poll(at, &mut self.cable, &mut self.sockets);
        let now = self.now();
        for packet in std::mem::take(&mut self.cable.to_service) {
            self.stack.receive(&framed(&packet), now);
        }
        self.stack.tick(now);
        for frame in drain(&mut self.stack, now) {
            assert_eq!(frame[12..14], IPV4);
            self.cable.to_guest.push(frame[ETHERNET..].to_vec());
        }
    }

    /// All that is answered until `len` bytes have come or a while has passed.
    fn read(&mut self, handle: SocketHandle, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        for _ in 0..3000 {
            self.turn();
            let socket = self.socket(handle);
            let mut bytes = [0; 65536];
            if let Ok(count) = socket.recv_slice(&mut bytes) {
                all.extend(&bytes[..count]);
            }
            if all.len() >= len || !socket.is_open() {
                break;
            }
        }
        all
    }

    fn ask(&mut self, handle: SocketHandle, request: &[u8], len: usize) -> String {
        for _ in 0..10 {
            self.turn();
        }
        assert_eq!(self.socket(handle).send_slice(request), Ok(request.len()));
        String::from_utf8(self.read(handle, len)).unwrap()
    }
}

#[test]
fn a_request_is_answered_and_the_connection_kept() {
    let mut pair = Pair::new(json!({"a": "b"}));
    let handle = pair.connect(4096);
    for _ in 0..3 {
        let answer = pair.ask(handle, b"GET /a HTTP/1.1\r\n\r\n", 100);
        assert!(
            answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nb"),
            "{answer}"
        );
    }
    pair.stack.set_contents(Arc::new(json!({"a": "c"})));
    let answer = pair.ask(handle, b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.0\r\n\r\n", 241);
    assert!(answer.contains("\r\n\r\ncHTTP/1.0 404 Not Found\r\n"), "{answer}");
    assert_eq!(pair.socket(handle).state(), State::CloseWait, "HTTP/1.0 ends it");
    pair.socket(handle).close();
    pair.read(handle, 1);
    assert_eq!(pair.stack.connections(), 0);
}

#[test]
fn large_answers_come_whole_through_small_windows() {
    let long: String = (0..51_000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    for window in [64, 1000, 65535] {
        let mut pair = Pair::new(json!({"long": long}));
        let handle = pair.connect(window);
        let answer = pair.ask(handle, b"GET /long HTTP/1.1\r\n\r\n", 51_100);
        assert!(answer.ends_with(&format!("\r\n\r\n{long}")), "{window}: {}", answer.len());
    }
}

#[test]
fn heads_without_an_end_are_refused() {
    let mut pair = Pair::new(json!({}));
    let handle = pair.connect(4096);
    let head = [&b"GET / HTTP/1.1\r\nX: "[..], &[b'x'; 6000]].concat();
    let answer = pair.ask(handle, &head, 10_000);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[test]
fn half_a_request_and_an_end_is_no_request() {
    let mut pair = Pair::new(json!({}));
    let handle = pair.connect(4096);
    pair.ask(handle, b"GET / HTTP/1.1\r\n", 0);
    pair.socket(handle).close();
    assert_eq!(pair.read(handle, 1), b"");
    assert_eq!(pair.stack.connections(), 0);
}

#[test]
fn connections_have_a_limit_and_idle_ones_make_room() {
    let mut pair = Pair::new(json!({"a": "b"}));
    let handles: Vec<_> = (0..CONNECTIONS + 3)
        .map(|_| {
            let handle = pair.connect(4096);
            pair.turn();
            pair.turn();
            handle
        })
        .collect();
    pair.turn();
    assert_eq!(pair.stack.connections(), CONNECTIONS);
    let open = handles.iter().filter(|&&h| pair.sockets.get::<Socket>(h).may_send()).count();
    assert_eq!(open, CONNECTIONS, "the rest is refused");
    pair.passed += IDLE_FOR;
    let late = pair.connect(4096);
    let answer = pair.ask(late, b"GET /a HTTP/1.1\r\n\r\n", 100);
    assert!(answer.ends_with("\r\n\r\nb"), "{answer}");
    assert_eq!(pair.stack.connections(), CONNECTIONS);
}

const IDLE_FOR: Duration = Duration::from_secs(6);

#[test]
fn who_is_gone_is_forgotten() {
    let mut pair = Pair::new(json!({"long": "x".repeat(50_000)}));
    let handle = pair.connect(1000);
    pair.ask(handle, b"GET /long HTTP/1.1\r\n\r\n", 1);
    pair.turn();
    assert_eq!(pair.stack.connections(), 1);
    // Half open ones, too.
    let mut now = pair.now();
    for port in 1..=20 {
        pair.stack.receive(&framed(&segment(port, [1, 0], 2, 4096, &[])), now);
    }
    assert_eq!(pair.stack.connections(), 21);
    for _ in 0..600 {
        now += Duration::from_millis(100);
        pair.stack.tick(now);
        drain(&mut pair.stack, now);
    }
    assert_eq!(pair.stack.connections(), 0);
    assert_eq!(pair.stack.tick(now), None, "there is nothing to be done");
}

#[test]
fn a_flood_is_bounded() {
    let mut stack = stack(json!({}));
    let now = Instant::now();
    for port in 0..5000 {
        stack.receive(&framed(&segment(port, [1, 0], 2, 4096, &[])), now);
    }
    assert!(stack.connections() <= CONNECTIONS);
    assert!(drain(&mut stack, now).len() <= OUTBOUND + CONNECTIONS);
    // With the guest taking what it is sent as well.
    for port in 0..5000 {
        stack.receive(&framed(&segment(port, [1, 0], 2, 4096, &[])), now);
        drain(&mut stack, now);
    }
    assert!(stack.connections() <= CONNECTIONS);
}

#[test]
fn other_ports_and_protocols_are_refused() {
    let mut stack = stack(json!({}));
    let now = Instant::now();
    let mut packet = segment(1000, [1, 0], 2, 4096, &[]);
    packet[23] = 81;
    stack.receive(&framed(&packet), now);
    let answers = drain(&mut stack, now);
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0][ETHERNET + 33] & 4, 4, "a reset");
}

#[test]
fn whoever_asks_gets_the_address() {
    let mut stack = stack(json!({}));
    let now = Instant::now();
    let request = |operation: u8| {
        let mut frame = [&[0xff; 6][..], &MAC, &ARP, &[0, 1, 8, 0, 6, 4, 0, operation]].concat();
        frame.extend(MAC);
        frame.extend(GUEST);
        frame.extend([0; 6]);
        frame.extend(DEFAULT_ADDRESS.octets());
        frame
    };
    let classifier = Classifier { address: DEFAULT_ADDRESS.octets() };
    assert!(classifier.wants(&request(1)) && !classifier.wants(&request(2)));
    stack.receive(&request(1), now);
    let answer = drain(&mut stack, now).remove(0);
    assert_eq!(answer[..6], MAC);
    assert_ne!(answer[6..12], MAC);
    assert_eq!(answer[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!(answer[22..28], answer[6..12]);
    assert_eq!(answer[28..32], DEFAULT_ADDRESS.octets());
    assert_eq!(answer[32..38], MAC);
    assert_eq!(answer[38..], GUEST);
    let mut other = request(1);
    other[14 + 24 + 3] ^= 1;
    assert!(!classifier.wants(&other));
    for len in 0..request(1).len() {
        stack.receive(&request(1)[..len], now);
    }
    assert_eq!(drain(&mut stack, now).len(), 0);
    for _ in 0..1000 {
        stack.receive(&request(1), now);
    }
    assert_eq!(drain(&mut stack, now).len(), OUTBOUND);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_a_guest_sends_breaks_it(
        data in proptest::collection::vec(prop_oneof![0u8..10, any::<u8>()], 0..600))
    {
        fuzz(&data);
    }
}
