//! Assembly: from a configuration to a machine that can run.
//!
//! The order is KVM's: memory slots cost milliseconds once there are vCPUs, so they come first;
//! the interrupt controllers need the VM and are needed by vCPUs and irqfds. Whatever fails, what
//! was made before is dropped again.

mod assembly;
mod boot;
mod cpus;
pub(super) mod hollow;
pub(super) mod restore;
mod wiring;

use std::io;
use std::sync::Arc;

use arch::acpi::AcpiError;
use devices::bus::BusError;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use self::assembly::Assembly;
pub use self::boot::root_arguments;
use self::cpus::{Cpus, TemplateError};
use self::hollow::Ready;
use self::restore::{Origin, OriginError};
use super::Machine;
use crate::config::{ConfigError, VmConfig};
use crate::hypervisor::{Hypervisor, HypervisorError};
use crate::journal::Journal;
use crate::kernel::LoadError;
use crate::memory::MemoryError;
use crate::metrics::Registry;
use crate::timings::Timings;

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
    /// Assembles a machine. What is `ready` is not made again.
    ///
    /// # Errors
    /// [`BuildError`]; nothing of the machine is left then.
    pub fn new(
        config: &VmConfig,
        host_side: &Host<'_>,
        ready: Ready,
    ) -> Result<Machine, BuildError> {
        config.validate()?;
        let cpus = Cpus::new(host_side.hypervisor, config.cpus, &config.cpu)?;
        let forkable = config.memory.forkable;
        let assembly = Assembly::new(config, host_side, ready, Some(cpus), forkable)?;
        assembly.boot(config, host_side)
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
