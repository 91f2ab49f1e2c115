//! `/cpu-config`.

use axum::extract::State;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Found};
use crate::instance::{Shared, elsewhere};
use crate::types::cpu::CpuConfig;

/// The CPU template that was put, or an empty one.
#[utoipa::path(get, path = "/cpu-config", responses((status = 200, body = CpuConfig)))]
pub async fn get(State(shared): State<Shared>, _: Nothing) -> Found<CpuConfig> {
    let config = shared.config();
    if config.cpu.config.is_none() {
        return CpuConfig::of(&config).map(axum::Json);
    }
    elsewhere(move || CpuConfig::of(&config)).await?.map(axum::Json)
}

/// Says what is changed of the CPU that the guest sees, in the place of `cpu_template` and of what was
/// put before. Before the start only.
#[utoipa::path(put, path = "/cpu-config", request_body = CpuConfig, responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, Json(cpu): Json<CpuConfig>) -> Done {
    shared.configure(|config| {
        cpu.put_into(config);
        Ok(())
    })
}
