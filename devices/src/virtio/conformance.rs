//! Drives a device as a guest's driver would, without a guest: for tests and fuzzing only.
//!
//! A [`Harness`] owns guest memory, the transport's registers and the workers, and plays both
//! sides of them: the driver (negotiates, fills rings, reads used rings) and the io thread (kicks,
//! readiness, completions, timers), on the calling thread and in an order that the test decides.
//! The [`conformance!`] macro gives a device the tests that every device owes; [`fuzz`] turns bytes
//! into what a hostile driver might do.

// A harness that goes on after a failure would hide it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod checks;
mod fuzzing;
mod reactor;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, Fault, Message, Payload, RestoreError, Worker};
use super::mmio::{Effect, Registers, reg, status};
use super::queue::{INTERRUPT_CONFIG, Interrupt, MAX_SIZE, Queue, QueueState};
use super::{Kind, features};
use crate::memory::{GuestMemory, Memory};

pub use fuzzing::fuzz;
use reactor::TestReactor;

/// One descriptor of a chain: guest-physical address, length in bytes, device-writable.
pub type Buffer = (u64, u32, bool);

/// RAM that tests use for buffers: from 0, in bytes.
pub const RAM: u64 = 2 << 20;
/// Start of a second piece of RAM, which holds the rings; nothing lies between the two.
pub const RINGS: u64 = 4 << 20;
/// Length of the second piece in bytes.
pub const RINGS_LEN: u64 = 1 << 20;

const RING_STRIDE: u64 = 0x4000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const FIRST_BUFFER: u64 = 0x10000;

/// Descriptor flag: another one follows.
pub const NEXT: u16 = 1;
/// Descriptor flag: device-writable.
pub const WRITE: u16 = 2;
/// Descriptor flag: points to a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Turns after which [`Harness::run`] gives up: a device that still has something to do then
/// serves a driver that always has more, or spins.
const TURNS: usize = 64;

/// The driver's view of one queue.
#[derive(Debug, Default, Clone)]
struct Ring {
    size: u16,
    base: u64,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    avail: u16,
    /// Where `avail` stood when the device's wish for notifications was last looked at.
    notified: u16,
    used: u16,
}

impl Ring {
    fn new(index: u16, size: u16) -> Ring {
        Ring {
            size,
            base: RINGS + u64::from(index) * RING_STRIDE,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            notified: 0,
            used: 0,
        }
    }
}

/// A worker and the queues that it serves.
struct Started {
    group: usize,
    worker: Box<dyn Worker>,
    queues: Vec<u16>,
}

/// A device with a driver around it.
pub struct Harness<D: Device> {
    device: D,
    registers: Registers,
    memory: Memory,
    interrupt: Interrupt,
    irq: EventFd,
    workers: Vec<Started>,
    reactor: TestReactor,
    rings: Vec<Ring>,
    next_buffer: u64,
    kicks: Vec<u16>,
    faulted: bool,
}

impl<D: Device> Harness<D> {
    /// Powers `device` on.
    pub fn new(device: D) -> Harness<D> {
        let ranges = [(GuestAddress(0), RAM as usize), (GuestAddress(RINGS), RINGS_LEN as usize)];
        let memory = Memory::new(Arc::new(GuestMemory::from_ranges(&ranges).unwrap()));
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(irq.try_clone().unwrap());
        let registers = Registers::new(
            device.kind() as u32,
            device.features(),
            device.queues(),
            device.config(),
        );
        let rings = (0..).zip(device.queues()).map(|(i, &max)| Ring::new(i, max)).collect();
        Harness {
            device,
            registers,
            memory,
            interrupt,
            irq,
            workers: Vec::new(),
            reactor: TestReactor::new(),
            rings,
            next_buffer: FIRST_BUFFER,
            kicks: Vec::new(),
            faulted: false,
        }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, to be changed as `vmm` would change it.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The transport's registers.
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// The device's interrupt.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    // ---- the driver's registers ----

    /// Reads a 4-byte register.
    pub fn read_register(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a 4-byte register and does what follows from it.
    pub fn write_register(&mut self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    /// Writes any bytes at any offset of the register window and does what follows from it.
    pub fn write_bytes(&mut self, offset: u64, data: &[u8]) {
        match self.registers.write(offset, data) {
            Effect::None | Effect::Ignored(_) => {}
            Effect::Activate => self.start(),
            Effect::Reset => {
                self.stop();
                self.device.reset();
                self.registers.finish_reset();
                self.interrupt.acknowledge(u32::MAX);
                self.faulted = false;
                self.reactor.faults.clear();
            }
            Effect::Notify(queue) => self.kicks.push(queue),
            Effect::Config { offset, data } => {
                if let Some(config) = self.device.write_config(offset, &data) {
                    self.registers.publish_config(config);
                    self.interrupt.raise(INTERRUPT_CONFIG);
                }
            }
        }
    }

    /// Negotiates `wanted` up to FEATURES_OK. Returns whether the device accepted.
    pub fn negotiate(&mut self, wanted: u64) -> bool {
        self.write_register(reg::STATUS, status::ACKNOWLEDGE);
        self.write_register(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        for half in 0..2 {
            self.write_register(reg::DRIVER_FEATURES_SEL, half);
            self.write_register(reg::DRIVER_FEATURES, (wanted >> (32 * half)) as u32);
        }
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write_register(reg::STATUS, ok);
        self.read_register(reg::STATUS) & status::FEATURES_OK != 0
    }

    /// Feature bits that are offered.
    pub fn offered(&mut self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.write_register(reg::DEVICE_FEATURES_SEL, half);
            all | u64::from(self.read_register(reg::DEVICE_FEATURES)) << (32 * half)
        })
    }

    /// Initialises the device with everything that it offers.
    pub fn activate(&mut self) {
        let offered = self.offered();
        self.activate_with(offered);
    }

    /// Initialises the device with these feature bits and all of its queues.
    pub fn activate_with(&mut self, wanted: u64) {
        assert!(self.negotiate(wanted), "features {wanted:#x} were refused");
        for index in 0..self.rings.len() as u16 {
            self.set_up_queue(index, None);
        }
        let ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write_register(reg::STATUS, ok);
        self.run();
    }

    /// Gives queue `index` rings of `size` descriptors (its maximum if `None`), emptied.
    pub fn set_up_queue(&mut self, index: u16, size: Option<u16>) {
        self.write_register(reg::QUEUE_SEL, u32::from(index));
        let max = self.read_register(reg::QUEUE_SIZE_MAX) as u16;
        let ring = Ring::new(index, size.unwrap_or(max));
        let base = ring.base;
        let zeros = vec![0; RING_STRIDE as usize];
        self.memory.guest().write_slice(&zeros, GuestAddress(base)).unwrap();
        self.write_register(reg::QUEUE_SIZE, u32::from(ring.size));
        let areas = [
            (reg::QUEUE_DESC_LOW, base),
            (reg::QUEUE_DRIVER_LOW, base + AVAIL),
            (reg::QUEUE_DEVICE_LOW, base + USED),
        ];
        for (low, gpa) in areas {
            self.write_register(low, gpa as u32);
            self.write_register(low + 4, (gpa >> 32) as u32);
        }
        self.write_register(reg::QUEUE_READY, 1);
        self.rings[usize::from(index)] = ring;
    }

    /// Resets the device as a driver does.
    pub fn reset(&mut self) {
        self.write_register(reg::STATUS, 0);
        assert_eq!(self.read_register(reg::STATUS), 0, "reset did not complete");
    }

    // ---- the machine's side ----

    fn start(&mut self) {
        let negotiated = self.registers.negotiated();
        let ready: Vec<(u16, QueueState)> = self.registers.ready_queues().collect();
        for (group, range) in self.device.groups().into_iter().enumerate() {
            let mine: Vec<_> = ready.iter().filter(|(i, _)| range.contains(i)).copied().collect();
            if mine.is_empty() {
                continue;
            }
            let mut queues = Vec::new();
            for (index, state) in mine {
                match Queue::new(&self.memory, &self.interrupt, state) {
                    Ok(queue) => queues.push((index, queue)),
                    Err(err) => return self.mark(Fault::Queue(index, err)),
                }
            }
            let mut worker = match self.device.worker(group, negotiated) {
                Ok(worker) => worker,
                Err(err) => return self.mark(Fault::Backend(err)),
            };
            let indices: Vec<u16> = queues.iter().map(|&(index, _)| index).collect();
            self.reactor.group = group;
            for (index, queue) in queues {
                worker.start_queue(index, queue, &mut self.reactor);
            }
            self.kicks.extend(&indices);
            self.workers.push(Started { group, worker, queues: indices });
        }
    }

    fn mark(&mut self, fault: Fault) {
        self.reactor.faults.push(fault);
        self.note_faults();
    }

    fn note_faults(&mut self) {
        if !self.reactor.faults.is_empty() && !self.faulted {
            self.faulted = true;
            if self.registers.needs_reset() {
                self.interrupt.raise(INTERRUPT_CONFIG);
            }
        }
    }

    /// Stops every queue; workers are gone afterwards. Operations under way are finished.
    fn stop(&mut self) -> Vec<(u16, QueueState)> {
        self.kicks.clear();
        let mut states = Vec::new();
        for mut started in std::mem::take(&mut self.workers) {
            self.reactor.group = started.group;
            let mut waiting = 0;
            for &index in &started.queues {
                match started.worker.stop_queue(index, &mut self.reactor) {
                    Some(state) => states.push((index, state)),
                    None => waiting += 1,
                }
            }
            while waiting > self.reactor.stopped.len() {
                let (token, result) = self
                    .reactor
                    .finish_operation(Some(started.group))
                    .expect("a queue waits to be stopped with nothing in flight");
                started.worker.on_completion(token, result, &mut self.reactor);
            }
            states.append(&mut self.reactor.stopped);
            assert!(
                self.reactor.operations.iter().all(|op| op.group != started.group),
                "a stopped worker has operations in flight"
            );
            drop(started);
            self.reactor.forget(self.reactor.group);
        }
        states.sort_by_key(|&(index, _)| index);
        states
    }

    /// Pauses the device: all queues stopped. Returns where they stand.
    pub fn pause(&mut self) -> Vec<(u16, QueueState)> {
        let states = self.stop();
        for &(index, state) in &states {
            self.registers.set_progress(index, state);
        }
        states
    }

    /// Goes on after [`Harness::pause`].
    pub fn resume(&mut self) {
        if self.registers.status() & status::DRIVER_OK != 0 {
            self.start();
        }
    }

    /// Whether the device asked for a reset since the last one, and why.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.note_faults();
        (!self.reactor.faults.is_empty()).then(|| self.reactor.faults.remove(0))
    }

    /// Sends `message` to all workers.
    pub fn message(&mut self, message: &Message) {
        self.each_worker(|worker, reactor| worker.on_message(message.clone(), reactor));
        self.run();
    }

    /// Lets timers that workers have set expire. Returns whether there was one.
    pub fn expire_timers(&mut self) -> bool {
        let due = std::mem::take(&mut self.reactor.timers);
        for &group in &due {
            self.reactor.group = group;
            if let Some(started) = self.workers.iter_mut().find(|w| w.group == group) {
                started.worker.on_timer(&mut self.reactor);
            }
        }
        self.note_faults();
        !due.is_empty()
    }

    fn each_worker(&mut self, mut call: impl FnMut(&mut dyn Worker, &mut TestReactor)) {
        for started in &mut self.workers {
            self.reactor.group = started.group;
            call(started.worker.as_mut(), &mut self.reactor);
        }
        self.note_faults();
    }

    /// Keeps file operations waiting until [`Harness::finish_operation`], instead of performing
    /// them in [`Harness::run`].
    pub fn hold_operations(&mut self, hold: bool) {
        self.reactor.hold = hold;
    }

    /// File operations that were submitted and have not ended.
    pub fn operations(&self) -> usize {
        self.reactor.operations.len()
    }

    /// Performs the oldest file operation. Returns false if there is none.
    pub fn finish_operation(&mut self) -> bool {
        let Some(group) = self.reactor.operations.front().map(|op| op.group) else { return false };
        let Some((token, result)) = self.reactor.finish_operation(Some(group)) else {
            return false;
        };
        self.reactor.group = group;
        if let Some(started) = self.workers.iter_mut().find(|w| w.group == group) {
            started.worker.on_completion(token, result, &mut self.reactor);
        }
        self.note_faults();
        true
    }

    /// Makes the oldest file operation fail with `errno`. Returns false if there is none.
    pub fn fail_operation(&mut self, errno: i32) -> bool {
        let Some(operation) = self.reactor.operations.pop_front() else { return false };
        self.reactor.group = operation.group;
        let group = operation.group;
        if let Some(started) = self.workers.iter_mut().find(|w| w.group == group) {
            let err = std::io::Error::from_raw_os_error(errno);
            started.worker.on_completion(operation.token, Err(err), &mut self.reactor);
        }
        self.note_faults();
        true
    }

    /// Runs the workers until they have nothing to do. Returns false if they still had after many
    /// turns.
    pub fn run(&mut self) -> bool {
        for _ in 0..TURNS {
            if !self.turn() {
                return true;
            }
        }
        false
    }

    /// One turn of the event loop. Returns false if there was nothing to do.
    pub fn turn(&mut self) -> bool {
        let mut kicks = std::mem::take(&mut self.kicks);
        kicks.append(&mut self.reactor.again);
        kicks.dedup();
        let mut busy = !kicks.is_empty();
        for index in kicks {
            if self.faulted {
                break;
            }
            if let Some(started) = self.workers.iter_mut().find(|w| w.queues.contains(&index)) {
                self.reactor.group = started.group;
                started.worker.on_kick(index, &mut self.reactor);
                self.note_faults();
            }
        }
        for (group, token) in self.reactor.poll() {
            busy = true;
            self.reactor.group = group;
            if let Some(started) = self.workers.iter_mut().find(|w| w.group == group) {
                started.worker.on_event(token, &mut self.reactor);
                self.note_faults();
            }
        }
        if !self.reactor.hold {
            while self.finish_operation() {
                busy = true;
            }
        }
        busy
    }

    // ---- the driver's rings and buffers ----

    /// Writes to guest memory.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Reads guest memory.
    pub fn read(&self, gpa: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.memory.guest().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn buffer(&mut self, len: u32) -> u64 {
        let step = u64::from(len).next_multiple_of(16);
        if self.next_buffer + step > RAM {
            self.next_buffer = FIRST_BUFFER;
        }
        let gpa = self.next_buffer;
        self.next_buffer += step;
        gpa
    }

    /// A buffer of `len` zero bytes for the device to write to: address and length.
    pub fn writable(&mut self, len: u32) -> (u64, u32) {
        let gpa = self.buffer(len);
        self.write(gpa, &vec![0; len as usize]);
        (gpa, len)
    }

    /// A buffer with `bytes` for the device to read: address and length.
    pub fn readable(&mut self, bytes: &[u8]) -> (u64, u32) {
        let gpa = self.buffer(bytes.len() as u32);
        self.write(gpa, bytes);
        (gpa, bytes.len() as u32)
    }

    /// Writes descriptor `index` of queue `queue` as it is.
    pub fn descriptor(
        &mut self,
        queue: u16,
        index: u16,
        gpa: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.rings[usize::from(queue)].base + 16 * u64::from(index);
        self.write(at, &descriptor_bytes(gpa, len, flags, next));
    }

    /// Makes `head` available in queue `queue`, whatever it is.
    pub fn make_available(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = ring.base + AVAIL + 4 + 2 * u64::from(ring.avail % ring.size);
        ring.avail = ring.avail.wrapping_add(1);
        let (index_at, index) = (ring.base + AVAIL + 2, ring.avail);
        self.write(slot, &head.to_le_bytes());
        self.write(index_at, &index.to_le_bytes());
    }

    /// Sets the available index of queue `queue`, wherever it stood.
    pub fn set_available_index(&mut self, queue: u16, index: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        ring.avail = index;
        let at = ring.base + AVAIL + 2;
        self.write(at, &index.to_le_bytes());
    }

    /// Sets the flags that ask for no interrupts (without EVENT_IDX).
    pub fn set_available_flags(&mut self, queue: u16, flags: u16) {
        let at = self.rings[usize::from(queue)].base + AVAIL;
        self.write(at, &flags.to_le_bytes());
    }

    /// Makes a chain of `buffers` available in queue `queue` without a notification. Returns its
    /// head.
    ///
    /// # Panics
    /// The queue has no descriptors left.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let at = ring.free.len().checked_sub(buffers.len()).expect("no descriptors left");
        let chain: Vec<u16> = ring.free.split_off(at);
        for (i, &(gpa, len, write)) in buffers.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            let flags = if write { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            self.descriptor(queue, chain[i], gpa, len, flags, next.unwrap_or(0));
        }
        let head = chain[0];
        self.rings[usize::from(queue)].chains[usize::from(head)] = chain;
        self.make_available(queue, head);
        head
    }

    /// Notifies queue `queue` of what was made available since the last call, if the device wants
    /// that (virtio 1.3 § 2.7.10). Returns whether it did.
    pub fn notify(&mut self, queue: u16) -> bool {
        let ring = &mut self.rings[usize::from(queue)];
        let (old, new) = (std::mem::replace(&mut ring.notified, ring.avail), ring.avail);
        let used = ring.base + USED;
        let event_at = used + 4 + 8 * u64::from(ring.size);
        let word = |at| u16::from_le_bytes(self.read(at, 2).try_into().unwrap());
        let wanted = if self.registers.negotiated() & features::EVENT_IDX != 0 {
            new.wrapping_sub(word(event_at)).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            word(used) & 1 == 0
        };
        if wanted {
            self.kick(queue);
        }
        wanted
    }

    /// Notifies queue `queue`, whether the device wants it or not; [`Harness::run`] delivers it.
    pub fn kick(&mut self, queue: u16) {
        self.write_register(reg::QUEUE_NOTIFY, u32::from(queue));
    }

    /// Number of descriptors of queue `queue` that the driver may use.
    pub fn free_descriptors(&self, queue: u16) -> usize {
        self.rings[usize::from(queue)].free.len()
    }

    /// Index of the used ring of queue `queue` as the device published it.
    pub fn used_index(&self, queue: u16) -> u16 {
        let at = self.rings[usize::from(queue)].base + USED + 2;
        u16::from_le_bytes(self.read(at, 2).try_into().unwrap())
    }

    /// Takes the next used entry of queue `queue`: head and bytes written.
    ///
    /// # Panics
    /// The device used something that was not available.
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let published = self.used_index(queue);
        let ring = &self.rings[usize::from(queue)];
        if ring.used == published {
            return None;
        }
        let at = ring.base + USED + 4 + 8 * u64::from(ring.used % ring.size);
        let entry = u64::from_le_bytes(self.read(at, 8).try_into().unwrap());
        let (head, written) = (entry as u32 as u16, (entry >> 32) as u32);
        let ring = &mut self.rings[usize::from(queue)];
        ring.used = ring.used.wrapping_add(1);
        // With EVENT_IDX: interrupt when the next one is used.
        let event_at = ring.base + AVAIL + 4 + 2 * u64::from(ring.size);
        let event = ring.used;
        let chain = std::mem::take(&mut ring.chains[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} was used but is not available");
        ring.free.extend(chain);
        self.write(event_at, &event.to_le_bytes());
        Some((head, written))
    }

    /// Makes a chain available, notifies if that is wanted, runs the device, and returns the bytes that it says it
    /// wrote, or `None` if it did not use the chain.
    pub fn request(&mut self, queue: u16, buffers: &[Buffer]) -> Option<u32> {
        let head = self.offer(queue, buffers);
        self.notify(queue);
        self.run();
        let (used, written) = self.used(queue)?;
        assert_eq!(used, head, "another chain was used");
        Some(written)
    }

    /// How often the interrupt line fired since the last call.
    pub fn interrupts(&mut self) -> u64 {
        self.interrupt.acknowledge(u32::MAX);
        self.irq.read().unwrap_or(0)
    }
}

impl<D: Device> Drop for Harness<D> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

/// The 16 bytes of a descriptor.
pub fn descriptor_bytes(gpa: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let word =
        u128::from(gpa) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    word.to_le_bytes()
}

/// A device together with what has to live as long as it, e.g. the other end of its socket.
impl<D: Device, T: Send> Device for (D, T) {
    fn kind(&self) -> Kind {
        self.0.kind()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queues(&self) -> &[u16] {
        self.0.queues()
    }

    fn groups(&self) -> Vec<std::ops::Range<u16>> {
        self.0.groups()
    }

    fn config(&self) -> Vec<u8> {
        self.0.config()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Option<Vec<u8>> {
        self.0.write_config(offset, data)
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        self.0.update(message)
    }

    fn worker(&mut self, group: usize, negotiated: u64) -> std::io::Result<Box<dyn Worker>> {
        self.0.worker(group, negotiated)
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn save(&self) -> Payload {
        self.0.save()
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        self.0.restore(payload)
    }
}

/// How the conformance tests get a device to do something.
pub struct Probe<D: Device> {
    /// The queue that [`Probe::request`] is for.
    pub queue: u16,
    /// Prepares one valid request in guest memory. The device must complete it without further
    /// events from outside.
    pub request: fn(&mut Harness<D>) -> Vec<Buffer>,
    /// Checks what a request led to, given the bytes that the device says it wrote.
    pub check: fn(&mut Harness<D>, u32),
    /// Makes the device want to serve all of its queues, e.g. gives it input.
    pub stimulus: fn(&mut Harness<D>),
}

impl<D: Device> Default for Probe<D> {
    /// For a device that fills whatever buffer it finds in queue 0.
    fn default() -> Self {
        Probe {
            queue: 0,
            request: |harness| {
                let (gpa, len) = harness.writable(512);
                vec![(gpa, len, true)]
            },
            check: |_, written| assert_eq!(written, 512),
            stimulus: |_| {},
        }
    }
}

/// Gives a device the tests that every device owes. The first argument makes a device (any
/// expression that can be called without arguments), the second is its [`Probe`].
#[cfg(test)]
macro_rules! conformance {
    ($make:expr) => {
        $crate::virtio::conformance::conformance!($make, Default::default());
    };
    ($make:expr, $probe:expr) => {
        $crate::virtio::conformance::conformance!(@each $make, $probe,
            negotiates_what_it_offers, refuses_features_it_did_not_offer,
            works_once_activated, works_after_a_reset, stops_and_goes_on,
            stops_with_work_half_done, saves_what_it_restores, refuses_foreign_state,
            survives_malformed_chains, survives_random_rings, survives_a_random_driver,
            takes_any_configuration_access);
    };
    (@each $make:expr, $probe:expr, $($name:ident),*) => {
        mod conformance {
            use super::*;
            $(
                #[test]
                fn $name() {
                    $crate::virtio::conformance::checks::$name($make, $probe);
                }
            )*
        }
    };
}

#[cfg(test)]
pub(crate) use conformance;

const _: () =
    assert!(MAX_SIZE as u64 * 16 <= AVAIL && MAX_SIZE as u64 * 8 + 6 <= RING_STRIDE - USED);
