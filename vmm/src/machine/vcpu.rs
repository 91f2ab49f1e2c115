//! vCPU threads.
//!
//! A vCPU thread runs its guest, handles the exits, and obeys one word: run, park or end. `main`
//! changes the word and kicks the thread by a signal, whose handler sets the vCPU's immediate-exit
//! byte: whether the signal arrives inside `KVM_RUN` or just before it, the guest is left.
//!
//! A vCPU counts as parked only after one more `KVM_RUN` with that byte set: KVM completes a port or
//! MMIO access only on the next entry, and state read before that would repeat or lose it.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::bus::{Buses, Outcome};
use super::event::{Event, Sender, VcpuEvent};
use crate::hypervisor::{Exit, Vcpu};
use crate::io::STACK_SIZE;
use crate::metrics::VcpuMetrics;
use crate::seccomp::{self, ThreadKind};
use crate::signals;
use crate::timings::{Milestone, Timings};

/// The word a vCPU thread obeys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Order {
    Park,
    Run,
    End,
}

/// The current order, and how many came before it: a vCPU that was told to run and to park again
/// before it looked must still report that it is parked.
struct Orders(AtomicU32);

/// A value of [`Orders`].
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u32);

impl Word {
    fn order(self) -> Order {
        match self.0 & 3 {
            1 => Order::Run,
            2 => Order::End,
            _ => Order::Park,
        }
    }
}

impl Orders {
    fn word(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    fn get(&self) -> Order {
        self.word().order()
    }

    /// Replaces the order. Only `main` does.
    fn set(&self, order: Order) {
        let count = (self.word().0 >> 2).wrapping_add(1);
        self.0.store(count << 2 | order as u32, Ordering::Release);
    }
}

thread_local! {
    // Read in a signal handler: constant-initialised, no destructor.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: i32) {
    let byte = IMMEDIATE_EXIT.get();
    if !byte.is_null() {
        // SAFETY: set by this thread from a vCPU that it owns, cleared before the vCPU goes.
        unsafe { byte.write_volatile(1) };
    }
}

/// Installs the handler of the kick signal for the process.
///
/// # Errors
/// The kernel refused.
fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid; the handler only stores a byte.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        match libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Something to be done with a vCPU that is parked, on its thread.
type Errand = Box<dyn FnOnce(&dyn Vcpu) + Send>;

/// A vCPU thread, as `main` holds it. Dropping it ends the thread and waits for it.
pub(super) struct VcpuThread {
    orders: Arc<Orders>,
    errands: mpsc::Sender<Errand>,
    /// Where what it is to run goes, until it has that.
    post: Option<mpsc::SyncSender<Post>>,
    thread: Option<JoinHandle<()>>,
}

/// What all vCPU threads share.
pub(super) struct Shared {
    pub(super) buses: Buses,
    pub(super) events: Sender,
    pub(super) timings: Arc<Timings>,
}

/// What a vCPU thread runs.
pub(super) struct Post {
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: Arc<VcpuMetrics>,
}

/// vCPU threads that are there before it is known what they run.
pub(super) struct Crew {
    pub(super) threads: Vec<VcpuThread>,
    /// One message per thread: under its filter, or why not.
    pub(super) ready: mpsc::Receiver<io::Result<()>>,
    /// What filters they have.
    pub(super) seccomp: seccomp::Mode,
}

impl Crew {
    /// Starts threads for so many vCPUs, parked.
    pub(super) fn start(count: u32, seccomp: seccomp::Mode) -> io::Result<Crew> {
        install_kick_handler()?;
        let (sender, ready) = mpsc::channel();
        let start = |index| VcpuThread::start(index as usize, seccomp, sender.clone());
        let threads = signals::away_from(|| (0..count).map(start).collect::<io::Result<_>>())??;
        Ok(Crew { threads, ready, seccomp })
    }
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`, parked, which waits for that. `ready` gets a message once it is
    /// under its filter.
    fn start(
        index: usize,
        seccomp: seccomp::Mode,
        ready: mpsc::Sender<io::Result<()>>,
    ) -> io::Result<VcpuThread> {
        let orders = Arc::new(Orders(AtomicU32::new(Order::Park as u32)));
        let own = Arc::clone(&orders);
        let (errands, received) = mpsc::channel();
        let (post, given) = mpsc::sync_channel::<Post>(1);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let filtered = seccomp::apply(ThreadKind::Vcpu, seccomp);
                let serve = filtered.is_ok();
                let _ = ready.send(filtered);
                drop(ready);
                // There is none if the machine was not to be had.
                let Ok(Post { mut vcpu, shared, metrics }) = given.recv() else { return };
                IMMEDIATE_EXIT.set(vcpu.immediate_exit());
                if serve {
                    let runner = Runner {
                        index,
                        orders: &own,
                        errands: &received,
                        shared: &shared,
                        metrics: &metrics,
                    };
                    runner.run(vcpu.as_mut());
                }
                IMMEDIATE_EXIT.set(std::ptr::null_mut());
            })?;
        Ok(VcpuThread { orders, errands, post: Some(post), thread: Some(thread) })
    }

    /// Gives the thread what it is to run.
    pub(super) fn give(&mut self, post: Post) {
        if let Some(place) = self.post.take() {
            // If the thread ended, it said why.
            let _ = place.send(post);
        }
    }

    fn order(&self, order: Order) {
        self.orders.set(order);
        if let Some(thread) = &self.thread {
            use std::os::unix::thread::JoinHandleExt;
            thread.thread().unpark();
            if order != Order::Run {
                // SAFETY: the thread is not joined yet, so its id is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
            }
        }
    }

    /// Lets the guest run.
    pub(super) fn run(&self) {
        self.order(Order::Run);
    }

    /// Leaves the guest; reported by [`VcpuEvent::Parked`].
    pub(super) fn park(&self) {
        self.order(Order::Park);
    }

    /// Has a vCPU that is parked do something; what comes of it is for `errand` to tell.
    pub(super) fn errand(&self, errand: impl FnOnce(&dyn Vcpu) + Send + 'static) {
        if self.errands.send(Box::new(errand)).is_ok()
            && let Some(thread) = &self.thread
        {
            thread.thread().unpark();
        }
    }

    /// Tells the thread to end, without waiting for it.
    pub(super) fn end(&self) {
        self.order(Order::End);
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.post = None;
        if self.orders.get() != Order::End {
            self.end();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What came of entering the guest once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// An exit that was handled, and that the next entry completes.
    Exit,
    /// The guest was left with nothing to be completed.
    Interrupted,
    /// The guest is at its end, or cannot go on.
    Over,
}

struct Runner<'a> {
    index: usize,
    orders: &'a Orders,
    errands: &'a mpsc::Receiver<Errand>,
    shared: &'a Shared,
    metrics: &'a VcpuMetrics,
}

impl Runner<'_> {
    fn report(&self, event: VcpuEvent) {
        self.shared.events.send(Event::Vcpu { index: self.index, event });
    }

    fn run(&self, vcpu: &mut dyn Vcpu) {
        let immediate_exit = vcpu.immediate_exit();
        // A vCPU is parked when it is made; only later parking is reported.
        let made = Word(Order::Park as u32);
        self.wait(vcpu, made);
        if self.index == 0 {
            self.shared.timings.mark(Milestone::FirstInstruction);
        }
        loop {
            let word = self.orders.word();
            match word.order() {
                Order::Run => {
                    if self.step(vcpu) == Step::Over {
                        return self.stay_out();
                    }
                }
                Order::Park => {
                    // An access that takes several exits is completed by as many entries.
                    loop {
                        // SAFETY: the byte belongs to this thread's vCPU.
                        unsafe { immediate_exit.write_volatile(1) };
                        match self.step(vcpu) {
                            Step::Exit => {}
                            Step::Interrupted => break,
                            Step::Over => return self.stay_out(),
                        }
                    }
                    self.report(VcpuEvent::Parked);
                    self.wait(vcpu, word);
                }
                Order::End => return,
            }
            // SAFETY: as above. A kick that comes after this line sets it again.
            unsafe { immediate_exit.write_volatile(0) };
        }
    }

    /// Waits for another order than `word`, and does errands meanwhile.
    fn wait(&self, vcpu: &dyn Vcpu, word: Word) {
        while self.orders.word() == word {
            match self.errands.try_recv() {
                Ok(errand) => errand(vcpu),
                Err(_) => std::thread::park(),
            }
        }
    }

    /// Waits to be told to end, with a vCPU that cannot go on.
    fn stay_out(&self) {
        while self.orders.get() != Order::End {
            std::thread::park();
        }
    }

    /// Runs the guest up to its next exit and handles that. What ends the guest is reported.
    fn step(&self, vcpu: &mut dyn Vcpu) -> Step {
        let buses = &self.shared.buses;
        let event = match vcpu.run() {
            Ok(Exit::PortOut { port, size, data }) => {
                self.metrics.exit_io_out.count();
                match buses.port_out(port, size, data, || self.orders.get() == Order::Run) {
                    Outcome::Continue => return Step::Exit,
                    Outcome::PowerOff => VcpuEvent::PowerOff,
                    Outcome::Reset => VcpuEvent::Reset,
                }
            }
            Ok(Exit::PortIn { port, size, data }) => {
                self.metrics.exit_io_in.count();
                buses.port_in(port, size, data);
                return Step::Exit;
            }
            Ok(Exit::MmioRead { gpa, data }) => {
                self.metrics.exit_mmio_read.count();
                buses.mmio_read(gpa, data);
                return Step::Exit;
            }
            Ok(Exit::MmioWrite { gpa, data }) => {
                self.metrics.exit_mmio_write.count();
                buses.mmio_write(gpa, data);
                return Step::Exit;
            }
            Ok(Exit::Interrupted) => return Step::Interrupted,
            Ok(Exit::Shutdown) => VcpuEvent::TripleFault,
            Ok(Exit::Reset) => VcpuEvent::Reset,
            Ok(Exit::Failed(failure)) => {
                self.metrics.failures.count();
                let rip = vcpu.regs().ok().map(|regs| regs.rip);
                VcpuEvent::Failed { failure, rip }
            }
            Err(err) => VcpuEvent::RunFailed(err),
        };
        self.report(event);
        Step::Over
    }
}
