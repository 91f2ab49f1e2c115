//! Device models: registers and rings in, bytes and interrupts out.
//!
//! Nothing in here opens `/dev/kvm`, starts a thread, takes a lock or keeps process-wide state. A
//! legacy device ([`serial`], [`i8042`], [`acpi`], [`pvpanic`]) is a plain value driven by its register
//! accesses. A virtio device ([`virtio`]) has two halves: the device, which lives with the
//! machine's control thread, and one worker per queue group, which an io thread owns.
//!
//! `vmm` is the only caller: it owns the threads, the interrupt lines and the host files.

pub mod acpi;
pub mod bus;
#[cfg(test)]
mod golden;
pub mod i8042;
pub mod memory;
pub mod metrics;
pub mod pvpanic;
pub mod rate;
pub mod serial;
pub mod virtio;
