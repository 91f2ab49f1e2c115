//! From nothing to the first port write of a payload, by the 64-bit Linux boot protocol.

use crate::Result;
use crate::machine::{Machine, Memory, pass_on};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::Kvm;
use std::fs::File;
use std::os::unix::fs::FileExt;

const BOOT_PARAMS: u64 = 0x7000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x20000;

fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<u64> {
    let mut value = [0; 8];
    value[..N].copy_from_slice(bytes.get(at..at + N).ok_or("ELF file is too short")?);
    Ok(u64::from_le_bytes(value))
}

/// Copies the loadable segments and returns the entry point.
fn load_elf(memory: &mut Memory, path: &str) -> Result<u64> {
    let file = File::open(path).map_err(|error| format!("{path}: {error}"))?;
    let mut header = [0; 64 + 16 * 56];
    file.read_at(&mut header, 0)?;
    for index in 0..number::<2>(&header, 56)? as usize {
        let at = number::<8>(&header, 32)? as usize + index * 56;
        const PT_LOAD: u64 = 1;
        if number::<4>(&header, at)? == PT_LOAD {
            let (offset, address) = (number::<8>(&header, at + 8)?, number::<8>(&header, at + 24)?);
            let length = number::<8>(&header, at + 32)? as usize;
            file.read_exact_at(memory.slice(address, length)?, offset)?;
        }
    }
    number::<8>(&header, 24)
}

/// Zero page with a command line and a memory map of low memory and the rest.
fn write_boot_params(memory: &mut Memory, command_line: &str) -> Result<()> {
    memory.put(COMMAND_LINE, command_line.as_bytes())?;
    memory.put(BOOT_PARAMS + 0x228, &(COMMAND_LINE as u32).to_le_bytes())?;
    let mut ranges = memory.ranges();
    let low = ranges.remove(0).1;
    ranges.splice(0..0, [(0, 0x9fc00), (0x10_0000, low - 0x10_0000)]);
    memory.put(BOOT_PARAMS + 0x1e8, &[ranges.len() as u8])?;
    for (index, (start, length)) in ranges.into_iter().enumerate() {
        let at = BOOT_PARAMS + 0x2d0 + 20 * index as u64;
        memory.put(at, &u64::to_le_bytes(start))?;
        memory.put(at + 8, &u64::to_le_bytes(length))?;
        memory.put(at + 16, &u32::to_le_bytes(1))?;
    }
    Ok(())
}

/// Identity map of the first GiB in pages of 2 MiB.
fn write_page_tables(memory: &mut Memory) -> Result<()> {
    memory.put(PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes())?;
    memory.put(PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2003).to_le_bytes())?;
    for entry in 0..512 {
        memory.put(PAGE_TABLES + 0x2000 + entry * 8, &((entry << 21) + 0x83).to_le_bytes())?;
    }
    Ok(())
}

/// Makes a machine whose next instruction is the payload's first.
pub fn machine(
    kvm: &Kvm,
    memory: &mut Memory,
    payload: &str,
    command_line: &str,
) -> Result<Machine> {
    let vm = kvm.create_vm()?;
    let entry = load_elf(memory, payload)?;
    write_boot_params(memory, command_line)?;
    write_page_tables(memory)?;
    let machine = Machine::new(vm, memory)?;
    let vcpu = &machine.vcpu;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let flat = |selector, type_, db, l| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x10, 11, 0, 1);
    sregs.ds = flat(0x18, 3, 1, 0);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.cr0 = 0x8000_0031;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: BOOT_PARAMS,
        rsp: BOOT_PARAMS,
        rflags: 2,
        ..Default::default()
    })?;
    Ok(machine)
}

/// Makes the machine, runs it to its first port write, passes that byte on to stdout.
pub fn run(payload: &str, mib: &str, command_line: &str) -> Result<()> {
    let kvm = Kvm::new()?;
    let mut memory = Memory::new(mib.parse::<usize>()? << 20)?;
    let mut machine = machine(&kvm, &mut memory, payload, command_line)?;
    pass_on(machine.written()?)
}
