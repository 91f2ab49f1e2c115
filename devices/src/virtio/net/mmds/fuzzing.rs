//! Turns bytes into what a hostile guest might send the service.
//!
//! Besides frames of any bytes there are segments that continue what the service said: noise alone
//! would not get past the handshake.

// A guest that goes on after a failure would hide it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::json;

use super::*;

/// The guest's address.
pub(super) const GUEST: [u8; 4] = [172, 16, 0, 2];
/// The guest's hardware address.
pub(super) const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\n\r\n";

/// Bytes that decide, used up from the front.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn word(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes([self.byte()?, self.byte()?]))
    }

    fn some(&mut self) -> Option<&'a [u8]> {
        let len = usize::from(self.byte()?).min(self.0.len());
        let (some, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(some)
    }
}

/// The numbers of one of the guest's ports.
#[derive(Clone, Copy, Default)]
struct Port {
    next: u32,
    expected: u32,
}

/// A service whose contents have a long entry `a`.
pub(super) fn stack(contents: Value) -> Stack {
    let key = TokenKey::random().unwrap();
    let (version, address) = (Version::V1, DEFAULT_ADDRESS);
    let options = Options { version, address, imds_compat: false, key };
    Stack::new(options, Arc::new(contents), MAC, 1500, Arc::default())
}

/// A frame to the service with this packet in it.
pub(super) fn framed(packet: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, &IPV4, packet].concat()
}

/// A TCP segment from the guest, with its IPv4 header.
pub(super) fn segment(
    port: u16,
    [next, expected]: [u32; 2],
    flags: u8,
    window: u16,
    payload: &[u8],
) -> Vec<u8> {
    let len = 40 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(len.to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet.extend(GUEST);
    packet.extend(DEFAULT_ADDRESS.octets());
    packet.extend(port.to_be_bytes());
    packet.extend(80u16.to_be_bytes());
    packet.extend(next.to_be_bytes());
    packet.extend(expected.to_be_bytes());
    packet.extend([0x50, flags]);
    packet.extend(window.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend(payload);
    packet
}

/// Lets a guest do what `data` says.
pub fn fuzz(data: &[u8]) {
    let mut choices = Choices(data);
    let mut stack = stack(json!({"a": "x".repeat(9000), "b": {}}));
    let mut now = Instant::now();
    let mut ports = [Port::default(); 64];
    let mut takes = true;
    while let Some(()) = step(&mut choices, &mut stack, &mut now, &mut ports, &mut takes) {
        if takes {
            take_all(&mut stack, now, &mut ports);
        }
        stack.check();
    }
}

fn step(
    choices: &mut Choices,
    stack: &mut Stack,
    now: &mut Instant,
    ports: &mut [Port],
    takes: &mut bool,
) -> Option<()> {
    let what = choices.byte()?;
    let port = u16::from(choices.byte()?) % 64;
    let numbers = &mut ports[usize::from(port)];
    let right = [numbers.next, numbers.expected];
    let (packet, sent) = match what % 10 {
        0 => {
            *now += Duration::from_millis(u64::from(choices.word()?));
            stack.tick(*now);
            return Some(());
        }
        1 => {
            *takes = !*takes;
            return Some(());
        }
        2 => {
            let mut frame = choices.some()?.to_vec();
            if let Some(kind) = frame.get_mut(12..14) {
                kind.copy_from_slice(if what & 0x80 == 0 { &IPV4 } else { &ARP });
            }
            stack.receive(&frame, *now);
            return Some(());
        }
        3 => (segment(port, right, SYN, 8192, &[]), 1),
        4 => (segment(port, right, ACK, choices.word()?, &[]), 0),
        5 => (segment(port, right, ACK, 8192, REQUEST), REQUEST.len()),
        6 => {
            let payload = choices.some()?;
            (segment(port, right, ACK, 8192, payload), payload.len())
        }
        7 => (segment(port, right, ACK | FIN, 100, &[]), 1),
        8 => {
            // A little or far off, with any flags, options and payload.
            let off = |by: u16, number: u32| number.wrapping_add((by as i16) as i32 as u32);
            let numbers = [off(choices.word()?, right[0]), off(choices.word()?, right[1])];
            let (flags, window) = (choices.byte()?, choices.word()?);
            let mut packet = segment(port, numbers, flags, window, choices.some()?);
            packet[32] = choices.byte()?;
            (packet, 0)
        }
        _ => {
            let mut packet = segment(port, right, ACK, 8192, REQUEST);
            let at = usize::from(choices.byte()?) % packet.len();
            packet[at] = choices.byte()?;
            (packet, 0)
        }
    };
    stack.receive(&framed(&packet), *now);
    numbers.next = numbers.next.wrapping_add(sent as u32);
    Some(())
}

/// Takes what waits for the guest, and notes what is to be acknowledged.
fn take_all(stack: &mut Stack, now: Instant, ports: &mut [Port]) {
    while let Some(frame) = stack.frame() {
        let packet = frame.get(HEADER as usize + ETHERNET..).unwrap_or_default();
        assert!(frame.len() >= HEADER as usize + ETHERNET && packet.len() <= 1500);
        if let (Some(&port), Some(number), Some(flags)) =
            (packet.get(23), packet.get(24..28), packet.get(33))
            && packet[9] == 6
            && let Some(port) = ports.get_mut(usize::from(port))
        {
            let header = 20 + usize::from(packet[32] >> 4) * 4;
            let len = packet.len() - header + usize::from(flags & (SYN | FIN) != 0);
            let number = u32::from_be_bytes(number.try_into().unwrap());
            port.expected = number.wrapping_add(len as u32);
        }
        stack.delivered(now);
    }
}
