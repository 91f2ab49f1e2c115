//! A machine with one vCPU and memory that is one mapping: what booting and going on have in common.

use crate::Result;
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

/// RAM ends here, and goes on at 4 GiB.
const HOLE_START: u64 = 3 << 30;
const HOLE_END: u64 = 4 << 30;
/// Where KVM keeps the TSS it needs on Intel processors without unrestricted guests.
const KVM_TSS: usize = 0xfffb_d000;

/// Guest memory: one mapping, never unmapped.
pub struct Memory {
    host: *mut u8,
    length: usize,
}

impl Memory {
    /// Memory of no file, of `length` bytes.
    pub fn new(length: usize) -> Result<Self> {
        Memory::map(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    }

    /// A file as memory, all of it. The guest writes to the file with `libc::MAP_SHARED`, and to
    /// copies of its pages with `libc::MAP_PRIVATE`.
    pub fn of_file(file: &File, sharing: libc::c_int) -> Result<Self> {
        let length = usize::try_from(file.metadata()?.len())?;
        Memory::map(length, sharing | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    fn map(length: usize, flags: libc::c_int, file: libc::c_int) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping of the kernel's choosing.
        let host = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, file, 0) };
        if host == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(Memory { host: host.cast(), length })
    }

    /// Puts a file of this length in its place, whose pages the guest writes to copies of.
    pub fn replace(&self, file: &File) -> Result<()> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (host, file) = (self.host.cast(), file.as_raw_fd());
        // SAFETY: all of a mapping of this process, to which nobody has a reference.
        match unsafe { libc::mmap(host, self.length, protection, flags, file, 0) } {
            libc::MAP_FAILED => Err(std::io::Error::last_os_error().into()),
            _ => Ok(()),
        }
    }

    /// Guest memory before the guest runs, so before anyone else writes to it.
    pub fn slice(&mut self, address: u64, length: usize) -> Result<&mut [u8]> {
        let end = usize::try_from(address)?.checked_add(length).ok_or("address overflow")?;
        if end > self.length {
            return Err(format!("{address:#x} is outside of memory").into());
        }
        // SAFETY: inside the mapping, which no one else uses while `self` is borrowed.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.host.add(address as usize), length) })
    }

    /// Writes to memory below the hole.
    pub fn put(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        self.slice(address, bytes.len())?.copy_from_slice(bytes);
        Ok(())
    }

    /// Where the guest has it: addresses and lengths, around the hole for devices.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let low = HOLE_START.min(self.length as u64);
        let ranges = [(0, low), (HOLE_END, self.length as u64 - low)];
        ranges.into_iter().filter(|(_, length)| *length > 0).collect()
    }
}

/// A VM with irqchip, PIT and one vCPU. Its memory has to stay mapped.
pub struct Machine {
    pub vm: VmFd,
    pub vcpu: VcpuFd,
}

impl Machine {
    /// Gives a new VM all that it has.
    pub fn new(vm: VmFd, memory: &Memory) -> Result<Self> {
        // Slots first: KVM takes milliseconds for one once there is a vCPU.
        let mut userspace_addr = memory.host as u64;
        for (slot, (guest_phys_addr, memory_size)) in (0..).zip(memory.ranges()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the mapping stays until the process ends.
            unsafe { vm.set_user_memory_region(region)? };
            userspace_addr += memory_size;
        }
        vm.set_tss_address(KVM_TSS)?;
        vm.create_irq_chip()?;
        vm.create_pit2(kvm_pit_config { flags: 1, ..Default::default() })?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Machine { vm, vcpu })
    }

    /// Runs the guest to its next write to a port, and returns what it wrote.
    pub fn written(&mut self) -> Result<&[u8]> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(_, data) => Ok(data),
            exit => Err(format!("the payload did not write but ended with {exit:?}").into()),
        }
    }
}

/// Passes on what a guest wrote.
pub fn pass_on(bytes: &[u8]) -> Result<()> {
    let mut output = std::io::stdout();
    output.write_all(bytes)?;
    output.flush()?;
    Ok(())
}
