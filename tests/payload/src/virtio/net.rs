//! Network device (virtio 1.3 § 5.1): sending and receiving frames, measured from the guest.

use super::mmio::Transport;
use super::mmio::register::{GENERATION, INTERRUPT_STATUS};
use super::queue::Queue;
use super::{NET, NEXT, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{bytes, read, ticks, write};
use crate::{print, println, serial};

/// Bytes of `virtio_net_hdr` with `num_buffers`, as VERSION_1 has it always.
pub const HEADER: u64 = 12;
/// Feature bits.
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_UFO: u64 = 1 << 10;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_UFO: u64 = 1 << 14;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
/// What a benchmark wants: frames as they are. `offload=1` adds the rest.
pub const FEATURES: u64 = F_MAC | F_MTU | F_STATUS | F_MRG_RXBUF;
const OFFLOADS: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_UFO
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_UFO;

/// Ethertype for local experiments: no protocol stack answers it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Ticks without any frame after which a receiver gives up.
const PATIENCE: u64 = 1 << 35;

/// `op=tx|rx|ping|info|mq`.
pub fn scenario(boot: &Boot) {
    match boot.argument("op").unwrap_or("tx") {
        "tx" => transmit(boot),
        "rx" => receive(boot, false),
        "ping" => receive(boot, true),
        "info" => info(boot),
        "mq" => pairs(boot),
        other => println!("net: no op {other}"),
    }
}

fn features(boot: &Boot) -> u64 {
    let mut wanted = if boot.flag("offload") { FEATURES | OFFLOADS } else { FEATURES };
    if boot.flag("nomrg") {
        wanted &= !F_MRG_RXBUF;
    }
    wanted
}

fn info(boot: &Boot) {
    let Some(device) = find(boot, NET) else { return };
    let offered = device.features();
    let Some((agreed, [rx, tx])) = start::<2>(boot, &device, features(boot), 256) else { return };
    print!("result net offered={offered:#x} features={agreed:#x} mac=");
    for index in 0..6 {
        print!("{:02x}", device.config::<u8>(index));
    }
    println!(
        " status={} pairs={} mtu={} rx={} tx={}",
        device.config::<u16>(6),
        device.config::<u16>(8),
        device.config::<u16>(10),
        rx.size,
        tx.size
    );
}

/// A card whose driver runs and only looks what its configuration says.
pub struct Watched(Transport);

impl Watched {
    /// Starts the first card.
    pub fn new(boot: &Boot) -> Option<Watched> {
        let device = find(boot, NET)?;
        start::<2>(boot, &device, FEATURES, 16).map(|_| Watched(device))
    }

    /// Prints the card's address, how often the configuration changed, and the interrupts that are pending.
    pub fn lap(&self) {
        print!("result net mac=");
        for index in 0..6 {
            print!("{:02x}", self.0.config::<u8>(index));
        }
        let (changes, interrupts) = (self.0.get(GENERATION), self.0.get(INTERRUPT_STATUS));
        println!(" changes={changes} interrupts={interrupts}");
    }
}

/// Writes header and Ethernet header of a frame to a made-up neighbour (or the broadcast address,
/// with `broadcast`), from the device's address.
pub fn write_frame(address: u64, device: &Transport, broadcast: bool) {
    for index in 0..HEADER {
        write(address + index, 0u8);
    }
    let neighbour = [2u8, 0, 0, 0, 0, 2];
    for index in 0..6u64 {
        let to = if broadcast { 0xff } else { neighbour[index as usize] };
        write(address + HEADER + index, to);
        write(address + HEADER + 6 + index, device.config::<u8>(index));
    }
    write(address + HEADER + 12, ETHERTYPE);
}

/// Sends `count=` frames of `size=` bytes, `batch=` at a time (1, as a protocol stack does, unless
/// told otherwise), as long as the queue has room; prints ticks per frame. `segs=2` puts the header into a descriptor of its own.
fn transmit(boot: &Boot) {
    let Some(device) = find(boot, NET) else { return };
    let Some((_, [_rx, mut tx])) = start::<2>(boot, &device, features(boot), 256) else { return };
    let size = boot.number("size", 64).clamp(14, 65000);
    let count = boot.number("count", 10000).max(1);
    let split = boot.number("segs", 1) == 2;
    let slots = u64::from(if split { tx.size / 2 } else { tx.size });
    let slots = boot.number("depth", slots).clamp(1, slots);
    let stride = (HEADER + size).next_multiple_of(64);
    let Some(buffers) = boot.allocate(stride * slots) else { return };
    for slot in 0..slots {
        let at = buffers + slot * stride;
        write_frame(at, &device, boot.flag("broadcast"));
        let index = slot as u16;
        if split {
            tx.describe(index * 2, at, HEADER as u32, NEXT, index * 2 + 1);
            tx.describe(index * 2 + 1, at + HEADER, size as u32, 0, 0);
        } else {
            tx.describe(index, at, (HEADER + size) as u32, 0, 0);
        }
    }
    let head = |slot: u16| if split { slot * 2 } else { slot };
    let batch = boot.number("batch", 1).max(1);
    let start = ticks();
    let mut progress = start;
    let (mut sent, mut done) = (0, 0);
    // Chains come back in any order, so what is free is a stack.
    let mut free = [0u16; Queue::SIZE_LIMIT as usize];
    let mut available = slots as usize;
    for (slot, entry) in free.iter_mut().enumerate().take(available) {
        *entry = head(slot as u16);
    }
    while done < count {
        while let Some((head, _)) = tx.poll() {
            free[available % free.len()] = head;
            available += 1;
            done += 1;
            progress = ticks();
        }
        let burst = batch.min(count - sent).min(available as u64);
        for _ in 0..burst {
            available -= 1;
            tx.offer(free[available % free.len()]);
        }
        sent += burst;
        if burst > 0 {
            tx.publish(&device);
        } else {
            core::hint::spin_loop();
            if ticks() - progress > PATIENCE {
                println!("net: stuck with {done} of {sent} sent");
                return;
            }
        }
    }
    let each = (ticks() - start) / count;
    println!(
        "result net op=tx size={size} batch={batch} count={count} kicks={} ticks={each}",
        tx.kicks
    );
}

/// Receives frames until `count=` have come, or none for a long time; prints how many, their
/// bytes, and ticks per frame from the first one to the last. With `reply`, each frame goes back
/// to its sender, and a frame whose payload begins with `end` is the last one.
fn receive(boot: &Boot, reply: bool) {
    let Some(device) = find(boot, NET) else { return };
    let Some((agreed, [mut rx, mut tx])) = start::<2>(boot, &device, features(boot), 256) else {
        return;
    };
    let merged = agreed & F_MRG_RXBUF != 0;
    let big = agreed & (F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO) != 0 && !merged;
    let buffer = boot.number("buffer", if big { 65562 } else { 2048 }).clamp(HEADER + 14, 1 << 17);
    let count = boot.number("count", 1000);
    let Some(buffers) = boot.allocate(buffer * u64::from(rx.size)) else { return };
    for slot in 0..rx.size {
        rx.describe(slot, buffers + buffer * u64::from(slot), buffer as u32, WRITE, 0);
        rx.offer(slot);
    }
    rx.publish(&device);
    println!("ready");

    let (mut frames, mut octets, mut foreign) = (0u64, 0u64, 0u64);
    let (mut first, mut last) = (0, ticks());
    let mut pieces = Pieces::default();
    let mut buffers_used = 0u64;
    let mut over = false;
    while frames < count && !over {
        let Some((slot, length)) = rx.poll() else {
            core::hint::spin_loop();
            if ticks() - last > PATIENCE {
                break;
            }
            continue;
        };
        buffers_used += 1;
        pieces.add(buffers + buffer * u64::from(slot), length);
        let head = pieces.head();
        let wanted = if merged { usize::from(read::<u16>(head + 10)) } else { 1 };
        if pieces.count >= wanted.clamp(1, Pieces::LIMIT) {
            // A frame of ours, not one that the host's stack sends by itself (IPv6, for one).
            if read::<[u8; 2]>(head + HEADER + 12) == ETHERTYPE {
                last = ticks();
                if frames == 0 {
                    first = last;
                }
                frames += 1;
                octets += pieces.bytes().saturating_sub(HEADER);
                over = bytes(head + HEADER + 14, 3) == b"end";
                if reply {
                    echo(&device, &mut tx, &pieces);
                }
            } else {
                foreign += 1;
            }
            // Not before the echo is out: its memory is theirs.
            for at in pieces.addresses() {
                rx.offer(((at - buffers) / buffer) as u16);
            }
            rx.publish(&device);
            pieces = Pieces::default();
        }
    }
    let each = (last - first) / frames.saturating_sub(1).max(1);
    println!(
        "result net op={} frames={frames} bytes={octets} buffers={buffers_used} foreign={foreign} \
         kicks={} ticks={each}",
        if reply { "ping" } else { "rx" },
        rx.kicks
    );
}

/// The buffers that one received frame is in: several with mergeable buffers.
struct Pieces {
    parts: [(u64, u32); Pieces::LIMIT],
    count: usize,
}

impl Default for Pieces {
    fn default() -> Self {
        Pieces { parts: [(0, 0); Pieces::LIMIT], count: 0 }
    }
}

impl Pieces {
    const LIMIT: usize = 64;

    fn add(&mut self, address: u64, length: u32) {
        if let Some(part) = self.parts.get_mut(self.count) {
            *part = (address, length);
            self.count += 1;
        }
    }

    fn parts(&self) -> &[(u64, u32)] {
        self.parts.get(..self.count).unwrap_or(&[])
    }

    /// Where the frame's header is.
    fn head(&self) -> u64 {
        self.parts[0].0
    }

    fn bytes(&self) -> u64 {
        self.parts().iter().map(|(_, length)| u64::from(*length)).sum()
    }

    fn addresses(&self) -> impl Iterator<Item = u64> + '_ {
        self.parts().iter().map(|(address, _)| *address)
    }
}

/// Sends a received frame back and waits until it is out.
fn echo(device: &Transport, tx: &mut Queue, frame: &Pieces) {
    let at = frame.head();
    let to: [u8; 6] = read(at + HEADER);
    let from: [u8; 6] = read(at + HEADER + 6);
    write(at + HEADER, from);
    write(at + HEADER + 6, to);
    write(at, [0u8; HEADER as usize]);
    for (index, (address, length)) in frame.parts().iter().enumerate() {
        let next = index as u16 + 1;
        let flags = if usize::from(next) < frame.count { NEXT } else { 0 };
        tx.describe(index as u16, *address, *length, flags, next);
    }
    tx.offer(0);
    tx.publish(device);
    if tx.wait(PATIENCE).is_none() {
        println!("net: an echo is stuck");
    }
}

/// Sets up `pairs=` queue pairs with the control queue (§ 5.1.6.5.6), turns them on and sends one
/// frame on each.
fn pairs(boot: &Boot) {
    let Some(device) = find(boot, NET) else { return };
    let wanted = features(boot) | F_CTRL_VQ | F_MQ | super::F_VERSION_1 | super::F_EVENT_IDX;
    let Some(agreed) = device.negotiate(wanted) else { return };
    if agreed & F_MQ == 0 {
        println!("result net op=mq pairs=1");
        return;
    }
    let limit = device.config::<u16>(8);
    let pairs = (boot.number("pairs", 2) as u16).clamp(1, limit.clamp(1, 8));
    let events = agreed & super::F_EVENT_IDX != 0;
    let mut queues = [Queue::absent(); 17];
    // The control queue follows the last pair that the device has, not the last in use.
    for (place, slot) in queues.iter_mut().enumerate().take(usize::from(pairs) * 2 + 1) {
        let index = if place == usize::from(pairs) * 2 { limit * 2 } else { place as u16 };
        let Some(memory) = boot.allocate(Queue::BYTES) else { return };
        let Some(queue) = device.set_up_queue(index, 256, memory, events) else {
            println!("queue {index} cannot be set up");
            return;
        };
        *slot = queue;
    }
    device.driver_ok();
    let Some(buffer) = boot.allocate(4096) else { return };
    // Class VIRTIO_NET_CTRL_MQ, command VQ_PAIRS_SET, the number of pairs; an answer.
    write(buffer, [4u8, 0]);
    write(buffer + 2, pairs);
    write(buffer + 4, 0xffu8);
    let control = &mut queues[usize::from(pairs) * 2];
    control.describe(0, buffer, 2, NEXT, 1);
    control.describe(1, buffer + 2, 2, NEXT, 2);
    control.describe(2, buffer + 4, 1, WRITE, 0);
    control.offer(0);
    control.publish(&device);
    let answered = control.wait(PATIENCE).is_some();
    let answer: u8 = read(buffer + 4);
    let mut sent = 0;
    write_frame(buffer + 64, &device, false);
    for pair in 0..usize::from(pairs) {
        let tx = &mut queues[pair * 2 + 1];
        tx.describe(0, buffer + 64, HEADER as u32 + 64, 0, 0);
        tx.offer(0);
        tx.publish(&device);
        sent += u32::from(tx.wait(PATIENCE).is_some());
    }
    println!("result net op=mq pairs={pairs} limit={limit} answer={answer} {answered} sent={sent}");
    serial::put(b'\n');
}
