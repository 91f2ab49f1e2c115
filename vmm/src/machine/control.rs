//! The control loop: what the main thread does while a machine runs.
//!
//! It waits for events from vCPUs, io threads, signals, the console's reader and writer, and the
//! services of its caller. Nothing in here blocks, and nothing touches guest memory, with one
//! exception: when somebody wants to write the kernel file that the guest maps, the machine is
//! paused and the mapped pages are copied.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use devices::acpi::Event as AcpiEvent;
use devices::virtio::device::Message;
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::bus::{AcpiPort, SerialPort};
use super::event::{Command, Event, ReplyTo, VcpuEvent};
use super::lifecycle::{self, Ending, Refusal, State, Step};
use super::slot::Stopping;
use super::{Machine, RunError, RunOptions};
use crate::console::{InputFilter, Output};
use crate::io::{Command as IoCommand, Report, WorkerId};
use crate::seccomp::{self, ThreadKind};
use crate::signals::Meaning;
use crate::timings::Milestone;

/// How long a device may take to finish what is in flight when it is stopped.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// How long the end of a machine waits for the reader of its console.
const FLUSH_DEADLINE: Duration = Duration::from_secs(5);

/// Typed bytes that may wait for the guest before no more are read.
const INPUT_CAPACITY: usize = 4096;

/// Events taken from the kernel at a time; the rest comes with the next look.
const READY_EVENTS: usize = 16;

/// Typed bytes that a virtio console may hold before it has passed them on.
const CONSOLE_WINDOW: usize = 4096;

/// What assembly prepares for the control loop.
pub(super) struct Parts {
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) wake: Arc<EventFd>,
    /// One message per vCPU thread: under its filter, or why not.
    pub(super) vcpus_ready: mpsc::Receiver<io::Result<()>>,
    pub(super) output: Arc<Output>,
    pub(super) serial: Option<Arc<SerialPort>>,
    pub(super) acpi: Arc<AcpiPort>,
    /// Index of the virtio console, if there is one.
    pub(super) console: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Wake,
    Signals,
    Timer,
    Output,
    SinkReady,
    LineTimer,
    Input,
    InputDrained,
    Service(u32),
}

impl Source {
    fn pack(self) -> u32 {
        match self {
            Source::Wake => 0,
            Source::Signals => 1,
            Source::Timer => 2,
            Source::Output => 3,
            Source::SinkReady => 4,
            Source::Input => 5,
            Source::InputDrained => 6,
            Source::LineTimer => 7,
            Source::Service(n) => 8 + n,
        }
    }

    fn unpack(data: u32) -> Source {
        match data {
            0 => Source::Wake,
            1 => Source::Signals,
            2 => Source::Timer,
            3 => Source::Output,
            4 => Source::SinkReady,
            5 => Source::Input,
            6 => Source::InputDrained,
            7 => Source::LineTimer,
            n => Source::Service(n - 8),
        }
    }
}

/// A change of state under way.
enum Change {
    /// vCPUs are on their way out of the guest.
    ParkVcpus { parked: usize, then: Then },
    /// vCPUs are out; queues are draining.
    StopQueues { then: Then },
}

/// What a pause is for.
enum Then {
    /// Somebody asked for it.
    Reply(ReplyTo),
    /// The kernel file is given up; the machine goes on afterwards.
    ReleaseKernelFile,
}

struct Control {
    machine: Machine,
    input_fd: Option<OwnedFd>,
    filter: InputFilter,
    options: Services,
    state: State,
    change: Option<Change>,
    timer: TimerFd,
    input: VecDeque<u8>,
    /// Bytes that the virtio console holds.
    console_holds: usize,
    input_watched: bool,
    /// The sink's descriptor, while it is waited for.
    sink_watched: Option<RawFd>,
    kernel_file_wanted: bool,
    end: Option<Result<Ending, RunError>>,
}

struct Services {
    signals: Option<crate::signals::Signals>,
    services: Vec<Box<dyn super::Service>>,
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::Host { what, source }
}

impl Machine {
    /// Runs the machine on the calling thread until it ends.
    ///
    /// # Errors
    /// The guest or the host left it no way to go on. What the guest wrote to its console has been
    /// written out in either case.
    pub fn run(self, options: RunOptions) -> Result<Ending, RunError> {
        for _ in 0..self.vcpus.len() {
            match self.control.vcpus_ready.recv() {
                Ok(ready) => ready.map_err(host("cannot filter a vCPU thread"))?,
                Err(_) => {
                    return Err(host("a vCPU thread ended early")(io::ErrorKind::Other.into()));
                }
            }
        }
        let mut manager = EventManager::new_with_capacity(READY_EVENTS)
            .map_err(|err| host("cannot wait for events")(other(err)))?;
        let timer = TimerFd::new().map_err(|err| host("cannot make a timer")(err.into()))?;
        seccomp::apply(ThreadKind::Main, self.seccomp)
            .map_err(host("cannot filter the main thread"))?;
        self.control.output.set_sink(options.console.sink);
        let id = manager.add_subscriber(Control {
            machine: self,
            input_fd: options.console.input,
            filter: options.console.filter,
            options: Services { signals: options.signals, services: options.services },
            state: State::Configured,
            change: None,
            timer,
            input: VecDeque::new(),
            console_holds: 0,
            input_watched: false,
            sink_watched: None,
            kernel_file_wanted: false,
            end: None,
        });
        give_back_heap();
        if let Ok(control) = manager.subscriber_mut(id) {
            control.start();
        }
        loop {
            match manager.subscriber_mut(id) {
                Ok(control) if control.end.is_none() => {}
                _ => break,
            }
            if let Err(err) = manager.run() {
                return Err(host("cannot wait for events")(other(err)));
            }
        }
        let end = match manager.subscriber_mut(id) {
            Ok(control) => control.finish(),
            Err(err) => return Err(host("the control loop is gone")(other(err))),
        };
        if options.last {
            let _ = ManuallyDrop::new(manager);
        }
        end
    }
}

/// Returns what reading options and assembling the machine needed and freed: a machine runs for long
/// and is one of many.
fn give_back_heap() {
    // SAFETY: malloc_trim may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

fn other(err: event_manager::Error) -> io::Error {
    io::Error::other(err.to_string())
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let parts = &self.machine.control;
        let mut fds: Vec<(RawFd, Source, EventSet)> = vec![
            (parts.wake.as_raw_fd(), Source::Wake, EDGE),
            (self.timer.as_raw_fd(), Source::Timer, EDGE),
            (parts.output.event().as_raw_fd(), Source::Output, EDGE),
            (parts.output.timer(), Source::LineTimer, EDGE),
        ];
        if let Some(signals) = &self.options.signals {
            fds.push((signals.fd(), Source::Signals, EventSet::IN));
        }
        if let Some(serial) = &parts.serial {
            fds.push((serial.input_drained().as_raw_fd(), Source::InputDrained, EDGE));
        }
        for (n, service) in (0u32..).zip(&self.options.services) {
            fds.push((service.fd(), Source::Service(n), EventSet::IN));
        }
        for (fd, source, set) in fds {
            if let Err(err) = ops.add(Events::with_data_raw(fd, source.pack(), set)) {
                self.end = Some(Err(host("cannot wait for an event")(other(err))));
            }
        }
        self.watch_input(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match Source::unpack(events.data()) {
            Source::Wake => {
                self.take_events();
                // A console may have started, or passed on what it held.
                if !self.input.is_empty() {
                    self.feed_input(ops);
                }
            }
            Source::Signals => self.take_signals(),
            Source::Timer => self.check_deadlines(),
            Source::Output | Source::SinkReady | Source::LineTimer => self.drain_output(ops),
            Source::Input => self.read_input(events.event_set(), ops),
            Source::InputDrained => self.feed_input(ops),
            Source::Service(n) => {
                let handle = self.machine.handle();
                if let Some(service) = self.options.services.get_mut(n as usize) {
                    service.on_ready(&handle);
                }
            }
        }
    }
}

/// Event descriptors are never read: each signal is an edge.
const EDGE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

impl Control {
    fn start(&mut self) {
        if lifecycle::check(&self.state, Step::Start).is_ok() {
            self.state = State::Running;
            for vcpu in &self.machine.vcpus {
                vcpu.run();
            }
        }
    }

    fn take_events(&mut self) {
        while let Ok(event) = self.machine.control.events.try_recv() {
            match event {
                Event::Command(command, reply) => self.execute(command, reply),
                Event::Activate { device } => self.activate(device),
                Event::Reset { device, done } => self.reset(device, done),
                Event::ConfigWrite { device, offset, data, done } => {
                    if let Some(slot) = self.machine.slots.get_mut(device)
                        && let Some(config) = slot.device.write_config(offset, &data)
                    {
                        slot.transport.publish_config(config);
                    }
                    let _ = done.send(());
                }
                Event::Io(report) => self.take_report(report),
                Event::Vcpu { index, event } => self.take_vcpu_event(index, event),
            }
        }
    }

    fn execute(&mut self, command: Command, reply: ReplyTo) {
        let step = match command {
            Command::Status => return reply(Ok(self.state.clone())),
            Command::Quit => {
                self.end_by_will(Ending::Quit);
                return reply(Ok(State::Stopped));
            }
            Command::Pause => Step::Pause,
            Command::Resume => Step::Resume,
            Command::PowerButton => Step::PowerButton,
        };
        if let Err(refusal) = lifecycle::check(&self.state, step) {
            return reply(Err(refusal));
        }
        if self.change.is_some() {
            let step = match step {
                Step::Pause => "pause",
                Step::Resume => "resume",
                _ => "power-button",
            };
            return reply(Err(Refusal::Busy { step, under_way: "pause" }));
        }
        match command {
            Command::Pause => self.pause(Then::Reply(reply)),
            Command::Resume => {
                self.resume();
                reply(Ok(self.state.clone()));
            }
            _ => {
                self.machine.control.acpi.raise(AcpiEvent::PowerButton);
                reply(Ok(self.state.clone()));
            }
        }
    }

    /// Ends the machine because somebody outside wants it. A guest's reset that came just before
    /// does not count: the machine must not start over.
    fn end_by_will(&mut self, ending: Ending) {
        if matches!(self.end, None | Some(Ok(Ending::Reset))) {
            self.end = Some(Ok(ending));
        }
    }

    fn pause(&mut self, then: Then) {
        for vcpu in &self.machine.vcpus {
            vcpu.park();
        }
        self.change = Some(Change::ParkVcpus { parked: 0, then });
    }

    fn resume(&mut self) {
        let machine = &mut self.machine;
        for (index, slot) in machine.slots.iter_mut().enumerate() {
            let broken = slot.transport.registers().is_broken();
            if slot.active && !broken {
                slot.start(index, machine.ram.memory(), &machine.io);
            }
            slot.transport.interrupt().refresh();
        }
        self.state = State::Running;
        for vcpu in &self.machine.vcpus {
            vcpu.run();
        }
    }

    fn activate(&mut self, device: usize) {
        let machine = &mut self.machine;
        if let Some(slot) = machine.slots.get_mut(device) {
            slot.start(device, machine.ram.memory(), &machine.io);
        }
    }

    fn reset(&mut self, device: usize, done: mpsc::SyncSender<()>) {
        if self.machine.control.console == Some(device) {
            self.console_holds = 0;
        }
        let Some(slot) = self.machine.slots.get_mut(device) else { return };
        slot.active = false;
        if slot.stop(device, &self.machine.io) {
            let deadline = Instant::now() + STOP_DEADLINE;
            slot.stopping = Some(Stopping::Reset { done, deadline });
            self.arm_timer();
        } else {
            slot.finish_reset();
            let _ = done.send(());
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Consumed { bytes, .. } => {
                self.console_holds = self.console_holds.saturating_sub(bytes);
            }
            Report::Fault { id: WorkerId { device, group }, fault } => {
                if let Some(slot) = self.machine.slots.get(device)
                    && slot.running.contains(&group)
                {
                    let name = slot.transport.name();
                    tracing::warn!(device = name, %fault, "device needs a reset");
                    slot.transport.needs_reset();
                }
            }
            Report::Stopped { id: WorkerId { device, group }, queues } => {
                let Some(slot) = self.machine.slots.get_mut(device) else { return };
                if !slot.stopped(group, &queues) {
                    return;
                }
                if let Some(Stopping::Reset { done, .. }) = slot.stopping.take() {
                    slot.finish_reset();
                    let _ = done.send(());
                }
                self.finish_pause_if_drained();
            }
        }
    }

    fn take_vcpu_event(&mut self, index: usize, event: VcpuEvent) {
        let end = match event {
            VcpuEvent::PowerOff => Ok(Ending::PowerOff),
            VcpuEvent::Reset => Ok(Ending::Reset),
            VcpuEvent::TripleFault => Ok(Ending::TripleFault),
            VcpuEvent::Failed { failure, rip } => {
                let place = rip.map_or(String::new(), |rip| format!(" at {rip:#x}"));
                Err(RunError::Vcpu { index, place, failure })
            }
            VcpuEvent::RunFailed(source) => Err(RunError::VcpuRun { index, source }),
            VcpuEvent::Parked => return self.parked(),
        };
        self.end.get_or_insert(end);
    }

    fn parked(&mut self) {
        let Some(Change::ParkVcpus { parked, then }) = self.change.take() else { return };
        if parked + 1 < self.machine.vcpus.len() {
            self.change = Some(Change::ParkVcpus { parked: parked + 1, then });
            return;
        }
        let deadline = Instant::now() + STOP_DEADLINE;
        let machine = &mut self.machine;
        for (index, slot) in machine.slots.iter_mut().enumerate() {
            if slot.stop(index, &machine.io) {
                slot.stopping = Some(Stopping::Pause { deadline });
            }
        }
        self.change = Some(Change::StopQueues { then });
        self.arm_timer();
        self.finish_pause_if_drained();
    }

    fn finish_pause_if_drained(&mut self) {
        if self.machine.slots.iter().any(|slot| !slot.running.is_empty()) {
            return;
        }
        match self.change.take() {
            Some(Change::StopQueues { then: Then::Reply(reply) }) => {
                self.state = State::Paused;
                reply(Ok(State::Paused));
                self.release_kernel_file_if_wanted();
            }
            Some(Change::StopQueues { then: Then::ReleaseKernelFile }) => {
                self.release_kernel_file();
                self.resume();
            }
            other => self.change = other,
        }
    }

    fn arm_timer(&mut self) {
        let next = self.machine.slots.iter().filter_map(super::slot::Slot::deadline).min();
        if let Some(next) = next {
            let delay = next.saturating_duration_since(Instant::now());
            let _ = self.timer.reset(delay.max(Duration::from_millis(1)), None);
        }
    }

    /// A device that does not finish what it has in flight is named; a driver that waits for its
    /// reset goes on with a device that is broken.
    fn check_deadlines(&mut self) {
        let now = Instant::now();
        for slot in &mut self.machine.slots {
            if slot.deadline().is_none_or(|deadline| deadline > now) {
                continue;
            }
            let name = slot.transport.name();
            tracing::error!(device = name, "a request does not end; its back-end hangs");
            match slot.stopping.take() {
                Some(Stopping::Reset { done, .. }) => {
                    slot.transport.needs_reset();
                    let _ = done.send(());
                }
                Some(Stopping::Pause { .. }) => {
                    slot.stopping = Some(Stopping::Pause { deadline: now + STOP_DEADLINE });
                }
                None => {}
            }
        }
        self.arm_timer();
    }

    fn take_signals(&mut self) {
        while let Some(meaning) = self.options.signals.as_ref().and_then(|s| s.take()) {
            match meaning {
                Meaning::End(number) => self.end_by_will(Ending::Signal(number)),
                Meaning::WindowChanged => self.resize_console(),
                Meaning::LeaseBreak => {
                    self.kernel_file_wanted = true;
                    self.release_kernel_file_if_wanted();
                }
            }
        }
    }

    /// Gives the kernel file up if somebody wants to write it: now if the machine is paused, else
    /// in a short pause of its own. A pause under way comes by here when it is done.
    fn release_kernel_file_if_wanted(&mut self) {
        match self.state {
            _ if !self.kernel_file_wanted || self.change.is_some() => {}
            State::Running => self.pause(Then::ReleaseKernelFile),
            State::Paused => self.release_kernel_file(),
            State::Configured | State::Stopped | State::Failed(_) => {}
        }
    }

    /// Copies what the guest maps of its kernel file, then lets the writer have it.
    fn release_kernel_file(&mut self) {
        self.kernel_file_wanted = false;
        let Some((lease, ranges)) = self.machine.kernel.leased.take() else { return };
        for (gpa, len) in ranges {
            if let Err(err) = self.machine.ram.detach_file(gpa, len) {
                tracing::error!(%err, "the kernel file changes while the guest maps it");
            }
        }
        drop(lease);
    }

    fn resize_console(&mut self) {
        let Some(input) = &self.input_fd else { return };
        let Some((columns, rows)) = crate::console::window_size(input.as_raw_fd()) else { return };
        self.console_message(Message::Resize { columns, rows });
    }

    fn console_message(&mut self, message: Message) {
        let Some(device) = self.machine.control.console else { return };
        let Some(slot) = self.machine.slots.get_mut(device) else { return };
        if let Some(config) = slot.device.update(&message) {
            slot.transport.publish_config(config);
        }
        if let Some(thread) = self.machine.io.get(slot.io) {
            for &group in &slot.running {
                thread.send(IoCommand::Message(WorkerId { device, group }, message.clone()));
            }
        }
    }

    /// Writes console output that was left to this thread, and waits for the sink if it is slow.
    fn drain_output(&mut self, ops: &mut EventOps) {
        let (wait, error) = self.machine.control.output.drain();
        if let Some(err) = error {
            tracing::warn!(%err, "console output is not wanted any more and is dropped");
        }
        match (wait, self.sink_watched) {
            (Some(fd), None) => {
                let events = EventSet::OUT | EventSet::EDGE_TRIGGERED;
                let source = Source::SinkReady.pack();
                if ops.add(Events::with_data_raw(fd, source, events)).is_ok() {
                    self.sink_watched = Some(fd);
                }
            }
            (None, Some(fd)) => {
                let _ = ops.remove(Events::empty_raw(fd));
                self.sink_watched = None;
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }

    fn watch_input(&mut self, ops: &mut EventOps) {
        let Some(input) = &self.input_fd else { return };
        if self.input_watched || self.input.len() >= INPUT_CAPACITY {
            return;
        }
        let fd = input.as_raw_fd();
        match ops.add(Events::with_data_raw(fd, Source::Input.pack(), EventSet::IN)) {
            Ok(()) => self.input_watched = true,
            // A regular file cannot be waited for; it can always be read. /dev/null likewise.
            Err(_) => self.read_input(EventSet::IN, ops),
        }
    }

    fn unwatch_input(&mut self, ops: &mut EventOps) {
        if let Some(input) = self.input_fd.as_ref().filter(|_| self.input_watched) {
            let _ = ops.remove(Events::empty_raw(input.as_raw_fd()));
        }
        self.input_watched = false;
    }

    fn read_input(&mut self, events: EventSet, ops: &mut EventOps) {
        let Some(input) = &self.input_fd else { return };
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
                self.input_fd = None;
            }
            Ok(len) => {
                let filtered = (self.filter)(&bytes[..len]);
                self.machine.control.output.push_some(&filtered.reply);
                if filtered.quit {
                    self.end_by_will(Ending::Quit);
                }
                self.input.extend(filtered.bytes);
                self.feed_input(ops);
            }
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            Err(err) => {
                tracing::warn!(%err, "console input ended");
                self.unwatch_input(ops);
                self.input_fd = None;
            }
        }
    }

    /// Passes typed bytes on as far as the guest takes them.
    fn feed_input(&mut self, ops: &mut EventOps) {
        if let Some(device) = self.machine.control.console {
            let runs = self.machine.slots.get(device).is_some_and(|slot| !slot.running.is_empty());
            let room = if runs { CONSOLE_WINDOW.saturating_sub(self.console_holds) } else { 0 };
            let bytes: Vec<u8> = self.input.drain(..room.min(self.input.len())).collect();
            if !bytes.is_empty() {
                self.console_holds += bytes.len();
                self.console_message(Message::Input(bytes));
            }
        } else if let Some(serial) = &self.machine.control.serial {
            while !self.input.is_empty() {
                let taken = serial.input(self.input.make_contiguous());
                if taken == 0 {
                    break;
                }
                self.input.drain(..taken);
            }
        } else {
            self.input.clear();
        }
        if self.input.len() >= INPUT_CAPACITY {
            self.unwatch_input(ops);
        } else {
            self.watch_input(ops);
        }
    }

    /// Stops all threads, writes out what the console still holds, and says how it ended.
    fn finish(&mut self) -> Result<Ending, RunError> {
        for vcpu in &self.machine.vcpus {
            vcpu.end();
        }
        // vCPUs that wait for a device's reset are released when the senders go.
        let (_, nothing) = mpsc::channel();
        drop(std::mem::replace(&mut self.machine.control.events, nothing));
        for slot in &mut self.machine.slots {
            slot.stopping = None;
        }
        self.machine.vcpus.clear();
        self.machine.io.clear();
        self.machine.timings().mark(Milestone::End);
        self.flush_output();
        self.end.take().unwrap_or(Ok(Ending::Quit))
    }

    fn flush_output(&mut self) {
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
