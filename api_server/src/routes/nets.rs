//! `/network-interfaces`.

use axum::extract::State;

use crate::body::{Id, Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::Shared;
use crate::types::check_ids;
use crate::types::net::{NetworkInterface, PartialNetworkInterface};

/// All network cards.
#[utoipa::path(get, path = "/network-interfaces",
    responses((status = 200, body = Vec<NetworkInterface>)))]
pub async fn list(State(shared): State<Shared>, _: Nothing) -> Found<Vec<NetworkInterface>> {
    Ok(axum::Json(shared.config().net.iter().map(Into::into).collect()))
}

/// A network card.
#[utoipa::path(get, path = "/network-interfaces/{iface_id}", params(("iface_id" = String, Path)),
    responses((status = 200, body = NetworkInterface)))]
pub async fn get(State(shared): State<Shared>, Id(id): Id, _: Nothing) -> Found<NetworkInterface> {
    let config = shared.config();
    let net = config.net.iter().find(|net| net.id.as_deref() == Some(&id));
    net.map(|net| axum::Json(net.into())).ok_or_else(|| unknown(&id))
}

/// Adds a network card, or replaces the one with this id. Before the start only.
#[utoipa::path(put, path = "/network-interfaces/{iface_id}", params(("iface_id" = String, Path)),
    request_body = NetworkInterface, responses((status = 204)))]
pub async fn put(
    State(shared): State<Shared>,
    Id(id): Id,
    Json(interface): Json<NetworkInterface>,
) -> Done {
    check_ids(&id, &interface.iface_id)?;
    shared.put_net(interface.into())
}

/// Changes the limits of a network card of a running machine.
#[utoipa::path(patch, path = "/network-interfaces/{iface_id}",
    params(("iface_id" = String, Path)), request_body = PartialNetworkInterface,
    responses((status = 204)))]
pub async fn patch(
    State(shared): State<Shared>,
    Id(id): Id,
    Json(interface): Json<PartialNetworkInterface>,
) -> Done {
    check_ids(&id, &interface.iface_id)?;
    shared.patch_net(interface).await
}

fn unknown(id: &str) -> Fault {
    Fault::bad(format!("There is no network interface with the id {id}."))
}
