//! `/serial`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{ConsoleConfig, ConsoleMode, RateLimit};

use super::rate::TokenBucket;

/// The serial port.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SerialDevice {
    /// File or named pipe that output is written to, instead of the standard streams of the process.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
    /// Tokens are bytes; what is written without them is dropped.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
}

impl SerialDevice {
    /// What `console` says of it.
    pub fn of(console: &ConsoleConfig) -> SerialDevice {
        let bandwidth = console.rate.and_then(|rate| rate.bandwidth);
        SerialDevice {
            serial_out_path: console.path.clone(),
            rate_limiter: bandwidth.map(Into::into),
        }
    }

    /// Has `console` be as this says.
    pub fn put_into(self, console: &mut ConsoleConfig) {
        let mode = match &self.serial_out_path {
            Some(_) => ConsoleMode::File,
            None => ConsoleMode::default(),
        };
        let limit = |bucket: TokenBucket| RateLimit { bandwidth: Some(bucket.into()), ops: None };
        *console = ConsoleConfig {
            mode,
            path: self.serial_out_path,
            device: console.device,
            rate: self.rate_limiter.map(limit),
            drop: self.rate_limiter.is_some(),
        };
    }
}
