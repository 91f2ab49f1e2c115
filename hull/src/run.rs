//! `hull run`.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use vmm::config::{ConsoleMode, OnReboot, VmConfig};
use vmm::console::{Console, Sink, plain, window_size};
use vmm::hypervisor::HypervisorError;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Ending, Host, Machine, RunOptions, Service};
use vmm::seccomp;
use vmm::signals::{Hooks, Signals};
use vmm::timings::{Milestone, Timings};

use crate::cli::{Format, Result, RunArgs, UsageError};
use crate::exit::Code;
use crate::host::KvmKind;
use crate::last_words::{self, Leftovers, Published};
use crate::logging;
use crate::pidfile::PidFile;
use crate::runtime::{self, Entry, Record};
use crate::streams;
use crate::terminal::{self, Escapes, RawMode};

/// Bytes of guest memory that KVM takes long to get to know: about 10 ms a GiB.
const LARGE: u64 = 16 << 30;

/// Runs a machine until it ends.
pub fn run(args: RunArgs, start: Instant) -> Result {
    let config = args.config()?;
    if args.print_config {
        streams::print(&toml::to_string(&config).map_err(UsageError::from)?)?;
        return Ok(Code::SUCCESS);
    }
    logging::start(args.log);
    let session = Session::prepare(config, &args)?;
    loop {
        let timings = Arc::new(Timings::new(start));
        let result = match session.config.on_reboot {
            OnReboot::Exit => session.run_once(&timings),
            OnReboot::Restart => session.run_in_thread(&timings),
        };
        if let Some(format) = args.timings {
            streams::say(&timings_text(&timings, format));
        }
        match result? {
            Ending::Reset if session.config.on_reboot == OnReboot::Restart => {
                tracing::info!("the guest reboots");
            }
            ending => {
                if ending == Ending::TripleFault {
                    streams::say("hull: the guest crashed (triple fault)\n");
                }
                return Ok(Code::from(&ending));
            }
        }
    }
}

/// What lasts over restarts of the guest.
struct Session {
    // Dropped first: what it speaks of goes after it.
    _leftovers: Published,
    config: VmConfig,
    entry: Option<Entry>,
    _pidfile: Option<PidFile>,
    signals: Signals,
}

impl Session {
    fn prepare(mut config: VmConfig, args: &RunArgs) -> Result<Session> {
        // Before there is any other thread, so that all of them have these signals blocked.
        let signals = Signals::block()?.with_hooks(Hooks {
            end: last_words::clean_up,
            stop: terminal::lend,
            go_on: terminal::take_back,
        });
        seccomp::install_handler(terminal::restore)?;
        let named = config.name.is_some();
        let name = config.name.get_or_insert_with(|| format!("vm-{}", std::process::id())).clone();
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let record = Record {
            name,
            pid: std::process::id() as i32,
            started,
            cpus: config.cpus,
            memory: config.memory.size.0,
            kernel: config.kernel.path.to_string_lossy().into_owned(),
        };
        let entry = match Entry::create(&runtime::directory(), &record) {
            Ok(entry) => Some(entry),
            // Who did not ask for a name can do without an entry.
            Err(err) if !named => {
                tracing::info!(%err, "`hull ps` will not show this machine");
                None
            }
            Err(err) => return Err(err.into()),
        };
        let pidfile = args.pidfile.as_deref().map(PidFile::create).transpose()?;
        let mut leftovers = Leftovers::default();
        if entry.is_some() {
            for path in runtime::paths(&runtime::directory(), &record.name) {
                leftovers.add(&path);
            }
        }
        if let Some(pidfile) = &pidfile {
            pidfile.leave_to(&mut leftovers);
        }
        let _leftovers = leftovers.publish();
        Ok(Session { _leftovers, config, entry, _pidfile: pidfile, signals })
    }

    /// Runs the machine on a thread of its own. A thread that controlled a machine is filtered for
    /// good and could not assemble the next one; this one only waits, and no guest reaches it.
    fn run_in_thread(&self, timings: &Arc<Timings>) -> Result<Ending> {
        std::thread::scope(|scope| {
            let control = std::thread::Builder::new()
                .name("main".into())
                .spawn_scoped(scope, || self.run_once(timings))?;
            control.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn run_once(&self, timings: &Arc<Timings>) -> Result<Ending> {
        let watch = match self.config.memory.size.0 {
            LARGE.. => Some(self.signals.watch()?),
            _ => self.signals.interruptible().map(|()| None)?,
        };
        let hypervisor = Kvm::open(Path::new(DEVICE)).map_err(NoKvm)?;
        let window = window_size(libc::STDIN_FILENO);
        let host = Host {
            hypervisor: &hypervisor,
            pvm: KvmKind::detect() == KvmKind::Pvm,
            timings: Arc::clone(timings),
            window,
        };
        let machine = Machine::new(&self.config, &host)?;
        drop(watch);
        let mut services: Vec<Box<dyn Service>> = Vec::new();
        if let Some(entry) = &self.entry {
            services.push(Box::new(entry.control_socket()));
        }
        // Last, so that an error before it finds the terminal as it was.
        let (console, _raw) = console(&self.config)?;
        let signals = Some(self.signals.try_clone()?);
        let last = self.config.on_reboot == OnReboot::Exit;
        if last {
            give_back_stack();
        }
        let options = RunOptions { console, signals, services, last };
        Ok(machine.run(options)?)
    }
}

/// Returns the pages of the main thread's stack that only reading options needed. The machine runs for
/// long and is one of many. To be called on the main thread only: what lies below its stack is
/// free by the kernel's layout, below another thread's may be anything.
fn give_back_stack() {
    const PAGE: usize = 4096;
    /// Far below what option parsing reaches; the stack may grow to 8 MiB.
    const DEPTH: usize = 256 * 1024;
    let marker = 0u8;
    // A page stays between here and what goes, for the frames of the call itself.
    let end = (&raw const marker as usize & !(PAGE - 1)) - PAGE;
    // SAFETY: nothing below the stack pointer is in use. Pages that the stack never reached are not
    // mapped, which is an error of no consequence.
    unsafe { libc::madvise((end - DEPTH) as *mut libc::c_void, DEPTH, libc::MADV_DONTNEED) };
}

/// A standard stream without the buffer that std would put on it.
fn inherited(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: nothing in this program closes a standard stream.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Opens the host side of the console.
fn console(config: &VmConfig) -> Result<(Console, Option<RawMode>)> {
    let (stdin, stdout) = (inherited(libc::STDIN_FILENO), inherited(libc::STDOUT_FILENO));
    let mode = match config.console.mode {
        ConsoleMode::Auto if stdin.is_terminal() => ConsoleMode::Tty,
        ConsoleMode::Auto => ConsoleMode::Stdio,
        mode => mode,
    };
    let stdio = || -> io::Result<Console> {
        Ok(Console {
            sink: Sink::for_fd(stdout)?,
            input: Some(stdin.try_clone_to_owned()?),
            filter: Box::new(plain),
        })
    };
    match mode {
        ConsoleMode::Tty => {
            let mut console = stdio()?;
            let mut escapes = Escapes::default();
            console.filter = Box::new(move |typed| escapes.filter(typed));
            let raw = RawMode::enter(stdin).map_err(NoTerminal)?;
            Ok((console, Some(raw)))
        }
        ConsoleMode::Stdio | ConsoleMode::Auto => Ok((stdio()?, None)),
        ConsoleMode::File => {
            let path = config.console.path.clone().unwrap_or_default();
            let sink = Sink::create(&path, config.files())
                .map_err(|source| ConsoleFile { path, source })?;
            Ok((Console { sink, ..Console::off() }, None))
        }
        ConsoleMode::Off => Ok((Console::off(), None)),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("--console tty needs a terminal as standard input")]
struct NoTerminal(#[source] io::Error);

#[derive(Debug, thiserror::Error)]
#[error("cannot write the console to {}", path.display())]
struct ConsoleFile {
    path: PathBuf,
    source: io::Error,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot use KVM")]
struct NoKvm(#[source] HypervisorError);

/// The milestones as people or programs read them.
fn timings_text(timings: &Timings, format: Format) -> String {
    let reached = Milestone::ALL.map(|milestone| (milestone, timings.get(milestone)));
    if format == Format::Json {
        let map: serde_json::Map<String, serde_json::Value> = reached
            .iter()
            .map(|(milestone, nanos)| (milestone.key().to_owned(), (*nanos).into()))
            .collect();
        return format!("{}\n", serde_json::Value::Object(map));
    }
    let mut text = String::from("hull: timings from process start\n");
    for (milestone, nanos) in reached {
        let time = match nanos {
            Some(nanos) => format!("{:>12.3} ms", nanos as f64 / 1e6),
            None => format!("{:>15}", "-"),
        };
        let note = match milestone {
            Milestone::Userspace => {
                format!("  (the guest writes 123 to {:#x})", arch::layout::BOOT_TIMER)
            }
            _ => String::new(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:<20}{time}{note}", milestone.name());
    }
    text
}
