//! Changes that take more than one event: a pause, whatever it is for, and what a device is drained for.
//!
//! A pause has the vCPUs leave the guest, then has the queues drain; who wanted it is served after that.

use std::time::{Duration, Instant};

use devices::virtio::device::BackEnd;

use super::super::event::ReplyTo;
use super::super::lifecycle::State;
use super::super::slot::Stopping;
use super::Control;
use super::freeze::Wish;
use crate::journal::Happening;

/// How long a device may take to finish what is in flight when it is stopped.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// What others do to a machine that is frozen, whatever they do.
pub(super) const SAVE: &str = "write a snapshot";

/// A change of state under way.
pub(super) enum Change {
    /// vCPUs are on their way out of the guest.
    ParkVcpus { parked: usize, then: Then },
    /// vCPUs are out; queues are draining.
    StopQueues { then: Then },
    /// The queues of a device are draining, for it to get another back-end. Once it was waited for
    /// long enough there is neither that nor somebody to be told.
    Replace { device: usize, deadline: Instant, wish: Option<(BackEnd, ReplyTo)> },
}

impl Change {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Change::ParkVcpus { .. } | Change::StopQueues { .. } => "pause",
            Change::Replace { .. } => "replace a device's back-end",
        }
    }
}

/// What a pause is for.
pub(super) enum Then {
    /// Somebody asked for it at that time.
    Reply(ReplyTo, Instant),
    /// Somebody wants the machine's state.
    Freeze(Wish),
    /// The kernel file is given up; the machine goes on afterwards.
    ReleaseKernelFile,
}

impl Control {
    pub(super) fn pause(&mut self, then: Then) {
        for vcpu in &self.machine.vcpus {
            vcpu.park();
        }
        self.change = Some(Change::ParkVcpus { parked: 0, then });
    }

    /// Somebody wants the machine to go on.
    pub(super) fn go_on(&mut self) {
        let start = Instant::now();
        self.resume();
        self.machine.control.counted.latencies.resume_vm.set(micros_since(start));
        self.note(Happening::Resumed);
    }

    pub(super) fn resume(&mut self) {
        let machine = &mut self.machine;
        for (index, slot) in machine.slots.iter_mut().enumerate() {
            let broken = slot.transport.registers().is_broken();
            if slot.active && !broken {
                slot.start(index, machine.ram.memory(), &machine.io);
            }
            slot.transport.interrupt().refresh();
        }
        self.state = State::Running;
        for vcpu in &self.machine.vcpus {
            vcpu.run();
        }
    }

    pub(super) fn parked(&mut self) {
        let Some(Change::ParkVcpus { parked, then }) = self.change.take() else { return };
        if parked + 1 < self.machine.vcpus.len() {
            self.change = Some(Change::ParkVcpus { parked: parked + 1, then });
            return;
        }
        let deadline = Instant::now() + STOP_DEADLINE;
        let machine = &mut self.machine;
        for (index, slot) in machine.slots.iter_mut().enumerate() {
            if slot.stop(index, &machine.io) {
                slot.stopping = Some(Stopping::Pause { deadline });
            }
        }
        self.change = Some(Change::StopQueues { then });
        self.arm_timer();
        self.finish_pause_if_drained();
    }

    pub(super) fn finish_pause_if_drained(&mut self) {
        if self.machine.slots.iter().any(|slot| !slot.running.is_empty()) {
            return;
        }
        match self.change.take() {
            Some(Change::StopQueues { then: Then::Reply(reply, since) }) => {
                self.state = State::Paused;
                self.machine.control.counted.latencies.pause_vm.set(micros_since(since));
                self.note(Happening::Paused);
                reply(Ok(State::Paused));
                self.release_kernel_file_if_wanted();
            }
            Some(Change::StopQueues { then: Then::Freeze(wish) }) => {
                self.state = State::Paused;
                self.note(Happening::Paused);
                self.freeze(wish, true);
                self.release_kernel_file_if_wanted();
            }
            Some(Change::StopQueues { then: Then::ReleaseKernelFile }) => {
                self.release_kernel_file();
                self.resume();
            }
            other => self.change = other,
        }
    }
}

fn micros_since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}
