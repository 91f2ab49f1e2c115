//! The console: a 16550 at COM1, polled, byte by byte.

use crate::machine::{in8, out8};
use core::cell::UnsafeCell;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
const DATA_READY: u8 = 1;

/// Sends one byte. The transmitter of an emulated UART is always ready, so it is not asked.
#[inline]
pub fn put(byte: u8) {
    out8(DATA, byte);
}

/// Sends bytes as they are.
pub fn put_all(bytes: &[u8]) {
    bytes.iter().for_each(|byte| put(*byte));
}

/// Takes the next received byte, if there is one.
pub fn get() -> Option<u8> {
    (in8(LINE_STATUS) & DATA_READY != 0).then(|| in8(DATA))
}

/// What has been printed since `mirror` was called first, for a console that is not COM1.
struct Mirror {
    text: UnsafeCell<[u8; 2048]>,
    length: AtomicUsize,
}

// SAFETY: there is one thread, and no interrupt handler prints.
unsafe impl Sync for Mirror {}

/// Off until asked for.
const OFF: usize = usize::MAX;
static MIRROR: Mirror = Mirror { text: UnsafeCell::new([0; 2048]), length: AtomicUsize::new(OFF) };

/// Takes what has been printed since the last call, at most 2048 bytes; the first call turns this on.
pub fn mirror(target: &mut [u8; 2048]) -> usize {
    let length = MIRROR.length.swap(0, Ordering::Relaxed);
    if length == OFF {
        return 0;
    }
    // SAFETY: see `Mirror`; nobody else holds a reference into it.
    target.copy_from_slice(unsafe { &*MIRROR.text.get() });
    length
}

fn keep(bytes: &[u8]) {
    let length = MIRROR.length.load(Ordering::Relaxed);
    if length == OFF {
        return;
    }
    // SAFETY: see `Mirror`; nobody else holds a reference into it.
    let text = unsafe { &mut *MIRROR.text.get() };
    let kept = bytes.len().min(text.len() - length);
    text[length..length + kept].copy_from_slice(&bytes[..kept]);
    MIRROR.length.store(length + kept, Ordering::Relaxed);
}

/// COM1 as a formatting target.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        put_all(text.as_bytes());
        keep(text.as_bytes());
        Ok(())
    }
}

/// Prints to COM1.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        // Writing to a port cannot fail.
        let _ = write!($crate::serial::Console, $($argument)*);
    }};
}

/// Prints a line to COM1.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        $crate::print!($($argument)*);
        $crate::print!("\n");
    }};
}
