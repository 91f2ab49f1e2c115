//! Processes that are killed, or refused something, at any step of the handing over.

use machine_tests::{Family, Running, Tracer, eventually};
use serde_json::Value;

use super::{answers, children, fork, goes_on, kill, pool, verb};

/// System calls that the machine makes for it.
const PARENT: [&str; 9] = [
    "connect",
    "memfd_create",
    "ftruncate",
    "fcntl",
    "pwrite64",
    "mmap",
    "sendmsg",
    "ppoll,poll",
    "recvfrom,read",
];
/// Those of a pool.
const POOL: [&str; 7] = [
    "accept4",
    "recvfrom",
    "sendmsg",
    "socketpair",
    "clone,clone3,vfork,fork",
    "poll,ppoll",
    "close",
];
/// Those of a process that becomes a child.
const CHILD: [&str; 14] = [
    "execve",
    "dup2",
    "setsid",
    "recvmsg",
    "recvfrom,read",
    "openat",
    "mmap",
    "ioctl",
    "flock",
    "bind",
    "write",
    "clone3",
    "seccomp,prctl",
    "sendto",
];

/// All that is left are these, which go on, and those that `hull ps` has.
fn settled(family: &Family, others: usize, names: &[&str]) {
    let mut list = String::new();
    let there = || {
        list = verb(family, &["ps", "--json"]).ok().to_owned();
        let machines: Value = serde_json::from_str(&list).unwrap();
        let machines = machines.as_array().unwrap();
        let has = |name: &&str| machines.iter().any(|machine| machine["name"] == **name);
        names.iter().all(has)
            && machines.len() == names.len()
            && family.processes().len() == names.len() + others
    };
    eventually(there, || {
        format!(
            "wanted: {names:?} and {others}; processes: {:?}, {:?}",
            family.processes(),
            family.entries()
        )
    });
}

/// Ends those of a fork that were made, and says how many there were.
fn end(family: &Family, outcome: &machine_tests::Outcome, count: usize) -> usize {
    assert!([0, 1].contains(&outcome.code()), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    if outcome.stdout.is_empty() {
        return 0;
    }
    let children = children(outcome);
    assert_eq!(children.len(), count);
    for child in children.iter().filter(|child| !child["pid"].is_u64()) {
        let why = child["fault_message"].as_str().unwrap_or_default();
        assert!(why.len() > 5, "{child}");
    }
    let made: Vec<_> = children.iter().filter(|child| child["pid"].is_u64()).collect();
    for child in &made {
        // One may be killed as soon as it has said that it lives.
        let _ = answers(child["api_sock"].as_str().unwrap().as_ref());
        // SAFETY: kill has no memory arguments; the process is one of this test.
        unsafe { libc::kill(super::pid(child), libc::SIGKILL) };
    }
    let _ = family;
    made.len()
}

#[test]
fn a_parent_is_killed() {
    let family = Family::default();
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let (mut ended, mut done) = (0, 0);
    for step in PARENT {
        let mut hits = 0;
        for time in [1, 2, 4] {
            let parent = family.parent("m");
            let before = children(&fork(&family, &["m", "--json"]));
            assert_eq!(before[0]["name"], "m-1");
            let tracer = Tracer::attach(parent.id(), step, "signal=KILL", &time.to_string());
            let outcome = fork(&family, &["m", "--json", "-n", "2", "--name", "n-{n}"]);
            hits += tracer.end();
            let survived = outcome.code() == 0;
            done += u32::from(survived);
            ended += u32::from(!survived);
            parent.signal(libc::SIGKILL);
            parent.finish();
            // Children live, if they were made, and nobody is half made.
            assert!(answers(before[0]["api_sock"].as_str().unwrap().as_ref()));
            kill(&before[0]);
            for name in ["n-1", "n-2"] {
                let stopped = verb(&family, &["stop", "--now", name]).code();
                assert!(stopped == 0 || !survived, "{step} {time}: {name} is missing");
            }
            settled(&family, 3, &[]);
            if survived {
                break;
            }
        }
        assert!(hits > 0, "{step} is not made");
    }
    assert!(ended > 6 && done > 0, "{ended} times it was killed, {done} times not");
    assert!(pool.printed().is_empty());
}

#[test]
fn a_parent_is_refused_something() {
    let family = Family::default();
    // What is refused is replaced by a system call that the filters do not know.
    let scenario = "work dirty=2M size=64K every=100M";
    let guest = family.guest("m", scenario).option("--seccomp", "off");
    let mut parent = Family::at_work(guest.start());
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let mut failed = 0;
    for (step, error) in [
        ("connect", "ECONNREFUSED"),
        ("socket", "EMFILE"),
        ("memfd_create", "ENFILE"),
        ("ftruncate", "ENOMEM"),
        ("fcntl", "EBUSY"),
        ("pwrite64", "ENOSPC"),
        ("mmap", "ENOMEM"),
        ("sendmsg", "ETOOMANYREFS"),
        ("sendmsg", "EPIPE"),
        ("ppoll,poll", "ENOMEM"),
        // No threads.
        ("clone3", "EAGAIN"),
    ] {
        let mut hits = 0;
        for time in ["1", "2", "1+"] {
            let tracer = Tracer::attach(parent.id(), step, &format!("error={error}"), time);
            let outcome = fork(&family, &["m", "--json", "-n", "2"]);
            hits += tracer.end();
            failed += u32::from(outcome.code() != 0);
            if (step, time) == ("memfd_create", "1+") {
                outcome.failed(&["cannot freeze the guest's memory", "Too many open files"]);
            }
            end(&family, &outcome, 2);
            assert!(!parent.has_ended(), "{step} {error} {time}: {outcome:?}");
            settled(&family, 3, &["m"]);
            goes_on(&parent);
            let outcome = fork(&family, &["m", "--json", "-n", "2"]);
            assert_eq!(outcome.code(), 0, "{step} {error} {time}: {}", outcome.stdout);
            end(&family, &outcome, 2);
        }
        assert!(hits > 0, "{step} is not made");
    }
    assert!(failed > 15, "{failed}");
    drop(pool);
}

/// Forks while something happens to a pool, or those that it makes, at a step. Returns how many were made, whether the
/// pool lives, and how often it happened.
fn with_pool(
    family: &Family,
    parent: &Running,
    steps: &str,
    what: &str,
    time: u32,
) -> (usize, bool, usize) {
    let mut pool = pool(family, &["--keep", "number=1,memory=64M"], 1);
    let tracer = Tracer::attach(pool.id(), steps, what, &time.to_string());
    // The first is ready since before; the others are made under way.
    let outcome = fork(family, &["m", "--json", "-n", "4"]);
    let lives = !pool.has_ended();
    let hits = tracer.end();
    let made = end(family, &outcome, 4);
    pool.signal(libc::SIGTERM);
    let code = pool.finish().code();
    assert!(code != 101, "the pool panicked");
    settled(family, 0, &["m"]);
    goes_on(parent);
    (made, lives, hits)
}

#[test]
fn a_pool_is_killed() {
    let family = Family::default();
    let parent = family.parent("m");
    let (mut some, mut dead) = (0, 0);
    for steps in POOL {
        let mut all = 0;
        for time in [1, 2, 5] {
            // Those that it makes are not of this test.
            let (made, lives, hits) = with_pool(&family, &parent, steps, "signal=KILL", time);
            dead += u32::from(!lives);
            some += u32::from(made > 0);
            all += hits;
        }
        assert!(all > 0, "{steps} is not made");
    }
    assert!(some > 3 && dead > 6, "{some} {dead}");
}

#[test]
fn a_pool_is_refused_something() {
    let family = Family::default();
    let parent = family.parent("m");
    for (steps, error) in [
        ("accept4", "EMFILE"),
        ("recvfrom", "ENOMEM"),
        ("sendmsg", "EPIPE"),
        ("socketpair", "EMFILE"),
        ("dup2", "EMFILE"),
        ("clone,clone3,vfork,fork", "EAGAIN"),
        ("execve", "ENOMEM"),
        ("setsid", "EPERM"),
    ] {
        let what = format!("error={error}");
        let mut all = 0;
        for time in [1, 2] {
            let (_, lives, hits) = with_pool(&family, &parent, steps, &what, time);
            assert!(lives, "{steps} {error} {time}");
            all += hits;
        }
        assert!(all > 0, "{steps} is not made");
    }
}

#[test]
fn a_child_is_killed() {
    let family = Family::default();
    let parent = family.parent("m");
    let (mut some, mut missing) = (0, 0);
    for steps in CHILD {
        let mut all = 0;
        for time in [1, 3, 20] {
            // Which the pool is never, that makes none of them so often before it is looked at.
            let (made, _, hits) = with_pool(&family, &parent, steps, "signal=KILL", time);
            some += made;
            missing += 4 - made;
            all += hits;
        }
        assert!(all > 0, "{steps} is not made");
    }
    assert!(some > 10 && missing > 20, "{some} were made, {missing} were not");
}
