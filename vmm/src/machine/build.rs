//! Assembly: from a configuration to a machine that can run.
//!
//! The order is KVM's: memory slots cost milliseconds once there are vCPUs, so they come first;
//! the interrupt controllers need the VM and are needed by vCPUs and irqfds. Whatever fails, what
//! was made before is dropped again.

mod cpus;
pub(super) mod hollow;
pub(super) mod restore;

use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use arch::acpi::{self, AcpiConfig, AcpiError};
use arch::boot::cpu_state::{self, PageSize};
use arch::cpuid::Cpuid;
use arch::ids::VmClock;
use arch::layout::{self, VirtioSlot};
use arch::{interrupts, mptable};
use devices::acpi::Event as AcpiEvent;
use devices::bus::BusError;
use devices::virtio::Kind;
use devices::virtio::blk::Backing;
use devices::virtio::mmio::{Registers, reg};
use devices::virtio::queue::Interrupt;
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::cpus::{Cpus, TemplateError};
use self::hollow::{Hollow, Ready, Shape};
use self::restore::{Origin, OriginError, Restored};
use super::Machine;
use super::bus::{AcpiPort, Buses, KeyboardPort, SerialPort};
use super::control::{Counted, Parts};
use super::event::{Event, Sender};
use super::slot::Slot;
use super::table::{self, BackEnd, Entry};
use super::transport::{Parts as TransportParts, Transport};
use super::vcpu::{Shared, VcpuThread, install_kick_handler};
use crate::config::{ConfigError, ConsoleDevice, ConsoleMode, CpuConfig, VmConfig};
use crate::console::Output;
use crate::hypervisor::{Hypervisor, HypervisorError, Vcpu, Vm};
use crate::io::{IoThread, Options};
use crate::journal::Journal;
use crate::kernel::{self, Context, Lease, LoadError};
use crate::memory::{GuestRam, MemoryError};
use crate::metrics::{Registry, Set, VcpuMetrics};
use crate::random;
use crate::seccomp;
use crate::signals;
use crate::snapshot::Companion;
use crate::timings::{Milestone, Timings};

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration is not one of a machine.
    #[error("the configuration is not valid")]
    Config(#[from] ConfigError),
    /// The snapshot cannot be gone on from.
    #[error("the snapshot cannot be used")]
    Origin(#[from] OriginError),
    /// KVM refused.
    #[error("KVM refused to make the machine")]
    Hypervisor(#[from] HypervisorError),
    /// The machine wants more vCPUs than the host's KVM can give it.
    #[error("{wanted} vCPUs are wanted, KVM on this host gives a machine {max}")]
    TooManyCpus {
        /// Configured number.
        wanted: u32,
        /// What KVM allows.
        max: usize,
    },
    /// The CPU template is not for this host.
    #[error("the CPU template cannot be used on this host")]
    Template(#[from] TemplateError),
    /// No memory.
    #[error("cannot set up the guest's memory")]
    Memory(#[from] MemoryError),
    /// Nothing to boot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A device's back-end cannot be opened.
    #[error("cannot set up {device}")]
    Device {
        /// Name of the device.
        device: String,
        /// The reason.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The tables that describe the machine could not be made.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] AcpiError),
    /// Two devices claim one address: a defect of the memory map.
    #[error("the memory map is not valid")]
    Bus(#[from] BusError),
    /// The host refused a thread, a descriptor or random numbers.
    #[error("the host refused {what}")]
    Host {
        /// What was wanted.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// The machine's host.
pub struct Host<'a> {
    /// Its hypervisor.
    pub hypervisor: &'a dyn Hypervisor,
    /// KVM has no hardware behind it, so that a stock kernel does not come up.
    pub pvm: bool,
    /// Where milestones are noted.
    pub timings: Arc<Timings>,
    /// What others see of the machine.
    pub observed: Observed,
    /// Size of the console's window, if it has one: columns, rows.
    pub window: Option<(u16, u16)>,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> BuildError {
    move |source| BuildError::Host { what, source }
}

fn event() -> Result<EventFd, BuildError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("an event descriptor"))
}

/// What can be seen of a machine from outside.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// What is counted.
    pub metrics: Arc<Registry>,
    /// What happens.
    pub journal: Arc<Journal>,
}

impl Machine {
    /// Assembles a machine.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub fn new(config: &VmConfig, host_side: &Host<'_>) -> Result<Machine, BuildError> {
        config.validate()?;
        let cpus = Cpus::new(host_side.hypervisor, config.cpus, &config.cpu)?;
        let ram = GuestRam::of(&config.memory)?;
        let parts = Made { cpus: Some(cpus), ram, vm: None, vcpus: None };
        Assembly::new(config, host_side, parts, Vec::new())?.boot(config, host_side)
    }

    /// Assembles the machine of a snapshot, as `config` has it, which may name other files and
    /// interfaces than the one that was saved. It is paused. What is `ready` is not made again.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub fn restore(
        config: &VmConfig,
        origin: &Origin,
        host_side: &Host<'_>,
        ready: Ready,
    ) -> Result<Machine, BuildError> {
        let here = origin.is_from_here();
        Assembly::of_copy(config, host_side, ready, here)?.go_on(origin)
    }
}

/// What an assembly begins with.
struct Made {
    /// What vCPUs are made from, or compared with.
    cpus: Option<Cpus>,
    ram: GuestRam,
    vm: Option<Box<dyn Vm>>,
    vcpus: Option<Vec<Box<dyn Vcpu>>>,
}

/// A machine with all its parts and threads, and nothing in it: no kernel, and nobody's state.
pub struct Assembly {
    // Threads end before what they use.
    threads: Vec<VcpuThread>,
    io: Vec<IoThread>,
    slots: Vec<Slot>,
    shared: Arc<Shared>,
    serial: Option<Arc<SerialPort>>,
    keyboard: Arc<KeyboardPort>,
    acpi: Arc<AcpiPort>,
    console: Option<usize>,
    output: Arc<Output>,
    wake: Arc<EventFd>,
    receiver: mpsc::Receiver<Event>,
    vcpus_ready: mpsc::Receiver<io::Result<()>>,
    observed: Observed,
    seccomp: seccomp::Mode,
    generation: [u8; 16],
    cpus: Option<Cpus>,
    vcpus: Vec<Box<dyn Vcpu>>,
    vm: Box<dyn Vm>,
    ram: GuestRam,
}

impl Assembly {
    /// All of a machine that goes on somewhere else as `config` has it; from the same start of this host, if it
    /// is from `here`. What is `ready` is not made again.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub fn of_copy(
        config: &VmConfig,
        host_side: &Host<'_>,
        ready: Ready,
        here: bool,
    ) -> Result<Assembly, BuildError> {
        config.validate_without_kernel()?;
        // What a saved machine's CPUs are like is in its state. Where it was saved on this very host there is
        // nothing to compare it with.
        let plain = CpuConfig::default();
        let cpus =
            (!here).then(|| Cpus::new(host_side.hypervisor, config.cpus, &plain)).transpose()?;
        let Ready { hollow, disks } = ready;
        // Its vCPUs have nothing that could be compared.
        let fits = |hollow: &Hollow| here && hollow.shape == Shape::of(config);
        let made = match hollow.filter(fits) {
            Some(Hollow { ram, vm, vcpus, .. }) => {
                Made { cpus, ram, vm: Some(vm), vcpus: Some(vcpus) }
            }
            None => {
                let memory = &config.memory;
                let ram = GuestRam::new(memory.size.0, memory.huge_pages)?;
                Made { cpus, ram, vm: None, vcpus: None }
            }
        };
        Assembly::new(config, host_side, made, disks)
    }

    fn new(
        config: &VmConfig,
        host_side: &Host<'_>,
        made: Made,
        disks: Vec<(String, Backing)>,
    ) -> Result<Assembly, BuildError> {
        warn_if_larger_than_host(config);
        let Made { cpus, mut ram, vm, vcpus } = made;
        let wake = Arc::new(event()?);
        let (events, receiver) = Sender::new(Arc::clone(&wake));
        let observed = host_side.observed.clone();
        let metrics = &observed.metrics;
        metrics.forget_machine();
        let output = Arc::new(Output::new().map_err(host("an event descriptor"))?);
        output.set_limit(table::limiter(config.console.rate));
        output.set_drops(config.console.drop);
        metrics.add_of_machine(None, ("uart", Arc::clone(output.metrics()) as _));
        if let Some(cpus) = &cpus {
            check_addresses(config, cpus.cpuid().address_limit())?;
        }
        let devices = table::devices(config, &output, host_side.window, &ram, disks)?;
        let vm = match vm {
            Some(vm) => vm,
            None => hollow::vm(host_side.hypervisor, &ram)?,
        };
        let mut wiring = Wiring {
            vm: vm.as_ref(),
            events: events.clone(),
            buses: Buses::new(Arc::clone(&host_side.timings), observed.clone()),
            slots: Vec::new(),
            io: Vec::new(),
            seccomp: config.seccomp,
            observed: &observed,
        };
        let serial = wiring.serial(config, &output)?;
        let (keyboard, acpi) = wiring.legacy(config)?;
        let console = devices.iter().position(|entry| entry.device.kind() == Kind::Console);
        for entry in devices {
            wiring.virtio(entry)?;
        }
        let Wiring { buses, slots, io: io_threads, .. } = wiring;
        host_side.timings.mark(Milestone::VmCreated);
        let vcpus = match (vcpus, &cpus) {
            (Some(vcpus), _) => vcpus,
            (None, Some(cpus)) => cpus.make(vm.as_ref())?,
            (None, None) => cpus::bare(vm.as_ref(), config.cpus)?,
        };
        let generation = write_identity(&mut ram)?;

        // From here on signals are main's alone.
        signals::hold().map_err(host("to block signals"))?;
        let io = start_io_threads(io_threads, &events)?;
        let shared = Arc::new(Shared {
            buses,
            events,
            timings: Arc::clone(&host_side.timings),
            seccomp: config.seccomp,
        });
        install_kick_handler().map_err(host("a signal handler"))?;
        let (ready, vcpus_ready) = mpsc::channel();
        let mut threads = Vec::new();
        for index in 0..vcpus.len() {
            let counted = Arc::<VcpuMetrics>::default();
            let set: Set = ("vcpu", Arc::clone(&counted) as _);
            metrics.add_of_machine(Some(&index.to_string()), set);
            let thread = VcpuThread::start(index, Arc::clone(&shared), counted, ready.clone())
                .map_err(host("a vCPU thread"))?;
            threads.push(thread);
        }
        Ok(Assembly {
            threads,
            io,
            slots,
            shared,
            serial,
            keyboard,
            acpi,
            console,
            output,
            wake,
            receiver,
            vcpus_ready,
            observed,
            seccomp: config.seccomp,
            generation,
            cpus,
            vcpus,
            vm,
            ram,
        })
    }

    /// Loads the kernel of `config`.
    fn boot(mut self, config: &VmConfig, host_side: &Host<'_>) -> Result<Machine, BuildError> {
        let mut leased = None;
        if let Some(cpus) = &self.cpus {
            let context = Context {
                cmdline: &command_line(config, self.slots.len()),
                root_disk: config.disk.iter().any(|disk| disk.root),
                pvm: host_side.pvm,
                rsdp: describe(config, &self.slots, &mut self.ram, cpus.cpuid())?,
                page_size: PageSize::largest(&cpus.cpuid().for_vcpu(0)),
            };
            let kernel = kernel::load(&config.kernel, &mut self.ram, &context)?;
            if let Some(boot_cpu) = self.vcpus.first() {
                enter_at(boot_cpu.as_ref(), &kernel.entry)?;
            }
            leased = kernel.leased;
        }
        host_side.timings.mark(Milestone::KernelLoaded);
        Ok(self.whole(leased, false, Vec::new()))
    }

    /// Goes on where `origin` was saved. The machine is paused.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub fn go_on(mut self, origin: &Origin) -> Result<Machine, BuildError> {
        restore::memory(origin, &mut self.ram)?;
        restore::states(
            origin,
            Restored {
                vm: self.vm.as_ref(),
                vcpus: &self.vcpus,
                compare: self.cpus.is_some(),
                serial: self.serial.as_deref(),
                keyboard: &self.keyboard,
                acpi: &self.acpi,
                slots: &mut self.slots,
            },
        )?;
        // The guest is a copy. It is told before its first instruction.
        self.acpi.raise(AcpiEvent::VmGenId);
        self.acpi.raise(AcpiEvent::VmClock);
        self.shared.timings.mark(Milestone::KernelLoaded);
        let companions = restore::companions(origin, &self.ram, self.seccomp)?;
        Ok(self.whole(None, true, companions))
    }

    fn whole(
        self,
        leased: Option<(Lease, Vec<(u64, u64)>)>,
        restored: bool,
        companions: Vec<Companion>,
    ) -> Machine {
        let Assembly { mut threads, vcpus, observed, .. } = self;
        for (thread, vcpu) in threads.iter_mut().zip(vcpus) {
            thread.give(vcpu);
        }
        let counted = Counted::default();
        let Observed { metrics, journal } = observed;
        metrics.add_of_machine(None, ("vmm", Arc::clone(&counted.control) as _));
        metrics.add_of_machine(None, ("latencies_us", Arc::clone(&counted.latencies) as _));
        Machine {
            vcpus: threads,
            io: self.io,
            slots: self.slots,
            shared: self.shared,
            control: Parts {
                events: self.receiver,
                wake: self.wake,
                vcpus_ready: self.vcpus_ready,
                output: self.output,
                serial: self.serial,
                keyboard: self.keyboard,
                acpi: self.acpi,
                console: self.console,
                counted,
                journal,
            },
            leased,
            restored,
            companions,
            generation: self.generation,
            vm: self.vm,
            ram: self.ram,
            seccomp: self.seccomp,
        }
    }
}

/// Connects devices to buses, interrupts and notification events.
struct Wiring<'a> {
    vm: &'a dyn Vm,
    events: Sender,
    buses: Buses,
    slots: Vec<Slot>,
    /// The io threads that the devices need.
    io: Vec<Options>,
    seccomp: seccomp::Mode,
    observed: &'a Observed,
}

impl Wiring<'_> {
    /// A new interrupt line on `gsi`.
    fn line(&self, gsi: u32) -> Result<EventFd, BuildError> {
        let line = event()?;
        self.vm.register_irqfd(&line, gsi)?;
        Ok(line)
    }

    fn serial(
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

    fn legacy(
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

    fn virtio(&mut self, entry: Entry) -> Result<(), BuildError> {
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

fn has_serial(config: &VmConfig) -> bool {
    config.console.device == ConsoleDevice::Serial && config.console.mode != ConsoleMode::Off
}

/// A guest could name what lies beyond the reach of its CPUs, and KVM would not find it.
fn check_addresses(config: &VmConfig, limit: u64) -> Result<(), ConfigError> {
    if layout::ram_end(config.memory.size.0) <= limit {
        return Ok(());
    }
    let (size, bits) = (config.memory.size, limit.ilog2());
    let problem = format!("{size} is more than this host's CPU can address with its {bits} bits");
    Err(ConfigError { field: "memory.size".to_owned(), problem })
}

fn warn_if_larger_than_host(config: &VmConfig) {
    // SAFETY: sysconf has no memory arguments.
    let (pages, page) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let host = u64::try_from(pages).unwrap_or(0) * u64::try_from(page).unwrap_or(0);
    if host > 0 && config.memory.size.0 > host {
        tracing::warn!(
            guest = %config.memory.size,
            host_mib = host >> 20,
            "the guest has more memory than the host; using all of it ends the machine"
        );
    }
}

/// Puts the boot vCPU at the kernel's entry. The others wait for their start-up interrupt.
fn enter_at(vcpu: &dyn Vcpu, entry: &arch::boot::Entry) -> Result<(), HypervisorError> {
    vcpu.set_fpu(&cpu_state::fpu())?;
    vcpu.set_sregs(&cpu_state::sregs(entry, vcpu.sregs()?))?;
    vcpu.set_regs(&cpu_state::regs(entry))?;
    vcpu.set_lapic(&cpu_state::with_local_lines(vcpu.lapic()?))
}

/// Writes ACPI and MP tables. Returns the address of the RSDP.
fn describe(
    config: &VmConfig,
    slots: &[Slot],
    ram: &mut GuestRam,
    cpuid: &Cpuid,
) -> Result<u64, BuildError> {
    let cpus = config.cpus as u8;
    let tables = acpi::build(&AcpiConfig {
        cpus,
        virtio: (0..slots.len()).filter_map(VirtioSlot::new).collect(),
        serial: has_serial(config),
        i8042: config.i8042,
        vmgenid: true,
        vmclock: true,
    })?;
    tables.write(ram.memory().guest().as_ref())?;
    let (signature, features) = cpuid.signature_and_features();
    mptable::write(ram.memory().guest().as_ref(), cpus, signature, features)
        .map_err(|err| host("memory for the MP table")(io::Error::other(err)))?;
    Ok(tables.rsdp())
}

/// Writes the identity pages: each machine is another, also one that goes on where another was saved.
fn write_identity(ram: &mut GuestRam) -> Result<[u8; 16], BuildError> {
    let mut identity = [0u8; 16 + 8];
    random::fill(&mut identity).map_err(host("random numbers"))?;
    let (&generation, marker) = identity.split_first_chunk().unwrap_or((&[0; 16], &[]));
    ram.write_id_page(layout::VMGENID_PAGE, &generation)?;
    let marker = marker.iter().fold(0, |all, &byte| all << 8 | u64::from(byte));
    ram.write_id_page(layout::VMCLOCK_PAGE, VmClock::new(marker).as_slice())?;
    Ok(generation)
}

fn start_io_threads(threads: Vec<Options>, events: &Sender) -> Result<Vec<IoThread>, BuildError> {
    let start = |options| {
        let events = events.clone();
        let reports = Box::new(move |report| {
            events.send(Event::Io(report));
        });
        IoThread::start(options, reports).map_err(host("an io thread"))
    };
    threads.into_iter().map(start).collect()
}

/// The kernel command line: what saves a guest time at boot, where its console, disks and devices
/// are, and what the user adds (or all that the user wants, with `replace-cmdline`). Devices come
/// first, so that a user's `--` stays the end of the kernel's own arguments.
fn command_line(config: &VmConfig, virtio_devices: usize) -> String {
    let mut words: Vec<String> = Vec::new();
    if !config.kernel.replace_cmdline {
        match (config.console.mode, config.console.device) {
            (ConsoleMode::Off, _) => {}
            (_, ConsoleDevice::Serial) => words.push("console=ttyS0".into()),
            (_, ConsoleDevice::Virtio) => words.push("console=hvc0".into()),
        }
        words.extend(DEFAULT_CMDLINE.split_whitespace().map(str::to_owned));
        if !config.i8042 {
            // ACPI says that there is none, and Linux probes the ports all the same.
            words.extend(["i8042.noaux".into(), "i8042.nokbd".into()]);
        }
        words.extend(root_arguments(config));
    }
    words.extend((0..virtio_devices).filter_map(VirtioSlot::new).map(|slot| slot.cmdline_option()));
    words.extend(config.kernel.cmdline.clone());
    words.join(" ")
}

/// The words of a kernel command line that say where the root file system is, if a disk has it.
pub fn root_arguments(config: &VmConfig) -> Option<String> {
    let (n, disk) = config.disk.iter().enumerate().find(|(_, disk)| disk.root)?;
    let place = match &disk.partuuid {
        Some(id) => format!("PARTUUID={id}"),
        None => format!("/dev/{}", disk_node(n)),
    };
    Some(format!("root={place} {}", if disk.ro { "ro" } else { "rw" }))
}

/// Words of the default command line beside console and root:
/// - `quiet`: each character on a serial console is an exit;
/// - `reboot=k`: reset at once through port 0x64 instead of trying other ways first;
/// - `panic=-1`: a kernel that panics resets at once, so that the machine ends;
/// - `pci=off`, `8250.nr_uarts=1`: no probing of hardware that is not there;
/// - `random.trust_cpu=on`: a guest without RDRAND trust waits for entropy.
const DEFAULT_CMDLINE: &str = "quiet reboot=k panic=-1 pci=off 8250.nr_uarts=1 random.trust_cpu=on";

/// Name of the `n`th virtio disk in a Linux guest.
fn disk_node(n: usize) -> String {
    // 26 disks are more than a machine has.
    format!("vd{}", char::from(b'a' + (n % 26) as u8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ByteSize, DiskConfig};

    #[test]
    fn memory_has_to_be_within_reach() {
        let mut config = VmConfig::default();
        config.memory.size = ByteSize((1 << 36) - (1 << 30));
        assert!(check_addresses(&config, 1 << 36).is_ok());
        config.memory.size.0 += 4096;
        let problem = check_addresses(&config, 1 << 36).unwrap_err().to_string();
        assert!(problem.contains("36 bits"), "{problem}");
    }

    #[test]
    fn the_command_line_is_default_extended_or_replaced() {
        let mut config = VmConfig::default();
        let no_i8042 = "i8042.noaux i8042.nokbd";
        assert_eq!(command_line(&config, 0), format!("console=ttyS0 {DEFAULT_CMDLINE} {no_i8042}"));
        config.kernel.cmdline = Some("single -- arg".into());
        config.disk = vec![DiskConfig::default(), DiskConfig { root: true, ..Default::default() }];
        let line = command_line(&config, 2);
        assert!(line.contains(" root=/dev/vdb rw virtio_mmio.device="), "{line}");
        assert!(line.ends_with(" single -- arg"), "{line}");
        assert_eq!(line.matches("virtio_mmio.device=").count(), 2);
        config.kernel.replace_cmdline = true;
        assert_eq!(command_line(&config, 0), "single -- arg");
    }
}
