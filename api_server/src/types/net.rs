//! `/network-interfaces`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{MacAddress, NetConfig};

use super::rate::RateLimiter;

/// A network card.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Letters, digits and `_`.
    pub iface_id: String,
    /// An existing TAP interface.
    pub host_dev_name: String,
    /// The guest's MAC address; one is made up if there is none.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub guest_mac: Option<MacAddress>,
    /// Largest packet in bytes, told to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 65521)]
    pub mtu: Option<u16>,
    /// What the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// What the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// A change of a network card of a running machine.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PartialNetworkInterface {
    /// The interface.
    pub iface_id: String,
    /// What the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// What the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl From<NetworkInterface> for NetConfig {
    fn from(interface: NetworkInterface) -> NetConfig {
        NetConfig {
            id: Some(interface.iface_id),
            tap: Some(interface.host_dev_name),
            mac: interface.guest_mac,
            mtu: interface.mtu,
            rx_rate: interface.rx_rate_limiter.map(Into::into),
            tx_rate: interface.tx_rate_limiter.map(Into::into),
            ..NetConfig::default()
        }
    }
}

impl From<&NetConfig> for NetworkInterface {
    fn from(net: &NetConfig) -> NetworkInterface {
        NetworkInterface {
            iface_id: net.id.clone().unwrap_or_default(),
            host_dev_name: net.tap.clone().unwrap_or_default(),
            guest_mac: net.mac,
            mtu: net.mtu,
            rx_rate_limiter: RateLimiter::of(net.rx_rate),
            tx_rate_limiter: RateLimiter::of(net.tx_rate),
        }
    }
}
