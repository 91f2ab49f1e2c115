//! Disks of a machine that is handed over: what its copies stand on, and the file of each.
//!
//! ```text
//!   parent                                     child
//!     halted: Disks::freeze
//!       each disk ──> Base (open files) ──────> Disks::copy: an overlay or image of its own over them,
//!                 └─> fresh overlay or image    or a file that the file system copies
//!     Switch::done: goes on with those
//! ```
//!
//! A disk that is only read is opened by its path, by each for itself.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::virtio::blk::overlay::{self, Base, Frozen, OverlayError, Way};
use devices::virtio::blk::{self, Backing};
use serde::{Deserialize, Serialize};

use super::Child;
use crate::config::{DiskConfig, VmConfig};
use crate::machine::open_disk;

/// How often another name is tried for a file.
const TRIES: u32 = 10_000;

/// Why a disk has no copy.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Its file cannot be made.
    #[error("cannot copy {disk}")]
    Copy {
        /// Name of the disk.
        disk: String,
        /// Why.
        source: OverlayError,
    },
    /// It cannot be opened.
    #[error(
        "cannot read {disk}, on which copies are to stand; --disk {disk}=FILE (drive_overrides) gives each \
         another file that is there"
    )]
    Open {
        /// Name of the disk.
        disk: String,
        /// Why.
        source: blk::DiskError,
    },
    /// It is a block device, beside which there is no place for files.
    #[error("{disk} is a block device: say in which folder its copies are to be")]
    NoFolder {
        /// Name of the disk.
        disk: String,
    },
    /// Nobody knows such a disk.
    #[error("there is no disk with the id {0}")]
    Unknown(String),
}

/// How a disk is handed over, beside its open files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Handed {
    disk: String,
    path: PathBuf,
    files: u32,
    unsynced: bool,
    #[serde(with = "HandedWay")]
    way: Way,
    /// What a person knows it by.
    known_as: PathBuf,
}

/// [`Way`] as it is handed over.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Way", rename_all = "snake_case", deny_unknown_fields)]
enum HandedWay {
    Overlay,
    Reflink,
    Image { forked: u32 },
}

/// A disk that copies stand on.
#[derive(Debug)]
struct Disk {
    name: String,
    known_as: PathBuf,
    base: Base,
}

/// Disks as copies of a machine go on with them.
#[derive(Debug, Default)]
pub struct Disks(Vec<Disk>);

/// What the machine itself is to go on with, once it is certain that it has copies. Until then it can be
/// undone, and is if it is dropped.
#[derive(Debug, Default)]
pub struct Switch(Vec<(String, Frozen)>);

impl Drop for Switch {
    fn drop(&mut self) {
        for (_, frozen) in self.0.drain(..) {
            frozen.undo();
        }
    }
}

impl Switch {
    /// What the machine goes on with, to be put in the place of its disks; `config` says so then.
    pub fn done(mut self, config: &mut VmConfig) -> Vec<(String, Backing)> {
        let mut disks = Vec::new();
        for (name, frozen) in self.0.drain(..) {
            let Some(disk) = frozen.disk else { continue };
            let place = (0..config.disk.len()).find(|&n| config.disk_name(n) == name);
            if let Some(of) = place.and_then(|n| config.disk.get_mut(n)) {
                goes_on_with(of, &frozen.base, disk.path());
            }
            disks.push((name, disk));
        }
        disks
    }
}

impl Disks {
    /// Names of the disks of the machine of `config` on whose files copies of them stand, unless each of `children`
    /// brings its own.
    pub fn needed(config: &VmConfig, children: &[Child]) -> Vec<String> {
        let written = (0..config.disk.len()).filter(|&n| !config.disk[n].ro);
        let is_needed = |name: &String| !children.iter().all(|child| child.brings(name));
        written.map(|n| config.disk_name(n)).filter(is_needed).collect()
    }

    /// Names of these.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|disk| disk.name.as_str())
    }

    /// Makes each of `disks`, which nobody writes, one that copies of the machine can stand on, if one of `children`
    /// needs that. The machine called `machine` gets files of its own in `folder`, if there is one, else where they
    /// are.
    ///
    /// # Errors
    /// [`DiskError`]; all disks are as they were.
    pub fn freeze(
        disks: &[(String, Arc<Backing>)],
        children: &[Child],
        machine: &str,
        folder: Option<&Path>,
    ) -> Result<(Disks, Switch), DiskError> {
        // Dropped in this order if something fails: nobody has a file any more when it is taken back.
        let mut switch = Switch::default();
        let mut all = Disks::default();
        for (name, disk) in disks.iter().filter(|(_, disk)| !disk.read_only()) {
            if children.iter().all(|child| child.brings(name)) {
                continue;
            }
            let known_as = Frozen::known_as(disk).to_owned();
            let folder = folder_for(name, folder, disk.path())?;
            let failed = |source| DiskError::Copy { disk: name.clone(), source };
            let kind = Frozen::extension(disk);
            let frozen =
                named(&folder, &known_as, machine, kind, |path| overlay::freeze(disk, path));
            let frozen = frozen.map_err(failed)?;
            let base = frozen.base.clone();
            switch.0.push((name.clone(), frozen));
            all.0.push(Disk { name: name.clone(), known_as, base });
        }
        Ok((all, switch))
    }

    /// Those of a machine that was saved with `config`, for those of `children` that do not bring their own.
    ///
    /// # Errors
    /// [`DiskError`]: somebody writes one, or it is not there.
    pub fn of_saved(config: &VmConfig, children: &[Child]) -> Result<Disks, DiskError> {
        let mut all = Disks::default();
        let needed = Disks::needed(config, children);
        for (n, disk) in config.disk.iter().enumerate() {
            let name = config.disk_name(n);
            if !needed.contains(&name) {
                continue;
            }
            let opened = open_disk(&DiskConfig { ro: true, ..disk.clone() })
                .map_err(|source| DiskError::Open { disk: name.clone(), source })?;
            let known_as = Frozen::known_as(&opened).to_owned();
            let base = Base::of(&opened)
                .map_err(|source| DiskError::Copy { disk: name.clone(), source })?;
            all.0.push(Disk { name, known_as, base });
        }
        Ok(all)
    }

    /// How they are handed over; their files follow one another in the order of [`Disks::files`].
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let handed = |disk: &Disk| Handed {
            disk: disk.name.clone(),
            path: disk.base.path.clone(),
            files: disk.base.files.len() as u32,
            unsynced: disk.base.unsynced,
            way: disk.base.way,
            known_as: disk.known_as.clone(),
        };
        serde_json::to_vec(&self.0.iter().map(handed).collect::<Vec<_>>())
    }

    /// Their open files.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<File>> {
        self.0.iter().flat_map(|disk| &disk.base.files)
    }

    /// What [`Disks::to_bytes`] said, with as many files as that says.
    pub(super) fn from_bytes(bytes: &[u8], files: Vec<File>) -> Option<Disks> {
        let handed: Vec<Handed> = serde_json::from_slice(bytes).ok()?;
        let mut files = files.into_iter().map(Arc::new);
        let mut names = HashSet::new();
        let mut disks = Vec::new();
        for Handed { disk: name, path, files: number, unsynced, way, known_as } in handed {
            let files: Vec<_> = files.by_ref().take(number as usize).collect();
            if files.len() != number as usize || files.is_empty() || !names.insert(name.clone()) {
                return None;
            }
            let base = Base { path, files, unsynced, way };
            disks.push(Disk { name, known_as, base });
        }
        files.next().is_none().then_some(Disks(disks))
    }

    /// Makes the disks of `child`, which is called `name`, and has `config` say where they are.
    ///
    /// # Errors
    /// [`DiskError`]; nothing is left then.
    pub fn copy(
        &self,
        child: &Child,
        name: &str,
        config: &mut VmConfig,
    ) -> Result<Copies, DiskError> {
        let unknown = |(disk, _): &&(String, PathBuf)| !self.0.iter().any(|of| of.name == *disk);
        if let Some((disk, _)) = child.copies.iter().find(unknown) {
            return Err(DiskError::Unknown(disk.clone()));
        }
        let mut copies = Copies::default();
        for n in 0..config.disk.len() {
            let disk_name = config.disk_name(n);
            let brought = child.brings(&disk_name);
            let Some(disk) = self.0.iter().find(|disk| disk.name == disk_name && !brought) else {
                continue;
            };
            let failed = |source| DiskError::Copy { disk: disk_name.clone(), source };
            let asked = child.copies.iter().find(|(disk, _)| *disk == disk_name);
            let of = &mut config.disk[n];
            let copy = match asked {
                Some((_, path)) => disk.base.copy(path, of.direct).map_err(failed)?,
                None => {
                    let folder = folder_for(&disk_name, child.folder.as_deref(), of.file())?;
                    let make = |path: &Path| disk.base.copy(path, of.direct);
                    let kind = disk.base.way.extension();
                    named(&folder, &disk.known_as, name, kind, make).map_err(failed)?
                }
            };
            let path = copy.path().to_owned();
            goes_on_with(of, &disk.base, &path);
            copies.files.push((disk_name.clone(), path));
            copies.disks.push((disk_name, copy));
        }
        Ok(copies)
    }
}

/// Disks of a copy, open. Their files are removed with it, unless somebody keeps them.
#[derive(Debug, Default)]
pub struct Copies {
    disks: Vec<(String, Backing)>,
    files: Vec<(String, PathBuf)>,
}

impl Copies {
    /// The disks, by their names.
    pub fn take(&mut self) -> Vec<(String, Backing)> {
        std::mem::take(&mut self.disks)
    }

    /// The files that were made, by the names of the disks.
    pub fn files(&self) -> &[(String, PathBuf)] {
        &self.files
    }

    /// Leaves the files where they are.
    pub fn keep(mut self) {
        self.files.clear();
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for (_, path) in self.files.drain(..) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Has `config` say that the disk is now the file at `path`, which was made over `base`.
fn goes_on_with(config: &mut DiskConfig, base: &Base, path: &Path) {
    let own = path.to_owned();
    let (path, overlay) = match base.way {
        Way::Overlay => (base.path.clone(), Some(own)),
        Way::Reflink | Way::Image { .. } => (own, None),
    };
    if let Way::Image { forked } = base.way {
        config.forked = forked;
    }
    (config.path, config.overlay) = (path, overlay);
}

/// Where files of a disk are made: where it is itself, if nobody says otherwise.
fn folder_for(disk: &str, folder: Option<&Path>, path: &Path) -> Result<PathBuf, DiskError> {
    if let Some(folder) = folder {
        return Ok(folder.to_owned());
    }
    // A folder of devices is no place for files.
    if !fs::metadata(path).is_ok_and(|metadata| metadata.is_file()) {
        return Err(DiskError::NoFolder { disk: disk.to_owned() });
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    // Not relative to where this process happens to be.
    Ok(std::path::absolute(folder.join(".")).unwrap_or_else(|_| folder.to_owned()))
}

/// Makes a file in `folder` that is called after a disk and its machine, and has a number if there is one of
/// that name already.
fn named<T>(
    folder: &Path,
    disk: &Path,
    machine: &str,
    kind: &str,
    make: impl Fn(&Path) -> Result<T, OverlayError>,
) -> Result<T, OverlayError> {
    let mut taken = folder.to_owned();
    for n in 1..=TRIES {
        let mut name: OsString = disk.file_name().unwrap_or(disk.as_os_str()).to_owned();
        name.push(format!(".{machine}"));
        if n > 1 {
            name.push(format!(".{n}"));
        }
        name.push(format!(".{kind}"));
        taken = folder.join(name);
        if taken.symlink_metadata().is_ok() {
            continue;
        }
        match make(&taken) {
            Err(OverlayError::Exists(_)) => {}
            made => return made,
        }
    }
    Err(OverlayError::Exists(taken))
}
