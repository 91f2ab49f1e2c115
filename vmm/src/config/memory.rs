//! The RAM of a machine.

use arch::layout;
use serde::{Deserialize, Serialize};

use super::{ByteSize, ConfigError, error};
use crate::memory::PAGE_SIZE;

/// RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemoryConfig {
    /// Bytes, a multiple of 4096 (of 2 MiB with `huge-pages`).
    pub size: ByteSize,
    /// Take RAM from the host's pool of 2 MiB pages.
    pub huge_pages: bool,
    /// Keep RAM in a file of its own, so that the machine is halted for shorter when it is forked first: nothing
    /// is copied then. The host has no huge pages for it.
    pub forkable: bool,
    /// Firecracker's clients ask for it where they want diff snapshots. It changes nothing here, and
    /// is remembered for them.
    pub track_dirty_pages: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig {
            size: ByteSize(512 << 20),
            huge_pages: false,
            forkable: false,
            track_dirty_pages: false,
        }
    }
}

impl MemoryConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let (size, text) = (self.size.0, self.size);
        let unit = if self.huge_pages { 2 << 20 } else { PAGE_SIZE };
        if self.forkable && self.huge_pages {
            let problem = "huge pages are copied when the machine is forked: take one of the two";
            return error("memory.forkable", problem.to_owned());
        }
        if size < layout::MIN_RAM {
            let least = ByteSize(layout::MIN_RAM);
            return error("memory.size", format!("{text} is less than {least}"));
        }
        if !size.is_multiple_of(unit) {
            let unit = ByteSize(unit);
            return error("memory.size", format!("{text} is not a multiple of {unit}"));
        }
        if size > layout::MAX_RAM {
            let most = ByteSize(layout::MAX_RAM);
            return error("memory.size", format!("{text} is more than the {most} of a machine"));
        }
        Ok(())
    }
}
