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
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use super::bus::{Buses, Outcome};
use super::event::{Event, Sender, VcpuEvent};
use crate::hypervisor::{Exit, Vcpu};
use crate::io::STACK_SIZE;
use crate::seccomp::{self, ThreadKind};
use crate::timings::{Milestone, Timings};

/// The word a vCPU thread obeys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    Park,
    Run,
    End,
}

struct Orders(AtomicU8);

impl Orders {
    fn get(&self) -> Order {
        match self.0.load(Ordering::Acquire) {
            1 => Order::Run,
            2 => Order::End,
            _ => Order::Park,
        }
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
pub(super) fn install_kick_handler() -> io::Result<()> {
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

/// A vCPU thread, as `main` holds it. Dropping it ends the thread and waits for it.
pub(super) struct VcpuThread {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

/// What all vCPU threads share.
pub(super) struct Shared {
    pub(super) buses: Buses,
    pub(super) events: Sender,
    pub(super) timings: Arc<Timings>,
    pub(super) seccomp: seccomp::Mode,
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`, parked. `ready` gets a message once it is under its
    /// filter.
    pub(super) fn start(
        index: usize,
        mut vcpu: Box<dyn Vcpu>,
        shared: Arc<Shared>,
        ready: mpsc::Sender<io::Result<()>>,
    ) -> io::Result<VcpuThread> {
        let orders = Arc::new(Orders(AtomicU8::new(Order::Park as u8)));
        let own = Arc::clone(&orders);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu {index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                IMMEDIATE_EXIT.set(vcpu.immediate_exit());
                let filtered = seccomp::apply(ThreadKind::Vcpu, shared.seccomp);
                let serve = filtered.is_ok();
                let _ = ready.send(filtered);
                drop(ready);
                if serve {
                    Runner { index, orders: &own, shared: &shared }.run(vcpu.as_mut());
                }
                IMMEDIATE_EXIT.set(std::ptr::null_mut());
            })?;
        Ok(VcpuThread { orders, thread: Some(thread) })
    }

    fn order(&self, order: Order) {
        self.orders.0.store(order as u8, Ordering::Release);
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

    /// Tells the thread to end, without waiting for it.
    pub(super) fn end(&self) {
        self.order(Order::End);
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Runner<'a> {
    index: usize,
    orders: &'a Orders,
    shared: &'a Shared,
}

impl Runner<'_> {
    fn report(&self, event: VcpuEvent) {
        self.shared.events.send(Event::Vcpu { index: self.index, event });
    }

    fn run(&self, vcpu: &mut dyn Vcpu) {
        let immediate_exit = vcpu.immediate_exit();
        // A vCPU is parked when it is made; only later parking is reported.
        while self.orders.get() == Order::Park {
            std::thread::park();
        }
        if self.index == 0 {
            self.shared.timings.mark(Milestone::FirstInstruction);
        }
        loop {
            match self.orders.get() {
                Order::Run => {
                    if !self.step(vcpu) {
                        // It cannot go on; it stays out of the guest until it is told to end.
                        while self.orders.get() != Order::End {
                            std::thread::park();
                        }
                        return;
                    }
                }
                Order::Park => {
                    // SAFETY: the byte belongs to this thread's vCPU.
                    unsafe { immediate_exit.write_volatile(1) };
                    let completed = vcpu.run().is_ok();
                    if completed {
                        self.report(VcpuEvent::Parked);
                    }
                    while self.orders.get() == Order::Park {
                        std::thread::park();
                    }
                }
                Order::End => return,
            }
            // SAFETY: as above. A kick that comes after this line sets it again.
            unsafe { immediate_exit.write_volatile(0) };
        }
    }

    /// Runs the guest up to its next exit and handles that. Returns false if it cannot go on.
    fn step(&self, vcpu: &mut dyn Vcpu) -> bool {
        let buses = &self.shared.buses;
        let event = match vcpu.run() {
            Ok(Exit::PortOut { port, size, data }) => {
                match buses.port_out(port, size, data, || self.orders.get() == Order::Run) {
                    Outcome::Continue => return true,
                    Outcome::PowerOff => VcpuEvent::PowerOff,
                    Outcome::Reset => VcpuEvent::Reset,
                }
            }
            Ok(Exit::PortIn { port, size, data }) => {
                buses.port_in(port, size, data);
                return true;
            }
            Ok(Exit::MmioRead { gpa, data }) => {
                buses.mmio_read(gpa, data);
                return true;
            }
            Ok(Exit::MmioWrite { gpa, data }) => {
                buses.mmio_write(gpa, data);
                return true;
            }
            Ok(Exit::Interrupted) => return true,
            Ok(Exit::Shutdown) => VcpuEvent::TripleFault,
            Ok(Exit::Reset) => VcpuEvent::Reset,
            Ok(Exit::Failed(failure)) => {
                let rip = vcpu.regs().ok().map(|regs| regs.rip);
                VcpuEvent::Failed { failure, rip }
            }
            Err(err) => VcpuEvent::RunFailed(err),
        };
        self.report(event);
        false
    }
}
