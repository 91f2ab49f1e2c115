//! One virtual machine: how it is put together ([`build`]), how it is controlled while it runs
//! ([`control`]), what its vCPU threads do ([`vcpu`]) and where their exits go ([`bus`]).
//!
//! ```text
//!   VmConfig + Host ── Machine::new ──> Machine ── run ──> Ending
//!                                          │
//!                                       Handle ── Command, from any thread
//! ```
//!
//! `Machine::run` makes the calling thread the control thread ("main") until the machine ends.
//! Dropping a machine stops its threads and gives back all that it took from the host.

mod build;
mod bus;
mod control;
mod event;
pub mod lifecycle;
mod slot;
mod table;
mod throttle;
mod transport;
mod vcpu;

use std::os::fd::RawFd;
use std::sync::Arc;

pub use build::hollow::{Hollow, Ready, Shape};
#[cfg(test)]
pub(crate) use build::restore::memory as restore_memory;
pub use build::restore::{Clock, Origin, OriginError, Source};
pub use build::{Assembly, BuildError, Host, Observed, root_arguments};
pub use devices::virtio::device::{BackEnd, Call, Message, Status as DeviceStatus, Traffic};
pub use event::{Command, Frozen, Handle, Reply, ReplyTo};
pub use lifecycle::{Ending, Refusal, State};
pub use table::{
    LONGEST_METADATA, certainly_raw, check_disk, initial_metadata, open_disk, open_image,
};

use crate::console::Console;
use crate::hypervisor::{Failure, HypervisorError, Vm};
use crate::io::IoThread;
use crate::kernel::Lease;
use crate::memory::GuestRam;
use crate::seccomp;
use crate::snapshot::Companion;
use crate::timings::Timings;

/// Why a running machine ended although nobody wanted it to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The control loop cannot wait for events, or a thread could not be filtered.
    #[error("{what}")]
    Host {
        /// What failed.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A vCPU stopped where no guest can be helped.
    #[error("vCPU {index} cannot go on{place}: {failure}")]
    Vcpu {
        /// Index of the vCPU.
        index: usize,
        /// " at ADDRESS", or nothing if that is not known.
        place: String,
        /// What happened.
        failure: Failure,
    },
    /// Nobody brings the pages any more that the guest still needs.
    #[error("the pager is gone, and with it memory that the guest still needs")]
    Pager,
    /// `KVM_RUN` failed.
    #[error("vCPU {index} cannot run")]
    VcpuRun {
        /// Index of the vCPU.
        index: usize,
        /// The failed call.
        source: HypervisorError,
    },
}

/// A descriptor that the control thread serves for its caller, such as a socket.
pub trait Service {
    /// Becomes readable when there is something to do.
    fn fd(&self) -> RawFd;

    /// Called on the control thread when it is readable. Must not block. Returns whether it is to be
    /// called again.
    fn on_ready(&mut self, machine: &Handle) -> bool;
}

/// A machine, assembled and not yet running.
///
/// Field order is the order of dropping: threads first, then the VM, then the memory that it uses.
pub struct Machine {
    vcpus: Vec<vcpu::VcpuThread>,
    io: Vec<IoThread>,
    slots: Vec<slot::Slot>,
    shared: Arc<vcpu::Shared>,
    control: control::Parts,
    /// Ranges of RAM that map a kernel file which others may write, and the lease that tells us first.
    leased: Option<(Lease, Vec<(u64, u64)>)>,
    /// It goes on from a snapshot: paused.
    restored: bool,
    companions: Vec<Companion>,
    generation: [u8; 16],
    // Slots, irqfds and ioeventfds live in it.
    vm: Box<dyn Vm>,
    ram: GuestRam,
    seccomp: seccomp::Mode,
}

impl Machine {
    /// A handle to send commands with.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.events.clone())
    }

    /// The VM generation id that its guest reads.
    pub fn generation(&self) -> [u8; 16] {
        self.generation
    }

    /// When milestones were reached.
    pub fn timings(&self) -> &Arc<Timings> {
        &self.shared.timings
    }
}

/// What [`Machine::run`] needs from its caller beside the machine.
pub struct RunOptions {
    /// The host side of the console.
    pub console: Console,
    /// Signals that end the machine or tell of a new window size; see [`crate::signals`].
    pub signals: Option<crate::signals::Signals>,
    /// Descriptors to be served.
    pub services: Vec<Box<dyn Service>>,
    /// System calls of the calling thread from now on.
    pub thread: seccomp::ThreadKind,
    /// The process ends with this machine: what the kernel frees with a process is left to it, which
    /// is quicker than unmapping and closing it piece by piece.
    pub last: bool,
}
