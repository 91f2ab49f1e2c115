//! The one description of a machine.
//!
//! Command line, configuration file and API all become a [`VmConfig`]; each of them can say all of
//! it, and `hull run --print-config` prints it back. Field names here are the keys of the file and
//! of the `key=value` options. [`VmConfig::validate`] checks what can be checked without the host;
//! opening files and devices is the machine's business.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use arch::interrupts::MAX_VIRTIO_DEVICES;
use arch::layout;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::memory::PAGE_SIZE;
use crate::seccomp;

/// Most vCPUs of a machine.
pub const MAX_CPUS: u32 = 64;
/// Most queues of a disk, and queue pairs of a network card.
pub const MAX_QUEUES: u16 = 16;
/// Largest packets of a network card: what IPv4 needs at least (RFC 791 § 3.2), and 64 KiB less an
/// Ethernet header, which is what Linux allows a TAP.
const MTU: std::ops::RangeInclusive<u16> = 68..=65_521;

/// A number of bytes; written `128M`, `2G` or as a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteSize, String> {
        let wrong = || format!("{text:?} is not a size; write 128M, 2G or a number of bytes");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = text[digits.len()..].to_ascii_uppercase();
        let shift =
            match unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit) {
                "" if unit.is_empty() => 0,
                letter => {
                    let known = Self::UNITS.iter().find(|(c, _)| letter.chars().eq([*c]));
                    known.ok_or_else(wrong)?.1
                }
            };
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Self::UNITS
            .iter()
            .rev()
            .find(|&&(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"128M\", \"2G\" or a number of bytes")
            }

            fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(value))
            }

            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<ByteSize, E> {
                u64::try_from(value).map(ByteSize).map_err(|_| E::custom("a size is not negative"))
            }

            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<ByteSize, E> {
                value.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

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
    /// What is booted.
    pub kernel: KernelConfig,
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
            kernel: KernelConfig::default(),
            memory: MemoryConfig::default(),
            console: ConsoleConfig::default(),
            disk: Vec::new(),
            net: Vec::new(),
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

/// RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MemoryConfig {
    /// Bytes, a multiple of 4096 (of 2 MiB with `huge-pages`).
    pub size: ByteSize,
    /// Take RAM from the host's pool of 2 MiB pages.
    pub huge_pages: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig { size: ByteSize(512 << 20), huge_pages: false }
    }
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

/// Where the guest's console is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsoleConfig {
    /// Where output goes and input comes from.
    pub mode: ConsoleMode,
    /// File for `mode = "file"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The device that the guest sees.
    pub device: ConsoleDevice,
}

/// Host side of the console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleMode {
    /// `tty` if standard input is a terminal, else `stdio`.
    #[default]
    Auto,
    /// The terminal, in raw mode, with the Ctrl-A escapes.
    Tty,
    /// Standard input and output as plain streams.
    Stdio,
    /// Output is written to a file, there is no input.
    File,
    /// No console.
    Off,
}

/// Guest side of the console.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleDevice {
    /// The first serial port, ttyS0: works from the first moment of a kernel.
    #[default]
    Serial,
    /// virtio-console, hvc0: faster, and the guest learns the window size.
    Virtio,
}

/// How much the disk's data is cached and when it is made durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// The guest may turn its write cache on and off and flushes when it wants durability.
    #[default]
    Writeback,
    /// Every write is durable before it is reported as done.
    Writethrough,
    /// A flush does nothing. For disks that may be lost with the host.
    Unsafe,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskConfig {
    /// Raw file or block device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub ro: bool,
    /// Name in messages and serial number in the guest, at most 20 bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The guest's root file system is on this disk.
    pub root: bool,
    /// Write cache.
    pub cache: CacheMode,
    /// Go past the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Request queues, 1 to [`MAX_QUEUES`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetConfig {
    /// An existing TAP interface; without a name one is made for the life of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Open descriptor of a TAP queue, instead of `tap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// The guest's MAC address; made up from the machine's name if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Largest packet in bytes, 68 to 65521, told to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Queue pairs, 1 to [`MAX_QUEUES`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Address and prefix that the host's side of a TAP made for this run gets, e.g.
    /// `172.30.0.1/30`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostAddress>,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MacAddress, String> {
        let wrong = || format!("{text:?} is not a MAC address such as 06:00:ac:1e:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!("{text} is a multicast address; its first byte must be even"));
        }
        Ok(MacAddress(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// An IPv4 address with its prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress {
    /// The address.
    pub address: std::net::Ipv4Addr,
    /// Length of the network prefix, 0 to 32.
    pub prefix: u8,
}

impl FromStr for HostAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<HostAddress, String> {
        let wrong = || format!("{text:?} is not an address with a prefix such as 172.30.0.1/30");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|&p| p <= 32).ok_or_else(wrong)?;
        Ok(HostAddress { address, prefix })
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

macro_rules! serde_by_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_by_text!(MacAddress, HostAddress);

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
        if let Some(name) = &self.name {
            validate_name(name)?;
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return error("cpus", format!("{} is not between 1 and {MAX_CPUS}", self.cpus));
        }
        if self.kernel.path.as_os_str().is_empty() {
            return error("kernel.path", "a machine needs a kernel");
        }
        if self.kernel.cmdline.as_ref().is_some_and(|text| text.contains('\0')) {
            return error("kernel.cmdline", "contains a NUL character");
        }
        self.memory.validate()?;
        if (self.console.mode == ConsoleMode::File) != self.console.path.is_some() {
            return error("console.path", "is needed with mode `file`, and only there");
        }
        self.validate_disks()?;
        self.validate_nets()?;
        self.validate_device_count()
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        if self.disk.iter().filter(|disk| disk.root).count() > 1 {
            return error("disk", "more than one disk is marked `root`");
        }
        for (n, disk) in self.disk.iter().enumerate() {
            if disk.path.as_os_str().is_empty() {
                return error(format!("disk[{n}].path"), "a disk needs a file or block device");
            }
            let fits = |id: &&String| {
                (1..=20).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
            };
            if let Some(id) = disk.id.as_ref().filter(|id| !fits(id)) {
                let problem = format!("{id:?} is not 1 to 20 printable ASCII characters");
                return error(format!("disk[{n}].id"), problem);
            }
            let name = self.disk_name(n);
            if (0..n).any(|other| self.disk_name(other) == name) {
                return error(format!("disk[{n}].id"), format!("two disks are called {name}"));
            }
            validate_queues(disk.queues, || format!("disk[{n}].queues"))?;
        }
        Ok(())
    }

    fn validate_nets(&self) -> Result<(), ConfigError> {
        for (n, net) in self.net.iter().enumerate() {
            if let Some(tap) = &net.tap {
                let valid = !tap.is_empty()
                    && tap.len() < libc::IFNAMSIZ
                    && !tap.contains(['/', '%'])
                    && tap.bytes().all(|b| b.is_ascii_graphic());
                if !valid {
                    let problem = format!("{tap:?} is not an interface name (1 to 15 characters)");
                    return error(format!("net[{n}].tap"), problem);
                }
                if net.fd.is_some() {
                    return error(format!("net[{n}].fd"), "cannot be given together with a name");
                }
            }
            if net.fd.is_some_and(|fd| fd < 0) {
                return error(format!("net[{n}].fd"), "a descriptor is not negative");
            }
            if net.fd.is_some() && net.queues.unwrap_or(1) > 1 {
                return error(format!("net[{n}].queues"), "one descriptor is one queue pair");
            }
            if net.host.is_some() && (net.tap.is_some() || net.fd.is_some()) {
                let problem =
                    "is for an interface that Hull makes; give yours its address by `ip addr`";
                return error(format!("net[{n}].host"), problem);
            }
            if let Some(mtu) = net.mtu.filter(|mtu| !MTU.contains(mtu)) {
                let (least, most) = (MTU.start(), MTU.end());
                let problem = format!("{mtu} is not between {least} and {most}");
                return error(format!("net[{n}].mtu"), problem);
            }
            validate_queues(net.queues, || format!("net[{n}].queues"))?;
        }
        Ok(())
    }

    fn validate_device_count(&self) -> Result<(), ConfigError> {
        let disks = (0..self.disk.len()).map(|n| self.disk_name(n));
        let nets = (0..self.net.len()).map(|n| format!("net{n}"));
        let rng = self.rng.then(|| "rng".to_owned());
        let console = (self.console.device == ConsoleDevice::Virtio
            && self.console.mode != ConsoleMode::Off)
            .then(|| "console".to_owned());
        match console.into_iter().chain(disks).chain(nets).chain(rng).nth(MAX_VIRTIO_DEVICES) {
            None => Ok(()),
            Some(extra) => error(
                extra,
                format!("is one device too many: a machine has at most {MAX_VIRTIO_DEVICES}"),
            ),
        }
    }

    /// The files that the guest is made from: kernel, initial RAM disk, disks.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let disks = self.disk.iter().map(|disk| &disk.path);
        let files = std::iter::once(&self.kernel.path).chain(&self.kernel.initrd).chain(disks);
        files.map(PathBuf::as_path)
    }

    /// Name of the `n`th disk in messages: its id, or `disk` and its number.
    pub fn disk_name(&self, n: usize) -> String {
        let id = self.disk.get(n).and_then(|disk| disk.id.clone());
        id.unwrap_or_else(|| format!("disk{n}"))
    }
}

impl MemoryConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let (size, text) = (self.size.0, self.size);
        let unit = if self.huge_pages { 2 << 20 } else { PAGE_SIZE };
        if size < layout::MIN_RAM {
            let least = ByteSize(layout::MIN_RAM);
            return error("memory.size", format!("{text} is less than {least}"));
        }
        if !size.is_multiple_of(unit) {
            let unit = ByteSize(unit);
            return error("memory.size", format!("{text} is not a multiple of {unit}"));
        }
        if size > layout::MAX_RAM {
            let most = ByteSize(layout::MAX_RAM);
            return error("memory.size", format!("{text} is more than the {most} of a machine"));
        }
        Ok(())
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

/// Checks that `name` can name a machine: it becomes a file name in the runtime directory.
///
/// # Errors
/// Says what a name may look like.
pub fn validate_name(name: &str) -> Result<(), ConfigError> {
    let valid = (1..=64).contains(&name.len())
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
#[path = "config_tests.rs"]
mod tests;
