//! The narrow view of a hypervisor that a machine needs, and its own exit enum.
//!
//! ```text
//!   Hypervisor ── create_vm ──> Vm ── create_vcpu ──> Vcpu ── run ──> Exit
//! ```
//!
//! [`kvm`] implements it over kvm-ioctls; [`fault`] decorates any implementation so that a chosen
//! call fails. Everything that a machine asks of the kernel's KVM goes through here.

pub mod fault;
pub mod kvm;
pub mod state;

use std::fmt;
use std::io;

use arch::template::KvmCapability;
use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use vmm_sys_util::eventfd::EventFd;

use self::state::{VcpuState, VmState};

/// A hypervisor call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}{detail}")]
pub struct HypervisorError {
    /// The call by its KVM name, e.g. `KVM_CREATE_VM`.
    pub call: &'static str,
    /// What it was about, starting with a blank, or empty.
    pub detail: String,
    /// The system's reason.
    pub source: io::Error,
}

/// Result of a hypervisor call.
pub type Result<T> = std::result::Result<T, HypervisorError>;

/// What the host's hypervisor can do, as far as a machine depends on it.
#[derive(Clone, Debug)]
pub struct Capabilities {
    /// Most vCPUs that one VM may have.
    pub max_vcpus: usize,
    /// The local APIC timer can run in TSC-deadline mode.
    pub tsc_deadline_timer: bool,
    /// Frequency of the host's TSC in kHz, if it is known.
    pub tsc_khz: Option<u32>,
}

/// The host's hypervisor.
pub trait Hypervisor: Send + Sync {
    /// What it can do.
    ///
    /// # Errors
    /// A needed capability is missing.
    fn capabilities(&self) -> Result<Capabilities> {
        self.capabilities_with(&[])
    }

    /// As [`Hypervisor::capabilities`], with more that is needed, or less.
    ///
    /// # Errors
    /// A needed capability is missing.
    fn capabilities_with(&self, changes: &[KvmCapability]) -> Result<Capabilities>;

    /// CPUID leaves that it can give a guest.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn supported_cpuid(&self) -> Result<CpuId>;

    /// Numbers of the model-specific registers that may hold state of a guest.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn msr_numbers(&self) -> Result<Vec<u32>>;

    /// Makes a VM without memory, interrupt controller or vCPU.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn create_vm(&self) -> Result<Box<dyn Vm>>;
}

/// A virtual machine: memory slots, interrupt controllers, event wiring.
pub trait Vm: Send + Sync {
    /// Makes, changes or (with a size of 0) deletes a memory slot.
    ///
    /// # Safety
    /// `userspace_addr` must be a mapping of `memory_size` bytes that nothing but the guest's
    /// memory uses, and must stay mapped until the slot is deleted or the VM is dropped.
    ///
    /// # Errors
    /// The kernel refused the call.
    unsafe fn set_memory_slot(&self, slot: kvm_userspace_memory_region) -> Result<()>;

    /// Makes the in-kernel PICs, IOAPIC and local APICs. After the memory slots, before vCPUs.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn create_irqchip(&self) -> Result<()>;

    /// Makes the in-kernel timer (PIT) with the speaker port.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn create_pit(&self) -> Result<()>;

    /// Where Intel hosts keep the TSS and identity map of a guest in real mode.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn set_tss_address(&self, gpa: u64) -> Result<()>;

    /// Raises `gsi` each time `event` is signalled.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()>;

    /// Signals `event` when the guest writes the 32-bit `value` to `gpa`, without an exit.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn register_ioeventfd(&self, event: &EventFd, gpa: u64, value: u32) -> Result<()>;

    /// State of interrupt controllers, timer and clock. No vCPU runs.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn save(&self) -> Result<VmState>;

    /// Puts that state back into a VM that has these parts. The clock goes on from where it was.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn restore(&self, state: &VmState) -> Result<()>;

    /// Makes vCPU `id`, whose APIC id it is.
    ///
    /// # Errors
    /// The kernel refused the call.
    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>>;
}

/// A virtual CPU. Its methods must be called from one thread at a time.
pub trait Vcpu: Send {
    /// Sets what CPUID says.
    ///
    /// # Errors
    /// The kernel refused the call; the same holds for all setters.
    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<()>;
    /// What CPUID says, which may be more than was set: some of it cannot be kept from a guest.
    #[allow(missing_docs)]
    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>>;
    /// Sets model-specific registers; all of them or an error that names the first refused.
    #[allow(missing_docs)]
    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<()>;
    /// Model-specific registers by their numbers; all of them or an error that names the first that
    /// there is not.
    #[allow(missing_docs)]
    fn msrs(&self, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>>;
    /// Sets general registers.
    #[allow(missing_docs)]
    fn set_regs(&self, regs: &kvm_regs) -> Result<()>;
    /// General registers, for messages about a vCPU that failed.
    #[allow(missing_docs)]
    fn regs(&self) -> Result<kvm_regs>;
    /// Sets segment and control registers.
    #[allow(missing_docs)]
    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()>;
    /// Segment and control registers as KVM made them.
    #[allow(missing_docs)]
    fn sregs(&self) -> Result<kvm_sregs>;
    /// Sets floating-point state.
    #[allow(missing_docs)]
    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()>;
    /// State of the local APIC.
    #[allow(missing_docs)]
    fn lapic(&self) -> Result<kvm_lapic_state>;
    /// Sets state of the local APIC.
    #[allow(missing_docs)]
    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()>;

    /// The whole state, with those of the registers `msrs` that can be read and written. The vCPU is
    /// not in the guest, with nothing of an exit left to be completed.
    #[allow(missing_docs)]
    fn save(&self, msrs: &[u32]) -> Result<VcpuState>;
    /// Puts a state, but for what CPUID says, into a vCPU that is shown that and has never run.
    #[allow(missing_docs)]
    fn restore(&self, state: &VcpuState) -> Result<()>;

    /// Runs the guest until it needs something. The buffers of the exit are the guest's: what is
    /// filled in is delivered by the next call.
    ///
    /// # Errors
    /// `KVM_RUN` failed; interruption by a signal is an [`Exit::Interrupted`], not an error.
    fn run(&mut self) -> Result<Exit<'_>>;

    /// Address of the byte that, while it is not 0, makes [`Vcpu::run`] return
    /// [`Exit::Interrupted`] at once. Valid while the vCPU lives; any thread may store to it.
    fn immediate_exit(&mut self) -> *mut u8;
}

/// Why a vCPU came back.
#[derive(Debug)]
pub enum Exit<'a> {
    /// `in`: fill `data`, which holds one or more elements of `size` bytes.
    PortIn {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// Elements to be filled in.
        data: &'a mut [u8],
    },
    /// `out`: `data` holds one or more elements of `size` bytes.
    PortOut {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// Elements that were written.
        data: &'a [u8],
    },
    /// Read of guest-physical memory that no slot backs.
    MmioRead {
        /// Guest-physical address.
        gpa: u64,
        /// To be filled in, 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// Write of guest-physical memory that no slot backs.
    MmioWrite {
        /// Guest-physical address.
        gpa: u64,
        /// What was written, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// A signal or the immediate-exit byte.
    Interrupted,
    /// Triple fault (`KVM_EXIT_SHUTDOWN`, or a crash reported as a system event).
    Shutdown,
    /// The guest asked for a reset in the hypervisor's own way.
    Reset,
    /// The vCPU cannot go on.
    Failed(Failure),
}

/// Why a vCPU cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The processor refused to enter the guest, with its reason code.
    Entry(u64),
    /// KVM met something it cannot emulate.
    Internal {
        /// `KVM_INTERNAL_ERROR_*`: 1 is "emulation failed".
        suberror: u32,
        /// Bytes of the instruction that could not be emulated, as far as KVM gave them.
        instruction: Vec<u8>,
    },
    /// The guest touched memory that the host could not provide.
    Memory {
        /// Guest-physical address.
        gpa: u64,
    },
    /// An exit that nothing in this machine's set-up can cause.
    Unexpected(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Entry(reason) => write!(f, "the processor refused to enter it ({reason:#x})"),
            Failure::Internal { suberror: 1, instruction } if !instruction.is_empty() => {
                write!(f, "KVM cannot emulate the instruction")?;
                instruction.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
            }
            Failure::Internal { suberror: 1, .. } => {
                write!(f, "KVM cannot emulate one of its instructions")
            }
            Failure::Internal { suberror, .. } => write!(f, "KVM internal error {suberror}"),
            Failure::Memory { gpa } => write!(f, "the host has no memory for address {gpa:#x}"),
            Failure::Unexpected(what) => write!(f, "unexpected exit: {what}"),
        }
    }
}
