//! `hull stop`: the power button first, then harder means, each of them announced.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cli::{Result, StopArgs};
use crate::exit::Code;
use crate::runtime::{self, Request, RuntimeError};
use crate::streams;

/// How long a monitor gets to end its machine by each means.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a request is tried again that a monitor does not take.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two tries.
const ASK_AGAIN: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
#[error("{name} still runs: its monitor, process {pid}, is stuck in the kernel")]
struct Stuck {
    name: String,
    pid: i32,
}

/// Stops a machine and waits until it is gone.
pub fn stop(args: &StopArgs) -> Result {
    let directory = runtime::directory();
    let record = runtime::find(&directory, &args.name)?;
    let process = match Process::open(record.pid) {
        // It ended between our look and our grip.
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(Code::SUCCESS),
        process => process?,
    };
    // As long as the entry is there, so is its process: what we hold is no later one of that number.
    match runtime::find(&directory, &args.name) {
        Ok(again) if again.pid == record.pid => {}
        Ok(_) | Err(RuntimeError::NoSuchMachine { .. }) => return Ok(Code::SUCCESS),
        Err(err) => return Err(err.into()),
    }
    let machine = Target { directory: &directory, name: &args.name, process };
    if machine.stop(args)? {
        return Ok(Code::SUCCESS);
    }
    Err(Stuck { name: args.name.clone(), pid: record.pid }.into())
}

struct Target<'a> {
    directory: &'a Path,
    name: &'a str,
    process: Process,
}

impl Target<'_> {
    /// Tries one means after the other. Returns false if none helped.
    fn stop(&self, args: &StopArgs) -> Result<bool> {
        let (name, timeout) = (self.name, args.timeout);
        if !args.now {
            match self.ask(Request::PowerButton) {
                Ok(()) if self.process.wait(Duration::from_secs(timeout))? => return Ok(true),
                Ok(()) => streams::say(&format!(
                    "hull: {name} did not power off within {timeout} s; ending it\n"
                )),
                Err(err) => streams::say(&format!(
                    "hull: {name} cannot be asked to power off ({err}); ending it\n"
                )),
            }
        }
        match self.ask(Request::Quit) {
            Ok(()) if self.process.wait(QUIT_TIMEOUT)? => return Ok(true),
            Ok(()) => streams::say(&format!(
                "hull: the monitor of {name} does not react; sending it SIGTERM\n"
            )),
            Err(err) => {
                streams::say(&format!(
                    "hull: the monitor of {name} cannot be asked ({err}); sending it SIGTERM\n"
                ));
            }
        }
        self.process.signal(libc::SIGTERM)?;
        if self.process.wait(QUIT_TIMEOUT)? {
            return Ok(true);
        }
        streams::say(&format!("hull: the monitor of {name} does not end; killing it\n"));
        self.process.signal(libc::SIGKILL)?;
        let gone = self.process.wait(QUIT_TIMEOUT)?;
        // Removes what it could not remove itself.
        runtime::list(self.directory)?;
        Ok(gone)
    }

    /// Sends `request`, for a while again and again: the monitor may be about to take those that
    /// others sent before.
    fn ask(&self, request: Request) -> io::Result<()> {
        let patience = Instant::now() + ASK_TIMEOUT;
        loop {
            match runtime::send(self.directory, self.name, request) {
                Err(err)
                    if Instant::now() < patience && err.kind() == io::ErrorKind::WouldBlock =>
                {
                    if self.process.wait(ASK_AGAIN)? {
                        return Ok(());
                    }
                }
                // Its socket goes shortly before it does.
                Err(_) if self.process.wait(ASK_AGAIN)? => return Ok(()),
                sent => return sent,
            }
        }
    }
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
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            let mut poll =
                libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            match unsafe { libc::poll(&mut poll, 1, millis) } {
                0 => return Ok(false),
                n if n > 0 => return Ok(true),
                _ => {}
            }
            match io::Error::last_os_error() {
                err if err.kind() == io::ErrorKind::Interrupted => {}
                err => return Err(err),
            }
        }
    }

    /// Sends a signal; one that has just ended does not need it any more.
    fn signal(&self, number: i32) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, none, 0)
        };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            err if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            err => Err(err),
        }
    }
}
