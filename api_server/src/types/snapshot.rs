//! `/snapshot/create` and `/snapshot/load`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{ConfigError, MacAddress};
use vmm::hook::{Hook, Outcome};
use vmm::snapshot::Overrides;

use super::fork::ForkHook;
use super::serial::SerialDevice;
use crate::fault::Fault;

/// Which memory is in a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last one.
    Diff,
}

/// `/snapshot/create`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreateParams {
    /// The file of the memory.
    #[schema(value_type = String)]
    pub mem_file_path: PathBuf,
    /// The file of everything else.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Which memory.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// End the machine when it is saved, and the process with it.
    #[serde(default)]
    pub stop: bool,
}

/// Where memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub enum BackendType {
    /// A file, as it was written.
    File,
    /// A process that gives it page by page.
    Uffd,
}

/// Where memory comes from.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What is at the path.
    pub backend_type: BackendType,
    /// The file, or the socket of the process.
    #[schema(value_type = String)]
    pub backend_path: PathBuf,
}

/// Another interface for a network card, or another address, or both.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The card.
    pub iface_id: String,
    /// Its TAP interface here.
    #[serde(default)]
    pub host_dev_name: Option<String>,
    /// Its MAC address here, which a driver that runs does not read again: the hook gives it to the guest.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub guest_mac: Option<MacAddress>,
}

/// What network cards have otherwise.
///
/// # Errors
/// Of one of them nothing is said.
pub(super) fn of_cards(all: &[NetworkOverride]) -> Result<Overrides, ConfigError> {
    if let Some(empty) =
        all.iter().find(|net| net.host_dev_name.is_none() && net.guest_mac.is_none())
    {
        return Err(ConfigError {
            field: "network_overrides".to_owned(),
            problem: format!("{} gets neither a host_dev_name nor a guest_mac", empty.iface_id),
        });
    }
    let id = |net: &NetworkOverride| net.iface_id.clone();
    let nets = all.iter().filter_map(|net| Some((id(net), net.host_dev_name.clone()?)));
    let macs = all.iter().filter_map(|net| Some((id(net), net.guest_mac?)));
    Ok(Overrides { nets: nets.collect(), macs: macs.collect(), ..Overrides::default() })
}

/// Another socket for the socket device.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// Its socket here.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
    /// The guest's address here, which it takes over when it is told that its connections are gone.
    #[serde(default)]
    pub guest_cid: Option<u64>,
}

/// Another file for a disk.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The disk.
    pub drive_id: String,
    /// Its file here.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

/// `/snapshot/load`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoadParams {
    /// The file of everything but memory.
    #[schema(value_type = String)]
    pub snapshot_path: PathBuf,
    /// Where memory comes from.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// Its file, as it was said before there were back-ends.
    #[serde(default)]
    #[schema(value_type = Option<String>, deprecated)]
    pub mem_file_path: Option<PathBuf>,
    /// Means nothing: what was written is known without it.
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// As `track_dirty_pages`.
    #[serde(default)]
    #[schema(deprecated)]
    pub enable_diff_snapshots: Option<bool>,
    /// Let the machine go on.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other interfaces and addresses for network cards.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another socket for the socket device.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// Other files for disks.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Another file for what the guest writes to its serial port.
    #[serde(default)]
    pub serial_override: Option<SerialDevice>,
    /// Move the guest's clocks on by the time that passed.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Have a program in the guest told that it is a copy, and wait until it says that it is ready; only with
    /// `resume_vm`.
    #[serde(default)]
    pub hook: Option<ForkHook>,
}

/// What came of telling the guest of a machine that it is a copy.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Loaded {
    /// Whether it said that it is ready.
    pub ready: bool,
    /// How long that took from before its first instruction, in microseconds; or how long it was waited for.
    pub ready_us: u64,
    /// Why it is not ready. The machine runs all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
}

impl From<Outcome> for Loaded {
    fn from(outcome: Outcome) -> Loaded {
        let Outcome { us, fault } = outcome;
        Loaded { ready: fault.is_none(), ready_us: us, not_ready: fault }
    }
}

impl SnapshotLoadParams {
    /// What the machine has otherwise here, and its guest is told by `hook`.
    ///
    /// # Errors
    /// Of something that is named nothing is said, or two things.
    pub fn overrides(&self, hook: Option<&mut Hook>) -> Result<Overrides, ConfigError> {
        let disk = |disk: &DriveOverride| (disk.drive_id.clone(), disk.path_on_host.clone());
        let mut overrides = Overrides {
            disks: self.drive_overrides.iter().map(disk).collect(),
            vsock: self.vsock_override.as_ref().map(|vsock| vsock.uds_path.clone()),
            cid: self.vsock_override.as_ref().and_then(|vsock| vsock.guest_cid),
            ..of_cards(&self.network_overrides)?
        };
        overrides.agree(hook)?;
        Ok(overrides)
    }

    /// Where memory comes from: from a file, or from the process that listens on a socket.
    ///
    /// # Errors
    /// There is none, or two.
    pub fn memory(&self) -> Result<(BackendType, PathBuf), Fault> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(MemoryBackend { backend_type, backend_path }), None) => {
                Ok((*backend_type, backend_path.clone()))
            }
            (None, Some(path)) => Ok((BackendType::File, path.clone())),
            (Some(_), Some(_)) => {
                Err(Fault::bad("mem_backend and mem_file_path cannot both be there."))
            }
            (None, None) => Err(Fault::bad("mem_backend: memory has to come from somewhere.")),
        }
    }
}
