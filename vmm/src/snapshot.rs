//! A machine as two files: its state, and its memory.
//!
//! ```text
//!   state    "HULLSNAP" | format | lengths | checksum | header (JSON) | payloads
//!   memory   guest RAM, address by address; what is zero is a hole
//! ```
//!
//! The memory file is as long as RAM, without the hole below 4 GiB: byte n of it is byte n of the ranges
//! of [`arch::layout::ram_ranges`] one behind the other. A restore maps it copy-on-write, so that it
//! costs what the guest touches. That of a diff has the pages that changed since another snapshot, its base;
//! which ones those are is in its state. The header says what there is for people and programs; what the machine
//! goes on from are the payloads, each with its owner, kind and version.

mod aside;
mod file;
mod load;
mod memory;
mod overrides;
mod store;
#[cfg(test)]
mod tests;
mod verify;
mod working_set;

use std::path::PathBuf;

use devices::virtio::device::Payload;
use serde::{Deserialize, Serialize};

pub use self::file::{FORMAT, StateError, parse, read, sealed, write};
pub use self::load::{LoadError, MergeError, load, load_paged, merge};
pub use self::memory::Progress;
pub use self::overrides::Overrides;
pub use self::store::{
    Diff, Files, StoreError, Taken, disks, now_ms, remove, store, this_host, word,
};
pub use self::verify::{Sum, Verified, verify};
pub(crate) use self::working_set::Companion;
pub use self::working_set::{Prefetch, Record, WorkingSetError};
use crate::config::VmConfig;

/// What stands in front of a state file, in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Header {
    /// Version of Hull that wrote it.
    pub hull: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
    /// Where: which start of which host. CPUs of the same one need not be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The machine as it was configured when it was saved.
    pub config: VmConfig,
    /// Its memory.
    pub memory: MemoryHeader,
    /// Its disks, which are no part of the snapshot.
    pub disks: Vec<DiskHeader>,
}

/// What a state file says of its memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemoryHeader {
    /// Tells this snapshot from all others: letters and digits. A diff that was merged keeps it.
    pub id: String,
    /// Part of the name that the memory file has as long as it is not in its place: letters and digits.
    pub aside: String,
    /// Length of the memory file, which is that of RAM, in bytes.
    pub size: u64,
    /// Bytes of it that are not holes.
    pub data: u64,
    /// What the pages that were written come to. Not in what was written before there were sums.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sum: Option<Sum>,
    /// Some pages by which memory is known.
    pub samples: Vec<Sample>,
    /// What the memory file is to be laid over, if it has only what changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
}

/// A page of memory as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// Its number.
    pub page: u64,
    /// The first half of its hash (BLAKE3, in hexadecimal).
    pub hash: String,
}

/// The snapshot that another one is a diff to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Base {
    /// Its id.
    pub id: String,
    /// Its state file; seen from the folder of the diff's if it is relative.
    pub state: PathBuf,
    /// Its memory file, likewise.
    pub memory: PathBuf,
}

/// A disk as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskHeader {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// Length in bytes.
    pub size: u64,
    /// When it was changed last, in nanoseconds since 1970.
    pub modified_ns: u64,
}

/// Whose the list of pages is that a diff has.
pub(crate) const MEMORY: &str = "memory";
/// The kind of that list.
const PAGES: &str = "pages";
/// The kind of the lists of pages of layers that are handed over.
pub(crate) const LAYERS: &str = "layers";

/// A payload and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `vm`, `vcpu 0`, the name of a device.
    pub owner: String,
    /// Its state.
    pub payload: Payload,
}

/// What is in a state file.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// What stands in front.
    pub header: Header,
    /// The payloads.
    pub parts: Vec<Part>,
}
