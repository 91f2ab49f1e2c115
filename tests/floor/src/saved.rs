//! A machine that was saved: its memory is one file, its state another. The payload itself is saved
//! by the floor, at the end of the first line that it prints.

use crate::Result;
use crate::boot;
use crate::machine::{Machine, Memory, pass_on};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Kvm;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What the guest prints when it is to be saved.
const SIGN: &[u8] = b"\n";
/// The files.
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// What there is once, in the order in which it is set: what stands behind may depend on what stands in
/// front. Lists follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct State {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    cpuid: u32,
    msrs: u64,
}

/// Boots the payload in a memory of `mib` MiB that is a file in `folder`, runs it to the end of its
/// first line, and writes the state beside it.
pub fn save(payload: &str, mib: &str, command_line: &str, folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let kvm = Kvm::new()?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(folder.join(MEMORY))?;
    file.set_len(mib.parse::<u64>()? << 20)?;
    let mut memory = Memory::of_file(&file, libc::MAP_SHARED)?;
    let mut machine = boot::machine(&kvm, &mut memory, payload, command_line)?;
    while machine.written()? != SIGN {}
    // The instruction that wrote is over only when the vCPU is entered again, which it need not go
    // through with.
    machine.vcpu.set_kvm_immediate_exit(1);
    match machine.vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => {}
        other => return Err(format!("the vCPU was to leave at once, not {other:?}").into()),
    }
    std::fs::write(folder.join(STATE), state(&kvm, &machine)?)?;
    Ok(())
}

fn state(kvm: &Kvm, Machine { vm, vcpu }: &Machine) -> Result<Vec<u8>> {
    let chip = |chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map(|()| chip)
    };
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?;
    let msrs = msrs(kvm, vcpu)?;
    let state = State {
        mp_state: vcpu.get_mp_state()?,
        irqchips: [chip(0)?, chip(1)?, chip(2)?],
        pit: vm.get_pit2()?,
        // The value alone: what KVM says of the host's clocks at that time does not hold later.
        clock: kvm_clock_data { clock: vm.get_clock()?.clock, ..Default::default() },
        regs: vcpu.get_regs()?,
        sregs: vcpu.get_sregs()?,
        xsave: vcpu.get_xsave()?,
        xcrs: vcpu.get_xcrs()?,
        debug: vcpu.get_debug_regs()?,
        lapic: vcpu.get_lapic()?,
        events: vcpu.get_vcpu_events()?,
        cpuid: cpuid.as_slice().len() as u32,
        msrs: msrs.len() as u64,
    };
    let lists = [cpuid.as_slice().as_bytes(), msrs.as_bytes()];
    Ok([state.as_bytes()].into_iter().chain(lists).flatten().copied().collect())
}

/// The registers that can be read and written back, each asked for alone: what KVM lists is not all
/// there on each host.
fn msrs(kvm: &Kvm, vcpu: &kvm_ioctls::VcpuFd) -> Result<Vec<kvm_msr_entry>> {
    let mut all = Vec::new();
    for index in kvm.get_msr_index_list()?.as_slice() {
        let mut one = Msrs::from_entries(&[kvm_msr_entry { index: *index, ..Default::default() }])?;
        if vcpu.get_msrs(&mut one)? == 1 && vcpu.set_msrs(&one)? == 1 {
            all.extend_from_slice(one.as_slice());
        }
    }
    Ok(all)
}

/// Makes a machine that goes on from the files in `folder`, passes its first byte on to stdout, and
/// has it run on until the process is killed: so does a monitor, and ending would be part of what is
/// measured.
pub fn restore(folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let bytes = std::fs::read(folder.join(STATE))?;
    let memory = Memory::of_file(&File::open(folder.join(MEMORY))?, libc::MAP_PRIVATE)?;
    let mut machine = Machine::new(vm, &memory)?;
    set(&machine, &bytes)?;
    pass_on(machine.written()?)?;
    loop {
        machine.written()?;
    }
}

/// As [`restore`], by a process that has all but memory and state when it is told on stdin to go on; it says so
/// with a byte.
pub fn adopt(folder: &str) -> Result<()> {
    let folder = Path::new(folder);
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let file = File::open(folder.join(MEMORY))?;
    let memory = Memory::new(usize::try_from(file.metadata()?.len())?)?;
    let mut machine = Machine::new(vm, &memory)?;
    pass_on(b".")?;
    std::io::stdin().read_exact(&mut [0])?;
    memory.replace(&file)?;
    set(&machine, &std::fs::read(folder.join(STATE))?)?;
    pass_on(machine.written()?)?;
    loop {
        machine.written()?;
    }
}

fn set(Machine { vm, vcpu }: &Machine, bytes: &[u8]) -> Result<()> {
    let short = "the state is too short";
    let (state, rest) = State::read_from_prefix(bytes).map_err(|_| short)?;
    let (cpuid, rest) =
        <[kvm_cpuid_entry2]>::ref_from_prefix_with_elems(rest, state.cpuid as usize)
            .map_err(|_| short)?;
    let (msrs, _) = <[kvm_msr_entry]>::ref_from_prefix_with_elems(rest, state.msrs as usize)
        .map_err(|_| short)?;
    for chip in &state.irqchips {
        vm.set_irqchip(chip)?;
    }
    vm.set_pit2(&state.pit)?;
    vm.set_clock(&state.clock)?;
    vcpu.set_cpuid2(&CpuId::from_entries(cpuid)?)?;
    vcpu.set_mp_state(state.mp_state)?;
    vcpu.set_regs(&state.regs)?;
    vcpu.set_sregs(&state.sregs)?;
    // SAFETY: a vCPU that has no permission for more has states of this size.
    unsafe { vcpu.set_xsave(&state.xsave)? };
    vcpu.set_xcrs(&state.xcrs)?;
    vcpu.set_debug_regs(&state.debug)?;
    vcpu.set_lapic(&state.lapic)?;
    if vcpu.set_msrs(&Msrs::from_entries(msrs)?)? != msrs.len() {
        return Err("a register was refused".into());
    }
    vcpu.set_vcpu_events(&state.events)?;
    Ok(())
}
