//! io threads: each owns the virtio workers assigned to it and runs their event loop.
//!
//! ```text
//!   main ── Command ──> ┌ io thread ───────────────────────────────────┐
//!                       │ EventManager<Loop>                           │
//!   guest ─ ioeventfd ─>│   kick ────> worker.on_kick ──> irqfd ───────┼─> guest
//!   TAP, pipe ─────────>│   ready ───> worker.on_event                 │
//!   io_uring, pool ────>│   done ────> worker.on_completion            │
//!   main <── Report ────│   Stopped(states), Fault                     │
//!                       └──────────────────────────────────────────────┘
//! ```
//!
//! Descriptors are registered edge-triggered; a kick's eventfd is never read, which saves a system
//! call per kick.

mod engine;
mod event_loop;
mod linger;

use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::device::{Fault, Message, Worker};
use devices::virtio::queue::{Queue, QueueState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::seccomp::{self, ThreadKind};

/// Names a worker among all of a machine's: device index and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId {
    /// Index of the device in the machine.
    pub device: usize,
    /// Index of the queue group in the device.
    pub group: usize,
}

/// A queue that is about to run, and the event that its notifications arrive at.
pub struct StartedQueue {
    /// Index in the device.
    pub index: u16,
    /// The ring.
    pub queue: Queue,
    /// Signalled by the guest's notification.
    pub kick: Arc<EventFd>,
}

/// What `main` asks of an io thread.
pub enum Command {
    /// Take over a worker and start its queues.
    Start {
        /// Its name.
        id: WorkerId,
        /// The worker.
        worker: Box<dyn Worker>,
        /// Its queues.
        queues: Vec<StartedQueue>,
    },
    /// Stop all queues of a worker and drop it; answered by [`Report::Stopped`].
    Stop(WorkerId),
    /// Pass a message to a worker, if it runs.
    Message(WorkerId, Message),
    /// End the thread. Workers are dropped with it.
    Shutdown,
}

/// What an io thread tells `main`.
#[derive(Debug)]
pub enum Report {
    /// A worker is gone; its queues stopped in these states.
    Stopped {
        /// Its name.
        id: WorkerId,
        /// Index and state of each queue.
        queues: Vec<(u16, QueueState)>,
    },
    /// A worker passed input on to the guest.
    Consumed {
        /// Its name.
        id: WorkerId,
        /// How many bytes.
        bytes: usize,
    },
    /// A worker found that its device needs a reset. Its queues are not served until then.
    Fault {
        /// Its name.
        id: WorkerId,
        /// What happened.
        fault: Fault,
    },
}

/// Where reports go; called on the io thread.
pub type ReportSink = Box<dyn Fn(Report) + Send>;

/// What an io thread is started with.
pub struct Options {
    /// Position among the io threads, for its name.
    pub index: usize,
    /// The thread serves files: it gets an io_uring or a pool.
    pub files: bool,
    /// It serves a disk whose format a library reads: it gets a pool in any case.
    pub calls: bool,
    /// The thread serves a device that makes connections to programs of the host.
    pub sockets: bool,
    /// The thread serves one device only.
    pub alone: bool,
    /// Filter of the thread and its pool.
    pub seccomp: seccomp::Mode,
}

impl Options {
    fn kind(&self) -> ThreadKind {
        if self.sockets { ThreadKind::IoSockets } else { ThreadKind::Io }
    }
}

/// A running io thread. Dropping it ends the thread and waits for it.
pub struct IoThread {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Closed when the thread ends.
    ended: mpsc::Receiver<()>,
}

/// How long the end of a machine waits for an io thread: longer than that thread waits for what it
/// has under way.
const END_DEADLINE: Duration = Duration::from_secs(15);

impl IoThread {
    /// Starts a thread that reports to `reports`. Returns once it serves commands under its
    /// filter.
    ///
    /// # Errors
    /// The host refused the thread, an event descriptor or the filter.
    pub fn start(options: Options, reports: ReportSink) -> io::Result<IoThread> {
        let (commands, receiver) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let (ready, started) = mpsc::sync_channel(1);
        let (ending, ended) = mpsc::sync_channel(1);
        let loop_wake = Arc::clone(&wake);
        let thread = std::thread::Builder::new()
            .name(format!("io {}", options.index))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let _ending: mpsc::SyncSender<()> = ending;
                let result = event_loop::EventLoop::new(&options, receiver, loop_wake, reports)
                    .and_then(|event_loop| {
                        seccomp::apply(options.kind(), options.seccomp)?;
                        Ok(event_loop)
                    });
                match result {
                    Ok(event_loop) => {
                        let _ = ready.send(Ok(()));
                        event_loop.run();
                    }
                    Err(err) => {
                        let _ = ready.send(Err(err));
                    }
                }
            })?;
        let io_thread = IoThread { commands, wake, thread: Some(thread), ended };
        started.recv().map_err(|_| io::Error::other("io thread ended while starting"))??;
        Ok(io_thread)
    }

    /// Sends a command; the thread serves them in order.
    pub fn send(&self, command: Command) {
        // Both fail only after the thread ended, which only `drop` makes it do.
        let _ = self.commands.send(command);
        let _ = self.wake.write(1);
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.send(Command::Shutdown);
        // A device alone on its thread may be in a call to a file system that hangs.
        if self.ended.recv_timeout(END_DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::error!("an io thread does not end; what it waits for hangs");
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// True if this host gives a process an io_uring that can serve disks.
pub fn has_io_uring() -> bool {
    engine::has_io_uring()
}

/// Stack of Hull's own threads in bytes; only touched pages count.
pub(crate) const STACK_SIZE: usize = 256 * 1024;

/// What the event manager met with, as the system says it.
pub(crate) fn system_error(err: event_manager::Error) -> io::Error {
    match err {
        event_manager::Error::Epoll(errno) | event_manager::Error::EventFd(errno) => errno.into(),
        other => io::Error::other(other.to_string()),
    }
}
