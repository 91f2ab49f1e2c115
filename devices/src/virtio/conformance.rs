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
mod driver;
mod fuzzing;
mod reactor;
pub mod saved;

use std::sync::Arc;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Kind;
use super::device::{Device, Fault, FileOperation, Message, Payload, RestoreError, Status, Worker};
use super::mmio::{Effect, Registers, status};
use super::queue::{INTERRUPT_CONFIG, Interrupt, MAX_SIZE, Queue, QueueState};
use crate::memory::{GuestMemory, Memory};

use driver::Ring;
pub use driver::descriptor_bytes;
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
        Harness::with_memory(device, memory)
    }

    fn with_memory(device: D, memory: Memory) -> Harness<D> {
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

    /// Writes any bytes at any offset of the register window and does what follows from it.
    pub fn write_bytes(&mut self, offset: u64, data: &[u8]) {
        match self.registers.write(offset, data) {
            Effect::None | Effect::Ignored(_) => {}
            Effect::Activate => self.start(),
            Effect::Reset => {
                self.stop();
                self.device.reset();
                self.registers.publish_config(self.device.config());
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
                started.worker.on_settled(&mut self.reactor);
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

    /// Goes on after [`Harness::pause`] or [`Harness::restored`].
    pub fn resume(&mut self) {
        if self.registers.status() & status::DRIVER_OK != 0 && !self.registers.is_broken() {
            self.start();
        }
        self.interrupt.refresh();
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

    /// Lets timers that workers have set expire, and delays of queues end. Returns whether there was
    /// one.
    pub fn expire_timers(&mut self) -> bool {
        let later = std::mem::take(&mut self.reactor.later);
        let due = std::mem::take(&mut self.reactor.timers);
        let any = !due.is_empty() || !later.is_empty();
        self.kicks.extend(later.into_iter().map(|(_, index)| index));
        for &group in &due {
            self.reactor.group = group;
            if let Some(started) = self.workers.iter_mut().find(|w| w.group == group) {
                started.worker.on_timer(&mut self.reactor);
            }
        }
        self.note_faults();
        any
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

    /// Whether the device has its io thread to itself.
    pub fn set_alone(&mut self, alone: bool) {
        self.reactor.alone = alone;
    }

    /// File operations that were submitted and have not ended.
    pub fn operations(&self) -> usize {
        self.reactor.operations.len()
    }

    /// The oldest file operation that has not ended.
    pub fn oldest_operation(&self) -> Option<&FileOperation> {
        self.reactor.operations.front().map(|op| &op.operation)
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
            started.worker.on_settled(&mut self.reactor);
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
            started.worker.on_settled(&mut self.reactor);
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
        while std::mem::take(&mut self.reactor.unsettled) {
            self.each_worker(|worker, reactor| worker.on_settled(reactor));
        }
        if !self.reactor.hold {
            while self.finish_operation() {
                busy = true;
            }
        }
        busy
    }
}

impl<D: Device> Drop for Harness<D> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
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

    fn status(&self) -> Option<Status> {
        self.0.status()
    }

    fn worker(&mut self, group: usize, negotiated: u64) -> std::io::Result<Box<dyn Worker>> {
        self.0.worker(group, negotiated)
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn end(&mut self) {
        self.0.end();
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
            checks: negotiates_what_it_offers, refuses_features_it_did_not_offer,
            works_once_activated, works_after_a_reset, stops_and_goes_on,
            stops_with_work_half_done, survives_malformed_chains, survives_random_rings,
            survives_a_random_driver, takes_any_configuration_access;
            saved: goes_on_in_another_machine, is_saved_at_any_stage, refuses_foreign_state,
            survives_a_damaged_state;);
    };
    (@each $make:expr, $probe:expr, $($module:ident: $($name:ident),*;)*) => {
        mod conformance {
            use super::*;
            $($(
                #[test]
                fn $name() {
                    $crate::virtio::conformance::$module::$name($make, $probe);
                }
            )*)*
        }
    };
}

#[cfg(test)]
pub(crate) use conformance;

const _: () =
    assert!(MAX_SIZE as u64 * 16 <= AVAIL && MAX_SIZE as u64 * 8 + 6 <= RING_STRIDE - USED);
