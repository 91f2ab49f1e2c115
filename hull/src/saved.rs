//! `hull fork DIR`: copies of a machine that was saved, each of which runs for itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api_server::chain;
use api_server::types::fork::{ForkParams, ForkedChild};
use serde_json::{Value, json};
use vmm::config::DiskFormat;
use vmm::fork::disks::Disks;
use vmm::fork::{Birth, Child, Seed};
use vmm::machine::{LONGEST_METADATA, Origin, Source};
use vmm::snapshot;

use crate::cli::Result;
use crate::logging::{self, Level};
use crate::snapshots::files;

/// What a machine without a name is called that is to have numbered copies.
const NAMELESS: &str = "vm";

#[derive(Debug, thiserror::Error)]
enum SavedError {
    #[error("its memory is not in files")]
    NoFiles,
    #[error(
        "{name}: {} had {before} bytes when the machine was saved, and has {now} now; --disk {name}=FILE gives each \
         copy another file that is there", path.display()
    )]
    Size { name: String, path: PathBuf, before: u64, now: u64 },
    #[error("nobody makes processes")]
    NoPool,
}

/// A machine that was saved.
pub struct Saved(Origin);

impl Saved {
    /// The one whose snapshot is in `folder`; what it is a diff to is in `base`, if that was moved.
    ///
    /// # Errors
    /// There is none, or it cannot be gone on from.
    pub fn find(folder: &Path, base: Option<&Path>) -> Result<Saved> {
        // That a disk was changed since is said there.
        logging::start(Level::Warn);
        let base = base.map(files).transpose()?;
        Ok(Saved(snapshot::load(&files(folder)?, base.as_ref())?))
    }

    /// Has copies made as `wish` says, the body of a `POST /fork`, and says what became of them as the answer to that
    /// does.
    ///
    /// # Errors
    /// There can be no such copies; nobody makes processes.
    pub fn fork(self, wish: Value) -> Result<Value> {
        let params: ForkParams = serde_json::from_value(wish)?;
        let Origin { mut state, memory, .. } = self.0;
        let Source::Layers(layers) = memory else { return Err(SavedError::NoFiles.into()) };
        let config = std::mem::take(&mut state.header.config);
        let mut children = params.children(&config, LONGEST_METADATA)?;
        let name = config.name.as_deref().unwrap_or(NAMELESS);
        Child::name(&mut children, name, &mut 0);
        let needed = Disks::needed(&config, &children);
        for (n, before) in state.header.disks.iter().enumerate() {
            let is_raw = config.disk.get(n).is_some_and(|disk| {
                disk.overlay.is_none() && disk.format != Some(DiskFormat::Qcow2)
            });
            let now = fs::metadata(&before.path).map(|file| file.len());
            if let Ok(now) = now
                && now != before.size
                && is_raw
                && needed.contains(&before.name)
            {
                let (name, path) = (before.name.clone(), before.path.clone());
                return Err(SavedError::Size { name, path, before: before.size, now }.into());
            }
        }
        let disks = Disks::of_saved(&config, &children)?;
        let pool = params.pool.ok_or(SavedError::NoPool)?;
        let patience = Duration::from_millis(params.timeout_ms);
        let host = state.header.host.clone();
        let birth = Birth::begin(children, config, host, pool, patience)?;
        let seed = Seed::new(state, layers, disks)?;
        let said = |outcome: std::result::Result<_, _>| {
            ForkedChild::from(outcome.unwrap_or_else(|error| Err(chain(&error))))
        };
        let children: Vec<ForkedChild> = birth.deliver(&seed).into_iter().map(said).collect();
        Ok(json!({ "children": children }))
    }
}
