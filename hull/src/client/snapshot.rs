//! `hull snapshot NAME DIR`: has a machine saved, and shows how far that is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hyper::Method;
use serde_json::{Value, json};
use vmm::snapshot::Files;

use super::events::Follower;
use super::{Api, ClientError, Machine, PATIENCE, block_on};
use crate::cli::Result;
use crate::exit::Code;
use crate::spinner::Spinner;

/// How long a machine may take to be saved: its memory goes to a disk.
const LONG: Duration = Duration::from_secs(3600);

/// Between two turns of the spinner.
const TURN: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
enum FolderError {
    #[error("cannot make the folder {}", path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("the path {} is not UTF-8, so that a machine cannot be told of it", .0.display())]
    Text(PathBuf),
}

/// Saves a machine, or what changed in it, and ends it if it is to `stop`.
pub fn snapshot(machine: &Machine, folder: &Path, diff: bool, stop: bool) -> Result {
    let failed = |source| FolderError::Make { path: folder.to_owned(), source };
    if folder.to_str().is_none() {
        return Err(FolderError::Text(folder.to_owned()).into());
    }
    let new = !folder.exists();
    fs::create_dir_all(folder).map_err(failed)?;
    // The machine may be somewhere else in the tree of folders.
    let whole = folder.canonicalize().map_err(failed)?;
    if whole.to_str().is_none() {
        return Err(FolderError::Text(whole).into());
    }
    let files = Files::within(&whole);
    let saved = block_on(async {
        let saving = save(machine, &files, diff, stop);
        match Spinner::new() {
            Some(spinner) => watched(machine, saving, spinner).await,
            None => saving.await,
        }
    });
    if saved.is_err() && new {
        // It is empty, or not only ours by now.
        let _ = fs::remove_dir(folder);
    }
    saved.map(|()| Code::SUCCESS)
}

async fn save(
    machine: &Machine,
    files: &Files,
    diff: bool,
    stop: bool,
) -> std::result::Result<(), ClientError> {
    let mut api = Api::connect(machine, LONG).await?;
    let kind = if diff { "Diff" } else { "Full" };
    let mut body = json!({
        "snapshot_type": kind, "snapshot_path": files.state, "mem_file_path": files.memory,
    });
    if stop {
        // The machine itself sees to it, also if nobody waits for it any more.
        body["stop"] = true.into();
    }
    api.send(Method::PUT, "/snapshot/create", &body).await
}

/// Shows a person how far `saving` is, as the machine's events tell it.
async fn watched(
    machine: &Machine,
    saving: impl Future<Output = std::result::Result<(), ClientError>>,
    mut spinner: Spinner,
) -> std::result::Result<(), ClientError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    // A machine that has none, as Firecracker's, is saved all the same.
    let mut events = match Api::connect(machine, PATIENCE).await {
        Ok(api) => Follower::new(api).await.ok(),
        Err(_) => None,
    };
    let mut text = format!("saving {}", machine.name);
    let mut saving = std::pin::pin!(saving);
    loop {
        spinner.turn(&text);
        let more = async {
            match &mut events {
                Some(follower) => follower.wait().await.unwrap_or(false),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            saved = saving.as_mut() => return saved,
            more = more => {
                while let Some(event) = events.as_mut().and_then(Follower::take) {
                    let number = |key| event.data.get(key).and_then(Value::as_u64);
                    let recent = number("time_ms").is_some_and(|time| time >= now);
                    if let (Some(done), Some(total), true) = (number("done"), number("total"), recent) {
                        let (percent, mib) = (done * 100 / total.max(1), total >> 20);
                        text = format!("saving {}: {percent} % of {mib} MiB", machine.name);
                    }
                }
                if !more {
                    events = None;
                }
            }
            () = tokio::time::sleep(TURN) => {}
        }
    }
}
