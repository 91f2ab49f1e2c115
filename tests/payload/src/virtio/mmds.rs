//! The metadata service, as a guest without a protocol stack reaches it: ARP, IPv4 and TCP by hand,
//! one segment at a time, each checked.

use super::mmio::Transport;
use super::net::{FEATURES, HEADER};
use super::queue::Queue;
use super::{NET, WRITE, find, start};
use crate::boot::{Boot, number};
use crate::machine::{bytes, read, ticks, write};
use crate::{print, println};

/// Ticks without an answer after which a step is given up.
const PATIENCE: u64 = 1 << 33;
/// Ticks after which a connection is asked for again.
const AGAIN: u64 = 1 << 30;
const BUFFER: u64 = 2048;
const RX_BUFFERS: u16 = 64;
const ETHERNET: u64 = 14;
/// IPv4 and TCP without options.
const HEADERS: u64 = 40;
const IPV4: [u8; 2] = [8, 0];
const ARP: [u8; 2] = [8, 6];
const OURS: [u8; 4] = [172, 30, 0, 2];

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

/// Most bytes of an answer.
const LONGEST: usize = 60 << 10;

/// `request=` is sent, with `%20` and the like in it; after `|` there may be more of them, in which
/// `$T` stands for the body of the answer before. Prints answers, or with `quiet=1` their lengths.
/// `address=` is the service's, `window=` what is offered to it; `flood=` asks for so many connections
/// first that nobody goes on with, `junk=` sends as many segments of none. With `wait=1` each request is
/// repeated until there is an answer, and it is another than the one before.
pub fn scenario(boot: &Boot) {
    let Some(device) = find(boot, NET) else { return };
    let Some((_, [mut rx, tx])) = start::<2>(boot, &device, FEATURES, 256) else { return };
    let rx_buffers = boot.allocate(BUFFER * u64::from(RX_BUFFERS));
    let (Some(rx_buffers), Some(frame), Some(store)) =
        (rx_buffers, boot.allocate(4096), boot.allocate(LONGEST as u64))
    else {
        return;
    };
    for slot in 0..RX_BUFFERS {
        rx.describe(slot, rx_buffers + BUFFER * u64::from(slot), BUFFER as u32, WRITE, 0);
        rx.offer(slot);
    }
    rx.publish(&device);
    let mut guest = Guest {
        device,
        rx,
        tx,
        rx_buffers,
        frame,
        mac: core::array::from_fn(|index| device.config::<u8>(index as u64)),
        service: [0xff; 6],
        address: address(boot.argument("address")),
        port: 1000,
        next: 0,
        expected: 0,
        window: boot.number("window", 8192) as u16,
        bad: 0,
    };
    if !guest.resolve() {
        println!("mmds: nobody answers for the address");
        return;
    }
    for _ in 0..boot.number("flood", 0) {
        guest.port += 1;
        guest.send(SYN, &[]);
    }
    for count in 0..boot.number("junk", 0) {
        guest.port = 1000 + (count % 7) as u16;
        guest.next = guest.next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        guest.expected = guest.next >> 7;
        guest
            .send(count as u8, b"GET / HTTP/1.1\r\n\r\n".get(..count as usize % 19).unwrap_or(&[]));
    }
    guest.port = 20_000;
    let mut total = 0;
    for request in boot.argument("request").unwrap_or("GET%20/%20HTTP/1.0%0d%0a%0d%0a").split('|') {
        let (mut text, mut len) = ([0; 1400], 0);
        let body = body_of(bytes(store, total));
        for byte in decoded(request, body) {
            text[len % 1400] = byte;
            len += 1;
        }
        let before = sum_of(bytes(store, total));
        loop {
            match guest.ask(text.get(..len).unwrap_or(&[]), store) {
                Some(length) => total = length,
                // The guest may be a copy, whose service knows nothing of the connection.
                None if boot.flag("wait") => continue,
                None => {
                    println!("mmds: no answer");
                    return;
                }
            }
            if !boot.flag("wait") || sum_of(bytes(store, total)) != before {
                break;
            }
        }
        let answer = bytes(store, total);
        if boot.flag("quiet") {
            println!("answer of {} bytes", body_of(answer).len());
        } else {
            print!("answer: ");
            for &byte in answer {
                print!("{}", char::from(byte));
            }
            println!("\nend of answer");
        }
    }
    println!("result mmds bytes={total} bad={} mac={:02x?}", guest.bad, guest.service);
}

/// Differs for different answers.
fn sum_of(answer: &[u8]) -> u64 {
    answer.iter().fold(1, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()))
}

fn address(text: Option<&str>) -> [u8; 4] {
    let mut address = [169, 254, 169, 254];
    for (byte, part) in address.iter_mut().zip(text.unwrap_or_default().split('.')) {
        *byte = number(part).map_or(*byte, |value| value as u8);
    }
    address
}

/// Undoes `%XX`, and puts `body` in the place of `$T`.
fn decoded<'a>(text: &'a str, body: &'a [u8]) -> impl Iterator<Item = u8> + 'a {
    let mut rest = text.as_bytes();
    let mut inserted: &[u8] = &[];
    core::iter::from_fn(move || {
        if let Some((&byte, more)) = inserted.split_first() {
            inserted = more;
            return Some(byte);
        }
        if let Some(more) = rest.strip_prefix(b"$T")
            && let Some((&byte, others)) = body.split_first()
        {
            (rest, inserted) = (more, others);
            return Some(byte);
        }
        let (&byte, more) = rest.split_first()?;
        rest = more;
        if byte == b'%'
            && let Some((digits, more)) = rest.split_at_checked(2)
        {
            rest = more;
            let digits = core::str::from_utf8(digits).ok()?;
            return u8::from_str_radix(digits, 16).ok();
        }
        Some(byte)
    })
}

/// What follows an empty line.
fn body_of(answer: &[u8]) -> &[u8] {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n");
    at.and_then(|at| answer.get(at + 4..)).unwrap_or(&[])
}

/// True if all that the head of an answer announces is there.
fn is_whole(answer: &[u8]) -> bool {
    let Some(at) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = core::str::from_utf8(answer.get(..at).unwrap_or(&[])).unwrap_or_default();
    let length = head.lines().filter_map(|line| line.split_once(": "));
    let mut length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.next().and_then(|(_, value)| number(value)).unwrap_or(0);
    answer.len() as u64 >= at as u64 + 4 + length
}

struct Guest {
    device: Transport,
    rx: Queue,
    tx: Queue,
    rx_buffers: u64,
    frame: u64,
    mac: [u8; 6],
    service: [u8; 6],
    address: [u8; 4],
    port: u16,
    /// Sequence number of what is sent next, and of what is expected.
    next: u32,
    expected: u32,
    window: u16,
    /// Frames of the service that were not right.
    bad: u32,
}

/// A segment from the service: flags, sequence number, acknowledged number, where the payload is.
type Segment = (u8, u32, u32, u64, u64);

impl Guest {
    /// Sends the frame that was written, `length` bytes long without the card's header.
    fn transmit(&mut self, length: u64, kind: [u8; 2]) {
        write(self.frame, [0u8; HEADER as usize]);
        write(self.frame + HEADER, self.service);
        write(self.frame + HEADER + 6, self.mac);
        write(self.frame + HEADER + 12, kind);
        self.tx.describe(0, self.frame, (HEADER + length) as u32, 0, 0);
        self.tx.offer(0);
        self.tx.publish(&self.device);
        if self.tx.wait(PATIENCE).is_none() {
            println!("mmds: a frame is stuck");
        }
    }

    /// Hands each frame that comes to `take` until that has what it wants.
    fn await_frame<T>(
        &mut self,
        patience: u64,
        mut take: impl FnMut(&mut Self, u64, u64) -> Option<T>,
    ) -> Option<T> {
        let start = ticks();
        while ticks() - start < patience {
            let Some((slot, length)) = self.rx.poll() else {
                core::hint::spin_loop();
                continue;
            };
            let at = self.rx_buffers + BUFFER * u64::from(slot % RX_BUFFERS);
            if read::<u16>(at + 10) != 1 {
                self.bad += 1;
            }
            let taken = take(self, at + HEADER, u64::from(length).saturating_sub(HEADER));
            self.rx.offer(slot);
            self.rx.publish(&self.device);
            if taken.is_some() {
                return taken;
            }
        }
        None
    }

    /// Asks who has the service's address (RFC 826).
    fn resolve(&mut self) -> bool {
        let at = self.frame + HEADER + ETHERNET;
        write(at, [0u8, 1, 8, 0, 6, 4, 0, 1]);
        write(at + 8, self.mac);
        write(at + 14, OURS);
        write(at + 18, [0u8; 6]);
        write(at + 24, self.address);
        self.transmit(ETHERNET + 28, ARP);
        let found = self.await_frame(PATIENCE, |guest, at, length| {
            let arp = at + ETHERNET;
            let ours = length >= ETHERNET + 28
                && read::<[u8; 2]>(at + 12) == ARP
                && read::<u8>(arp + 7) == 2
                && read::<[u8; 4]>(arp + 14) == guest.address
                && read::<[u8; 4]>(arp + 24) == OURS
                && read::<[u8; 6]>(at) == guest.mac;
            ours.then(|| read::<[u8; 6]>(arp + 8))
        });
        self.service = found.unwrap_or(self.service);
        found.is_some()
    }

    /// Sum of a segment and its pseudo header (RFC 9293 § 3.1): 0xffff if the checksum in it is right.
    fn sum(from: [u8; 4], to: [u8; 4], segment: &[u8]) -> u16 {
        let length = (segment.len() as u16).to_be_bytes();
        add(&[&from, &to, &[0, 6], &length, segment])
    }

    fn send(&mut self, flags: u8, payload: &[u8]) {
        let ip = self.frame + HEADER + ETHERNET;
        let tcp = ip + 20;
        let length = HEADERS + payload.len() as u64;
        write(ip, [0x45u8, 0]);
        write(ip + 2, (length as u16).to_be_bytes());
        write(ip + 4, [0u8, 0, 0x40, 0, 64, 6, 0, 0]);
        write(ip + 12, OURS);
        write(ip + 16, self.address);
        write(ip + 10, (!add(&[bytes(ip, 20)])).to_be_bytes());
        write(tcp, self.port.to_be_bytes());
        write(tcp + 2, 80u16.to_be_bytes());
        write(tcp + 4, self.next.to_be_bytes());
        write(tcp + 8, self.expected.to_be_bytes());
        write(tcp + 12, [0x50, flags]);
        write(tcp + 14, self.window.to_be_bytes());
        write(tcp + 16, [0u8; 4]);
        for (offset, byte) in (0u64..).zip(payload) {
            write(tcp + 20 + offset, *byte);
        }
        let sum = Self::sum(OURS, self.address, bytes(tcp, 20 + payload.len()));
        write(tcp + 16, (!sum).to_be_bytes());
        self.transmit(ETHERNET + length, IPV4);
    }

    /// The next segment of this connection.
    fn segment(&mut self, patience: u64) -> Option<Segment> {
        self.await_frame(patience, |guest, at, length| {
            let ip = at + ETHERNET;
            let tcp = ip + 20;
            if length < ETHERNET + HEADERS
                || read::<[u8; 2]>(at + 12) != IPV4
                || read::<[u8; 4]>(ip + 12) != guest.address
            {
                return None;
            }
            let total = u64::from(u16::from_be(read(ip + 2)));
            let right = total >= HEADERS
                && total <= length - ETHERNET
                && read::<u8>(ip) == 0x45
                && read::<[u8; 6]>(at + 6) == guest.service
                && add(&[bytes(ip, 20)]) == 0xffff
                && Self::sum(guest.address, OURS, bytes(tcp, total as usize - 20)) == 0xffff;
            if !right {
                guest.bad += 1;
                return None;
            }
            if u16::from_be(read(tcp + 2)) != guest.port {
                return None;
            }
            let offset = u64::from(read::<u8>(tcp + 12) >> 4) * 4;
            let payload = (total - 20).saturating_sub(offset);
            let sequence = u32::from_be(read(tcp + 4));
            Some((read(tcp + 13), sequence, u32::from_be(read(tcp + 8)), tcp + offset, payload))
        })
    }

    /// Opens a connection. A service that is busy refuses: then it is asked again, for a while.
    fn connect(&mut self) -> bool {
        let start = ticks();
        while ticks() - start < PATIENCE * 8 {
            self.port += 1;
            (self.next, self.expected) = (0x1234_5678, 0);
            self.send(SYN, &[]);
            self.next += 1;
            let Some((flags, sequence, acknowledged, ..)) = self.segment(AGAIN) else { continue };
            if flags & RST == 0 && flags & (SYN | ACK) == SYN | ACK && acknowledged == self.next {
                self.expected = sequence.wrapping_add(1);
                self.send(ACK, &[]);
                return true;
            }
        }
        false
    }

    /// Sends a request on a connection of its own and stores the answer. Returns its length.
    fn ask(&mut self, request: &[u8], store: u64) -> Option<usize> {
        if !self.connect() {
            return None;
        }
        self.send(PSH | ACK, request);
        self.next = self.next.wrapping_add(request.len() as u32);
        let mut length = 0;
        while !is_whole(bytes(store, length)) {
            let (flags, sequence, _, at, payload) = self.segment(PATIENCE)?;
            if flags & RST != 0 {
                return None;
            }
            if sequence != self.expected || length + payload as usize > LONGEST {
                // Sent again, or ahead.
                self.send(ACK, &[]);
                continue;
            }
            for offset in 0..payload {
                write(store + length as u64 + offset, read::<u8>(at + offset));
            }
            length += payload as usize;
            self.expected = self.expected.wrapping_add(payload as u32);
            if flags & FIN != 0 {
                self.expected = self.expected.wrapping_add(1);
            }
            if payload > 0 || flags & FIN != 0 {
                self.send(ACK, &[]);
            }
            if flags & FIN != 0 {
                break;
            }
        }
        self.send(FIN | ACK, &[]);
        Some(length)
    }
}

/// Sum of 16-bit words in the manner of the internet (RFC 1071).
fn add(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
