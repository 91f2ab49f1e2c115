//! Holds one idle virtual machine for as long as the lab runs.
//!
//! KVM patches its own code when the first vCPU whose APIC is still off appears and when the last
//! one goes (the static keys `apic_sw_disabled` and `preempt_notifier_key`), that is, at every start
//! of a guest. QEMU before 8.1 may translate such an instruction while the other CPU patches it,
//! keep the stale breakpoint for ever and hang both CPUs: once in some forty starts, when two
//! guests start side by side. With a machine whose vCPU never runs nothing is patched.
//!
//! Built by tests/lab/lab with rustc alone; needs nothing but std.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::thread;

// linux/kvm.h: _IO(0xAE, …)
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_CREATE_IRQCHIP: u64 = 0xae60;

unsafe extern "C" {
    fn ioctl(fd: i32, request: u64, argument: u64) -> i32;
}

/// An ioctl of KVM that takes a number.
fn kvm(file: &File, request: u64) -> io::Result<i32> {
    // SAFETY: these requests read their argument as a number and write to no memory of ours.
    match unsafe { ioctl(file.as_raw_fd(), request, 0) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn main() -> io::Result<()> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: KVM made the descriptor, and nobody else has it.
    let machine = unsafe { File::from_raw_fd(kvm(&device, KVM_CREATE_VM)?) };
    kvm(&machine, KVM_CREATE_IRQCHIP)?;
    // Open until the process ends.
    kvm(&machine, KVM_CREATE_VCPU)?;
    println!("ready");
    loop {
        thread::park();
    }
}
