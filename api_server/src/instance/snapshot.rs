//! Saving the machine, and going on where one was saved.

use std::path::Path;
use std::sync::{Arc, mpsc};

use vmm::config::VmConfig;
use vmm::hypervisor::Hypervisor;
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Command, Origin};
use vmm::snapshot::{self, Files};

use super::{Instance, elsewhere, send};
use crate::fault::{DONE, Done, Fault, chain};
use crate::types::snapshot::{SnapshotCreateParams, SnapshotLoadParams, SnapshotType};

fn failed(error: &dyn std::error::Error) -> Fault {
    Fault::bad(format!("Snapshot error: {}.", chain(error)))
}

impl Instance {
    /// Saves the machine. It goes on afterwards if it ran before.
    ///
    /// # Errors
    /// The machine was not started, or is being saved already; a file cannot be written, and nothing new
    /// is left then.
    pub async fn create_snapshot(&self, params: SnapshotCreateParams) -> Done {
        let handle = self.handle()?;
        if params.snapshot_type == SnapshotType::Diff {
            return Err(Fault::bad("snapshot_type: Diff is not supported yet."));
        }
        let msrs = elsewhere(|| Kvm::open(Path::new(DEVICE)).and_then(|kvm| kvm.msr_numbers()));
        let msrs = Arc::new(msrs.await?.map_err(|error| failed(&error))?);
        let config = self.config();
        let (answer, frozen) = mpsc::sync_channel(1);
        send(&handle, Command::Freeze { msrs, answer }).await?;
        let frozen = frozen.try_recv().map_err(|_| Fault::gone())?;
        let resume = frozen.was_running;
        let files = Files { state: params.snapshot_path, memory: params.mem_file_path };
        let stored =
            elsewhere(move || snapshot::store(frozen, &config, &files, &|_| {}).map(drop)).await;
        // Whatever became of it, the machine goes on.
        send(&handle, Command::Thaw { resume }).await?;
        stored?.map(|()| DONE).map_err(|error| failed(&error))
    }

    /// Goes on where a machine was saved.
    ///
    /// # Errors
    /// This one was started or configured; the files are none of a snapshot, or the machine cannot be made
    /// from them. It can be configured or tried again then.
    pub async fn load_snapshot(&self, params: SnapshotLoadParams) -> Done {
        self.before_start()?;
        if self.lock().touched {
            return Err(Fault::bad(
                "Loading a snapshot is not possible after the machine was configured.",
            ));
        }
        let files = Files { state: params.snapshot_path.clone(), memory: params.memory()? };
        let origin = elsewhere(move || snapshot::load(&files)).await?;
        let origin = origin.map_err(|error| failed(&error))?;
        let config = self.overridden(&origin, &params)?;
        let wish = self.wish_for(config, Some(origin))?;
        self.fulfilled(wish).await?;
        if params.resume_vm {
            send(&self.handle()?, Command::Resume).await?;
        }
        Ok(DONE)
    }

    /// The saved configuration, with what is this process's own, and what the client has otherwise.
    fn overridden(&self, origin: &Origin, params: &SnapshotLoadParams) -> Result<VmConfig, Fault> {
        let own = self.config();
        let mut config = origin.state.header.config.clone();
        config.name = own.name;
        config.seccomp = own.seccomp;
        if config.console.device == own.console.device {
            config.console = own.console;
        }
        params.overrides().apply(&mut config).map_err(|error| Fault::bad(chain(&error)))?;
        Ok(config)
    }
}
