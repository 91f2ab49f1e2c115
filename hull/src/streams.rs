//! Standard output and error, written so that neither a reader that went away nor one that does not
//! read does harm.
//!
//! Lines on standard error never wait while a machine runs: a line that finds no room is dropped
//! and counted, and the next that finds some says how many. The stream itself is not made
//! non-blocking, because the caller shares it. A pipe that poll(2) calls writable takes
//! `PIPE_BUF` bytes at once.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::terminal;

/// Bytes that a writable pipe takes without waiting.
const PIPE_BUF: usize = 4096;

/// How long the last words of a process wait for a reader.
const PATIENCE: Duration = Duration::from_secs(1);

/// Lines that were dropped and not told of. Also keeps one line from getting into another.
static DROPPED: Mutex<u64> = Mutex::new(0);

/// Writes `text` to standard output.
///
/// # Errors
/// It takes no more. That its reader has seen enough is no error.
pub fn print(text: &str) -> io::Result<()> {
    print_to_reader(text).map(drop)
}

/// Writes `text` to standard output. Returns false if its reader has seen enough.
///
/// # Errors
/// It takes no more.
pub fn print_to_reader(text: &str) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(err) if err.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(err) => Err(io::Error::new(err.kind(), OutputError(err))),
        Ok(()) => Ok(true),
    }
}

/// False if the reader of standard output has gone away.
pub fn has_reader() -> bool {
    // Errors are told unasked.
    let mut poll = libc::pollfd { fd: libc::STDOUT_FILENO, events: 0, revents: 0 };
    // SAFETY: one valid pollfd.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready <= 0 || poll.revents & (libc::POLLERR | libc::POLLHUP) == 0
}

#[derive(Debug, thiserror::Error)]
#[error("cannot write to standard output")]
struct OutputError(#[source] io::Error);

/// Writes one line, without its end, to standard error if that takes it now. It is cut where it gets
/// too long to be written at once.
pub fn log(line: &str) {
    let end = if terminal::is_raw() { "\r\n" } else { "\n" };
    let line = line.get(..line.floor_char_boundary(PIPE_BUF - end.len())).unwrap_or_default();
    put(&format!("{line}{end}"), Duration::ZERO);
}

/// Writes text of some lines to standard error, for a person. To be called when no machine runs:
/// it waits a moment for a reader.
pub fn say(text: &str) {
    put(text, PATIENCE);
}

/// Tells of dropped lines that nothing else came to tell of. To be called at the end.
pub fn finish() {
    let mut dropped = DROPPED.lock().unwrap_or_else(PoisonError::into_inner);
    tell(&mut dropped, Duration::ZERO);
}

fn put(text: &str, patience: Duration) {
    // A number is valid after each assignment, so a panic elsewhere changes nothing.
    let mut dropped = DROPPED.lock().unwrap_or_else(PoisonError::into_inner);
    if !tell(&mut dropped, patience) || !write(text.as_bytes(), patience) {
        *dropped += 1;
    }
}

/// Says how many lines were dropped, if any. Returns false if that found no room either.
fn tell(dropped: &mut u64, patience: Duration) -> bool {
    if *dropped > 0 {
        let end = if terminal::is_raw() { "\r\n" } else { "\n" };
        let line = format!("hull: WARN {dropped} lines were dropped here: nobody read them{end}");
        if !write(line.as_bytes(), patience) {
            return false;
        }
        *dropped = 0;
    }
    true
}

/// Writes `bytes` to standard error as long as it takes them. Returns false if it would have to wait
/// for more than `patience`. Nobody can be told of other errors.
fn write(mut bytes: &[u8], patience: Duration) -> bool {
    while !bytes.is_empty() {
        let mut poll = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
        let len = bytes.len().min(PIPE_BUF);
        // SAFETY: one valid pollfd; the buffer is valid for the length, which is not above its own.
        let written = unsafe {
            match libc::poll(&mut poll, 1, patience.as_millis() as i32) {
                0 => return false,
                n if n < 0 => -1,
                _ => libc::write(libc::STDERR_FILENO, bytes.as_ptr().cast(), len),
            }
        };
        match usize::try_from(written) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(_) => match io::Error::last_os_error().kind() {
                ErrorKind::Interrupted => {}
                // The caller made it non-blocking.
                ErrorKind::WouldBlock => return false,
                _ => return true,
            },
        }
    }
    true
}

/// Appends `text` without the control characters that would do something to a terminal, which a file
/// may have in its name. Line ends stay if `lines` says so.
pub fn push_printable(to: &mut String, text: &str, lines: bool) {
    for char in text.chars() {
        if char.is_control() && !(lines && char == '\n') {
            to.extend(char.escape_default());
        } else {
            to.push(char);
        }
    }
}

/// `text` as [`push_printable`] has it, with line ends.
pub fn printable(value: &dyn std::fmt::Display) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "{value}");
    if text.chars().any(|char| char.is_control() && char != '\n') {
        let mut clean = String::with_capacity(text.len() + 16);
        push_printable(&mut clean, &text, true);
        return clean;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_not_obeyed() {
        assert_eq!(printable(&"a\u{1b}[2J\r\u{9b}\nä"), "a\\u{1b}[2J\\r\\u{9b}\nä");
        let mut line = String::new();
        push_printable(&mut line, "a\nhint: b", false);
        assert_eq!(line, "a\\nhint: b");
    }
}
