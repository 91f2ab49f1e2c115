//! Commands that speak to a machine over its API: `hull VERB NAME|SOCKET`.
//!
//! The API is Hull's or, as far as it goes, that of a real Firecracker. What machines are called is
//! `runtime`'s to know; nothing of the machine itself is looked at from here.

mod balloon;
mod devices;
mod error;
mod events;
mod fork;
pub mod http;
mod machine;
mod show;
mod snapshot;
mod state;

use std::future::Future;

use hyper::Method;
use serde_json::json;

use crate::cli::{MachineArgs, Result};
use crate::exit::Code;

pub use balloon::balloon;
pub use devices::{set_disk, set_net};
pub use error::ClientError;
pub use events::{events, local_time};
pub use fork::fork;
pub use http::{Api, PATIENCE};
pub use machine::{Machine, is_socket};
pub use show::{config, metrics};
pub use snapshot::snapshot;
pub use state::states;

/// Lets `work` wait for answers.
///
/// # Errors
/// Those of `work`; there can be no event loop.
pub fn block_on<T, E>(work: impl Future<Output = std::result::Result<T, E>>) -> Result<T>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(ClientError::Runtime)?;
    runtime.block_on(work).map_err(Into::into)
}

/// `hull pause` and `hull resume`.
pub fn set_paused(args: &MachineArgs, paused: bool) -> Result {
    let machine = Machine::find(&args.machine)?;
    let state = if paused { "Paused" } else { "Resumed" };
    block_on(async {
        let mut api = Api::connect(&machine, PATIENCE).await?;
        api.send(Method::PATCH, "/vm", &json!({ "state": state })).await
    })?;
    Ok(Code::SUCCESS)
}
