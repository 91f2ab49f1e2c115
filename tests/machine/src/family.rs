//! Machines and their copies, which are processes that no test has for a child.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{Guest, PATIENCE, PAYLOAD, Running};

/// A runtime directory. Who knows it ends with it.
#[derive(Debug)]
pub struct Family(TempDir);

impl Default for Family {
    fn default() -> Family {
        match TempDir::new() {
            Ok(folder) => Family(folder),
            Err(error) => panic!("no temporary directory: {error}"),
        }
    }
}

impl Family {
    /// Another `hull` of this family.
    pub fn hull(&self, subcommand: &str) -> Guest {
        Guest::hull(subcommand).variable("XDG_RUNTIME_DIR", self.0.path())
    }

    /// A machine of this family that runs the payload.
    pub fn guest(&self, name: &str, scenario: &str) -> Guest {
        self.hull("run")
            .console("stdio")
            .option("--name", name)
            .option("--kernel", &*PAYLOAD)
            .option("--memory", "64M")
            .option("--cmdline", format!("payload={scenario}"))
    }

    /// A machine of this family that has 512 pages it knows, looks at them and changes them all the time.
    pub fn parent(&self, name: &str) -> Running {
        Family::at_work(self.guest(name, "work dirty=2M size=64K every=100M ids=1").start())
    }

    /// The same of a guest with that scenario, which has just started.
    pub fn at_work(mut guest: Running) -> Running {
        guest.wait_for("ready");
        guest.write("d");
        guest.wait_for("pages=512");
        guest
    }

    /// A file, socket or directory for a test.
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What is in the runtime directory.
    pub fn entries(&self) -> Vec<String> {
        let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
        let entries = fs::read_dir(self.at("hull")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// Processes of this family.
    pub fn processes(&self) -> Vec<u32> {
        let known = format!("XDG_RUNTIME_DIR={}", self.0.path().display());
        let is_ours = |id: &u32| {
            let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|pair| pair == known.as_bytes())
        };
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_ours).collect()
    }

    /// Waits until nothing is left but so many processes, and these in the runtime directory.
    pub fn settles(&self, processes: usize, entries: &[&str]) {
        let left = || (self.processes(), self.entries());
        eventually(
            || self.processes().len() == processes && self.entries() == entries,
            || format!("{processes} processes and {entries:?} are wanted; left are {:?}", left()),
        );
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        // Who was about to make others is gone when nobody is found.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let processes = self.processes();
            if processes.is_empty() || Instant::now() > deadline {
                return;
            }
            for id in processes {
                // SAFETY: kill has no memory arguments; nobody else has this runtime directory.
                unsafe { libc::kill(id as libc::pid_t, libc::SIGKILL) };
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until `done`; else the test fails with what `otherwise` says.
pub fn eventually(mut done: impl FnMut() -> bool, otherwise: impl FnOnce() -> String) {
    let deadline = Instant::now() + PATIENCE / 2;
    while !done() {
        assert!(Instant::now() < deadline, "{}", otherwise());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until a file that a guest writes to has `text` behind its first `from` bytes, and returns all of it.
pub fn wait_in_file(path: &Path, from: usize, text: &str) -> String {
    let read = || {
        let bytes = fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let there = || read().get(from..).is_some_and(|rest| rest.contains(text));
    eventually(there, || format!("no {text:?} in {}: {:?}", path.display(), read()));
    read()
}
