//! A machine as two files: its state, and its memory.
//!
//! ```text
//!   state    "HULLSNAP" | format | lengths | checksum | header (JSON) | payloads
//!   memory   guest RAM, address by address; what is zero is a hole
//! ```
//!
//! The memory file is as long as RAM, without the hole below 4 GiB: byte n of it is byte n of the ranges
//! of [`arch::layout::ram_ranges`] one behind the other. A restore maps it copy-on-write, so that it
//! costs what the guest touches. The header says what there is for people and programs; what the machine
//! goes on from are the payloads, each with its owner, kind and version.

mod file;
mod memory;
mod overrides;
mod store;

use std::path::PathBuf;

use devices::virtio::device::Payload;
use serde::{Deserialize, Serialize};

pub use self::file::{FORMAT, StateError, parse, read, sealed, write};
pub use self::memory::{MemoryError, fingerprint, save as save_memory};
pub use self::overrides::Overrides;
pub use self::store::{Files, StoreError, load, store};
use crate::config::VmConfig;

/// What stands in front of a state file, in JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Header {
    /// Version of Hull that wrote it.
    pub hull: String,
    /// When, in milliseconds since 1970.
    pub created_ms: u64,
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
    /// Length of the memory file, which is that of RAM, in bytes.
    pub size: u64,
    /// Bytes of it that are not holes.
    pub data: u64,
    /// Pages by which it is known, by their offsets in bytes.
    pub samples: Vec<u64>,
    /// A hash of those pages (BLAKE3, in hexadecimal).
    pub fingerprint: String,
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
