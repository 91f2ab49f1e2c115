//! The machine behind the API: its configuration while it is put together, its handle once it runs.
//!
//! ```text
//!                InstanceStart              built
//!   Configuring ───────────────> Starting ─────────> Started(handle)
//!        ^                          │ not built
//!        └──────────────────────────┘
//! ```
//!
//! The configuration is guarded by a lock that is held for as long as it takes to look or to write,
//! never while something is waited for: a request that waits delays no other.

mod configuring;
mod fork;
mod metadata;
mod running;
mod snapshot;
mod wish;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use vmm::config::VmConfig;
use vmm::machine::{Command, Handle, Observed, Reply, State, root_arguments};
use vmm::metrics::{Sink, SinkOptions, SnapshotLatencies};
use vmm::snapshot::Base;

pub use self::running::no_balloon;
pub use self::wish::{Start, Wish};
use crate::fault::{DONE, Done, Fault};
use crate::requests::Requests;
use crate::types::metrics::Metrics;
use crate::types::small::Logger;

/// Bounds of what a client may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of a request's body.
    pub body: usize,
    /// Most bytes of the metadata, as JSON.
    pub metadata: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { body: 51_200, metadata: 51_200 }
    }
}

/// What a client is told of the program.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// `Firecracker` for its clients, else `Hull`.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The version of Firecracker whose API this is.
    pub api_version: &'static str,
}

impl Program {
    /// True if its clients expect a Firecracker.
    pub fn is_firecracker(&self) -> bool {
        self.name == "Firecracker"
    }
}

/// The log of the process. Whoever owns it opens its file and changes it.
pub trait LogSettings: Send + Sync {
    /// Changes what is logged, where, and how.
    ///
    /// # Errors
    /// The field that cannot be had, and why; nothing is changed then.
    fn change(&self, wanted: &Logger) -> Result<(), String>;
}

/// From whoever runs the machine to the API.
#[derive(Clone)]
pub struct Link(Arc<Mutex<Inner>>);

impl Link {
    /// This is the machine that runs from now on, the first one or one that follows; `base` is the
    /// snapshot that it goes on from.
    pub fn started(&self, handle: Handle, base: Option<Base>) {
        let mut inner = lock(&self.0);
        // Before anybody can change it.
        let _ = inner.tell_metadata(&handle);
        if inner.quit {
            handle.send(Command::Quit, Box::new(drop));
        }
        inner.base = base;
        inner.machines += 1;
        inner.phase = Phase::Started(handle);
    }

    /// The configuration as clients left it.
    pub fn config(&self) -> VmConfig {
        lock(&self.0).config.clone()
    }

    /// These files of disks are to be removed when the machine ends. Forking it changes which ones those are.
    pub fn set_temporary(&self, files: Vec<PathBuf>) {
        lock(&self.0).temporary = files;
    }

    /// The files of disks to be removed.
    pub fn temporary(&self) -> Vec<PathBuf> {
        lock(&self.0).temporary.clone()
    }
}

/// Locks what handlers and the starter share. Every change is one assignment: a panic cannot leave
/// half of one.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Phase {
    Configuring,
    Starting,
    Started(Handle),
}

struct Inner {
    config: VmConfig,
    phase: Phase,
    logger: Option<Logger>,
    metrics: Option<Metrics>,
    /// Something was configured.
    touched: bool,
    /// Somebody wants the end.
    quit: bool,
    /// Machines that ran so far, one after the other.
    machines: u64,
    /// The machine is being saved.
    saving: bool,
    /// Children that were given a number.
    forked: u64,
    /// Files of disks that are removed when the machine ends.
    temporary: Vec<PathBuf>,
    /// Numbers of the registers that a vCPU's state has, once they were asked for.
    msrs: Option<Arc<Vec<u32>>>,
    /// The last snapshot that was written, or the one that the machine goes on from.
    base: Option<Base>,
    /// What the guest's metadata service has to say; `None` until somebody puts something.
    metadata: Option<Arc<Value>>,
}

/// The machine behind the API.
pub struct Instance {
    id: Option<String>,
    log: Option<Box<dyn LogSettings>>,
    pool: Option<PathBuf>,
    program: Program,
    limits: Limits,
    observed: Observed,
    requests: Requests,
    latencies: Arc<SnapshotLatencies>,
    wishes: mpsc::Sender<Wish>,
    inner: Arc<Mutex<Inner>>,
}

/// How long an answer may take to be on its way.
const ANSWERED: Duration = Duration::from_millis(2);

/// As handlers share it.
pub type Shared = Arc<Instance>;

impl Instance {
    /// A machine that is not configured yet; `config` has the defaults. What clients want of it
    /// arrives at `wishes`.
    pub fn new(
        program: Program,
        limits: Limits,
        config: VmConfig,
        observed: Observed,
        wishes: mpsc::Sender<Wish>,
    ) -> Instance {
        Instance::in_phase(Phase::Configuring, program, limits, config, observed, wishes)
    }

    /// A machine that is being built of `config`. Who builds it says through the [`Link`] when it
    /// runs.
    pub fn configured(
        program: Program,
        limits: Limits,
        mut config: VmConfig,
        observed: Observed,
    ) -> (Instance, Link) {
        // Clients ask for devices by their names.
        for n in 0..config.disk.len() {
            config.disk[n].id = Some(config.disk_name(n));
        }
        for n in 0..config.net.len() {
            config.net[n].id = Some(config.net_name(n));
        }
        // Nobody wishes for what is there.
        let (wishes, _) = mpsc::channel();
        let phase = Phase::Starting;
        let instance = Instance::in_phase(phase, program, limits, config, observed, wishes);
        let link = instance.link();
        (instance, link)
    }

    fn in_phase(
        phase: Phase,
        program: Program,
        limits: Limits,
        config: VmConfig,
        observed: Observed,
        wishes: mpsc::Sender<Wish>,
    ) -> Instance {
        let requests = Requests::new(&observed.metrics);
        let latencies = Arc::<SnapshotLatencies>::default();
        observed.metrics.add(("latencies_us", Arc::clone(&latencies) as _));
        let inner = Inner {
            config,
            phase,
            logger: None,
            metrics: None,
            touched: false,
            quit: false,
            machines: 0,
            saving: false,
            forked: 0,
            temporary: Vec::new(),
            msrs: None,
            base: None,
            metadata: None,
        };
        let inner = Arc::new(Mutex::new(inner));
        Instance {
            id: None,
            log: None,
            pool: None,
            program,
            limits,
            observed,
            requests,
            latencies,
            wishes,
            inner,
        }
    }

    fn link(&self) -> Link {
        Link(Arc::clone(&self.inner))
    }

    /// Has clients told this id instead of the machine's name.
    #[must_use]
    pub fn with_id(self, id: &str) -> Instance {
        Instance { id: Some(id.to_owned()), ..self }
    }

    /// Lets clients change this log.
    #[must_use]
    pub fn with_log(self, log: Box<dyn LogSettings>) -> Instance {
        Instance { log: Some(log), ..self }
    }

    /// Has children made by the pool that listens there, if a client names no other.
    #[must_use]
    pub fn with_pool(self, path: PathBuf) -> Instance {
        Instance { pool: Some(path), ..self }
    }

    /// Changes the log of the process. Before the start only, as Firecracker has it.
    ///
    /// # Errors
    /// The machine was started; the field that cannot be had.
    pub fn put_logger(&self, wanted: Logger) -> Done {
        self.before_start()?;
        let log = self.log.as_ref().ok_or_else(|| Fault::bad("There is no log to be changed."))?;
        log.change(&wanted).map_err(|why| Fault::bad(format!("Logger error: {why}")))?;
        self.lock().logger = Some(wanted);
        Ok(DONE)
    }

    /// Has metrics written somewhere. Before the start only, and once, as Firecracker has it.
    ///
    /// # Errors
    /// The machine was started; metrics are written already; the file cannot be had.
    pub fn put_metrics(&self, wanted: Metrics) -> Done {
        self.before_start()?;
        let registry = &self.observed.metrics;
        let failed = |why: String| Fault::bad(format!("metrics_path: {why}"));
        if registry.has_sink() {
            return Err(failed("metrics are written somewhere already.".into()));
        }
        let sink = Sink::open(SinkOptions {
            path: wanted.metrics_path.clone(),
            id: wanted.emit_id.then(|| self.id()),
            properties: wanted.properties.clone(),
        });
        let path = wanted.metrics_path.display();
        registry.write_to(sink.map_err(|error| failed(format!("{path}: {error}")))?);
        self.lock().metrics = Some(wanted);
        Ok(DONE)
    }

    /// Where metrics are written.
    pub fn metrics(&self) -> Option<Metrics> {
        self.lock().metrics.clone()
    }

    /// Writes metrics out, if they are written anywhere.
    ///
    /// # Errors
    /// The machine was not started; the file does not take them.
    pub fn flush_metrics(&self) -> Done {
        self.handle()?;
        let flushed = self.observed.metrics.flush();
        flushed.map(|()| DONE).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => Fault::bad("FlushMetrics: nobody reads the metrics."),
            _ => Fault::bad(format!("FlushMetrics: {error}")),
        })
    }

    /// What was last asked of the log.
    pub fn logger(&self) -> Option<Logger> {
        self.lock().logger.clone()
    }

    /// What the machine is called.
    pub fn id(&self) -> String {
        self.id.clone().or_else(|| self.config().name).unwrap_or_default()
    }

    /// What can be seen of the machine.
    pub fn observed(&self) -> &Observed {
        &self.observed
    }

    /// The requests so far.
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// What clients are told of the program.
    pub fn program(&self) -> Program {
        self.program
    }

    /// Bounds of what a client may ask for.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// A copy of the configuration.
    pub fn config(&self) -> VmConfig {
        self.lock().config.clone()
    }

    /// The running machine.
    ///
    /// # Errors
    /// It was not started.
    pub fn handle(&self) -> Result<Handle, Fault> {
        match &self.lock().phase {
            Phase::Started(handle) => Ok(handle.clone()),
            Phase::Configuring | Phase::Starting => Err(Fault::before_start()),
        }
    }

    /// Changes the configuration of a machine that was not started. All of `change` is done or, if
    /// it fails or no machine could be made from the result, nothing.
    ///
    /// # Errors
    /// The machine was started; what `change` says; the field that is not valid.
    pub fn configure(&self, change: impl FnOnce(&mut VmConfig) -> Result<(), Fault>) -> Done {
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Configuring) {
            return Err(Fault::after_start());
        }
        let mut config = inner.config.clone();
        change(&mut config)?;
        config.validate_without_kernel().map_err(|error| Fault::of_config(&error))?;
        inner.config = config;
        inner.touched = true;
        Ok(DONE)
    }

    /// That the machine can still be configured, before its change is looked at.
    ///
    /// # Errors
    /// It was started.
    pub fn before_start(&self) -> Result<(), Fault> {
        match self.lock().phase {
            Phase::Configuring => Ok(()),
            Phase::Starting | Phase::Started(_) => Err(Fault::after_start()),
        }
    }

    /// State of the machine, in Firecracker's words.
    pub async fn state(&self) -> &'static str {
        let Ok(handle) = self.handle() else { return "Not started" };
        match send(&handle, Command::Status).await {
            Ok(State::Paused) => "Paused",
            _ => "Running",
        }
    }

    /// Starts the machine. Answered when it is built and runs.
    ///
    /// # Errors
    /// There is no kernel, the machine was started already, or it cannot be built; it can be
    /// configured otherwise and tried again then.
    pub async fn start(&self) -> Done {
        let wish = self.wish()?;
        self.fulfilled(wish).await.map(|_| DONE)
    }

    /// Ends the machine as if its power was cut, and the process with it. One that is just being
    /// built ends when it is, and one that reboots starts no more.
    pub fn quit(&self) -> Done {
        let mut inner = self.lock();
        let (wishes, handle) = (
            self.wishes.clone(),
            match &inner.phase {
                Phase::Started(handle) => Some(handle.clone()),
                Phase::Configuring | Phase::Starting => None,
            },
        );
        // The process ends with the machine: the answer goes out before.
        tokio::spawn(async move {
            tokio::time::sleep(ANSWERED).await;
            match handle {
                Some(handle) => handle.send(Command::Quit, Box::new(drop)),
                // Heard where no machine was started yet.
                None => drop(wishes.send(Wish::Quit)),
            }
        });
        inner.quit = true;
        Ok(DONE)
    }
}

/// Does what may wait on a thread of its own.
///
/// # Errors
/// There is no thread to be had.
pub async fn elsewhere<T: Send + 'static>(
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Fault> {
    let (sender, receiver) = oneshot::channel();
    let body = move || drop(sender.send(what()));
    let thread = std::thread::Builder::new().name("api file".into()).spawn(body);
    thread.map_err(|error| Fault::bad(format!("There is no thread to open files on: {error}.")))?;
    receiver.await.map_err(|_| Fault::gone())
}

/// Sends a command to a running machine, at once. What comes back is the answer, to be waited for.
///
/// # Errors
/// It refused, or is gone.
pub fn send(
    handle: &Handle,
    command: Command,
) -> impl Future<Output = Result<State, Fault>> + use<> {
    let (sender, receiver) = oneshot::channel::<Reply>();
    handle.send(
        command,
        Box::new(move |reply| {
            let _ = sender.send(reply);
        }),
    );
    async {
        match receiver.await {
            Ok(reply) => reply.map_err(|refusal| Fault::bad(refusal.to_string())),
            Err(_) => Err(Fault::gone()),
        }
    }
}

/// The machine that clients mean by `config`: the root drive is the guest's first, and the command
/// line says where it is even where the client has one of its own.
fn to_be_built(config: &VmConfig) -> VmConfig {
    let mut config = config.clone();
    config.disk.sort_by_key(|disk| !disk.root);
    if config.kernel.replace_cmdline {
        let words = config.kernel.cmdline.take().into_iter().chain(root_arguments(&config));
        config.kernel.cmdline = Some(words.collect::<Vec<_>>().join(" "));
    }
    config
}

#[cfg(test)]
mod tests {
    use vmm::config::DiskConfig;

    use super::*;

    #[test]
    fn the_root_drive_comes_first_and_is_named() {
        let mut config = VmConfig::default();
        config.kernel.replace_cmdline = true;
        config.kernel.cmdline = Some("quiet".into());
        let disk = |id: &str, root| DiskConfig { id: Some(id.into()), root, ..Default::default() };
        config.disk = vec![disk("a", false), disk("b", true), disk("c", false)];
        let built = to_be_built(&config);
        let ids: Vec<_> = built.disk.iter().filter_map(|disk| disk.id.as_deref()).collect();
        assert_eq!(ids, ["b", "a", "c"]);
        assert_eq!(built.kernel.cmdline.as_deref(), Some("quiet root=/dev/vda rw"));
        config.disk[1].partuuid = Some("0eaa91a0-01".into());
        config.disk[1].ro = true;
        let line = to_be_built(&config).kernel.cmdline;
        assert_eq!(line.as_deref(), Some("quiet root=PARTUUID=0eaa91a0-01 ro"));
    }
}
