//! The hypervisor trait over Linux KVM.

use std::io;
use std::path::Path;

use arch::template::KvmCapability;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KVM_SYSTEM_EVENT_CRASH,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_fpu, kvm_lapic_state,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Capabilities, Exit, Failure, Hypervisor, HypervisorError, Result, Vcpu, Vm as VmTrait,
};

/// Path of the KVM device.
pub const DEVICE: &str = "/dev/kvm";

/// API version that every kernel since 2.6.22 has, and the only one there is.
const API_VERSION: i32 = 12;

/// What a machine cannot do without.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

fn failed(call: &'static str, errno: Errno) -> HypervisorError {
    HypervisorError { call, detail: String::new(), source: io::Error::from(errno) }
}

fn failed_with(call: &'static str, detail: String, source: io::Error) -> HypervisorError {
    HypervisorError { call, detail: format!(" ({detail})"), source }
}

/// An open `/dev/kvm`.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens the KVM device at `path`, usually [`DEVICE`].
    ///
    /// # Errors
    /// The device is missing, not accessible, or not KVM.
    pub fn open(path: &Path) -> Result<Kvm> {
        let text = path.to_string_lossy().into_owned();
        let c_path = std::ffi::CString::new(text.as_bytes())
            .map_err(|err| failed_with("open", text.clone(), err.into()))?;
        let fd = kvm_ioctls::Kvm::new_with_path(c_path)
            .map_err(|err| failed_with("open", text.clone(), err.into()))?;
        match fd.get_api_version() {
            API_VERSION => Ok(Kvm { fd }),
            other => Err(failed_with(
                "KVM_GET_API_VERSION",
                format!("{text} says {other}, not {API_VERSION}"),
                io::Error::from_raw_os_error(libc::ENOTTY),
            )),
        }
    }
}

impl Hypervisor for Kvm {
    fn capabilities_with(&self, changes: &[KvmCapability]) -> Result<Capabilities> {
        let missing = |what: String| {
            let source = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            Err(failed_with("KVM_CHECK_EXTENSION", format!("{what} is missing"), source))
        };
        for (cap, name) in REQUIRED {
            let waived = changes.contains(&KvmCapability::NotNeeded(cap as u32));
            if !waived && !self.fd.check_extension(cap) {
                return missing(name.to_owned());
            }
        }
        for change in changes {
            if let &KvmCapability::Needed(number) = change
                && self.fd.check_extension_raw(libc::c_ulong::from(number)) <= 0
            {
                return missing(format!("capability {number}"));
            }
        }
        Ok(Capabilities {
            max_vcpus: self.fd.get_max_vcpus(),
            tsc_deadline_timer: self.fd.check_extension(Cap::TscDeadlineTimer),
            tsc_khz: None,
        })
    }

    fn supported_cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|err| failed("KVM_GET_SUPPORTED_CPUID", err))
    }

    fn create_vm(&self) -> Result<Box<dyn VmTrait>> {
        // A signal that arrives during creation makes it fail; KVM asks to simply try again.
        loop {
            match self.fd.create_vm() {
                Ok(fd) => return Ok(Box::new(KvmVm { fd })),
                Err(err) if err.errno() == libc::EINTR => {}
                Err(err) => return Err(failed("KVM_CREATE_VM", err)),
            }
        }
    }
}

struct KvmVm {
    fd: VmFd,
}

impl VmTrait for KvmVm {
    unsafe fn set_memory_slot(&self, slot: kvm_userspace_memory_region) -> Result<()> {
        // SAFETY: the caller vouches for the mapping behind the slot.
        unsafe { self.fd.set_user_memory_region(slot) }.map_err(|err| {
            failed_with(
                "KVM_SET_USER_MEMORY_REGION",
                format!(
                    "slot {}: {} bytes at {:#x}",
                    slot.slot, slot.memory_size, slot.guest_phys_addr
                ),
                err.into(),
            )
        })
    }

    fn create_irqchip(&self) -> Result<()> {
        self.fd.create_irq_chip().map_err(|err| failed("KVM_CREATE_IRQCHIP", err))
    }

    fn create_pit(&self) -> Result<()> {
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(config).map_err(|err| failed("KVM_CREATE_PIT2", err))
    }

    fn set_tss_address(&self, gpa: u64) -> Result<()> {
        let offset = usize::try_from(gpa)
            .map_err(|_| failed("KVM_SET_TSS_ADDR", Errno::new(libc::EINVAL)))?;
        self.fd.set_tss_address(offset).map_err(|err| failed("KVM_SET_TSS_ADDR", err))
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<()> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(|err| failed_with("KVM_IRQFD", format!("GSI {gsi}"), err.into()))
    }

    fn register_ioeventfd(&self, event: &EventFd, gpa: u64, value: u32) -> Result<()> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(gpa), value)
            .map_err(|err| failed_with("KVM_IOEVENTFD", format!("{value} at {gpa:#x}"), err.into()))
    }

    fn create_vcpu(&self, id: u8) -> Result<Box<dyn Vcpu>> {
        let fd = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(|err| failed_with("KVM_CREATE_VCPU", format!("vCPU {id}"), err.into()))?;
        Ok(Box::new(KvmVcpu { fd }))
    }
}

struct KvmVcpu {
    fd: VcpuFd,
}

impl Vcpu for KvmVcpu {
    fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid).map_err(|err| failed("KVM_SET_CPUID2", err))
    }

    fn set_msrs(&self, msrs: &[kvm_msr_entry]) -> Result<()> {
        each_list("KVM_SET_MSRS", msrs, |list| self.fd.set_msrs(list)).map(drop)
    }

    fn msrs(&self, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>> {
        let unread: Vec<_> =
            numbers.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        each_list("KVM_GET_MSRS", &unread, |list| self.fd.get_msrs(list))
    }

    fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd.set_regs(regs).map_err(|err| failed("KVM_SET_REGS", err))
    }

    fn regs(&self) -> Result<kvm_regs> {
        self.fd.get_regs().map_err(|err| failed("KVM_GET_REGS", err))
    }

    fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs).map_err(|err| failed("KVM_SET_SREGS", err))
    }

    fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(|err| failed("KVM_GET_SREGS", err))
    }

    fn set_fpu(&self, fpu: &kvm_fpu) -> Result<()> {
        self.fd.set_fpu(fpu).map_err(|err| failed("KVM_SET_FPU", err))
    }

    fn lapic(&self) -> Result<kvm_lapic_state> {
        self.fd.get_lapic().map_err(|err| failed("KVM_GET_LAPIC", err))
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd.set_lapic(lapic).map_err(|err| failed("KVM_SET_LAPIC", err))
    }

    fn run(&mut self) -> Result<Exit<'_>> {
        // Taken before the call: the exit that it returns borrows the vCPU.
        let run: *const kvm_run = self.fd.get_kvm_run();
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(err) if matches!(err.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(Exit::Interrupted);
            }
            Err(err) => return Err(failed("KVM_RUN", err)),
        };
        Ok(match exit {
            VcpuExit::IoIn(port, data) => Exit::PortIn { port, size: io_size(run), data },
            VcpuExit::IoOut(port, data) => Exit::PortOut { port, size: io_size(run), data },
            VcpuExit::MmioRead(gpa, data) => Exit::MmioRead { gpa, data },
            VcpuExit::MmioWrite(gpa, data) => Exit::MmioWrite { gpa, data },
            VcpuExit::Intr => Exit::Interrupted,
            VcpuExit::Shutdown => Exit::Shutdown,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Exit::Reset,
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN | KVM_SYSTEM_EVENT_CRASH, _) => {
                Exit::Shutdown
            }
            VcpuExit::FailEntry(reason, _) => Exit::Failed(Failure::Entry(reason)),
            VcpuExit::InternalError => Exit::Failed(internal_error(run)),
            VcpuExit::MemoryFault { gpa, .. } => Exit::Failed(Failure::Memory { gpa }),
            other => Exit::Failed(Failure::Unexpected(format!("{other:?}"))),
        })
    }

    fn immediate_exit(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }
}

/// Most registers that one call takes (`MAX_IO_MSRS` of arch/x86/kvm/x86.c).
const MAX_MSRS: usize = 256;

/// Has `call` read or write all of `msrs`, and returns them as it leaves them. It says how many it
/// took; the one after those was refused.
fn each_list(
    name: &'static str,
    msrs: &[kvm_msr_entry],
    call: impl Fn(&mut Msrs) -> std::result::Result<usize, Errno>,
) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(msrs.len());
    for part in msrs.chunks(MAX_MSRS) {
        let mut list =
            Msrs::from_entries(part).map_err(|_| failed(name, Errno::new(libc::E2BIG)))?;
        let done = call(&mut list).map_err(|err| failed(name, err))?;
        if let Some(refused) = part.get(done) {
            let detail = format!("MSR {:#x} refused", refused.index);
            return Err(failed_with(name, detail, io::Error::from_raw_os_error(libc::EINVAL)));
        }
        all.extend_from_slice(list.as_slice());
    }
    Ok(all)
}

/// Bytes of one access of the port exit that `run` describes.
fn io_size(run: *const kvm_run) -> u8 {
    // SAFETY: `run` is the vCPU's mapped kvm_run, which the kernel filled in before returning; the
    // exit reason says that the union holds `io`. Only the header is read, which no borrow covers.
    let size = unsafe { (*run).__bindgen_anon_1.io.size };
    size.max(1)
}

/// What KVM says about an internal error.
fn internal_error(run: *const kvm_run) -> Failure {
    // SAFETY: as in `io_size`, for the exit KVM_EXIT_INTERNAL_ERROR.
    let internal = unsafe { (*run).__bindgen_anon_1.internal };
    // With ndata >= 3, data[0] is a set of flags, of which bit 0 says that data[1] starts with a
    // length byte and up to 15 instruction bytes (struct kvm_run, emulation_failure).
    let mut instruction = Vec::new();
    if internal.ndata >= 3 && internal.data[0] & 1 != 0 {
        let bytes: Vec<u8> = internal.data[1..3].iter().flat_map(|w| w.to_le_bytes()).collect();
        let len = usize::from(bytes[0]).min(15);
        instruction.extend_from_slice(&bytes[1..=len]);
    }
    Failure::Internal { suberror: internal.suberror, instruction }
}
