//! `hull snapshot`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde_json::json;
use vmm::config::ByteSize;
use vmm::snapshot::{self, Files, Header};

use super::{Api, ClientError, Machine, block_on};
use crate::cli::{Result, SnapshotArgs, SnapshotCommand};
use crate::exit::Code;
use crate::spinner::Spinner;
use crate::streams;
use crate::table::Table;

/// How long a machine may take to be saved: its memory goes to a disk.
const PATIENCE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
#[error("cannot make the folder {}", path.display())]
struct Folder {
    path: PathBuf,
    source: io::Error,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot show {}", path.display())]
struct Show {
    path: PathBuf,
    source: snapshot::StateError,
}

/// Saves a machine, or shows what was saved.
pub fn snapshot(args: &SnapshotArgs) -> Result {
    match (&args.command, &args.machine, &args.folder) {
        (Some(SnapshotCommand::Show { path, json }), _, _) => show(path, *json),
        (None, Some(machine), Some(folder)) => save(&Machine::find(machine)?, folder, args.stop),
        // clap asks for both.
        _ => Ok(Code::USAGE),
    }
}

fn save(machine: &Machine, folder: &Path, stop: bool) -> Result {
    let failed = |source| Folder { path: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(failed)?;
    // The machine may be somewhere else in the tree of folders.
    let files = Files::within(&folder.canonicalize().map_err(failed)?);
    let body = json!({ "snapshot_path": files.state, "mem_file_path": files.memory });
    block_on(async {
        let mut api = Api::connect(machine, PATIENCE).await?;
        let mut spinner = Spinner::new();
        let saving = async {
            if stop {
                // It does not go on in between.
                let paused = json!({ "state": "Paused" });
                api.send(Method::PATCH, "/vm", &paused).await?;
            }
            api.send(Method::PUT, "/snapshot/create", &body).await?;
            if stop {
                let quit = json!({ "action_type": "Quit" });
                match api.send(Method::PUT, "/actions", &quit).await {
                    // It went before it had answered.
                    Err(ClientError::Broken { .. }) => {}
                    answered => answered?,
                }
            }
            Ok::<(), ClientError>(())
        };
        let mut saving = std::pin::pin!(saving);
        loop {
            if let Some(spinner) = &mut spinner {
                spinner.turn(&format!("saving {}", machine.name));
            }
            let tick = tokio::time::timeout(Duration::from_millis(100), saving.as_mut());
            if let Ok(done) = tick.await {
                return done;
            }
        }
    })?;
    Ok(Code::SUCCESS)
}

fn show(path: &Path, json: bool) -> Result {
    let path = if path.is_dir() { Files::within(path).state } else { path.to_owned() };
    let state = snapshot::read(&path).map_err(|source| Show { path: path.clone(), source })?;
    if json {
        streams::print(&(serde_json::to_string_pretty(&state.header)? + "\n"))?;
        return Ok(Code::SUCCESS);
    }
    let Header { hull, created_ms, config, memory, disks } = &state.header;
    let mut table = Table::new(["WHAT", "VALUE"]);
    table.push(["format".into(), snapshot::FORMAT.to_string()]);
    table.push(["written by".into(), format!("hull {hull}")]);
    table.push(["created".into(), format!("{created_ms} ms since 1970")]);
    table.push(["name".into(), config.name.clone().unwrap_or_default()]);
    table.push(["cpus".into(), config.cpus.to_string()]);
    table.push(["memory".into(), ByteSize(memory.size).to_string()]);
    table.push(["memory written".into(), ByteSize(memory.data).to_string()]);
    for disk in disks {
        table.push([format!("disk {}", disk.name), disk.path.display().to_string()]);
    }
    for part in &state.parts {
        let payload = &part.payload;
        let (kind, version, len) = (payload.kind, payload.version, payload.bytes.len());
        table.push([format!("state of {}", part.owner), format!("{kind} {version}, {len} bytes")]);
    }
    streams::print(&table.to_string())?;
    Ok(Code::SUCCESS)
}
