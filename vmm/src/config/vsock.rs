//! The socket device of a machine.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use devices::virtio::vsock::{FIRST_CID, LAST_CID, LONGEST_PATH};
use serde::{Deserialize, Serialize};

use super::{ConfigError, error};

/// Streams between the guest and programs of the host (virtio-vsock).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VsockConfig {
    /// Unix socket that programs of the host connect to, at most 96 bytes long. With `_PORT` behind it,
    /// a socket that one of them listens on for the guest.
    pub path: PathBuf,
    /// The guest's address (CID), 3 to 4294967294.
    #[serde(default = "first_cid")]
    pub cid: u64,
    /// The socket's file stays when the machine ends, as Firecracker's clients expect. It is removed
    /// otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}

fn first_cid() -> u64 {
    FIRST_CID
}

impl VsockConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let path = self.path.as_os_str();
        if path.is_empty() {
            return error("vsock.path", "a socket device needs a socket's path");
        }
        if path.as_bytes().contains(&0) {
            return error("vsock.path", "contains a NUL character");
        }
        if path.len() > LONGEST_PATH {
            let problem = format!(
                "{} has {} bytes; a socket's path has at most {LONGEST_PATH} here, so that `_` and a \
                 port fit behind it",
                self.path.display(),
                path.len()
            );
            return error("vsock.path", problem);
        }
        if !(FIRST_CID..=LAST_CID).contains(&self.cid) {
            let problem = format!("{} is not between {FIRST_CID} and {LAST_CID}", self.cid);
            return error("vsock.cid", problem);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(path: &str, cid: u64) -> String {
        VsockConfig { path: path.into(), cid, keep: false }.validate().unwrap_err().to_string()
    }

    #[test]
    fn addresses_and_paths_have_limits() {
        let valid =
            |path: &str, cid| VsockConfig { path: path.into(), cid, keep: false }.validate();
        assert_eq!(valid("/run/v.sock", 3), Ok(()));
        assert_eq!(valid(&"x".repeat(96), 0xffff_fffe), Ok(()));
        assert!(problem(&"x".repeat(97), 3).starts_with("vsock.path: "));
        assert!(problem("", 3).starts_with("vsock.path: "));
        assert!(problem("a\0b", 3).starts_with("vsock.path: "));
        for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
            assert_eq!(
                problem("x", cid),
                format!("vsock.cid: {cid} is not between 3 and 4294967294")
            );
        }
    }

    #[test]
    fn only_the_path_has_to_be_said() {
        let config: VsockConfig = serde_json::from_str(r#"{"path": "v.sock"}"#).unwrap();
        assert_eq!(config, VsockConfig { path: "v.sock".into(), cid: 3, keep: false });
        assert!(serde_json::from_str::<VsockConfig>(r#"{"cid": 3}"#).is_err());
        assert!(serde_json::from_str::<VsockConfig>(r#"{"path": "v", "port": 3}"#).is_err());
    }
}
