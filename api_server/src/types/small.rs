//! Resources of a field or two.

use std::path::PathBuf;

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
    /// Presses the power button.
    PowerButton,
    /// Ends the machine as if its power was cut, and the process with it.
    Quit,
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
        let rate_limiter = RateLimiter::of(config.rng_rate);
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

/// `/logger`: what is `null` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Logger {
    /// File or named pipe that lines are appended to.
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// `Off`, `Error`, `Warning`, `Info`, `Debug` or `Trace`.
    pub level: Option<String>,
    /// Lines have the level in them.
    pub show_level: Option<bool>,
    /// Lines have the place in Hull's source in them.
    pub show_log_origin: Option<bool>,
    /// Lines of this module only.
    pub module: Option<String>,
}
