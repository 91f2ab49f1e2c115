//! System calls of others, at which something happens to them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use tempfile::NamedTempFile;

/// Follows a process and those that it makes, and has something happen at a step.
#[derive(Debug)]
pub struct Tracer {
    strace: Child,
    log: NamedTempFile,
}

/// The options of strace that have `what` (`signal=KILL`, `error=EAGAIN`) happen at `time` (`2`, `1+`) of each of
/// these system calls, in whichever thread.
pub fn injection(steps: &str, what: &str, time: &str) -> [String; 5] {
    let inject = format!("inject={steps}:{what}:when={time}");
    ["-f".to_owned(), "-e".to_owned(), format!("trace={steps}"), "-e".to_owned(), inject]
}

impl Tracer {
    /// Follows the process with this id.
    pub fn attach(id: u32, steps: &str, what: &str, time: &str) -> Tracer {
        let log = NamedTempFile::new().unwrap_or_else(|error| panic!("no file: {error}"));
        let strace = Command::new("strace")
            .args(injection(steps, what, time))
            .arg("-o")
            .arg(log.path())
            .args(["-p", &id.to_string()])
            .stderr(Stdio::piped())
            .spawn();
        let mut strace = strace.unwrap_or_else(|error| panic!("strace is missing: {error}"));
        let mut said = strace.stderr.take().map(BufReader::new);
        let mut line = String::new();
        let _ = said.as_mut().map(|said| said.read_line(&mut line));
        assert!(line.contains("attached"), "{line}");
        // It says so of each thread, and must not wait for a reader.
        std::thread::spawn(move || {
            said.map(|mut said| std::io::copy(&mut said, &mut std::io::sink()))
        });
        Tracer { strace, log }
    }

    /// Lets go of all that it follows, and says how often what was to happen did.
    pub fn end(mut self) -> usize {
        self.stop();
        let log = fs::read_to_string(self.log.path()).unwrap_or_default();
        // A process that is killed has a line for each of its threads.
        let hit = |line: &&str| line.contains("(INJECTED)") || line.contains("killed by SIGKILL");
        log.lines().filter(hit).count()
    }

    fn stop(&mut self) {
        // One that is asked to may wait for a process that just dies. Those that it follows go on.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.stop();
    }
}
