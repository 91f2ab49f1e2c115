//! System call filters: which threads have them, and what a call gets that no filter lists.

use machine_tests::{Guest, Running, Trespass, trespass};
use std::time::{Duration, Instant};

/// What the kernel marks its own threads in a process by, such as KVM's (PF_USER_WORKER).
const KERNELS_OWN: u64 = 0x4000;

/// A thread of Hull: its id, its name, and the mode of its filter as the kernel has it.
struct Thread {
    id: libc::pid_t,
    name: String,
    seccomp: u32,
}

fn threads(guest: &Running) -> Vec<Thread> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.id())).unwrap();
    tasks
        .map(Result::unwrap)
        .filter(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat")).unwrap();
            let fields = stat.rsplit_once(')').unwrap().1;
            let flags: u64 = fields.split_whitespace().nth(6).unwrap().parse().unwrap();
            flags & KERNELS_OWN == 0
        })
        .map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).unwrap();
            let field = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key));
                line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_owned()
            };
            Thread {
                id: task.file_name().to_str().unwrap().parse().unwrap(),
                name: field("Name:"),
                seccomp: field("Seccomp:").parse().unwrap(),
            }
        })
        .collect()
}

/// A guest that halts, with each kind of thread that a machine has while it waits.
fn halted(options: impl FnOnce(Guest) -> Guest) -> Running {
    let guest = Guest::new("halt").flag("--rng").option("--cpus", "2");
    let guest = options(guest).start();
    guest.wait_for("halting");
    guest
}

fn end(guest: Running) {
    guest.signal(libc::SIGTERM);
    let outcome = guest.finish();
    assert_eq!(outcome.code(), 143, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
}

/// A call that no thread of Hull has a use for, made by `thread`.
fn refused_call(thread: &Thread) -> Trespass {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match trespass(thread.id, libc::SYS_getppid) {
            Ok(done) => return done,
            // It was between two waits.
            Err(err) if Instant::now() > deadline => panic!("{}: {err}", thread.name),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

#[test]
fn filters_are_on_by_default_in_every_thread() {
    let guest = halted(|guest| guest);
    let threads = threads(&guest);
    for kind in ["main", "vcpu", "io"] {
        let is = |thread: &&Thread| kind_of(thread) == kind;
        assert!(threads.iter().any(|thread| is(&thread)), "no {kind} thread");
    }
    for thread in &threads {
        assert_eq!(thread.seccomp, 2, "{}", thread.name);
    }
    end(guest);
}

/// The kind of a thread by its name, as messages have it.
fn kind_of(thread: &Thread) -> &'static str {
    match thread.name.as_str() {
        name if name.starts_with("vcpu") => "vcpu",
        name if name.starts_with("io") => "io",
        name if name.starts_with("pool") => "pool",
        _ => "main",
    }
}

#[test]
fn a_refused_call_ends_the_machine_and_is_named() {
    let names: Vec<String> = {
        let guest = halted(|guest| guest);
        let names = threads(&guest).into_iter().map(|thread| thread.name).collect();
        end(guest);
        names
    };
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        // On a terminal, to see that it is put back; a name, to see that the next one gets it.
        let folder = tempfile::tempdir().unwrap();
        let named = |guest: Guest| {
            guest.option("--name", "victim").variable("XDG_RUNTIME_DIR", folder.path())
        };
        let guest = halted(|guest| named(guest).console("tty").on_terminal(80, 24));
        assert!(guest.is_raw());
        let threads = threads(&guest);
        let thread = threads.iter().find(|thread| thread.name == name).unwrap();
        assert_eq!(refused_call(thread), Trespass::Signal(libc::SIGSYS), "{name}");
        let outcome = guest.finish();
        // An exit, not a signal's.
        assert_eq!(outcome.status.code(), Some(148), "{name}: {}", outcome.stderr);
        let kind = kind_of(thread);
        let expected = format!(
            "hull: the {kind} thread made the system call getppid, which its filter refuses\n\
             hint: this is a defect of Hull or an attack; --seccomp log lets it through and logs it\n"
        );
        assert_eq!(outcome.stderr, expected, "{name}");
        end(halted(named));
    }
}

#[test]
fn seccomp_modes() {
    for (mode, filter) in [("on", 2), ("log", 2), ("off", 0)] {
        let guest = Guest::new("hello").option("--seccomp", mode);
        assert_eq!(guest.run().ok(), "hello\n", "{mode}");
        let guest = halted(|guest| guest.option("--seccomp", mode));
        for thread in threads(&guest) {
            assert_eq!(thread.seccomp, filter, "{mode}: {}", thread.name);
            if mode != "on" {
                let parent = Trespass::Returned(std::process::id().into());
                assert_eq!(refused_call(&thread), parent, "{mode}: {}", thread.name);
            }
        }
        if mode == "on" {
            let threads = threads(&guest);
            assert_eq!(refused_call(&threads[0]), Trespass::Signal(libc::SIGSYS));
            assert_eq!(guest.finish().code(), 148);
        } else {
            end(guest);
        }
    }
}
