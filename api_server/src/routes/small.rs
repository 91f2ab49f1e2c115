//! Resources of a field or two.

use axum::extract::State;
use axum::http::Uri;

use crate::body::{Json, Nothing};
use vmm::machine::Command;

use crate::fault::{DONE, Done, Fault, Found};
use crate::instance::{Shared, elsewhere, send};
use crate::types::serial::SerialDevice;
use crate::types::small::{ActionType, EntropyDevice, InstanceActionInfo, Logger, Vm, WantedState};
use crate::types::vsock::Vsock;

/// Does something at once.
#[utoipa::path(put, path = "/actions", request_body = InstanceActionInfo,
    responses((status = 204)))]
pub async fn act(State(shared): State<Shared>, Json(info): Json<InstanceActionInfo>) -> Done {
    match info.action_type {
        ActionType::InstanceStart => shared.start().await,
        ActionType::PowerButton => {
            send(&shared.handle()?, Command::PowerButton).await.map(|_| DONE)
        }
        ActionType::Quit => shared.quit(),
        ActionType::SendCtrlAltDel => {
            send(&shared.handle()?, Command::CtrlAltDel).await.map(|_| DONE)
        }
        ActionType::FlushMetrics => elsewhere(move || shared.flush_metrics()).await?,
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
    EntropyDevice::of(&shared.config())
        .map(axum::Json)
        .ok_or_else(|| Fault::bad("There is no entropy device."))
}

/// Gives the guest a source of entropy. Before the start only.
#[utoipa::path(put, path = "/entropy", request_body = EntropyDevice, responses((status = 204)))]
pub async fn put_entropy(State(shared): State<Shared>, Json(device): Json<EntropyDevice>) -> Done {
    shared.put_entropy(device)
}

/// The streams between guest and host.
#[utoipa::path(get, path = "/vsock", responses((status = 200, body = Vsock)))]
pub async fn vsock(State(shared): State<Shared>, _: Nothing) -> Found<Vsock> {
    let config = shared.config();
    let vsock = config.vsock.as_ref().ok_or_else(|| Fault::bad("There is no vsock device."))?;
    Ok(axum::Json(vsock.into()))
}

/// Gives the guest streams to programs of the host. Before the start only.
#[utoipa::path(put, path = "/vsock", request_body = Vsock, responses((status = 204)))]
pub async fn put_vsock(State(shared): State<Shared>, Json(vsock): Json<Vsock>) -> Done {
    shared.put_vsock(vsock)
}

/// The serial port.
#[utoipa::path(get, path = "/serial", responses((status = 200, body = SerialDevice)))]
pub async fn serial(State(shared): State<Shared>, _: Nothing) -> Found<SerialDevice> {
    Ok(axum::Json(SerialDevice::of(&shared.config().console)))
}

/// Says where the output of the serial port is written, and how much of it. Before the start only.
#[utoipa::path(put, path = "/serial", request_body = SerialDevice, responses((status = 204)))]
pub async fn put_serial(State(shared): State<Shared>, Json(serial): Json<SerialDevice>) -> Done {
    shared.put_serial(serial)
}

/// What Firecracker has and Hull has not yet.
pub async fn later(uri: Uri) -> Fault {
    Fault::bad(format!("{}: this is not supported yet.", uri.path()))
}

/// What was last asked of the log.
#[utoipa::path(get, path = "/logger", responses((status = 200, body = Logger)))]
pub async fn logger(State(shared): State<Shared>, _: Nothing) -> Found<Logger> {
    Ok(axum::Json(shared.logger().unwrap_or_default()))
}

/// Says what is logged, where, and how. Before the start only.
#[utoipa::path(put, path = "/logger", request_body = Logger, responses((status = 204)))]
pub async fn put_logger(State(shared): State<Shared>, Json(logger): Json<Logger>) -> Done {
    elsewhere(move || shared.put_logger(logger)).await?
}
