//! `/`, `/version` and `/vm/config`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::balloon::Balloon;
use super::boot::BootSource;
use super::cpu::CpuConfig;
use super::drive::Drive;
use super::machine::MachineConfiguration;
use super::metrics::Metrics;
use super::mmds::MmdsConfig;
use super::net::NetworkInterface;
use super::serial::SerialDevice;
use super::small::{EntropyDevice, Logger};
use super::vsock::Vsock;

/// What runs here.
#[derive(Debug, Serialize, ToSchema)]
pub struct InstanceInfo {
    /// Name of the machine.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: &'static str,
    /// Version of the monitor.
    pub vmm_version: &'static str,
    /// `Firecracker` for its clients, else `Hull`.
    pub app_name: &'static str,
}

/// Version of the API.
#[derive(Debug, Serialize, ToSchema)]
pub struct FirecrackerVersion {
    /// The version of Firecracker whose API this is.
    pub firecracker_version: &'static str,
}

/// Everything that is configured.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FullVmConfiguration {
    /// What is booted.
    pub boot_source: BootSource,
    /// Disks.
    pub drives: Vec<Drive>,
    /// What is logged.
    pub logger: Option<Logger>,
    /// CPUs and memory.
    pub machine_config: MachineConfiguration,
    /// Where metrics are written.
    pub metrics: Option<Metrics>,
    /// What the CPUs are like.
    pub cpu_config: Option<CpuConfig>,
    /// Network cards.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Memory that the guest lends to the host.
    pub balloon: Option<Balloon>,
    /// Streams between guest and host.
    pub vsock: Option<Vsock>,
    /// Source of entropy.
    pub entropy: Option<EntropyDevice>,
    /// The serial port.
    pub serial: SerialDevice,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
}

/// What CPUs are like, or where that is written.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum CpuConfigOrFile {
    /// A file, as Firecracker has it.
    #[schema(value_type = String)]
    File(PathBuf),
    /// What `GET /vm/config` shows.
    Config(Box<CpuConfig>),
}

/// A configuration file: what can be put, by section.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConfigFile {
    /// What is booted.
    pub boot_source: Option<BootSource>,
    /// Disks.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// CPUs and memory.
    pub machine_config: Option<MachineConfiguration>,
    /// What the CPUs are like, or a file that says so.
    pub cpu_config: Option<CpuConfigOrFile>,
    /// Network cards.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// What is logged.
    pub logger: Option<Logger>,
    /// Where metrics are written.
    pub metrics: Option<Metrics>,
    /// Memory that the guest lends to the host.
    pub balloon: Option<Balloon>,
    /// Streams between guest and host.
    pub vsock: Option<Vsock>,
    /// Source of entropy.
    pub entropy: Option<EntropyDevice>,
    /// The serial port.
    pub serial: Option<SerialDevice>,
    /// The metadata service.
    pub mmds_config: Option<MmdsConfig>,
}
