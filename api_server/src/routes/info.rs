//! `/`, `/version`, `/vm/config`.

use axum::Json;
use axum::extract::State;

use crate::body::Nothing;
use crate::fault::Found;
use crate::instance::Shared;
use crate::types::info::{FirecrackerVersion, FullVmConfiguration, InstanceInfo};
use crate::types::small::EntropyDevice;

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
        machine_config: (&config).into(),
        network_interfaces: config.net.iter().map(Into::into).collect(),
        balloon: config.balloon.as_ref().map(Into::into),
        vsock: config.vsock.as_ref().map(Into::into),
        entropy: EntropyDevice::of(&config),
    }))
}
