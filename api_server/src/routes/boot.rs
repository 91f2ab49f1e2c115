//! `/boot-source`.

use axum::extract::State;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Found};
use crate::instance::{Shared, elsewhere};
use crate::types::boot::BootSource;

/// What is booted.
#[utoipa::path(get, path = "/boot-source", responses((status = 200, body = BootSource)))]
pub async fn get(State(shared): State<Shared>, _: Nothing) -> Found<BootSource> {
    Ok(axum::Json((&shared.config().kernel).into()))
}

/// Says what is booted. Before the start only.
#[utoipa::path(put, path = "/boot-source", request_body = BootSource, responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, Json(source): Json<BootSource>) -> Done {
    elsewhere(move || shared.put_boot_source(source)).await?
}
