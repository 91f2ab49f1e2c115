//! x86_64: a PC without its past. No BIOS, no PCI, no VGA, no RTC; ACPI in its hardware-reduced
//! form, a 16550, and virtio over MMIO.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod ids;
pub mod interrupts;
pub mod kernel;
pub mod layout;
pub mod mptable;
pub mod msr;
pub mod template;

/// The most vCPUs a machine can have. Their APIC ids are `0..MAX_VCPUS`, all below 255, so every
/// table can use the 8-bit xAPIC form and no vCPU depends on x2APIC.
pub const MAX_VCPUS: u8 = 64;
