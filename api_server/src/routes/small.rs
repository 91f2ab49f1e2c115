//! Resources of a field or two.

use axum::extract::State;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::Shared;
use crate::types::small::{ActionType, EntropyDevice, InstanceActionInfo, Vm, WantedState};

/// Does something at once.
#[utoipa::path(put, path = "/actions", request_body = InstanceActionInfo,
    responses((status = 204)))]
pub async fn act(State(shared): State<Shared>, Json(info): Json<InstanceActionInfo>) -> Done {
    match info.action_type {
        ActionType::InstanceStart => shared.start().await,
        ActionType::FlushMetrics | ActionType::SendCtrlAltDel => {
            shared.handle()?;
            Err(Fault::bad("not yet"))
        }
    }
}

/// Halts a running machine, or lets it go on.
#[utoipa::path(patch, path = "/vm", request_body = Vm, responses((status = 204)))]
pub async fn set_state(State(shared): State<Shared>, Json(vm): Json<Vm>) -> Done {
    shared.set_paused(vm.state == WantedState::Paused).await
}

/// The source of entropy.
#[utoipa::path(get, path = "/entropy", responses((status = 200, body = EntropyDevice)))]
pub async fn entropy(State(shared): State<Shared>, _: Nothing) -> Found<EntropyDevice> {
    if shared.config().rng {
        return Ok(axum::Json(EntropyDevice::default()));
    }
    Err(Fault::bad("There is no entropy device."))
}

/// Gives the guest a source of entropy. Before the start only.
#[utoipa::path(put, path = "/entropy", request_body = EntropyDevice, responses((status = 204)))]
pub async fn put_entropy(State(shared): State<Shared>, Json(_device): Json<EntropyDevice>) -> Done {
    shared.configure(|config| {
        config.rng = true;
        Ok(())
    })
}
