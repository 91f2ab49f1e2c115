//! The hypervisor trait over Linux KVM.

use std::io;
use std::path::Path;

use arch::template::KvmCapability;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_fpu, kvm_irqchip,
    kvm_lapic_state, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_run, kvm_sregs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::errno::Error as Errno;
use vmm_sys_util::eventfd::EventFd;

use super::state::{TSC, VcpuState, VmState};
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

    fn msr_numbers(&self) -> Result<Vec<u32>> {
        let list = self.fd.get_msr_index_list();
        let list = list.map_err(|err| failed("KVM_GET_MSR_INDEX_LIST", err))?;
        Ok(list.as_slice().to_vec())
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

    fn save(&self) -> Result<VmState> {
        let chip = |chip_id| {
            let mut chip = Box::new(kvm_irqchip { chip_id, ..Default::default() });
            let got = self.fd.get_irqchip(&mut chip);
            got.map(|()| chip).map_err(|err| failed("KVM_GET_IRQCHIP", err))
        };
        Ok(VmState {
            irqchips: [
                chip(KVM_IRQCHIP_PIC_MASTER)?,
                chip(KVM_IRQCHIP_PIC_SLAVE)?,
                chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            pit: self.fd.get_pit2().map_err(|err| failed("KVM_GET_PIT2", err))?,
            clock: self.fd.get_clock().map_err(|err| failed("KVM_GET_CLOCK", err))?,
        })
    }

    fn restore(&self, state: &VmState) -> Result<()> {
        for chip in &state.irqchips {
            self.fd.set_irqchip(chip).map_err(|err| failed("KVM_SET_IRQCHIP", err))?;
        }
        self.fd.set_pit2(&state.pit).map_err(|err| failed("KVM_SET_PIT2", err))?;
        // The value alone: what KVM says of the host's clocks at that time does not hold here.
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        self.fd.set_clock(&clock).map_err(|err| failed("KVM_SET_CLOCK", err))
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
    fn set_cpuid(&self, entries: &[kvm_cpuid_entry2]) -> Result<()> {
        let cpuid = CpuId::from_entries(entries);
        let cpuid = &cpuid.map_err(|_| failed("KVM_SET_CPUID2", Errno::new(libc::E2BIG)))?;
        self.fd.set_cpuid2(cpuid).map_err(|err| failed("KVM_SET_CPUID2", err))
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>> {
        let cpuid = self.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        Ok(cpuid.map_err(|err| failed("KVM_GET_CPUID2", err))?.as_slice().to_vec())
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

    fn save(&self, msrs: &[u32]) -> Result<VcpuState> {
        let fd = &self.fd;
        // First: an INIT or start-up interrupt that waits is taken by this call.
        let mp_state = fd.get_mp_state().map_err(|err| failed("KVM_GET_MP_STATE", err))?;
        Ok(VcpuState {
            mp_state,
            tsc_khz: fd.get_tsc_khz().map_err(|err| failed("KVM_GET_TSC_KHZ", err))?,
            regs: self.regs()?,
            sregs: self.sregs()?,
            xsave: Box::new(fd.get_xsave().map_err(|err| failed("KVM_GET_XSAVE", err))?),
            xcrs: fd.get_xcrs().map_err(|err| failed("KVM_GET_XCRS", err))?,
            debug: fd.get_debug_regs().map_err(|err| failed("KVM_GET_DEBUGREGS", err))?,
            lapic: Box::new(self.lapic()?),
            msrs: self.state_msrs(msrs)?,
            events: fd.get_vcpu_events().map_err(|err| failed("KVM_GET_VCPU_EVENTS", err))?,
            cpuid: self.cpuid()?,
        })
    }

    fn restore(&self, state: &VcpuState) -> Result<()> {
        let fd = &self.fd;
        let khz = fd.get_tsc_khz().map_err(|err| failed("KVM_GET_TSC_KHZ", err))?;
        if !same_frequency(khz, state.tsc_khz) {
            let detail = || format!("{} kHz, this host has {khz}", state.tsc_khz);
            fd.set_tsc_khz(state.tsc_khz)
                .map_err(|err| failed_with("KVM_SET_TSC_KHZ", detail(), err.into()))?;
        }
        fd.set_mp_state(state.mp_state).map_err(|err| failed("KVM_SET_MP_STATE", err))?;
        self.set_regs(&state.regs)?;
        self.set_sregs(&state.sregs)?;
        // SAFETY: a vCPU that has no permission for more has states of this size.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(|err| failed("KVM_SET_XSAVE", err))?;
        fd.set_xcrs(&state.xcrs).map_err(|err| failed("KVM_SET_XCRS", err))?;
        fd.set_debug_regs(&state.debug).map_err(|err| failed("KVM_SET_DEBUGREGS", err))?;
        self.set_lapic(&state.lapic)?;
        // The deadline is the APIC timer's, and in ticks of the TSC: behind both.
        let (deadline, others): (Vec<_>, Vec<_>) =
            state.msrs.iter().partition(|msr| msr.index == TSC_DEADLINE);
        self.set_msrs(&others)?;
        self.set_msrs(&deadline)?;
        fd.set_vcpu_events(&state.events).map_err(|err| failed("KVM_SET_VCPU_EVENTS", err))?;
        // The guest's watchdogs are told that it did not run. One without kvmclock cannot be.
        match fd.kvmclock_ctrl() {
            Err(err) if err.errno() != libc::EINVAL => Err(failed("KVM_KVMCLOCK_CTRL", err)),
            _ => Ok(()),
        }
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

impl KvmVcpu {
    /// Those of the registers `numbers` that can be read, and written back. What KVM lists is not all
    /// there on each host, and some of it says what the host is like.
    fn state_msrs(&self, numbers: &[u32]) -> Result<Vec<kvm_msr_entry>> {
        let unread: Vec<_> =
            numbers.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let read = each_that_goes("KVM_GET_MSRS", &unread, |list| self.fd.get_msrs(list))?;
        let (clocks, others): (Vec<_>, Vec<_>) =
            read.into_iter().partition(|msr| matches!(msr.index, TSC | TSC_DEADLINE));
        let mut state = each_that_goes("KVM_SET_MSRS", &others, |list| self.fd.set_msrs(list))?;
        // Writing these back would move them.
        state.extend(clocks);
        Ok(state)
    }
}

/// IA32_TSC_DEADLINE (Intel SDM volume 4).
const TSC_DEADLINE: u32 = 0x6e0;

/// Whether a guest may take one frequency of the TSC, in kHz, for the other: KVM measures the host's
/// anew at each boot. 250 parts in a million are what KVM and Linux correct (`tsc_tolerance_ppm`).
fn same_frequency(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(other) * 250
}

/// Has `call` read or write `msrs`, and returns those that it did not refuse.
fn each_that_goes(
    name: &'static str,
    msrs: &[kvm_msr_entry],
    call: impl Fn(&mut Msrs) -> std::result::Result<usize, Errno>,
) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::with_capacity(msrs.len());
    let mut rest = msrs;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(MAX_MSRS)];
        let mut list =
            Msrs::from_entries(part).map_err(|_| failed(name, Errno::new(libc::E2BIG)))?;
        let done = call(&mut list).map_err(|err| failed(name, err))?.min(part.len());
        all.extend_from_slice(&list.as_slice()[..done]);
        // The one after those was refused, if there is one.
        rest = &rest[part.len().min(done + 1)..];
    }
    Ok(all)
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
