//! Runs payload guests under Hull, as the tests in `tests/` want them.
//!
//! Hull and the payload are built on first use, so that a bare `cargo test` tests what is in the
//! tree. `HULL=` names another binary.

mod family;
mod pool;
pub mod qcow2;
mod sharing;
mod surroundings;
mod terminal;
mod tracer;
mod trespass;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

pub use family::{Family, eventually, wait_in_file};
pub use pool::HugePages;
pub use sharing::where_files_share_data;
pub use surroundings::{NOBODY, Surroundings};
use terminal::Terminal;
pub use tracer::{Tracer, injection};
pub use trespass::{Trespass, trespass};

/// A guest that has not ended by then is killed, and the test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

static ROOT: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."));

/// Hull's binary.
pub static HULL: LazyLock<PathBuf> = LazyLock::new(|| {
    if let Some(path) = std::env::var_os("HULL") {
        return PathBuf::from(path);
    }
    // target/…/debug/deps/test → target/…/debug/hull, in the profile of this test.
    let here = std::env::current_exe().unwrap_or_default();
    let folder = here.parent().and_then(Path::parent).unwrap_or(Path::new(""));
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--locked", "-p", "hull"]).current_dir(&*ROOT);
    if folder.file_name() == Some(OsStr::new("release")) {
        cargo.arg("--release");
    }
    build(cargo);
    folder.join("hull")
});

/// The payload guest.
pub static PAYLOAD: LazyLock<PathBuf> = LazyLock::new(|| {
    let output = build(Command::new(ROOT.join("tests/payload/build")));
    PathBuf::from(String::from_utf8_lossy(&output).trim())
});

/// Runs a command that has to succeed, one at a time on this machine: each test is a process of
/// its own under nextest.
fn build(mut command: Command) -> Vec<u8> {
    let lock = File::create(std::env::temp_dir().join("hull-machine-tests.lock"));
    if let Ok(file) = &lock {
        // SAFETY: takes a descriptor that is open. Without the lock the build is only slower.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    }
    match command.output() {
        Ok(output) if output.status.success() => output.stdout,
        Ok(output) => panic!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("{command:?}: {error}"),
    }
}

/// A guest to be: Hull with options.
#[derive(Debug)]
pub struct Guest {
    command: Command,
    folder: TempDir,
    console: Option<String>,
    terminal: Option<Terminal>,
    patience: Duration,
}

impl Guest {
    /// `hull SUBCOMMAND` in a runtime directory of its own.
    pub fn hull(subcommand: &str) -> Guest {
        let folder = match TempDir::new() {
            Ok(folder) => folder,
            Err(error) => panic!("no temporary directory: {error}"),
        };
        let mut command = Command::new(&*HULL);
        command.arg(subcommand).env("XDG_RUNTIME_DIR", folder.path());
        command.env("XDG_CACHE_HOME", ROOT.join("target/machine-tests"));
        Guest { command, folder, console: None, terminal: None, patience: PATIENCE }
    }

    /// `hull run` of the payload with 128 MiB and a scenario, console on stdio.
    pub fn new(scenario: &str) -> Guest {
        Guest::bare()
            .option("--kernel", &*PAYLOAD)
            .option("--memory", "128M")
            .option("--cmdline", format!("payload={scenario}"))
    }

    /// `hull run` with nothing but a console on stdio.
    pub fn bare() -> Guest {
        Guest::hull("run").console("stdio")
    }

    /// Another console.
    pub fn console(mut self, options: impl Into<String>) -> Guest {
        self.console = Some(options.into());
        self
    }

    /// Stdin and stdout on a terminal of that size. Whoever waits for its end makes sure that it was
    /// left as it was found.
    pub fn on_terminal(mut self, columns: u16, rows: u16) -> Guest {
        self.terminal = Some(Terminal::open(columns, rows));
        self
    }

    /// An option with a value. Where Hull takes an option once, use [`Guest::bare`].
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Guest {
        self.command.arg(name).arg(value);
        self
    }

    /// An option without a value.
    pub fn flag(mut self, name: &str) -> Guest {
        self.command.arg(name);
        self
    }

    /// A disk: its image, and further `,key=value`.
    pub fn disk(self, image: &Path, more: &str) -> Guest {
        self.option("--disk", format!("path={}{more}", image.display()))
    }

    /// An environment variable.
    pub fn variable(mut self, name: &str, value: impl AsRef<OsStr>) -> Guest {
        self.command.env(name, value);
        self
    }

    /// On a host that is not quite this one. To be called last: as another user, it is another copy
    /// of Hull, with the runtime directory in that user's hands.
    pub fn on(mut self, host: Surroundings) -> Guest {
        if let Some(user) = host.other_user() {
            let copy = self.folder.path().join("hull-for-all");
            let ready = std::fs::copy(&*HULL, &copy)
                .and_then(|_| std::os::unix::fs::chown(self.folder.path(), Some(user), Some(user)));
            assert!(ready.is_ok(), "no copy of Hull for user {user}: {ready:?}");
            let mut command = Command::new(copy);
            command.args(self.command.get_args());
            for (name, value) in self.command.get_envs() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            self.command = command;
        }
        host.prepare(&mut self.command);
        self
    }

    /// Another time limit.
    pub fn patience(mut self, patience: Duration) -> Guest {
        self.patience = patience;
        self
    }

    /// The runtime directory that Hull gets.
    pub fn runtime(&self) -> PathBuf {
        self.folder.path().join("hull")
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        if let Some(console) = &self.console {
            self.command.arg("--console").arg(console);
        }
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let person = self.terminal.as_ref().map(|terminal| {
            let handed = terminal.hand_to(&mut self.command);
            match handed.and_then(|()| terminal.person.try_clone()) {
                Ok(person) => person,
                Err(error) => panic!("no terminal for a guest: {error}"),
            }
        });
        let mut child = match self.command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("{:?}: {error}", self.command),
        };
        // The command would keep the terminal open, which ends when nobody has it any more.
        drop(self.command);
        let stdout = match person {
            Some(person) => collect(Some(person)),
            None => collect(child.stdout.take()),
        };
        let stderr = collect(child.stderr.take());
        Running {
            child: Some(child),
            terminal: self.terminal,
            stdout,
            stderr,
            deadline: Instant::now() + self.patience,
            folder: self.folder,
        }
    }

    /// Starts it and waits for its end.
    pub fn run(self) -> Outcome {
        self.start().finish()
    }
}

#[derive(Default, Debug)]
struct Text {
    bytes: Vec<u8>,
    over: bool,
}

/// What a pipe says, gathered by a thread so that nobody blocks on it.
#[derive(Debug)]
struct Pipe {
    shared: Arc<(Mutex<Text>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

fn lock(text: &Mutex<Text>) -> MutexGuard<'_, Text> {
    text.lock().unwrap_or_else(PoisonError::into_inner)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> Pipe {
    let shared = Arc::new((Mutex::new(Text::default()), Condvar::new()));
    let theirs = Arc::clone(&shared);
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        if let Some(mut pipe) = pipe {
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                lock(&theirs.0).bytes.extend_from_slice(&buffer[..length]);
                theirs.1.notify_all();
            }
        }
        lock(&theirs.0).over = true;
        theirs.1.notify_all();
    });
    Pipe { shared, thread: Some(thread) }
}

impl Pipe {
    fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.0).bytes).into_owned()
    }

    /// The end of it, for messages.
    fn tail(&self) -> String {
        let text = self.text();
        let start = text.len().saturating_sub(4000);
        text.get(text.ceil_char_boundary(start)..).unwrap_or_default().to_owned()
    }

    /// Waits until `text` has come; false if it will not, or not in time.
    fn wait_for(&self, text: &str, deadline: Instant) -> bool {
        let mut guard = lock(&self.shared.0);
        let mut searched = 0;
        loop {
            let rest = guard.bytes.get(searched..).unwrap_or_default();
            if text.is_empty() || rest.windows(text.len()).any(|some| some == text.as_bytes()) {
                return true;
            }
            // A part of it may be there already.
            searched = guard.bytes.len().saturating_sub(text.len());
            let left = deadline.saturating_duration_since(Instant::now());
            if guard.over || left.is_zero() {
                return false;
            }
            guard = match self.shared.1.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

/// A guest that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    terminal: Option<Terminal>,
    stdout: Pipe,
    stderr: Pipe,
    deadline: Instant,
    folder: TempDir,
}

impl Running {
    /// Waits until the guest has printed `text`.
    pub fn wait_for(&self, text: &str) {
        self.wait_in(&self.stdout, text);
    }

    /// What the guest has printed.
    pub fn printed(&self) -> String {
        self.stdout.text()
    }

    /// Waits until Hull has said `text`.
    pub fn wait_for_message(&self, text: &str) {
        self.wait_in(&self.stderr, text);
    }

    fn wait_in(&self, pipe: &Pipe, text: &str) {
        assert!(
            pipe.wait_for(text, self.deadline),
            "{:?} did not come\nstdout: {}\nstderr: {}",
            text.chars().take(100).collect::<String>(),
            self.stdout.tail(),
            self.stderr.tail()
        );
    }

    /// Types something.
    pub fn write(&mut self, text: &str) {
        if let Some(terminal) = &self.terminal {
            let written = (&terminal.person).write_all(text.as_bytes());
            return assert!(written.is_ok(), "cannot type: {written:?}");
        }
        let stdin = self.child.as_mut().and_then(|child| child.stdin.as_mut());
        let written = stdin.map(|stdin| stdin.write_all(text.as_bytes()));
        assert!(matches!(written, Some(Ok(()))), "stdin is closed: {written:?}");
    }

    /// Types to a payload that sends back what is typed, waits until all of it has come, and ends it.
    pub fn sends_back(mut self) {
        self.wait_for("ready\n");
        self.write("Hull, are you there?");
        self.wait_for("Hull, are you there?");
        // More than any buffer on the way holds.
        let line = "0123456789abcdefghijklmnoprstuvwxyz\n".repeat(100);
        self.write(&line);
        self.wait_for(&line);
        self.write("q");
        self.finish().ok();
    }

    /// Ends the input.
    pub fn close_stdin(&mut self) {
        drop(self.child.as_mut().and_then(|child| child.stdin.take()));
    }

    /// The terminal given with [`Guest::on_terminal`] gets another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        match &self.terminal {
            Some(terminal) => terminal.resize(columns, rows),
            None => panic!("the guest is not on a terminal"),
        }
    }

    /// True if the guest is on a terminal that leaves all keys to it.
    pub fn is_raw(&self) -> bool {
        self.terminal.as_ref().is_some_and(Terminal::is_raw)
    }

    /// Hull's process id.
    pub fn id(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// The runtime directory's place for another `hull` to see this one.
    pub fn runtime(&self) -> &Path {
        self.folder.path()
    }

    /// A number of kilobytes from /proc/PID/status, such as `VmRSS`.
    pub fn kilobytes(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()));
        status
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| *name == key)
            .and_then(|(_, value)| value.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    }

    /// The largest of [`Running::kilobytes`] from now to the machine's end, or as long as a guest may
    /// take.
    pub fn peak_kilobytes(&mut self, key: &str) -> u64 {
        let mut peak = 0;
        while !self.has_ended() && Instant::now() < self.deadline {
            peak = peak.max(self.kilobytes(key));
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child is ours and not yet waited for, so its id is not someone else's.
        unsafe { libc::kill(self.id() as libc::pid_t, signal) };
    }

    /// True if it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Outcome {
        let Some(mut child) = self.child.take() else { panic!("the guest is gone") };
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < self.deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => {
                    // It may have ended this very moment, which makes no difference.
                    let _ = child.kill();
                    let _ = child.wait();
                    panic!(
                        "the guest does not end ({other:?})\nstdout: {}\nstderr: {}",
                        self.stdout.tail(),
                        self.stderr.tail()
                    );
                }
            }
        };
        if let Some(terminal) = self.terminal.take() {
            terminal.close();
        }
        for pipe in [&mut self.stdout, &mut self.stderr] {
            if let Some(thread) = pipe.thread.take() {
                assert!(thread.join().is_ok(), "a reader panicked");
            }
        }
        let left = std::fs::read_dir(self.folder.path().join("hull"))
            .map(|entries| entries.flatten().map(|entry| entry.file_name()).collect())
            .unwrap_or_default();
        Outcome { status, stdout: self.stdout.text(), stderr: self.stderr.text(), left }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may be over already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How a guest ended.
#[derive(Debug)]
pub struct Outcome {
    /// Hull's exit status.
    pub status: ExitStatus,
    /// What the guest printed.
    pub stdout: String,
    /// What Hull said.
    pub stderr: String,
    /// What is left in the runtime directory.
    pub left: Vec<std::ffi::OsString>,
}

impl Outcome {
    /// Hull's exit code; 128 and the signal's number if it was killed.
    pub fn code(&self) -> i32 {
        self.status.code().or(self.status.signal().map(|signal| signal + 128)).unwrap_or(-1)
    }

    /// Asserts that Hull ended well, and returns what the guest printed.
    pub fn ok(&self) -> &str {
        assert_eq!(self.code(), 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        assert!(self.left.is_empty(), "left in the runtime directory: {:?}", self.left);
        assert!(!self.stdout.contains("payload: "), "the payload failed: {}", self.stdout);
        &self.stdout
    }

    /// Asserts that Hull refused: a code other than 0, no panic, and all of `words` on stderr.
    pub fn refused(&self, words: &[&str]) {
        let said = &self.stderr;
        assert!(
            (1..128).contains(&self.code()) && self.code() != 101,
            "code {}\nstdout: {}\nstderr: {said}",
            self.code(),
            self.stdout
        );
        assert!(!said.contains("panicked"), "{said}");
        assert!(self.left.is_empty(), "left in the runtime directory: {:?}", self.left);
        for word in words {
            assert!(said.contains(word), "no {word:?} in: {said}");
        }
    }

    /// Asserts that Hull refused because it or the host could not, with all of `words` on stderr.
    pub fn failed(&self, words: &[&str]) {
        self.refused(words);
        assert_eq!(self.code(), 1, "{}", self.stderr);
    }

    /// Asserts that Hull refused because of what it was asked for, with all of `words` on stderr.
    pub fn misused(&self, words: &[&str]) {
        self.refused(words);
        assert_eq!(self.code(), 2, "{}", self.stderr);
    }

    /// The value after `key=` in the payload's last line of results.
    pub fn value(&self, key: &str) -> &str {
        let line = self.stdout.lines().rfind(|line| line.starts_with("result "));
        let value = line.into_iter().flat_map(str::split_ascii_whitespace).find_map(|word| {
            word.split_once('=').and_then(|(name, value)| (name == key).then_some(value))
        });
        match value {
            Some(value) => value,
            None => panic!("no {key}=\nstdout: {}\nstderr: {}", self.stdout, self.stderr),
        }
    }

    /// The number after `key=`.
    pub fn number(&self, key: &str) -> u64 {
        let text = self.value(key);
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        match number {
            Ok(number) => number,
            Err(error) => panic!("{key}={text}: {error}"),
        }
    }
}
