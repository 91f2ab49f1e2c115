//! A machine behind its API: started, saved, gone on from.

use crate::Result;
use crate::api::http::{Client, connected};
use crate::api::{command, folder};
use crate::host::sync;
use crate::sample::Running;
use crate::system::{Guest, Programs, System};
use serde_json::{Value, json};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a snapshot may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the blocks that `st_blocks` counts.
const BLOCK: u64 = 512;

/// The two files of a snapshot, gone when dropped.
pub struct Saved(TempDir);

impl Saved {
    /// Where a snapshot is to be written: a folder on a real file system, for which nothing else waits
    /// to be written.
    pub fn new(programs: &Programs) -> Result<Saved> {
        sync();
        Ok(Saved(tempfile::tempdir_in(&programs.scratch)?))
    }

    /// A snapshot of a guest that has printed `says`.
    pub fn of(programs: &Programs, system: System, guest: &Guest, says: &str) -> Result<Saved> {
        let saved = Saved::new(programs)?;
        match system {
            System::Floor => saved.by_floor(programs, guest)?,
            _ => {
                let mut machine = Machine::start(programs, system, guest, says)?;
                machine.pause()?;
                machine.save("Full", &saved)?;
            }
        }
        sync();
        Ok(saved)
    }

    fn by_floor(&self, programs: &Programs, guest: &Guest) -> Result<()> {
        let mut command = Command::new(&programs.floor);
        command.arg("save").arg(&programs.payload).arg(guest.mib().to_string());
        let output = command.arg(&guest.command_line).arg(self.folder()).output()?;
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into()),
        }
    }

    /// Where both are.
    pub fn folder(&self) -> &Path {
        self.0.path()
    }

    fn state(&self) -> PathBuf {
        self.folder().join("state")
    }

    fn memory(&self) -> PathBuf {
        self.folder().join("memory")
    }

    /// Bytes that the memory file takes on the disk.
    pub fn allocated(&self) -> Result<u64> {
        Ok(self.memory().metadata()?.blocks() * BLOCK)
    }

    /// A request to go on from here, and at once.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state(),
            "mem_backend": { "backend_type": "File", "backend_path": self.memory() },
            "resume_vm": true,
        })
    }

    /// A request to write it.
    fn create(&self, kind: &str) -> Value {
        json!({
            "snapshot_type": kind,
            "snapshot_path": self.state(),
            "mem_file_path": self.memory(),
        })
    }
}

/// A process with an API, and the machine in it.
pub struct Machine {
    pub running: Running,
    pub client: Client,
    system: System,
}

impl Machine {
    /// A process that listens, and was asked for nothing.
    pub fn idle(programs: &Programs, system: System) -> Result<Machine> {
        let folder = folder()?;
        Machine::spawn(programs, system, folder, None)
    }

    /// A machine whose guest has printed `says`.
    pub fn start(
        programs: &Programs,
        system: System,
        guest: &Guest,
        says: &str,
    ) -> Result<Machine> {
        let folder = folder()?;
        let file = folder.path().join("machine.json");
        serde_json::to_writer(File::create(&file)?, &guest.description(&programs.payload))?;
        let mut machine = Machine::spawn(programs, system, folder, Some(&file))?;
        machine.running.wait_for(says)?;
        Ok(machine)
    }

    /// A machine that goes on from a snapshot, and of which a Diff can be taken.
    pub fn restored(programs: &Programs, system: System, saved: &Saved) -> Result<Machine> {
        let mut machine = Machine::idle(programs, system)?;
        let mut load = saved.load();
        // Firecracker has to know from the beginning.
        load["enable_diff_snapshots"] = true.into();
        machine.client.expect(204, "PUT", "/snapshot/load", &load.to_string())?;
        Ok(machine)
    }

    fn spawn(
        programs: &Programs,
        system: System,
        folder: TempDir,
        config: Option<&Path>,
    ) -> Result<Machine> {
        let socket = folder.path().join("api.sock");
        let mut command = command(programs, system, &socket);
        // Firecracker's log goes where its guest's output does.
        command.args(["--level", "Error"]);
        if let Some(file) = config {
            command.arg("--config-file").arg(file);
        }
        Machine::of(command, &socket, folder, system)
    }

    fn of(command: Command, socket: &Path, folder: TempDir, system: System) -> Result<Machine> {
        let running = Running::spawn_for_typing(command, folder)?;
        let client = Client::of(connected(socket)?)?.patient(PATIENCE)?;
        Ok(Machine { running, client, system })
    }

    /// A process of Hull that has a VM for whatever is loaded.
    pub fn ready(programs: &Programs) -> Result<Machine> {
        let folder = folder()?;
        let socket = folder.path().join("api.sock");
        let mut command = Command::new(programs.program(System::Hull));
        command.env("XDG_RUNTIME_DIR", folder.path()).args(["api", "--ready", "--sock"]);
        command.arg(&socket);
        Machine::of(command, &socket, folder, System::Hull)
    }

    /// Pauses it.
    pub fn pause(&mut self) -> Result<()> {
        self.client.expect(204, "PATCH", "/vm", r#"{ "state": "Paused" }"#)
    }

    /// Saves it: `Full`, or `Diff`. Returns how long the request took.
    pub fn save(&mut self, kind: &str, target: &Saved) -> Result<Duration> {
        let body = target.create(kind).to_string();
        let start = Instant::now();
        self.client.expect(204, "PUT", "/snapshot/create", &body)?;
        Ok(start.elapsed())
    }

    /// Saves it as it runs, and it goes on. Firecracker has to be told to pause and to go on. Returns
    /// how long the request in the middle took.
    pub fn save_running(&mut self, kind: &str, target: &Saved) -> Result<Duration> {
        if self.system == System::Hull {
            return self.save(kind, target);
        }
        self.pause()?;
        let time = self.save(kind, target)?;
        self.client.expect(204, "PATCH", "/vm", r#"{ "state": "Resumed" }"#)?;
        Ok(time)
    }
}
