//! `hull stop`: the power button first, then harder means.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::cli::{Result, StopArgs};
use crate::exit::Code;
use crate::runtime::{self, Request};

/// How long a monitor gets to end its machine when it is told to.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);

/// Stops a machine and waits until it is gone.
pub fn stop(args: &StopArgs) -> Result {
    let directory = runtime::directory();
    let record = runtime::find(&directory, &args.name)?;
    let process = match Process::open(record.pid) {
        // It ended between our look and our grip.
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(Code::SUCCESS),
        process => process?,
    };
    if !args.now {
        match runtime::send(&directory, &args.name, Request::PowerButton) {
            Ok(()) if process.wait(Duration::from_secs(args.timeout))? => {
                return Ok(Code::SUCCESS);
            }
            Ok(()) => eprintln!(
                "hull: {} did not power off within {} s; ending it",
                args.name, args.timeout
            ),
            Err(err) => eprintln!("hull: {} cannot be asked ({err}); ending it", args.name),
        }
    }
    if runtime::send(&directory, &args.name, Request::Quit).is_ok() && process.wait(QUIT_TIMEOUT)? {
        return Ok(Code::SUCCESS);
    }
    eprintln!("hull: the monitor of {} does not react; killing it", args.name);
    process.kill()?;
    process.wait(QUIT_TIMEOUT)?;
    // Removes what it could not remove itself.
    runtime::list(&directory)?;
    Ok(Code::SUCCESS)
}

/// A process that cannot be mistaken for another that gets its id later.
struct Process(OwnedFd);

impl Process {
    fn open(pid: i32) -> io::Result<Process> {
        // SAFETY: pidfd_open has no memory arguments and returns a new descriptor.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            match i32::try_from(fd) {
                Ok(fd) if fd >= 0 => Ok(Process(OwnedFd::from_raw_fd(fd))),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }

    /// Waits for its end. Returns false if it takes longer than `timeout`.
    fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        match unsafe { libc::poll(&mut poll, 1, millis) } {
            0 => Ok(false),
            n if n > 0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn kill(&self) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, none, 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
