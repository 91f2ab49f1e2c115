//! What a client is told when a request is not done: a status, and `{"fault_message": …}`.

use std::fmt;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;
use vmm::config::ConfigError;

/// Body of every answer that is not a success.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub struct FaultBody {
    /// What is wrong: the field, its value, what is allowed.
    pub fault_message: String,
}

/// A request that is not done.
#[derive(Debug)]
pub struct Fault {
    status: StatusCode,
    message: String,
}

impl Fault {
    /// The request, or what it asks for, is not valid now.
    pub fn bad(message: impl Into<String>) -> Fault {
        Fault { status: StatusCode::BAD_REQUEST, message: message.into() }
    }

    /// With another status.
    pub fn with_status(status: StatusCode, message: impl Into<String>) -> Fault {
        Fault { status, message: message.into() }
    }

    /// A configuration that is not valid, in the words of the request.
    pub fn of_config(error: &ConfigError) -> Fault {
        let field = error.field.split('[').next().unwrap_or_default();
        let key = error.field.rsplit('.').next().unwrap_or_default();
        let known = FIELDS.iter().find(|(ours, _)| *ours == error.field);
        let known =
            known.or_else(|| FIELDS.iter().find(|(ours, _)| *ours == format!("{field}.{key}")));
        let name = known.map_or(error.field.as_str(), |(_, name)| name);
        Fault::bad(format!("{name}: {}", error.problem))
    }

    /// An operation for a machine that does not run yet.
    pub fn after_start() -> Fault {
        Fault::bad("The requested operation is not supported after starting the microVM.")
    }

    /// An operation for a machine that runs.
    pub fn before_start() -> Fault {
        Fault::bad("The requested operation is not supported before starting the microVM.")
    }

    /// The machine is gone, or about to be.
    pub fn gone() -> Fault {
        Fault::bad("The microVM stopped before the request was done.")
    }
}

/// Fields of the configuration, and what requests call them.
const FIELDS: [(&str, &str); 16] = [
    ("cpus", "vcpu_count"),
    ("memory.size", "mem_size_mib"),
    ("memory.huge-pages", "huge_pages"),
    ("disk.id", "drive_id"),
    ("disk.path", "path_on_host"),
    ("disk.rate", "rate_limiter"),
    ("disk.partuuid", "partuuid"),
    ("net.id", "iface_id"),
    ("net.tap", "host_dev_name"),
    ("net.mac", "guest_mac"),
    ("net.rx-rate", "rx_rate_limiter"),
    ("net.tx-rate", "tx_rate_limiter"),
    ("vsock.cid", "guest_cid"),
    ("vsock.path", "uds_path"),
    ("balloon.size", "amount_mib"),
    ("rng-rate", "rate_limiter"),
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        tracing::info!(status = self.status.as_u16(), why = self.message, "request refused");
        (self.status, axum::Json(FaultBody { fault_message: self.message })).into_response()
    }
}

/// Answer to a request that changes something.
pub type Done = Result<StatusCode, Fault>;

/// Answer to a request for something.
pub type Found<T> = Result<axum::Json<T>, Fault>;

/// A change that was made: 204, no body.
pub const DONE: StatusCode = StatusCode::NO_CONTENT;
