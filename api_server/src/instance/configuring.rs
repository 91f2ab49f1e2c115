//! What can be put together before the start.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use vmm::config::{DiskConfig, NetConfig};
use vmm::machine::check_disk;

use super::Instance;
use crate::body;
use crate::fault::{Done, Fault, chain};
use crate::types::balloon::Balloon;
use crate::types::boot::BootSource;
use crate::types::check_id;
use crate::types::info::ConfigFile;
use crate::types::small::EntropyDevice;
use crate::types::vsock::Vsock;

impl Instance {
    /// Configures the machine as a file in the form of `GET /vm/config` says, and wishes for its
    /// start.
    ///
    /// # Errors
    /// What is wrong with it; the machine is to be given up then.
    pub fn configure_from(&self, json: &[u8]) -> Result<(), Fault> {
        let file: ConfigFile = body::parse(json)?;
        if let Some(logger) = file.logger {
            self.put_logger(logger)?;
        }
        let Some(source) = file.boot_source else {
            return Err(Fault::bad("boot-source: a machine needs a kernel."));
        };
        self.put_boot_source(source)?;
        if let Some(machine) = file.machine_config {
            self.configure(|config| machine.put_into(config))?;
        }
        for drive in file.drives {
            check_id(&drive.drive_id)?;
            self.put_drive(drive.try_into()?)?;
        }
        for interface in file.network_interfaces {
            check_id(&interface.iface_id)?;
            self.put_net(interface.into())?;
        }
        if let Some(balloon) = file.balloon {
            self.put_balloon(balloon)?;
        }
        if let Some(vsock) = file.vsock {
            self.put_vsock(vsock)?;
        }
        if let Some(entropy) = file.entropy {
            self.put_entropy(entropy)?;
        }
        if let Some(mmds) = file.mmds_config {
            self.put_mmds(mmds)?;
        }
        self.wish().map(drop)
    }

    /// Says what is booted.
    ///
    /// # Errors
    /// See [`Instance::configure`]; a file cannot be read.
    pub fn put_boot_source(&self, source: BootSource) -> Done {
        self.before_start()?;
        check_file("kernel", &source.kernel_image_path)?;
        if let Some(initrd) = &source.initrd_path {
            check_file("initrd", initrd)?;
        }
        self.configure(|config| {
            config.kernel = source.into();
            Ok(())
        })
    }

    /// Puts a drive into the configuration, in the place of the one with its id.
    ///
    /// # Errors
    /// See [`Instance::configure`]; the file cannot be a disk.
    pub fn put_drive(&self, disk: DiskConfig) -> Done {
        self.before_start()?;
        check_disk(&disk).map_err(|error| Fault::bad(chain(&error)))?;
        self.configure(|config| {
            put(&mut config.disk, disk, |disk| &disk.id);
            Ok(())
        })
    }

    /// Gives the guest a source of entropy.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_entropy(&self, device: EntropyDevice) -> Done {
        self.configure(|config| {
            config.rng = true;
            config.rng_rate = device.rate_limiter.map(Into::into);
            Ok(())
        })
    }

    /// Gives the guest streams to programs of the host.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_vsock(&self, vsock: Vsock) -> Done {
        self.configure(|config| {
            config.vsock = Some(vsock.into());
            Ok(())
        })
    }

    /// Gives the guest a balloon.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_balloon(&self, balloon: Balloon) -> Done {
        self.configure(|config| {
            config.balloon = Some(balloon.try_into()?);
            Ok(())
        })
    }

    /// Puts a network card into the configuration, in the place of the one with its id.
    ///
    /// # Errors
    /// See [`Instance::configure`]; another card has its address or interface.
    pub fn put_net(&self, net: NetConfig) -> Done {
        self.configure(|config| {
            put(&mut config.net, net, |net| &net.id);
            Ok(())
        })
    }
}

/// Puts `new` in the place of the one with its id, or behind all.
fn put<T>(all: &mut Vec<T>, new: T, id: impl Fn(&T) -> &Option<String>) {
    match all.iter_mut().find(|other| id(other) == id(&new)) {
        Some(other) => *other = new,
        None => all.push(new),
    }
}

/// That a file of the configuration can be read.
///
/// # Errors
/// The reason, with `what` the file is.
fn check_file(what: &str, path: &Path) -> Result<(), Fault> {
    // Of a pipe, nobody waits for the other end.
    match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Fault::bad(format!(
            "The {what} file cannot be opened: {}: {error}",
            path.display()
        ))),
    }
}
