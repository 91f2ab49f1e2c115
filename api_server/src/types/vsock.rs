//! `/vsock`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::VsockConfig;

/// Streams between the guest and programs of the host.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address, from 3.
    #[schema(minimum = 3, maximum = 4_294_967_294u64)]
    pub guest_cid: u64,
    /// Unix socket that programs of the host connect to. With `_PORT` behind it, one that they listen
    /// on for the guest.
    #[schema(value_type = String)]
    pub uds_path: PathBuf,
    /// Deprecated, and without a meaning.
    #[serde(default, skip_serializing)]
    pub vsock_id: Option<String>,
}

impl From<Vsock> for VsockConfig {
    fn from(vsock: Vsock) -> VsockConfig {
        VsockConfig { path: vsock.uds_path, cid: vsock.guest_cid, keep: false }
    }
}

impl From<&VsockConfig> for Vsock {
    fn from(vsock: &VsockConfig) -> Vsock {
        Vsock { guest_cid: vsock.cid, uds_path: vsock.path.clone(), vsock_id: None }
    }
}
