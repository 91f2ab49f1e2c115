//! Disks of a machine.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimit, VmConfig, error, validate_queues};

/// How much the disk's data is cached and when it is made durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// The guest may turn its write cache on and off and flushes when it wants durability.
    #[default]
    Writeback,
    /// Every write is durable before it is reported as done.
    Writethrough,
    /// A flush does nothing. For disks that may be lost with the host.
    Unsafe,
}

/// What the file of a disk is. It is never guessed: what is in a raw disk is the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// The disk itself, byte by byte.
    Raw,
    /// An image of QEMU's format, version 2 or 3.
    Qcow2,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// File or block device.
    pub path: PathBuf,
    /// What it is; raw if nothing is said. A file that begins like an image is refused then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<DiskFormat>,
    /// An image may name the file that it stands on, and that one the next: they are opened.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub backing: bool,
    /// So many images below were put there when the machine was forked: what they are said to stand on is opened
    /// without `backing`.
    #[serde(skip_serializing_if = "is_none")]
    pub forked: u32,
    /// File that takes what the guest writes; `path` is only read then. It is made if it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<PathBuf>,
    /// The guest cannot write.
    pub ro: bool,
    /// Name in messages and serial number in the guest, which sees the first 20 bytes; at most 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's root file system is on this disk.
    pub root: bool,
    /// Id of the partition of a root disk that the root file system is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Write cache.
    pub cache: CacheMode,
    /// Go past the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Request queues, 1 to [`MAX_QUEUES`](super::MAX_QUEUES).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Limit of the data that is read and written, and of requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<RateLimit>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_none(number: &u32) -> bool {
    *number == 0
}

impl DiskConfig {
    /// The file that the guest's writes go to.
    pub fn file(&self) -> &Path {
        self.overlay.as_deref().unwrap_or(&self.path)
    }

    /// Has another file in the place of that.
    pub fn set_file(&mut self, path: &Path) {
        match &mut self.overlay {
            Some(overlay) => *overlay = path.to_owned(),
            None => self.path = path.to_owned(),
        }
        // Nobody knows what it stands on.
        self.forked = 0;
    }
}

impl VmConfig {
    pub(super) fn validate_disks(&self) -> Result<(), ConfigError> {
        if self.disk.iter().filter(|disk| disk.root).count() > 1 {
            return error("disk", "more than one disk is marked `root`");
        }
        for (n, disk) in self.disk.iter().enumerate() {
            if disk.path.as_os_str().is_empty() {
                return error(format!("disk[{n}].path"), "a disk needs a file or block device");
            }
            let is_image = disk.format == Some(DiskFormat::Qcow2);
            if disk.overlay.is_some() && is_image {
                return error(
                    format!("disk[{n}].overlay"),
                    "an overlay stands on a raw disk, not on a qcow2 image: `qemu-img convert -O raw` makes a raw \
                     disk, `qemu-img create -f qcow2 -b` an image that stands on the image",
                );
            }
            let follows = [(disk.backing, "backing"), (disk.forked > 0, "forked")];
            if let Some((_, field)) = follows.iter().find(|(is_set, _)| *is_set && !is_image) {
                let problem = "only an image names a file that it stands on: with format=qcow2";
                return error(format!("disk[{n}].{field}"), problem);
            }
            if disk.overlay.as_ref().is_some_and(|overlay| overlay.as_os_str().is_empty()) {
                return error(format!("disk[{n}].overlay"), "an overlay needs a file");
            }
            let fits = |id: &&String| {
                (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
            };
            if let Some(id) = disk.id.as_ref().filter(|id| !fits(id)) {
                let problem = format!("{id:?} is not 1 to 64 printable ASCII characters");
                return error(format!("disk[{n}].id"), problem);
            }
            let name = self.disk_name(n);
            if (0..n).any(|other| self.disk_name(other) == name) {
                return error(format!("disk[{n}].id"), format!("two disks are called {name}"));
            }
            let fits = |id: &&String| {
                (1..=64).contains(&id.len())
                    && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
            };
            if let Some(id) = disk.partuuid.as_ref().filter(|id| !fits(id)) {
                let problem =
                    format!("{id:?} is not the id of a partition: digits, a to f and '-'");
                return error(format!("disk[{n}].partuuid"), problem);
            }
            validate_queues(disk.queues, || format!("disk[{n}].queues"))?;
        }
        Ok(())
    }

    /// Name of the `n`th disk in messages: its id, or `disk` and its number.
    pub fn disk_name(&self, n: usize) -> String {
        let id = self.disk.get(n).and_then(|disk| disk.id.clone());
        id.unwrap_or_else(|| format!("disk{n}"))
    }
}
