//! Copies of the machine, which go on as processes of their own.
//!
//! ```text
//!   client          main           here                           pool               child
//!     POST ───────────────────────> connect, announce ──────────> hands it to ─────> a machine with
//!                    halt <───────── …                                               nothing in it
//!                    … ───────────> freeze, seal
//!                    go on <─────── …
//!                                   state, layers ──────────────────────────────────> map, run
//!                                   <─────────────────────────────────────────────── name
//!     200 <───────────────────────── …
//! ```
//!
//! This process may not make others: its filters do not let it, and they would be inherited. Whoever
//! listens at the pool's socket does.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmm::config::{LONGEST_NAME, VmConfig};
use vmm::devices::virtio::blk::Backing;
use vmm::devices::virtio::vsock;
use vmm::files::SocketPath;
use vmm::fork::disks::{DiskError, Disks, Switch};
use vmm::fork::{self, Child, HandOverError, Notice, Outcome, Seed};
use vmm::hook::Hook;
use vmm::machine::{Command, Frozen};
use vmm::snapshot::{self, Header, MemoryHeader, State};

use super::snapshot::{Saving, halt, micros, portable};
use super::{Instance, Shared, elsewhere};
use crate::fault::{Fault, chain};
use crate::types::fork::{ForkParams, Forked};

/// Most children of one request.
const MOST: u32 = 10_000;
/// Children that are waited for at a time.
const AT_ONCE: usize = 4;
/// Pages that are copied without a thread for it.
const FEW: u64 = 64;
/// Most milliseconds that one may take to run.
const LONGEST: u64 = 600_000;
/// After so long who has no place for another connection is asked again; so long may the rest of an answer be behind
/// its beginning.
const BREATH: Duration = Duration::from_millis(5);

fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::bad(format!("Fork error: {}.", chain(error)))
}

/// The same of an error that does not say what was being done.
fn while_doing(what: &str, error: &dyn std::error::Error) -> Fault {
    Fault::bad(format!("Fork error: {what}: {}.", chain(error)))
}

impl Instance {
    /// Makes copies of the machine. It is done to its end also if the client does not wait for it.
    ///
    /// # Errors
    /// The machine was not started, or is being saved; its memory cannot be frozen; nobody makes processes.
    pub async fn fork(shared: Shared, params: ForkParams) -> Result<Forked, Fault> {
        if !(1..=MOST).contains(&params.count) {
            return Err(Fault::bad(format!("count: between 1 and {MOST} children are made.")));
        }
        if params.overrides.len() > params.count as usize {
            return Err(Fault::bad("overrides: there are more of them than children."));
        }
        if !(1..=LONGEST).contains(&params.timeout_ms) {
            return Err(Fault::bad(format!("timeout_ms: between 1 and {LONGEST} can be waited.")));
        }
        let pool = params.pool.clone().or_else(|| shared.pool.clone()).ok_or_else(|| {
            Fault::bad("pool: nobody is known who makes processes; name the socket of a pool.")
        })?;
        let config = shared.config();
        // Those behind them are as those that have a name only.
        for (n, child) in params.children(&config).iter().enumerate().take(params.overrides.len()) {
            let checked = child.validate(&config);
            checked.map_err(|error| Fault::bad(format!("overrides[{n}].{}.", chain(&error))))?;
            if params.paused && child.hook.is_some() {
                return Err(Fault::bad("hook: children that are left halted answer nobody."));
            }
        }
        let saving = Saving::begin(&shared)?;
        // Before anything is halted for nothing.
        let first = connect_at_once(&pool).map_err(|error| failed(&error))?;
        let mut children = params.children(&config);
        shared.name_children(&mut children);
        let patience = Duration::from_millis(params.timeout_ms);
        let config = portable(config);
        let (heard, is_stalled) = Default::default();
        let mut birth = Birth { children, config, pool, patience, first, heard, is_stalled };
        birth.announce_first();
        tokio::spawn(saving.fork(params, birth)).await.map_err(|_| Fault::gone())?
    }
}

impl Saving {
    async fn fork(self, params: ForkParams, birth: Birth) -> Result<Forked, Fault> {
        let handle = self.0.handle()?;
        let (frozen, halted) = halt(&self.0, &handle, false).await?;
        let was_running = frozen.was_running;
        let planted = self.plant(frozen, birth, params.drives_dir).await;
        let resume = was_running && !(params.template && planted.is_ok());
        let (disks, planted) = match planted {
            Ok((birth, Planted { switch, seed, copied })) => {
                (self.0.switch(switch), Ok((birth, seed, copied)))
            }
            Err(fault) => (Vec::new(), Err(fault)),
        };
        let file = |(name, disk): &(String, Backing)| (name.clone(), disk.path().to_owned());
        let drives = disks.iter().map(file).map(Into::into).collect();
        let (told, goes_on) = oneshot::channel();
        // Counted where it happens: this thread may be late.
        let reply = move |_| {
            let _ = told.send(micros(halted));
        };
        handle.send(Command::Thaw { resume, disks }, Box::new(reply));
        // The next may be made meanwhile.
        drop(self);
        let (birth, seed, copied_bytes) = planted?;
        let children = birth.deliver(seed).await;
        let are_none = |children: &Vec<Outcome>| children.iter().all(Result::is_err);
        if !resume && was_running && children.as_ref().map_or(true, are_none) {
            // It is nobody's template.
            handle.send(Command::Resume, Box::new(drop));
        }
        let children = children?.into_iter().map(Into::into).collect();
        let pause_us = goes_on.await.map_err(|_| Fault::gone())?;
        Ok(Forked { children, pause_us, copied_bytes, drives })
    }

    /// Makes a halted machine one that can be handed over. A thread of its own costs as much as copying some pages
    /// takes: it has one only if more is to be copied, or a disk may be waited for.
    async fn plant(
        &self,
        mut frozen: Frozen,
        mut birth: Birth,
        folder: Option<PathBuf>,
    ) -> Result<(Birth, Planted), Fault> {
        // Somebody may have given a device another back-end since.
        let config = portable(self.0.config());
        if config != birth.config {
            (birth.first, birth.config) = (None, config);
        }
        if frozen.disks.is_empty()
            && let Some(planted) = plant(&mut frozen, &birth, None, FEW)?
        {
            return Ok((birth, planted));
        }
        elsewhere(move || {
            let planted = plant(&mut frozen, &birth, folder.as_deref(), u64::MAX)?;
            planted.map(|planted| (birth, planted)).ok_or_else(Fault::gone)
        })
        .await?
    }
}

/// A machine that can be handed over.
struct Planted {
    /// What it goes on with itself.
    switch: Switch,
    seed: Seed,
    /// Bytes of memory that were copied.
    copied: u64,
}

impl Instance {
    /// Gives children without a name one of the machine's, with a number.
    fn name_children(&self, children: &mut [Child]) {
        let mut inner = self.lock();
        let name = inner.config.name.clone();
        let name = name.unwrap_or_else(|| format!("vm-{}", std::process::id()));
        for child in children.iter_mut().filter(|child| child.name.is_none()) {
            inner.forked += 1;
            let number = format!("-{}", inner.forked);
            let most = LONGEST_NAME.saturating_sub(number.len());
            child.name = Some(name.chars().take(most).collect::<String>() + &number);
            child.named_by_number = true;
        }
    }

    /// Notes what the machine has in place of disks that others stand on now.
    fn switch(&self, switch: Switch) -> Vec<(String, Backing)> {
        let mut inner = self.lock();
        let mut config = inner.config.clone();
        let disks = switch.done(&mut config);
        for (before, after) in inner.config.disk.clone().iter().zip(&config.disk) {
            // What others stand on is not temporary any more.
            if let Some(place) = inner.temporary.iter().position(|path| path == before.file())
                && before.file() != after.file()
            {
                inner.temporary[place] = after.file().to_owned();
            }
        }
        inner.config.disk = config.disk;
        disks
    }
}

/// Makes a halted machine one that can be handed over to its children. Nothing is done if more than `most` pages of
/// memory are to be copied.
fn plant(
    frozen: &mut Frozen,
    birth: &Birth,
    folder: Option<&Path>,
    most: u64,
) -> Result<Option<Planted>, Fault> {
    let freezing = |error| while_doing("cannot freeze the guest's memory", &error);
    let Some(shared) = frozen.image.share(most).map_err(freezing)? else { return Ok(None) };
    let id =
        snapshot::word().map_err(|error| while_doing("cannot draw a random number", &error))?;
    let name = birth.config.name.clone().unwrap_or_default();
    let disks = std::mem::take(&mut frozen.disks);
    let disks = Disks::freeze(&disks, &birth.children, &name, folder);
    let (disks, switch) = disks.map_err(|error: DiskError| failed(&error))?;
    let parts = std::mem::take(&mut frozen.parts);
    let state = State { header: header(id, frozen.image.size()), parts };
    let seed = Seed::new(state, shared.layers, disks).map_err(|error| failed(&error))?;
    Ok(Some(Planted { switch, seed, copied: shared.copied }))
}

/// What is in front of a state that is handed over. Its configuration was sent before.
fn header(id: String, size: u64) -> Header {
    Header {
        hull: env!("CARGO_PKG_VERSION").to_owned(),
        created_ms: snapshot::now_ms(),
        host: snapshot::this_host(),
        disks: Vec::new(),
        config: VmConfig::default(),
        memory: MemoryHeader {
            id,
            aside: String::new(),
            size,
            data: 0,
            sum: None,
            samples: Vec::new(),
            base: None,
        },
    }
}

fn no_pool(path: &Path) -> impl FnOnce(io::Error) -> HandOverError {
    let path = path.to_owned();
    move |source| HandOverError::Pool { path, source }
}

/// Connects to who makes processes, before `deadline`.
fn connect(pool: &Path, deadline: Instant) -> Result<UnixStream, HandOverError> {
    loop {
        match connect_at_once(pool)? {
            Some(stream) => return Ok(stream),
            None if Instant::now() >= deadline => return Err(HandOverError::Late),
            None => std::thread::sleep(BREATH),
        }
    }
}

/// The same, and nothing if it would have to be waited for.
fn connect_at_once(pool: &Path) -> Result<Option<UnixStream>, HandOverError> {
    let connected = SocketPath::of(pool).and_then(|short| vsock::connect(short.as_path()));
    match connected {
        Ok(socket) => Ok(Some(socket.into())),
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(err) => Err(no_pool(pool)(err)),
    }
}

/// Children that are to be made.
struct Birth {
    children: Vec<Child>,
    /// The machine, as they are told before it is frozen.
    config: VmConfig,
    pool: PathBuf,
    /// How long one may take to run.
    patience: Duration,
    /// Who serves the first of them, and was told so: it makes what it can while the machine halts.
    first: Option<UnixStream>,
    /// Of how many there was a word, or an end.
    heard: AtomicUsize,
    /// No others are asked for: of those that were there was not a word.
    is_stalled: AtomicBool,
}

impl Birth {
    fn notice(&self, child: &Child) -> Notice {
        let config = self.config.clone();
        let disks = config.disk.iter().any(|disk| !disk.ro);
        Notice { child: child.clone(), config, host: snapshot::this_host(), disks }
    }

    fn announce_first(&mut self) {
        let Some((stream, child)) = self.first.take().zip(self.children.first()) else { return };
        // If it is gone, another is asked for.
        let told = fork::announce(&stream, &self.notice(child), Instant::now());
        self.first = told.is_ok().then_some(stream);
    }

    /// Has one child made.
    fn one(&self, n: usize, child: &Child, seed: &Seed) -> Result<Outcome, HandOverError> {
        let hook = child.hook.as_ref().map_or(Duration::ZERO, Hook::patience);
        let deadline = Instant::now() + self.patience + hook;
        let give = |stream: &UnixStream| {
            let sent = seed.send(stream, deadline);
            if sent.is_err() {
                // Who still waits for it need not any more; who had reason not to take it has said so.
                let _ = stream.shutdown(Shutdown::Write);
            }
            let outcome = fork::outcome(stream, deadline);
            match (sent, outcome) {
                (Err(error), Ok(Err(_)) | Err(_)) if !error.is_over() => Err(error),
                (_, outcome) => outcome,
            }
        };
        if let Some(stream) = self.first.as_ref().filter(|_| n == 0) {
            match give(stream) {
                // Its process ended before it was needed.
                Err(HandOverError::Silent) => {}
                outcome => return outcome,
            }
        }
        let stream = connect(&self.pool, deadline)?;
        fork::announce(&stream, &self.notice(child), deadline)?;
        give(&stream)
    }

    /// Has each child made, and says what became of them, in order.
    async fn deliver(self, seed: Seed) -> Result<Vec<Outcome>, Fault> {
        if self.children.len() == 1
            && let Some(outcome) = self.only_one(&seed).await
        {
            return Ok(vec![outcome]);
        }
        elsewhere(move || self.all(&seed)).await
    }

    /// Has the only child made by whoever was told of it, without a thread. Nothing if another has to be asked.
    async fn only_one(&self, seed: &Seed) -> Option<Outcome> {
        let (stream, child) = self.first.as_ref().zip(self.children.first())?;
        let ready = tokio::net::UnixStream::from_std(stream.try_clone().ok()?).ok()?;
        seed.send(stream, Instant::now()).ok()?;
        let hook = child.hook.as_ref().map_or(Duration::ZERO, Hook::patience);
        let _ = tokio::time::timeout(self.patience + hook, ready.readable()).await;
        // What is there was said at once; nothing more is waited for.
        match fork::outcome(stream, Instant::now() + BREATH) {
            // Its process ended before it was needed.
            Err(HandOverError::Silent) => None,
            outcome => Some(outcome.unwrap_or_else(|error| Err(chain(&error)))),
        }
    }

    /// Has one child made, unless nobody makes any. Who stands still keeps nobody waiting for each of ten thousand.
    fn one_more(&self, n: usize, child: &Child, seed: &Seed) -> Result<Outcome, HandOverError> {
        if self.is_stalled.load(Ordering::Relaxed) {
            let (path, patience) = (self.pool.clone(), self.patience);
            return Err(HandOverError::Stalled { path, patience });
        }
        let before = self.heard.load(Ordering::Relaxed);
        let outcome = self.one(n, child, seed);
        if !matches!(outcome, Err(HandOverError::Late)) {
            self.heard.fetch_add(1, Ordering::Relaxed);
        } else if self.heard.load(Ordering::Relaxed) == before {
            self.is_stalled.store(true, Ordering::Relaxed);
        }
        outcome
    }

    /// Has each child made, some at a time, and says what became of them, in order.
    fn all(&self, seed: &Seed) -> Vec<Outcome> {
        let next = AtomicUsize::new(0);
        let some = || {
            let mut done = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(child) = self.children.get(n) else { return done };
                let outcome = self.one_more(n, child, seed);
                done.push((n, outcome.unwrap_or_else(|error| Err(chain(&error)))));
            }
        };
        let mut all = std::thread::scope(|scope| {
            let threads = AT_ONCE.min(self.children.len()).saturating_sub(1);
            // Fewer will do, where there are none to be had.
            let others: Vec<_> = (0..threads)
                .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, some).ok())
                .collect();
            let mut all = some();
            for other in others {
                all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            all
        });
        all.sort_unstable_by_key(|(n, _)| *n);
        all.into_iter().map(|(_, outcome)| outcome).collect()
    }
}
