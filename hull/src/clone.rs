//! `hull clone`: a process that goes on as the copy of a machine which is handed over to it.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use api_server::{Instance, Limits};
use vmm::config::{ConsoleConfig, ConsoleMode, VmConfig};
use vmm::fork::disks::{Copies, Disks};
use vmm::fork::{self, Born, Child, Notice, Outcome};
use vmm::hook::Identity;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Command, Hollow, LONGEST_METADATA, Origin, Ready, Service, Shape};
use vmm::seccomp;
use vmm::snapshot;
use vmm::timings::Timings;

use crate::api::HULL;
use crate::cli::{CloneArgs, Result};
use crate::entry;
use crate::exit::Code;
use crate::hook::Asking;
use crate::logging::{self, Level};
use crate::nursery;
use crate::report;
use crate::run;
use crate::runtime::RuntimeError;
use crate::session::{ApiSocket, Session, Wanted};

/// Lower ones are not guests' (virtio 1.3, § 5.10.4).
const LOWEST_CID: u64 = 3;

#[derive(Debug, thiserror::Error)]
enum CloneError {
    #[error("standard input is no socket; this is for `hull fork` and `hull pool`")]
    NoSocket,
    #[error("cannot enter the network namespace {}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("nobody waits for this copy any more")]
    Unheard,
}

/// Goes on as a copy of the machine that the other end of standard input hands over. With a shape, or
/// if it was asked for, standard input first brings who that is.
pub fn clone(args: &CloneArgs, start: Instant) -> Result {
    nursery::leave_home();
    logging::start(Level::Warn);
    let stream = socket()?;
    let (pool, served, hollow) = match args.shape() {
        None if args.asked => {
            // Nobody waits for it yet: it may become quicker meanwhile.
            let served = if fork::has_begun(&stream) {
                nursery::served(&stream)?
            } else {
                get_ready();
                nursery::wait(&stream)?
            };
            (Some(stream), served, None)
        }
        None => (None, Some(stream), None),
        Some(shape) => {
            let hollow = hollow(shape, args.seccomp.into()).inspect_err(|err| {
                // The pool says it; this process's words go nowhere.
                nursery::apologize(&stream, &report::line(err.as_ref()));
            })?;
            get_ready();
            let served = nursery::wait(&stream)?;
            (Some(stream), served, Some(hollow))
        }
    };
    // The pool is gone.
    let Some(stream) = served else { return Ok(Code::SUCCESS) };
    let heard = fork::hear(&stream);
    let parent = Parent { stream: shared(Some(stream)), pool: shared(pool) };
    let served = heard
        .map_err(Into::into)
        .and_then(|notice| serve(&parent, notice, hollow, args.seccomp.into(), start));
    served.inspect_err(|err| {
        // Unless somebody was told already.
        parent.answer(&Err(report::line(err.as_ref())));
    })
}

/// Has this process have what it needs sooner or later, whatever machine it gets.
fn get_ready() {
    entry::populate_code();
    entry::populate_stack();
    // Asked for once.
    snapshot::this_host();
}

/// What can be made of a machine beforehand.
fn hollow(shape: Shape, filter: seccomp::Mode) -> Result<Hollow> {
    Ok(Hollow::new(&Kvm::open(Path::new(DEVICE))?, shape, filter)?)
}

/// Who has this process made, and hears once what became of it.
#[derive(Clone)]
struct Parent {
    stream: Shared,
    /// Who made this process, and counts it until it has a machine.
    pool: Shared,
}

type Shared = Rc<RefCell<Option<UnixStream>>>;

fn shared(stream: Option<UnixStream>) -> Shared {
    Rc::new(RefCell::new(stream))
}

impl Parent {
    /// Waits for what it hands over.
    fn receive(&self) -> Result<(Origin, Disks)> {
        match &*self.stream.borrow() {
            Some(stream) => Ok(fork::receive(stream)?),
            None => Err(CloneError::NoSocket.into()),
        }
    }

    /// This process has its machine: whoever made it may make another.
    fn leave_pool(&self) {
        self.pool.take();
    }

    /// Nobody waits for an answer.
    fn is_over(&self) -> bool {
        self.stream.borrow().as_ref().is_none_or(fork::is_over)
    }

    /// Returns whether somebody was told.
    fn answer(&self, outcome: &Outcome) -> bool {
        // Closed behind it: nobody is kept waiting for an end of file.
        self.stream.take().is_some_and(|stream| fork::answer(&stream, outcome).is_ok())
    }
}

/// Standard input, in whose place is nothing from then on.
fn socket() -> Result<UnixStream> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: the copy is fresh; standard input is replaced, which nobody has opened.
    let stream = unsafe {
        let copy = libc::fcntl(libc::STDIN_FILENO, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 || libc::dup2(null.as_raw_fd(), libc::STDIN_FILENO) < 0 {
            return Err(io::Error::last_os_error().into());
        }
        UnixStream::from(OwnedFd::from_raw_fd(copy))
    };
    stream.peer_addr().map_err(|_| CloneError::NoSocket)?;
    Ok(stream)
}

fn serve(
    parent: &Parent,
    notice: Notice,
    hollow: Option<Hollow>,
    filter: seccomp::Mode,
    start: Instant,
) -> Result {
    let Notice { child, config: parents, host, disks } = notice;
    let child = &child;
    let here = host.is_some() && host == snapshot::this_host();
    if let Some(path) = &child.netns {
        enter(path).map_err(|source| CloneError::Netns { path: path.clone(), source })?;
    }
    let mut config = config(child, parents, filter)?;
    let wanted = Wanted { api: ApiSocket::ByName, ..Wanted::default() };
    let mut session = match Session::prepare(&mut config, wanted) {
        Err(err) if child.named_by_number && is_taken(err.as_ref()) => {
            let name = child.name.as_deref().unwrap_or_default();
            config.name = Some(format!("{name}-{}", std::process::id()));
            Session::prepare(&mut config, wanted)?
        }
        session => session?,
    };
    let name = config.name.clone().unwrap_or_default();
    if let Some(vsock) = &mut config.vsock {
        if child.overrides.vsock.is_none() {
            let mut path = vsock.path.clone().into_os_string();
            path.push(format!(".{name}"));
            vsock.path = path.into();
        }
        // Nobody else on this host has it as long as this one lives.
        vsock.cid =
            child.overrides.cid.unwrap_or_else(|| u64::from(std::process::id()).max(LOWEST_CID));
    }
    // Without what its disks stand on it cannot be assembled; else it can before its parent is frozen.
    let (mut handed, mut copies) = (None, Copies::default());
    if disks {
        let (origin, bases) = parent.receive()?;
        copies = bases.copy(child, &name, &mut config)?;
        handed = Some(origin);
    }
    let limits = Limits { metadata: LONGEST_METADATA, ..Limits::default() };
    let observed = session.observed().clone();
    let (instance, link) = Instance::configured(HULL, limits, config, observed);
    let config = link.config();
    if let Some(metadata) = child.metadata.clone() {
        instance.preset_metadata(metadata.into())?;
    }
    session.offer(instance, config.seccomp);
    let ready = Ready { hollow, disks: copies.take() };
    let assembly = session.assemble(&config, &Arc::new(Timings::new(start)), ready, here)?;
    let console = session.console(&config)?;
    let origin = match handed {
        Some(origin) => origin,
        None => parent.receive()?.0,
    };
    let machine = assembly.go_on(&origin)?;
    drop(origin);
    let handle = machine.handle();
    link.started(handle.clone(), None);
    let api = session.api_path().to_owned();
    let files = copies.files().to_vec();
    if child.temporary {
        link.set_temporary(files.iter().map(|(_, path)| path.clone()).collect());
    }
    let born = Born { name, pid: std::process::id(), api, disks: files, hook: None };
    let mut services: Vec<Box<dyn Service>> = Vec::new();
    if let Some(hook) = child.hook.clone().filter(|_| child.resume) {
        let identity = Identity {
            number: child.number,
            of: child.of,
            name: born.name.clone(),
            generation: machine.generation(),
        };
        if parent.is_over() {
            return Err(CloneError::Unheard.into());
        }
        let (parent, born, machine) = (parent.clone(), born.clone(), handle.clone());
        let done = Box::new(move |outcome| {
            if !parent.answer(&Ok(Born { hook: Some(outcome), ..born })) {
                // Who has given it up said that there is none.
                machine.send(Command::Quit, Box::new(drop));
            }
        });
        services.push(Box::new(Asking::start(hook, identity, config.clone(), &handle, done)?));
    }
    // Before the first instruction: one that is not waited for is one that there is not.
    if services.is_empty() && !parent.answer(&Ok(born)) {
        return Err(CloneError::Unheard.into());
    }
    // Not before, for it wakes somebody who wants a processor.
    parent.leave_pool();
    // From here on there may be writes that were acknowledged.
    copies.keep();
    if child.resume {
        handle.send(Command::Resume, Box::new(drop));
    }
    let ending = session.run_beside(machine, &config, console, services);
    for path in link.temporary() {
        let _ = fs::remove_file(path);
    }
    let ending = ending?;
    // Unless somebody was told already.
    parent.answer(&Err("the machine ended before its guest was ready".to_owned()));
    Ok(run::end(&ending))
}

fn is_taken(err: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(err.downcast_ref(), Some(RuntimeError::NameTaken(_)))
}

/// What is to be built: the parent's configuration, with what is otherwise here. Which filters there are is the
/// matter of who has this process made: who hands a machine over may have none.
fn config(child: &Child, parent: VmConfig, filter: seccomp::Mode) -> Result<VmConfig> {
    let mut config = VmConfig { name: child.name.clone(), seccomp: filter, ..parent };
    child.overrides.apply(&mut config)?;
    if let Some(mmds) = &mut config.mmds {
        // What is in the file was for the parent.
        mmds.path = None;
    }
    let console = match &child.console {
        Some(path) => ConsoleConfig {
            mode: ConsoleMode::File,
            path: Some(path.clone()),
            ..ConsoleConfig::default()
        },
        None => ConsoleConfig { mode: ConsoleMode::Stdio, ..ConsoleConfig::default() },
    };
    let has_none = config.console.mode == ConsoleMode::Off;
    let wanted = (child.console.is_some() || !has_none).then_some(console);
    config.console = config.console.elsewhere(wanted)?;
    config.validate_without_kernel()?;
    Ok(config)
}

/// Opens interfaces in this network namespace from now on.
fn enter(path: &Path) -> io::Result<()> {
    let namespace = File::open(path)?;
    // SAFETY: setns has no memory arguments; those of vCPUs that are there have no use for another.
    match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
