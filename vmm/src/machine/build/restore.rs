//! A machine from a snapshot: what differs from one that boots.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::virtio::device::{Payload, RestoreError};
use kvm_bindings::kvm_cpuid_entry2;

use super::super::bus::{AcpiPort, KeyboardPort, SerialPort};
use super::super::slot::Slot;
use super::BuildError;
use crate::hypervisor::state::{VcpuState, VmState};
use crate::hypervisor::{Vcpu, Vm};
use crate::memory::{Check, GuestRam, Layer, PagerError};
use crate::seccomp;
use crate::snapshot::{self, Base, Companion, Prefetch, Record, State, WorkingSetError};

/// What a machine goes on from.
#[derive(Debug)]
pub struct Origin {
    /// Its state.
    pub state: State,
    /// Its memory.
    pub memory: Source,
    /// Where it is from, for what changes from here on.
    pub base: Option<Base>,
    /// What becomes of its clocks.
    pub clock: Clock,
    /// Where to write down what the guest touches.
    pub record: Option<Record>,
    /// What to fetch before the guest touches it.
    pub prefetch: Option<Prefetch>,
}

impl Origin {
    pub(crate) fn new(state: State, memory: Source, base: Option<Base>) -> Origin {
        let clock = Clock::default();
        Origin { state, memory, base, clock, record: None, prefetch: None }
    }

    /// True if it was saved on this host, since that was started.
    pub(super) fn is_from_here(&self) -> bool {
        let host = self.state.header.host.as_deref();
        host.is_some_and(|host| snapshot::this_host().as_deref() == Some(host))
    }
}

/// Where the memory of a machine comes from.
#[derive(Debug)]
pub enum Source {
    /// From files, the lowest layer first; nobody may change them as long as the machine lives.
    Layers(Vec<Layer>),
    /// From a process that listens on this socket, page by page.
    Pager(PathBuf),
}

/// What becomes of a guest's clocks when it goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// TSC and kvmclock go on from where they were.
    #[default]
    Resume,
    /// Both are moved on by the time that passed.
    Advance,
}

/// Why a snapshot cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The machine is to have more memory than was saved, or less.
    #[error("the guest had {saved} bytes of memory, and cannot have {wanted} here")]
    MemorySize {
        /// Its RAM in bytes.
        saved: u64,
        /// What the configuration says.
        wanted: u64,
    },
    /// Its memory cannot be had.
    #[error("the guest's memory cannot be had")]
    Pager(#[source] PagerError),
    /// What its guest touches cannot be written down, or fetched.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetError),
    /// The guest was shown features that this host has not: it may use them any time.
    #[error("this host's CPU lacks what the guest was shown: {0}")]
    Cpu(String),
    /// A state is missing.
    #[error("there is no state of {0}")]
    Missing(String),
    /// There is a state for which there is nothing in the machine.
    #[error("there is a state of {0}, which the machine has not")]
    LeftOver(String),
    /// A state is not one.
    #[error("the state of {owner} cannot be taken")]
    State {
        /// Whose.
        owner: String,
        /// Why.
        source: RestoreError,
    },
}

/// States by their owners, each to be taken once.
pub(super) struct Parts(HashMap<String, Vec<Payload>>);

impl Parts {
    pub(super) fn new(state: &State) -> Parts {
        let mut parts: HashMap<String, Vec<Payload>> = HashMap::new();
        for part in &state.parts {
            parts.entry(part.owner.clone()).or_default().push(part.payload.clone());
        }
        Parts(parts)
    }

    /// The state of this kind that `owner` has; of any kind if it is to be found out from that.
    fn take(&mut self, owner: &str, kind: Option<&str>) -> Result<Payload, OriginError> {
        let missing = || OriginError::Missing(owner.to_owned());
        let all = self.0.get_mut(owner).ok_or_else(missing)?;
        let fits = |payload: &Payload| kind.is_none_or(|kind| payload.kind == kind);
        let place = all.iter().position(fits).ok_or_else(missing)?;
        let payload = all.swap_remove(place);
        if all.is_empty() {
            self.0.remove(owner);
        }
        Ok(payload)
    }

    fn end(self) -> Result<(), OriginError> {
        match self.0.into_keys().next() {
            Some(owner) => Err(OriginError::LeftOver(owner)),
            None => Ok(()),
        }
    }
}

fn taken<T>(owner: &str, result: Result<T, RestoreError>) -> Result<T, OriginError> {
    result.map_err(|source| OriginError::State { owner: owner.to_owned(), source })
}

/// Pages that a pager is asked for before it is trusted.
const LOOKS: usize = 4;

/// Puts the memory of `origin` into `ram`.
pub(crate) fn memory(origin: &Origin, ram: &mut GuestRam) -> Result<(), BuildError> {
    let (saved, wanted) = (origin.state.header.memory.size, ram.size());
    if saved != wanted {
        return Err(OriginError::MemorySize { saved, wanted }.into());
    }
    match &origin.memory {
        Source::Layers(layers) => Ok(ram.map_layers(layers.clone())?),
        Source::Pager(path) => {
            let samples = origin.state.header.memory.samples.iter().take(LOOKS).cloned();
            let known = samples.map(|sample| {
                let page = sample.page;
                let check: Check = Box::new(move |bytes| sample.is(bytes));
                (page, check)
            });
            let known = known.collect();
            Ok(ram.page_from(path, known).map_err(OriginError::Pager)?)
        }
    }
}

/// Starts what looks after the working set, if somebody wants that.
pub(super) fn companions(
    origin: &Origin,
    ram: &GuestRam,
    filter: seccomp::Mode,
) -> Result<Vec<Companion>, OriginError> {
    let id = &origin.state.header.memory.id;
    let prefetch = origin.prefetch.as_ref();
    let prefetch = prefetch.map(|wish| Companion::prefetch(wish, ram.image(), id, filter));
    let record = origin.record.as_ref();
    let record = record.map(|wish| Companion::record(wish, ram.image(), id, filter));
    Ok(prefetch.into_iter().chain(record).collect::<Result<_, _>>()?)
}

/// What has state beside memory.
pub(super) struct Restored<'a> {
    pub(super) vm: &'a dyn Vm,
    pub(super) vcpus: &'a [Box<dyn Vcpu>],
    /// What they are shown as CPUID, as far as that is known.
    pub(super) shown: &'a [Vec<kvm_cpuid_entry2>],
    /// What CPUID says of them is this host's, to be compared with what the guest was shown.
    pub(super) compare: bool,
    pub(super) serial: Option<&'a SerialPort>,
    pub(super) keyboard: &'a KeyboardPort,
    pub(super) acpi: &'a AcpiPort,
    pub(super) slots: &'a mut [Slot],
}

/// Gives everything its state. What is left over is an error, as is what is missing.
pub(super) fn states(origin: &Origin, machine: Restored<'_>) -> Result<(), BuildError> {
    let mut parts = Parts::new(&origin.state);
    let saved = Duration::from_millis(origin.state.header.created_ms);
    let vm = parts.take("vm", Some("vm"))?;
    let mut vm = taken("vm", VmState::restore(&vm))?;
    let passed = match origin.clock {
        Clock::Resume => Duration::ZERO,
        Clock::Advance => since(vm.host_time().unwrap_or(saved)),
    };
    vm.advance(passed);
    machine.vm.restore(&vm)?;
    for (index, vcpu) in machine.vcpus.iter().enumerate() {
        let owner = vcpu_name(index);
        let state = parts.take(&owner, Some("vcpu"))?;
        let mut state = taken(&owner, VcpuState::restore(&state))?;
        state.advance(passed);
        if machine.compare {
            // Made for this host, and not changed yet.
            let missing = arch::cpuid::missing(&state.cpuid, &vcpu.cpuid()?);
            if !missing.is_empty() {
                return Err(OriginError::Cpu(missing.join(", ")).into());
            }
        }
        let shown = machine.shown.get(index);
        if !shown.is_some_and(|shown| arch::cpuid::is_same(shown, &state.cpuid)) {
            vcpu.set_cpuid(&state.cpuid)?;
        }
        vcpu.restore(&state)?;
    }
    if let Some(serial) = machine.serial {
        let state = parts.take("serial", Some("serial"))?;
        taken("serial", serial.restore(&state))?;
    }
    let state = parts.take("i8042", Some("i8042"))?;
    taken("i8042", machine.keyboard.restore(&state))?;
    let state = parts.take("acpi", Some("acpi"))?;
    taken("acpi", machine.acpi.restore(&state))?;
    for slot in machine.slots {
        let name = slot.transport.name().to_owned();
        let transport = parts.take(&name, Some("transport"))?;
        let device = parts.take(&name, None)?;
        taken(&name, slot.restore(&transport, &device))?;
    }
    Ok(parts.end()?)
}

/// Time that passed since the host's clock stood at `then`, since 1970: nothing if it went back.
fn since(then: Duration) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(then)
}

/// Whose the state of a vCPU is.
pub(in crate::machine) fn vcpu_name(index: usize) -> String {
    format!("vcpu {index}")
}
