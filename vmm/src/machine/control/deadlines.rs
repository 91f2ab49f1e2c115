//! What is waited for until a time: queues that drain, and a pager that brings memory.

use std::time::{Duration, Instant};

use super::super::RunError;
use super::super::lifecycle::Refusal;
use super::super::slot::{Slot, Stopping};
use super::Control;
use super::change::{Change, STOP_DEADLINE};
use crate::memory::{LOOK_EVERY, PagerHealth};

impl Control {
    pub(super) fn arm_timer(&mut self) {
        let replace = match &self.change {
            Some(Change::Replace { deadline, wish: Some(_), .. }) => Some(*deadline),
            _ => None,
        };
        let slots = self.machine.slots.iter().filter_map(Slot::deadline);
        let next = slots.chain(replace).chain(self.pager_look).min();
        if let Some(next) = next {
            let delay = next.saturating_duration_since(Instant::now());
            let _ = self.timer.reset(delay.max(Duration::from_millis(1)), None);
        }
    }

    /// A device that does not finish what it has in flight is named; a driver that waits for its
    /// reset goes on with a device that is broken.
    pub(super) fn check_deadlines(&mut self) {
        let now = Instant::now();
        for slot in &mut self.machine.slots {
            if slot.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            let name = slot.transport.name();
            tracing::error!(device = name, "a request does not end; its back-end hangs");
            let journal = &self.machine.control.journal;
            journal.device_failed(name, "a request does not end; its back-end hangs".to_owned());
            match slot.stopping.take() {
                Some(Stopping::Reset { done, .. }) => {
                    slot.transport.needs_reset();
                    let _ = done.send(());
                }
                Some(Stopping::Pause { .. }) => {
                    slot.stopping = Some(Stopping::Pause { deadline: now + STOP_DEADLINE });
                }
                None => {}
            }
        }
        if let Some(Change::Replace { device, deadline, wish }) = &mut self.change
            && *deadline <= now
            && let Some((_, reply)) = wish.take()
        {
            let name = self.machine.slots.get(*device).map(|slot| slot.transport.name().to_owned());
            let reason = "a request does not end; its back-end hangs".to_owned();
            reply(Err(Refusal::Device { device: name.unwrap_or_default(), reason }));
        }
        if self.pager_look.is_some_and(|time| time <= now) {
            self.look_at_pager(now);
        }
        self.arm_timer();
    }

    fn look_at_pager(&mut self, now: Instant) {
        let health = self.machine.ram.look_at_pager();
        self.pager_look = health.map(|_| now + LOOK_EVERY);
        match health {
            Some(PagerHealth::Gone) => drop(self.end.get_or_insert(Err(RunError::Pager))),
            Some(PagerHealth::Hangs) => {
                let message = "it does not bring memory that the guest waits for";
                tracing::error!(message, "the pager hangs");
                self.machine.control.journal.device_failed("pager", message.to_owned());
            }
            Some(PagerHealth::Well) | None => {}
        }
    }
}
