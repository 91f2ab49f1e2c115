//! When a machine reached the milestones of its start, measured from the process's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A milestone of a machine's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Milestone {
    /// The VM, its memory slots and interrupt controllers exist.
    VmCreated,
    /// Kernel, initrd, tables and command line are in guest memory.
    KernelLoaded,
    /// The boot vCPU enters the guest for the first time.
    FirstInstruction,
    /// The guest wrote its first byte to a console.
    FirstConsoleByte,
    /// The guest wrote 123 to the boot-timer address.
    Userspace,
    /// The machine stopped.
    End,
}

impl Milestone {
    /// All of them in the order in which they are reached.
    pub const ALL: [Milestone; 6] = [
        Milestone::VmCreated,
        Milestone::KernelLoaded,
        Milestone::FirstInstruction,
        Milestone::FirstConsoleByte,
        Milestone::Userspace,
        Milestone::End,
    ];

    /// Key for programs, of the time in nanoseconds.
    pub fn key(self) -> &'static str {
        match self {
            Milestone::VmCreated => "vm_created_ns",
            Milestone::KernelLoaded => "kernel_loaded_ns",
            Milestone::FirstInstruction => "first_instruction_ns",
            Milestone::FirstConsoleByte => "first_console_byte_ns",
            Milestone::Userspace => "userspace_reached_ns",
            Milestone::End => "end_ns",
        }
    }

    /// Name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Milestone::VmCreated => "VM created",
            Milestone::KernelLoaded => "kernel loaded",
            Milestone::FirstInstruction => "first instruction",
            Milestone::FirstConsoleByte => "first console byte",
            Milestone::Userspace => "userspace reached",
            Milestone::End => "end",
        }
    }
}

/// The milestones reached so far; each keeps its first time.
#[derive(Debug)]
pub struct Timings {
    start: Instant,
    // Nanoseconds since `start`, 0 while not reached.
    reached: [AtomicU64; Milestone::ALL.len()],
}

impl Timings {
    /// Counts from `start`.
    pub fn new(start: Instant) -> Timings {
        Timings { start, reached: Default::default() }
    }

    /// Notes that `milestone` is reached now, unless it was before. Returns whether it was new.
    pub fn mark(&self, milestone: Milestone) -> bool {
        let slot = &self.reached[milestone as usize];
        if slot.load(Ordering::Relaxed) != 0 {
            return false;
        }
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        slot.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Nanoseconds from the start to `milestone`, if it was reached.
    pub fn get(&self, milestone: Milestone) -> Option<u64> {
        match self.reached[milestone as usize].load(Ordering::Relaxed) {
            0 => None,
            nanos => Some(nanos),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_first_time() {
        let timings = Timings::new(Instant::now());
        assert_eq!(timings.get(Milestone::End), None);
        timings.mark(Milestone::End);
        let first = timings.get(Milestone::End);
        timings.mark(Milestone::End);
        assert!(first.is_some());
        assert_eq!(timings.get(Milestone::End), first);
    }
}
