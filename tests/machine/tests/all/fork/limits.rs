//! Hosts that run out of something while a machine is forked: who cannot be had is named, the others and the
//! machine live, and nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use machine_tests::{Family, Running, eventually};
use serde_json::Value;

use super::{children, fork, goes_on, kill, pool, verb};

/// Another limit for a process that runs.
fn set_limit(id: u32, resource: libc::__rlimit_resource_t, value: u64) -> u64 {
    let id = id as libc::pid_t;
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: structures that outlive the calls.
    let result = unsafe {
        libc::prlimit(id, resource, std::ptr::null(), &raw mut old);
        let new = libc::rlimit { rlim_cur: value, ..old };
        libc::prlimit(id, resource, &raw const new, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    old.rlim_cur
}

fn descriptors(id: u32) -> usize {
    fs::read_dir(format!("/proc/{id}/fd")).unwrap().count()
}

/// The lowest number that no descriptor has: with this limit there are no more.
fn lowest(id: u32) -> u64 {
    (3..).find(|n| fs::symlink_metadata(format!("/proc/{id}/fd/{n}")).is_err()).unwrap()
}

fn mappings(id: u32) -> usize {
    fs::read_to_string(format!("/proc/{id}/maps")).unwrap().lines().count()
}

/// Clock ticks that a process took.
fn ticks(id: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Forks; each child is there or has a reason, and those that are there are ended. Returns how many were, and
/// the reasons.
fn forked(family: &Family, words: &[&str], count: usize) -> (usize, Vec<String>) {
    let outcome = fork(family, &[&["m", "--json", "-n", &count.to_string()], words].concat());
    if outcome.stdout.is_empty() {
        assert_eq!(outcome.code(), 1, "{}", outcome.stderr);
        return (0, vec![outcome.stderr]);
    }
    let children = children(&outcome);
    assert_eq!(children.len(), count);
    let fault = |child: &Value| child["fault_message"].as_str().map(str::to_owned);
    let faults: Vec<String> = children.iter().filter_map(fault).collect();
    assert!(faults.iter().all(|fault| fault.len() > 5), "{faults:?}");
    assert_eq!(outcome.code(), i32::from(!faults.is_empty()));
    for child in children.iter().filter(|child| child["pid"].is_u64()) {
        kill(child);
    }
    (count - faults.len(), faults)
}

/// Only these are left, with what they have had.
fn nothing_is_left(family: &Family, parent: &Running, others: usize, before: usize) {
    eventually(
        || {
            assert_eq!(verb(family, &["ps"]).code(), 0);
            family.processes().len() == 1 + others
        },
        || format!("left are {:?}", family.processes()),
    );
    let strangers: Vec<_> =
        family.entries().into_iter().filter(|name| !name.starts_with("m.")).collect();
    assert!(strangers.iter().all(|name| name == ".pool"), "{strangers:?}");
    // Each time that it was forked it may have one layer more; thirty-three are the most.
    eventually(
        || descriptors(parent.id()) <= before + 34,
        || format!("{} descriptors, {before} before", descriptors(parent.id())),
    );
    goes_on(parent);
}

#[test]
fn a_parent_without_descriptors() {
    let family = Family::default();
    let parent = family.parent("m");
    assert_eq!(forked(&family, &[], 2).0, 2);
    let before = descriptors(parent.id());
    let limit = set_limit(parent.id(), libc::RLIMIT_NOFILE, 1000);
    let (mut some, mut none) = (0, 0);
    // Who asks has one of them.
    for more in [1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32] {
        set_limit(parent.id(), libc::RLIMIT_NOFILE, lowest(parent.id()) + more);
        let (made, faults) = forked(&family, &[], 3);
        assert!(faults.iter().all(|fault| !fault.contains("panic")), "{faults:?}");
        (some, none) = (some + made, none + faults.len());
        set_limit(parent.id(), libc::RLIMIT_NOFILE, limit);
        assert_eq!(forked(&family, &[], 1).0, 1);
    }
    assert!(some > 2 && none > 2, "{some} were made, {none} were not");
    nothing_is_left(&family, &parent, 0, before);
    assert!(mappings(parent.id()) < 500, "{}", mappings(parent.id()));
}

#[test]
fn a_pool_without_descriptors() {
    let family = Family::default();
    let parent = family.parent("m");
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    assert_eq!(forked(&family, &[], 1).0, 1);
    let before = descriptors(parent.id());
    let limit = set_limit(pool.id(), libc::RLIMIT_NOFILE, 1000);
    let (mut some, mut none) = (0, 0);
    for more in 1..8 {
        set_limit(pool.id(), libc::RLIMIT_NOFILE, lowest(pool.id()) + more);
        let connected: Vec<_> = (0..3)
            .map(|_| std::os::unix::net::UnixStream::connect(family.at("hull/.pool")).unwrap())
            .collect();
        let took = ticks(pool.id());
        let (made, faults) = forked(&family, &[], 5);
        (some, none) = (some + made, none + faults.len());
        std::thread::sleep(Duration::from_millis(200));
        let took = ticks(pool.id()) - took;
        drop(connected);
        assert!(took < 100, "{took} ticks: it does not wait");
        set_limit(pool.id(), libc::RLIMIT_NOFILE, limit);
        // Those that are ready have the limit that there was when they were made.
        let made = || forked(&family, &[], 1).0 == 1;
        eventually(made, || "the pool does not come back".to_owned());
    }
    assert!(some > 0 && none > 0, "{some} were made, {none} were not");
    nothing_is_left(&family, &parent, 3, before);
    drop(pool);
}

/// A control group.
struct Group {
    path: PathBuf,
    /// It is one of the second version's hierarchy.
    is_unified: bool,
}

impl Group {
    /// One that has this controller, in whichever hierarchy the host has it.
    fn new(controller: &str) -> Group {
        let all = Path::new("/sys/fs/cgroup");
        let name = format!("hull-test-{controller}-{}", std::process::id());
        let old = all.join(controller);
        let is_unified = !old.join("cgroup.procs").exists();
        let has = |folder: &PathBuf| {
            let list = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
            list.split_whitespace().any(|known| known == controller)
        };
        let folder = if is_unified {
            let folder = [all.to_owned(), all.join("unified")].into_iter().find(has);
            let folder = folder.unwrap_or_else(|| {
                panic!("needs control groups: no hierarchy at {} has {controller}", all.display())
            });
            fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"))
                .unwrap_or_else(|error| {
                    panic!("needs {controller} in groups of {}: {error}", folder.display())
                });
            folder
        } else {
            old
        };
        let path = folder.join(name);
        fs::create_dir(&path).unwrap_or_else(|error| {
            panic!("needs a control group: cannot make {}: {error}", path.display())
        });
        Group { path, is_unified }
    }

    /// Has them have so much memory at most; nothing is without a limit.
    fn limit_memory(&self, most: Option<&str>) {
        match self.is_unified {
            true => self.set("memory.max", most.unwrap_or("max")),
            false => self.set("memory.limit_in_bytes", most.unwrap_or("-1")),
        }
    }

    fn set(&self, name: &str, value: &str) {
        fs::write(self.path.join(name), value)
            .unwrap_or_else(|error| panic!("{name} {value}: {error}"));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..500 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_pool_without_processes() {
    let group = Group::new("pids");
    let family = Family::default();
    let parent = family.parent("m");
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    assert_eq!(forked(&family, &[], 1).0, 1);
    let before = descriptors(parent.id());
    group.set("cgroup.procs", &pool.id().to_string());
    // The pool is one of them; a machine has several threads.
    let (mut some, mut none) = (0, 0);
    for most in [1, 2, 3, 4, 5, 6, 9, 12, 15] {
        group.set("pids.max", &most.to_string());
        let (made, faults) = forked(&family, &[], 6);
        (some, none) = (some + made, none + faults.len());
        nothing_left_of_children(&family);
    }
    assert!(some > 0 && none > 0, "{some} were made, {none} were not");
    // What was ready may serve; nothing else does.
    group.set("pids.max", "1");
    let (made, faults) = forked(&family, &[], 10_000);
    assert!(made <= 2 && faults.len() + made == 10_000, "{made} {:?}", faults.first());
    assert!(faults[9_000].contains("process"), "{}", faults[9_000]);
    group.set("pids.max", "max");
    assert_eq!(forked(&family, &[], 4).0, 4);
    nothing_is_left(&family, &parent, 3, before);
    drop(pool);
}

/// Whoever was killed has its files removed by who comes by.
fn nothing_left_of_children(family: &Family) {
    eventually(
        || {
            assert_eq!(verb(family, &["ps"]).code(), 0);
            family.entries() == [".pool", "m.json", "m.sock"]
        },
        || format!("left are {:?}", family.entries()),
    );
}

#[test]
fn a_pool_without_memory() {
    let family = Family::default();
    let parent = family.parent("m");
    let before = descriptors(parent.id());
    let pool = pool(&family, &["--keep", "number=1,memory=64M"], 1);
    let limit = libc::RLIM_INFINITY;
    let (mut some, mut none) = (0, 0);
    for most in [1u64 << 20, 16 << 20, 64 << 20, 80 << 20, 100 << 20, 140 << 20, 300 << 20, 1 << 30]
    {
        set_limit(pool.id(), libc::RLIMIT_AS, most);
        let (made, faults) = forked(&family, &[], 4);
        (some, none) = (some + made, none + faults.len());
        nothing_left_of_children(&family);
    }
    assert!(some > 0 && none > 0, "{some} were made, {none} were not");
    set_limit(pool.id(), libc::RLIMIT_AS, limit);
    assert_eq!(forked(&family, &[], 3).0, 3);
    nothing_is_left(&family, &parent, 2, before);
    drop(pool);
}

#[test]
fn children_that_are_killed_for_their_memory() {
    let group = Group::new("memory");
    let family = Family::default();
    let parent = family.parent("m");
    let before = descriptors(parent.id());
    let pool = pool(&family, &["--keep", "number=1,memory=64M"], 1);
    group.set("cgroup.procs", &pool.id().to_string());
    group.limit_memory(Some("8M"));
    // The kernel takes whom it likes, the pool as well.
    let (_, faults) = forked(&family, &[], 12);
    assert!(faults.iter().all(|fault| !fault.contains("panic")), "{faults:?}");
    group.limit_memory(None);
    drop(pool);
    // Without a pool they are made where this is asked for.
    assert_eq!(forked(&family, &[], 3).0, 3);
    nothing_is_left(&family, &parent, 0, before);
}
