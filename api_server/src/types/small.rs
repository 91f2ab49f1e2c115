//! Resources of a field or two.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::VmConfig;

use super::rate::RateLimiter;

/// Something to be done at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub enum ActionType {
    /// Writes the metrics out.
    FlushMetrics,
    /// Starts the machine.
    InstanceStart,
    /// Presses Ctrl, Alt and Del on the guest's keyboard.
    SendCtrlAltDel,
}

/// `/actions`.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceActionInfo {
    /// What is to be done.
    pub action_type: ActionType,
}

/// What a machine shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ToSchema)]
pub enum WantedState {
    /// Halt.
    Paused,
    /// Go on.
    Resumed,
}

/// `/vm`.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What the machine shall do.
    pub state: WantedState,
}

impl EntropyDevice {
    /// The one of this machine.
    pub fn of(config: &VmConfig) -> Option<EntropyDevice> {
        let rate_limiter = config.rng_rate.map(Into::into);
        config.rng.then_some(EntropyDevice { rate_limiter })
    }
}

/// `/entropy`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EntropyDevice {
    /// Bytes and requests a second.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}
