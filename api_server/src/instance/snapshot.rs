//! Saving the machine, and going on where one was saved.
//!
//! ```text
//!   client          main                     a thread of its own
//!     PUT ─────────> halt, states ─────────> freeze: what was written becomes a layer
//!                    go on <──────────────── …
//!                                            write, sync, move into place
//!     204 <───────────────────────────────── …
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;

use vmm::config::{ConfigError, ConsoleMode, VmConfig};
use vmm::hook::Hook;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::hypervisor::{Hypervisor, HypervisorError};
use vmm::journal::Happening;
use vmm::machine::{Clock, Command, Frozen, Handle, Origin};
use vmm::memory::Image;
use vmm::snapshot::{self, Base, Diff, Files, Overrides, StoreError, Taken};

use super::wish::Beginning;
use super::{Instance, Shared, elsewhere, send};
use crate::fault::{DONE, Done, Fault, chain};
use crate::types::snapshot::{
    BackendType, Loaded, SnapshotCreateParams, SnapshotLoadParams, SnapshotType,
};

/// Parts of the whole after which clients are told how far it is: twentieths.
const STEPS: u64 = 20;

fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::bad(format!("Snapshot error: {}.", chain(error)))
}

/// Why a machine is not saved.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    #[error("cannot ask KVM what a vCPU's state is made of")]
    Registers(#[source] HypervisorError),
    #[error("cannot fetch what the pager has")]
    Fetch(#[source] io::Error),
    #[error("cannot freeze the guest's memory")]
    Freeze(#[source] io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Nobody else may save the machine as long as this lives.
pub(super) struct Saving(pub(super) Shared);

impl Saving {
    pub(super) fn begin(shared: &Shared) -> Result<Saving, Fault> {
        let mut inner = shared.lock();
        if std::mem::replace(&mut inner.saving, true) {
            return Err(Fault::bad(
                "Snapshot error: the machine is being saved or forked; try again when that is done.",
            ));
        }
        Ok(Saving(Arc::clone(shared)))
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.0.lock().saving = false;
    }
}

pub(super) fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Instance {
    /// Saves the machine. It is halted only until its memory is frozen, and goes on then if it ran before. It
    /// is done to its end also if the client does not wait for it.
    ///
    /// # Errors
    /// The machine was not started, or is being saved already; a file cannot be written, and nothing new
    /// is left then.
    pub async fn create_snapshot(shared: Shared, params: SnapshotCreateParams) -> Done {
        let handle = shared.handle()?;
        let saving = Saving::begin(&shared)?;
        tokio::spawn(saving.save(handle, params)).await.map_err(|_| Fault::gone())?
    }
}

impl Saving {
    async fn save(self, handle: Handle, params: SnapshotCreateParams) -> Done {
        let shared = &self.0;
        let start = Instant::now();
        let is_diff = params.snapshot_type == SnapshotType::Diff;
        let (frozen, halted) = halt(shared, &handle, is_diff).await?;
        let (resume, image) = (frozen.was_running, frozen.image.clone());
        let (config, base, machine) = {
            let inner = shared.lock();
            (inner.config.clone(), inner.base.clone(), inner.machines)
        };
        let stop = params.stop;
        let taken = elsewhere(move || take(frozen, config, base, is_diff)).await;
        // Whatever became of it, the machine goes on, unless it is to end where it was saved.
        let ends = stop && matches!(taken, Ok(Ok(_)));
        send(&handle, Command::Thaw { resume: resume && !ends, disks: Vec::new() }).await?;
        let stood = micros(halted);
        let taken = taken?.map_err(|error| failed(&error))?;
        let journal = Arc::clone(&shared.observed.journal);
        let base = elsewhere(move || {
            let last = Mutex::new(0);
            let base = store(taken, params, &|done, total| {
                let step = done * STEPS / total.max(1);
                // Noted under the lock: it never goes back.
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if *last < step {
                    *last = step;
                    journal.note(Happening::Saving { done, total });
                }
            });
            if let Ok(base) = &base {
                journal.note(Happening::Saved { state: base.state.clone() });
            }
            base
        });
        let base = base.await.and_then(|base| base.map_err(|error| failed(&error)));
        if base.is_err() && ends && resume {
            send(&handle, Command::Resume).await?;
        }
        let base = base?;
        image.saved();
        {
            let mut inner = shared.lock();
            // What was saved is nothing without its disks.
            inner.temporary.clear();
            // The guest may have started over meanwhile.
            if inner.machines == machine {
                inner.base = Some(base);
            }
        }
        let latencies = &shared.latencies;
        let (whole, halted) = if is_diff {
            (&latencies.diff_create_snapshot, &latencies.vmm_diff_create_snapshot)
        } else {
            (&latencies.full_create_snapshot, &latencies.vmm_full_create_snapshot)
        };
        whole.set(micros(start));
        halted.set(stood);
        if stop { shared.quit() } else { Ok(DONE) }
    }
}

/// Halts the machine for others to go on from it, and says when that began. What a pager still has is fetched
/// before, while it goes on, unless somebody can do without.
pub(super) async fn halt(
    shared: &Shared,
    handle: &Handle,
    lazy_will_do: bool,
) -> Result<(Frozen, Instant), Fault> {
    let msrs = msrs(shared).await?;
    loop {
        let halted = Instant::now();
        let (answer, frozen) = mpsc::sync_channel(1);
        send(handle, Command::Freeze { msrs: Arc::clone(&msrs), answer }).await?;
        let frozen = frozen.try_recv().map_err(|_| Fault::gone())?;
        if lazy_will_do || !frozen.image.is_lazy() {
            return Ok((frozen, halted));
        }
        send(handle, Command::Thaw { resume: frozen.was_running, disks: Vec::new() }).await?;
        let image = frozen.image;
        let fetched = elsewhere(move || image.populate()).await?;
        fetched.map_err(|error| failed(&SaveError::Fetch(error)))?;
    }
}

/// Numbers of the registers that a vCPU's state has: they are the host's.
async fn msrs(shared: &Shared) -> Result<Arc<Vec<u32>>, Fault> {
    if let Some(msrs) = &shared.lock().msrs {
        return Ok(Arc::clone(msrs));
    }
    let msrs = elsewhere(|| Kvm::open(Path::new(DEVICE)).and_then(|kvm| kvm.msr_numbers()));
    let msrs = Arc::new(msrs.await?.map_err(|error| failed(&SaveError::Registers(error)))?);
    shared.lock().msrs = Some(Arc::clone(&msrs));
    Ok(msrs)
}

/// The configuration for whoever goes on from it, who is somewhere else.
pub(super) fn portable(mut config: VmConfig) -> VmConfig {
    let absolute = |path: &mut PathBuf| {
        if let Ok(whole) = std::path::absolute(&path) {
            *path = whole;
        }
    };
    for disk in &mut config.disk {
        absolute(&mut disk.path);
        disk.overlay.iter_mut().for_each(absolute);
    }
    config.mmds.iter_mut().filter_map(|mmds| mmds.path.as_mut()).for_each(absolute);
    config.vsock.iter_mut().for_each(|vsock| absolute(&mut vsock.path));
    config
}

/// Makes the memory of a halted machine a matter of layers.
fn take(
    frozen: Frozen,
    config: VmConfig,
    base: Option<Base>,
    is_diff: bool,
) -> Result<Taken, SaveError> {
    let Frozen { parts, image, .. } = frozen;
    let config = portable(config);
    let created_ms = snapshot::now_ms();
    image.freeze().map_err(SaveError::Freeze)?;
    let diff = diff(&image, base).filter(|_| is_diff);
    let (disks, contents) = (snapshot::disks(&config), image.contents());
    let host = snapshot::this_host();
    Ok(Taken { id: None, created_ms, host, parts, config, disks, contents, diff })
}

/// What changed since the last snapshot. All of it if there was none, unless a pager has the rest.
fn diff(image: &Image, base: Option<Base>) -> Option<Diff> {
    let partial = image.is_lazy();
    (base.is_some() || partial).then(|| Diff { pages: image.changed(), base, partial })
}

/// Writes it out. Returns what the next one may be a diff to.
fn store(
    taken: Taken,
    params: SnapshotCreateParams,
    progress: snapshot::Progress<'_>,
) -> Result<Base, StoreError> {
    let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
    let files =
        Files { state: absolute(params.snapshot_path), memory: absolute(params.mem_file_path) };
    let header = snapshot::store(taken, &files, progress)?;
    Ok(Base { id: header.memory.id, state: files.state, memory: files.memory })
}

impl Instance {
    /// Goes on where a machine was saved. If the hook of its guest is told, that is waited for, and what came of it
    /// returned.
    ///
    /// # Errors
    /// This one was started or configured; the files are none of a snapshot, or the machine cannot be made
    /// from them. It can be configured or tried again then.
    pub async fn load_snapshot(&self, params: SnapshotLoadParams) -> Result<Option<Loaded>, Fault> {
        let start = Instant::now();
        self.before_start()?;
        if self.lock().touched {
            return Err(Fault::bad(
                "Loading a snapshot is not possible after the machine was configured.",
            ));
        }
        let (backend, path) = params.memory()?;
        let mut hook = params.hook.clone().map(Hook::from);
        if hook.is_some() && !params.resume_vm {
            return Err(Fault::bad(
                "hook: a guest that is left halted answers nobody; set resume_vm.",
            ));
        }
        let overrides = params.overrides(hook.as_mut()).map_err(invalid)?;
        let (own, resume, told) = (self.config(), params.resume_vm, hook.clone());
        // Read by who builds the machine: that is quicker than by a thread of its own.
        let load = move || {
            let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
            let (state, memory) = (absolute(params.snapshot_path.clone()), absolute(path));
            let origin = match backend {
                BackendType::File => snapshot::load(&Files { state, memory }, None),
                BackendType::Uffd => snapshot::load_paged(&state, memory),
            };
            let mut origin = origin.map_err(|error| failed(&error))?;
            if params.clock_realtime {
                origin.clock = Clock::Advance;
            }
            let config = overridden(own, &origin, &params, &overrides)?;
            told.map_or(Ok(()), |hook| hook.validate(&config)).map_err(invalid)?;
            Ok((config, origin))
        };
        let wish = self.wish_for(Beginning::Snapshot(Box::new(load), resume, hook))?;
        let told = self.fulfilled(wish).await?;
        self.latencies.load_snapshot.set(micros(start));
        let Some(told) = told else { return Ok(None) };
        told.await.map(|outcome| Some(outcome.into())).map_err(|_| Fault::gone())
    }
}

fn invalid(error: ConfigError) -> Fault {
    Fault::bad(chain(&error))
}

/// The saved configuration, with what is this process's `own`, and what the client has otherwise.
fn overridden(
    own: VmConfig,
    origin: &Origin,
    params: &SnapshotLoadParams,
    overrides: &Overrides,
) -> Result<VmConfig, Fault> {
    let mut config = origin.state.header.config.clone();
    config.name = own.name;
    config.seccomp = own.seccomp;
    let mut console = own.console;
    if let Some(serial) = &params.serial_override {
        serial.clone().put_into(&mut console);
    }
    // What a process has by itself, nobody asked for.
    let has_none = config.console.mode == ConsoleMode::Off;
    let wanted = (params.serial_override.is_some() || !has_none).then_some(console);
    config.console = config.console.elsewhere(wanted).map_err(invalid)?;
    overrides.apply(&mut config).map_err(invalid)?;
    config.validate_without_kernel().map_err(|error| Fault::of_config(&error))?;
    Ok(config)
}
