//! What Firecracker's clients send and expect, and how it becomes a [`VmConfig`] and comes back from
//! one. A machine's configuration is kept as a `VmConfig` alone; nothing in here lives longer than a
//! request.
//!
//! [`VmConfig`]: vmm::config::VmConfig

pub mod balloon;
pub mod boot;
pub mod cpu;
pub mod drive;
pub mod fork;
pub mod info;
pub mod machine;
pub mod metrics;
pub mod mmds;
pub mod net;
pub mod rate;
pub mod serial;
pub mod small;
pub mod snapshot;
pub mod vsock;

use crate::fault::Fault;

/// Checks an id of a drive or an interface: it may become part of a name.
///
/// # Errors
/// It is empty, too long, or contains something else than letters, digits and `_`.
pub fn check_id(id: &str) -> Result<(), Fault> {
    if id.is_empty() {
        return Err(Fault::bad("The ID cannot be empty."));
    }
    if !id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return Err(Fault::bad(format!(
            "API Resource IDs can only contain alphanumeric characters and underscores: {id:?}."
        )));
    }
    Ok(())
}

/// Checks that the id in the path is the one in the body.
///
/// # Errors
/// It is not, or is no id.
pub fn check_ids(path: &str, body: &str) -> Result<(), Fault> {
    check_id(path)?;
    if path == body {
        return Ok(());
    }
    Err(Fault::bad(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    )))
}
