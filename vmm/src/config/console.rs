//! The console of a machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimit, error};

/// Where the guest's console is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsoleConfig {
    /// Where output goes and input comes from.
    pub mode: ConsoleMode,
    /// File for `mode = "file"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The device that the guest sees.
    pub device: ConsoleDevice,
    /// Limit of what the guest prints: more than that makes it wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<RateLimit>,
    /// What is over the limit is dropped instead, and counted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drop: bool,
}

impl ConsoleConfig {
    /// How the console of a machine is that was saved with this one: the streams of the process that saved it
    /// are not those of another, and the device that the guest has stays. `wanted` is what somebody wants.
    ///
    /// # Errors
    /// The guest has none.
    pub fn elsewhere(&self, wanted: Option<ConsoleConfig>) -> Result<ConsoleConfig, ConfigError> {
        let mode = wanted.as_ref().map(|wanted| wanted.mode);
        match (self.mode, mode) {
            (ConsoleMode::Off, None | Some(ConsoleMode::Off)) => Ok(self.clone()),
            (ConsoleMode::Off, Some(_)) => error("console", "the guest was saved without one"),
            // The guest goes on writing to it.
            (_, Some(ConsoleMode::Off)) => Ok(ConsoleConfig {
                mode: ConsoleMode::File,
                path: Some("/dev/null".into()),
                device: self.device,
                ..ConsoleConfig::default()
            }),
            _ => Ok(ConsoleConfig { device: self.device, ..wanted.unwrap_or_default() }),
        }
    }
}

/// Host side of the console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleMode {
    /// `tty` if standard input is a terminal, else `stdio`.
    #[default]
    Auto,
    /// The terminal, in raw mode, with the Ctrl-A escapes.
    Tty,
    /// Standard input and output as plain streams.
    Stdio,
    /// Output is written to a file, there is no input.
    File,
    /// No console.
    Off,
}

/// Guest side of the console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleDevice {
    /// The first serial port, ttyS0: works from the first moment of a kernel.
    #[default]
    Serial,
    /// virtio-console, hvc0: faster, and the guest learns the window size.
    Virtio,
}
