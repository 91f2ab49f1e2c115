//! A decorator that makes one chosen hypervisor call fail, to test that a machine which cannot be
//! made leaves nothing behind.
//!
//! Calls are counted across the whole machine. With `fail_at = n` the `n`th call (from 0) returns
//! `EIO`; the caller raises `n` until a run passes without the fault being reached.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arch::template::KvmCapability;
use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use vmm_sys_util::eventfd::EventFd;

use super::state::{VcpuState, VmState};
use super::{Capabilities, Exit, Hypervisor, HypervisorError, Result, Vcpu, Vm};

/// Counts calls and says which one fails.
#[derive(Debug)]
pub struct Plan {
    calls: AtomicUsize,
    fail_at: usize,
}

impl Plan {
    /// The `fail_at`th call from now fails, counted from 0.
    pub fn new(fail_at: usize) -> Arc<Plan> {
        Arc::new(Plan { calls: AtomicUsize::new(0), fail_at })
    }

    /// True once the call that was to fail has failed.
    pub fn reached(&self) -> bool {
        self.calls.load(Ordering::SeqCst) > self.fail_at
    }

    fn step(&self, call: &'static str) -> Result<()> {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.fail_at {
            return Err(HypervisorError {
                call,
                detail: " (injected)".to_owned(),
                source: io::Error::from_raw_os_error(libc::EIO),
            });
        }
        Ok(())
    }
}

/// Any hypervisor, with one call that fails.
pub struct Faulty<H> {
    inner: H,
    plan: Arc<Plan>,
}

impl<H: Hypervisor> Faulty<H> {
    /// Decorates `inner`.
    pub fn new(inner: H, plan: Arc<Plan>) -> Faulty<H> {
        Faulty { inner, plan }
    }
}

impl<H: Hypervisor> Hypervisor for Faulty<H> {
    fn capabilities_with(&self, changes: &[KvmCapability]) -> Result<Capabilities> {
        self.plan.step("KVM_CHECK_EXTENSION")?;
        self.inner.capabilities_with(changes)
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.plan.step("KVM_GET_SUPPORTED_CPUID")?;
        self.inner.supported_cpuid()
    }

    fn msr_numbers(&self) -> Result<Vec<u32>> {
        self.plan.step("KVM_GET_MSR_INDEX_LIST")?;
        self.inner.msr_numbers()
    }

    fn create_vm(&self) -> Result<Box<dyn Vm>> {
        self.plan.step("KVM_CREATE_VM")?;
        let inner = self.inner.create_vm()?;
        Ok(Box::new(FaultyVm { inner, plan: Arc::clone(&self.plan) }))
    }
}

struct FaultyVm {
    inner: Box<dyn Vm>,
    plan: Arc<Plan>,
}

impl Vm for FaultyVm {
    unsafe fn set_memory_slot(&self, slot: kvm_userspace_memory_region) -> Result<()> {
        self.plan.step("KVM_SET_USER_MEMORY_REGION")?;
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.set_memory_slot(slot) }
    }

    fn create_irqchip(&self) -> Result<()> {
        self.plan.step("KVM_CREATE_IRQCHIP")?;
        self.inner.create_irqchip()
    }

    fn create_pit(&self) -> Result<()> {
        self.plan.step("KVM_CREATE_PIT2")?;
        self.inner.create_pit()
    }

    fn set_tss_address(&self, gpa: u64) -> Result<()> {
        self.plan.step("KVM_SET_TSS_ADDR")?;
        self.inner.set_tss_address(gpa)
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.plan.step("KVM_IRQFD")?;
        self.inner.register_irqfd(event, gsi)
    }

    fn register_ioeventfd(&self, event: &EventFd, gpa: u64, value: u32) -> Result<()> {
        self.plan.step("KVM_IOEVENTFD")?;
        self.inner.register_ioeventfd(event, gpa, value)
    }

    fn save(&self) -> Result<VmState> {
        self.plan.step("KVM_GET_IRQCHIP")?;
        self.inner.save()
    }

    fn restore(&self, state: &VmState) -> Result<()> {
        self.plan.step("KVM_SET_IRQCHIP")?;
        self.inner.restore(state)
    }

    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>> {
        self.plan.step("KVM_CREATE_VCPU")?;
        let inner = self.inner.create_vcpu(id)?;
        Ok(Box::new(FaultyVcpu { inner, plan: Arc::clone(&self.plan) }))
    }
}

struct FaultyVcpu {
    inner: Box<dyn Vcpu>,
    plan: Arc<Plan>,
}

impl Vcpu for FaultyVcpu {
    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        self.plan.step("KVM_SET_CPUID2")?;
        self.inner.set_cpuid(entries)
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        self.plan.step("KVM_GET_CPUID2")?;
        self.inner.cpuid()
    }

    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<()> {
        self.plan.step("KVM_SET_MSRS")?;
        self.inner.set_msrs(msrs)
    }

    fn msrs(&self, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>> {
        self.plan.step("KVM_GET_MSRS")?;
        self.inner.msrs(numbers)
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.plan.step("KVM_SET_REGS")?;
        self.inner.set_regs(regs)
    }

    fn regs(&self) -> Result<kvm_regs> {
        self.plan.step("KVM_GET_REGS")?;
        self.inner.regs()
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.plan.step("KVM_SET_SREGS")?;
        self.inner.set_sregs(sregs)
    }

    fn sregs(&self) -> Result<kvm_sregs> {
        self.plan.step("KVM_GET_SREGS")?;
        self.inner.sregs()
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.plan.step("KVM_SET_FPU")?;
        self.inner.set_fpu(fpu)
    }

    fn lapic(&self) -> Result<kvm_lapic_state> {
        self.plan.step("KVM_GET_LAPIC")?;
        self.inner.lapic()
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.plan.step("KVM_SET_LAPIC")?;
        self.inner.set_lapic(lapic)
    }

    fn save(&self, msrs: &[u32]) -> Result<VcpuState> {
        self.plan.step("KVM_GET_MP_STATE")?;
        self.inner.save(msrs)
    }

    fn restore(&self, state: &VcpuState) -> Result<()> {
        self.plan.step("KVM_SET_MP_STATE")?;
        self.inner.restore(state)
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        self.plan.step("KVM_RUN")?;
        self.inner.run()
    }

    fn immediate_exit(&mut self) -> *mut u8 {
        self.inner.immediate_exit()
    }
}
