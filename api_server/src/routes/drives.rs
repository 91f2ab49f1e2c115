//! `/drives`.

use axum::extract::State;
use vmm::config::DiskConfig;

use crate::body::{Id, Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::{Shared, elsewhere};
use crate::types::check_ids;
use crate::types::drive::{Drive, PartialDrive};

/// All disks.
#[utoipa::path(get, path = "/drives", responses((status = 200, body = Vec<Drive>)))]
pub async fn list(State(shared): State<Shared>, _: Nothing) -> Found<Vec<Drive>> {
    Ok(axum::Json(shared.config().disk.iter().map(Into::into).collect()))
}

/// That there is no id in the path.
pub async fn no_id() -> Fault {
    Fault::bad("The ID cannot be empty.")
}

/// A disk.
#[utoipa::path(get, path = "/drives/{drive_id}", params(("drive_id" = String, Path)),
    responses((status = 200, body = Drive)))]
pub async fn get(State(shared): State<Shared>, Id(id): Id, _: Nothing) -> Found<Drive> {
    let config = shared.config();
    let disk = config.disk.iter().find(|disk| disk.id.as_deref() == Some(&id));
    disk.map(|disk| axum::Json(disk.into())).ok_or_else(|| unknown(&id))
}

/// Adds a disk, or replaces the one with this id. Before the start only.
#[utoipa::path(put, path = "/drives/{drive_id}", params(("drive_id" = String, Path)),
    request_body = Drive, responses((status = 204)))]
pub async fn put(State(shared): State<Shared>, Id(id): Id, Json(drive): Json<Drive>) -> Done {
    check_ids(&id, &drive.drive_id)?;
    let disk = DiskConfig::try_from(drive)?;
    elsewhere(move || shared.put_drive(disk)).await?
}

/// Changes a disk of a running machine.
#[utoipa::path(patch, path = "/drives/{drive_id}", params(("drive_id" = String, Path)),
    request_body = PartialDrive, responses((status = 204)))]
pub async fn patch(
    State(shared): State<Shared>,
    Id(id): Id,
    Json(drive): Json<PartialDrive>,
) -> Done {
    check_ids(&id, &drive.drive_id)?;
    shared.patch_drive(drive).await
}

fn unknown(id: &str) -> Fault {
    Fault::bad(format!("There is no drive with the id {id}."))
}
