//! `/fork`.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;
use vmm::config::{ConfigError, HostAddress, MacAddress, VmConfig};
use vmm::fork::{Child, Outcome};
use vmm::hook::{Addresses, Hook};
use vmm::snapshot::Overrides;

use super::mmds::json_len;
use super::snapshot::{DriveOverride, NetworkOverride, VsockOverride, of_cards};
use crate::fault::{Fault, chain};

/// Most children of one request.
const MOST: u32 = 10_000;
/// Most milliseconds that one may take to run.
const LONGEST: u64 = 600_000;

/// What a child has otherwise than its parent.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkOverrides {
    /// Its name. Without one it is called like its parent, with a number.
    #[serde(default)]
    pub name: Option<String>,
    /// Other interfaces and addresses for network cards.
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
    /// Files for disks that the guest writes: one that is there is what the child has instead, where nothing is
    /// the child's copy is made. Without one the copy is beside the parent's, with the child's name behind it.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// A file for what the guest writes to its serial port. Without one that goes nowhere.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
    /// What its metadata service has to say at first. Without it, it has nothing to say until somebody puts it there.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// Have a program in the guest told that it is a copy, and wait until it says that it is ready.
    #[serde(default)]
    pub hook: Option<ForkHook>,
}

/// What a program that listens in the guest is told over the socket device.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkHook {
    /// The port on which it listens; 1024 if nothing is said.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 4_294_967_294u64)]
    pub port: Option<u32>,
    /// How long it may take, in milliseconds; 5000 if nothing is said.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 600_000)]
    pub timeout_ms: Option<u64>,
    /// The guest's host name from then on.
    #[serde(default)]
    pub hostname: Option<String>,
    /// Other addresses for network cards.
    #[serde(default)]
    pub addresses: Vec<CardAddresses>,
}

/// Addresses that a guest gives one of its network cards.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CardAddresses {
    /// The card.
    pub iface_id: String,
    /// Its MAC address, which the card itself has as well.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub guest_mac: Option<MacAddress>,
    /// Its address and how long the network's part of it is, as in 172.30.0.2/30.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub ip: Option<HostAddress>,
    /// Where everything else is reached.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub gateway: Option<Ipv4Addr>,
}

impl From<ForkHook> for Hook {
    fn from(asked: ForkHook) -> Hook {
        let default = Hook::default();
        let card = |card: CardAddresses| Addresses {
            card: card.iface_id,
            mac: card.guest_mac,
            ip: card.ip,
            gateway: card.gateway,
        };
        Hook {
            port: asked.port.unwrap_or(default.port),
            timeout_ms: asked.timeout_ms.unwrap_or(default.timeout_ms),
            hostname: asked.hostname,
            nets: asked.addresses.into_iter().map(card).collect(),
        }
    }
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
    /// The folder for copies of disks; else they are made where the disks are.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub drives_dir: Option<PathBuf>,
    /// Copies of disks are removed when their machine ends.
    #[serde(default)]
    pub temporary_drives: bool,
    /// The socket of the process that makes them, if it is not the pool of this runtime directory.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub pool: Option<PathBuf>,
    /// How long a child may take to run, in milliseconds; the time of its hook comes on top. If one is late and there was
    /// not a word of any since it was asked for, the others are not asked for any more.
    #[serde(default = "a_minute")]
    #[schema(minimum = 1, maximum = 600_000)]
    pub timeout_ms: u64,
}

fn one() -> u32 {
    1
}

fn a_minute() -> u64 {
    60_000
}

impl ForkParams {
    /// What each child of the machine of `config` is to be, with so many bytes of metadata at most.
    ///
    /// # Errors
    /// There can be none of that.
    pub fn children(&self, config: &VmConfig, metadata: usize) -> Result<Vec<Child>, Fault> {
        if !(1..=MOST).contains(&self.count) {
            return Err(Fault::bad(format!("count: between 1 and {MOST} children are made.")));
        }
        if self.overrides.len() > self.count as usize {
            return Err(Fault::bad("overrides: there are more of them than children."));
        }
        if !(1..=LONGEST).contains(&self.timeout_ms) {
            return Err(Fault::bad(format!("timeout_ms: between 1 and {LONGEST} can be waited.")));
        }
        let children = self.wanted(config)?;
        // Those behind them are as those that have a name only.
        for (n, child) in children.iter().enumerate().take(self.overrides.len()) {
            let checked = child.validate(config);
            checked.map_err(|error| Fault::bad(format!("overrides[{n}].{}.", chain(&error))))?;
            let len = child.metadata.as_ref().map(json_len);
            if let Some(len) = len.filter(|len| *len > metadata) {
                let message = format!(
                    "overrides[{n}].metadata: {len} bytes of metadata are more than the limit of {metadata}."
                );
                return Err(Fault::with_status(StatusCode::PAYLOAD_TOO_LARGE, message));
            }
            if self.paused && child.hook.is_some() {
                return Err(Fault::bad("hook: children that are left halted answer nobody."));
            }
        }
        Ok(children)
    }

    fn wanted(&self, config: &VmConfig) -> Result<Vec<Child>, Fault> {
        // Nobody makes a file for a disk that is only read.
        let is_written = |name: &str| {
            (0..config.disk.len()).all(|n| config.disk_name(n) != name || !config.disk[n].ro)
        };
        let child = |n: u32| -> Result<Child, ConfigError> {
            let wish = self.overrides.get(n as usize).cloned().unwrap_or_default();
            let disk = |disk: DriveOverride| (disk.drive_id, disk.path_on_host);
            let (copies, disks) = wish.drive_overrides.into_iter().map(disk).partition(
                |(name, path): &(String, PathBuf)| {
                    is_written(name) && path.symlink_metadata().is_err()
                },
            );
            let (vsock, cid) =
                wish.vsock_override.map(|vsock| (vsock.uds_path, vsock.guest_cid)).unzip();
            let cards = of_cards(&wish.network_overrides)?;
            let mut overrides = Overrides { disks, vsock, cid: cid.flatten(), ..cards };
            let mut hook = wish.hook.map(Hook::from);
            overrides.agree(hook.as_mut())?;
            Ok(Child {
                name: wish.name,
                named_by_number: false,
                overrides,
                copies,
                folder: self.drives_dir.clone(),
                temporary: self.temporary_drives,
                console: wish.serial_out_path,
                netns: wish.netns,
                resume: !self.paused,
                metadata: wish.metadata,
                hook,
                number: n + 1,
                of: self.count,
            })
        };
        let child =
            |n| child(n).map_err(|error| Fault::bad(format!("overrides[{n}].{}.", chain(&error))));
        (0..self.count).map(child).collect()
    }
}

/// A disk, and its file from then on.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ForkedDrive {
    /// The disk.
    pub drive_id: String,
    /// The file that the guest's writes go to.
    #[schema(value_type = String)]
    pub path_on_host: PathBuf,
}

impl From<(String, PathBuf)> for ForkedDrive {
    fn from((drive_id, path_on_host): (String, PathBuf)) -> ForkedDrive {
        ForkedDrive { drive_id, path_on_host }
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
    /// Files of the copies of disks that it has.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<ForkedDrive>,
    /// Whether its guest said that it is ready, if it was to be told that it is a copy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready: Option<bool>,
    /// How long that took from before its first instruction, in microseconds; or how long it was waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_us: Option<u64>,
    /// Why its guest is not ready. It runs all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_ready: Option<String>,
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
                drives: born.disks.into_iter().map(Into::into).collect(),
                ready: born.hook.as_ref().map(|hook| hook.fault.is_none()),
                ready_us: born.hook.as_ref().map(|hook| hook.us),
                not_ready: born.hook.and_then(|hook| hook.fault),
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
    /// Disks of the machine itself on which children stand now, and where its guest's writes go since.
    pub drives: Vec<ForkedDrive>,
}
