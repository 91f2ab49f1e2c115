//! Machines that go on where others were saved.

// All of this is tests; clippy sees that of functions with the attribute only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs::File;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use common::{Running, kvm, payload, piped};
use vmm::hypervisor::Hypervisor;
use vmm::hypervisor::state::VcpuState;
use vmm::machine::{
    Command, Ending, Frozen, Host, Machine, Observed, Origin, RunOptions, State as Is,
};
use vmm::seccomp::ThreadKind;
use vmm::snapshot::{self, Header, State};
use vmm::timings::Timings;

fn freeze(machine: &Running) -> Frozen {
    let (answer, frozen) = mpsc::sync_channel(1);
    let msrs = Arc::new(kvm().msr_numbers().unwrap());
    assert_eq!(machine.handle.call(Command::Freeze { msrs, answer }), Ok(Is::Paused));
    frozen.recv().unwrap()
}

/// What a file of it would hold, through the form that it has there.
fn saved(config: &vmm::config::VmConfig, frozen: Frozen) -> (State, File) {
    let memory = tempfile::tempfile().unwrap();
    let header = Header {
        hull: String::new(),
        created_ms: 0,
        config: config.clone(),
        memory: snapshot::save_memory(&frozen.image, &memory, &|_| {}).unwrap(),
        disks: Vec::new(),
    };
    let bytes = snapshot::write(&State { header, parts: frozen.parts }).unwrap();
    (snapshot::parse(&bytes).unwrap(), memory)
}

/// A machine that goes on from `origin`, and is paused.
fn restored(config: vmm::config::VmConfig, origin: Origin) -> Running {
    let (console, reader) = piped();
    let (sender, receiver) = mpsc::channel();
    let body = move || {
        let timings = Arc::new(Timings::new(Instant::now()));
        let (observed, kvm) = (Observed::default(), kvm());
        let host = Host { hypervisor: &kvm, pvm: false, timings, observed, window: None };
        let machine =
            Machine::restore(&config, &origin, &host).map_err(|err| common::chain(&err))?;
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
    let (state, memory) = saved(&config, freeze(&first));
    // What is zero takes no room.
    let data = state.header.memory.data;
    assert!((10 << 20..12 << 20).contains(&data), "{data}");
    let again = |state: &State| {
        let memory = memory.try_clone().unwrap();
        restored(config.clone(), Origin { state: state.clone(), memory })
    };
    let mut second = again(&state);
    let mut third = again(&state);
    for machine in [&mut second, &mut third] {
        assert_eq!(machine.handle.call(Command::Status), Ok(Is::Paused));
        assert_eq!(machine.handle.call(Command::Resume), Ok(Is::Running));
        machine.wait_for("...");
    }
    // The one that was saved goes on as well, when nobody looks at it any more.
    assert!(first.handle.call(Command::Resume).is_err());
    assert_eq!(first.handle.call(Command::Thaw { resume: true }), Ok(Is::Running));
    first.wait_for("..");
    // And so does a copy of a copy, which has the same state as long as it did not run.
    let (fourth_state, fourth_memory) = saved(&config, freeze(&third));
    let origin = Origin { state: fourth_state.clone(), memory: fourth_memory.try_clone().unwrap() };
    let fourth = restored(config.clone(), origin);
    let (again_state, _) = saved(&config, freeze(&fourth));
    for (before, after) in fourth_state.parts.iter().zip(&again_state.parts) {
        // Clocks go on.
        if !matches!(before.payload.kind, "vm" | "vcpu" | "acpi") {
            assert_eq!(before, after);
        }
    }
    assert_eq!(fourth_state.header.memory.data, again_state.header.memory.data);
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
    let (state, memory) = saved(&config, freeze(&first));
    let refused = |change: &dyn Fn(&mut State)| {
        let mut state = state.clone();
        change(&mut state);
        let (observed, kvm) = (Observed::default(), kvm());
        let timings = Arc::new(Timings::new(Instant::now()));
        let host = Host { hypervisor: &kvm, pvm: false, timings, observed, window: None };
        let origin = Origin { state, memory: memory.try_clone().unwrap() };
        match Machine::restore(&config, &origin, &host) {
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
