//! Frames and headers that a network device must not hand on blindly (virtio 1.3 § 5.1.6).

use super::{Attack, BUFFER, Case};
use crate::machine::write;
use crate::virtio::net::HEADER;
use crate::virtio::{NET, NEXT};

const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;

pub const CASES: &[Case] = &[
    Case::only(NET, "net-header-short", |a| send(a, 4)),
    Case::only(NET, "net-header-only", |a| send(a, HEADER as u32)),
    Case::only(NET, "net-frame-of-a-byte", |a| send(a, HEADER as u32 + 1)),
    Case::only(NET, "net-frame-giant", |a| send(a, BUFFER as u32)),
    Case::only(NET, "net-frame-64k-and-more", |a| send(a, 70000)),
    Case::only(NET, "net-header-in-pieces", |a| {
        let buffer = a.buffer;
        a.write_request(0, buffer);
        for byte in 0..12u16 {
            a.describe(byte, buffer + u64::from(byte), 1, NEXT, byte + 1);
        }
        a.describe(12, buffer + HEADER, 64, 0, 0);
        a.send(0);
    }),
    Case::only(NET, "net-frame-of-many-pieces", |a| {
        let (buffer, size) = (a.buffer, a.queue().size);
        a.write_request(0, buffer);
        for index in 0..size {
            let last = index + 1 == size;
            a.describe(index, buffer, 24, if last { 0 } else { NEXT }, index + 1);
        }
        a.send(0);
    }),
    Case::only(NET, "net-gso-unknown", |a| with_header(a, 0, 0x7f, 0, 1448, 0, 0)),
    Case::only(NET, "net-gso-size-zero", |a| with_header(a, 0, GSO_TCP4, 54, 0, 0, 0)),
    Case::only(NET, "net-gso-without-checksum", |a| with_header(a, 0, GSO_TCP6, 54, 100, 0, 0)),
    Case::only(NET, "net-header-length-huge", |a| {
        with_header(a, NEEDS_CHECKSUM, GSO_TCP4, 0xffff, 1448, 34, 16);
    }),
    Case::only(NET, "net-checksum-past-end", |a| {
        with_header(a, NEEDS_CHECKSUM, 0, 0, 0, 0xffff, 0xffff);
    }),
    Case::only(NET, "net-checksum-wraps", |a| {
        with_header(a, NEEDS_CHECKSUM, 0, 0, 0, 0xfff0, 0x20);
    }),
    Case::only(NET, "net-header-all-ones", |a| {
        with_header(a, 0xff, 0xff, 0xffff, 0xffff, 0xffff, 0xffff);
    }),
];

fn send(a: &mut Attack, length: u32) {
    let buffer = a.buffer;
    a.write_request(0, buffer);
    a.describe(0, buffer, length, 0, 0);
    a.send(0);
}

/// A frame of 1000 bytes with the given fields of `virtio_net_hdr`.
fn with_header(
    a: &mut Attack,
    flags: u8,
    segmentation: u8,
    header_length: u16,
    segment: u16,
    start: u16,
    offset: u16,
) {
    let buffer = a.buffer;
    a.write_request(0, buffer);
    write(buffer, [flags, segmentation]);
    write(buffer + 2, [header_length, segment, start, offset]);
    a.describe(0, buffer, HEADER as u32 + 1000, 0, 0);
    a.send(0);
}
