//! The vCPUs of a machine as they are before the first one has a kernel: what CPUID says, and what
//! model-specific registers have in them.

use arch::cpuid::{Cpuid, CpuidConfig};
use arch::msr;
use arch::template::{Misfit, MissingLeaf, Template};

use kvm_bindings::kvm_cpuid_entry2;

use super::BuildError;
use crate::config::CpuConfig;
use crate::hypervisor::{Capabilities, Hypervisor, HypervisorError, Vcpu, Vm};

/// Why a CPU template cannot be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It was made for other CPUs.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// It changes a leaf that KVM does not give.
    #[error(transparent)]
    Leaf(#[from] MissingLeaf),
    /// It changes a register that KVM has not.
    #[error("msr_modifiers: a register cannot be changed that this host's KVM does not show")]
    Read(#[source] HypervisorError),
    /// KVM does not take what it makes of a register.
    #[error("msr_modifiers: this host's KVM does not take a register's new value")]
    Write(#[source] HypervisorError),
}

/// What a machine's vCPUs are made from.
pub(super) struct Cpus {
    count: u8,
    cpuid: Cpuid,
    template: Template,
}

impl Cpus {
    /// Looks what the host can give `config`'s CPUs.
    ///
    /// # Errors
    /// KVM cannot do what a machine needs; the template is not to be had, or not here.
    pub fn new(
        hypervisor: &dyn Hypervisor,
        cpus: u32,
        config: &CpuConfig,
    ) -> Result<Cpus, BuildError> {
        let own = config.own_template()?;
        let changes = own.as_ref().map_or(&[][..], |template| &template.kvm_capabilities);
        let capabilities = hypervisor.capabilities_with(changes)?;
        let count = count(cpus, &capabilities)?;
        let mut supported = hypervisor.supported_cpuid()?;
        let template = match (own, config.template) {
            (Some(own), _) => own,
            (None, Some(fixed)) => {
                fixed.template(supported.as_slice()).map_err(TemplateError::from)?
            }
            (None, None) => Template::default(),
        };
        template.change_cpuid(supported.as_mut_slice()).map_err(TemplateError::from)?;
        let cpuid = Cpuid::new(
            supported.as_slice(),
            &CpuidConfig {
                cpus: count,
                smt: config.smt,
                tsc_deadline: capabilities.tsc_deadline_timer,
                tsc_khz: capabilities.tsc_khz,
            },
        );
        Ok(Cpus { count, cpuid, template })
    }

    /// What CPUID says.
    pub fn cpuid(&self) -> &Cpuid {
        &self.cpuid
    }

    /// Shows vCPUs that are [`bare`] what CPUID says, and no more. Returns what each is shown.
    ///
    /// # Errors
    /// KVM refused.
    pub fn show(&self, vcpus: &[Box<dyn Vcpu>]) -> Result<Vec<Vec<kvm_cpuid_entry2>>, BuildError> {
        let mut shown = Vec::new();
        for (index, vcpu) in (0..self.count).zip(vcpus) {
            vcpu.set_cpuid(&self.cpuid.for_vcpu(index))?;
            shown.push(vcpu.cpuid()?);
        }
        Ok(shown)
    }

    /// Gives vCPUs that are [`bare`] what CPUID says, and registers.
    ///
    /// # Errors
    /// KVM refused; the template's registers are not to be had.
    pub fn equip(&self, vcpus: &[Box<dyn Vcpu>]) -> Result<(), BuildError> {
        let boot_msrs = msr::boot_msrs();
        let changed = self.template.msrs();
        for (index, vcpu) in (0..self.count).zip(vcpus) {
            vcpu.set_cpuid(&self.cpuid.for_vcpu(index))?;
            if !changed.is_empty() {
                // Of each vCPU's own: some registers say which vCPU it is.
                let mut msrs = vcpu.msrs(&changed).map_err(TemplateError::Read)?;
                self.template.change_msrs(&mut msrs);
                vcpu.set_msrs(&msrs).map_err(TemplateError::Write)?;
            }
            // Last, so that a kernel finds what its boot protocol promises.
            vcpu.set_msrs(&boot_msrs)?;
        }
        Ok(())
    }
}

/// vCPUs that nothing is known of yet.
///
/// # Errors
/// KVM refused.
pub fn bare(vm: &dyn Vm, count: u32) -> Result<Vec<Box<dyn Vcpu>>, BuildError> {
    // A machine has at most 64.
    (0..count).map(|index| Ok(vm.create_vcpu(index as u8)?)).collect()
}

fn count(wanted: u32, capabilities: &Capabilities) -> Result<u8, BuildError> {
    let max = capabilities.max_vcpus;
    match u8::try_from(wanted) {
        Ok(count) if usize::from(count) <= max => Ok(count),
        _ => Err(BuildError::TooManyCpus { wanted, max }),
    }
}
