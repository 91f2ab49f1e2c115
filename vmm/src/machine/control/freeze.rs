//! Handing out a machine's state, for it to go on elsewhere.

use std::sync::{Arc, mpsc};

use devices::virtio::blk::Backing;
use devices::virtio::device::BackEnd;

use super::super::build::restore::vcpu_name;
use super::super::event::{Frozen, ReplyTo};
use super::super::lifecycle::{Refusal, State};
use super::super::slot::Slot;
use super::Control;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::state::VcpuState;
use crate::snapshot::Part;

/// Somebody who wants it.
pub(super) struct Wish {
    pub(super) msrs: Arc<Vec<u32>>,
    pub(super) answer: mpsc::SyncSender<Frozen>,
    pub(super) reply: ReplyTo,
}

fn unreadable(error: &HypervisorError) -> Refusal {
    Refusal::Unreadable(format!("{error}: {}", error.source))
}

impl Control {
    /// Answers a wish. Nothing moves.
    pub(super) fn freeze(&mut self, wish: Wish, was_running: bool) {
        let Wish { msrs, answer, reply } = wish;
        match self.parts(&msrs) {
            Ok(parts) => {
                let image = self.machine.ram.image();
                let disk = |slot: &Slot| {
                    let disk = slot.device.disk()?;
                    Some((slot.transport.name().to_owned(), Arc::clone(disk)))
                };
                let disks = self.machine.slots.iter().filter_map(disk).collect();
                let frozen = Frozen { parts, image, disks, was_running };
                // Whoever asks has room for it, or does not want it any more.
                self.frozen = answer.try_send(frozen).is_ok();
                reply(Ok(self.state.clone()));
            }
            Err(refusal) => reply(Err(refusal)),
        }
    }

    /// Nobody reads the memory any more.
    pub(super) fn thaw(&mut self, resume: bool, disks: Vec<(String, Backing)>, reply: ReplyTo) {
        for (name, disk) in disks {
            let mut slots = self.machine.slots.iter_mut();
            if let Some(slot) = slots.find(|slot| slot.transport.name() == name)
                && let Err(error) = slot.device.replace(BackEnd::Frozen(disk))
            {
                // Without it the guest would write to what others stand on.
                slot.transport.broken(&error.to_string());
            }
        }
        if std::mem::take(&mut self.frozen) && resume && self.state == State::Paused {
            self.go_on();
        }
        self.release_kernel_file_if_wanted();
        reply(Ok(self.state.clone()));
    }

    /// The states of everything but memory. What is asked of the vCPUs are some system calls each: their
    /// threads are waited for.
    fn parts(&self, msrs: &Arc<Vec<u32>>) -> Result<Vec<Part>, Refusal> {
        let machine = &self.machine;
        let saved = |vcpu: &super::super::vcpu::VcpuThread| {
            let (sender, receiver) = mpsc::sync_channel(1);
            let msrs = Arc::clone(msrs);
            vcpu.errand(move |vcpu| {
                let _ = sender.send(vcpu.save(&msrs));
            });
            receiver
        };
        let saved: Vec<_> = machine.vcpus.iter().map(saved).collect();
        let vm = machine.vm.save().map_err(|error| unreadable(&error))?;
        let part = |owner: &str, payload| Part { owner: owner.to_owned(), payload };
        let mut parts = vec![part("vm", vm.save())];
        for (index, vcpu) in saved.into_iter().enumerate() {
            let state: Result<VcpuState, _> =
                vcpu.recv().map_err(|_| Refusal::Gone("the freeze"))?;
            let state = state.map_err(|error| unreadable(&error))?;
            parts.push(part(&vcpu_name(index), state.save()));
        }
        let control = &machine.control;
        parts.extend(control.serial.as_ref().map(|serial| part("serial", serial.save())));
        parts.push(part("i8042", control.keyboard.save()));
        parts.push(part("acpi", control.acpi.save()));
        for slot in &machine.slots {
            let name = slot.transport.name();
            parts.extend(slot.save().map(|payload| part(name, payload)));
        }
        Ok(parts)
    }
}
