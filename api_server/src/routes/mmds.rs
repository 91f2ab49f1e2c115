//! `/mmds`.

use axum::extract::State;
use serde_json::Value;

use crate::body::{AnyJson, Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::Shared;
use crate::types::mmds::MmdsConfig;

/// What the guest finds.
#[utoipa::path(get, path = "/mmds", responses((status = 200, body = Value)))]
pub async fn get(State(shared): State<Shared>, _: Nothing) -> Found<Value> {
    Ok(axum::Json(shared.metadata()))
}

/// Gives the guest something to find, in place of what was there.
#[utoipa::path(put, path = "/mmds", request_body = Value, responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, AnyJson(contents): AnyJson) -> Done {
    shared.put_metadata(contents).await
}

/// Changes what the guest finds: a JSON merge patch (RFC 7396).
#[utoipa::path(patch, path = "/mmds", request_body = Value, responses((status = 204)))]
pub async fn patch(State(shared): State<Shared>, AnyJson(patch): AnyJson) -> Done {
    shared.patch_metadata(&patch).await
}

/// How the guest finds it.
#[utoipa::path(get, path = "/mmds/config", responses((status = 200, body = MmdsConfig)))]
pub async fn config(State(shared): State<Shared>, _: Nothing) -> Found<MmdsConfig> {
    let config = shared.config();
    let mmds = config.mmds.as_ref();
    mmds.map(|mmds| axum::Json(mmds.into()))
        .ok_or_else(|| Fault::bad("There is no metadata service."))
}

/// Says how the guest finds it. Before the start only.
#[utoipa::path(put, path = "/mmds/config", request_body = MmdsConfig, responses((status = 204)))]
pub async fn put_config(State(shared): State<Shared>, Json(config): Json<MmdsConfig>) -> Done {
    shared.put_mmds(config)
}
