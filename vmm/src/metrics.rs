//! What a machine and its monitor count, for whoever looks at it from outside.
//!
//! Whoever counts something makes a set ([`devices::metrics`]) and registers it here; the registry is
//! made by the process and handed down. It can be seen in Firecracker's JSON ([`Shape`]) and written
//! to a file, and other forms are made of [`Registry::groups`].
//!
//! ```text
//!   devices, vCPUs, API ── register ──> Registry ── groups ──> GET /metrics, Prometheus
//!                                           └── flush ──> a line in a file
//! ```

mod shape;
mod sink;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::metrics;
pub use devices::metrics::{Counter, Latency, Level, Metrics, Set, Value};
pub use shape::Shape;
pub use sink::{Sink, SinkOptions};

metrics! {
    /// What one vCPU counts.
    pub struct VcpuMetrics {
        /// Reads of ports that left the guest.
        exit_io_in: Counter,
        /// Writes of ports that left the guest.
        exit_io_out: Counter,
        /// Reads of registers in memory that left the guest.
        exit_mmio_read: Counter,
        /// Writes of registers in memory that left the guest.
        exit_mmio_write: Counter,
        /// Exits that the vCPU could not go on after.
        failures: Counter,
    }
}

metrics! {
    /// What the control thread counts.
    pub struct ControlMetrics {
        /// Events that were handled: commands, reports of devices and vCPUs.
        device_events: Counter,
    }
}

metrics! {
    /// How long the last changes of state took.
    pub struct LatencyMetrics {
        /// Microseconds from asking for the last pause to its end.
        pause_vm: Level,
        /// Microseconds that the last resume took.
        resume_vm: Level,
    }
}

metrics! {
    /// How long the last snapshots took.
    pub struct SnapshotLatencies {
        /// Microseconds that the last full snapshot took.
        full_create_snapshot: Level,
        /// Microseconds that the last diff snapshot took.
        diff_create_snapshot: Level,
        /// Microseconds that loading a snapshot took.
        load_snapshot: Level,
        /// Microseconds that the machine was halted for the last full snapshot.
        vmm_full_create_snapshot: Level,
        /// Microseconds that the machine was halted for the last diff snapshot.
        vmm_diff_create_snapshot: Level,
    }
}

metrics! {
    /// What the panic device counts.
    pub struct PanicMetrics {
        /// Times that the guest's kernel said that it panicked.
        panic_count: Counter,
    }
}

metrics! {
    /// What the serial port counts.
    pub struct SerialMetrics {
        /// Registers that the guest read.
        read_count: Counter,
        /// Registers that the guest wrote; most are bytes for the console.
        write_count: Counter,
    }
}

metrics! {
    /// What the console's output counts.
    pub struct OutputMetrics {
        /// Bytes that were dropped since the guest wrote more than the limit allows.
        rate_limiter_dropped_bytes: Counter,
    }
}

metrics! {
    /// What the keyboard controller counts.
    pub struct KeyboardMetrics {
        /// Registers that the guest read.
        read_count: Counter,
        /// Registers that the guest wrote.
        write_count: Counter,
        /// Resets that the guest asked for.
        reset_count: Counter,
    }
}

/// Metrics of one kind, as they are at the moment.
#[derive(Debug)]
pub struct Group {
    /// What they are of: `block`, `vcpu`, ….
    pub kind: &'static str,
    /// Which one, where there may be several.
    pub name: Option<String>,
    /// Each with its name, its meaning and its value.
    pub metrics: Vec<(&'static str, &'static str, Value)>,
}

struct Entry {
    kind: &'static str,
    name: Option<String>,
    set: Arc<dyn Metrics>,
    /// It goes with its machine; the process may get another.
    of_machine: bool,
}

#[derive(Default)]
struct Inner {
    entries: Vec<Entry>,
    sink: Option<Sink>,
}

/// All that is counted in a process.
#[derive(Default)]
pub struct Registry(Mutex<Inner>);

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a set that lives as long as the process.
    pub fn add(&self, (kind, set): Set) {
        self.lock().entries.push(Entry { kind, name: None, set, of_machine: false });
    }

    /// Adds a set of the machine that is being built.
    pub(crate) fn add_of_machine(&self, name: Option<&str>, (kind, set): Set) {
        let name = name.map(str::to_owned);
        self.lock().entries.push(Entry { kind, name, set, of_machine: true });
    }

    /// Another machine is about to be built, which starts at nothing.
    pub(crate) fn forget_machine(&self) {
        self.lock().entries.retain(|entry| !entry.of_machine);
    }

    /// Everything as it is now.
    pub fn groups(&self) -> Vec<Group> {
        self.lock().groups()
    }

    /// Has what is counted from now on written to `sink`, instead of where it was written before.
    pub fn write_to(&self, sink: Sink) {
        self.lock().sink = Some(sink);
    }

    /// True if there is somewhere to write to.
    pub fn has_sink(&self) -> bool {
        self.lock().sink.is_some()
    }

    /// Writes a line with what was counted since the last one. Does nothing if there is no sink.
    ///
    /// # Errors
    /// The line cannot be written, at least not now; what it would have said is part of the next.
    pub fn flush(&self) -> std::io::Result<()> {
        let mut inner = self.lock();
        let groups = inner.groups();
        inner.sink.as_mut().map_or(Ok(()), |sink| sink.write(&groups))
    }
}

impl Inner {
    fn groups(&self) -> Vec<Group> {
        let group = |entry: &Entry| {
            let mut metrics = Vec::new();
            entry.set.visit(&mut |name, help, value| metrics.push((name, help, value)));
            Group { kind: entry.kind, name: entry.name.clone(), metrics }
        };
        self.entries.iter().map(group).collect()
    }
}
