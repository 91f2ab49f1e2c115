//! `/metrics` and `/events`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::journal::{Entry, Happening};

use crate::routes::observe::unix_millis;

/// Where metrics are written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or named pipe that lines of JSON are appended to.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
    /// Each line has the machine's id, as `id`.
    #[serde(default)]
    pub emit_id: bool,
    /// Words of the user's that each line has, as `properties`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

/// Something that happened: the data of a server-sent event.
#[derive(Debug, Serialize, ToSchema)]
pub struct EventData {
    /// Counts from 1.
    pub sequence: u64,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// `created`, `started`, `ready`, `paused`, `resumed`, `saving`, `saved`, `panicked`, `device-error`
    /// or `stopped`.
    pub event: &'static str,
    /// Of `stopped`: `power-off`, `reset`, `crash`, `quit`, `signal` or `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// Of `stopped`, where it starts again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub again: bool,
    /// Of `device-error`: the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Of `device-error`: how many errors of the device just before are not in the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unheard: Option<u64>,
    /// Of `saving`: bytes of memory that are written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub done: Option<u64>,
    /// Of `saving`: bytes of memory that are to be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
    /// Of `saved`: the state file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// What there is to be said about it, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl EventData {
    /// Of this entry.
    pub fn of(entry: &Entry) -> EventData {
        let mut data = EventData {
            sequence: entry.sequence,
            time_ms: unix_millis(entry.time),
            event: entry.what.name(),
            reason: None,
            again: false,
            device: None,
            unheard: None,
            done: None,
            total: None,
            path: None,
            message: None,
        };
        match &entry.what {
            Happening::Stopped { reason, message, again } => {
                data.reason = Some(reason.name());
                data.message.clone_from(message);
                data.again = *again;
            }
            Happening::DeviceError { device, message, unheard } => {
                data.device = Some(device.clone());
                data.message = Some(message.clone());
                data.unheard = Some(*unheard).filter(|unheard| *unheard > 0);
            }
            Happening::Saving { done, total } => {
                (data.done, data.total) = (Some(*done), Some(*total));
            }
            Happening::Saved { state } => data.path = Some(state.display().to_string()),
            _ => {}
        }
        data
    }
}
