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

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use axum::http::StatusCode;
use tokio::sync::oneshot;
use vmm::config::{DiskConfig, NetConfig, VmConfig};
use vmm::machine::{Command, Handle, Reply, State, check_disk, root_arguments};

use crate::body;
use crate::fault::{DONE, Done, Fault, chain};
use crate::types::boot::BootSource;
use crate::types::check_id;
use crate::types::info::ConfigFile;

/// Bounds of what a client may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most bytes of a request's body.
    pub body: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { body: 51_200 }
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
        lock(&self.inner).phase = Phase::Started(handle);
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
}

/// The machine behind the API.
pub struct Instance {
    id: Option<String>,
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
        let inner = Inner { config, phase: Phase::Configuring };
        Instance { id: None, program, limits, starts, inner: Arc::new(Mutex::new(inner)) }
    }

    /// A machine that runs already.
    pub fn running(program: Program, limits: Limits, config: VmConfig, handle: Handle) -> Instance {
        let (starts, _) = mpsc::channel();
        let inner = Inner { config, phase: Phase::Started(handle) };
        Instance { id: None, program, limits, starts, inner: Arc::new(Mutex::new(inner)) }
    }

    /// Has clients told this id instead of the machine's name.
    #[must_use]
    pub fn with_id(self, id: &str) -> Instance {
        Instance { id: Some(id.to_owned()), ..self }
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
        if let Some(_entropy) = file.entropy {
            self.configure(|config| {
                config.rng = true;
                Ok(())
            })?;
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
            match config.disk.iter_mut().find(|other| other.id == disk.id) {
                Some(other) => *other = disk,
                None => config.disk.push(disk),
            }
            Ok(())
        })
    }

    /// Puts a network card into the configuration, in the place of the one with its id.
    ///
    /// # Errors
    /// See [`Instance::configure`]; another card has its address or interface.
    pub fn put_net(&self, net: NetConfig) -> Done {
        self.configure(|config| {
            let others = || config.net.iter().filter(|other| other.id != net.id);
            if let Some(mac) = net.mac.filter(|mac| others().any(|o| o.mac == Some(*mac))) {
                return Err(Fault::bad(format!("The MAC address is already in use: {mac}")));
            }
            if others().any(|other| other.tap == net.tap) {
                let tap = net.tap.as_deref().unwrap_or_default();
                return Err(Fault::bad(format!("host_dev_name: {tap} is another card's.")));
            }
            match config.net.iter_mut().find(|other| other.id == net.id) {
                Some(other) => *other = net,
                None => config.net.push(net),
            }
            Ok(())
        })
    }
}

/// That a file of the configuration can be read.
///
/// # Errors
/// The reason, with `what` the file is.
pub fn check_file(what: &str, path: &Path) -> Result<(), Fault> {
    match std::fs::File::open(path) {
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
        Err(_) => Err(Fault::with_status(
            StatusCode::BAD_REQUEST,
            "The microVM stopped before the request was done.",
        )),
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
