//! `/balloon`.

use axum::extract::State;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Found};
use crate::instance::{Shared, no_balloon};
use crate::types::balloon::{Balloon, BalloonStats, BalloonStatsUpdate, BalloonUpdate};

/// The balloon as it is configured.
#[utoipa::path(get, path = "/balloon", responses((status = 200, body = Balloon)))]
pub async fn get(State(shared): State<Shared>, _: Nothing) -> Found<Balloon> {
    let config = shared.config();
    let balloon = config.balloon.as_ref();
    balloon.map(|balloon| axum::Json(balloon.into())).ok_or_else(no_balloon)
}

/// Gives the guest a balloon. Before the start only.
#[utoipa::path(put, path = "/balloon", request_body = Balloon, responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, Json(balloon): Json<Balloon>) -> Done {
    shared.put_balloon(balloon)
}

/// Gives the balloon of a running machine another size.
#[utoipa::path(patch, path = "/balloon", request_body = BalloonUpdate, responses((status = 204)))]
pub async fn patch(State(shared): State<Shared>, Json(update): Json<BalloonUpdate>) -> Done {
    shared.patch_balloon(update).await
}

/// How the balloon of a running machine stands, and what the guest said last about its memory.
#[utoipa::path(get, path = "/balloon/statistics", responses((status = 200, body = BalloonStats)))]
pub async fn statistics(State(shared): State<Shared>, _: Nothing) -> Found<BalloonStats> {
    shared.balloon_statistics().await.map(axum::Json)
}

/// Asks the guest of a running machine more or less often.
#[utoipa::path(patch, path = "/balloon/statistics", request_body = BalloonStatsUpdate,
    responses((status = 204)))]
pub async fn patch_statistics(
    State(shared): State<Shared>,
    Json(update): Json<BalloonStatsUpdate>,
) -> Done {
    shared.patch_balloon_statistics(update).await
}
