//! The event loop of one io thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use devices::virtio::device::{Fault, FileOperation, Interest, Reactor, Worker};
use devices::virtio::queue::QueueState;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::engine::{Completion, Engine, Origin};
use super::linger::Linger;
use super::{Command, Options, Report, ReportSink, StartedQueue, WorkerId, system_error};

/// What a ready descriptor is, packed into the 32 bits that epoll carries along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A command from `main`, or work put off by [`Reactor::again`].
    Wake,
    /// Operations ended.
    Engine,
    /// A worker's timer expired.
    Timer,
    /// Queue of the worker in a slot.
    Kick { slot: usize, queue: u16 },
    /// A descriptor that the worker in a slot waits for.
    Ready { slot: usize, token: u32 },
}

/// Events taken from the kernel at a time; the rest comes with the next look.
const READY_EVENTS: usize = 32;

const TOKEN_BITS: u32 = 12;
const TOKEN_MASK: u32 = (1 << TOKEN_BITS) - 1;
const KIND_SHIFT: u32 = 30;

impl Source {
    fn pack(self) -> u32 {
        let worker = |kind: u32, slot: usize, sub: u32| {
            kind << KIND_SHIFT | (slot as u32) << TOKEN_BITS | sub & TOKEN_MASK
        };
        match self {
            Source::Wake => 0,
            Source::Engine => 1,
            Source::Timer => 2,
            Source::Kick { slot, queue } => worker(1, slot, u32::from(queue)),
            Source::Ready { slot, token } => worker(2, slot, token),
        }
    }

    fn unpack(data: u32) -> Option<Source> {
        let slot = ((data & !(3 << KIND_SHIFT)) >> TOKEN_BITS) as usize;
        let sub = data & TOKEN_MASK;
        match (data >> KIND_SHIFT, sub) {
            (0, 0) => Some(Source::Wake),
            (0, 1) => Some(Source::Engine),
            (0, 2) => Some(Source::Timer),
            (1, _) => Some(Source::Kick { slot, queue: sub as u16 }),
            (2, _) => Some(Source::Ready { slot, token: sub }),
            _ => None,
        }
    }
}

/// A worker and what the loop knows of it.
struct Slot {
    id: WorkerId,
    // Out of the slot only while one of its methods runs.
    worker: Option<Box<dyn Worker>>,
    kicks: Vec<(u16, Arc<EventFd>)>,
    watched: Vec<RawFd>,
    /// Queues that have not reported their state since [`Command::Stop`].
    stopping: Option<Stopping>,
    /// Set by a fault: kicks are ignored until the device is reset.
    faulted: bool,
    /// Something was submitted or ended since [`Worker::on_settled`].
    unsettled: bool,
}

struct Stopping {
    waiting: Vec<u16>,
    states: Vec<(u16, QueueState)>,
}

/// Something that is to happen at a time.
struct Deadline {
    at: Instant,
    slot: usize,
    due: Due,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    /// [`Worker::on_timer`].
    Timer,
    /// [`Worker::on_kick`] of this queue.
    Kick(u16),
}

/// Everything a worker's reactor needs, apart from the workers.
struct Core {
    engine: Option<Engine>,
    wake: Arc<EventFd>,
    timer: TimerFd,
    deadlines: Vec<Deadline>,
    again: VecDeque<(usize, u16)>,
    reports: ReportSink,
    alone: bool,
}

/// The subscriber that serves all descriptors of an io thread.
pub(super) struct EventLoop {
    manager: EventManager<Loop>,
    id: event_manager::SubscriberId,
    linger: Linger,
}

struct Loop {
    commands: mpsc::Receiver<Command>,
    // Goes before the workers: its end waits for operations on their memory.
    core: Core,
    slots: Vec<Option<Slot>>,
    shutdown: bool,
}

impl EventLoop {
    pub(super) fn new(
        options: &Options,
        commands: mpsc::Receiver<Command>,
        wake: Arc<EventFd>,
        reports: ReportSink,
    ) -> io::Result<EventLoop> {
        let engine = options
            .files
            .then(|| Engine::new(options.index, options.calls, options.seccomp))
            .transpose()?;
        let core = Core {
            engine,
            wake,
            timer: TimerFd::new()?,
            deadlines: Vec::new(),
            again: VecDeque::new(),
            reports,
            alone: options.alone,
        };
        let mut manager = EventManager::new_with_capacity(READY_EVENTS).map_err(system_error)?;
        let id =
            manager.add_subscriber(Loop { commands, slots: Vec::new(), core, shutdown: false });
        Ok(EventLoop { manager, id, linger: Linger::new() })
    }

    /// Serves events until [`Command::Shutdown`].
    pub(super) fn run(mut self) {
        while self.manager.subscriber_mut(self.id).is_ok_and(|subscriber| !subscriber.shutdown) {
            match self.manager.run_with_timeout(self.linger.timeout()) {
                Ok(events) => self.linger.found(events, Instant::now()),
                Err(err) => {
                    tracing::error!(err = %err, "io thread cannot wait for events");
                    return;
                }
            }
        }
    }
}

impl MutEventSubscriber for Loop {
    fn init(&mut self, ops: &mut EventOps) {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let mut add = |fd, source: Source| {
            if let Err(err) = ops.add(Events::with_data_raw(fd, source.pack(), edge)) {
                tracing::error!(%err, ?source, "cannot watch");
                self.shutdown = true;
            }
        };
        add(self.core.wake.as_raw_fd(), Source::Wake);
        add(self.core.timer.as_raw_fd(), Source::Timer);
        for event in self.core.engine.iter().flat_map(Engine::events) {
            add(event, Source::Engine);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match Source::unpack(events.data()) {
            Some(Source::Wake) => {
                self.take_commands(ops);
                self.take_again(ops);
            }
            Some(Source::Engine) => {}
            Some(Source::Timer) => self.expire(ops),
            Some(Source::Kick { slot, queue }) => self.kick(slot, queue, ops),
            Some(Source::Ready { slot, token }) => {
                self.with(slot, ops, |worker, reactor| worker.on_event(token, reactor));
            }
            None => {}
        }
        self.settle(ops);
    }
}

impl Loop {
    /// Starts what workers submitted and hands out what has ended, which may submit more. Reads
    /// from the page cache end at once, so this loop usually runs twice.
    fn settle(&mut self, ops: &mut EventOps) {
        loop {
            let Some(engine) = &mut self.core.engine else { return };
            engine.flush();
            while let Some(Completion { origin, result }) =
                self.core.engine.as_mut().and_then(Engine::reap)
            {
                let Some(slot) = self.find(origin.worker) else { continue };
                self.with(slot, ops, |worker, reactor| {
                    worker.on_completion(origin.token, result, reactor);
                });
                if let Some(slot) = &mut self.slots[slot] {
                    slot.unsettled = true;
                }
            }
            let mut idle = true;
            for slot in 0..self.slots.len() {
                let entry = self.slots[slot].as_mut();
                if entry.is_some_and(|entry| std::mem::take(&mut entry.unsettled)) {
                    idle = false;
                    self.with(slot, ops, |worker, reactor| worker.on_settled(reactor));
                }
            }
            if idle {
                return;
            }
        }
    }

    fn find(&self, id: WorkerId) -> Option<usize> {
        self.slots.iter().position(|slot| slot.as_ref().is_some_and(|slot| slot.id == id))
    }

    /// Calls a method of the worker in `slot`, with a reactor of its own, and ends the worker if
    /// it was the last thing that it waited for.
    fn with<R>(
        &mut self,
        slot: usize,
        ops: &mut EventOps,
        call: impl FnOnce(&mut dyn Worker, &mut dyn Reactor) -> R,
    ) -> Option<R> {
        let entry = self.slots.get_mut(slot)?.as_mut()?;
        let mut worker = entry.worker.take()?;
        let mut reactor = SlotReactor { slot, entry, core: &mut self.core, ops };
        let result = call(worker.as_mut(), &mut reactor);
        entry.worker = Some(worker);
        self.finish_if_stopped(slot, ops);
        Some(result)
    }

    fn finish_if_stopped(&mut self, index: usize, ops: &mut EventOps) {
        let Some(place) = self.slots.get_mut(index) else { return };
        let done = place
            .as_ref()
            .and_then(|slot| slot.stopping.as_ref())
            .is_some_and(|stopping| stopping.waiting.is_empty());
        if !done {
            return;
        }
        let Some(slot) = place.take() else { return };
        for fd in slot.watched {
            let _ = ops.remove(Events::empty_raw(fd));
        }
        self.core.again.retain(|&(slot, _)| slot != index);
        self.core.deadlines.retain(|deadline| deadline.slot != index);
        let queues = slot.stopping.map(|stopping| stopping.states).unwrap_or_default();
        // The worker goes before the report: whoever gets it may close what the worker used.
        drop(slot.worker);
        (self.core.reports)(Report::Stopped { id: slot.id, queues });
    }

    fn take_commands(&mut self, ops: &mut EventOps) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start { id, worker, queues } => self.start(id, worker, queues, ops),
                Command::Stop(id) => self.stop(id, ops),
                Command::Message(id, message) => {
                    if let Some(slot) = self.find(id) {
                        self.with(slot, ops, |worker, reactor| {
                            worker.on_message(message, reactor);
                        });
                    }
                }
                Command::Shutdown => self.shutdown = true,
            }
        }
    }

    fn start(
        &mut self,
        id: WorkerId,
        worker: Box<dyn Worker>,
        queues: Vec<StartedQueue>,
        ops: &mut EventOps,
    ) {
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(Slot {
            id,
            worker: Some(worker),
            kicks: Vec::new(),
            watched: Vec::new(),
            stopping: None,
            faulted: false,
            unsettled: false,
        });
        let mut indices = Vec::new();
        for StartedQueue { index, queue, kick } in queues {
            indices.push(index);
            self.with(slot, ops, |worker, reactor| worker.start_queue(index, queue, reactor));
            let source = Source::Kick { slot, queue: index };
            let watched = ops.add(Events::with_data_raw(
                kick.as_raw_fd(),
                source.pack(),
                EventSet::IN | EventSet::EDGE_TRIGGERED,
            ));
            if let Some(entry) = &mut self.slots[slot] {
                entry.kicks.push((index, kick));
                if let Err(err) = watched {
                    entry.faulted = true;
                    let fault = Fault::Backend(system_error(err));
                    (self.core.reports)(Report::Fault { id, fault });
                }
            }
        }
        // Requests may have been made available before the queue was started.
        for index in indices {
            self.kick(slot, index, ops);
        }
    }

    fn stop(&mut self, id: WorkerId, ops: &mut EventOps) {
        let Some(slot) = self.find(id) else {
            (self.core.reports)(Report::Stopped { id, queues: Vec::new() });
            return;
        };
        let kicks = match &mut self.slots[slot] {
            Some(entry) => std::mem::take(&mut entry.kicks),
            None => return,
        };
        let waiting = kicks.iter().map(|&(index, _)| index).collect();
        if let Some(entry) = &mut self.slots[slot] {
            entry.stopping = Some(Stopping { waiting, states: Vec::new() });
        }
        for (index, kick) in &kicks {
            let _ = ops.remove(Events::empty_raw(kick.as_raw_fd()));
            let stop = |worker: &mut dyn Worker, reactor: &mut dyn Reactor| {
                if let Some(state) = worker.stop_queue(*index, reactor) {
                    reactor.stopped(*index, state);
                }
            };
            self.with(slot, ops, stop);
        }
        if kicks.is_empty() {
            self.finish_if_stopped(slot, ops);
        }
    }

    fn kick(&mut self, slot: usize, queue: u16, ops: &mut EventOps) {
        let ready = self.slots.get(slot).and_then(Option::as_ref);
        if ready.is_some_and(|entry| !entry.faulted && entry.stopping.is_none()) {
            self.with(slot, ops, |worker, reactor| worker.on_kick(queue, reactor));
        }
    }

    /// Runs what was put off once; what puts itself off again waits for the next turn.
    fn take_again(&mut self, ops: &mut EventOps) {
        for (slot, queue) in std::mem::take(&mut self.core.again) {
            self.kick(slot, queue, ops);
        }
    }

    fn expire(&mut self, ops: &mut EventOps) {
        let _ = self.core.timer.wait();
        let now = Instant::now();
        let due: Vec<Deadline> =
            self.core.deadlines.extract_if(.., |deadline| deadline.at <= now).collect();
        for Deadline { slot, due, .. } in due {
            match due {
                Due::Timer => {
                    self.with(slot, ops, |worker, reactor| worker.on_timer(reactor));
                }
                Due::Kick(queue) => self.kick(slot, queue, ops),
            }
        }
        self.core.arm();
    }
}

impl Core {
    /// Makes `due` happen to the worker in `slot` after `delay` and not when it was to happen before.
    fn set_deadline(&mut self, slot: usize, due: Due, delay: Duration) {
        self.deadlines.retain(|deadline| (deadline.slot, deadline.due) != (slot, due));
        self.deadlines.push(Deadline { at: Instant::now() + delay, slot, due });
        self.arm();
    }

    fn arm(&mut self) {
        let Some(next) = self.deadlines.iter().map(|deadline| deadline.at).min() else { return };
        // A duration of 0 would disarm the timer.
        let delay = next.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        let _ = self.timer.reset(delay, None);
    }
}

/// The io thread as the worker in `slot` sees it.
struct SlotReactor<'a, 'b> {
    slot: usize,
    entry: &'a mut Slot,
    core: &'a mut Core,
    ops: &'a mut EventOps<'b>,
}

impl Reactor for SlotReactor<'_, '_> {
    fn watch(&mut self, fd: RawFd, token: u32, interest: Interest) -> io::Result<()> {
        let set = match interest {
            Interest::Readable => EventSet::IN,
            Interest::Writable => EventSet::OUT,
            Interest::Both => EventSet::IN | EventSet::OUT,
        };
        let source = Source::Ready { slot: self.slot, token };
        self.ops
            .add(Events::with_data_raw(fd, source.pack(), set | EventSet::EDGE_TRIGGERED))
            .map_err(system_error)?;
        self.entry.watched.push(fd);
        Ok(())
    }

    fn unwatch(&mut self, fd: RawFd) {
        self.entry.watched.retain(|&watched| watched != fd);
        let _ = self.ops.remove(Events::empty_raw(fd));
    }

    fn submit(&mut self, token: u64, operation: FileOperation) {
        let origin = Origin { worker: self.entry.id, token };
        self.entry.unsettled = true;
        match &mut self.core.engine {
            Some(engine) => engine.submit(origin, operation),
            None => tracing::error!("a device without files submitted a file operation"),
        }
    }

    fn batches(&self) -> bool {
        self.core.engine.as_ref().is_some_and(Engine::batches)
    }

    fn alone(&self) -> bool {
        self.core.alone
    }

    fn again(&mut self, index: u16) {
        let entry = (self.slot, index);
        if !self.core.again.contains(&entry) {
            self.core.again.push_back(entry);
        }
        let _ = self.core.wake.write(1);
    }

    fn later(&mut self, index: u16, delay: Duration) {
        self.core.set_deadline(self.slot, Due::Kick(index), delay);
    }

    fn set_timer(&mut self, delay: Duration) {
        self.core.set_deadline(self.slot, Due::Timer, delay);
    }

    fn stopped(&mut self, index: u16, state: QueueState) {
        if let Some(stopping) = &mut self.entry.stopping {
            stopping.waiting.retain(|&waiting| waiting != index);
            stopping.states.push((index, state));
        }
    }

    fn consumed(&mut self, bytes: usize) {
        (self.core.reports)(Report::Consumed { id: self.entry.id, bytes });
    }

    fn fault(&mut self, fault: Fault) {
        if !std::mem::replace(&mut self.entry.faulted, true) {
            (self.core.reports)(Report::Fault { id: self.entry.id, fault });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::IoThread;
    use super::*;
    use crate::seccomp;
    use devices::virtio::device::Message;
    use devices::virtio::queue::Queue;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// Watches a socket with [`Interest::Both`] once it is told to, and says when it is called.
    struct Watcher {
        socket: UnixStream,
        called: mpsc::Sender<u32>,
    }

    impl Worker for Watcher {
        fn start_queue(&mut self, _: u16, _: Queue, _: &mut dyn Reactor) {}

        fn stop_queue(&mut self, _: u16, _: &mut dyn Reactor) -> Option<QueueState> {
            None
        }

        fn on_kick(&mut self, _: u16, _: &mut dyn Reactor) {}

        fn on_event(&mut self, token: u32, _: &mut dyn Reactor) {
            self.called.send(token).unwrap();
        }

        fn on_message(&mut self, _: Message, reactor: &mut dyn Reactor) {
            reactor.watch(self.socket.as_raw_fd(), 7, Interest::Both).unwrap();
        }
    }

    #[test]
    fn both_reports_room_data_and_the_end() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let options = Options {
            index: 0,
            files: false,
            calls: false,
            sockets: false,
            alone: false,
            seccomp: seccomp::Mode::Off,
        };
        let thread = IoThread::start(options, Box::new(|_| {})).unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut socket = theirs.try_clone().unwrap();
        while socket.write(&[0; 65536]).is_ok() {}
        let (called, calls) = mpsc::channel();
        let id = WorkerId { device: 0, group: 0 };
        let worker = Box::new(Watcher { socket: theirs, called });
        thread.send(Command::Start { id, worker, queues: Vec::new() });
        thread.send(Command::Message(id, Message::TransportReset));
        let quiet = Duration::from_millis(50);
        assert!(calls.recv_timeout(quiet).is_err(), "neither data nor room was there");
        let mut sink = vec![0; 4 << 20];
        assert!(ours.read(&mut sink).unwrap() > 0);
        ours.set_nonblocking(true).unwrap();
        while ours.read(&mut sink).is_ok() {}
        assert_eq!(calls.recv_timeout(PATIENCE), Ok(7), "room");
        while calls.recv_timeout(quiet).is_ok() {}
        ours.write_all(b"x").unwrap();
        assert_eq!(calls.recv_timeout(PATIENCE), Ok(7), "data");
        while calls.recv_timeout(quiet).is_ok() {}
        drop(ours);
        assert_eq!(calls.recv_timeout(PATIENCE), Ok(7), "the end");
        thread.send(Command::Stop(id));
    }

    #[test]
    fn sources_survive_packing() {
        for source in [
            Source::Wake,
            Source::Engine,
            Source::Timer,
            Source::Kick { slot: 0, queue: 0 },
            Source::Kick { slot: 200, queue: 255 },
            Source::Ready { slot: 17, token: 4095 },
        ] {
            assert_eq!(Source::unpack(source.pack()), Some(source));
        }
    }
}
