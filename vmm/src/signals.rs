//! The signals of the process, as events of the control loop.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::kernel::lease_break_signal;

/// What a signal means to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// End the machine; the signal's number.
    End(i32),
    /// The terminal has another size.
    WindowChanged,
    /// Somebody wants to write the kernel file that is mapped into the guest.
    LeaseBreak,
}

/// The blocked signals of a process and the descriptor that they arrive at.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks the signals for the calling thread and all that it starts from now on. To be called
    /// before there are other threads.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn block() -> io::Result<Signals> {
        let numbers =
            [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGWINCH, lease_break_signal()];
        // SAFETY: the set is initialised by sigemptyset before it is used; signalfd returns a new
        // descriptor that nobody else owns.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for number in numbers {
                libc::sigaddset(&mut set, number);
            }
            match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
                0 => {}
                errno => return Err(io::Error::from_raw_os_error(errno)),
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// Another handle on the same signals: each arrives at one of them.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Signals> {
        Ok(Signals { fd: self.fd.try_clone()? })
    }

    /// Readable when a signal has arrived.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The next signal that has arrived, if any.
    pub fn take(&self) -> Option<Meaning> {
        loop {
            // SAFETY: signalfd_siginfo is plain data, and the buffer has its size.
            let (read, info) = unsafe {
                let mut info: libc::signalfd_siginfo = std::mem::zeroed();
                let size = size_of_val(&info);
                (libc::read(self.fd(), (&raw mut info).cast(), size), info)
            };
            if read != size_of_val(&info) as isize {
                return None;
            }
            match info.ssi_signo as i32 {
                libc::SIGWINCH => return Some(Meaning::WindowChanged),
                number if number == lease_break_signal() => return Some(Meaning::LeaseBreak),
                number @ (libc::SIGINT | libc::SIGTERM | libc::SIGHUP) => {
                    return Some(Meaning::End(number));
                }
                _ => {}
            }
        }
    }
}
