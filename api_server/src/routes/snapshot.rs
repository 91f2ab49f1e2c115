//! `/snapshot/create` and `/snapshot/load`.

use axum::extract::State;
use axum::response::{IntoResponse, Response};

use crate::body::Json;
use crate::fault::{DONE, Done, Fault};
use crate::instance::{Instance, Shared};
use crate::types::snapshot::{Loaded, SnapshotCreateParams, SnapshotLoadParams};

/// Saves the machine as two files. One that runs is halted until its memory is frozen.
#[utoipa::path(put, path = "/snapshot/create", request_body = SnapshotCreateParams,
    responses((status = 204)))]
pub async fn create(
    State(shared): State<Shared>,
    Json(params): Json<SnapshotCreateParams>,
) -> Done {
    Instance::create_snapshot(shared, params).await
}

/// Goes on where a machine was saved. Instead of configuring and starting one.
#[utoipa::path(put, path = "/snapshot/load", request_body = SnapshotLoadParams,
    responses(
        (status = 204),
        (status = 200, description = "With `hook`: what came of it", body = Loaded)
    ))]
pub async fn load(
    State(shared): State<Shared>,
    Json(params): Json<SnapshotLoadParams>,
) -> Result<Response, Fault> {
    let loaded = shared.load_snapshot(params).await?;
    Ok(loaded.map_or_else(|| DONE.into_response(), |told| axum::Json(told).into_response()))
}
