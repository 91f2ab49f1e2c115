//! A machine with all its parts, which boots or goes on.

use std::sync::Arc;
use std::sync::mpsc;

use arch::boot::cpu_state::PageSize;
use arch::ids::VmClock;
use arch::layout;
use devices::acpi::Event as AcpiEvent;
use devices::virtio::Kind;
use kvm_bindings::kvm_cpuid_entry2;
use vm_memory::ByteValued;
use vmm_sys_util::eventfd::EventFd;

use super::super::Machine;
use super::super::bus::{AcpiPort, Buses, KeyboardPort, SerialPort};
use super::super::control::{Counted, Parts};
use super::super::event::{Event, Sender};
use super::super::slot::Slot;
use super::super::table;
use super::super::vcpu::{Crew, Post, Shared};
use super::boot::{command_line, describe, enter_at};
use super::cpus::{self, Cpus};
use super::hollow::{self, Hollow, Ready, Shape};
use super::restore::{self, Origin, Restored};
use super::wiring::Wiring;
use super::{BuildError, Host, Observed, event, host};
use crate::config::{ConfigError, CpuConfig, MemoryConfig, VmConfig};
use crate::console::Output;
use crate::hypervisor::{Vcpu, Vm};
use crate::io::{IoThread, Options};
use crate::kernel::{self, Context, Lease};
use crate::memory::GuestRam;
use crate::metrics::{Set, VcpuMetrics};
use crate::random;
use crate::seccomp;
use crate::signals;
use crate::snapshot::Companion;
use crate::timings::Milestone;

/// A machine with all its parts and threads, and nothing in it: no kernel, and nobody's state.
pub struct Assembly {
    // Threads end before what they use.
    crew: Crew,
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
    observed: Observed,
    seccomp: seccomp::Mode,
    generation: [u8; 16],
    cpus: Option<Cpus>,
    vcpus: Vec<Box<dyn Vcpu>>,
    /// What they are shown as CPUID, as far as that is known.
    shown: Vec<Vec<kvm_cpuid_entry2>>,
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
        Assembly::new(config, host_side, ready, cpus, false)
    }

    /// All of the machine of `config`, with `cpus` as what CPUID says, if that is not in a state that follows. RAM is
    /// a file if it is `forkable`. What is `ready` and fits is not made again.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub(super) fn new(
        config: &VmConfig,
        host_side: &Host<'_>,
        ready: Ready,
        cpus: Option<Cpus>,
        forkable: bool,
    ) -> Result<Assembly, BuildError> {
        warn_if_larger_than_host(config);
        let Ready { hollow, disks } = ready;
        let fits = |hollow: &Hollow| {
            let same = (hollow.shape, hollow.crew.seccomp) == (Shape::of(config), config.seccomp);
            same && !forkable
        };
        let (mut ram, made) = match hollow.filter(fits) {
            Some(Hollow { ram, vm, vcpus, shown, crew, .. }) => {
                (ram, Some((vm, vcpus, shown, crew)))
            }
            None => (GuestRam::of(&MemoryConfig { forkable, ..config.memory.clone() })?, None),
        };
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
        let (vm, vcpus, mut shown, crew) = match made {
            Some((vm, vcpus, shown, crew)) => (vm, Some(vcpus), shown, Some(crew)),
            None => (hollow::vm(host_side.hypervisor, &ram)?, None, Vec::new(), None),
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
        let vcpus = match vcpus {
            Some(vcpus) => vcpus,
            None => cpus::bare(vm.as_ref(), config.cpus)?,
        };
        if let Some(cpus) = &cpus {
            cpus.equip(&vcpus)?;
            shown.clear();
        }
        let generation = write_identity(&mut ram)?;

        // From here on signals are main's alone.
        signals::hold().map_err(host("to block signals"))?;
        let io = start_io_threads(io_threads, &events)?;
        let timings = Arc::clone(&host_side.timings);
        let shared = Arc::new(Shared { buses, events, timings });
        let crew = match crew {
            Some(crew) => crew,
            None => Crew::start(config.cpus, config.seccomp).map_err(host("a vCPU thread"))?,
        };
        Ok(Assembly {
            crew,
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
            observed,
            seccomp: config.seccomp,
            generation,
            cpus,
            vcpus,
            shown,
            vm,
            ram,
        })
    }

    /// Loads the kernel of `config`.
    pub(super) fn boot(
        mut self,
        config: &VmConfig,
        host_side: &Host<'_>,
    ) -> Result<Machine, BuildError> {
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
                shown: &self.shown,
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
        let Assembly { crew: Crew { mut threads, ready, .. }, vcpus, observed, .. } = self;
        let Observed { metrics, journal } = observed;
        for (index, (thread, vcpu)) in threads.iter_mut().zip(vcpus).enumerate() {
            let counted = Arc::<VcpuMetrics>::default();
            let set: Set = ("vcpu", Arc::clone(&counted) as _);
            metrics.add_of_machine(Some(&index.to_string()), set);
            thread.give(Post { vcpu, shared: Arc::clone(&self.shared), metrics: counted });
        }
        let counted = Counted::default();
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
                vcpus_ready: ready,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ByteSize;

    #[test]
    fn memory_has_to_be_within_reach() {
        let mut config = VmConfig::default();
        config.memory.size = ByteSize((1 << 36) - (1 << 30));
        assert!(check_addresses(&config, 1 << 36).is_ok());
        config.memory.size.0 += 4096;
        let problem = check_addresses(&config, 1 << 36).unwrap_err().to_string();
        assert!(problem.contains("36 bits"), "{problem}");
    }
}
