//! `/fork`.

use axum::extract::State;

use crate::body::LongJson;
use crate::fault::Fault;
use crate::instance::{Instance, Shared};
use crate::types::fork::{ForkParams, Forked};

/// Makes copies of the machine, each of which is a process of its own. The machine is halted until its memory
/// is frozen. An error in one of the copies is said in its place, and leaves the others and the machine alone.
#[utoipa::path(post, path = "/fork", request_body = ForkParams,
    responses((status = 200, body = Forked)))]
pub async fn fork(
    State(shared): State<Shared>,
    LongJson(params): LongJson<ForkParams>,
) -> Result<axum::Json<Forked>, Fault> {
    Instance::fork(shared, params).await.map(axum::Json)
}
