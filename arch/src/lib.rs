//! What the CPU architecture dictates: memory map, interrupt numbers, kernel images, boot
//! protocols, initial CPU state, CPUID, MSRs, ACPI and MP tables, identity pages.
//!
//! Everything here computes values; nothing here talks to KVM. The `vmm` crate asks for a value,
//! or has it written into guest memory, and does the ioctls. This is the only crate that looks at
//! the target architecture: the modules of the one it is built for are re-exported at its root.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
