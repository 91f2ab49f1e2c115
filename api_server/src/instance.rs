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

mod metadata;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::oneshot;
use vmm::config::{BalloonConfig, ByteSize, DiskConfig, NetConfig, RateLimit, VmConfig};
use vmm::devices::virtio::blk::Candidate;
use vmm::machine::{BackEnd, Command, DeviceStatus, Handle, Message, Reply, State, Traffic};
use vmm::machine::{check_disk, root_arguments};

use crate::body;
use crate::fault::{DONE, Done, Fault, chain};
use crate::types::balloon::{Balloon, BalloonStats, BalloonStatsUpdate, BalloonUpdate};
use crate::types::boot::BootSource;
use crate::types::check_id;
use crate::types::drive::PartialDrive;
use crate::types::info::ConfigFile;
use crate::types::net::PartialNetworkInterface;
use crate::types::small::{EntropyDevice, Logger};
use crate::types::vsock::Vsock;

/// Name of the balloon among a machine's devices.
const BALLOON: &str = "balloon";

/// There is no balloon.
pub fn no_balloon() -> Fault {
    Fault::bad("Balloon config error: No balloon device found.")
}

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

/// The log of the process. Whoever owns it opens its file and changes it.
pub trait LogSettings: Send + Sync {
    /// Changes what is logged, where, and how.
    ///
    /// # Errors
    /// The field that cannot be had, and why; nothing is changed then.
    fn change(&self, wanted: &Logger) -> Result<(), String>;
}

/// Somebody wants the machine to start. Whoever gets this builds it.
pub struct Start {
    /// What is to be built.
    pub config: VmConfig,
    inner: Arc<Mutex<Inner>>,
    reply: oneshot::Sender<Result<(), String>>,
}

impl Start {
    /// The machine is built and runs from now on.
    pub fn started(self, handle: Handle) {
        let mut inner = lock(&self.inner);
        // Before anybody can change it.
        let _ = inner.tell_metadata(&handle);
        inner.phase = Phase::Started(handle);
        drop(inner);
        // A client that is gone has its machine all the same.
        let _ = self.reply.send(Ok(()));
    }

    /// It cannot be built; nothing of it is left, and it can be configured otherwise.
    pub fn failed(self, error: &dyn std::error::Error) {
        lock(&self.inner).phase = Phase::Configuring;
        let _ = self.reply.send(Err(chain(error)));
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
    /// What the guest's metadata service has to say; `None` until somebody puts something.
    metadata: Option<Arc<Value>>,
}

/// The machine behind the API.
pub struct Instance {
    id: Option<String>,
    log: Option<Box<dyn LogSettings>>,
    program: Program,
    limits: Limits,
    starts: mpsc::Sender<Start>,
    inner: Arc<Mutex<Inner>>,
}

/// As handlers share it.
pub type Shared = Arc<Instance>;

impl Instance {
    /// A machine that is not configured yet; `config` has the defaults. What wants it to start
    /// arrives at `starts`.
    pub fn new(
        program: Program,
        limits: Limits,
        config: VmConfig,
        starts: mpsc::Sender<Start>,
    ) -> Instance {
        let inner = Inner { config, phase: Phase::Configuring, logger: None, metadata: None };
        Instance {
            id: None,
            log: None,
            program,
            limits,
            starts,
            inner: Arc::new(Mutex::new(inner)),
        }
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

    /// What was last asked of the log.
    pub fn logger(&self) -> Option<Logger> {
        self.lock().logger.clone()
    }

    /// What the machine is called.
    pub fn id(&self) -> String {
        self.id.clone().or_else(|| self.config().name).unwrap_or_default()
    }

    /// Configures the machine as a file in the form of `GET /vm/config` says, and wishes for its
    /// start.
    ///
    /// # Errors
    /// What is wrong with it; the machine is to be given up then.
    pub fn configure_from(&self, json: &[u8]) -> Result<(), Fault> {
        let file: ConfigFile = body::parse(json)?;
        if let Some(logger) = file.logger {
            self.put_logger(logger)?;
        }
        let Some(source) = file.boot_source else {
            return Err(Fault::bad("boot-source: a machine needs a kernel."));
        };
        self.put_boot_source(source)?;
        if let Some(machine) = file.machine_config {
            self.configure(|config| machine.put_into(config))?;
        }
        for drive in file.drives {
            check_id(&drive.drive_id)?;
            self.put_drive(drive.try_into()?)?;
        }
        for interface in file.network_interfaces {
            check_id(&interface.iface_id)?;
            self.put_net(interface.into())?;
        }
        if let Some(balloon) = file.balloon {
            self.put_balloon(balloon)?;
        }
        if let Some(vsock) = file.vsock {
            self.put_vsock(vsock)?;
        }
        if let Some(entropy) = file.entropy {
            self.put_entropy(entropy)?;
        }
        if let Some(mmds) = file.mmds_config {
            self.put_mmds(mmds)?;
        }
        self.wish().map(drop)
    }

    /// Says what is booted.
    ///
    /// # Errors
    /// See [`Instance::configure`]; a file cannot be read.
    pub fn put_boot_source(&self, source: BootSource) -> Done {
        self.before_start()?;
        check_file("kernel", &source.kernel_image_path)?;
        if let Some(initrd) = &source.initrd_path {
            check_file("initrd", initrd)?;
        }
        self.configure(|config| {
            config.kernel = source.into();
            Ok(())
        })
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
        config.validate_without_kernel().map_err(|error| Fault::bad(chain(&error)))?;
        inner.config = config;
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
        match self.wish()?.await {
            Ok(Ok(())) => Ok(DONE),
            Ok(Err(message)) => Err(Fault::bad(format!("Start microvm error: {message}"))),
            Err(_) => Err(Fault::gone()),
        }
    }

    /// Has the machine built.
    fn wish(&self) -> Result<oneshot::Receiver<Result<(), String>>, Fault> {
        let (reply, outcome) = oneshot::channel();
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Configuring) {
            return Err(Fault::after_start());
        }
        if inner.config.kernel.path.as_os_str().is_empty() {
            return Err(Fault::bad(
                "Start microvm error: Cannot start microvm without kernel configuration.",
            ));
        }
        let config = to_be_built(&inner.config);
        let start = Start { config, inner: Arc::clone(&self.inner), reply };
        self.starts.send(start).map_err(|_| Fault::gone())?;
        inner.phase = Phase::Starting;
        Ok(outcome)
    }

    /// Halts the machine, or lets it go on. What it does already is done.
    ///
    /// # Errors
    /// It was not started, or is about to change its state.
    pub async fn set_paused(&self, paused: bool) -> Done {
        let handle = self.handle()?;
        let (command, done) = match paused {
            true => (Command::Pause, State::Paused),
            false => (Command::Resume, State::Running),
        };
        if send(&handle, Command::Status).await? == done {
            return Ok(DONE);
        }
        send(&handle, command).await.map(|_| DONE)
    }

    /// Puts a drive into the configuration, in the place of the one with its id.
    ///
    /// # Errors
    /// See [`Instance::configure`]; the file cannot be a disk.
    pub fn put_drive(&self, disk: DiskConfig) -> Done {
        self.before_start()?;
        check_disk(&disk).map_err(|error| Fault::bad(chain(&error)))?;
        self.configure(|config| {
            put(&mut config.disk, disk, |disk| &disk.id);
            Ok(())
        })
    }

    /// Gives the guest a source of entropy.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_entropy(&self, device: EntropyDevice) -> Done {
        self.configure(|config| {
            config.rng = true;
            config.rng_rate = device.rate_limiter.map(Into::into);
            Ok(())
        })
    }

    /// Gives the guest streams to programs of the host.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_vsock(&self, vsock: Vsock) -> Done {
        self.configure(|config| {
            config.vsock = Some(vsock.into());
            Ok(())
        })
    }

    /// Gives the guest a balloon.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_balloon(&self, balloon: Balloon) -> Done {
        self.configure(|config| {
            config.balloon = Some(balloon.try_into()?);
            Ok(())
        })
    }

    /// The running machine and its balloon.
    fn balloon(&self) -> Result<(Handle, BalloonConfig), Fault> {
        let handle = self.handle()?;
        Ok((handle, self.config().balloon.ok_or_else(no_balloon)?))
    }

    /// Gives the balloon of the running machine another size.
    ///
    /// # Errors
    /// The machine does not run, has no balloon, or has less memory than that.
    pub async fn patch_balloon(&self, update: BalloonUpdate) -> Done {
        let (handle, mut balloon) = self.balloon()?;
        balloon.size = ByteSize(u64::from(update.amount_mib) << 20);
        let mut config = self.config();
        config.balloon = Some(balloon.clone());
        config.validate_without_kernel().map_err(|error| Fault::bad(chain(&error)))?;
        let message = Message::BalloonTarget(balloon.pages());
        send(&handle, Command::Update { device: BALLOON.into(), message }).await?;
        self.lock().config.balloon = Some(balloon);
        Ok(DONE)
    }

    /// Asks the guest about its memory more or less often.
    ///
    /// # Errors
    /// The machine does not run or has no balloon; statistics were not asked for before the start,
    /// or would not be any more.
    pub async fn patch_balloon_statistics(&self, update: BalloonStatsUpdate) -> Done {
        let (handle, mut balloon) = self.balloon()?;
        let seconds = update.stats_polling_interval_s;
        if (seconds == 0) != (balloon.stats_interval == 0) {
            return Err(Fault::bad(
                "stats_polling_interval_s: Statistics cannot be enabled/disabled after activation.",
            ));
        }
        let message = Message::StatisticsInterval(Duration::from_secs(seconds.into()));
        send(&handle, Command::Update { device: BALLOON.into(), message }).await?;
        balloon.stats_interval = seconds;
        self.lock().config.balloon = Some(balloon);
        Ok(DONE)
    }

    /// How the balloon of the running machine stands.
    ///
    /// # Errors
    /// The machine does not run or has no balloon; statistics were not asked for before the start.
    pub async fn balloon_statistics(&self) -> Result<BalloonStats, Fault> {
        let (handle, balloon) = self.balloon()?;
        if balloon.stats_interval == 0 {
            return Err(Fault::bad(
                "Statistics are disabled: stats_polling_interval_s was 0 before the start.",
            ));
        }
        let (answer, status) = mpsc::sync_channel(1);
        send(&handle, Command::DeviceStatus { device: BALLOON.into(), answer }).await?;
        match status.try_recv() {
            Ok(DeviceStatus::Balloon(status)) => Ok(status.into()),
            Err(_) => Err(Fault::gone()),
        }
    }

    /// Gives a drive of the running machine another file or other limits.
    ///
    /// # Errors
    /// The machine does not run; it has no such drive; the file cannot be a disk, or what is in
    /// flight on the old one does not end.
    pub async fn patch_drive(&self, update: PartialDrive) -> Done {
        let handle = self.handle()?;
        let id = update.drive_id;
        let find =
            |config: &VmConfig| config.disk.iter().position(|disk| disk.id.as_deref() == Some(&id));
        let config = self.config();
        let unknown = || Fault::bad(format!("There is no drive with the id {id}."));
        let disk = find(&config).and_then(|n| config.disk.get(n)).ok_or_else(unknown)?;
        if update.path_on_host.is_none() && update.rate_limiter.is_none() {
            return Err(Fault::bad("path_on_host or rate_limiter: one of them has to be there."));
        }
        if let Some(path) = update.path_on_host {
            let (ro, direct) = (disk.ro, disk.direct);
            let opened = path.clone();
            // On a thread of its own: a file system that hangs shall hang nobody else.
            let candidate = elsewhere(move || Candidate::open(&opened, ro, direct)).await?;
            let candidate = candidate.map_err(|error| Fault::bad(chain(&error)))?;
            let back_end = BackEnd::Disk(candidate);
            send(&handle, Command::Replace { device: id.clone(), back_end }).await?;
            self.remember(find, |config, n| config.disk[n].path = path);
        }
        if let Some(limiter) = update.rate_limiter {
            let limit = disk.rate.unwrap_or_default().updated(limiter.into());
            limit_traffic(&handle, &id, Traffic::All, limit).await?;
            self.remember(find, |config, n| config.disk[n].rate = Some(limit));
        }
        Ok(DONE)
    }

    /// Gives a network card of the running machine other limits.
    ///
    /// # Errors
    /// The machine does not run; it has no such card.
    pub async fn patch_net(&self, update: PartialNetworkInterface) -> Done {
        let handle = self.handle()?;
        let id = update.iface_id;
        let find =
            |config: &VmConfig| config.net.iter().position(|net| net.id.as_deref() == Some(&id));
        let config = self.config();
        let unknown = || Fault::bad(format!("There is no network interface with the id {id}."));
        let net = find(&config).and_then(|n| config.net.get(n)).ok_or_else(unknown)?;
        if let Some(limiter) = update.rx_rate_limiter {
            let limit = net.rx_rate.unwrap_or_default().updated(limiter.into());
            limit_traffic(&handle, &id, Traffic::Received, limit).await?;
            self.remember(find, |config, n| config.net[n].rx_rate = Some(limit));
        }
        if let Some(limiter) = update.tx_rate_limiter {
            let limit = net.tx_rate.unwrap_or_default().updated(limiter.into());
            limit_traffic(&handle, &id, Traffic::Sent, limit).await?;
            self.remember(find, |config, n| config.net[n].tx_rate = Some(limit));
        }
        Ok(DONE)
    }

    /// Notes a change of the running machine in its configuration.
    fn remember(
        &self,
        find: impl Fn(&VmConfig) -> Option<usize>,
        change: impl FnOnce(&mut VmConfig, usize),
    ) {
        let mut inner = self.lock();
        if let Some(n) = find(&inner.config) {
            change(&mut inner.config, n);
        }
    }

    /// Puts a network card into the configuration, in the place of the one with its id.
    ///
    /// # Errors
    /// See [`Instance::configure`]; another card has its address or interface.
    pub fn put_net(&self, net: NetConfig) -> Done {
        self.configure(|config| {
            put(&mut config.net, net, |net| &net.id);
            Ok(())
        })
    }
}

/// Puts `new` in the place of the one with its id, or behind all.
fn put<T>(all: &mut Vec<T>, new: T, id: impl Fn(&T) -> &Option<String>) {
    match all.iter_mut().find(|other| id(other) == id(&new)) {
        Some(other) => *other = new,
        None => all.push(new),
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

async fn limit_traffic(
    handle: &Handle,
    device: &str,
    traffic: Traffic,
    limit: RateLimit,
) -> Result<(), Fault> {
    let message = Message::RateLimit(traffic, limit.limiter());
    send(handle, Command::Update { device: device.to_owned(), message }).await.map(drop)
}

/// That a file of the configuration can be read.
///
/// # Errors
/// The reason, with `what` the file is.
pub fn check_file(what: &str, path: &Path) -> Result<(), Fault> {
    // Of a pipe, nobody waits for the other end.
    match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Fault::bad(format!(
            "The {what} file cannot be opened: {}: {error}",
            path.display()
        ))),
    }
}

/// Sends a command to a running machine and waits for the answer.
///
/// # Errors
/// It refused, or is gone.
pub async fn send(handle: &Handle, command: Command) -> Result<State, Fault> {
    let (sender, receiver) = oneshot::channel::<Reply>();
    handle.send(
        command,
        Box::new(move |reply| {
            let _ = sender.send(reply);
        }),
    );
    match receiver.await {
        Ok(reply) => reply.map_err(|refusal| Fault::bad(refusal.to_string())),
        Err(_) => Err(Fault::gone()),
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
