//! Requests of block, entropy and console devices that are malformed in themselves.

use super::{Attack, Case};
use crate::machine::write;
use crate::virtio::blk::{DISCARD, FLUSH, GET_ID, READ, WRITE_OUT, WRITE_ZEROES};
use crate::virtio::mmio::register::CONFIG;
use crate::virtio::{BLOCK, CONSOLE, ENTROPY, NEXT, WRITE};

pub const CASES: &[Case] = &[
    Case::only(BLOCK, "blk-header-only", |a| {
        header(a, READ, 0);
        let buffer = a.buffer;
        a.describe(0, buffer, 16, 0, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-header-short", |a| {
        header(a, READ, 0);
        let buffer = a.buffer;
        a.describe(0, buffer, 8, NEXT, 1);
        a.describe(1, buffer + 16, 1, WRITE, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-status-only", |a| {
        let buffer = a.buffer;
        a.describe(0, buffer, 1, WRITE, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-status-not-writable", |a| {
        header(a, READ, 0);
        let buffer = a.buffer;
        a.describe(0, buffer, 16, NEXT, 1);
        a.describe(1, buffer + 16, 1, 0, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-status-of-no-bytes", |a| {
        header(a, READ, 0);
        let buffer = a.buffer;
        a.describe(0, buffer, 16, NEXT, 1);
        a.describe(1, buffer + 512, 512, NEXT | WRITE, 2);
        a.describe(2, buffer + 16, 0, WRITE, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-header-in-pieces", |a| {
        header(a, READ, 0);
        let buffer = a.buffer;
        for byte in 0..16u16 {
            a.describe(byte, buffer + u64::from(byte), 1, NEXT, byte + 1);
        }
        a.describe(16, buffer + 512, 513, WRITE, 0);
        a.send(0);
    }),
    Case::only(BLOCK, "blk-sector-past-end", |a| {
        let capacity = a.device.config_wide(0);
        request(a, READ, capacity, 512, WRITE);
    }),
    Case::only(BLOCK, "blk-sector-across-end", |a| {
        let capacity = a.device.config_wide(0);
        request(a, WRITE_OUT, capacity - 1, 1024, 0);
    }),
    Case::only(BLOCK, "blk-sector-wraps", |a| request(a, READ, u64::MAX, 1024, WRITE)),
    Case::only(BLOCK, "blk-sector-wraps-in-bytes", |a| request(a, WRITE_OUT, 1 << 55, 512, 0)),
    Case::only(BLOCK, "blk-odd-length", |a| request(a, READ, 0, 100, WRITE)),
    Case::only(BLOCK, "blk-read-into-readable", |a| request(a, READ, 0, 512, 0)),
    Case::only(BLOCK, "blk-write-from-writable", |a| request(a, WRITE_OUT, 0, 512, WRITE)),
    Case::only(BLOCK, "blk-unknown-type", |a| request(a, 0xdead_beef, 0, 512, WRITE)),
    Case::only(BLOCK, "blk-flush-with-data", |a| request(a, FLUSH, u64::MAX, 512, 0)),
    Case::only(BLOCK, "blk-id-short", |a| request(a, GET_ID, 0, 5, WRITE)),
    Case::only(BLOCK, "blk-id-long", |a| request(a, GET_ID, 0, 8192, WRITE)),
    Case::only(BLOCK, "blk-id-readable", |a| request(a, GET_ID, 0, 20, 0)),
    Case::only(BLOCK, "blk-discard-past-end", |a| range(a, DISCARD, 0, u32::MAX, 16)),
    Case::only(BLOCK, "blk-discard-wraps", |a| range(a, DISCARD, u64::MAX - 1, 16, 16)),
    Case::only(BLOCK, "blk-discard-odd-length", |a| range(a, DISCARD, 0, 8, 15)),
    Case::only(BLOCK, "blk-discard-of-nothing", |a| range(a, DISCARD, 0, 0, 16)),
    Case::only(BLOCK, "blk-discard-many", |a| range(a, DISCARD, 0, 8, 32768)),
    Case::only(BLOCK, "blk-zeroes-past-end", |a| range(a, WRITE_ZEROES, 1 << 54, u32::MAX, 16)),
    Case::only(BLOCK, "blk-zeroes-wraps", |a| range(a, WRITE_ZEROES, u64::MAX, u32::MAX, 16)),
    Case::only(ENTROPY, "rng-readable", |a| {
        let buffer = a.buffer;
        a.describe(0, buffer, 4096, 0, 0);
        a.send(0);
    }),
    Case::only(ENTROPY, "rng-rest-of-ram", |a| {
        let buffer = a.buffer;
        let length = (a.end_of_ram - buffer) as u32;
        a.describe(0, buffer, length, WRITE, 0);
        a.send(0);
    }),
    Case::only(CONSOLE, "console-emergency-flood", |a| {
        for _ in 0..64 {
            write(a.device.base + CONFIG + 8, u32::from(b'.'));
        }
    }),
    Case::only(CONSOLE, "console-writable-output", |a| {
        let buffer = a.buffer;
        a.describe(0, buffer, 4096, WRITE, 0);
        a.send(0);
    }),
];

fn header(a: &mut Attack, kind: u32, sector: u64) {
    write(a.buffer, u64::from(kind));
    write(a.buffer + 8, sector);
    write(a.buffer + 16, 0xffu8);
}

/// A request of the usual shape.
fn request(a: &mut Attack, kind: u32, sector: u64, length: u32, flags: u16) {
    header(a, kind, sector);
    let buffer = a.buffer;
    a.describe(0, buffer, 16, NEXT, 1);
    a.describe(1, buffer + 512, length, NEXT | flags, 2);
    a.describe(2, buffer + 16, 1, WRITE, 0);
    a.send(0);
}

/// A discard or write-zeroes request.
fn range(a: &mut Attack, kind: u32, sector: u64, sectors: u32, length: u32) {
    for entry in 0..u64::from(length) / 16 {
        write(a.buffer + 512 + entry * 16, sector);
        write(a.buffer + 520 + entry * 16, sectors);
    }
    request(a, kind, 0, length, 0);
}
