//! Makes a thread of another process do a system call, as an attacker would who has taken it over.

use std::io;
use std::ptr;

/// What `syscall` is in machine code.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// What became of the call.
#[derive(Debug, PartialEq, Eq)]
pub enum Trespass {
    /// The thread got this signal in place of a result; it goes on with that.
    Signal(i32),
    /// The call returned this; the thread goes on with what it did before.
    Returned(i64),
}

/// A thread that this one traces. Let go when dropped.
struct Traced {
    thread: libc::pid_t,
}

impl Traced {
    fn seize(thread: libc::pid_t) -> io::Result<Traced> {
        // SAFETY: no memory arguments.
        unsafe {
            let options = libc::PTRACE_O_TRACESYSGOOD as usize;
            request(libc::PTRACE_SEIZE, thread, ptr::null_mut(), options)
        }?;
        Ok(Traced { thread })
    }

    /// Waits until it stops, and returns its signal and event.
    fn stop(&self) -> io::Result<(i32, i32)> {
        let mut status = 0;
        // SAFETY: waitpid fills the number.
        let waited = unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) };
        if waited < 0 {
            return Err(io::Error::last_os_error());
        }
        if !libc::WIFSTOPPED(status) {
            return Err(io::Error::other(format!("the thread ended: status {status:#x}")));
        }
        Ok((libc::WSTOPSIG(status), status >> 16))
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: PTRACE_GETREGS fills the structure, which is plain data.
        unsafe {
            let mut registers: libc::user_regs_struct = std::mem::zeroed();
            let to = &raw mut registers as usize;
            request(libc::PTRACE_GETREGS, self.thread, ptr::null_mut(), to)?;
            Ok(registers)
        }
    }

    fn set_registers(&self, registers: &libc::user_regs_struct) -> io::Result<()> {
        let from = ptr::from_ref(registers) as usize;
        // SAFETY: PTRACE_SETREGS reads one structure.
        unsafe { request(libc::PTRACE_SETREGS, self.thread, ptr::null_mut(), from) }.map(drop)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // It may have ended.
        // SAFETY: no memory arguments.
        let _ = unsafe { request(libc::PTRACE_DETACH, self.thread, ptr::null_mut(), 0) };
    }
}

/// # Safety
/// As ptrace(2) has it of `address` and `data`.
unsafe fn request(
    request: libc::c_uint,
    thread: libc::pid_t,
    address: *mut libc::c_void,
    data: usize,
) -> io::Result<i64> {
    // SAFETY: the caller's.
    match unsafe { libc::ptrace(request, thread, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// Makes `thread`, which has to be waiting in a system call or to come to wait in one, do the call
/// `number` without arguments.
///
/// # Errors
/// The thread cannot be traced, or is not where a call can be slipped in.
pub fn trespass(thread: libc::pid_t, number: libc::c_long) -> io::Result<Trespass> {
    let traced = Traced::seize(thread)?;
    // SAFETY: no memory arguments.
    unsafe { request(libc::PTRACE_INTERRUPT, thread, ptr::null_mut(), 0) }?;
    loop {
        let (signal, event) = traced.stop()?;
        if event == libc::PTRACE_EVENT_STOP {
            break;
        }
        // One of its own, which it gets.
        // SAFETY: no memory arguments.
        unsafe { request(libc::PTRACE_CONT, thread, ptr::null_mut(), signal as usize) }?;
    }
    let before = traced.registers()?;
    let place = before.rip.wrapping_sub(SYSCALL.len() as u64);
    // SAFETY: PTRACE_PEEKTEXT reads the other process, whatever the address.
    let word = unsafe { request(libc::PTRACE_PEEKTEXT, thread, place as *mut _, 0) }?;
    if word.to_le_bytes()[..SYSCALL.len()] != SYSCALL {
        return Err(io::Error::other("the thread does not wait in a system call"));
    }
    let mut registers = before;
    registers.rip = place;
    registers.rax = number as u64;
    // There is no call to be taken up again.
    registers.orig_rax = u64::MAX;
    traced.set_registers(&registers)?;
    // Into the call, and out of it.
    for _ in 0..2 {
        // SAFETY: no memory arguments.
        unsafe { request(libc::PTRACE_SYSCALL, thread, ptr::null_mut(), 0) }?;
        let (signal, _) = traced.stop()?;
        if signal != libc::SIGTRAP | 0x80 {
            return Err(io::Error::other(format!("a stop by signal {signal} instead of a call")));
        }
    }
    if is_pending(thread, libc::SIGSYS)? {
        return Ok(Trespass::Signal(libc::SIGSYS));
    }
    let result = traced.registers()?.rax as i64;
    traced.set_registers(&before)?;
    Ok(Trespass::Returned(result))
}

/// True if `signal` waits for `thread`.
fn is_pending(thread: libc::pid_t, signal: i32) -> io::Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    let set = pending.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    match set {
        Some(set) => Ok(set >> (signal - 1) & 1 == 1),
        None => Err(io::Error::other("no SigPnd in the thread's status")),
    }
}
