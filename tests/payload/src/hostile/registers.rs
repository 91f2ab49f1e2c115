//! Registers touched in the wrong order, size, place or state (virtio 1.3 § 3.1, § 4.2.2).

use super::{Attack, Case};
use crate::machine::{read, ticks, write};
use crate::println;
use crate::virtio::mmio::register::*;
use crate::virtio::mmio::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use crate::virtio::queue::Queue;

const NOWHERE: u64 = 1 << 45;
const HOLE: u64 = 0xd000_0000;

pub const CASES: &[Case] = &[
    Case::reset("features-unknown", |a| {
        a.device.set(STATUS, ACKNOWLEDGE | DRIVER);
        a.device.choose_features(u64::MAX);
        a.device.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if a.device.status() & FEATURES_OK != 0 {
            println!("note: unknown features were agreed to");
        }
        go(a);
    }),
    Case::reset("features-none", |a| {
        a.device.set(STATUS, ACKNOWLEDGE | DRIVER);
        a.device.choose_features(0);
        a.device.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        go(a);
    }),
    Case::reset("features-select-far", |a| {
        for select in [2, 3, 0x8000_0000, u32::MAX] {
            a.device.set(DEVICE_FEATURES_SEL, select);
            a.device.set(DRIVER_FEATURES_SEL, select);
            if a.device.get(DEVICE_FEATURES) != 0 {
                println!("note: features in word {select:#x}");
            }
            a.device.set(DRIVER_FEATURES, u32::MAX);
        }
    }),
    Case::running("features-after-the-fact", |a| {
        a.device.choose_features(u64::MAX);
        request(a);
    }),
    Case::reset("driver-ok-at-once", |a| {
        a.device.set(STATUS, DRIVER_OK);
        set_up(a, |_| {});
        request(a);
    }),
    Case::reset("notify-before-driver-ok", |a| {
        negotiate(a);
        set_up(a, |_| {});
        request(a);
    }),
    Case::reset("notify-before-anything", |a| {
        for queue in 0..4 {
            a.device.notify(queue);
        }
    }),
    Case::reset("driver-ok-without-queues", |a| {
        negotiate(a);
        a.device.driver_ok();
        for queue in 0..4 {
            a.device.notify(queue);
        }
    }),
    Case::reset("queue-size-odd", |a| with_queue(a, |queue| queue.size = 100)),
    Case::reset("queue-size-zero", |a| with_size(a, 0)),
    Case::reset("queue-size-too-large", |a| with_size(a, 32768)),
    Case::reset("queue-size-65535", |a| with_size(a, 65535)),
    Case::reset("queue-size-huge", |a| with_size(a, u32::MAX)),
    Case::reset("descriptors-unaligned", |a| with_queue(a, |queue| queue.descriptors += 1)),
    Case::reset("available-unaligned", |a| with_queue(a, |queue| queue.available += 1)),
    Case::reset("used-unaligned", |a| with_queue(a, |queue| queue.used += 2)),
    Case::reset("rings-nowhere", |a| with_rings_at(a, NOWHERE)),
    Case::reset("rings-in-hole", |a| with_rings_at(a, HOLE)),
    Case::reset("rings-wrap", |a| with_rings_at(a, !15)),
    Case::reset("rings-at-zero", |a| with_rings_at(a, 0)),
    Case::reset("rings-across-end-of-ram", |a| {
        let end = a.end_of_ram;
        with_rings_at(a, end - 16);
    }),
    Case::reset("rings-on-top-of-each-other", |a| {
        let buffer = a.buffer;
        with_rings_at(a, buffer);
    }),
    Case::reset("only-used-ring-nowhere", |a| with_queue(a, |queue| queue.used = NOWHERE)),
    Case::reset("queue-that-is-not-there", |a| {
        negotiate(a);
        for select in [3, 1000, 0xffff, 0x1_0000, u32::MAX] {
            a.device.set(QUEUE_SEL, select);
            if a.device.get(QUEUE_SIZE_MAX) != 0 && select > 100 {
                println!("note: there is a queue {select:#x}");
            }
            a.device.set(QUEUE_SIZE, 64);
            a.device.set(QUEUE_READY, 1);
        }
        a.device.driver_ok();
    }),
    Case::running("notify-queue-that-is-not-there", |a| {
        for queue in [3, 17, 99, 0xffff, 0x1_0000, u32::MAX] {
            a.device.set(QUEUE_NOTIFY, queue);
        }
    }),
    Case::running("notify-flood", |a| {
        let index = a.queue().index;
        for _ in 0..2000 {
            a.device.notify(index);
        }
    }),
    Case::running("queue-moves-while-running", |a| {
        let mut moved = a.rings(a.victim);
        moved.descriptors = NOWHERE;
        moved.available = NOWHERE;
        moved.used = NOWHERE;
        moved.size = 0x8000;
        a.device.describe_queue(&moved);
        request(a);
    }),
    Case::running("queue-stops-while-running", |a| {
        fill_queue(a);
        let index = u32::from(a.queue().index);
        a.device.set(QUEUE_SEL, index);
        a.device.set(QUEUE_READY, 0);
        a.device.set(QUEUE_READY, 1);
        a.device.set(QUEUE_READY, u32::MAX);
    }),
    Case::running("reset-in-mid-request", |a| {
        for _ in 0..20 {
            fill_queue(a);
            a.device.reset();
            silence(a);
            if let Err(reason) = a.start() {
                println!("hostile: no start after a reset: {reason}");
                return;
            }
        }
    }),
    Case::running("status-loses-bits", |a| {
        fill_queue(a);
        a.device.set(STATUS, ACKNOWLEDGE);
        request(a);
    }),
    Case::running("status-all-bits", |a| {
        a.device.set(STATUS, u32::MAX);
        request(a);
    }),
    Case::running("status-again", |a| {
        for _ in 0..100 {
            a.device.driver_ok();
        }
        request(a);
    }),
    Case::running("acknowledge-all-interrupts", |a| {
        a.device.set(INTERRUPT_ACK, u32::MAX);
        request(a);
        a.device.set(INTERRUPT_ACK, u32::MAX);
    }),
    Case::running("configuration-writes", |a| {
        for offset in (0..64).chain([0xe00, 0xefc, 0xeff, 0xf00]) {
            let at = a.device.base + CONFIG + offset;
            // Not past the end of the page of registers, where the next device begins.
            write(at, 0xffu8);
            if at % 4096 <= 4094 {
                write(at, 0xffffu16);
            }
            if at % 4096 <= 4092 {
                write(at, u32::MAX);
            }
            if at % 4096 <= 4088 {
                write(at, u64::MAX);
            }
        }
    }),
    Case::running("configuration-reads", |a| {
        for offset in (0..64).chain([0xe00, 0xef0]) {
            let at = a.device.base + CONFIG + offset;
            read::<u8>(at);
            read::<u16>(at);
            read::<u32>(at);
            read::<u64>(at);
        }
    }),
    Case::running("register-reads-of-odd-sizes", |a| {
        for offset in 0..CONFIG {
            let at = a.device.base + offset;
            read::<u8>(at);
            read::<u16>(at);
            read::<u64>(at);
            if offset % 4 != 0 {
                read::<u32>(at);
            }
        }
    }),
    Case::running("register-writes-of-odd-sizes", |a| {
        for offset in 0..CONFIG {
            let at = a.device.base + offset;
            write(at, 0xffu8);
            write(at, 0xffffu16);
            write(at, u64::MAX);
            if offset % 4 != 0 {
                write(at, u32::MAX);
            }
        }
    }),
    Case::running("read-only-registers-written", |a| {
        for register in [MAGIC, VERSION, DEVICE_ID, 0x0c, DEVICE_FEATURES, QUEUE_SIZE_MAX] {
            a.device.set(register, u32::MAX);
        }
        a.device.set(INTERRUPT_STATUS, u32::MAX);
        a.device.set(GENERATION, u32::MAX);
        request(a);
    }),
    Case::running("registers-without-a-name", |a| {
        for register in (0xa8..0xfc).step_by(4).chain([0x18, 0x1c, 0x28, 0x3c, 0x48, 0x4c, 0x68]) {
            a.device.get(register);
            a.device.set(register, u32::MAX);
        }
    }),
];

fn negotiate(a: &mut Attack) {
    if let Some(features) = a.device.negotiate(a.wanted()) {
        a.features = features;
    }
}

/// Sets up the attacked queue, changed by `spoil`.
fn set_up(a: &mut Attack, spoil: impl Fn(&mut Queue)) {
    let mut queue = a.rings(a.victim);
    spoil(&mut queue);
    a.device.describe_queue(&queue);
    a.device.set(QUEUE_READY, 1);
    // What is attacked with keeps sane rings, so that this program does not fall over itself.
    a.queues[a.victim] = a.rings(a.victim);
}

fn go(a: &mut Attack) {
    set_up(a, |_| {});
    a.device.driver_ok();
    request(a);
}

/// Offers a proper request.
fn request(a: &mut Attack) {
    let buffer = a.buffer;
    a.write_request(0, buffer);
    a.send(0);
}

fn with_queue(a: &mut Attack, spoil: impl Fn(&mut Queue)) {
    negotiate(a);
    set_up(a, spoil);
    a.device.driver_ok();
    request(a);
}

fn with_rings_at(a: &mut Attack, address: u64) {
    with_queue(a, |queue| {
        (queue.descriptors, queue.available, queue.used) = (address, address, address);
    });
}

fn with_size(a: &mut Attack, size: u32) {
    negotiate(a);
    let queue = a.rings(a.victim);
    a.device.describe_queue(&queue);
    a.device.set(QUEUE_SIZE, size);
    a.device.set(QUEUE_READY, 1);
    a.device.driver_ok();
    a.queues[a.victim] = queue;
    request(a);
}

/// Offers as many proper requests as fit.
fn fill_queue(a: &mut Attack) {
    let (buffer, size) = (a.buffer, a.queue().size);
    let mut first = 0;
    while first + 3 <= size {
        let count = a.write_request(first, buffer + 4096 * u64::from(first / 3));
        a.queue().offer(first);
        first += count.max(3);
    }
    a.push();
}

/// After a reset a device must leave memory alone: what it had in hand included.
fn silence(a: &mut Attack) {
    const MARK: u64 = 0x5a5a_a5a5_1234_4321;
    for page in 0..21 {
        write(a.buffer + page * 4096 + 512, MARK);
        write(a.buffer + page * 4096 + 16, 0xeeu8);
    }
    let start = ticks();
    while ticks() - start < 1 << 22 {
        core::hint::spin_loop();
    }
    for page in 0..21 {
        let changed = read::<u64>(a.buffer + page * 4096 + 512) != MARK
            || read::<u8>(a.buffer + page * 4096 + 16) != 0xee;
        if changed {
            println!("hostile: memory changed after a reset");
            return;
        }
    }
}
