//! The host side of the guest's console: output that never stalls the machine's control, and where
//! input comes from.
//!
//! A vCPU (or a console worker) puts bytes into a bounded [`Output`] buffer; `main` writes them
//! out. When nobody reads the other end the buffer fills, and the *writing* vCPU waits: a guest
//! that floods its console is slowed to the speed of its reader, and neither memory grows nor is
//! output lost. A vCPU that is told to pause or stop does not wait.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes that may wait for the reader before the guest has to.
const CAPACITY: usize = 64 * 1024;

/// How long a full buffer makes a vCPU wait before it looks at its orders again.
const PATIENCE: Duration = Duration::from_millis(10);

/// Bytes on their way from the guest to the host's side of the console.
#[derive(Debug)]
pub struct Output {
    state: Mutex<VecDeque<u8>>,
    room: Condvar,
    event: EventFd,
}

impl Output {
    /// An empty buffer.
    ///
    /// # Errors
    /// The host refused an event descriptor.
    pub fn new() -> io::Result<Output> {
        Ok(Output {
            state: Mutex::new(VecDeque::new()),
            room: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // A panic while holding the lock leaves a valid queue of bytes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `byte`; while the buffer is full, waits for room as long as `may_wait` says so. The
    /// byte is dropped if it may not wait. Returns true if the buffer was empty.
    pub fn push(&self, byte: u8, may_wait: impl Fn() -> bool) -> bool {
        let mut state = self.lock();
        while state.len() >= CAPACITY {
            if !may_wait() {
                return false;
            }
            state = self
                .room
                .wait_timeout(state, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let first = state.is_empty();
        state.push_back(byte);
        drop(state);
        if first {
            // Fails only when the counter is full, and then it is signalled.
            let _ = self.event.write(1);
        }
        first
    }

    /// Signalled when bytes came into an empty buffer.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Writes what is there to `sink`. Returns true if the buffer is empty now, false if `sink`
    /// takes no more at present.
    ///
    /// # Errors
    /// The sink failed (its reader is gone, the disk is full); the bytes are kept.
    pub fn drain(&self, sink: &mut Sink) -> io::Result<bool> {
        let mut chunk = [0; 4096];
        loop {
            let len = {
                let state = self.lock();
                let (head, tail) = state.as_slices();
                let head_len = head.len().min(chunk.len());
                chunk[..head_len].copy_from_slice(&head[..head_len]);
                let tail_len = tail.len().min(chunk.len() - head_len);
                chunk[head_len..head_len + tail_len].copy_from_slice(&tail[..tail_len]);
                head_len + tail_len
            };
            if len == 0 {
                return Ok(true);
            }
            match sink.write(&chunk[..len])? {
                0 => return Ok(false),
                written => {
                    self.lock().drain(..written);
                    self.room.notify_all();
                }
            }
        }
    }

    /// Throws away what is there, when there is nobody to read it any more.
    pub fn discard(&self) {
        self.lock().clear();
        self.room.notify_all();
    }
}

/// Where console output goes. Writes never block.
#[derive(Debug)]
pub enum Sink {
    /// A regular file; or a pipe or terminal, opened anew so that "non-blocking" is this process's
    /// alone: the flag belongs to the open file description, which a shell would share.
    File(File),
    /// A socket, which cannot be opened anew; each write says that it does not want to wait.
    Socket(OwnedFd),
    /// Nowhere.
    Null,
}

impl Sink {
    /// A sink for an inherited descriptor such as standard output.
    ///
    /// # Errors
    /// The descriptor is closed.
    pub fn for_fd(fd: BorrowedFd<'_>) -> io::Result<Sink> {
        let inherited = File::from(fd.try_clone_to_owned()?);
        let kind = inherited.metadata()?.file_type();
        // A regular file never makes a writer wait, and its offset is shared on purpose.
        if kind.is_file() {
            return Ok(Sink::File(inherited));
        }
        if kind.is_socket() {
            return Ok(Sink::Socket(inherited.into()));
        }
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        OpenOptions::new().write(true).custom_flags(flags).open(&path).map(Sink::File)
    }

    /// A sink that creates or empties the file at `path`.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn create(path: &std::path::Path) -> io::Result<Sink> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map(Sink::File)
    }

    /// The descriptor to wait at when it takes no more; `None` if it always takes.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Sink::File(file) => Some(file.as_raw_fd()),
            Sink::Socket(socket) => Some(socket.as_raw_fd()),
            Sink::Null => None,
        }
    }

    /// Writes some of `bytes`. 0 means that it takes nothing at present.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Sink::File(file) => file.write(bytes),
                Sink::Socket(socket) => {
                    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                    // SAFETY: the buffer is valid for its length.
                    let sent = unsafe {
                        libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags)
                    };
                    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
                }
                Sink::Null => Ok(bytes.len()),
            };
            match result {
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(0),
                other => return other,
            }
        }
    }
}

/// What the user's side makes of bytes that were typed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Filtered {
    /// Bytes for the guest.
    pub bytes: Vec<u8>,
    /// Bytes for the user, e.g. a help text.
    pub reply: Vec<u8>,
    /// The user wants the machine gone.
    pub quit: bool,
}

/// Turns typed bytes into what is meant by them (escape sequences).
pub type InputFilter = Box<dyn FnMut(&[u8]) -> Filtered + Send>;

/// The host side of a console.
pub struct Console {
    /// Where output goes.
    pub sink: Sink,
    /// Where input comes from.
    pub input: Option<OwnedFd>,
    /// What is done with input first.
    pub filter: InputFilter,
}

impl Console {
    /// A console that shows nothing and has no input.
    pub fn off() -> Console {
        Console { sink: Sink::Null, input: None, filter: Box::new(plain) }
    }
}

/// Columns and rows of the terminal at `fd`, if it is one and knows.
pub fn window_size(fd: RawFd) -> Option<(u16, u16)> {
    // SAFETY: winsize is plain data, and TIOCGWINSZ fills exactly one.
    let (result, size) = unsafe {
        let mut size: libc::winsize = std::mem::zeroed();
        (libc::ioctl(fd, libc::TIOCGWINSZ, &mut size), size)
    };
    (result == 0 && size.ws_col > 0).then_some((size.ws_col, size.ws_row))
}

/// A filter that passes everything on.
pub fn plain(bytes: &[u8]) -> Filtered {
    Filtered { bytes: bytes.to_vec(), ..Filtered::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::sync::Arc;

    #[test]
    fn bytes_come_out_in_order_through_a_pipe() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut sink = Sink::for_fd(writer.as_fd()).unwrap();
        drop(writer);
        let output = Output::new().unwrap();
        for byte in b"hello" {
            output.push(*byte, || true);
        }
        assert!(output.drain(&mut sink).unwrap());
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn a_reader_that_does_not_read_neither_blocks_nor_loses_bytes() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut sink = Sink::for_fd(writer.as_fd()).unwrap();
        drop(writer);
        let output = Arc::new(Output::new().unwrap());
        let producer = {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                for n in 0..300_000u32 {
                    output.push(n as u8, || true);
                }
            })
        };
        while output.drain(&mut sink).unwrap() {
            std::thread::yield_now();
        }
        assert!(output.lock().len() <= CAPACITY);
        let consumer = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        while !producer.is_finished() || !output.lock().is_empty() {
            output.drain(&mut sink).unwrap();
            std::thread::yield_now();
        }
        drop(sink);
        let all = consumer.join().unwrap();
        assert_eq!(all.len(), 300_000);
        assert!(all.iter().zip(0u32..).all(|(&byte, n)| byte == n as u8));
    }

    #[test]
    fn a_full_buffer_drops_when_waiting_is_not_allowed() {
        let output = Output::new().unwrap();
        for _ in 0..CAPACITY + 10 {
            output.push(b'x', || false);
        }
        assert_eq!(output.lock().len(), CAPACITY);
    }

    #[test]
    fn a_regular_file_shares_its_offset() {
        let mut file = tempfile::tempfile().unwrap();
        let mut sink = Sink::for_fd(file.as_fd()).unwrap();
        let output = Output::new().unwrap();
        output.push(b'a', || true);
        output.drain(&mut sink).unwrap();
        file.write_all(b"b").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "ab");
    }

    #[test]
    fn the_inherited_description_stays_blocking() {
        let (_reader, writer) = io::pipe().unwrap();
        let _sink = Sink::for_fd(writer.as_fd()).unwrap();
        // SAFETY: F_GETFL has no memory arguments.
        let flags = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }
}
