//! What a machine has otherwise where it goes on: its files and interfaces are the host's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, VmConfig};

/// Other host resources than those that were saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overrides {
    /// Names of network cards, and the TAP interfaces that they have.
    pub nets: Vec<(String, String)>,
    /// Names of disks, and their files.
    pub disks: Vec<(String, PathBuf)>,
    /// The socket of the socket device.
    pub vsock: Option<PathBuf>,
    /// The guest's address (CID).
    pub cid: Option<u64>,
}

impl Overrides {
    /// Changes `config` so.
    ///
    /// # Errors
    /// There is no device of that name.
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), ConfigError> {
        let unknown = |what: &str, name: &str, known: Vec<String>| {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            ConfigError {
                field: what.to_owned(),
                problem: format!("there is none with the id {name}; known are: {known}"),
            }
        };
        for (name, tap) in &self.nets {
            let all: Vec<String> = (0..config.net.len()).map(|n| config.net_name(n)).collect();
            let place = all.iter().position(|known| known == name);
            let place = place.ok_or_else(|| unknown("net", name, all))?;
            config.net[place].tap = Some(tap.clone());
            config.net[place].fd = None;
        }
        for (name, path) in &self.disks {
            let all: Vec<String> = (0..config.disk.len()).map(|n| config.disk_name(n)).collect();
            let place = all.iter().position(|known| known == name);
            let place = place.ok_or_else(|| unknown("disk", name, all))?;
            let disk = &mut config.disk[place];
            // Of an overlay it is the overlay that is another: its base is the same.
            match &mut disk.overlay {
                Some(overlay) => overlay.clone_from(path),
                None => disk.path.clone_from(path),
            }
        }
        if self.vsock.is_none() && self.cid.is_none() {
            return Ok(());
        }
        let vsock = config.vsock.as_mut().ok_or_else(|| ConfigError {
            field: "vsock".to_owned(),
            problem: "the machine has no vsock device".to_owned(),
        })?;
        if let Some(path) = &self.vsock {
            vsock.path.clone_from(path);
        }
        vsock.cid = self.cid.unwrap_or(vsock.cid);
        Ok(())
    }
}
