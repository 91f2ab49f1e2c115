//! `/drives`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{CacheMode, DiskConfig, DiskFormat};

use super::rate::RateLimiter;
use crate::fault::Fault;

/// What a flush of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum CacheType {
    /// Nothing.
    #[default]
    Unsafe,
    /// Makes what was written durable.
    Writeback,
}

/// How Firecracker moves data. Hull chooses by itself, and only remembers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub enum IoEngine {
    #[default]
    Sync,
    Async,
}

/// What the file of a drive is. It is never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DriveFormat {
    /// The disk itself, byte by byte.
    Raw,
    /// An image of QEMU's format, version 2 or 3.
    Qcow2,
}

/// A disk.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Letters, digits and `_`, at most 64.
    pub drive_id: String,
    /// File or block device.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// The guest's root file system is on this drive.
    pub is_root_device: bool,
    /// Id of the root partition on it.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// The guest cannot write.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// What a flush of the guest does.
    #[serde(default)]
    pub cache_type: CacheType,
    /// How Firecracker moves data.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Bytes and requests a second.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// Socket of a vhost-user back-end; not supported.
    #[serde(default)]
    pub socket: Option<String>,
    /// Hull's own: file that takes what the guest writes, so that the one at `path_on_host` is only read. It is
    /// made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub overlay: Option<PathBuf>,
    /// Hull's own: what the file is; raw if nothing is said. A file that begins like an image is refused then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DriveFormat>,
    /// Hull's own: an image may name the file that it stands on, and that one the next: they are opened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub backing: bool,
}

/// A change of a disk of a running machine.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialDrive {
    /// The drive.
    pub drive_id: String,
    /// Another file, or the same one after it grew.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub path_on_host: Option<PathBuf>,
    /// Bytes and requests a second.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl TryFrom<Drive> for DiskConfig {
    type Error = Fault;

    fn try_from(drive: Drive) -> Result<DiskConfig, Fault> {
        if drive.socket.is_some() {
            return Err(Fault::bad("socket: vhost-user back-ends are not supported."));
        }
        let path = drive
            .path_on_host
            .ok_or_else(|| Fault::bad("path_on_host: a drive needs a file or block device."))?;
        let cache = match drive.cache_type {
            CacheType::Unsafe => CacheMode::Unsafe,
            CacheType::Writeback => CacheMode::Writeback,
        };
        Ok(DiskConfig {
            path,
            ro: drive.is_read_only.unwrap_or(false),
            id: Some(drive.drive_id),
            root: drive.is_root_device,
            partuuid: drive.partuuid,
            overlay: drive.overlay,
            format: drive.format.map(|format| match format {
                DriveFormat::Raw => DiskFormat::Raw,
                DriveFormat::Qcow2 => DiskFormat::Qcow2,
            }),
            backing: drive.backing,
            cache,
            rate: drive.rate_limiter.map(Into::into),
            ..DiskConfig::default()
        })
    }
}

impl From<&DiskConfig> for Drive {
    fn from(disk: &DiskConfig) -> Drive {
        Drive {
            drive_id: disk.id.clone().unwrap_or_default(),
            path_on_host: Some(disk.path.clone()),
            is_root_device: disk.root,
            partuuid: disk.partuuid.clone(),
            is_read_only: Some(disk.ro),
            cache_type: match disk.cache {
                CacheMode::Unsafe => CacheType::Unsafe,
                CacheMode::Writeback | CacheMode::Writethrough => CacheType::Writeback,
            },
            io_engine: Some(IoEngine::Sync),
            rate_limiter: RateLimiter::of(disk.rate),
            socket: None,
            overlay: disk.overlay.clone(),
            format: disk.format.map(|format| match format {
                DiskFormat::Raw => DriveFormat::Raw,
                DiskFormat::Qcow2 => DriveFormat::Qcow2,
            }),
            // Whoever opens it as it is has to say so.
            backing: disk.backing || disk.forked > 0,
        }
    }
}
