//! The virtio-mmio transport of one device: its registers behind a lock for the vCPUs, its
//! interrupt status without one, and the events that register writes cause.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use devices::virtio::mmio::{Effect, Registers, reg};
use devices::virtio::queue::{INTERRUPT_CONFIG, Interrupt};
use vmm_sys_util::eventfd::EventFd;

use super::event::{Event, Sender};
use super::throttle::Throttle;
use crate::journal::Journal;

/// Writes that make no sense.
static IGNORED: Throttle = Throttle::new();

/// Devices that cannot go on.
static BROKEN: Throttle = Throttle::new();

/// One device's transport, shared by `main` and the vCPU threads.
pub(super) struct Transport {
    device: usize,
    name: String,
    registers: Mutex<Registers>,
    interrupt: Interrupt,
    kicks: Vec<Arc<EventFd>>,
    events: Sender,
    journal: Arc<Journal>,
}

/// What a transport is made of.
pub(super) struct Parts {
    /// Index of the device.
    pub(super) device: usize,
    pub(super) name: String,
    pub(super) registers: Registers,
    pub(super) interrupt: Interrupt,
    /// One per queue.
    pub(super) kicks: Vec<Arc<EventFd>>,
    pub(super) events: Sender,
    pub(super) journal: Arc<Journal>,
}

impl Transport {
    pub(super) fn new(parts: Parts) -> Transport {
        let Parts { device, name, registers, interrupt, kicks, events, journal } = parts;
        let registers = Mutex::new(registers);
        Transport { device, name, registers, interrupt, kicks, events, journal }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(super) fn kick_event(&self, queue: u16) -> Option<&Arc<EventFd>> {
        self.kicks.get(usize::from(queue))
    }

    /// The registers. Held for the time of one access only.
    pub(super) fn registers(&self) -> MutexGuard<'_, Registers> {
        // The register file is valid after each assignment, so a panic elsewhere changes nothing.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets DEVICE_NEEDS_RESET and tells the driver.
    pub(super) fn needs_reset(&self) {
        if self.registers().needs_reset() {
            self.interrupt.raise(INTERRUPT_CONFIG);
        }
    }

    /// As [`needs_reset`](Transport::needs_reset), and says why.
    pub(super) fn broken(&self, reason: &dyn fmt::Display) {
        self.needs_reset();
        self.journal.device_failed(&self.name, reason.to_string());
        if let Some(held_back) = BROKEN.pass() {
            tracing::warn!(device = self.name, %reason, held_back, "device needs a reset");
        }
    }

    /// Replaces the configuration space and tells the driver.
    pub(super) fn publish_config(&self, config: Vec<u8>) {
        self.registers().publish_config(config);
        self.interrupt.raise(INTERRUPT_CONFIG);
    }

    /// Puts the registers back to power-on.
    pub(super) fn finish_reset(&self) {
        self.registers().finish_reset();
        self.interrupt.acknowledge(u32::MAX);
    }

    /// A vCPU reads `data` at `offset` of the window.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == reg::INTERRUPT_STATUS && data.len() == 4 {
            data.copy_from_slice(&self.interrupt.status().to_le_bytes());
        } else {
            self.registers().read(offset, data);
        }
    }

    /// A vCPU writes `data` at `offset` of the window. Returns when the write took effect; for a
    /// reset of a running device that is when its last request is done.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if let (reg::INTERRUPT_ACK, Ok(bits)) = (offset, <[u8; 4]>::try_from(data)) {
            self.interrupt.acknowledge(u32::from_le_bytes(bits));
            return;
        }
        let effect = self.registers().write(offset, data);
        let device = self.device;
        match effect {
            Effect::None => {}
            Effect::Activate => {
                self.events.send(Event::Activate { device });
            }
            Effect::Reset => self.send_and_wait(|done| Event::Reset { device, done }),
            Effect::Notify(queue) => {
                if let Some(kick) = self.kick_event(queue) {
                    let _ = kick.write(1);
                }
            }
            Effect::Config { offset, data } => {
                self.send_and_wait(|done| Event::ConfigWrite { device, offset, data, done });
            }
            Effect::Ignored(what) => self.misdeed(what),
        }
    }

    /// Sends an event to the control thread and holds the vCPU until it is dealt with.
    fn send_and_wait(&self, event: impl FnOnce(mpsc::SyncSender<()>) -> Event) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.events.send(event(done)) {
            // Fails when the machine ends first; the vCPU then sees its order to stop.
            let _ = wait.recv();
        }
    }

    /// Logs what a driver did wrong.
    fn misdeed(&self, what: &'static str) {
        if let Some(held_back) = IGNORED.pass() {
            tracing::info!(device = self.name, what, held_back, "driver ignored");
        }
    }
}
