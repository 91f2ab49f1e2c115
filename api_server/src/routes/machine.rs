//! `/machine-config`.

use axum::extract::State;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::Shared;
use crate::types::machine::{MachineConfiguration, MachineConfigurationUpdate};

/// CPUs and memory.
#[utoipa::path(get, path = "/machine-config",
    responses((status = 200, body = MachineConfiguration)))]
pub async fn get(State(shared): State<Shared>, _: Nothing) -> Found<MachineConfiguration> {
    Ok(axum::Json((&shared.config()).into()))
}

/// Says how many CPUs and how much memory there is. Before the start only.
#[utoipa::path(put, path = "/machine-config", request_body = MachineConfiguration,
    responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, Json(machine): Json<MachineConfiguration>) -> Done {
    shared.configure(|config| machine.put_into(config))
}

/// Changes some of it. Before the start only.
#[utoipa::path(patch, path = "/machine-config", request_body = MachineConfigurationUpdate,
    responses((status = 204)))]
pub async fn patch(
    State(shared): State<Shared>,
    Json(update): Json<MachineConfigurationUpdate>,
) -> Done {
    if update.is_empty() {
        return Err(Fault::bad("Empty PATCH request."));
    }
    shared.configure(|config| update.applied_to((&*config).into()).put_into(config))
}
