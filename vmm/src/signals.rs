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
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::thread::JoinHandle;

use crate::io::STACK_SIZE;
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

/// Those that mean something else.
const EVENTS: [i32; 3] = [libc::SIGWINCH, libc::SIGTSTP, libc::SIGCONT];

/// What a signal means to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// End the machine; the signal's number.
    End(i32),
    /// The terminal has another size, or may have: nobody is told of it while stopped.
    WindowChanged,
    /// Somebody wants to write the kernel file that is mapped into the guest.
    LeaseBreak,
}

/// What the owner of the terminal and of files does about signals.
#[derive(Clone, Copy, Debug)]
pub struct Hooks {
    /// Called in a signal handler when a signal ends the process before a machine runs. Must be
    /// async-signal-safe. Is given the signal's number and says what the process ends with.
    pub end: fn(i32) -> i32,
    /// Called on the control thread before the process stops for job control.
    pub stop: fn(),
    /// Called on the control thread when the process goes on after it was stopped. May be called
    /// more than once.
    pub go_on: fn(),
}

fn nothing() {}

impl Default for Hooks {
    fn default() -> Hooks {
        Hooks { end: |number| 128 + number, stop: nothing, go_on: nothing }
    }
}

/// [`Hooks::end`], for the handler.
static ON_END: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// The signals that may arrive while a machine is assembled, as bits 1 << number. 0 as long as
/// nobody takes signals.
static INTERRUPTING: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_end(number: i32) {
    let hook = ON_END.load(Ordering::SeqCst);
    let mut code = 128 + number;
    if !hook.is_null() {
        // SAFETY: only `with_hooks` stores here, and it stores a function of this type.
        let hook: fn(i32) -> i32 = unsafe { std::mem::transmute(hook) };
        code = hook(number);
    }
    // SAFETY: _exit is async-signal-safe and does not return.
    unsafe { libc::_exit(code) };
}

/// Blocks the signals that interrupt assembly, for the calling thread and the threads that it
/// starts. Does nothing in a process that does not take signals.
///
/// # Errors
/// The kernel refused.
pub(crate) fn hold() -> io::Result<()> {
    change_mask(libc::SIG_BLOCK)
}

/// Has `start` start threads that take none of the signals of a process, whether those are taken over by then or not.
///
/// # Errors
/// The kernel refused.
pub(crate) fn away_from<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let set = set_of(END.into_iter().chain(EVENTS).chain([lease_break_signal(), libc::SIGXFSZ]));
    let mut before = MaybeUninit::uninit();
    // SAFETY: a valid set, and room for another.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, before.as_mut_ptr()) } {
        0 => {}
        errno => return Err(io::Error::from_raw_os_error(errno)),
    }
    let started = start();
    // SAFETY: the call above filled it in.
    mask(libc::SIG_SETMASK, unsafe { before.assume_init_ref() })?;
    Ok(started)
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

/// A thread that signals can end the process in.
#[derive(Debug)]
pub struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to panic about.
            let _ = thread.join();
        }
    }
}

impl Signals {
    /// Blocks the signals for the calling thread and all that it starts from now on. To be called
    /// before there are other threads. Signals that are ignored stay so.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn block() -> io::Result<Signals> {
        let mut set = set_of(EVENTS.into_iter().chain([lease_break_signal()]));
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

    /// As [`interruptible`](Signals::interruptible), for an assembly with calls that take the kernel
    /// seconds: it looks at a handler only afterwards, so another thread runs it, until the
    /// [`Watch`] is dropped.
    ///
    /// # Errors
    /// The host refused a thread.
    pub fn watch(&self) -> io::Result<Watch> {
        let over = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&over);
        let thread = std::thread::Builder::new()
            .name("signals".into())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                // Fails with no arguments that this one passes.
                let _ = change_mask(libc::SIG_UNBLOCK);
                while !theirs.load(Ordering::Acquire) {
                    std::thread::park();
                }
            })?;
        Ok(Watch { over, thread: Some(thread) })
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
                libc::SIGCONT => {
                    (self.hooks.go_on)();
                    return Some(Meaning::WindowChanged);
                }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` in a process of its own and sends it `number` when it says that it is ready.
    /// Returns its exit code.
    fn signalled(number: i32, body: fn(ready: &dyn Fn())) -> i32 {
        let (mut reader, writer) = io::pipe().unwrap();
        // SAFETY: the child makes system calls only and leaves by _exit.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            body(&|| {
                // SAFETY: one valid byte.
                unsafe { libc::write(writer.as_raw_fd(), [0u8].as_ptr().cast(), 1) };
            });
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        drop(writer);
        io::Read::read_exact(&mut reader, &mut [0]).unwrap();
        // SAFETY: `child` is this test's, not yet waited for.
        unsafe {
            assert_eq!(libc::kill(child, number), 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert!(libc::WIFEXITED(status), "status {status:#x}");
            libc::WEXITSTATUS(status)
        }
    }

    fn wait_for_ever() -> ! {
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }

    /// Waits for a signal at the descriptor, and ends with 10 more than its number.
    fn end_by_event(signals: &Signals) -> ! {
        let mut poll = libc::pollfd { fd: signals.fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd; _exit does not return.
        unsafe {
            libc::poll(&mut poll, 1, 60_000);
            libc::_exit(match signals.take() {
                Some(Meaning::End(number)) => 10 + number,
                _ => 1,
            })
        }
    }

    #[test]
    fn a_signal_ends_assembly_wherever_it_waits() {
        fn last_words(_number: i32) -> i32 {
            77
        }
        for number in END {
            let code = signalled(number, |ready| {
                Signals::block().unwrap().interruptible().unwrap();
                ready();
                wait_for_ever();
            });
            assert_eq!(code, 128 + number);
        }
        let code = signalled(libc::SIGTERM, |ready| {
            let hooks = Hooks { end: last_words, ..Hooks::default() };
            Signals::block().unwrap().with_hooks(hooks).interruptible().unwrap();
            ready();
            wait_for_ever();
        });
        assert_eq!(code, 77);
    }

    #[test]
    fn a_watch_ends_what_cannot_be_interrupted() {
        let code = signalled(libc::SIGTERM, |ready| {
            let signals = Signals::block().unwrap();
            let _watch = signals.watch().unwrap();
            ready();
            // Blocked here, as if in the kernel.
            wait_for_ever();
        });
        assert_eq!(code, 128 + libc::SIGTERM);
        let code = signalled(libc::SIGTERM, |ready| {
            let signals = Signals::block().unwrap();
            drop(signals.watch().unwrap());
            ready();
            end_by_event(&signals);
        });
        assert_eq!(code, 10 + libc::SIGTERM);
    }

    #[test]
    fn a_signal_is_an_event_before_and_after_assembly() {
        for number in END {
            let code = signalled(number, |ready| {
                let signals = Signals::block().unwrap();
                ready();
                end_by_event(&signals);
            });
            assert_eq!(code, 10 + number);
            let code = signalled(number, |ready| {
                let signals = Signals::block().unwrap();
                signals.interruptible().unwrap();
                hold().unwrap();
                ready();
                end_by_event(&signals);
            });
            assert_eq!(code, 10 + number);
        }
    }

    #[test]
    fn an_ignored_signal_stays_ignored() {
        let code = signalled(libc::SIGHUP, |ready| {
            // SAFETY: sets a disposition of this process.
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
            let signals = Signals::block().unwrap();
            signals.interruptible().unwrap();
            ready();
            let mut poll = libc::pollfd { fd: signals.fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd; _exit does not return.
            unsafe { libc::_exit(50 + libc::poll(&mut poll, 1, 200)) };
        });
        assert_eq!(code, 50);
    }
}
