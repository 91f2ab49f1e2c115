//! The signals of the process: what ends it while a machine is assembled, and events of the control
//! loop from then on.
//!
//! Assembly waits for files and for the kernel, at places of their own choosing, so a signal must
//! end it wherever it is: a handler cleans up and leaves ([`Signals::interruptible`]). Before the
//! machine's first thread starts, the signals are blocked again, for all threads, and arrive at a
//! descriptor that `main` waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::kernel::lease_break_signal;

/// The signals that ask a machine to end. The others that end a process by default are left alone:
/// each costs a system call at start.
const END: [i32; 7] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
];

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

/// What the owner of the terminal and of files does about signals.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// Called in a signal handler when a signal ends the process before a machine runs. Must be
    /// async-signal-safe.
    pub end: fn(),
    /// Called on the control thread before the process stops for job control.
    pub stop: fn(),
    /// Called on the control thread when the process goes on after it was stopped. May be called
    /// more than once.
    pub go_on: fn(),
}

fn nothing() {}

impl Default for Hooks {
    fn default() -> Hooks {
        Hooks { end: nothing, stop: nothing, go_on: nothing }
    }
}

/// [`Hooks::end`], for the handler.
static ON_END: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// The signals that may arrive while a machine is assembled, as bits 1 << number. 0 as long as
/// nobody takes signals.
static INTERRUPTING: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_end(number: i32) {
    let hook = ON_END.load(Ordering::SeqCst);
    if !hook.is_null() {
        // SAFETY: only `with_hooks` stores here, and it stores a `fn()`.
        let hook: fn() = unsafe { std::mem::transmute(hook) };
        hook();
    }
    // SAFETY: _exit is async-signal-safe and does not return.
    unsafe { libc::_exit(128 + number) };
}

/// Blocks the signals that interrupt assembly, for the calling thread and the threads that it
/// starts. Does nothing in a process that does not take signals.
///
/// # Errors
/// The kernel refused.
pub(crate) fn hold() -> io::Result<()> {
    change_mask(libc::SIG_BLOCK)
}

fn change_mask(how: i32) -> io::Result<()> {
    let numbers = INTERRUPTING.load(Ordering::SeqCst);
    if numbers == 0 {
        return Ok(());
    }
    mask(how, &set_of((1..64).filter(|number| numbers & 1 << number != 0)))
}

fn set_of(numbers: impl IntoIterator<Item = i32>) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; the others get a valid one. Numbers out of range
    // change nothing.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for number in numbers {
            libc::sigaddset(set.as_mut_ptr(), number);
        }
        set.assume_init()
    }
}

fn mask(how: i32, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is valid, and the old one is not wanted.
    match unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Installs the handler of `number`, unless the caller of this process wants it to be ignored
/// (nohup, a shell's background jobs). Returns whether it counts.
fn take_over(number: i32) -> io::Result<bool> {
    // SAFETY: all-zero sigactions are valid; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_end as *const () as usize;
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(number, &action, &mut before) < 0 {
            return Err(io::Error::last_os_error());
        }
        if before.sa_sigaction != libc::SIG_IGN {
            return Ok(true);
        }
        if libc::sigaction(number, &before, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(false)
}

/// The blocked signals of a process and the descriptor that they arrive at.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
    hooks: Hooks,
}

impl Signals {
    /// Blocks the signals for the calling thread and all that it starts from now on. To be called
    /// before there are other threads. Signals that are ignored stay so.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn block() -> io::Result<Signals> {
        let events = [libc::SIGWINCH, libc::SIGTSTP, libc::SIGCONT, lease_break_signal()];
        let mut set = set_of(events);
        let mut interrupting = 1 << libc::SIGTSTP;
        for number in END {
            if take_over(number)? {
                interrupting |= 1 << number;
                // SAFETY: a valid set and signal.
                unsafe { libc::sigaddset(&mut set, number) };
            }
        }
        INTERRUPTING.store(interrupting, Ordering::SeqCst);
        let mut blocked = set;
        // Blocked for good: the write beyond the limit of a file's size then fails, for the guest to
        // know, instead of ending the process.
        // SAFETY: as above.
        unsafe { libc::sigaddset(&mut blocked, libc::SIGXFSZ) };
        mask(libc::SIG_BLOCK, &blocked)?;
        // SAFETY: the set is valid; signalfd returns a new descriptor that nobody else owns.
        let fd = unsafe {
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(Signals { fd, hooks: Hooks::default() })
    }

    /// The same signals with `hooks` called for them.
    pub fn with_hooks(self, hooks: Hooks) -> Signals {
        ON_END.store(hooks.end as *mut (), Ordering::SeqCst);
        Signals { hooks, ..self }
    }

    /// Lets the signals end the process on the spot, with status 128 and their number, while the
    /// calling thread assembles a machine. [`Machine::new`](crate::machine::Machine::new) blocks
    /// them again when it gets to the machine's threads.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn interruptible(&self) -> io::Result<()> {
        change_mask(libc::SIG_UNBLOCK)
    }

    /// Another handle on the same signals: each arrives at one of them.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Signals> {
        Ok(Signals { fd: self.fd.try_clone()?, hooks: self.hooks })
    }

    /// Readable when a signal has arrived.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// The next signal that has arrived and means something to a machine, if any.
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
                libc::SIGTSTP => self.stop(),
                libc::SIGCONT => (self.hooks.go_on)(),
                number if number == lease_break_signal() => return Some(Meaning::LeaseBreak),
                number if END.contains(&number) => return Some(Meaning::End(number)),
                _ => {}
            }
        }
    }

    /// Stops the process as the default action of SIGTSTP does, which is not to stop where no shell
    /// could let it go on. Returns when it goes on.
    fn stop(&self) {
        (self.hooks.stop)();
        let set = set_of([libc::SIGTSTP]);
        // SAFETY: raise has no memory arguments.
        unsafe { libc::raise(libc::SIGTSTP) };
        // Pending until now. Neither call fails with these arguments.
        let _ = mask(libc::SIG_UNBLOCK, &set);
        let _ = mask(libc::SIG_BLOCK, &set);
        (self.hooks.go_on)();
    }
}
