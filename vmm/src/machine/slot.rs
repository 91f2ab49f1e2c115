//! A virtio device in a machine: its control half, its transport, and which of its workers run.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use devices::memory::Memory;
use devices::virtio::device::{BackEnd, Device, Message, Payload, RestoreError, Worker};
use devices::virtio::mmio::status;
use devices::virtio::queue::{Queue, QueueState};

use super::lifecycle::Refusal;
use super::transport::Transport;
use crate::io::{Command, IoThread, StartedQueue, WorkerId};

/// Why the workers of a device were told to stop.
pub(super) enum Stopping {
    /// The driver reset it; the vCPU waits for the message.
    Reset { done: mpsc::SyncSender<()>, deadline: Instant },
    /// The machine pauses; the queues go on later where they are.
    Pause { deadline: Instant },
}

/// One virtio device.
pub(super) struct Slot {
    pub(super) device: Box<dyn Device>,
    pub(super) transport: Arc<Transport>,
    /// Index of its io thread.
    pub(super) io: usize,
    /// Groups whose workers run.
    pub(super) running: BTreeSet<usize>,
    pub(super) stopping: Option<Stopping>,
    /// The driver set DRIVER_OK and has not reset the device since.
    pub(super) active: bool,
}

impl Slot {
    pub(super) fn new(device: Box<dyn Device>, transport: Arc<Transport>, io: usize) -> Slot {
        Slot { device, transport, io, running: BTreeSet::new(), stopping: None, active: false }
    }

    /// Starts the workers of all groups that have ready queues, from the state that the transport
    /// holds: after DRIVER_OK from new, after a pause where they were.
    ///
    /// A queue that cannot work, or a back-end that is refused, marks the device as needing a
    /// reset; nothing is started then.
    pub(super) fn start(&mut self, index: usize, memory: &Memory, io: &[IoThread]) {
        let Some(thread) = io.get(self.io) else { return };
        self.active = true;
        match self.prepare(memory) {
            Ok(groups) => {
                for (group, worker, queues) in groups {
                    let id = WorkerId { device: index, group };
                    self.running.insert(group);
                    thread.send(Command::Start { id, worker, queues });
                }
            }
            Err(reason) => self.transport.broken(&reason),
        }
    }

    #[allow(clippy::type_complexity)]
    fn prepare(
        &mut self,
        memory: &Memory,
    ) -> Result<Vec<(usize, Box<dyn Worker>, Vec<StartedQueue>)>, String> {
        let (negotiated, ready): (u64, Vec<(u16, QueueState)>) = {
            let registers = self.transport.registers();
            (registers.negotiated(), registers.ready_queues().collect())
        };
        let mut groups = Vec::new();
        for (group, range) in self.device.groups().into_iter().enumerate() {
            let mut queues = Vec::new();
            for &(index, state) in ready.iter().filter(|(index, _)| range.contains(index)) {
                let Some(kick) = self.transport.kick_event(index) else { continue };
                let queue = Queue::new(memory, self.transport.interrupt(), state)
                    .map_err(|err| format!("queue {index}: {err}"))?;
                queues.push(StartedQueue { index, queue, kick: Arc::clone(kick) });
            }
            if !queues.is_empty() {
                let worker = self
                    .device
                    .worker(group, negotiated)
                    .map_err(|err| format!("back-end: {err}"))?;
                groups.push((group, worker, queues));
            }
        }
        Ok(groups)
    }

    /// Tells the device and its running workers something. It remembers that for workers to come.
    pub(super) fn tell(&mut self, index: usize, message: &Message, io: &[IoThread]) {
        if let Some(config) = self.device.update(message) {
            self.transport.publish_config(config);
        }
        let Some(thread) = io.get(self.io) else { return };
        for &group in &self.running {
            thread.send(Command::Message(WorkerId { device: index, group }, message.clone()));
        }
    }

    /// Gives the device another back-end; no worker runs.
    pub(super) fn replace(&mut self, back_end: BackEnd) -> Result<(), Refusal> {
        match self.device.replace(back_end) {
            Ok(config) => {
                self.transport.publish_config(config);
                Ok(())
            }
            Err(err) => Err(Refusal::Device {
                device: self.transport.name().to_owned(),
                reason: err.to_string(),
            }),
        }
    }

    /// Tells all running workers to stop. Returns false if there are none.
    pub(super) fn stop(&self, index: usize, io: &[IoThread]) -> bool {
        let Some(thread) = io.get(self.io) else { return false };
        for &group in &self.running {
            thread.send(Command::Stop(WorkerId { device: index, group }));
        }
        !self.running.is_empty()
    }

    /// A worker stopped. Returns true if it was the last.
    pub(super) fn stopped(&mut self, group: usize, queues: &[(u16, QueueState)]) -> bool {
        let mut registers = self.transport.registers();
        for &(index, state) in queues {
            registers.set_progress(index, state);
        }
        self.running.remove(&group);
        self.running.is_empty()
    }

    /// Puts device and transport back to power-on; no worker runs any more.
    pub(super) fn finish_reset(&mut self) {
        self.device.reset();
        self.transport.registers().publish_config(self.device.config());
        self.transport.finish_reset();
    }

    /// What is saved of it: the transport's registers, and the device's own state. No worker runs.
    pub(super) fn save(&self) -> [Payload; 2] {
        let interrupt = self.transport.interrupt().status();
        [self.transport.registers().save(interrupt), self.device.save()]
    }

    /// Takes a saved state. Its workers start when the machine goes on.
    pub(super) fn restore(
        &mut self,
        transport: &Payload,
        device: &Payload,
    ) -> Result<(), RestoreError> {
        self.device.restore(device)?;
        let mut registers = self.transport.registers();
        let interrupt = registers.restore(transport, self.device.config())?;
        self.active = registers.status() & status::DRIVER_OK != 0;
        drop(registers);
        // The driver is told when the machine goes on.
        self.transport.interrupt().restore(interrupt);
        Ok(())
    }

    /// When the stop under way should have ended.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &self.stopping {
            Some(Stopping::Reset { deadline, .. } | Stopping::Pause { deadline }) => {
                Some(*deadline)
            }
            None => None,
        }
    }
}
