//! Descriptor chains and rings that a device must not follow blindly (virtio 1.3 § 2.7).

use super::{Attack, BUFFER, Case};
use crate::machine::write;
use crate::virtio::queue::describe_at;
use crate::virtio::{INDIRECT, NEXT, WRITE};

/// An address that is no memory on any machine of ours.
const NOWHERE: u64 = 1 << 45;
/// The hole below 4 GiB, where devices live.
const HOLE: u64 = 0xd000_0000;

pub const CASES: &[Case] = &[
    Case::running("loop-of-one", |a| {
        let (buffer, flags) = (a.buffer, a.direction());
        a.describe(0, buffer, 16, NEXT | flags, 0);
        a.send(0);
    }),
    Case::running("loop-of-two", |a| {
        let (buffer, flags) = (a.buffer, a.direction());
        a.describe(0, buffer, 16, NEXT, 1);
        a.describe(1, buffer, 16, NEXT | flags, 0);
        a.send(0);
    }),
    Case::running("loop-of-all", |a| {
        let (buffer, flags, size) = (a.buffer, a.direction(), a.queue().size);
        for index in 0..size {
            a.describe(index, buffer, 16, NEXT | flags, (index + 1) % size);
        }
        a.send(0);
    }),
    Case::running("next-outside-table", |a| {
        let (buffer, size) = (a.buffer, a.queue().size);
        a.describe(0, buffer, 16, NEXT, size);
        a.send(0);
    }),
    Case::running("next-far-outside-table", |a| {
        let buffer = a.buffer;
        a.describe(0, buffer, 16, NEXT, 0xffff);
        a.send(0);
    }),
    Case::running("head-outside-table", |a| {
        let size = a.queue().size;
        a.send(size);
    }),
    Case::running("head-far-outside-table", |a| a.send(0xffff)),
    Case::running("data-nowhere", |a| whole_chain_at(a, NOWHERE, 512)),
    Case::running("data-in-hole", |a| whole_chain_at(a, HOLE, 512)),
    Case::running("data-wraps", |a| whole_chain_at(a, u64::MAX - 15, 512)),
    Case::running("data-at-the-top", |a| whole_chain_at(a, u64::MAX, 1)),
    Case::running("data-across-end-of-ram", |a| {
        let end = a.end_of_ram;
        whole_chain_at(a, end - 16, 512);
    }),
    Case::running("data-is-used-ring", |a| {
        let ring = a.queue().used;
        whole_chain_at(a, ring, 512);
    }),
    Case::running("data-is-available-ring", |a| {
        let ring = a.queue().available;
        whole_chain_at(a, ring, 512);
    }),
    Case::running("data-is-descriptor-table", |a| {
        let table = a.queue().descriptors;
        whole_chain_at(a, table, 1024);
    }),
    Case::running("zero-length", |a| {
        let (buffer, flags) = (a.buffer, a.direction());
        a.describe(0, buffer, 0, flags, 0);
        a.send(0);
    }),
    Case::running("zero-length-all", |a| {
        let flags = a.direction();
        for index in 0..8 {
            a.describe(index, 0, 0, if index < 7 { NEXT | flags } else { flags }, index + 1);
        }
        a.send(0);
    }),
    Case::running("wrong-direction", |a| {
        let buffer = a.buffer;
        let count = a.write_request(0, buffer);
        for index in 0..count {
            flip(a, index);
        }
        a.send(0);
    }),
    Case::running("write-before-read", |a| {
        let buffer = a.buffer;
        a.describe(0, buffer, 64, NEXT | WRITE, 1);
        a.describe(1, buffer + 4096, 64, NEXT, 2);
        a.describe(2, buffer + 8192, 64, WRITE, 0);
        a.send(0);
    }),
    Case::running("huge-length", |a| {
        let buffer = a.buffer;
        whole_chain_at(a, buffer, u32::MAX);
    }),
    Case::running("huge-total", |a| {
        // Within RAM, but the same again and again: 64 times as much as there is.
        let (buffer, flags, size) = (a.buffer, a.direction(), a.queue().size);
        let length = (a.end_of_ram - buffer) as u32;
        for index in 0..size {
            let last = index + 1 == size;
            a.describe(index, buffer, length, if last { flags } else { NEXT | flags }, index + 1);
        }
        a.send(0);
    }),
    Case::running("available-index-too-far", |a| {
        let size = a.queue().size;
        a.queue().jump(size + 1);
        a.push();
    }),
    Case::running("available-index-half-way-round", |a| {
        a.queue().jump(0x8000);
        a.push();
    }),
    Case::running("available-index-backwards", |a| {
        a.queue().jump(u16::MAX);
        a.push();
    }),
    Case::running("same-head-twice", |a| {
        let buffer = a.buffer;
        a.write_request(0, buffer);
        a.queue().offer(0);
        a.send(0);
    }),
    Case::running("whole-ring-of-garbage", |a| {
        let (size, table) = (a.queue().size, a.queue().descriptors);
        for word in 0..u64::from(size) * 2 {
            write(table + word * 8, (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        for head in 0..size {
            a.queue().offer(head);
        }
        a.push();
    }),
    Case::running("indirect-nested", |a| {
        let table = a.buffer;
        describe_at(table, 0, table, 16, INDIRECT, 0);
        indirect(a, table, 16, INDIRECT);
    }),
    Case::running("indirect-empty", |a| {
        let table = a.buffer;
        indirect(a, table, 0, INDIRECT);
    }),
    Case::running("indirect-odd-length", |a| {
        let table = a.buffer;
        describe_at(table, 0, table + 4096, 16, WRITE, 0);
        indirect(a, table, 24, INDIRECT);
    }),
    Case::running("indirect-with-next", |a| {
        let table = a.buffer;
        describe_at(table, 0, table + 4096, 16, WRITE, 0);
        indirect(a, table, 16, INDIRECT | NEXT);
    }),
    Case::running("indirect-nowhere", |a| indirect(a, NOWHERE, 64, INDIRECT)),
    Case::running("indirect-wraps", |a| indirect(a, u64::MAX - 15, 64, INDIRECT)),
    Case::running("indirect-huge", |a| {
        let table = a.buffer;
        indirect(a, table, !15, INDIRECT);
    }),
    Case::running("indirect-loop", |a| {
        let (table, flags) = (a.buffer, a.direction());
        describe_at(table, 0, table + 4096, 16, NEXT | flags, 1);
        describe_at(table, 1, table + 4096, 16, NEXT | flags, 0);
        indirect(a, table, 32, INDIRECT);
    }),
    Case::running("indirect-next-outside", |a| {
        let (table, flags) = (a.buffer, a.direction());
        describe_at(table, 0, table + 4096, 16, NEXT | flags, 9);
        indirect(a, table, 32, INDIRECT);
    }),
    Case::running("indirect-longer-than-queue", |a| {
        let (table, flags) = (a.buffer, a.direction());
        let count = (BUFFER / 2 / 16) as u16;
        for index in 0..count {
            let last = index + 1 == count;
            let flags = if last { flags } else { NEXT | flags };
            describe_at(table, index, table + BUFFER / 2, 16, flags, index + 1);
        }
        indirect(a, table, u32::from(count) * 16, INDIRECT);
    }),
];

/// A chain of the right shape for the device, all of whose descriptors point to `address`.
fn whole_chain_at(a: &mut Attack, address: u64, length: u32) {
    let buffer = a.buffer;
    let count = a.write_request(0, buffer);
    for index in 0..count {
        let at = a.queue().descriptors + u64::from(index) * 16;
        write(at, address);
        // A header and a status keep their lengths, so that the device gets as far as the data.
        if count == 1 || index == 1 {
            write(at + 8, length);
        }
    }
    a.send(0);
    if count == 3 {
        // The same with only the data astray.
        a.write_request(3, buffer);
        a.describe(4, address, length, NEXT | WRITE, 5);
        a.send(3);
    }
}

fn flip(a: &mut Attack, index: u16) {
    let at = a.queue().descriptors + u64::from(index) * 16 + 12;
    write(at, crate::machine::read::<u16>(at) ^ WRITE);
}

fn indirect(a: &mut Attack, table: u64, length: u32, flags: u16) {
    a.describe(0, table, length, flags, 1);
    a.describe(1, table, 16, WRITE, 0);
    a.send(0);
}
