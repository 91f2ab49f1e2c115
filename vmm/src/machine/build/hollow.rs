//! What of a machine can be made before it is known which one it will be.

use super::super::vcpu::Crew;
use super::cpus::{self, Cpus};
use super::{BuildError, host};
use crate::config::{ByteSize, ConfigError, CpuConfig, VmConfig};
use crate::hypervisor::{Hypervisor, Vcpu, Vm};
use crate::memory::GuestRam;
use crate::seccomp;
use arch::layout;
use devices::virtio::blk::Backing;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

/// What machines have in common that can be made beforehand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Shape {
    /// vCPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory: u64,
    /// RAM is from the host's pool of huge pages.
    pub huge_pages: bool,
}

impl Shape {
    /// That of the machine of `config`.
    pub fn of(config: &VmConfig) -> Shape {
        let memory = &config.memory;
        Shape { cpus: config.cpus, memory: memory.size.0, huge_pages: memory.huge_pages }
    }

    /// That there can be such a machine.
    ///
    /// # Errors
    /// What of it cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut config = VmConfig { cpus: self.cpus, ..VmConfig::default() };
        config.memory.size = ByteSize(self.memory);
        config.memory.huge_pages = self.huge_pages;
        config.validate_without_kernel()
    }
}

/// What of a machine is there already.
#[derive(Default)]
pub struct Ready {
    /// A VM, which is used if the machine fits into it.
    pub hollow: Option<Hollow>,
    /// Disks that are open, by their names.
    pub disks: Vec<(String, Backing)>,
}

/// A VM with memory slots, interrupt controllers, vCPUs and their threads, and nothing in it: any machine of its shape
/// and with the same filters, unless its memory is to be a file.
pub struct Hollow {
    pub(super) shape: Shape,
    pub(super) vm: Box<dyn Vm>,
    pub(super) vcpus: Vec<Box<dyn Vcpu>>,
    /// What each of them is shown as CPUID. That of a copy is the same more often than not, and takes KVM a third of the
    /// time of all that a vCPU has.
    pub(super) shown: Vec<Vec<kvm_cpuid_entry2>>,
    /// A thread for each.
    pub(super) crew: Crew,
    // Dropped after the VM that has slots in it.
    pub(super) ram: GuestRam,
}

impl Hollow {
    /// Makes one, with these filters for the vCPUs' threads.
    ///
    /// # Errors
    /// There can be no such machine; KVM refused, or there is no memory, or no thread.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        shape: Shape,
        filter: seccomp::Mode,
    ) -> Result<Hollow, BuildError> {
        shape.validate()?;
        let ram = GuestRam::new(shape.memory, shape.huge_pages)?;
        let vm = vm(hypervisor, &ram)?;
        let vcpus = cpus::bare(vm.as_ref(), shape.cpus)?;
        let shown = Cpus::new(hypervisor, shape.cpus, &CpuConfig::default())?.show(&vcpus)?;
        let crew = Crew::start(shape.cpus, filter).map_err(host("a vCPU thread"))?;
        Ok(Hollow { shape, vm, vcpus, shown, crew, ram })
    }
}

/// A VM with this RAM and interrupt controllers.
pub(super) fn vm(hypervisor: &dyn Hypervisor, ram: &GuestRam) -> Result<Box<dyn Vm>, BuildError> {
    let vm = hypervisor.create_vm()?;
    ram.register(vm.as_ref())?;
    vm.set_tss_address(layout::KVM_TSS)?;
    vm.create_irqchip()?;
    vm.create_pit()?;
    Ok(vm)
}
