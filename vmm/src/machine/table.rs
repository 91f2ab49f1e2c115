//! The device table: which virtio devices a configuration asks for, in the order in which the guest
//! finds them. A new kind of device is one line here.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use devices::rate::RateLimiter;
use devices::virtio::balloon::{Balloon, BalloonOptions};
use devices::virtio::blk::overlay::Overlay;
use devices::virtio::blk::qcow2::{Access, Qcow2, looks_like_qcow2};
use devices::virtio::blk::{Backing, Block, Cache, DiskError, DiskFile, OpenError, Options};
use devices::virtio::console::{Console, ConsoleOutput};
use devices::virtio::device::{Device, Message, Traffic};
use devices::virtio::net::mmds::{self, TokenKey};
use devices::virtio::net::tap::{Tap, TapError};
use devices::virtio::net::{Net, NetOptions};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Listener, Vsock};
use serde_json::Value;

use super::build::BuildError;
use crate::config::{
    BalloonConfig, CacheMode, ConsoleDevice, ConsoleMode, DiskConfig, DiskFormat, MmdsConfig,
    MmdsVersion, NetConfig, RateLimit, VmConfig,
};
use crate::console::Output;
use crate::files;
use crate::memory::GuestRam;

/// A device to be wired.
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) device: Box<dyn Device>,
    pub(super) back_end: BackEnd,
}

/// What an io thread has to offer a device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum BackEnd {
    /// Readiness of descriptors that never block.
    Polled,
    /// As above, and to make connections to programs of the host.
    Sockets,
    /// File operations that wait away from the thread.
    File,
    /// As above, and writes through the page cache, which may wait: a thread to itself.
    CachedWrites,
    /// Calls of a library, which are made away from the thread, but for the last when queues stop: a thread to itself.
    Calls,
}

/// Opens the back-ends of all devices of `config`; of disks, those that are not open yet.
pub(super) fn devices(
    config: &VmConfig,
    output: &Arc<Output>,
    window: Option<(u16, u16)>,
    ram: &GuestRam,
    mut open: Vec<(String, Backing)>,
) -> Result<Vec<Entry>, BuildError> {
    let mut devices = Vec::new();
    let mut add = |name: String, device: Box<dyn Device>, back_end| {
        devices.push(Entry { name, device, back_end });
    };
    if config.console.device == ConsoleDevice::Virtio && config.console.mode != ConsoleMode::Off {
        let output = Arc::clone(output);
        let sink = move || Box::new(Sink(Arc::clone(&output))) as Box<dyn ConsoleOutput>;
        add("console".into(), Box::new(Console::new(Box::new(sink), window)), BackEnd::Polled);
    }
    for (n, disk) in config.disk.iter().enumerate() {
        let name = config.disk_name(n);
        // An overlay writes its bits in between.
        let cached_writes = !disk.ro && (!disk.direct || disk.overlay.is_some());
        let back_end = match disk.format {
            Some(DiskFormat::Qcow2) => BackEnd::Calls,
            _ if cached_writes => BackEnd::CachedWrites,
            _ => BackEnd::File,
        };
        let there = open.extract_if(.., |(of, _)| *of == name).next().map(|(_, disk)| disk);
        let opened = there.map_or_else(|| open_disk(disk), Ok);
        let device = opened.map(|opened| block(name.clone(), disk, opened)).map_err(|err| {
            // Whoever looks for hints finds it as it is.
            let err = err.into_inner();
            let taken = matches!(
                err.downcast_ref(),
                Some(OpenError::Locked { .. } | OpenError::Claimed { .. })
            );
            let source = match same_file(config, n).filter(|_| taken) {
                Some(other) => {
                    format!("{} is {other} of this machine already", disk.file().display()).into()
                }
                None => err,
            };
            BuildError::Device { device: name.clone(), source }
        })?;
        add(name, Box::new(device), back_end);
    }
    let service = config.mmds.as_ref().map(metadata_service).transpose();
    let service = service.map_err(|source| BuildError::Device { device: "mmds".into(), source })?;
    for (n, net) in config.net.iter().enumerate() {
        let name = config.net_name(n);
        let failed = |source| BuildError::Device { device: name.clone(), source };
        let mut device = card(config, n, net).map_err(failed)?;
        let here = config.mmds.as_ref().is_some_and(|mmds| mmds.is_on(&name));
        if let Some((options, contents)) = service.as_ref().filter(|_| here) {
            device.set_mmds(options.clone()).map_err(|err| failed(err.into()))?;
            // Nothing that the guest sees changes by it.
            device.update(&Message::Metadata(Arc::clone(contents)));
        }
        add(name, Box::new(device), BackEnd::Polled);
    }
    if let Some(vsock) = &config.vsock {
        let listener = Listener::open(&vsock.path)
            .map_err(|err| BuildError::Device { device: "vsock".into(), source: err.into() })?;
        files::allow_many();
        add(
            "vsock".into(),
            Box::new(Vsock::new(listener, vsock.cid, vsock.keep)),
            BackEnd::Sockets,
        );
    }
    if config.rng {
        add("rng".into(), Box::new(Rng::new(limiter(config.rng_rate))), BackEnd::Polled);
    }
    if let Some(balloon) = &config.balloon {
        add("balloon".into(), Box::new(made_balloon(balloon, ram)), BackEnd::Polled);
    }
    Ok(devices)
}

/// Opens the disk of this configuration, and closes it again: whether a machine could have it. An overlay that is
/// not there is not made, and nothing of an image is mended.
///
/// # Errors
/// What is wrong with the file.
pub fn check_disk(disk: &DiskConfig) -> Result<(), DiskError> {
    match &disk.overlay {
        _ if disk.format == Some(DiskFormat::Qcow2) => {
            Ok(Qcow2::try_open(&disk.path, qcow2_access(disk))?)
        }
        Some(overlay) if !overlay.exists() => {
            DiskFile::open(&disk.path, true, disk.direct)?;
            certainly_raw(disk)
        }
        _ => open_disk(disk).map(drop),
    }
}

/// Opens the disk of this configuration.
///
/// # Errors
/// What is wrong with the file.
pub fn open_disk(config: &DiskConfig) -> Result<Backing, DiskError> {
    let DiskConfig { path, overlay, ro, direct, format, .. } = config;
    let backing = match (format, overlay) {
        (Some(DiskFormat::Qcow2), _) => return open_image(config, path).map(Backing::from),
        (_, Some(overlay)) => Overlay::open_or_create(overlay, path, *ro, *direct)?.into(),
        (_, None) => DiskFile::open(path, *ro, *direct)?.into(),
    };
    certainly_raw(config)?;
    Ok(backing)
}

/// Opens another image for a disk that has one.
///
/// # Errors
/// What is wrong with the file.
pub fn open_image(config: &DiskConfig, path: &Path) -> Result<Qcow2, DiskError> {
    Ok(Qcow2::open(path, qcow2_access(config))?)
}

fn qcow2_access(config: &DiskConfig) -> Access {
    let &DiskConfig { ro, direct, backing, forked, .. } = config;
    Access { read_only: ro, direct, backing, forked }
}

/// Refuses a file that begins like an image if nobody said what it is. It was opened before: it is a file or a
/// block device.
///
/// # Errors
/// [`DiskError::Ambiguous`].
pub fn certainly_raw(config: &DiskConfig) -> Result<(), DiskError> {
    let DiskConfig { path, format, .. } = config;
    // One that cannot be read is for others to find.
    match format.is_none() && looks_like_qcow2(path).unwrap_or(false) {
        true => Err(DiskError::Ambiguous(path.clone())),
        false => Ok(()),
    }
}

/// Name of the disk before the `n`th one that is the same file, if there is one.
fn same_file(config: &VmConfig, n: usize) -> Option<String> {
    let identity = |n: usize| files::identity(config.disk.get(n)?.file());
    let this = identity(n)?;
    (0..n).find(|&other| identity(other) == Some(this)).map(|other| config.disk_name(other))
}

fn made_balloon(config: &BalloonConfig, ram: &GuestRam) -> Balloon {
    let interval = Duration::from_secs(config.stats_interval.into());
    Balloon::new(BalloonOptions {
        target: config.pages(),
        deflate_on_oom: config.deflate_on_oom,
        stats_interval: (!interval.is_zero()).then_some(interval),
        reporting: config.reporting,
        discard: Arc::new(ram.discarder()),
    })
}

/// A limiter with full buckets, if there is to be one.
pub(super) fn limiter(rate: Option<RateLimit>) -> Option<RateLimiter> {
    rate.and_then(|rate| rate.limiter())
}

fn block(name: String, config: &DiskConfig, disk: Backing) -> Block {
    let cache = match config.cache {
        CacheMode::Writeback => Cache::Writeback,
        CacheMode::Writethrough => Cache::Writethrough,
        CacheMode::Unsafe => Cache::Unsafe,
    };
    let queues = config.queues.unwrap_or(1);
    let mut block = Block::new(Options { disk, cache, id: name, queues });
    block.set_limit(limiter(config.rate));
    block
}

/// Name pattern of the interfaces that Hull makes; the kernel puts a number in.
const TAP_PATTERN: &str = "hull%d";

fn card(
    config: &VmConfig,
    n: usize,
    net: &NetConfig,
) -> Result<Net, Box<dyn std::error::Error + Send + Sync>> {
    let queues = net.queues.unwrap_or(1);
    let taps = match (net.fd, &net.tap) {
        (Some(fd), _) => vec![inherited(fd)?],
        (None, Some(name)) => Tap::open(name, queues)?,
        (None, None) => made(net, queues)?,
    };
    let mac = net.mac.map_or_else(|| made_up_mac(config.name.as_deref(), n), |mac| mac.0);
    let mut card = Net::new(NetOptions { taps, mac, mtu: net.mtu })?;
    if net.mac.is_some() {
        // One that is made up is that of the machine that was saved, whatever this one is called.
        card.keep_mac();
    }
    card.set_limit(Traffic::Received, limiter(net.rx_rate));
    card.set_limit(Traffic::Sent, limiter(net.tx_rate));
    Ok(card)
}

/// Most bytes of a file of metadata.
pub const LONGEST_METADATA: usize = 1 << 20;

/// What the cards of a machine serve: with one secret, so that a token is good for all of them.
fn metadata_service(
    config: &MmdsConfig,
) -> Result<(mmds::Options, Arc<Value>), Box<dyn std::error::Error + Send + Sync>> {
    let contents = initial_metadata(config)?;
    let version = match config.version {
        MmdsVersion::V1 => mmds::Version::V1,
        MmdsVersion::V2 => mmds::Version::V2,
    };
    let (address, imds_compat) = (config.address, config.imds_compat);
    let options = mmds::Options { version, address, imds_compat, key: TokenKey::random()? };
    Ok((options, Arc::new(contents)))
}

/// What the metadata service has to say at first.
///
/// # Errors
/// The file, which is what it is of; it cannot be read, is no JSON, or longer than 1 MiB.
pub fn initial_metadata(
    config: &MmdsConfig,
) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
    let Some(path) = &config.path else { return Ok(Value::default()) };
    read_metadata(path).map_err(|why| format!("{}: {why}", path.display()).into())
}

fn read_metadata(path: &Path) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
    let mut text = Vec::new();
    File::open(path)?.take(LONGEST_METADATA as u64 + 1).read_to_end(&mut text)?;
    if text.len() > LONGEST_METADATA {
        return Err("it is longer than 1 MiB".into());
    }
    Ok(serde_json::from_slice(&text)?)
}

/// A TAP that goes with this process: up, and with the host's address if one is configured.
fn made(net: &NetConfig, queues: u16) -> Result<Vec<Tap>, TapError> {
    let mut taps = Tap::create(TAP_PATTERN, queues)?;
    if let Some(tap) = taps.first_mut() {
        if let Some(mtu) = net.mtu {
            tap.set_mtu(mtu)?;
        }
        if let Some(host) = net.host {
            tap.set_address(host.address, host.prefix)?;
        }
        tap.bring_up()?;
    }
    Ok(taps)
}

/// A TAP queue that the caller opened. A copy is used, so that a restart finds it again.
fn inherited(fd: i32) -> Result<Tap, TapError> {
    // SAFETY: fcntl reports a bad descriptor; a good result is a new descriptor of our own.
    let copy = unsafe {
        let copy = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 {
            return Err(TapError::NotTap { name: format!("descriptor {fd}, which is not open,") });
        }
        OwnedFd::from_raw_fd(copy)
    };
    Tap::from_fd(copy, &format!("descriptor {fd}"))
}

/// A locally administered unicast address that stays the same for a machine's name and card.
fn made_up_mac(name: Option<&str>, card: usize) -> [u8; 6] {
    let hash = blake3::hash(format!("{}/{card}", name.unwrap_or_default()).as_bytes());
    let mut mac = [0; 6];
    for (slot, byte) in mac.iter_mut().zip(hash.as_bytes()) {
        *slot = *byte;
    }
    mac[0] = (mac[0] & !1) | 2;
    mac
}

/// The virtio console's way to the machine's console output.
struct Sink(Arc<Output>);

impl ConsoleOutput for Sink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.push_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_up_addresses_are_stable_local_and_differ() {
        let mac = made_up_mac(Some("a"), 0);
        assert_eq!(mac, made_up_mac(Some("a"), 0));
        assert_ne!(mac, made_up_mac(Some("a"), 1));
        assert_ne!(mac, made_up_mac(Some("b"), 0));
        assert_eq!(mac[0] & 3, 2);
    }
}
