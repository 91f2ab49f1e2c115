//! System call filters: one per kind of thread, from the policies in `resources/seccomp`.
//!
//! A thread filters itself as the last thing before it serves a guest. A call that its policy does
//! not list raises SIGSYS, whose handler names the call and the thread and ends the process;
//! in mode `log` the kernel logs the call and lets it through.

// Used by the build script; its tests are part of this crate's.
#[cfg(test)]
mod policy;

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};

use seccompiler::{BpfProgram, sock_filter};
use serde::{Deserialize, Serialize};

/// What happens to calls that a policy does not list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// They end the process.
    #[default]
    On,
    /// They are logged by the kernel (audit log).
    Log,
    /// There is no filter.
    Off,
}

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Control: events, signals, console.
    Main,
    /// The same, where it may have to start the thread of the REST API.
    MainApi,
    /// Runs a vCPU.
    Vcpu,
    /// Runs device workers.
    Io,
    /// Runs device workers, one of which makes connections to programs of the host.
    IoSockets,
    /// Does blocking file operations for an io thread.
    Pool,
    /// Serves the REST API.
    Api,
}

impl ThreadKind {
    /// Name of the kind, and of its policy file but where there are two (`vmm/build.rs`).
    pub fn name(self) -> &'static str {
        match self {
            ThreadKind::Main | ThreadKind::MainApi => "main",
            ThreadKind::Vcpu => "vcpu",
            ThreadKind::Io => "io",
            ThreadKind::IoSockets => "io-sockets",
            ThreadKind::Pool => "pool",
            ThreadKind::Api => "api",
        }
    }

    fn program(self, mode: Mode) -> &'static [u8] {
        macro_rules! program {
            ($name:literal) => {
                if mode == Mode::Log {
                    include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".log.bpf"))
                } else {
                    include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".trap.bpf"))
                }
            };
        }
        match self {
            ThreadKind::Main => program!("main"),
            ThreadKind::MainApi => program!("main-api"),
            ThreadKind::Vcpu => program!("vcpu"),
            ThreadKind::Io => program!("io"),
            ThreadKind::IoSockets => program!("io-sockets"),
            ThreadKind::Pool => program!("pool"),
            ThreadKind::Api => program!("api"),
        }
    }
}

/// Exit code of a process that a filter ended, as Firecracker has it.
pub const EXIT_CODE: i32 = 148;

thread_local! {
    // Constant-initialised and without a destructor: safe to read in a signal handler.
    static KIND: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Filters the calling thread.
///
/// # Errors
/// The kernel refused the filter.
pub fn apply(kind: ThreadKind, mode: Mode) -> io::Result<()> {
    if mode == Mode::Off {
        return Ok(());
    }
    KIND.set(Some(kind));
    let program: BpfProgram = kind
        .program(mode)
        .chunks_exact(8)
        .map(|op| sock_filter {
            code: u16::from_ne_bytes([op[0], op[1]]),
            jt: op[2],
            jf: op[3],
            k: u32::from_ne_bytes([op[4], op[5], op[6], op[7]]),
        })
        .collect();
    seccompiler::apply_filter(&program).map_err(|err| match err {
        seccompiler::Error::Prctl(err) | seccompiler::Error::Seccomp(err) => err,
        other => io::Error::other(other.to_string()),
    })
}

/// Called in the SIGSYS handler before the process ends, to put the terminal back. It must be
/// async-signal-safe and may use only write(2), and ioctl(2) with TCSETS.
pub type LastWords = fn();

static LAST_WORDS: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Installs the SIGSYS handler of the process.
///
/// # Errors
/// The kernel refused the handler.
pub fn install_handler(last_words: LastWords) -> io::Result<()> {
    LAST_WORDS.store(last_words as *mut (), Ordering::SeqCst);
    // SAFETY: an all-zero sigaction is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    action.sa_sigaction = on_sigsys as *const () as usize;
    // SAFETY: the handler is async-signal-safe and has the signature that SA_SIGINFO asks for.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Offset of `si_syscall` in siginfo_t on 64-bit Linux (signo, errno, code, padding, call address,
/// number).
const SI_SYSCALL_OFFSET: usize = 24;

extern "C" fn on_sigsys(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let last_words = LAST_WORDS.load(Ordering::SeqCst);
    if !last_words.is_null() {
        // SAFETY: only `install_handler` stores here, and it stores a `LastWords`.
        let last_words: LastWords = unsafe { std::mem::transmute(last_words) };
        last_words();
    }
    // SAFETY: the kernel passes a siginfo of 128 bytes; for SIGSYS the number is at this offset.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL_OFFSET).cast::<i32>().read_unaligned() };
    let call = usize::try_from(number).ok().and_then(syscalls::Sysno::new);
    let mut line = Line::default();
    line.text("hull: the ");
    line.text(KIND.get().map_or("unfiltered", ThreadKind::name));
    line.text(" thread made the system call ");
    match call {
        Some(call) => line.text(call.name()),
        None => line.number(number),
    }
    line.text(", which its filter refuses\nhint: this is a defect of Hull or an attack; ");
    line.text("--seccomp log lets it through and logs it\n");
    let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd; the buffer is valid for its length; _exit does not return.
    unsafe {
        // Not for ever: the process must end whether or not somebody reads.
        if libc::poll(&mut poll, 1, 1000) > 0 {
            libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        }
        libc::_exit(EXIT_CODE);
    }
}

/// Text built without allocating, for a signal handler. What does not fit is cut off.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; 256], len: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &str) {
        for &byte in text.as_bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: i32) {
        let mut digits = [0u8; 10];
        let mut rest = number.unsigned_abs();
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 || at == 0 {
                break;
            }
        }
        self.text(if number < 0 { "-" } else { "" });
        self.text(std::str::from_utf8(&digits[at..]).unwrap_or("?"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 7] = [
        ThreadKind::Main,
        ThreadKind::MainApi,
        ThreadKind::Vcpu,
        ThreadKind::Io,
        ThreadKind::IoSockets,
        ThreadKind::Pool,
        ThreadKind::Api,
    ];

    #[test]
    fn programs_are_whole() {
        for kind in KINDS {
            for mode in [Mode::On, Mode::Log] {
                let program = kind.program(mode);
                assert!(!program.is_empty() && program.len() % 8 == 0);
            }
            assert_ne!(kind.program(Mode::On), kind.program(Mode::Log));
        }
    }

    #[test]
    fn lines_are_built_without_allocating() {
        let mut line = Line::default();
        line.number(-2147483648);
        line.text(" ");
        line.number(0);
        assert_eq!(&line.bytes[..line.len], b"-2147483648 0");
        line.text(&"x".repeat(500));
        assert_eq!(line.len, 256);
    }

    /// Runs `body` in a child that filters itself first; returns its exit code and stderr.
    fn in_filtered_child(kind: ThreadKind, body: fn()) -> (i32, String) {
        let (mut reader, writer) = io::pipe().unwrap();
        // SAFETY: the child only makes system calls and leaves by _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            use std::os::fd::AsRawFd;
            // SAFETY: as above.
            unsafe { libc::dup2(writer.as_raw_fd(), libc::STDERR_FILENO) };
            fn nothing() {}
            let ready = install_handler(nothing).and_then(|()| apply(kind, Mode::On));
            if ready.is_ok() {
                body();
            }
            // SAFETY: as above.
            unsafe { libc::_exit(if ready.is_ok() { 0 } else { 99 }) };
        }
        drop(writer);
        let mut text = String::new();
        io::Read::read_to_string(&mut reader, &mut text).unwrap();
        let mut status = 0;
        // SAFETY: `pid` is this test's child.
        unsafe { libc::waitpid(pid, &mut status, 0) };
        (libc::WEXITSTATUS(status), text)
    }

    #[test]
    fn a_refused_call_is_named_with_its_thread() {
        let open = || {
            // SAFETY: the path is a valid C string.
            unsafe { libc::syscall(libc::SYS_open, c"/".as_ptr(), 0) };
        };
        for kind in KINDS {
            let (code, text) = in_filtered_child(kind, open);
            assert_eq!(code, EXIT_CODE, "{text}");
            let expected = format!("the {} thread made the system call open,", kind.name());
            assert!(text.contains(&expected), "{text}");
        }
    }

    #[test]
    fn a_listed_call_passes() {
        let (code, text) = in_filtered_child(ThreadKind::Vcpu, || {});
        assert_eq!((code, text.as_str()), (0, ""));
    }

    #[test]
    fn only_who_talks_to_programs_makes_sockets_and_only_local_ones() {
        fn local() {
            // SAFETY: the call has no memory arguments.
            unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
        }
        fn internet() {
            // SAFETY: as above.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        }
        for kind in KINDS {
            // A socket device's thread, and who hands machines over to a pool.
            let may = matches!(kind, ThreadKind::IoSockets | ThreadKind::Api | ThreadKind::MainApi);
            let expected = if may { 0 } else { EXIT_CODE };
            assert_eq!(in_filtered_child(kind, local).0, expected, "{kind:?}");
            assert_eq!(in_filtered_child(kind, internet).0, EXIT_CODE, "{kind:?}");
        }
    }
}
