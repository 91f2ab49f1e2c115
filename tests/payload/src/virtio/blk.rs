//! Block device (virtio 1.3 § 5.2): requests of every type, measured and verified.

use super::mmio::Transport;
use super::queue::{Queue, describe_at};
use super::{BLOCK, F_INDIRECT, INDIRECT, NEXT, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{bytes, fill, read, ticks, write};
use crate::println;

const SECTOR: u64 = 512;
/// Request types.
pub const READ: u32 = 0;
pub const WRITE_OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;
/// Feature bits.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// All that this driver knows.
pub const FEATURES: u64 =
    F_SEG_MAX | F_RO | F_BLK_SIZE | F_FLUSH | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES;

/// Ticks to wait for one request: a disk may be slow.
const PATIENCE: u64 = 1 << 36;
/// A status that no device writes.
const NO_STATUS: u8 = 0xff;
/// Bytes of one slot's header and status, and of its indirect table.
const SLOT: u64 = 32;
const TABLE: u64 = 16 * 256;

/// A disk with `depth` slots for requests, each with a buffer of `size` bytes.
struct Disk {
    device: Transport,
    queue: Queue,
    features: u64,
    /// Sectors.
    capacity: u64,
    depth: u16,
    size: u64,
    /// Data descriptors per request.
    segments: u16,
    headers: u64,
    tables: u64,
    buffers: u64,
}

impl Disk {
    fn new(boot: &Boot) -> Option<Disk> {
        let device = find(boot, BLOCK)?;
        let (features, [queue]) = start::<1>(boot, &device, FEATURES, Queue::SIZE_LIMIT)?;
        let segments = boot.number("segs", 1).clamp(1, 126) as u16;
        let indirect = features & F_INDIRECT != 0;
        let per_request = if indirect { 1 } else { segments + 2 };
        let depth = boot.number("depth", 1).clamp(1, u64::from(queue.size / per_request)) as u16;
        let size = boot.number("size", 4096).next_multiple_of(SECTOR);
        Some(Disk {
            capacity: device.config_wide(0),
            device,
            queue,
            features,
            depth,
            size,
            segments,
            headers: boot.allocate(SLOT * u64::from(depth))?,
            tables: boot.allocate(TABLE * u64::from(depth))?,
            buffers: boot.allocate(size.next_multiple_of(4096) * u64::from(depth))?,
        })
    }

    fn buffer(&self, slot: u16) -> u64 {
        self.buffers + self.size.next_multiple_of(4096) * u64::from(slot)
    }

    fn header(&self, slot: u16) -> u64 {
        self.headers + SLOT * u64::from(slot)
    }

    /// The slot's status byte lies behind its header.
    fn status(&self, slot: u16) -> u8 {
        read(self.header(slot) + 16)
    }

    fn head(&self, slot: u16) -> u16 {
        if self.features & F_INDIRECT != 0 { slot } else { slot * (self.segments + 2) }
    }

    fn slot(&self, head: u16) -> u16 {
        if self.features & F_INDIRECT != 0 { head } else { head / (self.segments + 2) }
    }

    /// Writes the descriptors of a slot for `length` bytes of data, in or out.
    fn prepare(&self, slot: u16, length: u64, flags: u16) {
        let (table, first) = if self.features & F_INDIRECT != 0 {
            (self.tables + TABLE * u64::from(slot), 0)
        } else {
            (self.queue.descriptors, self.head(slot))
        };
        let segments = if length == 0 { 0 } else { self.segments };
        let each = length.div_ceil(u64::from(segments.max(1))).next_multiple_of(SECTOR);
        describe_at(table, first, self.header(slot), 16, NEXT, first + 1);
        let (mut at, mut left) = (first + 1, length);
        while left > 0 {
            let part = left.min(each);
            let from = self.buffer(slot) + length - left;
            describe_at(table, at, from, part as u32, flags | NEXT, at + 1);
            left -= part;
            at += 1;
        }
        describe_at(table, at, self.header(slot) + 16, 1, WRITE, 0);
        if self.features & F_INDIRECT != 0 {
            let bytes = 16 * u32::from(at - first + 1);
            self.queue.describe(slot, table, bytes, INDIRECT, 0);
        }
    }

    /// Offers a prepared slot.
    fn submit(&mut self, slot: u16, kind: u32, sector: u64) {
        let header = self.header(slot);
        write(header, u64::from(kind));
        write(header + 8, sector);
        write(header + 16, NO_STATUS);
        let head = self.head(slot);
        self.queue.offer(head);
    }

    /// One request from beginning to end. Returns its status and the bytes written.
    fn request(&mut self, kind: u32, sector: u64, length: u64, flags: u16) -> Option<(u8, u32)> {
        self.prepare(0, length, flags);
        self.submit(0, kind, sector);
        self.queue.publish(&self.device);
        let (_, written) = self.queue.wait(PATIENCE)?;
        Some((self.status(0), written))
    }
}

/// Numbers that neither a cache nor a read-ahead guesses (xorshift64).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Blocks of a disk that are known by heart, spread over all of it.
pub struct Known {
    disk: Disk,
    blocks: u64,
    /// What they were written with; 0 if they were not.
    stamp: u64,
}

impl Known {
    /// `blocks` of the first disk.
    pub fn new(boot: &Boot, blocks: u64) -> Option<Known> {
        let disk = Disk::new(boot)?;
        let blocks = blocks.min(disk.capacity * SECTOR / disk.size);
        Some(Known { disk, blocks, stamp: 0 })
    }

    fn sector(&self, block: u64) -> u64 {
        let sectors = self.disk.size / SECTOR;
        self.disk.capacity / sectors / self.blocks.max(1) * block * sectors
    }

    fn words(&self) -> impl Iterator<Item = u64> + use<> {
        let start = self.disk.buffer(0);
        (start..start + self.disk.size).step_by(8)
    }

    /// Looks at all of them, writes others that no copy of this machine writes, and flushes. Whoever finds other
    /// things than were written says so.
    pub fn lap(&mut self) {
        for block in 0..self.blocks {
            if self.stamp == 0 {
                break;
            }
            let answer = self.disk.request(READ, self.sector(block), self.disk.size, WRITE);
            let is_read = answer.is_some_and(|(status, _)| status == 0);
            if !is_read || !self.words().all(|word| read::<u64>(word) == self.stamp ^ block) {
                println!("result disk lost={block} stamp={:#x} read={is_read}", self.stamp);
            }
        }
        // Copies of a machine do not come here at the same time.
        let stamp = ticks() << 16;
        let mut done = true;
        for block in 0..self.blocks {
            self.words().for_each(|word| write(word, stamp ^ block));
            let answer = self.disk.request(WRITE_OUT, self.sector(block), self.disk.size, 0);
            done &= answer.is_some_and(|(status, _)| status == 0);
        }
        done &= self.disk.request(FLUSH, 0, 0, 0).is_some_and(|(status, _)| status == 0);
        self.stamp = stamp;
        if done {
            println!("result disk stamp={stamp:#x} blocks={}", self.blocks);
        } else {
            println!("result disk lost=all");
        }
    }
}

/// `op=read|write|flush|discard|wzeroes|id|verify|info`.
pub fn scenario(boot: &Boot) {
    let Some(mut disk) = Disk::new(boot) else { return };
    match boot.argument("op").unwrap_or("read") {
        "read" => measure(boot, &mut disk, READ),
        "write" => measure(boot, &mut disk, WRITE_OUT),
        "flush" => one(&mut disk, "flush", FLUSH, 0, 0, 0),
        "discard" => range(boot, &mut disk, "discard", DISCARD),
        "wzeroes" => range(boot, &mut disk, "wzeroes", WRITE_ZEROES),
        "id" => identify(&mut disk),
        "verify" => verify(boot, &mut disk),
        "get" => one(&mut disk, "get", READ, boot.number("sector", 0), 0, WRITE),
        "put" => one(&mut disk, "put", WRITE_OUT, boot.number("sector", 0), 0, 0),
        "info" => info(&disk),
        other => println!("blk: no op {other}"),
    }
}

fn info(disk: &Disk) {
    println!(
        "result blk features={:#x} sectors={} seg_max={} blk_size={} queue={}",
        disk.features,
        disk.capacity,
        disk.device.config::<u32>(12),
        disk.device.config::<u32>(20),
        disk.queue.size,
    );
}

fn one(disk: &mut Disk, name: &str, kind: u32, sector: u64, length: u64, flags: u16) {
    let length = if name == "get" || name == "put" { disk.size } else { length };
    match disk.request(kind, sector, length, flags) {
        Some((status, written)) => println!("result {name} status={status} written={written}"),
        None => println!("result {name} status=none"),
    }
}

/// Discards or zeroes `sectors=` sectors from `sector=` on; `unmap=1` sets the flag.
fn range(boot: &Boot, disk: &mut Disk, name: &str, kind: u32) {
    write(disk.buffer(0), boot.number("sector", 0));
    write(disk.buffer(0) + 8, boot.number("sectors", 8) as u32);
    write(disk.buffer(0) + 12, boot.number("unmap", 0) as u32);
    match disk.request(kind, 0, 16, 0) {
        Some((status, _)) => println!("result {name} status={status}"),
        None => println!("result {name} status=none"),
    }
}

fn identify(disk: &mut Disk) {
    fill(disk.buffer(0), 20, 0);
    match disk.request(GET_ID, 0, 20, WRITE) {
        Some((status, _)) => {
            let id = bytes(disk.buffer(0), 20);
            let length = id.iter().position(|byte| *byte == 0).unwrap_or(id.len());
            let id = core::str::from_utf8(id.get(..length).unwrap_or(&[])).unwrap_or("?");
            println!("result id status={status} id={id}");
        }
        None => println!("result id status=none"),
    }
}

/// Keeps `depth=` requests of `size=` bytes in flight until `count=` are done, at random places or
/// with `pattern=seq` one after the other, with a flush after every `flush=` writes; prints ticks
/// per request.
fn measure(boot: &Boot, disk: &mut Disk, kind: u32) {
    let count = boot.number("count", 1000).max(1);
    let flush = boot.number("flush", 0);
    let sequential = boot.argument("pattern") == Some("seq");
    let blocks = disk.capacity * SECTOR / disk.size;
    if blocks == 0 {
        println!("blk: the disk is smaller than a request");
        return;
    }
    let flags = if kind == READ { WRITE } else { 0 };
    for slot in 0..disk.depth {
        fill(disk.buffer(slot), disk.size as usize, slot as u8 | 1);
        disk.prepare(slot, disk.size, flags);
    }
    let sectors = disk.size / SECTOR;
    let mut random = Random(boot.number("seed", 0x9e37_79b9_7f4a_7c15) | 1);
    let (mut sent, mut done, mut failed) = (0, 0, 0u64);
    let mut place =
        |sent: u64| sectors * if sequential { sent % blocks } else { random.next() % blocks };
    let start = ticks();
    while sent < count.min(u64::from(disk.depth)) {
        disk.submit(sent as u16, kind, place(sent));
        sent += 1;
    }
    disk.queue.publish(&disk.device);
    let mut progress = start;
    while done < count {
        let mut any = false;
        while let Some((head, _)) = disk.queue.poll() {
            any = true;
            done += 1;
            let slot = disk.slot(head);
            failed += u64::from(disk.status(slot) != 0);
            if flush != 0 && done % flush == 0 {
                // A barrier as a file system would set it: nothing else is on the way meanwhile.
                disk.queue.publish(&disk.device);
                while done < sent {
                    match disk.queue.wait(PATIENCE) {
                        Some((head, _)) => {
                            failed += u64::from(disk.status(disk.slot(head)) != 0);
                            done += 1;
                        }
                        None => break,
                    }
                }
                let flushed = disk.request(FLUSH, 0, 0, 0);
                failed += u64::from(flushed.is_none_or(|(status, _)| status != 0));
                disk.prepare(0, disk.size, flags);
                let mut slot = 0;
                while slot < disk.depth && sent < count {
                    disk.submit(slot, kind, place(sent));
                    sent += 1;
                    slot += 1;
                }
                break;
            }
            if sent < count {
                disk.submit(slot, kind, place(sent));
                sent += 1;
            }
        }
        if any {
            disk.queue.publish(&disk.device);
            progress = ticks();
        } else {
            core::hint::spin_loop();
            if ticks() - progress > PATIENCE {
                println!("blk: stuck with {done} of {sent} done");
                return;
            }
        }
    }
    let each = (ticks() - start) / count;
    println!(
        "result blk op={} size={} depth={} count={count} failed={failed} kicks={} ticks={each}",
        if kind == READ { "read" } else { "write" },
        disk.size,
        disk.depth,
        disk.queue.kicks
    );
}

/// Writes a pattern made of sector number and `seed=` to `count=` blocks of `size=` bytes from
/// `sector=` on, flushes, reads back and compares. `read=1` leaves the writing out; with `stay=1` the machine
/// goes on afterwards, and does nothing.
fn verify(boot: &Boot, disk: &mut Disk) {
    let seed = boot.number("seed", 1);
    let sectors = disk.size / SECTOR;
    let first = boot.number("sector", 0);
    let count = boot.number("count", 16).min(disk.capacity.saturating_sub(first) / sectors);
    let expected = |sector: u64, word: u64| Random((sector + 1) * 0x9e37_79b9 + seed + word).next();
    let (mut bad, mut failed) = (0u64, 0u64);
    let words = disk.size / 8;
    if !boot.flag("read") {
        for block in 0..count {
            let sector = first + block * sectors;
            for word in 0..words {
                write(disk.buffer(0) + word * 8, expected(sector + word / 64, word % 64));
            }
            let outcome = disk.request(WRITE_OUT, sector, disk.size, 0);
            failed += u64::from(outcome.is_none_or(|(status, _)| status != 0));
        }
        if disk.features & F_FLUSH != 0 {
            let outcome = disk.request(FLUSH, 0, 0, 0);
            failed += u64::from(outcome.is_none_or(|(status, _)| status != 0));
        }
    }
    for block in 0..count {
        let sector = first + block * sectors;
        fill(disk.buffer(0), disk.size as usize, 0xa5);
        let outcome = disk.request(READ, sector, disk.size, WRITE);
        let whole = disk.size as u32 + 1;
        failed += u64::from(outcome != Some((0, whole)));
        for word in 0..words {
            let found: u64 = read(disk.buffer(0) + word * 8);
            bad += u64::from(found != expected(sector + word / 64, word % 64));
        }
    }
    println!("result verify size={} count={count} failed={failed} bad={bad}", disk.size);
    if boot.flag("stay") {
        crate::basic::halt(boot);
    }
}
