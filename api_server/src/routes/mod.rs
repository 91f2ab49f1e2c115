//! What can be asked for, by path.

pub mod balloon;
pub mod boot;
pub mod cpu;
pub mod drives;
pub mod fork;
pub mod info;
pub mod machine;
pub mod mmds;
pub mod nets;
pub mod observe;
pub mod small;
pub mod snapshot;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, patch, post, put};

use crate::fault::Fault;
use crate::instance::Shared;

/// All routes.
pub fn router(shared: Shared) -> Router {
    Router::new()
        .route("/", get(info::instance))
        .route("/version", get(info::version))
        .route("/openapi.json", get(info::openapi))
        .route("/vm", patch(small::set_state))
        .route("/vm/config", get(info::full))
        .route("/actions", put(small::act))
        .route("/boot-source", get(boot::get).put(boot::put))
        .route("/cpu-config", get(cpu::get).put(cpu::put))
        .route("/machine-config", get(machine::get).put(machine::put).patch(machine::patch))
        .route("/drives", get(drives::list).put(drives::no_id).patch(drives::no_id))
        .route("/drives/{drive_id}", get(drives::get).put(drives::put).patch(drives::patch))
        .route("/network-interfaces", get(nets::list).put(drives::no_id).patch(drives::no_id))
        .route("/network-interfaces/{iface_id}", get(nets::get).put(nets::put).patch(nets::patch))
        .route("/balloon", get(balloon::get).put(balloon::put).patch(balloon::patch))
        .route("/balloon/statistics", get(balloon::statistics).patch(balloon::patch_statistics))
        .route("/balloon/hinting/start", patch(small::later))
        .route("/balloon/hinting/stop", patch(small::later))
        .route("/balloon/hinting/status", get(small::later))
        .route("/metrics", get(observe::metrics).put(observe::put_metrics))
        .route("/metrics/prometheus", get(observe::prometheus))
        .route("/events", get(observe::events))
        .route("/mmds", get(mmds::get).put(mmds::put).patch(mmds::patch))
        .route("/mmds/config", get(mmds::config).put(mmds::put_config))
        .route("/logger", get(small::logger).put(small::put_logger))
        .route("/serial", get(small::serial).put(small::put_serial))
        .route("/vsock", get(small::vsock).put(small::put_vsock))
        .route("/entropy", get(small::entropy).put(small::put_entropy))
        .route("/snapshot/create", put(snapshot::create))
        .route("/snapshot/load", put(snapshot::load))
        .route("/fork", post(fork::fork))
        .route("/pmem/{id}", put(small::later).patch(small::later))
        .route("/hotplug/memory", get(small::later).put(small::later).patch(small::later))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .with_state(shared)
}

async fn unknown_path(method: Method, uri: Uri) -> Fault {
    let path = uri.path();
    Fault::with_status(
        StatusCode::NOT_FOUND,
        format!("Invalid request method and/or path: {method} {path}: there is no such path."),
    )
}

async fn unknown_method(method: Method, uri: Uri) -> Fault {
    let path = uri.path();
    Fault::with_status(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("Invalid request method and/or path: {method} {path}: not with this method."),
    )
}

/// Resources by their first path segment, with the number of segments that mean something: clients
/// send more behind them, and mean the resource.
const MEANT: [(&str, usize); 12] = [
    ("actions", 1),
    ("boot-source", 1),
    ("cpu-config", 1),
    ("drives", 2),
    ("entropy", 1),
    ("logger", 1),
    ("machine-config", 1),
    ("network-interfaces", 2),
    ("pmem", 2),
    ("serial", 1),
    ("version", 1),
    ("vsock", 1),
];

/// Takes away what clients append to a path without meaning anything by it: a slash at the end, and
/// segments behind a resource that has none.
pub fn tolerate(mut request: Request) -> Request {
    let path = request.uri().path();
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let first = segments.first().copied().unwrap_or_default();
    let most = MEANT.iter().find(|(resource, _)| *resource == first).map(|(_, most)| *most);
    let kept = segments.get(..most.unwrap_or(segments.len()).min(segments.len()));
    let meant = format!("/{}", kept.unwrap_or_default().join("/"));
    if meant != path
        && let Ok(uri) = meant.parse()
    {
        *request.uri_mut() = uri;
    }
    request
}
