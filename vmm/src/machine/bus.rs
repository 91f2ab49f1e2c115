//! Where port and MMIO exits go. Built while the machine is assembled; vCPUs look things up without
//! a lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::{interrupts, layout};
use devices::acpi::{AcpiRegisters, Event as AcpiEvent};
use devices::bus::{Bus, BusError};
use devices::i8042::{Effect as KeyboardEffect, I8042};
use devices::pvpanic;
use devices::serial::{Effect, Serial};
use devices::virtio::device::{Payload, RestoreError};
use vmm_sys_util::eventfd::EventFd;

use super::build::Observed;
use super::transport::Transport;
use crate::console::Output;
use crate::journal::{Happening, Journal};
use crate::metrics::{KeyboardMetrics, PanicMetrics, SerialMetrics};
use crate::timings::{Milestone, Timings};

/// What a port write asks of the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Continue,
    PowerOff,
    Reset,
}

/// The serial port's registers with its interrupt line and output.
pub(super) struct SerialPort {
    registers: Mutex<Serial>,
    irq: EventFd,
    output: Arc<Output>,
    metrics: Arc<SerialMetrics>,
    /// Signalled when the guest took all input.
    input_drained: EventFd,
}

impl SerialPort {
    pub(super) fn new(irq: EventFd, output: Arc<Output>, input_drained: EventFd) -> SerialPort {
        let metrics = Arc::default();
        SerialPort { registers: Mutex::new(Serial::new()), irq, output, metrics, input_drained }
    }

    pub(super) fn metrics(&self) -> &Arc<SerialMetrics> {
        &self.metrics
    }

    fn registers(&self) -> MutexGuard<'_, Serial> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest some of `bytes`; returns how many it took.
    pub(super) fn input(&self, bytes: &[u8]) -> usize {
        let (taken, interrupt) = self.registers().input(bytes);
        if interrupt {
            let _ = self.irq.write(1);
        }
        taken
    }

    pub(super) fn save(&self) -> Payload {
        self.registers().save()
    }

    pub(super) fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        self.registers().restore(payload)
    }

    pub(super) fn input_drained(&self) -> &EventFd {
        &self.input_drained
    }

    fn finish(&self, effect: &Effect) {
        if effect.interrupt {
            let _ = self.irq.write(1);
        }
        if effect.input_drained {
            let _ = self.input_drained.write(1);
        }
    }
}

/// A register block that is shared by vCPUs and `main`, and its interrupt.
pub(super) struct AcpiPort {
    registers: Mutex<AcpiRegisters>,
    irq: EventFd,
}

impl AcpiPort {
    pub(super) fn new(irq: EventFd) -> AcpiPort {
        AcpiPort { registers: Mutex::new(AcpiRegisters::default()), irq }
    }

    fn registers(&self) -> MutexGuard<'_, AcpiRegisters> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn save(&self) -> Payload {
        self.registers().save()
    }

    pub(super) fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        self.registers().restore(payload)
    }

    /// Tells the guest of `event` through the Generic Event Device.
    pub(super) fn raise(&self, event: AcpiEvent) {
        self.registers().raise(event);
        let _ = self.irq.write(1);
    }
}

/// The keyboard controller and the keyboard's interrupt line, if there is a keyboard.
pub(super) struct KeyboardPort {
    registers: Mutex<I8042>,
    irq: Option<EventFd>,
    metrics: Arc<KeyboardMetrics>,
}

impl KeyboardPort {
    pub(super) fn new(irq: Option<EventFd>) -> KeyboardPort {
        let registers = Mutex::new(I8042::new(irq.is_some()));
        KeyboardPort { registers, irq, metrics: Arc::default() }
    }

    pub(super) fn metrics(&self) -> &Arc<KeyboardMetrics> {
        &self.metrics
    }

    fn registers(&self) -> MutexGuard<'_, I8042> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn save(&self) -> Payload {
        self.registers().save()
    }

    pub(super) fn restore(&self, payload: &Payload) -> Result<(), RestoreError> {
        self.registers().restore(payload)
    }

    /// Presses Ctrl, Alt and Del. Returns false if there is no keyboard, or the guest does not
    /// listen to it.
    pub(super) fn ctrl_alt_del(&self) -> bool {
        let effect = self.registers().ctrl_alt_del();
        effect.inspect(|effect| self.finish(effect)).is_some()
    }

    fn finish(&self, effect: &KeyboardEffect) {
        if let Some(irq) = self.irq.as_ref().filter(|_| effect.interrupt) {
            let _ = irq.write(1);
        }
    }
}

enum PortDevice {
    Serial(Arc<SerialPort>),
    Keyboard(Arc<KeyboardPort>),
    Acpi(Arc<AcpiPort>),
    Panic,
}

enum MmioDevice {
    Virtio(Arc<Transport>),
    BootTimer,
}

/// Logs how long the guest took, in the words that Firecracker's clients look for.
fn tell_boot_time(timings: &Timings) {
    let wall = timings.get(Milestone::Userspace).unwrap_or(0) / 1000;
    // SAFETY: the call fills one timespec.
    let cpu = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time);
        time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
    };
    let (wall_ms, cpu_ms) = (wall / 1000, cpu / 1000);
    tracing::info!("Guest-boot-time = {wall:6} us {wall_ms} ms, {cpu:6} CPU us {cpu_ms} CPU ms");
}

/// Everything that vCPU exits can reach.
pub(super) struct Buses {
    ports: Bus<PortDevice>,
    mmio: Bus<MmioDevice>,
    timings: Arc<Timings>,
    journal: Arc<Journal>,
    panics: Arc<PanicMetrics>,
    panicked: AtomicBool,
    wrote_console: AtomicBool,
}

impl Buses {
    pub(super) fn new(timings: Arc<Timings>, observed: Observed) -> Buses {
        let Observed { metrics, journal } = observed;
        let panics = Arc::<PanicMetrics>::default();
        metrics.add_of_machine(None, ("pvpanic", Arc::clone(&panics) as _));
        Buses {
            ports: Bus::default(),
            mmio: Bus::default(),
            timings,
            journal,
            panics,
            panicked: AtomicBool::new(false),
            wrote_console: AtomicBool::new(false),
        }
    }

    pub(super) fn add_serial(&mut self, serial: Arc<SerialPort>) -> Result<(), BusError> {
        let start = u64::from(interrupts::COM1_PORT);
        self.ports.insert(start, Serial::LEN, "COM1", PortDevice::Serial(serial))
    }

    pub(super) fn add_legacy(
        &mut self,
        keyboard: Arc<KeyboardPort>,
        acpi: Arc<AcpiPort>,
    ) -> Result<(), BusError> {
        let i8042 = u64::from(interrupts::I8042_DATA_PORT);
        self.ports.insert(i8042, I8042::LEN, "i8042", PortDevice::Keyboard(keyboard))?;
        let sleep = u64::from(interrupts::SLEEP_CONTROL_PORT);
        self.ports.insert(sleep, AcpiRegisters::LEN, "ACPI", PortDevice::Acpi(acpi))?;
        let panic = u64::from(interrupts::PVPANIC_PORT);
        self.ports.insert(panic, pvpanic::LEN, "pvpanic", PortDevice::Panic)?;
        let (timer, len) = (layout::BOOT_TIMER, layout::BOOT_TIMER_SIZE);
        self.mmio.insert(timer, len, "boot timer", MmioDevice::BootTimer)
    }

    pub(super) fn add_virtio(
        &mut self,
        gpa: u64,
        transport: Arc<Transport>,
    ) -> Result<(), BusError> {
        let name = transport.name().to_owned();
        self.mmio.insert(gpa, layout::VIRTIO_MMIO_SIZE, &name, MmioDevice::Virtio(transport))
    }

    /// `in`: fills `data`, element by element of `size` bytes. What nobody claims reads as ones.
    pub(super) fn port_in(&self, port: u16, size: u8, data: &mut [u8]) {
        data.fill(0xff);
        let Some((device, offset)) = self.ports.find(u64::from(port)) else {
            return;
        };
        for element in data.chunks_mut(usize::from(size.max(1))) {
            match device {
                PortDevice::Serial(serial) => {
                    let mut registers = serial.registers();
                    serial.metrics.read_count.count();
                    let effect = registers.read(offset, element);
                    drop(registers);
                    serial.finish(&effect);
                }
                PortDevice::Keyboard(keyboard) => {
                    let mut registers = keyboard.registers();
                    keyboard.metrics.read_count.count();
                    let effect = registers.read(offset, element);
                    drop(registers);
                    keyboard.finish(&effect);
                }
                PortDevice::Acpi(acpi) => acpi.registers().read(offset, element),
                PortDevice::Panic => element.fill(pvpanic::EVENTS),
            }
        }
    }

    /// `out`: `data` holds elements of `size` bytes. `may_wait` says whether the vCPU may be held
    /// while the console's reader is slow.
    pub(super) fn port_out(
        &self,
        port: u16,
        size: u8,
        data: &[u8],
        may_wait: impl Fn() -> bool,
    ) -> Outcome {
        let Some((device, offset)) = self.ports.find(u64::from(port)) else {
            return Outcome::Continue;
        };
        for element in data.chunks(usize::from(size.max(1))) {
            match device {
                PortDevice::Serial(serial) => {
                    let mut registers = serial.registers();
                    serial.metrics.write_count.count();
                    let effect = registers.write(offset, element);
                    drop(registers);
                    if let Some(byte) = effect.output {
                        if !self.wrote_console.swap(true, Ordering::Relaxed) {
                            self.timings.mark(Milestone::FirstConsoleByte);
                        }
                        // Outside the register lock: the reader may be slow.
                        serial.output.push(byte, &may_wait);
                    }
                    serial.finish(&effect);
                }
                PortDevice::Keyboard(keyboard) => {
                    let mut registers = keyboard.registers();
                    keyboard.metrics.write_count.count();
                    let effect = registers.write(offset, element);
                    if effect.reset {
                        keyboard.metrics.reset_count.count();
                    }
                    drop(registers);
                    keyboard.finish(&effect);
                    if effect.reset {
                        return Outcome::Reset;
                    }
                }
                PortDevice::Acpi(acpi) => {
                    if acpi.registers().write(offset, element) {
                        return Outcome::PowerOff;
                    }
                }
                PortDevice::Panic if pvpanic::says_panicked(element) => {
                    self.panics.panic_count.count();
                    // Once: a guest could say it all day.
                    if !self.panicked.swap(true, Ordering::Relaxed) {
                        self.journal.note(Happening::Panicked);
                    }
                }
                PortDevice::Panic => {}
            }
        }
        Outcome::Continue
    }

    /// Read of memory that is not RAM. What nobody claims reads as ones.
    pub(super) fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.mmio.find(gpa) {
            Some((MmioDevice::Virtio(transport), offset)) => transport.read(offset, data),
            Some((MmioDevice::BootTimer, _)) => data.fill(0),
            None => data.fill(0xff),
        }
    }

    /// Write to memory that is not RAM.
    pub(super) fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match self.mmio.find(gpa) {
            Some((MmioDevice::Virtio(transport), offset)) => transport.write(offset, data),
            Some((MmioDevice::BootTimer, 0)) if data.first() == Some(&layout::BOOT_TIMER_VALUE) => {
                if self.timings.mark(Milestone::Userspace) {
                    self.journal.note(Happening::Ready);
                    tell_boot_time(&self.timings);
                }
            }
            Some((MmioDevice::BootTimer, _)) | None => {}
        }
    }
}
