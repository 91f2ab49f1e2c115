//! Processes that die at any step of saving, merging and going on: one of two snapshots is always there, and
//! other machines go on.

use machine_tests::{Guest, Running, Tracer, injection};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// System calls that change something outside of the process, or make what it goes on from. A process is
/// ended when it is about to make one of them for the first time, the second, …
const STEPS: [&str; 8] =
    ["memfd_create", "openat", "ftruncate", "pwrite64", "write", "fsync", "flock", "rename"];
/// Most times that each is looked at.
const TIMES: u32 = 4;

fn beside(guest: &Running, subcommand: &str) -> Guest {
    Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", guest.runtime())
}

/// What has a process ended at a step.
const KILL: &str = "signal=KILL";

/// Pages that a copy of what was saved has.
fn pages(folder: &Path) -> u32 {
    let mut copy = Guest::hull("restore").flag(folder.to_str().unwrap()).start();
    copy.write("cq");
    let outcome = copy.finish();
    let text = outcome.ok();
    let number = text.split("pages=").nth(1).unwrap_or_else(|| panic!("{text}"));
    number.split_whitespace().next().unwrap().parse().unwrap()
}

/// A guest that dirties 512 pages when it is told to, and has done so once.
fn guest() -> Running {
    let mut guest = Guest::new("work dirty=2097152 size=65536").option("--name", "m").start();
    guest.write("dc");
    guest.wait_for("pages=512");
    guest
}

fn snapshot(guest: &Running, words: &[&str]) -> bool {
    let command = beside(guest, "snapshot").flag("m");
    words.iter().fold(command, |command, word| command.flag(word)).run().code() == 0
}

/// Names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| name(entry.unwrap())).collect();
    names.sort();
    names
}

/// Ends machines at each step of `save`, which is given a folder in which a snapshot of 512 pages is already,
/// and is to have 1,024. Returns how often one was ended.
fn at_each_step(save: impl Fn(&Running, &str) -> bool) -> u32 {
    let (mut ended, mut old, mut new) = (0, 0, 0);
    for step in STEPS {
        for time in 1..=TIMES {
            let folder = TempDir::new().unwrap();
            let saved = folder.path().join("s");
            let path = saved.to_str().unwrap();
            let mut guest = guest();
            assert!(snapshot(&guest, &[path]));
            guest.write("dc");
            guest.wait_for("pages=1024");
            let tracer = Tracer::attach(guest.id(), step, KILL, &time.to_string());
            let done = save(&guest, path);
            guest.signal(libc::SIGKILL);
            drop(tracer);
            guest.finish();
            match (done, pages(&saved)) {
                (_, 1024) => new += 1,
                // What was said to be done is done.
                (false, 512) => old += 1,
                (done, pages) => panic!("{step} {time}: done {done}, {pages} pages"),
            }
            if done {
                break;
            }
            ended += 1;
            // The next one that saves here cleans up.
            let other = self::guest();
            assert!(snapshot(&other, &[path]));
            assert_eq!(names(&saved), ["memory", "state"], "{step} {time}");
            other.signal(libc::SIGKILL);
            other.finish();
        }
    }
    assert!(old > 3 && new > 1, "{old} times the old one, {new} times the new one");
    ended
}

#[test]
fn who_dies_while_it_saves_loses_nothing() {
    let ended = at_each_step(|guest, path| snapshot(guest, &[path]));
    assert!(ended > 8, "{ended}");
}

#[test]
fn who_dies_while_it_saves_what_changed_loses_nothing() {
    // Over a snapshot that is there, which the machine may run from.
    let ended = at_each_step(|guest, path| snapshot(guest, &["--diff", path]));
    assert!(ended > 8, "{ended}");
}

/// Runs `hull` with `words`, which finds a `q` on its input, and ends it at a step. True if it came to its end
/// before.
fn ended_at(step: &str, time: u32, words: &[&str]) -> bool {
    let folder = TempDir::new().unwrap();
    let input = folder.path().join("input");
    fs::write(&input, "q").unwrap();
    let mut strace = Command::new("strace");
    strace.args(injection(step, KILL, &time.to_string())).args(["-o", "/dev/null"]);
    let strace = strace.arg(machine_tests::HULL.as_os_str()).args(words);
    let strace = strace.stdin(File::open(input).unwrap());
    let output = strace.env("XDG_RUNTIME_DIR", folder.path()).output();
    output.unwrap().status.success()
}

#[test]
fn who_dies_while_it_merges_loses_nothing() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let mut guest = guest();
    assert!(snapshot(&guest, &[&at("base")]));
    guest.write("dc");
    guest.wait_for("pages=1024");
    assert!(snapshot(&guest, &["--diff", &at("diff")]));
    let mut ended = 0;
    for into in ["diff", "base"] {
        for step in STEPS {
            for time in 1..=TIMES {
                let copy = TempDir::new().unwrap();
                for name in ["base", "diff"] {
                    fs::create_dir(copy.path().join(name)).unwrap();
                    for file in ["state", "memory"] {
                        let (from, to) = (folder.path().join(name), copy.path().join(name));
                        sparse_copy(&from.join(file), &to.join(file));
                    }
                }
                let (diff, into) = (copy.path().join("diff"), copy.path().join(into));
                let words =
                    ["snapshot", "merge", diff.to_str().unwrap(), "--into", into.to_str().unwrap()];
                let done = ended_at(step, time, &words);
                assert_eq!(pages(&diff), 1024, "{step} {time}");
                let base = pages(&copy.path().join("base"));
                assert!(base == 512 || (base == 1024 && into.ends_with("base")), "{base} pages");
                if done {
                    break;
                }
                ended += 1;
            }
        }
    }
    assert!(ended > 10, "{ended}");
    // The machine that they are of is as it was.
    guest.write("cq");
    guest.wait_for("pages=1024");
    assert_eq!(guest.finish().code(), 0);
}

fn sparse_copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("--sparse=always").args([from, to]).status().unwrap();
    assert!(status.success());
    assert!(File::open(to).is_ok());
}

#[test]
fn who_dies_while_it_goes_on_harms_nobody() {
    let folder = TempDir::new().unwrap();
    let saved = folder.path().join("s");
    let path = saved.to_str().unwrap();
    let mut guest = guest();
    assert!(snapshot(&guest, &[path]));
    let state = fs::read(saved.join("state")).unwrap();
    let mut ended = 0;
    for step in ["openat", "mmap", "ioctl", "clone3"] {
        for time in [1, 2, 3, 5, 8, 13, 21] {
            let words = ["restore", path, "--no-api", "--console", "stdio"];
            ended += u32::from(!ended_at(step, time, &words));
        }
    }
    assert!(ended > 8, "{ended}");
    assert_eq!(pages(&saved), 512);
    assert_eq!(fs::read(saved.join("state")).unwrap(), state);
    assert_eq!(names(&saved), ["memory", "state"]);
    guest.write("cq");
    guest.wait_for("pages=512");
    assert_eq!(guest.finish().code(), 0);
}
