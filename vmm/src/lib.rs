//! The machine: what holds one virtual machine together.
//!
//! - [`config`]: the one description of a machine, whatever front door it came through.
//! - [`hypervisor`]: the narrow trait over KVM.
//! - [`memory`]: guest RAM and its mappings.
//! - [`kernel`]: from a kernel file to a bootable guest.
//! - [`machine`]: assembly, the control loop, vCPU threads, lifecycle.
//! - [`io`]: io threads that own the virtio workers.
//! - [`metrics`], [`journal`]: what can be seen of it from outside.
//! - [`signals`], [`timings`], [`console`]: what a machine shares with its user.
//! - [`snapshot`]: a machine as files; [`fork`]: handed over to other processes.
//! - [`seccomp`]: the filter of each kind of thread.
//!
//! Nothing in here exits the process, prints, or reads the command line.

pub mod config;
pub mod console;
pub mod files;
pub mod fork;
pub mod hook;
pub mod hypervisor;
pub mod io;
pub mod journal;
pub mod kernel;
pub mod machine;
pub mod memory;
pub mod metrics;
mod random;
pub mod seccomp;
pub mod signals;
pub mod snapshot;
pub mod timings;

/// The device models, for their error types.
pub use devices;
