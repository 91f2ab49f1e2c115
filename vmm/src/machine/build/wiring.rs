//! Devices on buses, with interrupts, notification events and io threads.

use std::sync::Arc;

use arch::interrupts;
use arch::layout::VirtioSlot;
use devices::virtio::mmio::{Registers, reg};
use devices::virtio::queue::Interrupt;
use vmm_sys_util::eventfd::EventFd;

use super::super::bus::{AcpiPort, Buses, KeyboardPort, SerialPort};
use super::super::event::Sender;
use super::super::slot::Slot;
use super::super::table::{BackEnd, Entry};
use super::super::transport::{Parts as TransportParts, Transport};
use super::boot::has_serial;
use super::{BuildError, Observed, event};
use crate::config::{ConfigError, VmConfig};
use crate::console::Output;
use crate::hypervisor::Vm;
use crate::io::Options;
use crate::seccomp;

/// Connects devices to buses, interrupts and notification events.
pub(super) struct Wiring<'a> {
    pub(super) vm: &'a dyn Vm,
    pub(super) events: Sender,
    pub(super) buses: Buses,
    pub(super) slots: Vec<Slot>,
    /// The io threads that the devices need.
    pub(super) io: Vec<Options>,
    pub(super) seccomp: seccomp::Mode,
    pub(super) observed: &'a Observed,
}

impl Wiring<'_> {
    /// A new interrupt line on `gsi`.
    fn line(&self, gsi: u32) -> Result<EventFd, BuildError> {
        let line = event()?;
        self.vm.register_irqfd(&line, gsi)?;
        Ok(line)
    }

    pub(super) fn serial(
        &mut self,
        config: &VmConfig,
        output: &Arc<Output>,
    ) -> Result<Option<Arc<SerialPort>>, BuildError> {
        if !has_serial(config) {
            return Ok(None);
        }
        let irq = self.line(interrupts::COM1_GSI)?;
        let serial = Arc::new(SerialPort::new(irq, Arc::clone(output), event()?));
        self.observed.metrics.add_of_machine(None, ("uart", Arc::clone(serial.metrics()) as _));
        self.buses.add_serial(Arc::clone(&serial))?;
        Ok(Some(serial))
    }

    pub(super) fn legacy(
        &mut self,
        config: &VmConfig,
    ) -> Result<(Arc<KeyboardPort>, Arc<AcpiPort>), BuildError> {
        let irq = config.i8042.then(|| self.line(interrupts::I8042_KEYBOARD_GSI)).transpose()?;
        let keyboard = Arc::new(KeyboardPort::new(irq));
        self.observed.metrics.add_of_machine(None, ("i8042", Arc::clone(keyboard.metrics()) as _));
        let acpi = Arc::new(AcpiPort::new(self.line(interrupts::GED_GSI)?));
        self.buses.add_legacy(Arc::clone(&keyboard), Arc::clone(&acpi))?;
        Ok((keyboard, acpi))
    }

    /// Index of the io thread for a device with this back-end: the one that all share, or one of
    /// its own.
    fn io_thread(&mut self, back_end: BackEnd) -> usize {
        let alone = matches!(back_end, BackEnd::CachedWrites | BackEnd::Calls);
        let shared = self.io.iter().position(|options| !alone && !options.alone);
        let index = shared.unwrap_or_else(|| {
            let index = self.io.len();
            let seccomp = self.seccomp;
            let (files, calls, sockets) = (false, false, false);
            self.io.push(Options { index, files, calls, sockets, alone, seccomp });
            index
        });
        self.io[index].files |=
            matches!(back_end, BackEnd::File | BackEnd::CachedWrites | BackEnd::Calls);
        self.io[index].calls |= back_end == BackEnd::Calls;
        self.io[index].sockets |= back_end == BackEnd::Sockets;
        index
    }

    pub(super) fn virtio(&mut self, entry: Entry) -> Result<(), BuildError> {
        let Entry { name, device, back_end } = entry;
        let index = self.slots.len();
        let place = VirtioSlot::new(index).ok_or_else(|| ConfigError {
            field: name.clone(),
            problem: format!(
                "is one device too many: a machine has at most {}",
                interrupts::MAX_VIRTIO_DEVICES
            ),
        })?;
        let interrupt = Interrupt::new(self.line(place.gsi)?);
        let queues = device.queues();
        let mut kicks = Vec::with_capacity(queues.len());
        for queue in 0..queues.len() {
            let kick = Arc::new(event()?);
            let gpa = place.address + reg::QUEUE_NOTIFY;
            self.vm.register_ioeventfd(&kick, gpa, queue as u32)?;
            kicks.push(kick);
        }
        for set in device.metrics() {
            self.observed.metrics.add_of_machine(Some(&name), set);
        }
        let kind = device.kind();
        let registers = Registers::new(kind as u32, device.features(), queues, device.config());
        let transport = Arc::new(Transport::new(TransportParts {
            device: index,
            name,
            registers,
            interrupt,
            kicks,
            events: self.events.clone(),
            journal: Arc::clone(&self.observed.journal),
        }));
        self.buses.add_virtio(place.address, Arc::clone(&transport))?;
        let io = self.io_thread(back_end);
        self.slots.push(Slot::new(device, transport, io));
        Ok(())
    }
}
