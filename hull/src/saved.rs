//! `hull fork DIR`: copies of a machine that was saved, each of which runs for itself.

use std::path::Path;
use std::time::Duration;

use api_server::chain;
use api_server::types::fork::{ForkParams, ForkedChild};
use serde_json::{Value, json};
use vmm::fork::disks::Disks;
use vmm::fork::{Birth, Child, Seed};
use vmm::machine::{LONGEST_METADATA, Origin, Source};
use vmm::snapshot;

use crate::cli::Result;
use crate::snapshots::files;

/// What a machine without a name is called that is to have numbered copies.
const NAMELESS: &str = "vm";

#[derive(Debug, thiserror::Error)]
enum SavedError {
    #[error("its memory is not in files")]
    NoFiles,
    #[error("nobody makes processes")]
    NoPool,
}

/// A machine that was saved.
pub struct Saved(Origin);

impl Saved {
    /// The one whose snapshot is in `folder`.
    ///
    /// # Errors
    /// There is none, or it cannot be gone on from.
    pub fn find(folder: &Path) -> Result<Saved> {
        Ok(Saved(snapshot::load(&files(folder)?, None)?))
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
