//! What can be put together before the start.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use vmm::config::{CpuConfig, DiskConfig, NetConfig, VsockConfig};
use vmm::machine::check_disk;

use super::Instance;
use crate::body;
use crate::fault::{Done, Fault, chain};
use crate::types::balloon::Balloon;
use crate::types::boot::BootSource;
use crate::types::check_id;
use crate::types::info::{ConfigFile, CpuConfigOrFile};
use crate::types::serial::SerialDevice;
use crate::types::small::EntropyDevice;
use crate::types::vsock::Vsock;

impl Instance {
    /// Configures the machine as a file in the form of `GET /vm/config` says, and wishes for its
    /// start.
    ///
    /// # Errors
    /// What is wrong with it; the machine is to be given up then.
    pub fn configure_from(&self, json: &[u8]) -> Result<(), Fault> {
        let file = read(json)?;
        if let Some(logger) = file.logger {
            self.put_logger(logger)?;
        }
        if let Some(metrics) = file.metrics {
            self.put_metrics(metrics)?;
        }
        let Some(source) = file.boot_source else {
            return Err(Fault::bad("boot-source: a machine needs a kernel."));
        };
        self.put_boot_source(source)?;
        if let Some(machine) = file.machine_config {
            self.configure(|config| machine.put_into(config))?;
        }
        match file.cpu_config {
            Some(CpuConfigOrFile::File(path)) => {
                let file = CpuConfig { config: Some(path), ..CpuConfig::default() };
                let template = file.own_template().map_err(|error| Fault::bad(chain(&error)))?;
                self.configure(|config| {
                    config.cpu.set_modifiers(template.unwrap_or_default());
                    Ok(())
                })?;
            }
            Some(CpuConfigOrFile::Config(cpu)) => {
                self.configure(|config| {
                    cpu.put_into(config);
                    Ok(())
                })?;
            }
            None => {}
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
        if let Some(serial) = file.serial {
            self.put_serial(serial)?;
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
        check_file("kernel_image_path", "kernel", &source.kernel_image_path)?;
        if let Some(initrd) = &source.initrd_path {
            check_file("initrd_path", "initrd", initrd)?;
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
        check_disk(&disk)
            .map_err(|error| Fault::bad(format!("path_on_host: {}", chain(&error))))?;
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

    /// Says where the console's output goes.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_serial(&self, serial: SerialDevice) -> Done {
        self.configure(|config| {
            serial.put_into(&mut config.console);
            Ok(())
        })
    }

    /// Gives the guest streams to programs of the host.
    ///
    /// # Errors
    /// See [`Instance::configure`].
    pub fn put_vsock(&self, vsock: Vsock) -> Done {
        self.configure(|config| {
            let keep = self.program().is_firecracker();
            config.vsock = Some(VsockConfig { keep, ..vsock.into() });
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
fn check_file(field: &str, what: &str, path: &Path) -> Result<(), Fault> {
    // Of a pipe, nobody waits for the other end.
    match File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Fault::bad(format!(
            "{field}: The {what} file cannot be opened: {}: {error}",
            path.display()
        ))),
    }
}

/// The sections of a file. One that is `null` is not there, whatever its name: clients write down
/// what they leave out, under names that Firecracker passes over.
fn read(json: &[u8]) -> Result<ConfigFile, Fault> {
    body::parse(json).or_else(|refused| {
        let Ok(Sections(mut sections)) = serde_json::from_slice(json) else { return Err(refused) };
        sections.retain(|_, section| !section.is_null());
        serde_json::from_value(sections.into()).map_err(|_| refused)
    })
}

/// An object without a key that is there twice.
struct Sections(Map<String, Value>);

impl<'de> Deserialize<'de> for Sections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Sections, D::Error> {
        deserializer.deserialize_map(Sections(Map::new()))
    }
}

impl<'de> Visitor<'de> for Sections {
    type Value = Sections;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Sections, A::Error> {
        while let Some((name, section)) = map.next_entry()? {
            if self.0.insert(name, section).is_some() {
                return Err(Error::custom("a section is there twice"));
            }
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_without_contents_may_have_any_name() {
        let file = read(br#"{ "drives": [], "vsock_device": null, "balloon": null }"#).unwrap();
        assert!(file.drives.is_empty() && file.balloon.is_none());
        for (json, word) in [
            (r#"{ "vsock_device": {} }"#, "unknown field `vsock_device`"),
            (r#"{ "vsock_device": {}, "x": null }"#, "unknown field `vsock_device`"),
            (r#"{ "drives": [], "drives": [] }"#, "duplicate field `drives`"),
            (r#"{ "x": null, "drives": [], "drives": [] }"#, "unknown field `x`"),
            (r#"{ "drives": 1, "x": null }"#, "invalid type"),
            ("null", "invalid type"),
            ("{", "EOF"),
        ] {
            let fault = read(json.as_bytes()).unwrap_err();
            assert!(format!("{fault:?}").contains(word), "{json}: {fault:?}");
        }
    }
}
