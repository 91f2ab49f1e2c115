//! Drivers that break the rules. Each case does one wrong thing to a device; afterwards the device
//! is reset and driven properly, and has to work.
//!
//! `payload=hostile dev=rng|blk|net|console case=NAME|all queue=N` prints a line per case:
//! `hostile NAME status=… used=… recovered|broken REASON`, where *status* is the device status after the
//! attack (0x40: the device wants a reset), *used* how many chains came back, and *broken* means
//! that the device did not reset or did not serve a proper request after it.

mod chains;
mod net;
mod registers;
mod requests;

use crate::boot::Boot;
use crate::machine::{fill, read, ticks, write};
use crate::virtio::mmio::{NEEDS_RESET, Transport};
use crate::virtio::queue::Queue;
use crate::virtio::{
    BLOCK, CONSOLE, ENTROPY, F_EVENT_IDX, F_INDIRECT, F_VERSION_1, NET, NEXT, WRITE, blk, find,
    net as driver,
};
use crate::{print, println, serial};

/// How long a device has to react to an attack, in ticks: tens of milliseconds.
const REACTION: u64 = 1 << 27;
/// How long a proper request may take after the attack.
const PATIENCE: u64 = 1 << 33;
/// Memory for requests.
const BUFFER: u64 = 64 * 4096;

/// In what state a case wants the device.
#[derive(Clone, Copy, PartialEq)]
pub enum Stage {
    /// Just reset.
    Reset,
    /// Negotiated, its queues ready, DRIVER_OK.
    Running,
}

/// One wrong thing to do.
pub struct Case {
    name: &'static str,
    stage: Stage,
    /// The device that it is for; 0 for any.
    kind: u32,
    attack: fn(&mut Attack),
}

impl Case {
    const fn running(name: &'static str, attack: fn(&mut Attack)) -> Case {
        Case { name, stage: Stage::Running, kind: 0, attack }
    }

    const fn reset(name: &'static str, attack: fn(&mut Attack)) -> Case {
        Case { name, stage: Stage::Reset, kind: 0, attack }
    }

    const fn only(kind: u32, name: &'static str, attack: fn(&mut Attack)) -> Case {
        Case { name, stage: Stage::Running, kind, attack }
    }
}

/// A device under attack.
pub struct Attack {
    pub device: Transport,
    pub kind: u32,
    /// Features agreed on.
    pub features: u64,
    pub queues: [Queue; 2],
    /// The queue that is attacked.
    pub victim: usize,
    /// Zeroed memory of `BUFFER` bytes.
    pub buffer: u64,
    /// First address after the RAM range in which this program lies.
    pub end_of_ram: u64,
    rings: u64,
}

impl Attack {
    fn new(boot: &Boot, kind: u32) -> Option<Attack> {
        let device = find(boot, kind)?;
        let rings = boot.allocate(2 * Queue::BYTES)?;
        let buffer = boot.allocate(BUFFER)?;
        let range = boot
            .ram()
            .find(|range| range.start <= buffer && buffer < range.start + range.length)?;
        // The driver's own direction: what a network device or console is sent.
        let victim = if kind == NET || kind == CONSOLE { 1 } else { 0 };
        Some(Attack {
            device,
            kind,
            features: 0,
            queues: [Queue::absent(); 2],
            victim: boot.number("queue", victim) as usize % 2,
            buffer,
            end_of_ram: range.start + range.length,
            rings,
        })
    }

    /// Fresh memory for queues and requests.
    fn clear(&mut self) {
        fill(self.rings, 2 * Queue::BYTES as usize, 0);
        fill(self.buffer, BUFFER as usize, 0);
    }

    /// The device's features that are of use here.
    pub fn wanted(&self) -> u64 {
        let own = match self.kind {
            BLOCK => blk::FEATURES,
            NET => driver::FEATURES,
            _ => 0,
        };
        own | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT
    }

    /// The queues of this kind of device that are used here.
    fn queue_count(&self) -> usize {
        if self.kind == NET || self.kind == CONSOLE { 2 } else { 1 }
    }

    /// The rings of a queue, not yet set up.
    pub fn rings(&self, index: usize) -> Queue {
        let memory = self.rings + Queue::BYTES * index as u64;
        Queue::new(index as u16, 64, memory, self.features & F_EVENT_IDX != 0)
    }

    /// Starts the device as a good driver would, or says what stands in the way.
    fn start(&mut self) -> Result<(), &'static str> {
        if !self.device.reset() {
            return Err("reset");
        }
        // Not before the reset: until then the device may write into its rings.
        self.clear();
        self.features = self.device.negotiate(self.wanted()).ok_or("features")?;
        for index in 0..self.queue_count() {
            let memory = self.rings + Queue::BYTES * index as u64;
            let events = self.features & F_EVENT_IDX != 0;
            self.queues[index] =
                self.device.set_up_queue(index as u16, 64, memory, events).ok_or("queue")?;
        }
        self.device.driver_ok();
        self.healthy()
    }

    fn healthy(&self) -> Result<(), &'static str> {
        if self.device.status() & NEEDS_RESET == 0 { Ok(()) } else { Err("needs-reset") }
    }

    /// The attacked queue.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[self.victim]
    }

    /// Fills in a descriptor of the attacked queue.
    pub fn describe(&mut self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.queue().describe(index, address, length, flags, next);
    }

    /// Offers a chain of the attacked queue and notifies the device, wanted or not.
    pub fn send(&mut self, head: u16) {
        self.queue().offer(head);
        self.push();
    }

    /// Publishes what is offered and notifies the device, wanted or not.
    pub fn push(&mut self) {
        let (device, index) = (self.device, self.queues[self.victim].index);
        self.queue().publish(&device);
        device.notify(index);
    }

    /// Writes a proper request of this device at descriptors `first` and following, with its data
    /// in `buffer`. Returns how many descriptors it takes.
    pub fn write_request(&mut self, first: u16, buffer: u64) -> u16 {
        match self.kind {
            BLOCK => {
                write(buffer, [0u64; 2]);
                write(buffer + 16, 0xffu8);
                self.describe(first, buffer, 16, NEXT, first + 1);
                self.describe(first + 1, buffer + 512, 512, NEXT | WRITE, first + 2);
                self.describe(first + 2, buffer + 16, 1, WRITE, 0);
                3
            }
            ENTROPY => {
                self.describe(first, buffer, 16, WRITE, 0);
                1
            }
            _ if self.victim == 0 => {
                self.describe(first, buffer, 2048, WRITE, 0);
                1
            }
            NET => {
                driver::write_frame(buffer, &self.device, false);
                self.describe(first, buffer, driver::HEADER as u32 + 64, 0, 0);
                1
            }
            _ => {
                write(buffer, b'\n');
                self.describe(first, buffer, 1, 0, 0);
                1
            }
        }
    }

    /// The flags that a data descriptor of the attacked queue has.
    pub fn direction(&self) -> u16 {
        match self.kind {
            NET | CONSOLE if self.victim == 1 => 0,
            _ => WRITE,
        }
    }

    /// Serves a proper request after a reset, or says what stands in the way.
    fn works(&mut self) -> Result<(), &'static str> {
        let victim = self.victim;
        self.victim = self.queue_count() - 1;
        let outcome = self.start().and_then(|()| self.serves());
        self.victim = victim;
        outcome
    }

    fn serves(&mut self) -> Result<(), &'static str> {
        let (device, buffer) = (self.device, self.buffer);
        self.write_request(0, buffer);
        self.queue().offer(0);
        self.queue().publish(&device);
        match self.queue().wait(PATIENCE) {
            None => return Err("no-completion"),
            Some((0, _)) => {}
            Some(_) => return Err("wrong-completion"),
        }
        if self.kind == BLOCK && read::<u8>(buffer + 16) != 0 {
            return Err("request-failed");
        }
        self.healthy()
    }

    /// Sends what has been printed through the console that has just been shown to work: where it
    /// is the machine's console, COM1 is nobody's.
    fn print_on_console(&mut self) {
        const LENGTH: usize = 2048;
        let mut text = [0; LENGTH];
        let length = serial::mirror(&mut text);
        if self.kind != CONSOLE || length == 0 {
            return;
        }
        // On a line of its own, after whatever the case has sent.
        write(self.buffer, b'\n');
        for (index, byte) in text.iter().enumerate() {
            write(self.buffer + 1 + index as u64, *byte);
        }
        let (device, victim) = (self.device, self.victim);
        self.victim = 1;
        self.describe(0, self.buffer, length as u32 + 1, 0, 0);
        self.queue().offer(0);
        self.queue().publish(&device);
        self.queue().wait(PATIENCE);
        self.victim = victim;
    }

    fn run(&mut self, case: &Case) -> bool {
        let ready = match case.stage {
            Stage::Running => self.start().is_ok(),
            Stage::Reset => {
                let reset = self.device.reset();
                self.clear();
                self.features = 0;
                for index in 0..self.queue_count() {
                    self.queues[index] = self.rings(index);
                }
                reset
            }
        };
        if ready {
            (case.attack)(self);
        }
        let start = ticks();
        let used = self.queues[self.victim].used;
        let returned = || if used == 0 { 0 } else { read::<u16>(used + 2) };
        while ticks() - start < REACTION
            && returned() == 0
            && self.device.status() & NEEDS_RESET == 0
        {
            core::hint::spin_loop();
        }
        let (status, returned) = (self.device.status(), returned());
        print!("hostile {} status={status:#x} used={returned} ", case.name);
        let outcome = if ready { self.works() } else { Err("not-started") };
        match outcome {
            Ok(()) => println!("recovered"),
            Err(reason) => println!("broken {reason}"),
        }
        if outcome.is_ok() {
            self.print_on_console();
        }
        outcome.is_ok()
    }
}

fn cases() -> impl Iterator<Item = &'static Case> {
    [chains::CASES, registers::CASES, requests::CASES, net::CASES].into_iter().flatten()
}

/// Runs the cases that the command line asks for.
pub fn scenario(boot: &Boot) {
    let kind = match boot.argument("dev").unwrap_or("rng") {
        "blk" => BLOCK,
        "net" => NET,
        "console" => CONSOLE,
        _ => ENTROPY,
    };
    let wanted = boot.argument("case").unwrap_or("all");
    let Some(mut attack) = Attack::new(boot, kind) else { return };
    if let Err(reason) = attack.works() {
        println!("the device does not work to begin with: {reason}");
        return;
    }
    // From here on, and not what came before.
    attack.print_on_console();
    let (mut count, mut broken) = (0, 0);
    for case in cases().filter(|case| case.kind == 0 || case.kind == kind) {
        if wanted == "all" || wanted == case.name {
            count += 1;
            broken += u32::from(!attack.run(case));
        }
    }
    println!("result hostile cases={count} broken={broken}");
    attack.print_on_console();
}
