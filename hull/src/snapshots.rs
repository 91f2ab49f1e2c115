//! `hull snapshot show|ls|verify|merge|rm`: what is done with the files of snapshots, without a machine.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use vmm::config::ByteSize;
use vmm::snapshot::{self, Base, Files, Header, Verified};

use crate::cli::{Result, SnapshotArgs, SnapshotCommand};
use crate::client::{self, Machine, local_time};
use crate::exit::Code;
use crate::report;
use crate::spinner::watched;
use crate::stop::Process;
use crate::streams;
use crate::table::Table;

/// How long a machine that was saved may take to be gone.
const GOING: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum SnapshotError {
    #[error("cannot show {}", path.display())]
    Show { path: PathBuf, source: snapshot::StateError },
    #[error("cannot list {}", path.display())]
    List { path: PathBuf, source: io::Error },
    #[error("{} is what {} is a diff to", path.display(), diff.display())]
    Needed { path: PathBuf, diff: PathBuf },
    #[error("cannot make the folder {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
}

/// Saves a machine, or does something with what was saved.
pub fn snapshot(args: &SnapshotArgs) -> Result {
    match (&args.command, &args.machine, &args.folder) {
        (Some(SnapshotCommand::Show { path, json }), _, _) => show(path, *json),
        (Some(SnapshotCommand::Ls { folder, json }), _, _) => list(folder, *json),
        (Some(SnapshotCommand::Merge { folder, into, base, force }), _, _) => {
            let into = into.as_deref().unwrap_or(folder);
            if !force {
                refuse_if_needed(into, &[folder, into])?;
            }
            merge(folder, into, base.as_deref())
        }
        (Some(SnapshotCommand::Verify { folders, base, json }), _, _) => {
            verify(folders, base.as_deref(), *json)
        }
        (Some(SnapshotCommand::Rm { folders, force }), _, _) => remove(folders, *force),
        (None, Some(machine), Some(folder)) => {
            if !args.force {
                refuse_if_needed(folder, &[folder])?;
            }
            let machine = Machine::find(machine)?;
            let process = if args.stop { Process::behind(&machine) } else { None };
            let code = client::snapshot(&machine, folder, args.diff, args.stop)?;
            // Its disks are others' to have when it is gone.
            if let Some(process) = process {
                process.wait(GOING)?;
            }
            Ok(code)
        }
        // clap asks for both.
        _ => Ok(Code::USAGE),
    }
}

fn show(path: &Path, json: bool) -> Result {
    let path = if path.is_dir() { Files::within(path).state } else { path.to_owned() };
    let state = snapshot::read(&path)
        .map_err(|source| SnapshotError::Show { path: path.clone(), source })?;
    if json {
        streams::print(&(serde_json::to_string_pretty(&state.header)? + "\n"))?;
        return Ok(Code::SUCCESS);
    }
    let Header { hull, created_ms, host: _, config, memory, disks } = &state.header;
    let mut table = Table::new(["WHAT", "VALUE"]);
    table.push(["format".into(), snapshot::FORMAT.to_string()]);
    table.push(["written by".into(), format!("hull {hull}")]);
    table.push(["created".into(), local_time(*created_ms)]);
    table.push(["id".into(), memory.id.clone()]);
    table.push(["diff to".into(), memory.base.as_ref().map_or("-".into(), base_text)]);
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

fn base_text(base: &Base) -> String {
    base.state.parent().unwrap_or(&base.state).display().to_string()
}

/// The snapshots in the folders below `folder`, and in itself, by their names.
fn within(folder: &Path) -> std::result::Result<Vec<(PathBuf, Header)>, SnapshotError> {
    let failed = |source| SnapshotError::List { path: folder.to_owned(), source };
    let mut folders = vec![folder.to_owned()];
    for entry in fs::read_dir(folder).map_err(failed)? {
        folders.push(entry.map_err(failed)?.path());
    }
    folders.sort();
    let header = |folder: PathBuf| {
        // What cannot be read is none, whoever named it so.
        let state = snapshot::read(&Files::within(&folder).state).ok()?;
        Some((folder, state.header))
    };
    Ok(folders.into_iter().filter_map(header).collect())
}

fn list(folder: &Path, json: bool) -> Result {
    let all = within(folder)?;
    if json {
        let entry =
            |(folder, header): &(PathBuf, Header)| json!({ "dir": folder, "header": header });
        let all: Vec<_> = all.iter().map(entry).collect();
        streams::print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
        return Ok(Code::SUCCESS);
    }
    let mut table = Table::new(["DIR", "CREATED", "MACHINE", "MEMORY", "WRITTEN", "DIFF TO"]);
    for (folder, header) in &all {
        let memory = &header.memory;
        table.push([
            folder.display().to_string(),
            local_time(header.created_ms),
            header.config.name.clone().unwrap_or_else(|| "-".to_owned()),
            ByteSize(memory.size).to_string(),
            ByteSize(memory.data).to_string(),
            memory.base.as_ref().map_or("-".into(), base_text),
        ]);
    }
    streams::print(&table.to_string())?;
    Ok(Code::SUCCESS)
}

/// The files in `folder`, by paths that are good from anywhere.
pub fn files(folder: &Path) -> io::Result<Files> {
    Ok(Files::within(&std::path::absolute(folder)?))
}

fn merge(folder: &Path, into: &Path, base: Option<&Path>) -> Result {
    let failed = |source| SnapshotError::Folder { path: into.to_owned(), source };
    let (diff, target) = (files(folder)?, files(into)?);
    if diff.state.is_file() {
        fs::create_dir_all(into).map_err(failed)?;
    }
    let base = base.map(files).transpose()?;
    watched("merging", |progress| snapshot::merge(&diff, base.as_ref(), &target, progress))?;
    Ok(Code::SUCCESS)
}

/// Reads all of these snapshots and says whether they are as they were written: all of them, also when one is
/// not.
fn verify(folders: &[PathBuf], base: Option<&Path>, json: bool) -> Result {
    let base = base.map(files).transpose()?;
    let mut table = Table::new(["MEMORY", "READ", ""]);
    let (mut all, mut code) = (Vec::new(), Code::SUCCESS);
    for folder in folders {
        let one = files(folder)?;
        match watched("reading", |progress| snapshot::verify(&one, base.as_ref(), progress)) {
            Ok(verified) => all.extend(verified),
            Err(error) => {
                report::print(&error);
                code = Code::FAILURE;
            }
        }
    }
    if json {
        streams::print(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    } else if !all.is_empty() {
        for Verified { memory, bytes } in all {
            let read = ByteSize(bytes).to_string();
            table.push([memory.display().to_string(), read, "as it was written".to_owned()]);
        }
        streams::print(&table.to_string())?;
    }
    Ok(code)
}

fn remove(folders: &[PathBuf], force: bool) -> Result {
    let all: Vec<&Path> = folders.iter().map(PathBuf::as_path).collect();
    for folder in folders {
        if !force {
            refuse_if_needed(folder, &all)?;
        }
        snapshot::remove(&files(folder)?, force)?;
        // Unless somebody has other things in it.
        let _ = fs::remove_dir(folder);
    }
    Ok(Code::SUCCESS)
}

/// Refuses to touch the snapshot in `folder` if there are diffs to it beside it, but for those `besides`.
fn refuse_if_needed(
    folder: &Path,
    besides: &[&Path],
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let target = files(folder)?;
    let Some(parent) = target.state.parent().and_then(Path::parent) else { return Ok(()) };
    let Ok(state) = target.state.canonicalize() else { return Ok(()) };
    for (other, header) in within(parent).unwrap_or_default() {
        let own = files(&other)?;
        let is_one_of_them =
            besides.iter().any(|one| files(one).is_ok_and(|one| one.state == own.state));
        let stands_on_it = header.memory.base.is_some_and(|base| {
            base.files(&own.state).state.canonicalize().is_ok_and(|base| base == state)
        });
        if stands_on_it && !is_one_of_them {
            return Err(SnapshotError::Needed { path: folder.to_owned(), diff: other }.into());
        }
    }
    Ok(())
}
