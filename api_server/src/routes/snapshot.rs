//! `/snapshot/create` and `/snapshot/load`.

use axum::extract::State;

use crate::body::Json;
use crate::fault::Done;
use crate::instance::{Instance, Shared};
use crate::types::snapshot::{SnapshotCreateParams, SnapshotLoadParams};

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
    responses((status = 204)))]
pub async fn load(State(shared): State<Shared>, Json(params): Json<SnapshotLoadParams>) -> Done {
    shared.load_snapshot(params).await
}
