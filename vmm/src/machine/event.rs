//! What arrives at the control thread, and the channel that brings it.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::virtio::blk::Backing;
use devices::virtio::device::{BackEnd, Message, Status};
use vmm_sys_util::eventfd::EventFd;

use super::lifecycle::{Refusal, State};
use crate::hypervisor::Failure;
use crate::io::Report;
use crate::memory::Image;
use crate::snapshot::Part;

/// A request to a running machine.
#[derive(Debug)]
pub enum Command {
    /// What state is it in?
    Status,
    /// Park vCPUs, stop queues. Answered when nothing moves any more.
    Pause,
    /// Go on after a pause.
    Resume,
    /// Halt, and hand out what is needed to go on elsewhere. The machine stays paused, and does not even
    /// go on by [`Command::Resume`], until [`Command::Thaw`]: while its memory is written out it must not
    /// run.
    Freeze {
        /// Numbers of the registers to be saved ([`Hypervisor::msr_numbers`]).
        ///
        /// [`Hypervisor::msr_numbers`]: crate::hypervisor::Hypervisor::msr_numbers
        msrs: Arc<Vec<u32>>,
        /// Has room for one; it is sent before the command is answered.
        answer: mpsc::SyncSender<Frozen>,
    },
    /// What was handed out by [`Command::Freeze`] is not looked at any more. The machine goes on if it
    /// ran before and `resume` says so.
    Thaw {
        /// Go on.
        resume: bool,
        /// Names of disks that others stand on from now on, and what the machine has in their place.
        disks: Vec<(String, Backing)>,
    },
    /// Press the power button. Answered when the guest was told, not when it is off.
    PowerButton,
    /// Press Ctrl, Alt and Del on the guest's keyboard.
    CtrlAltDel,
    /// End the machine now, as if the power was cut.
    Quit,
    /// How does a device stand? It is sent to `answer` before the command is answered.
    DeviceStatus {
        /// The device's name.
        device: String,
        /// Has room for one.
        answer: mpsc::SyncSender<Status>,
    },
    /// Change something about a device, in any state.
    Update {
        /// Its name; the console's is `console`, whatever the guest sees.
        device: String,
        /// The change.
        message: Message,
    },
    /// Give a device another back-end, in any state. Answered when what was in flight on the old one
    /// is done and the new one is in its place.
    Replace {
        /// Its name.
        device: String,
        /// The back-end.
        back_end: BackEnd,
    },
}

/// A machine that does not move.
#[derive(Debug)]
pub struct Frozen {
    /// Its states.
    pub parts: Vec<Part>,
    /// Its memory.
    pub image: Image,
    /// Its disks by their names, which nobody writes meanwhile.
    pub disks: Vec<(String, Arc<Backing>)>,
    /// It ran before.
    pub was_running: bool,
}

/// The answer to a [`Command`]: the state after it, or why it was not done.
pub type Reply = Result<State, Refusal>;

/// Takes the answer; runs on the control thread and must not block.
pub type ReplyTo = Box<dyn FnOnce(Reply) + Send>;

/// Something for the control thread to do.
pub(super) enum Event {
    Command(Command, ReplyTo),
    /// The driver of a device set DRIVER_OK.
    Activate {
        device: usize,
    },
    /// The driver of a device reset it; the writing vCPU waits for the message.
    Reset {
        device: usize,
        done: mpsc::SyncSender<()>,
    },
    /// The driver of a device wrote its configuration space; the vCPU waits for the message, so
    /// that a guest cannot fill the channel.
    ConfigWrite {
        device: usize,
        offset: u64,
        data: Vec<u8>,
        done: mpsc::SyncSender<()>,
    },
    Io(Report),
    Vcpu {
        index: usize,
        event: VcpuEvent,
    },
}

/// What a vCPU thread reports.
#[derive(Debug)]
pub(super) enum VcpuEvent {
    PowerOff,
    Reset,
    TripleFault,
    /// The vCPU cannot go on; where it was, if that could be read.
    Failed {
        failure: Failure,
        rip: Option<u64>,
    },
    /// `KVM_RUN` failed.
    RunFailed(crate::hypervisor::HypervisorError),
    /// Out of the guest, with nothing of an exit left to be completed.
    Parked,
}

impl Event {
    /// A machine that is halted stays as it is by it.
    fn changes_nothing(&self) -> bool {
        match self {
            Event::Command(command, _) => matches!(
                command,
                Command::Status
                    | Command::DeviceStatus { .. }
                    | Command::Freeze { .. }
                    | Command::Thaw { resume: false, .. }
            ),
            Event::Vcpu { event, .. } => matches!(event, VcpuEvent::Parked),
            Event::Io(report) => matches!(report, Report::Stopped { .. }),
            Event::Activate { .. } | Event::Reset { .. } | Event::ConfigWrite { .. } => false,
        }
    }
}

/// The sending side of the control thread's channel.
#[derive(Clone)]
pub(super) struct Sender {
    queue: mpsc::Sender<Event>,
    wake: Arc<EventFd>,
    still: Arc<Still>,
}

/// How a machine that is halted stands.
#[derive(Default)]
struct Still {
    /// How often it may have become another.
    changes: AtomicU64,
    /// What somebody keeps as long as it does not.
    kept: Mutex<Option<Kept>>,
}

type Kept = Arc<dyn Any + Send + Sync>;

impl Still {
    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sender {
    pub(super) fn new(wake: Arc<EventFd>) -> (Sender, mpsc::Receiver<Event>) {
        let (queue, receiver) = mpsc::channel();
        (Sender { queue, wake, still: Arc::default() }, receiver)
    }

    /// Notes that a machine that is halted may not be as it was.
    pub(super) fn note_change(&self) {
        self.still.changes.fetch_add(1, Ordering::AcqRel);
        // Behind the count: what is kept with the old one is not kept any more.
        drop(self.still.kept().take());
    }

    /// Returns false if the control thread is gone.
    pub(super) fn send(&self, event: Event) -> bool {
        // Before anybody can see what comes of it.
        if !event.changes_nothing() {
            self.note_change();
        }
        self.queue.send(event).is_ok() && self.wake.write(1).is_ok()
    }
}

/// Sends commands to a machine from any thread.
#[derive(Clone)]
pub struct Handle(pub(super) Sender);

impl Handle {
    /// As long as this is the same number, a machine that was halted is as it was, and has not run.
    pub fn changes(&self) -> u64 {
        self.0.still.changes.load(Ordering::Acquire)
    }

    /// Keeps something of a machine that is halted as long as it is as it was when `changes` was looked at. It is
    /// dropped when the machine goes on, or may have become another.
    pub fn keep(&self, changes: u64, what: Arc<impl Any + Send + Sync>) {
        let mut kept = self.0.still.kept();
        if self.changes() == changes {
            *kept = Some(what);
        }
    }

    /// What is kept.
    pub fn kept<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        self.0.still.kept().clone()?.downcast().ok()
    }

    /// Sends `command`; `reply` gets the answer, or is dropped if the machine ends first.
    pub fn send(&self, command: Command, reply: ReplyTo) {
        self.0.send(Event::Command(command, reply));
    }

    /// Sends `command` and waits for the answer. Not for the control thread itself.
    ///
    /// # Errors
    /// The machine refused, or ended.
    pub fn call(&self, command: Command) -> Reply {
        let (sender, receiver) = mpsc::sync_channel(1);
        self.send(
            command,
            Box::new(move |reply| {
                let _ = sender.send(reply);
            }),
        );
        receiver.recv().unwrap_or(Err(Refusal::Gone("the command")))
    }
}
