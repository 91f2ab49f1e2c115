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

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use vmm::config::VmConfig;
use vmm::devices::virtio::blk::Backing;
use vmm::fork::disks::{DiskError, Disks, Switch};
use vmm::fork::{self, Birth, Child, HandOverError, Outcome, Seed};
use vmm::machine::{Command, Frozen, LONGEST_METADATA};
use vmm::snapshot::{self, Header, MemoryHeader, State};

use super::snapshot::{Saving, halt, micros, portable};
use super::{Instance, Shared, elsewhere};
use crate::fault::{Fault, chain};
use crate::types::fork::{ForkParams, Forked};

/// Pages that are copied without a thread for it.
const FEW: u64 = 64;
/// So long may the rest of an answer be behind its beginning.
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
        let pool = params.pool.clone().or_else(|| shared.pool.clone()).ok_or_else(|| {
            Fault::bad("pool: nobody is known who makes processes; name the socket of a pool.")
        })?;
        let config = shared.config();
        let limit = shared.limits.metadata.min(LONGEST_METADATA);
        let mut children = params.children(&config, limit)?;
        let saving = Saving::begin(&shared)?;
        shared.name_children(&mut children);
        let patience = Duration::from_millis(params.timeout_ms);
        let (config, host) = (portable(config), snapshot::this_host());
        // Before anything is halted for nothing.
        let birth = Birth::begin(children, config, host, pool, patience);
        let birth = birth.map_err(|error| failed(&error))?;
        if let Some(seed) = shared.template(birth.children()) {
            drop(saving);
            let (children, used) =
                tokio::spawn(deliver(birth, seed)).await.map_err(|_| Fault::gone())??;
            drop_later(used);
            let children = children.into_iter().map(Into::into).collect();
            return Ok(Forked { children, pause_us: 0, copied_bytes: 0, drives: Vec::new() });
        }
        tokio::spawn(saving.fork(params, birth)).await.map_err(|_| Fault::gone())?
    }

    /// What copies were made of last, if the machine has not moved since.
    fn template(&self, children: &[Child]) -> Option<Arc<Seed>> {
        let seed = self.handle().ok()?.kept::<Seed>()?;
        let disks = Disks::needed(&self.lock().config, children);
        seed.has_disks(&disks).then_some(seed)
    }
}

impl Saving {
    async fn fork(self, params: ForkParams, birth: Birth) -> Result<Forked, Fault> {
        let handle = self.0.handle()?;
        let changes = handle.changes();
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
        if let Ok((_, seed, _)) = &planted
            && !resume
        {
            handle.keep(changes, Arc::clone(seed));
        }
        handle.send(Command::Thaw { resume, disks }, Box::new(reply));
        // The next may be made meanwhile.
        drop(self);
        let (birth, seed, copied_bytes) = planted?;
        let delivered = deliver(birth, seed).await;
        let are_none = |(children, _): &(Vec<Outcome>, Used)| children.iter().all(Result::is_err);
        if !resume && was_running && delivered.as_ref().map_or(true, are_none) {
            // It is nobody's template.
            handle.send(Command::Resume, Box::new(drop));
        }
        let (children, used) = delivered?;
        drop_later(used);
        let children = children.into_iter().map(Into::into).collect();
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
        birth.reconfigure(portable(self.0.config()));
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
    seed: Arc<Seed>,
    /// Bytes of memory that were copied.
    copied: u64,
}

impl Instance {
    /// Gives children without a name one of the machine's, with a number.
    fn name_children(&self, children: &mut [Child]) {
        let mut inner = self.lock();
        let name = inner.config.name.clone();
        let name = name.unwrap_or_else(|| format!("vm-{}", std::process::id()));
        Child::name(children, &name, &mut inner.forked);
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
    let name = birth.config().name.clone().unwrap_or_default();
    let disks = std::mem::take(&mut frozen.disks);
    let disks = Disks::freeze(&disks, birth.children(), &name, folder);
    let (disks, switch) = disks.map_err(|error: DiskError| failed(&error))?;
    let parts = std::mem::take(&mut frozen.parts);
    let state = State { header: header(id, frozen.image.size()), parts };
    let seed = Seed::new(state, shared.layers, disks).map_err(|error| failed(&error))?;
    Ok(Some(Planted { switch, seed: Arc::new(seed), copied: shared.copied }))
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

/// Connections to children, and what they were made of.
type Used = (Birth, Arc<Seed>);

/// Drops it when the client was answered: to close files takes the kernel as long as the answer.
fn drop_later(used: Used) {
    tokio::spawn(async move {
        tokio::task::yield_now().await;
        drop(used);
    });
}

/// Has each child made, and says what became of them, in order.
async fn deliver(birth: Birth, seed: Arc<Seed>) -> Result<(Vec<Outcome>, Used), Fault> {
    if let Some(outcome) = only_one(&birth, &seed).await {
        return Ok((vec![outcome], (birth, seed)));
    }
    let work = move || (birth.deliver(&seed), (birth, seed));
    let (outcomes, used) = elsewhere(work).await?;
    Ok((outcomes.into_iter().map(said).collect(), used))
}

/// Has the only child made by whoever was told of it, without a thread. Nothing if another has to be asked.
async fn only_one(birth: &Birth, seed: &Seed) -> Option<Outcome> {
    let (stream, patience) = birth.only_one()?;
    let ready = tokio::net::UnixStream::from_std(stream.try_clone().ok()?).ok()?;
    seed.send(stream, Instant::now()).ok()?;
    let _ = tokio::time::timeout(patience, ready.readable()).await;
    // What is there was said at once; nothing more is waited for.
    match fork::outcome(stream, Instant::now() + BREATH) {
        // Its process ended before it was needed.
        Err(HandOverError::Silent) => None,
        outcome => Some(said(outcome)),
    }
}

/// What became of a child, as clients hear it.
fn said(outcome: Result<Outcome, HandOverError>) -> Outcome {
    outcome.unwrap_or_else(|error| Err(chain(&error)))
}
