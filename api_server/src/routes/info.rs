//! `/`, `/version`, `/vm/config`.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::body::Nothing;
use crate::fault::{Fault, Found};
use crate::instance::Shared;
use crate::types::cpu::CpuConfig;
use crate::types::info::{FirecrackerVersion, FullVmConfiguration, InstanceInfo};
use crate::types::serial::SerialDevice;
use crate::types::small::EntropyDevice;

/// What [`openapi`] serves; a test sees to it that it is what the types and routes say.
pub const DESCRIPTION: &str = include_str!("../../../docs/openapi.json");

/// What runs here, and in which state it is.
#[utoipa::path(get, path = "/", responses((status = 200, body = InstanceInfo)))]
pub async fn instance(State(shared): State<Shared>, _: Nothing) -> Found<InstanceInfo> {
    let program = shared.program();
    Ok(Json(InstanceInfo {
        id: shared.id(),
        state: shared.state().await,
        vmm_version: program.version,
        app_name: program.name,
    }))
}

/// The version of the API.
#[utoipa::path(get, path = "/version", responses((status = 200, body = FirecrackerVersion)))]
pub async fn version(State(shared): State<Shared>, _: Nothing) -> Found<FirecrackerVersion> {
    Ok(Json(FirecrackerVersion { firecracker_version: shared.program().api_version }))
}

/// Everything that is configured.
#[utoipa::path(get, path = "/vm/config", responses((status = 200, body = FullVmConfiguration)))]
pub async fn full(State(shared): State<Shared>, _: Nothing) -> Found<FullVmConfiguration> {
    let config = shared.config();
    Ok(Json(FullVmConfiguration {
        boot_source: (&config.kernel).into(),
        drives: config.disk.iter().map(Into::into).collect(),
        logger: shared.logger(),
        metrics: shared.metrics(),
        cpu_config: CpuConfig::inline(&config),
        machine_config: (&config).into(),
        network_interfaces: config.net.iter().map(Into::into).collect(),
        balloon: config.balloon.as_ref().map(Into::into),
        vsock: config.vsock.as_ref().map(Into::into),
        entropy: EntropyDevice::of(&config),
        serial: SerialDevice::of(&config.console),
        mmds_config: config.mmds.as_ref().map(Into::into),
    }))
}

/// The description of this API.
#[utoipa::path(get, path = "/openapi.json",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub async fn openapi(_: Nothing) -> Result<Response, Fault> {
    let json = [(header::CONTENT_TYPE, "application/json")];
    Ok((json, DESCRIPTION).into_response())
}
