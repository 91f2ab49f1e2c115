//! What is asked of one device while the machine lives: by its driver to start and to be reset, by people another
//! back-end, another setting, and how it stands.

use std::sync::mpsc;
use std::time::Instant;

use devices::virtio::device::{BackEnd, Message, Status, Traffic};

use super::super::event::{Reply, ReplyTo};
use super::super::lifecycle::{Refusal, State};
use super::super::slot::Stopping;
use super::Control;
use super::change::{Change, SAVE, STOP_DEADLINE};

/// Name of the guest's console, for [`Command::Update`](super::super::event::Command::Update).
const CONSOLE: &str = "console";

impl Control {
    pub(super) fn activate(&mut self, device: usize) {
        let machine = &mut self.machine;
        if let Some(slot) = machine.slots.get_mut(device) {
            slot.start(device, machine.ram.memory(), &machine.io);
        }
    }

    pub(super) fn reset(&mut self, device: usize, done: mpsc::SyncSender<()>) {
        if self.machine.control.console == Some(device) {
            self.console.reset();
        }
        let Some(slot) = self.machine.slots.get_mut(device) else { return };
        slot.active = false;
        if slot.stop(device, &self.machine.io) {
            let deadline = Instant::now() + STOP_DEADLINE;
            slot.stopping = Some(Stopping::Reset { done, deadline });
            self.arm_timer();
        } else {
            slot.finish_reset();
            let _ = done.send(());
        }
    }

    /// Gives the device called `name` another back-end when what is in flight on its own is done.
    pub(super) fn replace(&mut self, name: String, back_end: BackEnd, reply: ReplyTo) {
        let under_way = self.change.as_ref().map(Change::name);
        // Others are about to stand on what it is now.
        if let Some(under_way) = under_way.or(self.frozen.then_some(SAVE)) {
            return reply(Err(Refusal::Busy { step: "replace", under_way }));
        }
        let machine = &mut self.machine;
        let mut slots = machine.slots.iter().enumerate();
        let Some((device, slot)) = slots.find(|(_, slot)| slot.transport.name() == name) else {
            return reply(Err(Refusal::NoDevice(name)));
        };
        let drains = slot.stop(device, &machine.io);
        let deadline = Instant::now() + STOP_DEADLINE;
        self.change = Some(Change::Replace { device, deadline, wish: Some((back_end, reply)) });
        if drains {
            self.arm_timer();
        } else {
            self.finish_replace(device);
        }
    }

    /// The queues of a device are drained: it gets its new back-end, and goes on unless its driver
    /// reset it meanwhile.
    pub(super) fn finish_replace(&mut self, drained: usize) {
        match self.change.take() {
            Some(Change::Replace { device, wish, .. }) if device == drained => {
                let running = self.state == State::Running;
                let machine = &mut self.machine;
                let Some(slot) = machine.slots.get_mut(device) else { return };
                let told = wish.map(|(back_end, reply)| (slot.replace(back_end), reply));
                if slot.active && running && !slot.transport.registers().is_broken() {
                    slot.start(device, machine.ram.memory(), &machine.io);
                    slot.transport.interrupt().refresh();
                }
                if let Some((outcome, reply)) = told {
                    reply(outcome.map(|()| self.state.clone()));
                }
                self.release_kernel_file_if_wanted();
            }
            other => self.change = other,
        }
    }

    /// Sends how the device called `name` stands.
    pub(super) fn device_status(&self, name: String, answer: &mpsc::SyncSender<Status>) -> Reply {
        let slot = self.machine.slots.iter().find(|slot| slot.transport.name() == name);
        let status = slot.and_then(|slot| slot.device.status()).ok_or(Refusal::NoDevice(name))?;
        // Whoever asks has room for it, or does not want it any more.
        let _ = answer.try_send(status);
        Ok(self.state.clone())
    }

    /// Changes something about the device called `name`.
    pub(super) fn update(&mut self, name: String, message: &Message) -> Reply {
        if name == CONSOLE
            && let Message::RateLimit(Traffic::All, limit) = message
        {
            self.machine.control.output.set_limit(limit.clone());
            return Ok(self.state.clone());
        }
        let machine = &mut self.machine;
        let mut slots = machine.slots.iter_mut().enumerate();
        let Some((index, slot)) = slots.find(|(_, slot)| slot.transport.name() == name) else {
            return Err(Refusal::NoDevice(name));
        };
        slot.tell(index, message, &machine.io);
        Ok(self.state.clone())
    }
}
