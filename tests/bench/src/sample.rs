//! One run of one guest: what it printed, when, and what it cost.

use crate::Result;
use crate::system::{Guest, Programs, System};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A guest that does not end within this time is ended.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one run cost.
pub struct Sample {
    /// From before exec to the first byte of the guest's output that was waited for.
    pub first_output: Duration,
    /// User and system time of the process from exec to its end, teardown included.
    pub cpu: Duration,
    /// All that it printed.
    pub output: String,
}

impl Sample {
    /// The number after `key=` in the payload's result line.
    pub fn result(&self, key: &str) -> Result<f64> {
        result(&self.output, key)
    }
}

fn result(output: &str, key: &str) -> Result<f64> {
    output
        .lines()
        .filter(|line| line.contains("result "))
        .flat_map(str::split_ascii_whitespace)
        .filter_map(|word| word.split_once('='))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.parse().ok())
        .ok_or_else(|| format!("no {key}= in the payload's output: {output}").into())
}

/// A guest that runs; killed when dropped.
pub struct Running {
    child: Option<Child>,
    stdout: ChildStdout,
    started: Instant,
    output: Vec<u8>,
    // Holds the files that the process reads.
    _folder: tempfile::TempDir,
}

impl Running {
    /// Starts a guest on a system.
    pub fn start(programs: &Programs, system: System, guest: &Guest) -> Result<Running> {
        let folder = tempfile::tempdir()?;
        Running::spawn(guest.command(programs, system, folder.path())?, folder)
    }

    /// Starts any command.
    pub fn spawn(command: Command, folder: tempfile::TempDir) -> Result<Running> {
        Running::fed(command, folder, Stdio::null())
    }

    /// Starts any command, to whose guest something will be typed.
    pub fn spawn_for_typing(command: Command, folder: tempfile::TempDir) -> Result<Running> {
        Running::fed(command, folder, Stdio::piped())
    }

    fn fed(mut command: Command, folder: tempfile::TempDir, stdin: Stdio) -> Result<Running> {
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        let stdout = child.stdout.take().ok_or("no pipe")?;
        Ok(Running { child: Some(child), stdout, started, output: Vec::new(), _folder: folder })
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Reads output until `text` is in it; returns the time since the start.
    pub fn wait_for(&mut self, text: &str) -> Result<Duration> {
        while !find(&self.output, text.as_bytes()) {
            self.read_more(&format!("ended without printing `{text}`"))?;
        }
        Ok(self.started.elapsed())
    }

    /// Reads the first output, which has to begin with this byte: a monitor's own words are none of
    /// its guest's. Returns the time since the start.
    pub fn wait_for_first(&mut self, byte: u8) -> Result<Duration> {
        let (_, time) = self.wait_for_bytes(1)?;
        match self.output.first() {
            Some(first) if *first == byte => Ok(time),
            _ => Err(self.fail("was not the first to say something")),
        }
    }

    /// Reads output until there is this much of it, or some more; returns how much, and the time since
    /// the start.
    pub fn wait_for_bytes(&mut self, count: usize) -> Result<(usize, Duration)> {
        while self.output.len() < count {
            self.read_more(&format!("ended before it printed {count} bytes"))?;
        }
        Ok((self.output.len(), self.started.elapsed()))
    }

    /// Types a key to the guest, and returns the line that it answers. All that it said before has to
    /// be read, line end included.
    pub fn typed(&mut self, key: &str) -> Result<String> {
        let before = self.output.len();
        let stdin = self.child.as_mut().and_then(|child| child.stdin.as_mut());
        stdin.ok_or("nobody listens to keys")?.write_all(key.as_bytes())?;
        loop {
            let new = &self.output[before..];
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                return Ok(String::from_utf8_lossy(&new[..end]).into_owned());
            }
            self.read_more(&format!("ended before it answered to {key}"))?;
        }
    }

    /// The same, where the line is a result with `key=` in it.
    pub fn result_typed(&mut self, typed: &str, key: &str) -> Result<f64> {
        result(&self.typed(typed)?, key)
    }

    fn read_more(&mut self, or_else: &str) -> Result<()> {
        let mut buffer = [0; 4096];
        match self.read(&mut buffer)? {
            0 => Err(self.fail(or_else)),
            length => {
                self.output.extend_from_slice(&buffer[..length]);
                Ok(())
            }
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut poll =
            libc::pollfd { fd: self.stdout.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let left = PATIENCE.saturating_sub(self.started.elapsed());
        // SAFETY: one structure, which outlives the call.
        if unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as libc::c_int) } == 0 {
            return Err(self.fail("took too long"));
        }
        loop {
            match self.stdout.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                other => return Ok(other?),
            }
        }
    }

    /// An error with what the process had to say.
    fn fail(&mut self, what: &str) -> Box<dyn std::error::Error> {
        let mut said = String::from_utf8_lossy(&self.output).into_owned();
        if let Some(mut child) = self.child.take() {
            // It may be over already, which is fine.
            let _ = child.kill();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = stderr.read_to_string(&mut said);
            }
            let _ = child.wait();
        }
        format!("a guest {what}; it said: {said}").into()
    }

    /// Waits for the end.
    pub fn finish(mut self, first_output: Duration) -> Result<Sample> {
        let mut buffer = [0; 4096];
        loop {
            match self.read(&mut buffer)? {
                0 => break,
                length => self.output.extend_from_slice(&buffer[..length]),
            }
        }
        let Some(child) = self.child.take() else { return Err("the guest is gone".into()) };
        let mut status = 0;
        // SAFETY: all zeroes is a value of this plain structure.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        let id = child.id() as libc::pid_t;
        // SAFETY: both structures outlive the call; the child is ours and not yet waited for.
        if unsafe { libc::wait4(id, &raw mut status, 0, &raw mut usage) } != id {
            return Err(std::io::Error::last_os_error().into());
        }
        let output = String::from_utf8_lossy(&self.output).into_owned();
        if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
            let mut said = output;
            if let Some(mut stderr) = child.stderr {
                // What there is, is enough.
                let _ = stderr.read_to_string(&mut said);
            }
            return Err(format!("a guest ended with wait status {status:#x}: {said}").into());
        }
        let time = |value: libc::timeval| {
            Duration::from_secs(value.tv_sec as u64) + Duration::from_micros(value.tv_usec as u64)
        };
        Ok(Sample { first_output, cpu: time(usage.ru_utime) + time(usage.ru_stime), output })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may be over already, which is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn find(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// Runs a guest to its end; `text` is the output whose time is taken.
pub fn run(programs: &Programs, system: System, guest: &Guest, text: &str) -> Result<Sample> {
    let context = |error| format!("{}, `{}`: {error}", system.name(), guest.command_line);
    let mut running = Running::start(programs, system, guest).map_err(context)?;
    let first = running.wait_for(text).map_err(context)?;
    running.finish(first).map_err(|error| context(error).into())
}

/// The median; of nothing, nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    match sorted.len() % 2 {
        0 => Some((sorted.get(sorted.len() / 2 - 1)? + upper) / 2.0),
        _ => Some(upper),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    fn shell(script: &str) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Running::spawn_for_typing(command, tempfile::tempdir().unwrap()).unwrap()
    }

    #[test]
    fn the_answer_to_a_key_is_the_line_behind_it() {
        let mut running = shell("echo ready; while read key; do echo \"result key=$key\"; done");
        running.wait_for("ready\n").unwrap();
        assert_eq!(running.typed("1\n").unwrap(), "result key=1");
        assert_eq!(running.result_typed("2\n", "key").unwrap(), 2.0);
        assert!(shell("read key").typed("x\n").is_err());
    }

    #[test]
    fn the_first_output_is_the_guests_or_an_error() {
        assert!(shell("echo ...").wait_for_first(b'.').is_ok());
        assert!(shell("echo log; echo ...").wait_for_first(b'.').is_err());
    }

    #[test]
    fn result_line_is_read_by_key() {
        let sample = Sample {
            first_output: Duration::ZERO,
            cpu: Duration::ZERO,
            output: "noise ticks=1\nresult blk op=read ticks=42 failed=0\n".to_owned(),
        };
        assert_eq!(sample.result("ticks").unwrap(), 42.0);
        assert!(sample.result("op").is_err());
        assert!(sample.result("frames").is_err());
    }
}
