//! Each call of the hypervisor made to fail once: the machine ends with an error that names the
//! call, and nothing of it is left.

// All of this is tests; clippy sees that of functions with the attribute only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{add_disk, alone, kvm, one_segment_kernel, payload, run};
use vmm::config::VmConfig;
use vmm::console::{Console, Sink};
use vmm::hypervisor::fault::{Faulty, Plan};
use vmm::machine::{Command, Ending, Handle, State};

/// Failures of KVM_RUN in a row after which most of them are left out: a guest runs thousands of
/// times, and each of them is like the other.
const RUNS: usize = 24;

/// What a process holds.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: BTreeMap<String, usize>,
    threads: usize,
    /// Bytes in mappings as large as only guest memory is, and the mappings of KVM and of files in
    /// the test's folder.
    memory: u64,
    files: Vec<String>,
}

impl Holdings {
    fn now(folder: &str) -> Holdings {
        let mut descriptors = BTreeMap::new();
        for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
            if let Ok(target) = std::fs::read_link(entry.path()) {
                let target = target.to_string_lossy().into_owned();
                // The directory being read is one of them.
                if !target.contains("/fd") {
                    *descriptors.entry(target).or_default() += 1;
                }
            }
        }
        let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
        let mut memory = 0;
        let mut files = Vec::new();
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let len = number(end) - number(start);
            if len >= 16 << 20 && line.contains(" rw-p ") {
                memory += len;
            }
            if line.contains("kvm") || line.contains("io_uring") || line.contains(folder) {
                files.push(line.to_owned());
            }
        }
        Holdings { descriptors, threads, memory, files }
    }

    /// Waits until the process holds what it held before: threads of the kernel's own io_uring
    /// workers, and those just joined, stay in /proc for a moment.
    fn wait(&self, folder: &str, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let now = Holdings::now(folder);
            if now == *self {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: left {now:#?}\nof {self:#?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Runs `config` with the first call failing, the second, and so on until a run gets by without.
/// `during` is told of the machine while it runs. Returns which calls failed, and how often.
fn each_call_fails(
    config: &VmConfig,
    output: &str,
    during: impl Fn(Handle) + Copy + Send + Sync + 'static,
) -> BTreeMap<String, usize> {
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_string_lossy().into_owned();
    let mut config = config.clone();
    config.kernel.path = one_segment_kernel(&folder);
    let console = folder.path().join("console");
    let mut failed: BTreeMap<String, usize> = BTreeMap::new();
    let mut before: Option<Holdings> = None;
    let mut number = 0;
    loop {
        let plan = Plan::new(number);
        // Shown if this hangs.
        eprintln!("call {number}");
        let result = {
            let hypervisor = Faulty::new(kvm(), Arc::clone(&plan));
            let sink = Sink::create(&console, [], true).unwrap();
            let mut helper = None;
            let result =
                run(&config, &hypervisor, Console { sink, ..Console::off() }, None, |handle| {
                    helper = Some(std::thread::spawn(move || during(handle)));
                });
            if let Some(helper) = helper {
                helper.join().unwrap();
            }
            result
        };
        let said = format!("call {number}: {result:?}");
        match &before {
            Some(before) => before.wait(&name, &said),
            // The first call fails before anything was made; what is there now stays.
            None => before = Some(Holdings::now(&name)),
        }
        if !plan.reached() {
            assert!(result.is_ok(), "{said}");
            let text = std::fs::read_to_string(&console).unwrap();
            assert!(text.contains(output), "{text}");
            return failed;
        }
        let Err(message) = result else { panic!("{said}, although it failed") };
        let Some((_, call)) = message.split_once("KVM_") else { panic!("{message}") };
        let Some((call, _)) = call.split_once(" (injected)") else { panic!("{message}") };
        let count = failed.entry(call.to_owned()).or_default();
        *count += 1;
        number += if call == "RUN" && *count > RUNS { number / 3 } else { 1 };
    }
}

/// The calls that every machine makes.
const ALWAYS: [&str; 18] = [
    "CHECK_EXTENSION",
    "CREATE_IRQCHIP",
    "CREATE_PIT2",
    "CREATE_VCPU",
    "CREATE_VM",
    "GET_LAPIC",
    "GET_SREGS",
    "GET_SUPPORTED_CPUID",
    "IRQFD",
    "RUN",
    "SET_CPUID2",
    "SET_FPU",
    "SET_LAPIC",
    "SET_MSRS",
    "SET_REGS",
    "SET_SREGS",
    "SET_TSS_ADDR",
    "SET_USER_MEMORY_REGION",
];

#[test]
fn a_small_machine() {
    alone("a_small_machine", || {
        let failed = each_call_fails(&payload("hello"), "hello\n", |_| {});
        for call in ALWAYS {
            assert!(failed.contains_key(call), "{call} never failed: {failed:?}");
        }
        assert!(failed["RUN"] >= 6, "one per character: {failed:?}");
    });
}

#[test]
fn a_machine_with_devices_and_processors() {
    alone("a_machine_with_devices_and_processors", || {
        let folder = tempfile::tempdir().unwrap();
        let mut config = payload("blk op=verify size=4096 count=4");
        config.cpus = 3;
        config.rng = true;
        add_disk(&mut config, &folder, 1);
        let failed = each_call_fails(&config, "failed=0 bad=0", |_| {});
        assert_eq!(failed["CREATE_VCPU"], 3);
        assert_eq!(failed["SET_MSRS"], 3);
        assert_eq!(failed["IRQFD"], 4, "console, power button, rng, disk");
        assert_eq!(failed["IOEVENTFD"], 2);
    });
}

#[test]
fn a_machine_that_is_paused() {
    alone("a_machine_that_is_paused", || {
        let mut config = payload("spin");
        config.cpus = 2;
        let failed = each_call_fails(&config, "hello", |handle| {
            std::thread::sleep(Duration::from_millis(20));
            for _ in 0..3 {
                // A machine that ended answers that it has.
                if handle.call(Command::Pause) != Ok(State::Paused)
                    || handle.call(Command::Resume) != Ok(State::Running)
                {
                    return;
                }
            }
            // Paused: no vCPU enters the guest any more, so a failure cannot come after this.
            if handle.call(Command::Pause) == Ok(State::Paused) {
                let _ = handle.call(Command::Quit);
            }
        });
        assert!(failed["RUN"] > 10, "{failed:?}");
    });
}

#[test]
fn a_run_without_a_fault_ends_as_the_guest_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = payload("hello end=poweroff");
    config.kernel.path = one_segment_kernel(&folder);
    let hypervisor = Faulty::new(kvm(), Plan::new(usize::MAX));
    let ending = run(&config, &hypervisor, Console::off(), None, |_| {});
    assert_eq!(ending, Ok(Ending::PowerOff));
}
