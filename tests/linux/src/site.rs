//! Where the things under test are, and what no two tests may share.

use std::env;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::guest::Failure;

/// The binary under test, and a directory with
///
/// - `cloud.vmlinuz`, `cloud.vmlinux`, `cloud.initramfs`: Debian's cloud kernel,
/// - `generic.vmlinuz`, `generic.initramfs`: Debian's generic kernel,
/// - `hooked.initramfs`: the same with `/bin/guest-hook`,
/// - `root.ext4`: the root disk of `resources/rootdisk`,
/// - `e2fsck`: statically linked.
pub struct Site {
    /// The `hull` binary.
    pub hull: PathBuf,
    /// Of `parts` parts of the tests, this program runs the one of index `part`.
    pub part: usize,
    /// At least 1.
    pub parts: usize,
    guests: PathBuf,
    networks: AtomicU8,
}

impl Site {
    /// Reads `HULL`, `GUESTS` and `PART`.
    pub fn from_environment() -> Result<Site, Failure> {
        let path = |name: &str| {
            let value = env::var_os(name).ok_or(format!("{name} is not set; see tests/run"))?;
            std::fs::canonicalize(&value).map_err(|error| format!("{name}={value:?}: {error}"))
        };
        let part = env::var("PART").unwrap_or_else(|_| "1/1".to_owned());
        let (part, parts) = part
            .split_once('/')
            .and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)))
            .filter(|&(part, parts): &(usize, usize)| (1..=parts).contains(&part))
            .ok_or_else(|| format!("PART={part}: not a part like 1/3"))?;
        Ok(Site {
            hull: path("HULL")?,
            part: part - 1,
            parts,
            guests: path("GUESTS")?,
            networks: AtomicU8::new(0),
        })
    }

    /// The path of a kernel or an image.
    pub fn file(&self, name: &str) -> PathBuf {
        self.guests.join(name)
    }

    /// A network of four addresses that no other test uses.
    pub fn network(&self) -> Network {
        Network(self.networks.fetch_add(1, Ordering::Relaxed))
    }
}

/// `172.30.N.0/30`: the host is `.1`, the guest `.2`.
#[derive(Clone, Copy)]
pub struct Network(u8);

impl Network {
    /// The host's address.
    pub fn host(self) -> String {
        format!("172.30.{}.1", self.0)
    }

    /// The guest's address, as [`Network::cmdline`] gives it.
    pub fn guest(self) -> String {
        format!("172.30.{}.2", self.0)
    }

    /// Hull's `--net` value; `more` is further `,key=value`.
    pub fn option(self, more: &str) -> String {
        format!("tap,host={}/30{more}", self.host())
    }

    /// The words of the kernel command line that configure the guest's side.
    pub fn cmdline(self) -> String {
        format!("hull.ip={}/30 hull.gw={}", self.guest(), self.host())
    }
}
