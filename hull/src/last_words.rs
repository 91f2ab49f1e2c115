//! What is done when the process ends otherwise than by returning from `main`: the terminal is put
//! back, and the files that others would take for a living machine's are removed. All of it runs
//! in signal handlers.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};

use vmm::files::remove_if_same;

use crate::exit::Code;
use crate::streams;
use crate::terminal;

/// Exit code of a process that ended by a defect of its own, as Rust has it.
const PANIC: i32 = 101;

/// Signals of defects: what raised them is done again by returning from the handler.
const FAULTS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

/// Signals that end the process by default and that no machine waits for.
const OTHERS: [i32; 4] = [libc::SIGABRT, libc::SIGVTALRM, libc::SIGPROF, libc::SIGXCPU];

/// Signals that end the process with codes of their own where it is in Firecracker's place.
const FIRECRACKER_SIGNALS: [i32; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGXCPU];

/// A file to be removed.
#[derive(Debug)]
struct Leftover {
    path: CString,
    /// Device and inode, if the file at that path may be another's by then.
    identity: Option<(u64, u64)>,
}

static LEFTOVERS: AtomicPtr<Vec<Leftover>> = AtomicPtr::new(std::ptr::null_mut());

/// The files that a process of a machine must not leave behind. While it lives, signal handlers
/// remove them; whoever made them removes them otherwise.
#[derive(Debug, Default)]
pub struct Leftovers(Vec<Leftover>);

impl Leftovers {
    /// Adds the file at `path`, which only this process removes.
    pub fn add(&mut self, path: &Path) {
        self.push(path, None);
    }

    /// Adds the file at `path`, if it still is the one on that device with that inode number.
    pub fn add_if_same(&mut self, path: &Path, device: u64, inode: u64) {
        self.push(path, Some((device, inode)));
    }

    fn push(&mut self, path: &Path, identity: Option<(u64, u64)>) {
        // A path with a zero byte cannot have been opened.
        if let Ok(path) = CString::new(path.as_os_str().as_bytes()) {
            self.0.push(Leftover { path, identity });
        }
    }

    /// Gives the list to the signal handlers.
    pub fn publish(self) -> Published {
        LEFTOVERS.store(Box::into_raw(Box::new(self.0)), Ordering::SeqCst);
        Published
    }
}

/// Signal handlers know of leftovers for as long as it lives.
#[derive(Debug)]
pub struct Published;

impl Drop for Published {
    fn drop(&mut self) {
        // The list is not freed: a handler may be at it on another thread. There is one a process.
        LEFTOVERS.store(std::ptr::null_mut(), Ordering::SeqCst);
    }
}

/// Puts the terminal back and removes leftovers. Async-signal-safe. Not for a filtered thread other
/// than `main`.
pub fn clean_up() {
    terminal::restore();
    let leftovers = LEFTOVERS.swap(std::ptr::null_mut(), Ordering::SeqCst);
    // SAFETY: null, or what `publish` made and nobody frees.
    let Some(leftovers) = (unsafe { leftovers.as_ref() }) else { return };
    for Leftover { path, identity } in leftovers {
        match identity {
            Some(identity) => remove_if_same(path, *identity),
            // SAFETY: the path is valid.
            None => unsafe {
                libc::unlink(path.as_ptr());
            },
        }
    }
}

/// As [`clean_up`], for a signal that ends the process; returns what it ends with.
pub fn on_end(number: i32) -> i32 {
    clean_up();
    Code::signal(number).into()
}

/// As [`clean_up`], for any thread: only the first one of the process may remove files for certain.
fn clean_up_as_far_as_allowed() {
    // SAFETY: the calls have no memory arguments.
    let first = unsafe { libc::syscall(libc::SYS_gettid) == libc::c_long::from(libc::getpid()) };
    if first { clean_up() } else { terminal::restore() }
}

/// Makes a panic end the process, in whatever thread: with a message that waits for nobody and a code
/// of its own. A thread that is filtered could not even abort.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        clean_up_as_far_as_allowed();
        let text = streams::printable(info);
        streams::say(&format!("hull: {text}\nhint: this is a defect of Hull\n"));
        // SAFETY: _exit does not return.
        unsafe { libc::_exit(PANIC) };
    }));
}

/// Installs handlers by which signals of defects and of limits end the process with the codes that
/// Firecracker's clients know.
pub fn install_firecracker_handlers() {
    for number in FIRECRACKER_SIGNALS {
        // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_flags = libc::SA_RESETHAND;
            action.sa_sigaction = on_firecracker_signal as *const () as usize;
            libc::sigaction(number, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn on_firecracker_signal(number: i32) {
    clean_up_as_far_as_allowed();
    // SAFETY: _exit does not return.
    unsafe { libc::_exit(Code::signal(number).into()) };
}

/// Installs handlers that put the terminal back when a signal ends the process that no machine
/// waits for. Signals that are ignored stay so.
pub fn install_fatal_handlers() {
    // In Firecracker's place, others do the same already.
    let taken = |number: &i32| Code::speaks_firecracker() && FIRECRACKER_SIGNALS.contains(number);
    for number in FAULTS.into_iter().chain(OTHERS).filter(|number| !taken(number)) {
        // SAFETY: all-zero sigactions are valid; the handler is async-signal-safe and has the
        // signature that SA_SIGINFO asks for. Failing, which these numbers do not, changes nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
            action.sa_sigaction = on_fatal as *const () as usize;
            let mut before: libc::sigaction = std::mem::zeroed();
            libc::sigaction(number, &action, &mut before);
            if before.sa_sigaction == libc::SIG_IGN {
                libc::sigaction(number, &before, std::ptr::null_mut());
            }
        }
    }
}

/// Its action is the default one by the time it is called, and it is pending or comes again when the
/// handler returns.
extern "C" fn on_fatal(number: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    terminal::restore();
    // SAFETY: the kernel passes a valid siginfo; the calls have no memory arguments.
    unsafe {
        if FAULTS.contains(&number) && (*info).si_code > 0 {
            return;
        }
        clean_up_as_far_as_allowed();
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::syscall(libc::SYS_gettid), number);
    }
}
