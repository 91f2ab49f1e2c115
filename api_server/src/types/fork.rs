//! `/fork`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::fork::{Child, Outcome};
use vmm::machine::Shape;
use vmm::snapshot::Overrides;

use super::snapshot::{DriveOverride, NetworkOverride, VsockOverride};

/// What a child has otherwise than its parent.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkOverrides {
    /// Its name. Without one it is called like its parent, with a number.
    #[serde(default)]
    pub name: Option<String>,
    /// Other interfaces for network cards.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// The network namespace, a file, in which it opens its interfaces.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub netns: Option<PathBuf>,
    /// Another socket for the socket device. Without one it is beside the parent's, with the child's name
    /// behind it, and the guest's address is the child's process id.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// Other files for disks.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// A file for what the guest writes to its serial port. Without one that goes nowhere.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
}

/// `/fork`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkParams {
    /// How many.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 10000)]
    pub count: u32,
    /// What each has otherwise, in order; those behind the last have nothing otherwise.
    #[serde(default)]
    pub overrides: Vec<ForkOverrides>,
    /// Leave the machine halted, as it was copied.
    #[serde(default)]
    pub template: bool,
    /// Leave the children halted.
    #[serde(default)]
    pub paused: bool,
    /// The socket of the process that makes them, if it is not the pool of this runtime directory.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub pool: Option<PathBuf>,
}

fn one() -> u32 {
    1
}

impl ForkParams {
    /// What each child of a machine of this shape is to be.
    pub fn children(&self, shape: Shape) -> Vec<Child> {
        let child = |n: u32| {
            let wish = self.overrides.get(n as usize).cloned().unwrap_or_default();
            let net = |net: NetworkOverride| (net.iface_id, net.host_dev_name);
            let disk = |disk: DriveOverride| (disk.drive_id, disk.path_on_host);
            let (vsock, cid) =
                wish.vsock_override.map(|vsock| (vsock.uds_path, vsock.guest_cid)).unzip();
            Child {
                name: wish.name,
                shape,
                named_by_number: false,
                overrides: Overrides {
                    nets: wish.network_overrides.into_iter().map(net).collect(),
                    disks: wish.drive_overrides.into_iter().map(disk).collect(),
                    vsock,
                    cid: cid.flatten(),
                },
                console: wish.serial_out_path,
                netns: wish.netns,
                resume: !self.paused,
                number: n + 1,
                of: self.count,
            }
        };
        (0..self.count).map(child).collect()
    }
}

/// What became of a child: either it runs, or there is a reason.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ForkedChild {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The socket of its API.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub api_sock: Option<PathBuf>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_message: Option<String>,
}

impl From<Outcome> for ForkedChild {
    fn from(outcome: Outcome) -> ForkedChild {
        match outcome {
            Ok(born) => ForkedChild {
                name: Some(born.name),
                pid: Some(born.pid),
                api_sock: Some(born.api),
                fault_message: None,
            },
            Err(why) => ForkedChild { fault_message: Some(why), ..ForkedChild::default() },
        }
    }
}

/// What became of a fork.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Forked {
    /// The children, in order.
    pub children: Vec<ForkedChild>,
    /// How long the machine was halted, in microseconds.
    pub pause_us: u64,
    /// Bytes of memory that had to be copied for it.
    pub copied_bytes: u64,
}
