//! What a process has beside its machine: signals, a name, a pid file, the host side of the console.
//! Machines that follow each other in one process share it.

use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api_server::{Instance, Listener, ServerError, Socket, SocketFile};
use vmm::config::{ConfigError, ConsoleMode, OnReboot, VmConfig};
use vmm::console::{Console, Sink, plain, window_size};
use vmm::hypervisor::HypervisorError;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::journal::{Happening, Reason};
use vmm::machine::{
    Assembly, Ending, Handle, Host, Machine, Observed, Origin, Ready, RunError, RunOptions, Service,
};
use vmm::metrics::Registry;
use vmm::seccomp::{self, ThreadKind};
use vmm::signals::{Hooks, Signals};
use vmm::timings::Timings;
use vmm_sys_util::timerfd::TimerFd;

use crate::cli::Result;
use crate::host::KvmKind;
use crate::last_words::{self, Leftovers, Published};
use crate::nursery;
use crate::pidfile::PidFile;
use crate::runtime::{self, Entry, Record};
use crate::terminal::{self, Escapes, RawMode};

/// Bytes of guest memory that KVM takes long to get to know: about 10 ms a GiB.
const LARGE: u64 = 16 << 30;

/// What a process has beside its machine.
pub struct Session {
    // Dropped first: what it speaks of goes after it.
    _leftovers: Published,
    entry: Option<Entry>,
    _pidfile: Option<PidFile>,
    /// Where the API is served.
    api_path: PathBuf,
    listener: Option<Listener>,
    _socket: Option<SocketFile>,
    door: Door,
    observed: Observed,
    signals: Signals,
    /// Files that no console may be written to.
    used: Vec<PathBuf>,
    /// A machine ran already.
    ran: AtomicBool,
}

/// The API, while nobody has come for it.
struct Offer {
    listener: Listener,
    instance: Instance,
    filter: seccomp::Mode,
}

impl Offer {
    fn serve(self) -> std::result::Result<(), ServerError> {
        api_server::serve(self.listener, self.instance, self.filter)
    }
}

/// An offer that machines which follow each other in one process pass on, until somebody takes it.
#[derive(Clone, Default)]
struct Door(Arc<Mutex<Option<Offer>>>);

impl Door {
    fn offer(&self) -> MutexGuard<'_, Option<Offer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens the door when somebody comes: a machine that nobody talks to has no thread for it.
struct Doorman {
    door: Door,
    fd: RawFd,
}

impl Service for Doorman {
    fn fd(&self) -> RawFd {
        self.fd
    }

    fn on_ready(&mut self, _machine: &Handle) -> bool {
        if let Some(offer) = self.door.offer().take()
            && let Err(error) = offer.serve()
        {
            tracing::error!(%error, "the API is not served");
        }
        false
    }
}

/// Writes metrics out each minute.
struct Minute {
    timer: TimerFd,
    metrics: Arc<Registry>,
}

impl Minute {
    fn new(metrics: Arc<Registry>) -> io::Result<Minute> {
        let mut timer = TimerFd::new()?;
        let minute = Duration::from_secs(60);
        timer.reset(minute, Some(minute))?;
        Ok(Minute { timer, metrics })
    }
}

impl Service for Minute {
    fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    fn on_ready(&mut self, _machine: &Handle) -> bool {
        // How many minutes it was makes no difference.
        let _ = self.timer.wait();
        if let Err(error) = self.metrics.flush() {
            tracing::warn!(%error, "metrics are not written");
        }
        true
    }
}

/// Where the API is to be.
#[derive(Clone, Copy, Default)]
pub enum ApiSocket<'a> {
    /// At the machine's place in the runtime directory, if it has one.
    #[default]
    ByName,
    /// There.
    At(&'a Path),
    /// Nowhere.
    Nowhere,
}

/// The host side of a console.
pub struct Attached {
    console: Console,
    _raw: Option<RawMode>,
}

/// What is to be prepared.
#[derive(Clone, Copy, Default)]
pub struct Wanted<'a> {
    /// Where the process id is written.
    pub pidfile: Option<&'a Path>,
    /// The file that the configuration was read from.
    pub config: Option<&'a Path>,
    /// Where the API is to be.
    pub api: ApiSocket<'a>,
}

impl Session {
    /// Takes over the signals, and a name in the runtime directory: the one of `config`, or one that
    /// is made up and put into it. Binds the socket of the API.
    ///
    /// # Errors
    /// The name, the socket or the pid file is another's; the system refused something. Nothing is
    /// left then.
    pub fn prepare(config: &mut VmConfig, wanted: Wanted<'_>) -> Result<Session> {
        check_inherited(config)?;
        // What somebody asked for comes first: that it cannot be had is found before anything is taken.
        let asked = match wanted.api {
            ApiSocket::At(path) => Some(Socket::bind(path)?),
            ApiSocket::ByName | ApiSocket::Nowhere => None,
        };
        // Before there is any other thread, so that all of them have these signals blocked.
        let signals = Signals::block()?.with_hooks(Hooks {
            end: last_words::on_end,
            stop: terminal::lend,
            go_on: terminal::take_back,
        });
        seccomp::install_handler(terminal::restore)?;
        let named = config.name.is_some();
        config.name.get_or_insert_with(|| format!("vm-{}", std::process::id()));
        let directory = runtime::directory();
        let name = config.name.as_deref().unwrap_or_default();
        let api_path = match wanted.api {
            ApiSocket::At(path) => std::path::absolute(path)?,
            ApiSocket::ByName => runtime::socket_path(&directory, name),
            ApiSocket::Nowhere => PathBuf::new(),
        };
        let record = record(config, api_path);
        let (entry, by_name) = match Entry::create(&directory, &record) {
            Ok((entry, socket)) => (Some(entry), socket),
            // Who did not ask for a name can do without an entry.
            Err(err) if !named => {
                tracing::info!(%err, "`hull ps` will not show this machine");
                (None, None)
            }
            Err(err) => return Err(err.into()),
        };
        let socket = asked.or(by_name);
        let pidfile = wanted.pidfile.map(PidFile::create).transpose()?;
        let mut leftovers = Leftovers::default();
        if entry.is_some() {
            for path in runtime::paths(&directory, &record.name) {
                leftovers.add(&path);
            }
        }
        if let Some(pidfile) = &pidfile {
            pidfile.leave_to(&mut leftovers);
        }
        if let Some(file) = socket.as_ref().map(Socket::file) {
            let (device, inode) = file.identity();
            leftovers.add_if_same(file.path(), device, inode);
        }
        let _leftovers = leftovers.publish();
        let used = wanted.config.into_iter().chain(wanted.pidfile).map(Path::to_owned).collect();
        let ran = AtomicBool::new(false);
        let observed = Observed::default();
        observed.journal.note(Happening::Created);
        let (listener, _socket) = socket.map(Socket::into_parts).unzip();
        Ok(Session {
            _leftovers,
            entry,
            _pidfile: pidfile,
            api_path: record.api,
            listener,
            _socket,
            door: Door::default(),
            observed,
            signals,
            used,
            ran,
        })
    }

    /// Where the API is served.
    pub fn api_path(&self) -> &Path {
        &self.api_path
    }

    /// Tells those who listen that there will be no machine.
    pub fn tell_quit(&self) {
        let (reason, message, again) = (Reason::Quit, None, false);
        self.observed.journal.note(Happening::Stopped { reason, message, again });
        self.observed.journal.finish();
    }

    /// What can be seen of the machine.
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// Serves `instance` on the socket of the API, if there is one.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn serve(&mut self, instance: Instance, filter: seccomp::Mode) -> Result<()> {
        let instance = instance.with_pool(nursery::default_socket());
        let offer = self.listener.take().map(|listener| Offer { listener, instance, filter });
        offer.map_or(Ok(()), |offer| Ok(offer.serve()?))
    }

    /// Serves `instance` there, from when a machine runs and somebody comes.
    pub fn offer(&mut self, instance: Instance, filter: seccomp::Mode) {
        let instance = instance.with_pool(nursery::default_socket());
        let offer = self.listener.take().map(|listener| Offer { listener, instance, filter });
        *self.door.offer() = offer;
    }

    /// Says in the runtime directory what the machine is now.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn describe(&self, config: &VmConfig) -> io::Result<()> {
        self.entry
            .as_ref()
            .map_or(Ok(()), |entry| entry.update(&record(config, self.api_path.clone())))
    }

    /// Lets signals end the process from now on, until a machine runs: for who waits.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn interruptible(&self) -> io::Result<()> {
        self.signals.interruptible()
    }

    /// Builds the machine of `config`, which boots or goes on from `origin`, with what is `ready`.
    ///
    /// # Errors
    /// There is no KVM, or no machine can be built; nothing of it is left then.
    pub fn build(
        &self,
        config: &VmConfig,
        origin: Option<&Origin>,
        timings: &Arc<Timings>,
        ready: Ready,
    ) -> Result<Machine> {
        self.building(config, timings, |host| {
            Ok(match origin {
                Some(origin) => Machine::restore(config, origin, host, ready)?,
                None => Machine::new(config, host, ready)?,
            })
        })
    }

    fn building<T>(
        &self,
        config: &VmConfig,
        timings: &Arc<Timings>,
        build: impl FnOnce(&Host<'_>) -> Result<T>,
    ) -> Result<T> {
        let watch = match config.memory.size.0 {
            LARGE.. => Some(self.signals.watch()?),
            _ => self.signals.interruptible().map(|()| None)?,
        };
        let hypervisor = Kvm::open(Path::new(DEVICE)).map_err(NoKvm)?;
        let host = Host {
            hypervisor: &hypervisor,
            pvm: KvmKind::detect() == KvmKind::Pvm,
            timings: Arc::clone(timings),
            observed: self.observed.clone(),
            window: window_size(libc::STDIN_FILENO),
        };
        let built = build(&host)?;
        drop(watch);
        Ok(built)
    }

    /// Assembles the machine of `config`, which goes on later as a copy of one that is saved in the same start of
    /// this host, if it is from `here`; with what is `ready`.
    ///
    /// # Errors
    /// There is no KVM, or no machine can be built; nothing of it is left then.
    pub fn assemble(
        &self,
        config: &VmConfig,
        timings: &Arc<Timings>,
        ready: Ready,
        here: bool,
    ) -> Result<Assembly> {
        self.building(config, timings, |host| Ok(Assembly::of_copy(config, host, ready, here)?))
    }

    /// Opens the host side of the console of `config`. The terminal is in raw mode as long as it lives.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn console(&self, config: &VmConfig) -> Result<Attached> {
        let first = !self.ran.swap(true, Ordering::Relaxed);
        let opened = console(config, &self.used, first);
        if opened.is_err() && first {
            // It was not emptied for a machine that ran.
            self.ran.store(false, Ordering::Relaxed);
        }
        let (console, _raw) = opened?;
        Ok(Attached { console, _raw })
    }

    /// Runs a machine that [`Session::build`] made of `config`, until it ends.
    ///
    /// # Errors
    /// Its console cannot be had, or it cannot go on.
    pub fn run(&self, machine: Machine, config: &VmConfig) -> Result<Ending> {
        // Last, so that an error before it finds the terminal as it was.
        let console = self.console(config)?;
        self.run_with(machine, config, console)
    }

    /// As [`Session::run`], with a console that is open already.
    ///
    /// # Errors
    /// It cannot go on.
    pub fn run_with(
        &self,
        machine: Machine,
        config: &VmConfig,
        attached: Attached,
    ) -> Result<Ending> {
        self.run_beside(machine, config, attached, Vec::new())
    }

    /// As [`Session::run_with`], and serves these beside.
    ///
    /// # Errors
    /// It cannot go on.
    pub fn run_beside(
        &self,
        machine: Machine,
        config: &VmConfig,
        attached: Attached,
        mut services: Vec<Box<dyn Service>>,
    ) -> Result<Ending> {
        let Attached { console, _raw } = attached;
        let offered = self.door.offer().as_ref().map(|offer| offer.listener.as_raw_fd());
        if let Some(fd) = offered {
            services.push(Box::new(Doorman { door: self.door.clone(), fd }));
        }
        if self.observed.metrics.has_sink() {
            services.push(Box::new(Minute::new(Arc::clone(&self.observed.metrics))?));
        }
        let thread = if offered.is_some() { ThreadKind::MainApi } else { ThreadKind::Main };
        let signals = Some(self.signals.try_clone()?);
        let last = config.on_reboot == OnReboot::Exit;
        let options = RunOptions { console, signals, services, thread, last };
        let ended = machine.run(options);
        self.tell_end(config, &ended);
        Ok(ended?)
    }

    /// Tells those who listen how the machine ended, and writes the last metrics.
    fn tell_end(&self, config: &VmConfig, ended: &std::result::Result<Ending, RunError>) {
        let (reason, message) = match ended {
            Ok(Ending::PowerOff) => (Reason::PowerOff, None),
            Ok(Ending::Reset) => (Reason::Reset, None),
            Ok(Ending::TripleFault) => (Reason::Crash, None),
            Ok(Ending::Quit) => (Reason::Quit, None),
            Ok(Ending::Signal(number)) => (Reason::Signal, Some(format!("signal {number}"))),
            Err(error) => (Reason::Error, Some(api_server::chain(error))),
        };
        if let Err(error) = self.observed.metrics.flush() {
            tracing::warn!(%error, "the last metrics are not written");
        }
        let again = reason == Reason::Reset && config.on_reboot == OnReboot::Restart;
        self.observed.journal.note(Happening::Stopped { reason, message, again });
        if !again {
            self.observed.journal.finish();
        }
    }
}

/// That descriptors which the configuration names are the caller's: later, files of our own may have
/// these numbers.
fn check_inherited(config: &VmConfig) -> std::result::Result<(), ConfigError> {
    for (n, fd) in config.net.iter().enumerate().filter_map(|(n, net)| Some((n, net.fd?))) {
        // SAFETY: fcntl reports a bad descriptor.
        if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            let problem = match fd {
                0..3 => format!("{fd} is a standard stream, not a TAP queue"),
                _ => {
                    format!("descriptor {fd} is not open; pass one that is, as a shell's `{fd}<>`")
                }
            };
            return Err(ConfigError { field: format!("net[{n}].fd"), problem });
        }
    }
    Ok(())
}

fn record(config: &VmConfig, api: PathBuf) -> Record {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Record {
        name: config.name.clone().unwrap_or_default(),
        pid: std::process::id() as i32,
        started,
        cpus: config.cpus,
        memory: config.memory.size.0,
        kernel: config.kernel.path.to_string_lossy().into_owned(),
        api,
    }
}

/// A standard stream without the buffer that std would put on it.
fn inherited(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: nothing in this program closes a standard stream.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Opens the host side of the console. A file is none of `used`; it is emptied for the `first` machine
/// and written on for those that follow.
fn console(config: &VmConfig, used: &[PathBuf], first: bool) -> Result<(Console, Option<RawMode>)> {
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
            typed: false,
        })
    };
    match mode {
        ConsoleMode::Tty => {
            let mut console = stdio()?;
            let mut escapes = Escapes::default();
            console.filter = Box::new(move |typed| escapes.filter(typed));
            console.typed = true;
            let raw = RawMode::enter(stdin).map_err(NoTerminal)?;
            Ok((console, Some(raw)))
        }
        ConsoleMode::Stdio | ConsoleMode::Auto => Ok((stdio()?, None)),
        ConsoleMode::File => {
            let path = config.console.path.clone().unwrap_or_default();
            let used = config.files().chain(used.iter().map(PathBuf::as_path));
            let sink =
                Sink::create(&path, used, first).map_err(|source| ConsoleFile { path, source })?;
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
