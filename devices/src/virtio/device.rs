//! The device contract: two halves, one way to start and stop a queue.
//!
//! A [`Device`] lives on the machine's control thread: what it is, what it offers, its
//! configuration space, its saved state. For each group of queues it makes a [`Worker`], which
//! exactly one io thread owns from then on. Neither contains a lock.
//!
//! ```text
//!                 Device::worker          Worker::start_queue
//!   DRIVER_OK ──────────────────> Worker ─────────────────────> popping
//!   resume, restore, fork ──────>   (the same)                     │ Worker::stop_queue
//!                                                                  v
//!   reset, pause, save, fork <── QueueState <── last token ─── draining
//! ```
//!
//! Stopping is asynchronous: a worker stops popping at once, and gives the [`QueueState`] back when
//! its last request is completed: directly, or later through [`Reactor::stopped`].

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use libc::iovec;
use serde_json::Value;

use super::Kind;
use super::balloon::BalloonStatus;
use super::blk::qcow2::Qcow2;
use super::blk::{Backing, Candidate};
use super::queue::{Queue, QueueError, QueueState};
use crate::metrics::Set;
use crate::rate::RateLimiter;

/// Saved state of a device: what it is, in which layout, and the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Whose state this is, e.g. "virtio-blk".
    pub kind: &'static str,
    /// Version of the layout of `bytes`.
    pub version: u16,
    /// The state in that layout.
    pub bytes: Vec<u8>,
}

/// Why saved state was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RestoreError {
    /// The payload is another device's, or of another version.
    #[error("state of {found_kind} version {found_version} given to {kind} version {version}")]
    Mismatch {
        /// The device that was asked to take it.
        kind: &'static str,
        /// The version it takes.
        version: u16,
        /// What the payload says it is.
        found_kind: String,
        /// The version that the payload says.
        found_version: u16,
    },
    /// The bytes are not a state that this version of the device could have saved.
    #[error("state of {kind} is not valid: {reason}")]
    Invalid {
        /// The device.
        kind: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
}

impl Payload {
    /// Checks that this payload is `kind`'s in `version` and returns its bytes.
    ///
    /// # Errors
    /// [`RestoreError::Mismatch`].
    pub fn expect(&self, kind: &'static str, version: u16) -> Result<&[u8], RestoreError> {
        if self.kind == kind && self.version == version {
            return Ok(&self.bytes);
        }
        Err(RestoreError::Mismatch {
            kind,
            version,
            found_kind: self.kind.to_owned(),
            found_version: self.version,
        })
    }
}

/// The control half of a virtio device.
pub trait Device: Send {
    /// Which device this is.
    fn kind(&self) -> Kind;

    /// Device-specific feature bits that are offered, beside
    /// [`features::TRANSPORT`](super::features::TRANSPORT).
    fn features(&self) -> u64 {
        0
    }

    /// Maximum size of each queue in descriptors, in the order of their indices.
    fn queues(&self) -> &[u16];

    /// Queues that one worker serves together; every index is in exactly one group.
    fn groups(&self) -> Vec<Range<u16>> {
        let count = u16::try_from(self.queues().len()).unwrap_or(u16::MAX);
        std::iter::once(0..count).collect()
    }

    /// Contents of the configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver wrote `data` at `offset` of the configuration space. Returns the new contents if
    /// they changed. Offsets and lengths are the guest's: anything may come.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) -> Option<Vec<u8>> {
        None
    }

    /// The user changed something, e.g. the size of a window. Returns the new contents of the
    /// configuration space if they changed; a running worker is told as well.
    fn update(&mut self, _message: &Message) -> Option<Vec<u8>> {
        None
    }

    /// Takes another back-end in place of its own. No worker runs then. Returns the new contents of the
    /// configuration space. Runs on the control thread, whose system calls are few.
    ///
    /// # Errors
    /// This device has no such back-end, or cannot have it; it keeps its own.
    fn replace(&mut self, back_end: BackEnd) -> Result<Vec<u8>, ReplaceError> {
        drop(back_end);
        Err("this kind of device has nothing that could be replaced".into())
    }

    /// What a disk has behind it. Only while no worker runs does nobody write to it.
    fn disk(&self) -> Option<&Arc<Backing>> {
        None
    }

    /// How the device stands, where there is something to be said.
    fn status(&self) -> Option<Status> {
        None
    }

    /// What the device counts.
    fn metrics(&self) -> Vec<Set> {
        Vec::new()
    }

    /// Makes the worker of the `group`th element of [`Device::groups`]; `negotiated` are the
    /// feature bits that driver and device agreed on.
    ///
    /// # Errors
    /// The host refused a resource; the device is then marked as needing a reset.
    fn worker(&mut self, group: usize, negotiated: u64) -> io::Result<Box<dyn Worker>>;

    /// The driver reset the device, whose workers are gone: what the driver had set through
    /// commands, beside the transport's registers, goes back to power-on.
    fn reset(&mut self) {}

    /// The machine ended, workers are gone: what others would take for a living one, e.g. a socket,
    /// goes. The device may not be dropped after this, since the process ends with it.
    fn end(&mut self) {}

    /// State that is neither configuration nor the transport's.
    fn save(&self) -> Payload;

    /// Takes a saved state.
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then unchanged.
    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError>;
}

/// The data half of a virtio device: serves its group's queues on one io thread.
///
/// No method may block: a call that could wait goes through [`Reactor::submit`], unless the device
/// has the thread to itself ([`Reactor::alone`]) and waits are short. None may loop for as long as a guest pleases: after about [`BATCH`] requests a worker says
/// [`Reactor::again`] and returns.
pub trait Worker: Send {
    /// Starts to serve queue `index`. What the driver made available before is taken as well: the
    /// io thread kicks each queue once after it started.
    fn start_queue(&mut self, index: u16, queue: Queue, reactor: &mut dyn Reactor);

    /// Stops popping from queue `index`. Returns its state if nothing of it is in flight, else
    /// calls [`Reactor::stopped`] after the last completion. An unknown index gives a default.
    fn stop_queue(&mut self, index: u16, reactor: &mut dyn Reactor) -> Option<QueueState>;

    /// The driver notified queue `index`, or it is to be looked at again.
    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor);

    /// A file descriptor that was registered with `token` is ready.
    fn on_event(&mut self, _token: u32, _reactor: &mut dyn Reactor) {}

    /// Operation `token` ended with a byte count or an error.
    fn on_completion(&mut self, _token: u64, _result: io::Result<u32>, _reactor: &mut dyn Reactor) {
    }

    /// What this worker submitted was started, and what had ended was handed to
    /// [`Worker::on_completion`]: the moment to tell the driver, and to submit more.
    fn on_settled(&mut self, _reactor: &mut dyn Reactor) {}

    /// The timer set by [`Reactor::set_timer`] expired.
    fn on_timer(&mut self, _reactor: &mut dyn Reactor) {}

    /// A message from the control half, e.g. a new window size.
    fn on_message(&mut self, _message: Message, _reactor: &mut dyn Reactor) {}
}

/// What a device may get in place of what it was made with.
#[derive(Debug)]
pub enum BackEnd {
    /// The file of a disk.
    Disk(Candidate),
    /// An image for a disk that has one.
    Image(Box<Qcow2>),
    /// What a disk goes on with that became the base of others.
    Frozen(Backing),
}

/// Why a device keeps its back-end.
pub type ReplaceError = Box<dyn std::error::Error + Send + Sync>;

/// Requests that a worker takes in a row before it lets the other workers of its thread run.
pub const BATCH: usize = 256;

/// What a device tells its worker while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The terminal has this size now.
    Resize {
        /// Characters per line.
        columns: u16,
        /// Lines.
        rows: u16,
    },
    /// Bytes for the guest's console.
    Input(Vec<u8>),
    /// So many pages of 4 KiB are to be in the balloon.
    BalloonTarget(u32),
    /// The guest is to be asked for statistics about its memory this often, and now; never if it is
    /// 0.
    StatisticsInterval(Duration),
    /// Another limit for requests, or none.
    RateLimit(Traffic, Option<RateLimiter>),
    /// What the metadata service of a network card has to say from now on.
    Metadata(Arc<Value>),
    /// Connections of a socket device are to be gone: its driver is to close them and to read its
    /// address again (virtio 1.3 § 5.10.6.7). A device that is restored does the same by itself.
    TransportReset,
    /// A socket device is to connect to a port of the guest.
    Call(Call),
}

/// A connection that this process wants to a port of the guest. What comes of it is as with a program
/// that asked for it on the device's socket: a line when the guest took it, or the end.
#[derive(Clone, Debug)]
pub struct Call {
    /// The port.
    pub port: u32,
    /// The device's end of a pair of stream sockets. Nothing that is done with it waits.
    pub socket: Arc<OwnedFd>,
    /// How long the guest may take to answer.
    pub patience: Duration,
}

impl PartialEq for Call {
    fn eq(&self, other: &Call) -> bool {
        Arc::ptr_eq(&self.socket, &other.socket)
    }
}

impl Eq for Call {}

/// What a device says about itself; see [`Device::status`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Of a balloon.
    Balloon(BalloonStatus),
}

/// What a rate limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// All requests of a device that makes no difference between them.
    All,
    /// What the guest receives through a network card.
    Received,
    /// What the guest sends.
    Sent,
}

/// Readiness that a worker waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Readable; edge-triggered: reported once each time it becomes so.
    Readable,
    /// Writable; edge-triggered.
    Writable,
    /// Readable, writable, or closed by its peer; edge-triggered, with one report for all.
    Both,
}

/// What an io thread offers the workers that it owns.
pub trait Reactor {
    /// Reports readiness of `fd` to [`Worker::on_event`] with `token` from now on.
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    fn watch(&mut self, fd: RawFd, token: u32, interest: Interest) -> io::Result<()>;

    /// Ends what [`Reactor::watch`] began. Must be called before `fd` is closed.
    fn unwatch(&mut self, fd: RawFd);

    /// Starts a file operation that may block; its end arrives at [`Worker::on_completion`].
    fn submit(&mut self, token: u64, operation: FileOperation);

    /// True if operations submitted together cost less than a system call each, and end at once
    /// where they need not wait: an io_uring.
    fn batches(&self) -> bool;

    /// True if no other device is served by this thread: a call that waits holds up nobody else.
    fn alone(&self) -> bool;

    /// Calls [`Worker::on_kick`] for queue `index` again after the others had their turn.
    fn again(&mut self, index: u16);

    /// Calls [`Worker::on_kick`] for queue `index` again after `delay`; replaces an earlier delay of
    /// this queue.
    fn later(&mut self, index: u16, delay: Duration);

    /// Calls [`Worker::on_timer`] after `delay`; replaces an earlier timer of this worker.
    fn set_timer(&mut self, delay: Duration);

    /// Queue `index` has nothing in flight any more and stopped in `state`.
    fn stopped(&mut self, index: u16, state: QueueState);

    /// `bytes` of the [`Message::Input`]s sent so far have been passed on to the guest, so that as
    /// many may follow.
    fn consumed(&mut self, bytes: usize);

    /// The driver broke the protocol: the device needs a reset.
    fn fault(&mut self, fault: Fault);
}

/// Why a device needs a reset.
#[derive(Debug)]
pub enum Fault {
    /// The ring of queue `.0` is broken.
    Queue(u16, QueueError),
    /// A request in queue `.0` is not one of this device type's.
    Request(u16, &'static str),
    /// The back-end failed in a way that no single request can report.
    Backend(io::Error),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Queue(index, err) => write!(f, "queue {index}: {err}"),
            Fault::Request(index, what) => write!(f, "queue {index}: {what}"),
            Fault::Backend(err) => write!(f, "back-end: {err}"),
        }
    }
}

/// A file operation on guest memory that may take its time.
#[derive(Debug)]
pub struct FileOperation {
    /// The file, which stays open until the operation ended.
    pub fd: RawFd,
    /// Byte offset in the file.
    pub offset: u64,
    /// What is to be done.
    pub action: Action,
}

/// Kinds of [`FileOperation`].
#[derive(Debug)]
pub enum Action {
    /// Read into the buffers.
    Read(IoVecs),
    /// Write the buffers.
    Write {
        /// What is written.
        bufs: IoVecs,
        /// The data is on the disk when the write ends (`RWF_DSYNC`).
        durable: bool,
    },
    /// fdatasync(2) of the whole file.
    Sync,
    /// fsync(2): its times are on the disk as well, or the names in a folder.
    SyncAll,
    /// fallocate(2) with this mode over this many bytes.
    Allocate {
        /// FALLOC_FL_* bits.
        mode: i32,
        /// Length in bytes.
        len: u64,
    },
    /// Whatever a library does, which waits as it likes; `fd` and `offset` mean nothing then.
    Call(Blocking),
}

/// A call that may wait, for a thread that has nothing else to do.
pub struct Blocking(Box<dyn FnOnce() -> io::Result<u32> + Send>);

impl Blocking {
    /// Wraps a call, which returns the bytes done. What it refers to lives for as long as it does.
    pub fn new(call: impl FnOnce() -> io::Result<u32> + Send + 'static) -> Blocking {
        Blocking(Box::new(call))
    }

    /// Makes the call.
    ///
    /// # Errors
    /// Its own.
    pub fn run(self) -> io::Result<u32> {
        (self.0)()
    }
}

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Blocking")
    }
}

/// Buffers in guest RAM, which stays mapped for as long as an operation runs: the worker that
/// submitted it holds the queue, and the queue holds the memory. Or constant bytes to be written.
#[derive(Debug)]
pub struct IoVecs(List);

// Most requests have one buffer, which needs no allocation.
#[derive(Debug)]
enum List {
    One(iovec),
    Many(Vec<iovec>),
}

// SAFETY: the pointers refer to guest RAM, valid in every thread of the process.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Copies the list (not the bytes) out of `buf`.
    #[inline]
    pub fn of(buf: &super::iobuf::IoBuf) -> IoVecs {
        match buf.iovecs() {
            &[one] => IoVecs(List::One(one)),
            many => IoVecs(List::Many(many.to_vec())),
        }
    }

    /// `len` bytes of `buf` behind its first `skip`; fewer if there are fewer.
    pub fn part(buf: &super::iobuf::IoBuf, skip: u64, len: u64) -> IoVecs {
        let (mut skip, mut len) = (skip as usize, len as usize);
        let mut list = Vec::new();
        for iov in buf.iovecs() {
            if skip >= iov.iov_len {
                skip -= iov.iov_len;
                continue;
            }
            let part = (iov.iov_len - skip).min(len);
            if part == 0 {
                break;
            }
            // SAFETY: skip is below the length of the buffer.
            let base = unsafe { iov.iov_base.cast::<u8>().add(skip) };
            list.push(iovec { iov_base: base.cast(), iov_len: part });
            len -= part;
            skip = 0;
        }
        match list[..] {
            [one] => IoVecs(List::One(one)),
            _ => IoVecs(List::Many(list)),
        }
    }

    /// Bytes of ours.
    ///
    /// # Safety
    /// They stay where they are until the operation ended, and are not touched meanwhile if it reads into them.
    pub unsafe fn of_bytes(bytes: &[u8]) -> IoVecs {
        let iov_base = bytes.as_ptr().cast_mut().cast();
        IoVecs(List::One(iovec { iov_base, iov_len: bytes.len() }))
    }

    /// `len` bytes of which each is 0: as many references to `zeroes` as that takes.
    pub fn repeat(zeroes: &'static [u8], len: u64) -> IoVecs {
        let mut rest = usize::try_from(len).unwrap_or(usize::MAX);
        let mut list = Vec::new();
        while rest > 0 {
            let part = rest.min(zeroes.len());
            list.push(iovec { iov_base: zeroes.as_ptr().cast_mut().cast(), iov_len: part });
            rest -= part;
        }
        IoVecs(List::Many(list))
    }

    /// The list.
    #[inline]
    pub fn as_slice(&self) -> &[iovec] {
        match &self.0 {
            List::One(one) => std::slice::from_ref(one),
            List::Many(many) => many,
        }
    }
}
