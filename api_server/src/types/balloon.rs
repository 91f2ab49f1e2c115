//! `/balloon`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{BalloonConfig, ByteSize};
use vmm::devices::virtio::balloon::{BalloonStatus, PAGE};

use crate::fault::Fault;

const MIB: u64 = 1 << 20;

/// Memory that the guest lends to the host.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// MiB that the guest is to do without.
    pub amount_mib: u32,
    /// The guest may take memory back before it runs out of it.
    pub deflate_on_oom: bool,
    /// Seconds after which the guest is asked again how it is off for memory; 0 for never.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Hinting is not supported yet.
    #[serde(default, skip_serializing)]
    pub free_page_hinting: bool,
    /// The guest says which of its memory is free, and the host gets that as well.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub free_page_reporting: bool,
}

/// Another size.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// MiB that the guest is to do without.
    pub amount_mib: u32,
}

/// Another interval.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    /// Seconds after which the guest is asked again.
    pub stats_polling_interval_s: u16,
}

/// How the balloon stands, and what the guest said last about its memory.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct BalloonStats {
    /// Pages of 4 KiB that the guest is to do without.
    pub target_pages: u32,
    /// Pages that it does without.
    pub actual_pages: u32,
    /// The former in MiB.
    pub target_mib: u32,
    /// The latter in MiB.
    pub actual_mib: u32,
    /// What the guest said, by name; sizes in bytes.
    #[serde(flatten)]
    pub statistics: BTreeMap<&'static str, u64>,
}

impl TryFrom<Balloon> for BalloonConfig {
    type Error = Fault;

    fn try_from(balloon: Balloon) -> Result<BalloonConfig, Fault> {
        if balloon.free_page_hinting {
            return Err(Fault::bad("free_page_hinting: this is not supported yet."));
        }
        Ok(BalloonConfig {
            size: ByteSize(u64::from(balloon.amount_mib) * MIB),
            deflate_on_oom: balloon.deflate_on_oom,
            stats_interval: balloon.stats_polling_interval_s,
            reporting: balloon.free_page_reporting,
        })
    }
}

impl From<&BalloonConfig> for Balloon {
    fn from(config: &BalloonConfig) -> Balloon {
        Balloon {
            amount_mib: u32::try_from(config.size.0 / MIB).unwrap_or(u32::MAX),
            deflate_on_oom: config.deflate_on_oom,
            stats_polling_interval_s: config.stats_interval,
            free_page_hinting: false,
            free_page_reporting: config.reporting,
        }
    }
}

impl From<BalloonStatus> for BalloonStats {
    fn from(status: BalloonStatus) -> BalloonStats {
        let per_mib = (MIB / PAGE) as u32;
        BalloonStats {
            target_pages: status.target,
            actual_pages: status.actual,
            target_mib: status.target / per_mib,
            actual_mib: status.actual / per_mib,
            statistics: status.named().collect(),
        }
    }
}
