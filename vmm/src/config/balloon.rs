//! The balloon as people ask for it.

use devices::virtio::balloon::PAGE;
use serde::{Deserialize, Serialize};

use super::{ByteSize, ConfigError, error};

/// Memory that the guest lends to the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct BalloonConfig {
    /// How much the guest is to do without, a multiple of 4096 bytes and no more than it has.
    pub size: ByteSize,
    /// The guest may take memory back before it runs out of it.
    pub deflate_on_oom: bool,
    /// Seconds after which the guest is asked again how it is off for memory; 0 for never.
    pub stats_interval: u16,
    /// The guest says which of its memory is free, and the host gets that as well.
    pub reporting: bool,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        BalloonConfig {
            size: ByteSize(0),
            deflate_on_oom: false,
            stats_interval: 0,
            reporting: false,
        }
    }
}

impl BalloonConfig {
    /// Checks it for a guest with `memory` bytes of RAM.
    pub(super) fn validate(&self, memory: ByteSize) -> Result<(), ConfigError> {
        let size = self.size;
        if !size.0.is_multiple_of(PAGE) {
            let unit = ByteSize(PAGE);
            return error("balloon.size", format!("{size} is not a multiple of {unit}"));
        }
        if size > memory {
            let problem = format!("{size} is more than the guest's memory of {memory}");
            return error("balloon.size", problem);
        }
        Ok(())
    }

    /// [`BalloonConfig::size`] in the pages that the device counts in.
    pub fn pages(&self) -> u32 {
        u32::try_from(self.size.0 / PAGE).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_no_larger_than_the_guest() {
        let balloon = |size| BalloonConfig { size: ByteSize(size), ..BalloonConfig::default() };
        let check = |size| balloon(size).validate(ByteSize(128 << 20)).map_err(|e| e.to_string());
        assert_eq!((check(0), check(128 << 20)), (Ok(()), Ok(())));
        let err = check((128 << 20) + 4096).unwrap_err();
        assert!(err.starts_with("balloon.size: ") && err.contains("128M"), "{err}");
        assert_eq!(check(5000).unwrap_err(), "balloon.size: 5000 is not a multiple of 4K");
        assert_eq!(balloon(1 << 20).pages(), 256);
    }
}
