//! Machines inside a test's own process, and processes of a test's own.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::error::Error;
use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use machine_tests::PAYLOAD;
use tempfile::TempDir;
use vmm::config::{ByteSize, DiskConfig, VmConfig};
use vmm::console::{Console, Sink};
use vmm::hypervisor::Hypervisor;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Ending, Handle, Host, Machine, Observed, Ready, RunOptions};
use vmm::seccomp::{self, ThreadKind};
use vmm::signals::Signals;
use vmm::timings::Timings;

/// A test that has not ended by then hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Set in a process that runs one test alone.
const ALONE: &str = "HULL_TEST_ALONE";

/// Runs `body` in a process in which nothing else happens, with the signals of a machine blocked in
/// all threads: for tests that count descriptors and threads, or that need signals. `name` is the
/// calling test's.
pub fn alone(name: &str, body: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some() {
        return body();
    }
    let log = tempfile::tempfile().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(ALONE, "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log.try_clone().unwrap());
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { command.pre_exec(|| Signals::block().map(drop)) };
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > deadline => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut text = String::new();
    let mut log = log;
    std::io::Seek::rewind(&mut log).unwrap();
    log.read_to_string(&mut text).unwrap();
    match status {
        Some(status) => assert!(status.success(), "{status}\n{text}"),
        None => panic!("it hangs\n{text}"),
    }
    assert!(text.contains("1 passed"), "the test did not run\n{text}");
}

/// A machine of 64 MiB that runs the payload; `words` follow `payload=`.
pub fn payload(words: &str) -> VmConfig {
    let mut config = VmConfig { seccomp: seccomp::Mode::Off, ..VmConfig::default() };
    config.kernel.path = PAYLOAD.clone();
    config.kernel.cmdline = Some(format!("payload={words}"));
    config.memory.size = ByteSize(64 << 20);
    config
}

/// What the payload's `serialflood` prints before "done".
pub fn flood(size: usize) -> String {
    (0..size).map(|i| if i % 64 == 63 { '\n' } else { (b'0' + (i % 64) as u8) as char }).collect()
}

/// A disk of `mib` MiB for `config`.
pub fn add_disk(config: &mut VmConfig, folder: &TempDir, mib: u64) {
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(mib << 20).unwrap();
    config.disk.push(DiskConfig { path, ..DiskConfig::default() });
}

/// Like the payload, with all of it in one segment of 1 MiB, as large as what is mapped from its
/// file and not copied.
pub fn one_segment_kernel(folder: &TempDir) -> PathBuf {
    let elf = std::fs::read(&*PAYLOAD).unwrap();
    let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap()) as usize;
    let half = |at: usize| usize::from(u16::from_le_bytes(elf[at..at + 2].try_into().unwrap()));
    const SIZE: usize = 1 << 20;
    let (headers, count) = (word(32), half(56));
    let loads: Vec<usize> =
        (0..count).map(|i| headers + 56 * i).filter(|&at| word(at) as u32 == 1).collect();
    let base = loads.iter().map(|&at| word(at + 24)).min().unwrap();
    let mut image = vec![0; SIZE];
    for &at in &loads {
        let (offset, gpa, len) = (word(at + 8), word(at + 24), word(at + 32));
        assert!(gpa - base + word(at + 40) <= SIZE, "the payload has become too large");
        image[gpa - base..gpa - base + len].copy_from_slice(&elf[offset..offset + len]);
    }
    let mut file = elf[..64].to_vec();
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[40..48].fill(0);
    file[56..58].copy_from_slice(&1u16.to_le_bytes());
    // No sections.
    file[58..64].fill(0);
    file.extend(1u32.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for value in [4096, base, base, SIZE, SIZE, 4096] {
        file.extend((value as u64).to_le_bytes());
    }
    file.resize(4096, 0);
    file.extend(image);
    let path = folder.path().join("one-segment.elf");
    std::fs::write(&path, file).unwrap();
    path
}

/// All of an error.
pub fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(err) = next {
        text = format!("{text}: {err}");
        next = err.source();
    }
    text
}

/// Makes and runs a machine on the calling thread. `started` gets its handle.
pub fn run(
    config: &VmConfig,
    hypervisor: &dyn Hypervisor,
    console: Console,
    signals: Option<Signals>,
    started: impl FnOnce(Handle),
) -> Result<Ending, String> {
    run_in(config, hypervisor, Ready::default(), console, signals, started)
}

/// The same of what is ready.
pub fn run_in(
    config: &VmConfig,
    hypervisor: &dyn Hypervisor,
    ready: Ready,
    console: Console,
    signals: Option<Signals>,
    started: impl FnOnce(Handle),
) -> Result<Ending, String> {
    let timings = Arc::new(Timings::new(Instant::now()));
    let observed = Observed::default();
    let host = Host { hypervisor, pvm: false, timings, observed, window: None };
    let machine = Machine::new(config, &host, ready).map_err(|err| chain(&err))?;
    started(machine.handle());
    let thread = ThreadKind::Main;
    let options = RunOptions { console, signals, services: Vec::new(), thread, last: false };
    machine.run(options).map_err(|err| chain(&err))
}

/// The host's KVM.
pub fn kvm() -> Kvm {
    Kvm::open(Path::new(DEVICE)).unwrap()
}

/// A console that leads into a pipe.
pub fn piped() -> (Console, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let sink = Sink::for_fd(writer.as_fd()).unwrap();
    (Console { sink, ..Console::off() }, reader)
}

/// A machine on a thread of its own.
pub struct Running {
    pub handle: Handle,
    pub console: PipeReader,
    pub text: Vec<u8>,
    thread: JoinHandle<Result<Ending, String>>,
}

impl Running {
    pub fn start(config: VmConfig, signals: Option<Signals>) -> Running {
        let (console, reader) = piped();
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            run(&config, &kvm(), console, signals, |handle| sender.send(handle).unwrap())
        });
        match receiver.recv() {
            Ok(handle) => Running { handle, console: reader, text: Vec::new(), thread },
            Err(_) => panic!("{:?}", thread.join().unwrap()),
        }
    }

    /// A machine that runs on `thread`.
    pub fn of(
        handle: Handle,
        console: PipeReader,
        thread: JoinHandle<Result<Ending, String>>,
    ) -> Running {
        Running { handle, console, text: Vec::new(), thread }
    }

    /// Reads until the guest has printed `words` once more.
    pub fn wait_for(&mut self, words: &str) {
        let start = self.text.len();
        let mut bytes = [0; 4096];
        while !String::from_utf8_lossy(&self.text[start..]).contains(words) {
            match self.console.read(&mut bytes).unwrap() {
                0 => panic!("no {words:?} in {}", String::from_utf8_lossy(&self.text)),
                len => self.text.extend(&bytes[..len]),
            }
        }
    }

    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }

    /// How the machine ended, and everything that the guest printed.
    pub fn finish(mut self) -> (Result<Ending, String>, String) {
        self.console.read_to_end(&mut self.text).unwrap();
        let ending = self.thread.join().unwrap();
        (ending, String::from_utf8_lossy(&self.text).into_owned())
    }

    /// How the machine ended, without anybody reading its console.
    pub fn finish_unread(self) -> Result<Ending, String> {
        self.thread.join().unwrap()
    }
}
