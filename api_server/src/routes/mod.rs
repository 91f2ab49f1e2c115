//! What can be asked for, by path.

mod boot;
mod drives;
mod info;
mod machine;
mod nets;
mod small;

use axum::Router;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, patch, put};

use crate::fault::Fault;
use crate::instance::Shared;

/// All routes.
pub fn router(shared: Shared) -> Router {
    Router::new()
        .route("/", get(info::instance))
        .route("/version", get(info::version))
        .route("/vm", patch(small::set_state))
        .route("/vm/config", get(info::full))
        .route("/actions", put(small::act))
        .route("/boot-source", get(boot::get).put(boot::put))
        .route("/machine-config", get(machine::get).put(machine::put).patch(machine::patch))
        .route("/drives", get(drives::list))
        .route("/drives/{drive_id}", get(drives::get).put(drives::put).patch(drives::patch))
        .route("/network-interfaces", get(nets::list))
        .route("/network-interfaces/{iface_id}", get(nets::get).put(nets::put).patch(nets::patch))
        .route("/entropy", get(small::entropy).put(small::put_entropy))
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

/// Resources that are one path segment: clients send more behind it, and mean the resource.
const SINGLE: [&str; 6] =
    ["actions", "boot-source", "entropy", "machine-config", "version", "cpu-config"];

/// Takes away what clients append to a path without meaning anything by it: a slash at the end, and
/// segments behind a resource that has none.
pub fn tolerate(mut request: Request) -> Request {
    let path = request.uri().path();
    let mut segments = path.split('/').filter(|segment| !segment.is_empty());
    let first = segments.next().unwrap_or_default();
    let meant = if SINGLE.contains(&first) {
        format!("/{first}")
    } else {
        format!("/{}", path.trim_matches('/'))
    };
    if meant != path
        && let Ok(uri) = meant.parse()
    {
        *request.uri_mut() = uri;
    }
    request
}
