//! The console's part of the control loop: output that vCPUs left behind, and what a person types.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use devices::virtio::device::Message;
use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;

use super::{Control, Source};
use crate::console::InputFilter;
use crate::machine::lifecycle::Ending;

/// How long the end of a machine waits for the reader of its console.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);

/// Bytes that may wait for the guest before no more are read.
const INPUT_CAPACITY: usize = 4096;

/// Bytes that a person may type (or paste) ahead of the guest. More is dropped, and the bell rings.
const TYPED_CAPACITY: usize = 1 << 20;

/// The bell of a terminal.
const BELL: &[u8] = b"\x07";

/// Typed bytes that a virtio console may hold before it has passed them on.
const CONSOLE_WINDOW: usize = 4096;

/// Where typed bytes are on their way to the guest, and what is waited for.
pub(super) struct ConsoleIo {
    input: Option<OwnedFd>,
    filter: InputFilter,
    by_hand: bool,
    typed: VecDeque<u8>,
    /// Bytes that the virtio console holds.
    held: usize,
    input_watched: bool,
    /// The sink's descriptor, while it is waited for.
    sink_watched: Option<RawFd>,
}

impl ConsoleIo {
    /// A console that is typed to on `input`, if at all; `by_hand` by a person.
    pub(super) fn new(input: Option<OwnedFd>, filter: InputFilter, by_hand: bool) -> ConsoleIo {
        ConsoleIo {
            input,
            filter,
            by_hand,
            typed: VecDeque::new(),
            held: 0,
            input_watched: false,
            sink_watched: None,
        }
    }

    /// True if no more is to be read until the guest took some.
    fn is_full(&self) -> bool {
        !self.by_hand && self.typed.len() >= INPUT_CAPACITY
    }

    /// Keeps `bytes` for the guest. Returns false if they are too many.
    fn keep(&mut self, bytes: Vec<u8>) -> bool {
        let fits = !self.by_hand || self.typed.len() + bytes.len() <= TYPED_CAPACITY;
        if fits {
            self.typed.extend(bytes);
        }
        fits
    }

    /// True if typed bytes wait for the guest.
    pub(super) fn has_typed(&self) -> bool {
        !self.typed.is_empty()
    }

    /// The virtio console passed `bytes` of what it held on.
    pub(super) fn consumed(&mut self, bytes: usize) {
        self.held = self.held.saturating_sub(bytes);
    }

    /// The virtio console was reset and holds nothing.
    pub(super) fn reset(&mut self) {
        self.held = 0;
    }
}

impl Control {
    pub(super) fn resize_console(&mut self) {
        let Some(input) = &self.console.input else { return };
        let Some((columns, rows)) = crate::console::window_size(input.as_raw_fd()) else { return };
        self.console_message(Message::Resize { columns, rows });
    }

    fn console_message(&mut self, message: Message) {
        let Some(device) = self.machine.control.console else { return };
        let Some(slot) = self.machine.slots.get_mut(device) else { return };
        slot.tell(device, &message, &self.machine.io);
    }

    /// Writes console output that was left to this thread, and waits for the sink if it is slow.
    pub(super) fn drain_output(&mut self, ops: &mut EventOps) {
        let (wait, error) = self.machine.control.output.drain();
        if let Some(err) = error {
            tracing::warn!(%err, "console output is not wanted any more and is dropped");
        }
        match (wait, self.console.sink_watched) {
            (Some(fd), None) => {
                let events = EventSet::OUT | EventSet::EDGE_TRIGGERED;
                let source = Source::SinkReady.pack();
                if ops.add(Events::with_data_raw(fd, source, events)).is_ok() {
                    self.console.sink_watched = Some(fd);
                }
            }
            (None, Some(fd)) => {
                let _ = ops.remove(Events::empty_raw(fd));
                self.console.sink_watched = None;
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }

    pub(super) fn watch_input(&mut self, ops: &mut EventOps) {
        let Some(input) = &self.console.input else { return };
        if self.console.input_watched || self.console.is_full() {
            return;
        }
        let fd = input.as_raw_fd();
        match ops.add(Events::with_data_raw(fd, Source::Input.pack(), EventSet::IN)) {
            Ok(()) => self.console.input_watched = true,
            // A regular file cannot be waited for; it can always be read. /dev/null likewise.
            Err(_) => self.read_input(EventSet::IN, ops),
        }
    }

    fn unwatch_input(&mut self, ops: &mut EventOps) {
        if let Some(input) = self.console.input.as_ref().filter(|_| self.console.input_watched) {
            let _ = ops.remove(Events::empty_raw(input.as_raw_fd()));
        }
        self.console.input_watched = false;
    }

    pub(super) fn read_input(&mut self, events: EventSet, ops: &mut EventOps) {
        let Some(input) = &self.console.input else { return };
        let mut bytes = [0; 1024];
        let read = if events.contains(EventSet::IN) {
            read_once(input.as_raw_fd(), &mut bytes)
        } else {
            // Hung up with nothing left to read.
            Ok(0)
        };
        match read {
            Ok(0) => {
                self.unwatch_input(ops);
                self.console.input = None;
            }
            Ok(len) => {
                let filtered = (self.console.filter)(&bytes[..len]);
                self.machine.control.output.push_some(&filtered.reply);
                if filtered.quit {
                    self.end_by_will(Ending::Quit);
                }
                if !self.console.keep(filtered.bytes) {
                    self.machine.control.output.push_some(BELL);
                }
                self.feed_input(ops);
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => {
                tracing::warn!(%err, "console input ended");
                self.unwatch_input(ops);
                self.console.input = None;
            }
        }
    }

    /// Passes typed bytes on as far as the guest takes them.
    pub(super) fn feed_input(&mut self, ops: &mut EventOps) {
        self.machine.shared.events.note_change();
        if let Some(device) = self.machine.control.console {
            let runs = self.machine.slots.get(device).is_some_and(|slot| !slot.running.is_empty());
            let room = if runs { CONSOLE_WINDOW.saturating_sub(self.console.held) } else { 0 };
            let bytes: Vec<u8> =
                self.console.typed.drain(..room.min(self.console.typed.len())).collect();
            if !bytes.is_empty() {
                self.console.held += bytes.len();
                self.console_message(Message::Input(bytes));
            }
        } else if let Some(serial) = &self.machine.control.serial {
            while !self.console.typed.is_empty() {
                let taken = serial.input(self.console.typed.make_contiguous());
                if taken == 0 {
                    break;
                }
                self.console.typed.drain(..taken);
            }
        } else {
            self.console.typed.clear();
        }
        if self.console.is_full() {
            self.unwatch_input(ops);
        } else {
            self.watch_input(ops);
        }
    }

    /// Writes out what the console still holds, as long as somebody reads it.
    pub(super) fn flush_output(&mut self) {
        self.machine.control.output.set_limit(None);
        let deadline = Instant::now() + FLUSH_DEADLINE;
        while let (Some(fd), _) = self.machine.control.output.drain() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("nobody reads the console; the rest of its output is lost");
                return;
            }
            let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
            // SAFETY: one valid pollfd.
            unsafe { libc::poll(&mut poll, 1, left.as_millis() as i32) };
        }
    }
}

/// One read(2), retried only when a signal interrupts it.
fn read_once(fd: RawFd, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the descriptor is borrowed for the call and not closed by it.
    let mut file = std::mem::ManuallyDrop::new(unsafe {
        <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd)
    });
    loop {
        match file.read(bytes) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}
