//! A guest as a test sees it: a child process, its console, and a script to drive it with.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::site::Site;

/// Why a test did not hold; read by a person.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// How long a guest may take to its first prompt: with eight vCPUs, on a busy emulated machine.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long a command in a guest, or the end of one, may take: many times what it takes here.
pub const STEP: Duration = Duration::from_secs(180);

/// A machine to be started: `hull run` with a kernel, an initramfs and 256 MiB, to be added to.
pub struct Machine {
    command: Command,
    memory: &'static str,
    cmdline: Vec<String>,
    runtime: TempDir,
}

impl Machine {
    /// The cloud kernel as shipped, in script mode.
    pub fn new(site: &Site) -> Result<Machine, Failure> {
        Machine::with_kernel(site, "cloud.vmlinuz", "cloud.initramfs")
    }

    /// Another kernel of [`Site`].
    pub fn with_kernel(site: &Site, kernel: &str, initramfs: &str) -> Result<Machine, Failure> {
        let runtime = tempfile::tempdir()?;
        let mut command = Command::new(&site.hull);
        command.arg("run").arg("--kernel").arg(site.file(kernel));
        command.arg("--initrd").arg(site.file(initramfs));
        // A runtime directory of its own: names are then free, and what is left behind is seen.
        command.env("XDG_RUNTIME_DIR", runtime.path());
        Ok(Machine { command, memory: "256M", cmdline: Vec::new(), runtime })
    }

    /// A machine that goes on where another was saved: `hull restore`.
    pub fn restored(site: &Site, folder: &Path) -> Result<Machine, Failure> {
        let runtime = tempfile::tempdir()?;
        let mut command = Command::new(&site.hull);
        command.arg("restore").arg(folder).env("XDG_RUNTIME_DIR", runtime.path());
        Ok(Machine { command, memory: "", cmdline: Vec::new(), runtime })
    }

    /// An option with a value.
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Machine {
        self.command.arg(name).arg(value);
        self
    }

    /// Memory other than 256 MiB.
    pub fn memory(mut self, size: &'static str) -> Machine {
        self.memory = size;
        self
    }

    /// An option without a value.
    pub fn flag(mut self, name: &str) -> Machine {
        self.command.arg(name);
        self
    }

    /// A disk: its image, and further `,key=value`.
    pub fn disk(self, image: &Path, more: &str) -> Machine {
        let value = format!("path={}{more}", image.display());
        self.option("--disk", value)
    }

    /// Words for the kernel command line.
    pub fn cmdline(mut self, words: impl Into<String>) -> Machine {
        self.cmdline.push(words.into());
        self
    }

    /// Starts Hull without waiting for anything, in a mode of the guest's `/sbin/init`.
    pub fn start(mut self, mode: &str) -> Result<Guest, Failure> {
        self.cmdline.push(format!("hull.mode={mode}"));
        self.command.arg("--memory").arg(self.memory);
        self.command.arg("--cmdline").arg(self.cmdline.join(" "));
        self.spawn()
    }

    /// Starts a machine that was in script mode when it was saved, and waits until it takes commands.
    pub fn start_restored(self) -> Result<Guest, Failure> {
        let mut guest = self.spawn()?;
        guest.run(":")?;
        Ok(guest)
    }

    fn spawn(mut self) -> Result<Guest, Failure> {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn()?;
        let missing = || Failure::from("a stream of the child is missing");
        let stdin = child.stdin.take().ok_or_else(missing)?;
        let console = Stream::read(child.stdout.take().ok_or_else(missing)?);
        let stderr = Stream::read(child.stderr.take().ok_or_else(missing)?);
        Ok(Guest { child, stdin, console, stderr, runtime: self.runtime, steps: 0 })
    }

    /// Starts the guest and waits until it takes commands.
    pub fn boot(self) -> Result<Guest, Failure> {
        let mut guest = self.start("script")?;
        guest.wait_for(READY, BOOT)?;
        Ok(guest)
    }
}

/// What the guest's init prints once it reads commands.
pub const READY: &str = "hull-script: ready";

/// What a stream of the child has said so far, read by a thread of its own.
#[derive(Clone)]
struct Stream(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Default)]
struct Heard {
    text: Vec<u8>,
    ended: bool,
    /// Everything before this was waited for already.
    seen: usize,
}

impl Stream {
    fn read(mut source: impl Read + Send + 'static) -> Stream {
        let stream = Stream(Arc::default());
        let shared = stream.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut heard = shared.lock();
                // The console's line ends are CR LF; a test has no use for the CR.
                heard.text.extend(buffer[..count].iter().filter(|&&byte| byte != b'\r'));
                heard.ended = count == 0;
                shared.0.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `needle` after what was seen before. Returns the text before it.
    fn wait_for(&self, needle: &str, limit: Duration) -> Option<String> {
        let deadline = Instant::now() + limit;
        let mut heard = self.lock();
        loop {
            let rest = &heard.text[heard.seen..];
            if let Some(at) = rest.windows(needle.len()).position(|part| part == needle.as_bytes())
            {
                let before = String::from_utf8_lossy(&rest[..at]).into_owned();
                heard.seen += at + needle.len();
                return Some(before);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if heard.ended || left.is_zero() {
                return None;
            }
            heard = self.0.1.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn all(&self) -> String {
        String::from_utf8_lossy(&self.lock().text).into_owned()
    }
}

/// A running guest. Killed when dropped.
pub struct Guest {
    child: Child,
    stdin: ChildStdin,
    console: Stream,
    stderr: Stream,
    runtime: TempDir,
    steps: u32,
}

impl Guest {
    /// Waits until the console says `needle`; returns what it said before that.
    pub fn wait_for(&mut self, needle: &str, limit: Duration) -> Result<String, Failure> {
        self.console.wait_for(needle, limit).ok_or_else(|| {
            let what = match self.console.lock().ended {
                true => format!("the console ended before {needle:?}"),
                false => format!("{needle:?} did not come within {limit:?}"),
            };
            self.failure(&what)
        })
    }

    /// Types `text` on the console.
    pub fn send(&mut self, text: &str) -> Result<(), Failure> {
        self.stdin.write_all(text.as_bytes())?;
        self.stdin.flush()?;
        Ok(())
    }

    /// Runs one line of shell in the guest. Returns its status and what it printed.
    pub fn attempt(&mut self, line: &str) -> Result<(u8, String), Failure> {
        self.steps += 1;
        let mark = format!("@{}=", self.steps);
        // In the command the mark is broken by quotes, so that no echo of it looks like the answer.
        self.send(&format!("{{ {line}; }}; echo \"@\"\"{}=$?@\"\n", self.steps))?;
        let text = self.wait_for(&mark, STEP)?;
        let status = self.wait_for("@", STEP)?;
        let status = status.parse().map_err(|_| self.failure("the status is not a number"))?;
        Ok((status, text))
    }

    /// Runs one line of shell that has to succeed. Returns what it printed, trimmed.
    pub fn run(&mut self, line: &str) -> Result<String, Failure> {
        match self.attempt(line)? {
            (0, text) => Ok(text.trim().to_owned()),
            (status, _) => Err(self.failure(&format!("`{line}` ended with status {status}"))),
        }
    }

    /// Runs one line of shell and compares what it prints, trimmed.
    pub fn expect(&mut self, line: &str, wanted: &str) -> Result<(), Failure> {
        let got = self.run(line)?;
        if got == wanted {
            Ok(())
        } else {
            Err(self.failure(&format!("`{line}` printed {got:?}, wanted {wanted:?}")))
        }
    }

    /// Waits for Hull to end.
    pub fn wait(&mut self) -> Result<ExitStatus, Failure> {
        let deadline = Instant::now() + STEP;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(self.failure("hull did not end"));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for Hull to end with status 0.
    pub fn wait_success(&mut self) -> Result<(), Failure> {
        let status = self.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(self.failure(&format!("hull ended with {status}")))
        }
    }

    /// Powers the guest off from inside; Hull has to end with status 0.
    pub fn power_off(mut self) -> Result<(), Failure> {
        self.send("sync; poweroff -f\n")?;
        self.wait_success()
    }

    /// Ends Hull at once, as a crash of the host would.
    pub fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Hull's process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The directory that is this guest's `XDG_RUNTIME_DIR`.
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// What Hull wrote to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.all()
    }

    /// A failure that shows what the guest and Hull said last.
    pub fn failure(&self, what: &str) -> Failure {
        let tail = |text: String| {
            let lines: Vec<_> = text.lines().collect();
            lines[lines.len().saturating_sub(25)..].join("\n")
        };
        let console = tail(self.console.all());
        let stderr = tail(self.stderr.all());
        format!("{what}\n--- console\n{console}\n--- stderr\n{stderr}\n---").into()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail where it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
