//! Socket device (virtio 1.3 § 5.10): streams to and from the host, measured from the guest.

use super::blk::Random;
use super::mmio::Transport;
use super::queue::Queue;
use super::{NEXT, SOCKET, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{bytes, fill, read, ticks, write};
use crate::{print, println};

const HEADER: u64 = 44;
const HOST: u64 = 2;
const STREAM: u16 = 1;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const NO_SEND: u32 = 2;
const NEITHER: u32 = 3;

/// Ticks without progress after which it is given up.
const PATIENCE: u64 = 1 << 35;
/// Ticks after which a device without buffers has done what it can.
const STARVED: u64 = 1 << 30;
/// Connections at once.
const LIMIT: usize = 64;
/// First port of this side.
const FIRST_PORT: u32 = 1024;

/// `op=info|listen|connect|hostile`.
pub fn scenario(boot: &Boot) {
    match boot.argument("op").unwrap_or("info") {
        "info" => info(boot),
        "listen" => talk(boot, false),
        "connect" => talk(boot, true),
        "hostile" => hostile(boot),
        other => println!("vsock: no op {other}"),
    }
}

fn info(boot: &Boot) {
    let Some(device) = find(boot, SOCKET) else { return };
    let Some((features, [rx, tx, events])) = start::<3>(boot, &device, 0, 256) else { return };
    println!(
        "result vsock features={features:#x} cid={} rx={} tx={} event={}",
        device.config_wide(0),
        rx.size,
        tx.size,
        events.size
    );
}

/// What a connection does with its bytes.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Sends back what comes.
    Echo,
    /// Prints what a copy of the machine is told, and says that it is ready.
    Hook,
    /// Counts what comes.
    Sink,
    /// Sends `count=` bytes.
    Source,
}

impl Mode {
    /// True if bytes wait to go back.
    fn answers(self) -> bool {
        matches!(self, Mode::Echo | Mode::Hook)
    }
}

/// What a hook says that is ready.
const READY: &[u8] = b"{\"hull\":1,\"ready\":{}}\n";

#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    Requested,
    Open,
    /// This side is done, the host has not agreed.
    Closing,
    Closed,
}

#[derive(Clone, Copy)]
struct Connection {
    state: State,
    host: u32,
    guest: u32,
    /// Room and progress of the host.
    room: u32,
    taken: u32,
    sent: u32,
    /// Progress of this side, and what the host knows of it.
    forwarded: u32,
    told: u32,
    /// Bytes that wait to go back, in a ring as long as the room of this side.
    ring: u64,
    first: u64,
    waiting: u64,
    /// Bytes still to be made.
    left: u64,
    host_is_done: bool,
    half_closed: bool,
}

impl Connection {
    fn credit(&self) -> u64 {
        u64::from(self.room.saturating_sub(self.sent.wrapping_sub(self.taken)))
    }
}

struct Driver {
    device: Transport,
    cid: u64,
    rx: Queue,
    tx: Queue,
    events: Queue,
    rx_buffers: u64,
    rx_size: u64,
    tx_buffers: u64,
    tx_stride: u64,
    /// Transmit slots that are free.
    free: [u16; Queue::SIZE_LIMIT as usize],
    available: usize,
    /// Room of this side.
    room: u32,
}

impl Driver {
    fn new(boot: &Boot) -> Option<Driver> {
        let device = find(boot, SOCKET)?;
        let (_, [rx, tx, events]) = start::<3>(boot, &device, 0, 256)?;
        let rx_size = boot.number("buffer", 4096).clamp(HEADER + 1, 1 << 17);
        let size = boot.number("size", 4096).clamp(1, 1 << 16);
        let tx_stride = (HEADER + size).next_multiple_of(64);
        let rx_buffers = boot.allocate(rx_size * u64::from(rx.size))?;
        let tx_buffers = boot.allocate(tx_stride * u64::from(tx.size))?;
        let event = boot.allocate(64)?;
        let mut driver = Driver {
            device,
            cid: device.config_wide(0),
            rx,
            tx,
            events,
            rx_buffers,
            rx_size,
            tx_buffers,
            tx_stride,
            free: [0; Queue::SIZE_LIMIT as usize],
            available: usize::from(tx.size),
            room: boot.number("room", 256 << 10) as u32,
        };
        for (slot, entry) in driver.free.iter_mut().enumerate() {
            *entry = slot as u16;
        }
        for slot in 0..driver.rx.size {
            let at = driver.rx_buffers + driver.rx_size * u64::from(slot);
            driver.rx.describe(slot, at, driver.rx_size as u32, WRITE, 0);
            driver.rx.offer(slot);
        }
        driver.rx.publish(&driver.device);
        driver.events.describe(0, event, 64, WRITE, 0);
        driver.events.offer(0);
        driver.events.publish(&driver.device);
        Some(driver)
    }

    /// Looks whether this guest has become another, which has another address (§ 5.10.6.8).
    fn hear(&mut self) {
        if self.events.poll().is_some() {
            self.cid = self.device.config_wide(0);
            self.events.offer(0);
            self.events.publish(&self.device);
        }
    }

    /// Takes back what the device has sent.
    fn reap(&mut self) {
        while let Some((slot, _)) = self.tx.poll() {
            self.free[self.available % self.free.len()] = slot;
            self.available += 1;
        }
    }

    /// A slot for a packet: its number and where its data goes.
    fn slot(&mut self) -> Option<(u16, u64)> {
        self.reap();
        self.available = self.available.checked_sub(1)?;
        let slot = self.free[self.available % self.free.len()];
        Some((slot, self.tx_buffers + self.tx_stride * u64::from(slot) + HEADER))
    }

    /// Waits for a slot.
    fn any_slot(&mut self) -> Option<(u16, u64)> {
        let begin = ticks();
        loop {
            if let Some(slot) = self.slot() {
                return Some(slot);
            }
            self.tx.publish(&self.device);
            if ticks() - begin > PATIENCE {
                println!("vsock: the transmit queue is stuck");
                return None;
            }
        }
    }

    /// Offers the packet in `slot` with `length` bytes; the device sees it when the queue is
    /// published.
    fn send(&mut self, slot: u16, to: &mut Connection, op: u16, flags: u32, length: u32) {
        let at = self.tx_buffers + self.tx_stride * u64::from(slot);
        write(at, self.cid);
        write(at + 8, HOST);
        write(at + 16, to.guest);
        write(at + 20, to.host);
        write(at + 24, length);
        write(at + 28, u32::from(STREAM) | u32::from(op) << 16);
        write(at + 32, flags);
        write(at + 36, self.room);
        write(at + 40, to.forwarded);
        to.told = to.forwarded;
        self.tx.describe(slot, at, HEADER as u32 + length, 0, 0);
        self.tx.offer(slot);
    }

    /// Sends a packet without data.
    fn say(&mut self, to: &mut Connection, op: u16, flags: u32) {
        if let Some((slot, _)) = self.any_slot() {
            self.send(slot, to, op, flags, 0);
            self.tx.publish(&self.device);
        }
    }
}

/// Bytes that were received: how many, what they add up to, and when.
#[derive(Default)]
struct Tally {
    bytes: u64,
    sum: u64,
    first: u64,
    last: u64,
}

/// What some bytes add up to, so that any change shows.
fn add_up(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)))
}

/// Takes (or, with `connecting`, makes) `conns=` connections on `port=`, and does with each what
/// `mode=` says, until all are closed. Prints the bytes, what they add up to (with `check=1`), and ticks
/// from the first to the last.
fn talk(boot: &Boot, connecting: bool) {
    let Some(mut driver) = Driver::new(boot) else { return };
    let port = boot.number("port", 9000) as u32;
    let wanted = (boot.number("conns", 1) as usize).clamp(1, LIMIT);
    let (count, check) = (boot.number("count", 0), boot.flag("check"));
    let half = boot.flag("half");
    let mode = match boot.argument("mode").unwrap_or("echo") {
        "hook" => Mode::Hook,
        "sink" => Mode::Sink,
        "source" => Mode::Source,
        _ => Mode::Echo,
    };
    let room = u64::from(driver.room);
    let rings = if mode.answers() { room * wanted as u64 } else { 0 };
    let Some(rings) = boot.allocate(rings) else { return };
    let mut connections = [Connection {
        state: State::Free,
        host: port,
        guest: port,
        room: 0,
        taken: 0,
        sent: 0,
        forwarded: 0,
        told: 0,
        ring: rings,
        first: 0,
        waiting: 0,
        left: count,
        host_is_done: false,
        half_closed: false,
    }; LIMIT];
    for (index, connection) in connections.iter_mut().enumerate().take(wanted) {
        connection.ring = rings + room * index as u64;
        if connecting {
            connection.guest = FIRST_PORT + index as u32;
            connection.state = State::Requested;
            driver.say(connection, REQUEST, 0);
        }
    }
    println!("ready");
    let mut tally = Tally::default();
    let (mut closed, mut refused) = (0, 0);
    let mut progress = ticks();
    while closed < wanted {
        let mut received = false;
        driver.hear();
        while let Some((slot, length)) = driver.rx.poll() {
            let at = driver.rx_buffers + driver.rx_size * u64::from(slot);
            let length = u64::from(length).min(driver.rx_size);
            let before = closed;
            match place(&connections, at) {
                Some(index) => {
                    let connection = &mut connections[index];
                    let opening = connection.state == State::Requested;
                    take(&mut driver, connection, mode, at, length, check, &mut tally);
                    closed += usize::from(connection.state == State::Closed);
                    refused += usize::from(opening && closed > before);
                }
                None => stranger(&mut driver, &mut connections[..wanted], at, port, connecting),
            }
            driver.rx.offer(slot);
            received = true;
        }
        if received {
            driver.rx.publish(&driver.device);
            progress = ticks();
        }
        for connection in &mut connections[..wanted] {
            if connection.state == State::Open && pump(&mut driver, connection, mode, check, half) {
                progress = ticks();
                tally.first = if tally.first == 0 { progress } else { tally.first };
            }
        }
        if !received && ticks() - progress > PATIENCE {
            println!("vsock: stuck with {closed} of {wanted} connections closed");
            return;
        }
    }
    if mode == Mode::Source {
        tally.bytes = count * wanted as u64;
        tally.last = ticks();
    }
    println!(
        "result vsock bytes={} sum={:#x} conns={closed} refused={refused} kicks={} ticks={}",
        tally.bytes,
        tally.sum,
        driver.tx.kicks + driver.rx.kicks,
        tally.last.saturating_sub(tally.first)
    );
}

/// The connection that the packet at `at` belongs to.
fn place(connections: &[Connection], at: u64) -> Option<usize> {
    let (host, guest): (u32, u32) = (read(at + 16), read(at + 20));
    connections.iter().position(|connection| {
        !matches!(connection.state, State::Free | State::Closed)
            && (connection.host, connection.guest) == (host, guest)
    })
}

/// A packet that belongs to no connection: perhaps it begins one.
fn stranger(
    driver: &mut Driver,
    connections: &mut [Connection],
    at: u64,
    port: u32,
    connecting: bool,
) {
    let (host, guest, op): (u32, u32, u16) = (read(at + 16), read(at + 20), read(at + 30));
    let mut nobody = Connection { host, guest, ..connections[0] };
    let free = connections.iter_mut().find(|connection| connection.state == State::Free);
    match free {
        Some(connection) if op == REQUEST && guest == port && !connecting => {
            connection.host = host;
            connection.state = State::Open;
            connection.room = read(at + 36);
            connection.taken = read(at + 40);
            driver.say(connection, RESPONSE, 0);
        }
        _ if op != RESET => driver.say(&mut nobody, RESET, 0),
        _ => {}
    }
}

/// Takes a packet of a connection.
fn take(
    driver: &mut Driver,
    connection: &mut Connection,
    mode: Mode,
    at: u64,
    length: u64,
    check: bool,
    tally: &mut Tally,
) {
    connection.room = read(at + 36);
    connection.taken = read(at + 40);
    let data = length.saturating_sub(HEADER).min(u64::from(read::<u32>(at + 24)));
    match read::<u16>(at + 30) {
        RESPONSE => connection.state = State::Open,
        RESET => connection.state = State::Closed,
        SHUTDOWN => {
            connection.host_is_done |= read::<u32>(at + 32) & NO_SEND != 0;
            if read::<u32>(at + 32) & NEITHER == NEITHER && connection.waiting == 0 {
                driver.say(connection, RESET, 0);
                connection.state = State::Closed;
            }
        }
        CREDIT_REQUEST => driver.say(connection, CREDIT_UPDATE, 0),
        DATA => {
            tally.last = ticks();
            if tally.first == 0 {
                tally.first = tally.last;
            }
            tally.bytes += data;
            let bytes = bytes(at + HEADER, data as usize);
            if check {
                tally.sum = add_up(tally.sum, bytes);
            }
            if mode.answers() {
                let room = u64::from(driver.room);
                let back = match mode {
                    Mode::Hook => answer(bytes),
                    _ => bytes,
                };
                for byte in back {
                    write(connection.ring + (connection.first + connection.waiting) % room, *byte);
                    connection.waiting = (connection.waiting + 1).min(room);
                }
            } else {
                connection.forwarded = connection.forwarded.wrapping_add(data as u32);
                // As Linux: when less than a quarter of the room is left.
                let untold = connection.forwarded.wrapping_sub(connection.told);
                if untold > driver.room / 4 * 3 {
                    driver.say(connection, CREDIT_UPDATE, 0);
                }
            }
        }
        _ => {}
    }
}

/// Prints what a hook is told. What it says when that was all of it.
fn answer(told: &[u8]) -> &'static [u8] {
    print!("{}", core::str::from_utf8(told).unwrap_or("no text\n"));
    if told.ends_with(b"\n") { READY } else { &[] }
}

/// Sends what a connection has to send and may. Returns whether it did.
fn pump(
    driver: &mut Driver,
    connection: &mut Connection,
    mode: Mode,
    check: bool,
    half: bool,
) -> bool {
    let size = driver.tx_stride - HEADER;
    let mut sent = false;
    loop {
        let ready = if mode.answers() { connection.waiting } else { connection.left };
        let length = ready.min(connection.credit()).min(size);
        if mode == Mode::Sink || length == 0 {
            break;
        }
        let Some((slot, at)) = driver.slot() else { break };
        if mode.answers() {
            let room = u64::from(driver.room);
            for index in 0..length {
                let byte: u8 = read(connection.ring + (connection.first + index) % room);
                write(at + index, byte);
            }
            connection.first = (connection.first + length) % room;
            connection.waiting -= length;
            connection.forwarded = connection.forwarded.wrapping_add(length as u32);
        } else {
            if check {
                let done = connection.sent;
                (0..length).for_each(|at_| write(at + at_, pattern(u64::from(done) + at_)));
            }
            connection.left -= length;
        }
        connection.sent = connection.sent.wrapping_add(length as u32);
        driver.send(slot, connection, DATA, 0, length as u32);
        sent = true;
    }
    if sent {
        driver.tx.publish(&driver.device);
    }
    let done = match mode {
        Mode::Source => false,
        _ => connection.host_is_done && connection.waiting == 0,
    };
    if done {
        driver.say(connection, SHUTDOWN, NEITHER);
        connection.state = State::Closing;
    } else if mode == Mode::Source && connection.left == 0 && half && !connection.half_closed {
        driver.say(connection, SHUTDOWN, NO_SEND);
        connection.half_closed = true;
    }
    sent
}

/// Byte number `index` of a source.
fn pattern(index: u64) -> u8 {
    (index.wrapping_mul(31) % 251) as u8
}

/// Sends `count=` packets of nonsense made from `seed=`, some of them to connections that are there, in
/// chains of any shape; then says how the device is.
fn hostile(boot: &Boot) {
    let Some(mut driver) = Driver::new(boot) else { return };
    let mut random = Random(boot.number("seed", 1) | 1);
    let starve = boot.flag("starve");
    let port = boot.number("port", 9000) as u32;
    let area = driver.tx_buffers;
    fill(area, 4096, 0xa5);
    let (mut sent, mut answers, mut progress) = (0, 0u64, ticks());
    while sent < boot.number("count", 10_000) {
        while let Some((slot, _)) = driver.rx.poll() {
            answers += 1;
            if !starve {
                driver.rx.offer(slot);
            }
        }
        driver.rx.publish(&driver.device);
        let begin = ticks();
        // Three descriptors each, of one slot in four.
        driver.reap();
        let Some(available) = driver.available.checked_sub(1) else {
            // Without buffers for answers the device stops in the end.
            if begin - progress > if starve { STARVED } else { PATIENCE } {
                break;
            }
            continue;
        };
        progress = begin;
        driver.available = available;
        let slot = driver.free[available % driver.free.len()] / 4 * 4;
        if driver.free[available % driver.free.len()] != slot {
            continue;
        }
        let at = area + driver.tx_stride * u64::from(slot);
        let roll = random.next();
        let any = |random: &mut Random, usual: u64| match random.next() % 8 {
            0 => random.next(),
            _ => usual,
        };
        write(at, any(&mut random, driver.cid));
        write(at + 8, any(&mut random, HOST));
        write(at + 16, (FIRST_PORT as u64 + random.next() % 40) as u32);
        write(at + 20, any(&mut random, u64::from(port)) as u32);
        let length = random.next() % 300;
        write(at + 24, any(&mut random, length) as u32);
        write(at + 28, any(&mut random, u64::from(STREAM)) as u16);
        write(at + 30, (random.next() % 9) as u16);
        write(at + 32, random.next() as u32 & 7);
        write(at + 36, any(&mut random, 65536) as u32);
        write(at + 40, any(&mut random, 0) as u32);
        match roll % 4 {
            0 => driver.tx.describe(slot, at, 1 + (roll >> 8) as u32 % 43, 0, 0),
            1 => {
                driver.tx.describe(slot, at, 20, NEXT, slot + 1);
                driver.tx.describe(slot + 1, at + 20, 24 + length as u32, 0, 0);
            }
            2 => {
                driver.tx.describe(slot, at, 44, NEXT, slot + 1);
                driver.tx.describe(slot + 1, area, 1 + length as u32, NEXT, slot + 2);
                driver.tx.describe(slot + 2, area, 100, WRITE, 0);
            }
            _ => driver.tx.describe(slot, at, 44 + length as u32, 0, 0),
        }
        driver.tx.offer(slot);
        driver.tx.publish(&driver.device);
        sent += 1;
    }
    let status = driver.device.status();
    println!("result vsock sent={sent} answers={answers} status={status:#x}");
}
