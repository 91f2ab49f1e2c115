//! The console: a 16550 at COM1, polled, byte by byte.

use crate::machine::{in8, out8};
use core::fmt;

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

/// COM1 as a formatting target.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        put_all(text.as_bytes());
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
        $crate::serial::put(b'\n');
    }};
}
