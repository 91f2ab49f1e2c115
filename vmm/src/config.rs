//! The one description of a machine.
//!
//! Command line, configuration file and API all become a [`VmConfig`]; each of them can say all of
//! it, and `hull run --print-config` prints it back. Field names here are the keys of the file and
//! of the `key=value` options. [`VmConfig::validate`] checks what can be checked without the host;
//! opening files and devices is the machine's business.

mod balloon;
mod console;
mod cpu;
mod disk;
mod memory;
mod mmds;
mod net;
mod rate;
mod values;
mod vsock;

use std::path::{Path, PathBuf};

use arch::interrupts::MAX_VIRTIO_DEVICES;
use serde::{Deserialize, Serialize};

pub use arch::template::{
    Bitmap, CpuidModifier, KvmCapability, MsrModifier, StaticTemplate, Template as CpuModifiers,
};
pub use balloon::BalloonConfig;
pub use console::{ConsoleConfig, ConsoleDevice, ConsoleMode};
pub use cpu::CpuConfig;
pub use disk::{CacheMode, DiskConfig, DiskFormat};
pub use memory::MemoryConfig;
pub use mmds::{MmdsConfig, MmdsVersion};
pub use net::NetConfig;
pub use rate::{RateLimit, TokenBucket};
pub use values::{ByteSize, HostAddress, MacAddress};
pub use vsock::VsockConfig;

use crate::seccomp;

/// Most vCPUs of a machine.
pub const MAX_CPUS: u32 = 64;
/// Most queues of a disk, and queue pairs of a network card.
pub const MAX_QUEUES: u16 = 16;

/// A whole machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// Name among the machines of this user; a name is made up if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// What a guest reset leads to.
    pub on_reboot: OnReboot,
    /// System call filters.
    pub seccomp: seccomp::Mode,
    /// Declare the keyboard controller to the guest.
    pub i8042: bool,
    /// A source of entropy for the guest (virtio-rng).
    pub rng: bool,
    /// Limit of what the source of entropy gives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng_rate: Option<RateLimit>,
    /// What is booted.
    pub kernel: KernelConfig,
    /// What the guest sees of the host's CPU.
    pub cpu: CpuConfig,
    /// RAM.
    pub memory: MemoryConfig,
    /// The guest's console.
    pub console: ConsoleConfig,
    /// Disks, in the order of their names in the guest: vda, vdb, …
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disk: Vec<DiskConfig>,
    /// Network cards, in the order of their names in the guest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Streams between the guest and programs of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Memory that the guest lends to the host (virtio-balloon).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Contents that the guest reads over its network card.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mmds: Option<MmdsConfig>,
}

impl Default for VmConfig {
    fn default() -> Self {
        VmConfig {
            name: None,
            cpus: 1,
            on_reboot: OnReboot::Exit,
            seccomp: seccomp::Mode::On,
            i8042: false,
            rng: false,
            rng_rate: None,
            kernel: KernelConfig::default(),
            cpu: CpuConfig::default(),
            memory: MemoryConfig::default(),
            console: ConsoleConfig::default(),
            disk: Vec::new(),
            net: Vec::new(),
            vsock: None,
            balloon: None,
            mmds: None,
        }
    }
}

/// What is booted and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct KernelConfig {
    /// ELF `vmlinux` or `bzImage`.
    pub path: PathBuf,
    /// Initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Added to the default command line, or all of it with `replace-cmdline`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Leave the default command line out.
    pub replace_cmdline: bool,
    /// Entry of the kernel.
    pub boot: BootMode,
    /// Start the kernel even if it is known not to come up on this machine.
    pub force: bool,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootMode {
    /// The 64-bit Linux entry of an ELF; a bzImage is unpacked to one.
    #[default]
    Auto,
    /// The PVH entry of an ELF.
    Pvh,
    /// The 64-bit entry of the bzImage itself, which unpacks itself and may randomise its address.
    Bzimage,
}

/// What a guest reset leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The machine stops, as it does when the guest powers off.
    #[default]
    Exit,
    /// The machine starts over.
    Restart,
}

/// A configuration that no machine can be made from: the field, its value, what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// Key of the field, e.g. `memory.size` or `disk[1].id`.
    pub field: String,
    /// The value and what is allowed.
    pub problem: String,
}

fn error<T>(field: impl Into<String>, problem: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError { field: field.into(), problem: problem.into() })
}

impl VmConfig {
    /// Checks everything that does not need the host.
    ///
    /// # Errors
    /// The first field that no machine can be made from.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.kernel.path.as_os_str().is_empty() {
            return error("kernel.path", "a machine needs a kernel");
        }
        self.validate_without_kernel()
    }

    /// As [`VmConfig::validate`], of a machine that may not have a kernel yet.
    ///
    /// # Errors
    /// The first field that no machine can be made from.
    pub fn validate_without_kernel(&self) -> Result<(), ConfigError> {
        if let Some(name) = &self.name {
            validate_name(name)?;
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return error("cpus", format!("{} is not between 1 and {MAX_CPUS}", self.cpus));
        }
        self.cpu.validate(self.cpus)?;
        if self.kernel.cmdline.as_ref().is_some_and(|text| text.contains('\0')) {
            return error("kernel.cmdline", "contains a NUL character");
        }
        self.memory.validate()?;
        if (self.console.mode == ConsoleMode::File) != self.console.path.is_some() {
            return error("console.path", "is needed with mode `file`, and only there");
        }
        if self.rng_rate.is_some() && !self.rng {
            return error("rng-rate", "there is no source of entropy to be limited");
        }
        self.validate_disks()?;
        self.validate_nets()?;
        self.vsock.as_ref().map_or(Ok(()), VsockConfig::validate)?;
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory.size)?;
        }
        if let Some(mmds) = &self.mmds {
            mmds.validate(self)?;
        }
        self.validate_device_count()
    }

    fn validate_device_count(&self) -> Result<(), ConfigError> {
        let disks = (0..self.disk.len()).map(|n| self.disk_name(n));
        let nets = (0..self.net.len()).map(|n| self.net_name(n));
        let vsock = self.vsock.as_ref().map(|_| "vsock".to_owned());
        let rng = self.rng.then(|| "rng".to_owned());
        let balloon = self.balloon.as_ref().map(|_| "balloon".to_owned());
        let console = (self.console.device == ConsoleDevice::Virtio
            && self.console.mode != ConsoleMode::Off)
            .then(|| "console".to_owned());
        let last = [vsock, rng, balloon].into_iter().flatten();
        match console.into_iter().chain(disks).chain(nets).chain(last).nth(MAX_VIRTIO_DEVICES) {
            None => Ok(()),
            Some(extra) => error(
                extra,
                format!("is one device too many: a machine has at most {MAX_VIRTIO_DEVICES}"),
            ),
        }
    }

    /// The files that the guest is made from: kernel, initial RAM disk, CPU template, disks.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let disks =
            self.disk.iter().flat_map(|disk| std::iter::once(&disk.path).chain(&disk.overlay));
        let files = std::iter::once(&self.kernel.path).chain(&self.kernel.initrd);
        files.chain(&self.cpu.config).chain(disks).map(PathBuf::as_path)
    }
}

fn validate_queues(queues: Option<u16>, field: impl FnOnce() -> String) -> Result<(), ConfigError> {
    match queues {
        Some(n) if !(1..=MAX_QUEUES).contains(&n) => {
            error(field(), format!("{n} is not between 1 and {MAX_QUEUES}"))
        }
        _ => Ok(()),
    }
}

/// Letters of the longest name of a machine.
pub const LONGEST_NAME: usize = 64;

/// Checks that `name` can name a machine: it becomes a file name in the runtime directory.
///
/// # Errors
/// Says what a name may look like.
pub fn validate_name(name: &str) -> Result<(), ConfigError> {
    let valid = (1..=LONGEST_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    if valid {
        return Ok(());
    }
    error(
        "name",
        format!(
            "{name:?} is not 1 to 64 letters, digits, '-', '_' or '.', starting with a letter or digit"
        ),
    )
}

#[cfg(test)]
mod tests;
