//! Random numbers of the host's kernel.

use std::io;

/// Fills `bytes`, of which there are at most 256: so many are not cut short (getrandom(2)).
///
/// # Errors
/// The kernel has none.
pub(crate) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got == bytes.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}
