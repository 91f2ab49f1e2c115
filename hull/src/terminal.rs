//! The user's terminal: raw mode that is undone on every way out, and the Ctrl-A escapes.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use vmm::console::Filtered;

use crate::last_words;

/// The settings to go back to, and those of raw mode, for signal handlers and the panic hook. Written
/// only before `RAW_FD` says that they are valid.
static mut SAVED: MaybeUninit<libc::termios> = MaybeUninit::uninit();
static mut RAW: MaybeUninit<libc::termios> = MaybeUninit::uninit();
static RAW_FD: AtomicI32 = AtomicI32::new(-1);
static TAKEN: AtomicBool = AtomicBool::new(false);

/// True while the terminal is in raw mode.
pub fn is_raw() -> bool {
    RAW_FD.load(Ordering::SeqCst) >= 0
}

/// Puts the terminal back. Async-signal-safe: one ioctl(2).
pub fn restore() {
    let fd = RAW_FD.swap(-1, Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: SAVED was initialised before RAW_FD became valid and is not written again;
        // tcsetattr is one ioctl (TCSETS).
        unsafe { libc::ioctl(fd, libc::TCSETS, (&raw const SAVED).cast::<libc::termios>()) };
    }
}

/// Puts the terminal back for the time that the process is stopped.
pub fn lend() {
    let fd = RAW_FD.load(Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: as in `restore`.
        unsafe { libc::ioctl(fd, libc::TCSETS, (&raw const SAVED).cast::<libc::termios>()) };
    }
}

/// Goes back to raw mode, if that is what the terminal was in before the process was stopped. Stops
/// it again if it is in the background.
pub fn take_back() {
    let fd = RAW_FD.load(Ordering::SeqCst);
    if fd >= 0 {
        // SAFETY: as SAVED in `restore`.
        unsafe { libc::ioctl(fd, libc::TCSETS, (&raw const RAW).cast::<libc::termios>()) };
    }
}

/// Raw mode for as long as it lives.
#[derive(Debug)]
pub struct RawMode {
    // Keeps the descriptor in RAW_FD open.
    _tty: OwnedFd,
}

impl RawMode {
    /// Puts the terminal `tty` into raw mode: bytes go to the guest as they are typed.
    ///
    /// # Errors
    /// It is not a terminal, or this process has one in raw mode already.
    pub fn enter(tty: BorrowedFd<'_>) -> io::Result<RawMode> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(io::Error::other("the terminal is in raw mode already"));
        }
        let tty = tty.try_clone_to_owned()?;
        let fd = tty.as_raw_fd();
        // SAFETY: TCGETS fills one kernel termios, which is smaller than libc's; TAKEN makes this
        // the only writer, and RAW_FD is published only afterwards.
        let raw = unsafe {
            let saved = (&raw mut SAVED).cast::<libc::termios>();
            saved.write(std::mem::zeroed());
            if libc::ioctl(fd, libc::TCGETS, saved) < 0 {
                TAKEN.store(false, Ordering::SeqCst);
                return Err(io::Error::last_os_error());
            }
            let raw = (&raw mut RAW).cast::<libc::termios>();
            raw.write(*saved);
            libc::cfmakeraw(raw);
            raw
        };
        last_words::install_fatal_handlers();
        RAW_FD.store(fd, Ordering::SeqCst);
        // SAFETY: one valid termios, not written as long as RAW_FD is valid.
        if unsafe { libc::ioctl(fd, libc::TCSETS, raw) } < 0 {
            let err = io::Error::last_os_error();
            RAW_FD.store(-1, Ordering::SeqCst);
            TAKEN.store(false, Ordering::SeqCst);
            return Err(err);
        }
        Ok(RawMode { _tty: tty })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
        TAKEN.store(false, Ordering::SeqCst);
    }
}

/// Ctrl-A.
const ESCAPE: u8 = 0x01;

const HELP: &str = "\r\n\
    Ctrl-A x       end the machine\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n\
    Ctrl-A ?       this help\r\n";

/// The escape sequences of an interactive console. The state lasts across reads: the two keys need
/// not arrive together.
#[derive(Debug, Default)]
pub struct Escapes {
    pending: bool,
}

impl Escapes {
    /// Sorts typed bytes into what the guest gets and what is meant for Hull.
    pub fn filter(&mut self, typed: &[u8]) -> Filtered {
        let mut filtered = Filtered::default();
        for &byte in typed {
            if !std::mem::take(&mut self.pending) {
                if byte == ESCAPE {
                    self.pending = true;
                } else {
                    filtered.bytes.push(byte);
                }
                continue;
            }
            match byte {
                b'x' | b'X' => filtered.quit = true,
                ESCAPE => filtered.bytes.push(ESCAPE),
                b'?' | b'h' => filtered.reply.extend_from_slice(HELP.as_bytes()),
                // Not one of ours: the guest gets both, as if there were no escapes.
                other => filtered.bytes.extend([ESCAPE, other]),
            }
        }
        filtered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_recognised_across_reads() {
        let mut escapes = Escapes::default();
        assert_eq!(escapes.filter(b"ls\r").bytes, b"ls\r");
        assert_eq!(escapes.filter(b"a\x01").bytes, b"a");
        let filtered = escapes.filter(b"xb");
        assert!(filtered.quit);
        assert_eq!(filtered.bytes, b"b");
        assert_eq!(escapes.filter(b"\x01\x01").bytes, b"\x01");
        assert_eq!(escapes.filter(b"\x01c").bytes, b"\x01c");
        let help = escapes.filter(b"\x01?");
        assert!(help.bytes.is_empty() && String::from_utf8(help.reply).unwrap().contains("end"));
    }
}
