//! Machines that go on where others were saved.

// All of this is tests; clippy sees that of functions with the attribute only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use arch::template::KvmCapability;
use common::{Running, kvm, payload, piped};
use kvm_bindings::CpuId;
use vmm::config::{ByteSize, VmConfig};
use vmm::hypervisor::kvm::Kvm;
use vmm::hypervisor::state::{VcpuState, VmState};
use vmm::hypervisor::{Capabilities, Hypervisor, HypervisorError, Vm};
use vmm::machine::{
    BuildError, Command, Ending, Frozen, Hollow, Host, Machine, Observed, Origin, OriginError,
    Ready, RunOptions, Shape, State as Is,
};
use vmm::memory::Runs;
use vmm::seccomp::{Mode, ThreadKind};
use vmm::snapshot::{self, Base, Diff, Files, Header, State, Taken};
use vmm::timings::Timings;

fn freeze(machine: &Running) -> Frozen {
    let (answer, frozen) = mpsc::sync_channel(1);
    let msrs = Arc::new(kvm().msr_numbers().unwrap());
    assert_eq!(machine.handle.call(Command::Freeze { msrs, answer }), Ok(Is::Paused));
    frozen.recv().unwrap()
}

/// Has a machine that is frozen handed out once more, without a step in between.
fn freeze_again(machine: &Running) -> Frozen {
    assert_eq!(
        machine.handle.call(Command::Thaw { resume: false, disks: Vec::new() }),
        Ok(Is::Paused)
    );
    freeze(machine)
}

/// A snapshot in a folder that is gone afterwards.
struct Kept {
    folder: tempfile::TempDir,
    header: Header,
}

impl Kept {
    fn files(&self) -> Files {
        Files::within(self.folder.path())
    }

    fn origin(&self) -> Origin {
        snapshot::load(&self.files(), None).unwrap()
    }

    fn base(&self) -> Base {
        let Files { state, memory } = self.files();
        Base { id: self.header.memory.id.clone(), state, memory }
    }
}

/// Saves a machine: all of it, or what changed since `base`.
fn saved(config: &VmConfig, frozen: Frozen, base: Option<Base>) -> Kept {
    let Frozen { parts, image, .. } = frozen;
    image.freeze().unwrap();
    let diff = base.map(|base| Diff { pages: image.changed(), base: Some(base), partial: false });
    let (config, disks, contents) = (config.clone(), Vec::new(), image.contents());
    let folder = tempfile::tempdir().unwrap();
    let taken = Taken {
        id: None,
        created_ms: snapshot::now_ms(),
        host: snapshot::this_host(),
        parts,
        config,
        disks,
        contents,
        diff,
    };
    let header = snapshot::store(taken, &Files::within(folder.path()), &|_, _| {}).unwrap();
    image.saved();
    Kept { folder, header }
}

/// A machine that goes on from `origin`, and is paused.
fn restored(config: VmConfig, origin: Origin) -> Running {
    restored_by(|| Box::new(kvm()), Ready::default, config, origin)
}

/// The same with that hypervisor, of what is ready.
fn restored_by(
    hypervisor: impl FnOnce() -> Box<dyn Hypervisor> + Send + 'static,
    ready: impl FnOnce() -> Ready + Send + 'static,
    config: VmConfig,
    origin: Origin,
) -> Running {
    let (console, reader) = piped();
    let (sender, receiver) = mpsc::channel();
    let body = move || {
        let timings = Arc::new(Timings::new(Instant::now()));
        let (observed, hypervisor) = (Observed::default(), hypervisor());
        let hypervisor = hypervisor.as_ref();
        let host = Host { hypervisor, pvm: false, timings, observed, window: None };
        let machine = Machine::restore(&config, &origin, &host, ready())
            .map_err(|err| common::chain(&err))?;
        sender.send(machine.handle()).unwrap();
        let thread = ThreadKind::Main;
        let options =
            RunOptions { console, signals: None, services: Vec::new(), thread, last: false };
        machine.run(options).map_err(|err| common::chain(&err))
    };
    let thread = std::thread::spawn(body);
    match receiver.recv() {
        Ok(handle) => Running::of(handle, reader, thread),
        Err(_) => panic!("{:?}", thread.join().unwrap()),
    }
}

#[test]
fn a_machine_goes_on_where_another_was_saved() {
    let config = payload("spin say=1 dirty=10485760");
    let mut first = Running::start(config.clone(), None);
    first.wait_for("hello");
    first.wait_for(".");
    let kept = saved(&config, freeze(&first), None);
    // What is zero takes no room.
    let data = kept.header.memory.data;
    assert!((10 << 20..12 << 20).contains(&data), "{data}");
    let mut second = restored(config.clone(), kept.origin());
    let mut third = restored(config.clone(), kept.origin());
    for machine in [&mut second, &mut third] {
        assert_eq!(machine.handle.call(Command::Status), Ok(Is::Paused));
        assert_eq!(machine.handle.call(Command::Resume), Ok(Is::Running));
        machine.wait_for("...");
    }
    // The one that was saved goes on as well, when nobody looks at it any more.
    assert!(first.handle.call(Command::Resume).is_err());
    assert_eq!(
        first.handle.call(Command::Thaw { resume: true, disks: Vec::new() }),
        Ok(Is::Running)
    );
    first.wait_for("..");
    // And so does a copy of a copy, which has the same state as long as it did not run.
    let before = saved(&config, freeze(&third), None);
    let fourth = restored(config.clone(), before.origin());
    let after = saved(&config, freeze(&fourth), None);
    for (before, after) in before.origin().state.parts.iter().zip(&after.origin().state.parts) {
        // Clocks go on.
        if !matches!(before.payload.kind, "vm" | "vcpu" | "acpi") {
            assert_eq!(before, after);
        }
    }
    assert_eq!(before.header.memory.data, after.header.memory.data);
    for machine in [first, second, third, fourth] {
        machine.handle.call(Command::Quit).unwrap();
        assert_eq!(machine.finish().0, Ok(Ending::Quit));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    let config = payload("spin say=1");
    let mut first = Running::start(config.clone(), None);
    first.wait_for("hello");
    let kept = saved(&config, freeze(&first), None);
    let refused = |change: &dyn Fn(&mut State)| {
        let mut origin = kept.origin();
        change(&mut origin.state);
        let (observed, kvm) = (Observed::default(), kvm());
        let timings = Arc::new(Timings::new(Instant::now()));
        let host = Host { hypervisor: &kvm, pvm: false, timings, observed, window: None };
        match Machine::restore(&config, &origin, &host, Ready::default()) {
            Ok(_) => panic!("it was taken"),
            Err(err) => common::chain(&err),
        }
    };
    let part = |state: &State, kind: &str| {
        state.parts.iter().position(|part| part.payload.kind == kind).unwrap()
    };
    let lacking = refused(&|state| {
        let place = part(state, "vcpu");
        let payload = &mut state.parts[place].payload;
        // As if it came from another host.
        state.header.host = None;
        let mut vcpu = VcpuState::restore(payload).unwrap();
        // A reserved bit, which no host has.
        let leaf = vcpu.cpuid.iter_mut().find(|entry| entry.function == 1).unwrap();
        leaf.ecx |= 1 << 16;
        *payload = vcpu.save();
    });
    assert!(lacking.contains("lacks") && lacking.contains("0x1/0 ecx bit 16"), "{lacking}");
    let gone = refused(&|state| drop(state.parts.remove(part(state, "serial"))));
    assert!(gone.contains("no state of serial"), "{gone}");
    let extra = refused(&|state| {
        let mut other = state.parts[part(state, "serial")].clone();
        other.owner = "disk7".to_owned();
        state.parts.push(other);
    });
    assert!(extra.contains("disk7, which the machine has not"), "{extra}");
    for kind in ["vm", "vcpu", "serial", "i8042", "acpi"] {
        let short = refused(&|state| {
            let place = part(state, kind);
            state.parts[place].payload.bytes.truncate(2);
            state.parts[place].payload.bytes.push(7);
        });
        assert!(short.contains("cannot be taken"), "{kind}: {short}");
        let later = refused(&|state| {
            let place = part(state, kind);
            state.parts[place].payload.version += 1;
        });
        assert!(later.contains("version 2"), "{kind}: {later}");
    }
    first.handle.call(Command::Quit).unwrap();
    assert_eq!(first.finish().0, Ok(Ending::Quit));
}

#[test]
fn a_diff_has_what_changed() {
    let config = payload("spin say=1 dirty=10485760");
    let mut first = Running::start(config.clone(), None);
    first.wait_for("hello");
    first.wait_for(".");
    let whole = saved(&config, freeze(&first), None);
    let thaw = |machine: &mut Running| {
        assert_eq!(
            machine.handle.call(Command::Thaw { resume: true, disks: Vec::new() }),
            Ok(Is::Running)
        );
        machine.wait_for("..");
    };
    thaw(&mut first);
    let second = saved(&config, freeze(&first), Some(whole.base()));
    thaw(&mut first);
    let third = saved(&config, freeze(&first), Some(second.base()));
    for diff in [&second, &third] {
        let data = diff.header.memory.data;
        // This guest has no business with memory.
        assert!(data < 1 << 20, "{data}");
    }
    // Each goes on where it was, over what it is a diff to.
    let mut copies: Vec<_> =
        [&whole, &second, &third].map(|kept| restored(config.clone(), kept.origin())).into();
    for machine in &mut copies {
        assert_eq!(machine.handle.call(Command::Resume), Ok(Is::Running));
        machine.wait_for("..");
    }
    // So does one that was merged, without them; and it is what the machine would have been saved as.
    let target = tempfile::tempdir().unwrap();
    let target = Files::within(target.path());
    snapshot::merge(&third.files(), None, &target, &|_, _| {}).unwrap();
    let now = saved(&config, freeze_again(&first), None);
    let bytes = |files: &Files| std::fs::read(&files.memory).unwrap();
    assert!(bytes(&now.files()) == bytes(&target), "the merged memory is another");
    drop((whole, second, third));
    let mut merged = restored(config.clone(), snapshot::load(&target, None).unwrap());
    merged.handle.call(Command::Resume).unwrap();
    merged.wait_for("..");
    for machine in copies.into_iter().chain([first, merged]) {
        machine.handle.call(Command::Quit).unwrap();
        assert_eq!(machine.finish().0, Ok(Ending::Quit));
    }
}

/// Saves `first`, and lets a copy go on in its place, so often as `rounds` says or until it has ended. Returns
/// the last one, and what those before it printed.
fn handed_on(config: &VmConfig, first: Running, rounds: u64) -> (Running, String) {
    let (mut machine, mut text, mut round) = (first, String::new(), 0);
    while round < rounds {
        // At once, and after some work.
        std::thread::sleep(Duration::from_millis(round % 5));
        let kept = saved(config, freeze(&machine), None);
        machine.handle.call(Command::Quit).unwrap();
        let (ending, said) = machine.finish();
        assert_eq!(ending, Ok(Ending::Quit));
        text += &said;
        machine = restored(config.clone(), kept.origin());
        assert_eq!(machine.handle.call(Command::Resume), Ok(Is::Running));
        round += 1;
    }
    (machine, text)
}

#[test]
fn a_guest_is_saved_in_the_middle_of_an_exit() {
    // It does nothing but write to a port, a string at a time.
    const SIZE: usize = 400_000;
    let config = payload(&format!("serialflood size={SIZE}"));
    let (last, mut text) = handed_on(&config, Running::start(config.clone(), None), 20);
    let (ending, rest) = last.finish();
    assert_eq!(ending, Ok(Ending::Reset));
    text += &rest;
    let expected = common::flood(SIZE) + "done\n";
    let same = text.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
    assert!(text == expected, "the texts differ from byte {same} on: {}", text.len());
}

#[test]
fn requests_in_flight_are_neither_lost_nor_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = payload("blk op=verify size=4096 count=4096");
    config.cpus = 2;
    config.rng = true;
    common::add_disk(&mut config, &folder, 16);
    let (last, mut text) = handed_on(&config, Running::start(config.clone(), None), 15);
    let (ending, rest) = last.finish();
    text += &rest;
    assert_eq!(ending, Ok(Ending::Reset), "{text}");
    assert!(text.contains("count=4096 failed=0 bad=0"), "{text}");
}

/// Snapshots as version 1 writes them, which every later version reads. `UPDATE=1` writes them anew: with a new
/// version, beside these, and not instead of them.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

#[test]
fn what_was_saved_once_is_read_for_ever() {
    let mut config = payload("spin say=1");
    config.memory.size = ByteSize(4 << 20);
    config.rng = true;
    config.balloon = Some(vmm::config::BalloonConfig::default());
    if std::env::var_os("UPDATE").is_some() {
        let first = Running::start(config.clone(), None);
        std::thread::sleep(Duration::from_millis(300));
        let Frozen { parts, image, .. } = freeze(&first);
        image.freeze().unwrap();
        let mut config = config.clone();
        // It is nobody's in particular.
        config.kernel.path = "/golden/payload.elf".into();
        let taken = |diff| {
            let (config, disks, contents) = (config.clone(), Vec::new(), image.contents());
            let parts = parts.clone();
            Taken {
                id: None,
                created_ms: 1_700_000_000_000,
                host: None,
                parts,
                config,
                disks,
                contents,
                diff,
            }
        };
        for name in ["full", "diff"] {
            std::fs::create_dir_all(golden().join(name)).unwrap();
        }
        let files = Files::within(&golden().join("full"));
        let id = snapshot::store(taken(None), &files, &|_, _| {}).unwrap().memory.id;
        let base = Some(Base { id, state: files.state, memory: files.memory });
        let pages = Runs::new([3..5, 400..402]);
        let files = Files::within(&golden().join("diff"));
        snapshot::store(taken(Some(Diff { pages, base, partial: false })), &files, &|_, _| {})
            .unwrap();
        first.handle.call(Command::Quit).unwrap();
        first.finish().0.unwrap();
    }
    for name in ["full", "diff"] {
        let origin = snapshot::load(&Files::within(&golden().join(name)), None).unwrap();
        let saved = &origin.state.header.config;
        assert_eq!((saved.cpus, saved.memory.size), (config.cpus, config.memory.size), "{name}");
        for part in &origin.state.parts {
            // As it was written, whatever it is by now.
            let again = match part.payload.kind {
                "vm" => VmState::restore(&part.payload).unwrap().save(),
                "vcpu" => VcpuState::restore(&part.payload).unwrap().save(),
                _ => continue,
            };
            assert_eq!(again, part.payload, "{name}: {}", part.owner);
        }
        let (observed, kvm) = (Observed::default(), kvm());
        let timings = Arc::new(Timings::new(Instant::now()));
        let host = Host { hypervisor: &kvm, pvm: false, timings, observed, window: None };
        // The CPU that it was saved on may be another than this one, and KVM too; nothing else may.
        match Machine::restore(saved, &origin, &host, Ready::default()) {
            Ok(machine) => drop(machine),
            Err(BuildError::Origin(OriginError::Cpu(_)) | BuildError::Hypervisor(_)) => {}
            Err(error) => panic!("{name}: {}", common::chain(&error)),
        }
    }
}

/// KVM that counts the VMs it makes.
struct Counting(Kvm, Arc<AtomicUsize>);

impl Hypervisor for Counting {
    fn capabilities_with(
        &self,
        changes: &[KvmCapability],
    ) -> Result<Capabilities, HypervisorError> {
        self.0.capabilities_with(changes)
    }

    fn supported_cpuid(&self) -> Result<CpuId, HypervisorError> {
        self.0.supported_cpuid()
    }

    fn msr_numbers(&self) -> Result<Vec<u32>, HypervisorError> {
        self.0.msr_numbers()
    }

    fn create_vm(&self) -> Result<Box<dyn Vm>, HypervisorError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.create_vm()
    }
}

/// A VM that is ready for a machine of so many MiB.
fn ready(mib: u64) -> Ready {
    let shape = Shape { cpus: 1, memory: mib << 20, huge_pages: false };
    Ready { hollow: Some(Hollow::new(&kvm(), shape, Mode::Off).unwrap()), disks: Vec::new() }
}

#[test]
fn what_is_ready_is_not_made_again_and_what_does_not_fit_is_not_used() {
    let made = Arc::new(AtomicUsize::new(0));
    let counting = |made: &Arc<AtomicUsize>| Counting(kvm(), Arc::clone(made));
    for (mib, forkable, makes) in [(64, false, 0), (128, false, 1), (64, true, 1)] {
        let mut config = payload("hello");
        config.memory.forkable = forkable;
        made.store(0, Ordering::Relaxed);
        let (console, mut reader) = piped();
        let ending = common::run_in(&config, &counting(&made), ready(mib), console, None, |_| {});
        assert_eq!(ending, Ok(Ending::Reset));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.contains("hello"), "{text}");
        assert_eq!(made.load(Ordering::Relaxed), makes, "{mib} {forkable}");
    }
    let config = payload("spin say=1");
    let mut first = Running::start(config.clone(), None);
    first.wait_for("hello");
    let kept = saved(&config, freeze(&first), None);
    // From another start of this host, what CPUID says is compared.
    for host in [kept.header.host.clone(), Some("another".to_owned())] {
        made.store(0, Ordering::Relaxed);
        let mut origin = kept.origin();
        origin.state.header.host = host;
        let counting = counting(&made);
        let mut copy = restored_by(|| Box::new(counting), || ready(64), config.clone(), origin);
        assert_eq!(copy.handle.call(Command::Resume), Ok(Is::Running));
        copy.wait_for("...");
        assert_eq!(made.load(Ordering::Relaxed), 0);
    }
}
