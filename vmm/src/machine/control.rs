//! The control loop: what the main thread does while a machine runs.
//!
//! It waits for events from vCPUs, io threads, signals, the console's reader and writer, and the
//! services of its caller. Nothing in here blocks, and nothing touches guest memory, with one
//! exception: when somebody wants to write the kernel file that the guest maps, the machine is
//! paused and the mapped pages are copied.

mod change;
mod command;
mod console;
mod deadlines;
mod freeze;
mod kernel_file;
mod of_device;

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use self::change::Change;
use self::console::ConsoleIo;
use super::bus::{AcpiPort, KeyboardPort, SerialPort};
use super::event::{Event, VcpuEvent};
use super::lifecycle::{self, Ending, State, Step};
use super::slot::Stopping;
use super::{Machine, RunError, RunOptions};
use crate::console::Output;
use crate::io::{Report, WorkerId, system_error};
use crate::journal::{Happening, Journal};
use crate::memory::LOOK_EVERY;
use crate::metrics::{ControlMetrics, LatencyMetrics};
use crate::seccomp;
use crate::signals::Meaning;
use crate::timings::Milestone;

/// Events taken from the kernel at a time; the rest comes with the next look.
const READY_EVENTS: usize = 16;

/// What assembly prepares for the control loop.
pub(super) struct Parts {
    pub(super) events: mpsc::Receiver<Event>,
    pub(super) wake: Arc<EventFd>,
    /// One message per vCPU thread: under its filter, or why not.
    pub(super) vcpus_ready: mpsc::Receiver<io::Result<()>>,
    pub(super) output: Arc<Output>,
    pub(super) serial: Option<Arc<SerialPort>>,
    pub(super) keyboard: Arc<KeyboardPort>,
    pub(super) acpi: Arc<AcpiPort>,
    /// Index of the virtio console, if there is one.
    pub(super) console: Option<usize>,
    pub(super) counted: Counted,
    pub(super) journal: Arc<Journal>,
}

/// What the control thread counts.
#[derive(Default)]
pub(super) struct Counted {
    pub(super) control: Arc<ControlMetrics>,
    pub(super) latencies: Arc<LatencyMetrics>,
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
    Pager,
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
            Source::Pager => 8,
            Source::Service(n) => 9 + n,
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
            8 => Source::Pager,
            n => Source::Service(n - 9),
        }
    }
}

struct Control {
    machine: Machine,
    console: ConsoleIo,
    options: Services,
    state: State,
    change: Option<Change>,
    timer: TimerFd,
    kernel_file_wanted: bool,
    /// When it is looked again how the pager does.
    pager_look: Option<Instant>,
    /// Somebody reads the machine's memory: it must not run.
    frozen: bool,
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
            .map_err(|err| host("cannot wait for events")(system_error(err)))?;
        let timer = TimerFd::new().map_err(|err| host("cannot make a timer")(err.into()))?;
        seccomp::apply(options.thread, self.seccomp)
            .map_err(host("cannot filter the main thread"))?;
        self.control.output.set_sink(options.console.sink);
        let id = manager.add_subscriber(Control {
            machine: self,
            console: ConsoleIo::new(
                options.console.input,
                options.console.filter,
                options.console.typed,
            ),
            options: Services { signals: options.signals, services: options.services },
            state: State::Configured,
            change: None,
            timer,
            kernel_file_wanted: false,
            pager_look: None,
            frozen: false,
            end: None,
        });
        if let Ok(control) = manager.subscriber_mut(id) {
            control.start();
        }
        // The guest does not wait for it.
        let mut heap_given_back = false;
        loop {
            match manager.subscriber_mut(id) {
                Ok(control) if control.end.is_none() => {
                    if !heap_given_back && matches!(control.state, State::Running) {
                        give_back_heap();
                        heap_given_back = true;
                    }
                }
                _ => break,
            }
            if let Err(err) = manager.run() {
                return Err(host("cannot wait for events")(system_error(err)));
            }
        }
        let end = match manager.subscriber_mut(id) {
            Ok(control) => control.finish(),
            Err(err) => return Err(host("the control loop is gone")(system_error(err))),
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
        let pager = self.machine.ram.pager_fds();
        if !pager.is_empty() {
            self.pager_look = Some(Instant::now() + LOOK_EVERY);
            self.arm_timer();
        }
        fds.extend(pager.into_iter().map(|fd| (fd, Source::Pager, EventSet::IN)));
        for (fd, source, set) in fds {
            if let Err(err) = ops.add(Events::with_data_raw(fd, source.pack(), set)) {
                self.end = Some(Err(host("cannot wait for an event")(system_error(err))));
            }
        }
        self.watch_input(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match Source::unpack(events.data()) {
            Source::Wake => {
                self.take_events();
                // A console may have started, or passed on what it held.
                if self.console.has_typed() {
                    self.feed_input(ops);
                }
            }
            Source::Signals => self.take_signals(),
            Source::Timer => self.check_deadlines(),
            Source::Output | Source::SinkReady | Source::LineTimer => self.drain_output(ops),
            Source::Input => self.read_input(events.event_set(), ops),
            Source::InputDrained => self.feed_input(ops),
            Source::Pager if self.machine.ram.has_lost_pager() => {
                self.end.get_or_insert(Err(RunError::Pager));
            }
            // It closed its end, or only one of its processes is gone.
            Source::Pager => drop(ops.remove(Events::empty_raw(events.fd()))),
            Source::Service(n) => {
                let handle = self.machine.handle();
                if let Some(service) = self.options.services.get_mut(n as usize) {
                    let fd = service.fd();
                    if !service.on_ready(&handle) {
                        let _ = ops.remove(Events::empty_raw(fd));
                    }
                }
            }
        }
    }
}

/// Event descriptors are never read: each signal is an edge.
const EDGE: EventSet = EventSet::IN.union(EventSet::EDGE_TRIGGERED);

impl Control {
    fn start(&mut self) {
        if self.machine.restored {
            // Whoever restored it says when it goes on.
            self.state = State::Paused;
            while self.state == State::Paused
                && self.end.is_none()
                && let Ok(event) = self.machine.control.events.try_recv()
            {
                self.take_event(event);
            }
        } else if lifecycle::check(&self.state, Step::Start).is_ok() {
            self.state = State::Running;
            self.note(Happening::Started);
            for vcpu in &self.machine.vcpus {
                vcpu.run();
            }
        }
    }

    fn note(&self, what: Happening) {
        self.machine.control.journal.note(what);
    }

    fn take_events(&mut self) {
        while let Ok(event) = self.machine.control.events.try_recv() {
            self.take_event(event);
        }
    }

    fn take_event(&mut self, event: Event) {
        self.machine.control.counted.control.device_events.count();
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

    /// Ends the machine because somebody outside wants it. A guest's reset that came just before
    /// does not count: the machine must not start over.
    fn end_by_will(&mut self, ending: Ending) {
        if matches!(self.end, None | Some(Ok(Ending::Reset))) {
            self.end = Some(Ok(ending));
        }
    }

    fn take_report(&mut self, report: Report) {
        match report {
            Report::Consumed { bytes, .. } => self.console.consumed(bytes),
            Report::Fault { id: WorkerId { device, group }, fault } => {
                if let Some(slot) = self.machine.slots.get(device)
                    && slot.running.contains(&group)
                {
                    slot.transport.broken(&fault);
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
                self.finish_replace(device);
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

    fn take_signals(&mut self) {
        while let Some(meaning) = self.options.signals.as_ref().and_then(|s| s.take()) {
            match meaning {
                Meaning::End(number) => self.end_by_will(Ending::Signal(number)),
                Meaning::WindowChanged => {
                    self.machine.shared.events.note_change();
                    self.resize_console();
                }
                Meaning::LeaseBreak => {
                    self.kernel_file_wanted = true;
                    self.release_kernel_file_if_wanted();
                }
            }
        }
    }

    /// Stops all threads, writes out what the console still holds, and says how it ended.
    fn finish(&mut self) -> Result<Ending, RunError> {
        for vcpu in &self.machine.vcpus {
            vcpu.end();
        }
        // Nobody waits for a page any more.
        self.machine.ram.release_pager();
        // vCPUs that wait for a device's reset are released when the senders go.
        let (_, nothing) = mpsc::channel();
        drop(std::mem::replace(&mut self.machine.control.events, nothing));
        for slot in &mut self.machine.slots {
            slot.stopping = None;
        }
        for companion in self.machine.companions.drain(..) {
            companion.finish();
        }
        self.machine.vcpus.clear();
        self.machine.io.clear();
        for slot in &mut self.machine.slots {
            slot.device.end();
        }
        self.machine.timings().mark(Milestone::End);
        self.flush_output();
        self.end.take().unwrap_or(Ok(Ending::Quit))
    }
}
