//! `/mmds/config`.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{MmdsConfig as Config, MmdsVersion};

use crate::fault::Fault;

/// What a guest has to bring with its requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Version {
    /// Nothing.
    #[default]
    V1,
    /// A token, which the service gives it.
    V2,
}

/// The metadata service.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether tokens are needed.
    #[serde(default)]
    pub version: Version,
    /// Ids of the network cards that have it, which are there already.
    pub network_interfaces: Vec<String>,
    /// Its address: link-local, 169.254.169.254 if there is none.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answers are plain text whatever is asked for, as those of EC2's service are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub imds_compat: bool,
}

impl MmdsConfig {
    /// As a machine's configuration has it.
    ///
    /// # Errors
    /// There is no card, or another than `known`; the address is not link-local.
    pub fn checked(self, known: impl Fn(&str) -> bool) -> Result<Config, Fault> {
        let wrong = |what: &str| Err(Fault::bad(format!("MMDS config error: {what}")));
        if self.network_interfaces.is_empty() {
            return wrong(
                "The list of network interface IDs that allow forwarding MMDS requests is empty.",
            );
        }
        let config = Config { net: self.network_interfaces, ..Config::default() };
        if let Some(unknown) = config.net.iter().find(|id| !known(id)) {
            return wrong(&format!(
                "The list of network interface IDs provided contains at least one ID that does not \
                 correspond to any existing network interface: {unknown}."
            ));
        }
        let address = self.ipv4_address.unwrap_or(config.address);
        if !Config::allows(address) {
            return wrong(&format!("The MMDS IPv4 address is not link local: {address}."));
        }
        let version = match self.version {
            Version::V1 => MmdsVersion::V1,
            Version::V2 => MmdsVersion::V2,
        };
        Ok(Config { version, address, imds_compat: self.imds_compat, ..config })
    }
}

impl From<&Config> for MmdsConfig {
    fn from(config: &Config) -> MmdsConfig {
        MmdsConfig {
            version: match config.version {
                MmdsVersion::V1 => Version::V1,
                MmdsVersion::V2 => Version::V2,
            },
            network_interfaces: config.net.clone(),
            ipv4_address: Some(config.address),
            imds_compat: config.imds_compat,
        }
    }
}

/// Bytes of `contents` as JSON.
pub fn json_len(contents: &impl Serialize) -> usize {
    // A JSON value can always be written.
    serde_json::to_vec(contents).map_or(usize::MAX, |text| text.len())
}
