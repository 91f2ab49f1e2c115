//! The host side of the guest's console: output that never stalls the machine's control, and where
//! input comes from.
//!
//! A vCPU (or a console worker) puts bytes into a bounded [`Output`] buffer. A whole line is written
//! out by whoever completed it, so that a busy console costs one system call a line and wakes
//! nobody; what stays without a line end (a prompt) is written by `main` a moment later. The sink
//! never blocks: when its reader is slow, `main` waits for it to take more. When nobody reads at
//! all the buffer fills, and the *writing* vCPU waits: a guest that floods its console is slowed to
//! the speed of its reader, and neither memory grows nor is output lost. A vCPU that is told to
//! pause or stop does not wait. A rate limit works as a slow reader does, unless what is over it is to be
//! dropped.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::files;
use crate::metrics::OutputMetrics;
use devices::rate::RateLimiter;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// Bytes that may wait for the reader before the guest has to.
const CAPACITY: usize = 64 * 1024;

/// How long a full buffer makes a vCPU wait before it looks at its orders again.
const PATIENCE: Duration = Duration::from_millis(10);

/// How long an unfinished line may wait to be written.
const LINE_DELAY: Duration = Duration::from_millis(2);

/// Unfinished lines are written at once when they get this long, in bytes.
const LONG_LINE: usize = 512;

/// Bytes on their way from the guest to the host's side of the console.
#[derive(Debug)]
pub struct Output {
    state: Mutex<State>,
    room: Condvar,
    event: EventFd,
    timer: RawFd,
    metrics: Arc<OutputMetrics>,
}

#[derive(Debug)]
struct State {
    bytes: VecDeque<u8>,
    sink: Sink,
    /// The sink takes nothing at present; `main` waits for it.
    blocked: bool,
    /// The timer runs, and `main` will write what is there when it expires.
    armed: bool,
    timer: TimerFd,
    limit: Option<RateLimiter>,
    /// The limit is reached, and nothing is written before the timer expires.
    limited: bool,
    /// Nobody waits for the limit: what comes while it is reached is dropped.
    drops: bool,
    /// Why the sink was given up, until somebody asks.
    error: Option<io::Error>,
}

impl Output {
    /// An empty buffer that leads nowhere yet.
    ///
    /// # Errors
    /// The host refused an event or timer descriptor.
    pub fn new() -> io::Result<Output> {
        let timer = TimerFd::new()?;
        Ok(Output {
            timer: timer.as_raw_fd(),
            state: Mutex::new(State {
                bytes: VecDeque::new(),
                sink: Sink::Null,
                blocked: false,
                armed: false,
                timer,
                limit: None,
                limited: false,
                drops: false,
                error: None,
            }),
            room: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            metrics: Arc::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while holding the lock leaves a valid queue of bytes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what comes from now on, and what is there, to `sink`.
    pub fn set_sink(&self, sink: Sink) {
        let mut state = self.lock();
        state.sink = sink;
        state.blocked = false;
    }

    /// Limits what is written from now on: bytes, and system calls as operations. Takes an earlier
    /// limit away.
    pub fn set_limit(&self, limit: Option<RateLimiter>) {
        let mut state = self.lock();
        state.limit = limit;
        if std::mem::take(&mut state.limited) {
            self.flush(&mut state);
        }
    }

    /// Whether what is over the limit is dropped; otherwise the guest waits.
    pub fn set_drops(&self, drops: bool) {
        self.lock().drops = drops;
    }

    /// What is counted.
    pub fn metrics(&self) -> &Arc<OutputMetrics> {
        &self.metrics
    }

    /// Whether `len` bytes are dropped, which are counted then.
    fn dropped(&self, state: &State, len: usize) -> bool {
        let dropped = state.limited && state.drops;
        if dropped {
            self.metrics.rate_limiter_dropped_bytes.add(len as u64);
        }
        dropped
    }

    /// Adds `byte`; while the buffer is full, waits for room as long as `may_wait` says so. If it may
    /// not, the byte goes on top: the guest has written it, and will not write it again after a
    /// pause. A vCPU that may not wait brings no more than one exit's bytes.
    pub fn push(&self, byte: u8, may_wait: impl Fn() -> bool) {
        let mut state = self.lock();
        if self.dropped(&state, 1) {
            return;
        }
        while state.bytes.len() >= CAPACITY && may_wait() {
            state =
                self.room.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.bytes.push_back(byte);
        self.written(&mut state, byte == b'\n');
    }

    /// Adds as many of `bytes` as there is room for; returns how many.
    pub fn push_some(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        if self.dropped(&state, bytes.len()) {
            return bytes.len();
        }
        let room = CAPACITY.saturating_sub(state.bytes.len()).min(bytes.len());
        state.bytes.extend(&bytes[..room]);
        if room > 0 {
            self.written(&mut state, bytes[..room].contains(&b'\n'));
        }
        room
    }

    /// Sees to it that new bytes are written: now, or in a moment.
    fn written(&self, state: &mut State, line_end: bool) {
        if state.blocked || state.limited {
            // `main` goes on when the sink takes more, or the limit.
        } else if line_end || state.bytes.len() >= LONG_LINE {
            self.flush(state);
        } else if !state.armed {
            state.armed = state.timer.reset(LINE_DELAY, None).is_ok();
        }
    }

    /// Writes as much as the sink takes.
    fn flush(&self, state: &mut State) {
        while !state.bytes.is_empty() {
            let (mut bytes, _) = state.bytes.as_slices();
            if let Some(limit) = &state.limit {
                match limit.allowance(Instant::now()) {
                    Ok(most) => {
                        let most = usize::try_from(most).unwrap_or(usize::MAX);
                        bytes = &bytes[..bytes.len().min(most)];
                    }
                    Err(wait) => {
                        state.armed = state.timer.reset(wait, None).is_ok();
                        state.limited = state.armed;
                        return;
                    }
                }
            }
            match state.sink.write(bytes) {
                Ok(0) => {
                    state.blocked = true;
                    // Fails only when the counter is full, and then it is signalled.
                    let _ = self.event.write(1);
                    return;
                }
                Ok(written) => {
                    if let Some(limit) = &state.limit {
                        limit.charge(written as u64);
                    }
                    state.bytes.drain(..written);
                    self.room.notify_all();
                }
                Err(err) => {
                    state.sink = Sink::Null;
                    state.error = Some(err);
                    let _ = self.event.write(1);
                }
            }
        }
        if let Some(limit) = &state.limit {
            limit.idle();
        }
    }

    /// Signalled when the sink takes no more, or is given up.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Readable when an unfinished line is to be written.
    pub fn timer(&self) -> RawFd {
        self.timer
    }

    /// Writes what is there. Returns the descriptor to wait at if the sink takes no more at
    /// present, and why the sink was given up if that is news.
    pub fn drain(&self) -> (Option<RawFd>, Option<io::Error>) {
        let mut state = self.lock();
        state.armed = false;
        state.blocked = false;
        state.limited = false;
        self.flush(&mut state);
        let wait = if state.blocked { state.sink.fd() } else { None };
        (wait, state.error.take())
    }
}

/// Where console output goes. Writes never block.
#[derive(Debug)]
pub enum Sink {
    /// A regular file; or a pipe or terminal, opened anew so that "non-blocking" is this process's
    /// alone: the flag belongs to the open file description, which a shell would share.
    File(File),
    /// A pipe or terminal of another user's, which may be written and not opened anew. Room for a
    /// little is looked for before each write; somebody else who writes may take it first.
    Shared(File),
    /// A socket, which cannot be opened anew; each write says that it does not want to wait.
    Socket(OwnedFd),
    /// Nowhere.
    Null,
}

/// What a pipe or terminal takes at once when it says that it is writable.
const LITTLE: usize = 512;

fn has_room(file: &File) -> bool {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one valid pollfd. What is an error shows at the write.
    unsafe { libc::poll(&mut poll, 1, 0) != 0 }
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
        match OpenOptions::new().write(true).custom_flags(flags).open(&path) {
            // After `su`, say.
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                Ok(Sink::Shared(inherited))
            }
            file => file.map(Sink::File),
        }
    }

    /// A sink that creates the file at `path`, which is none of the files `used`, and writes behind
    /// what is there, or empties it first with `truncate`. A regular file is locked (flock) for as
    /// long as it is open.
    ///
    /// # Errors
    /// The file is one of those, another machine writes to it, or it cannot be opened. It is as it was
    /// then.
    pub fn create<'a>(
        path: &Path,
        used: impl IntoIterator<Item = &'a Path>,
        truncate: bool,
    ) -> io::Result<Sink> {
        if let Some(this) = files::identity(path)
            && used.into_iter().any(|path| files::identity(path) == Some(this))
        {
            return Err(io::Error::other("the machine uses it for something else"));
        }
        let mut options = OpenOptions::new();
        options.append(true).create(true);
        if std::fs::metadata(path).is_ok_and(|file| file.file_type().is_fifo()) {
            // A pipe that nobody reads yet cannot be opened otherwise without waiting.
            options.read(true);
        }
        let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        if file.metadata()?.is_file() {
            // SAFETY: flock has no memory arguments.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
                return Err(io::Error::other("another machine writes to it"));
            }
            if truncate {
                file.set_len(0)?;
            }
        }
        Ok(Sink::File(file))
    }

    /// The descriptor to wait at when it takes no more; `None` if it always takes.
    pub fn fd(&self) -> Option<RawFd> {
        match self {
            Sink::File(file) | Sink::Shared(file) => Some(file.as_raw_fd()),
            Sink::Socket(socket) => Some(socket.as_raw_fd()),
            Sink::Null => None,
        }
    }

    /// Writes some of `bytes`. 0 means that it takes nothing at present.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Sink::File(file) => file.write(bytes),
                Sink::Shared(file) if has_room(file) => {
                    file.write(&bytes[..bytes.len().min(LITTLE)])
                }
                Sink::Shared(_) => return Ok(0),
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
    /// A person types: what a guest does not take is dropped in the end, so that the filter goes on
    /// seeing what is meant for it. Otherwise the input is read no faster than the guest takes it.
    pub typed: bool,
}

impl Console {
    /// A console that shows nothing and has no input.
    pub fn off() -> Console {
        Console { sink: Sink::Null, input: None, filter: Box::new(plain), typed: false }
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

    /// An output to a new pipe, and the end to read from.
    fn piped() -> (Output, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::new().unwrap();
        output.set_sink(Sink::for_fd(writer.as_fd()).unwrap());
        (output, reader)
    }

    fn readable(fd: RawFd, millis: i32) -> bool {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&mut poll, 1, millis) == 1 }
    }

    #[test]
    fn a_line_is_written_at_once_and_the_rest_when_the_timer_expires() {
        let (output, mut reader) = piped();
        for byte in b"line\n$ " {
            output.push(*byte, || true);
        }
        let mut bytes = [0; 16];
        assert_eq!(reader.read(&mut bytes).unwrap(), 5);
        assert!(readable(output.timer(), 10_000), "the timer was not armed");
        assert!(matches!(output.drain(), (None, None)));
        assert_eq!(reader.read(&mut bytes).unwrap(), 2);
    }

    #[test]
    fn a_reader_that_does_not_read_neither_blocks_nor_loses_bytes() {
        let (output, mut reader) = piped();
        let output = Arc::new(output);
        let producer = {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                for n in 0..300_000u32 {
                    output.push(n as u8, || true);
                }
            })
        };
        // The pipe and the buffer fill up; the producer waits.
        assert!(readable(output.event().as_raw_fd(), 10_000));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!producer.is_finished());
        assert!(output.lock().bytes.len() <= CAPACITY);
        let consumer = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        while !producer.is_finished() || !output.lock().bytes.is_empty() {
            output.drain();
            std::thread::yield_now();
        }
        drop(Arc::into_inner(output));
        let all = consumer.join().unwrap();
        assert_eq!(all.len(), 300_000);
        assert!(all.iter().zip(0u32..).all(|(&byte, n)| byte == n as u8));
    }

    #[test]
    fn a_full_buffer_still_takes_what_may_not_wait() {
        let (output, _reader) = piped();
        output.lock().blocked = true;
        for _ in 0..CAPACITY + 10 {
            output.push(b'x', || false);
        }
        assert_eq!(output.lock().bytes.len(), CAPACITY + 10);
        assert_eq!(output.push_some(b"more"), 0);
    }

    #[test]
    fn a_limit_slows_output_down_and_loses_nothing() {
        use devices::rate::{Bucket, Limits};
        let (output, mut reader) = piped();
        let bucket = Bucket { size: 1000, one_time_burst: 0, refill_ms: 100 };
        let limits = Limits { bandwidth: Some(bucket), ops: None };
        let start = Instant::now();
        output.set_limit(RateLimiter::new(limits, start));
        let text: Vec<u8> = (0..4000).map(|n| n as u8).collect();
        assert_eq!(output.push_some(&text), text.len());
        let mut all: Vec<u8> = Vec::new();
        while all.len() < text.len() {
            let mut bytes = [0; 4096];
            let got = reader.read(&mut bytes).unwrap();
            all.extend(&bytes[..got]);
            if all.len() < text.len() {
                assert!(readable(output.timer(), 10_000), "nobody goes on writing");
                output.drain();
            }
        }
        // 1000 at once, the others in 100 ms each.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(299), "{took:?}");
        assert_eq!(all, text);
        // What is held back goes out when the limit does.
        output.push_some(&text);
        output.set_limit(None);
        assert_eq!(reader.read(&mut [0; 8192]).unwrap(), text.len());
    }

    #[test]
    fn what_is_over_the_limit_is_dropped_where_nobody_shall_wait() {
        use devices::rate::{Bucket, Limits};
        let (output, mut reader) = piped();
        let bucket = Bucket { size: 1000, one_time_burst: 0, refill_ms: 3_600_000 };
        let limits = Limits { bandwidth: Some(bucket), ops: None };
        output.set_limit(RateLimiter::new(limits, Instant::now()));
        output.set_drops(true);
        // The limit is seen when it is reached: what came with it waits.
        let text = [b'a'; 1500];
        assert_eq!(output.push_some(&text), text.len());
        assert_eq!(reader.read(&mut [0; 8192]).unwrap(), 1000);
        assert_eq!(output.push_some(&text), text.len());
        output.push(b'x', || panic!("waits"));
        let dropped = output.metrics().rate_limiter_dropped_bytes.get();
        assert_eq!((output.lock().bytes.len(), dropped), (500, 1501));
        output.set_limit(None);
        assert_eq!(reader.read(&mut [0; 8192]).unwrap(), 500);
    }

    #[test]
    fn a_reader_that_goes_away_is_reported_once_and_output_dropped() {
        let (output, reader) = piped();
        drop(reader);
        output.push_some(b"x\n");
        assert!(matches!(output.drain(), (None, Some(_))));
        output.push_some(b"y\n");
        assert!(matches!(output.drain(), (None, None)));
    }

    #[test]
    fn a_regular_file_shares_its_offset() {
        let mut file = tempfile::tempfile().unwrap();
        let output = Output::new().unwrap();
        output.set_sink(Sink::for_fd(file.as_fd()).unwrap());
        output.push(b'a', || true);
        output.drain();
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
