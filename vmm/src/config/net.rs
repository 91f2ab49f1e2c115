//! Network cards of a machine.

use serde::{Deserialize, Serialize};

use super::{
    ConfigError, HostAddress, MacAddress, RateLimit, VmConfig, error, validate_name,
    validate_queues,
};

/// Largest packets of a network card: what IPv4 needs at least (RFC 791 § 3.2), and 64 KiB less an
/// Ethernet header, which is what Linux allows a TAP.
const MTU: std::ops::RangeInclusive<u16> = 68..=65_521;

/// A network card.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct NetConfig {
    /// Name in messages; `net` and its number if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
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
    /// Queue pairs, 1 to [`MAX_QUEUES`](super::MAX_QUEUES).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Address and prefix that the host's side of a TAP made for this run gets, e.g.
    /// `172.30.0.1/30`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<HostAddress>,
    /// Limit of what the guest receives, in bytes of frames and in frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate: Option<RateLimit>,
    /// Limit of what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate: Option<RateLimit>,
}

impl VmConfig {
    pub(super) fn validate_nets(&self) -> Result<(), ConfigError> {
        for (n, net) in self.net.iter().enumerate() {
            let name = self.net_name(n);
            if (0..n).any(|other| self.net_name(other) == name) {
                return error(format!("net[{n}].id"), format!("two cards are called {name}"));
            }
            if let Some(id) = net.id.as_ref().filter(|id| validate_name(id).is_err()) {
                let problem = format!(
                    "{id:?} is not 1 to 64 letters, digits, '-', '_' or '.', starting with a letter \
                     or digit"
                );
                return error(format!("net[{n}].id"), problem);
            }
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
            let earlier = |same: &dyn Fn(&NetConfig) -> bool| {
                self.net.iter().take(n).position(same).map(|other| self.net_name(other))
            };
            if let Some(other) = earlier(&|other| net.fd.is_some() && other.fd == net.fd) {
                return error(format!("net[{n}].fd"), format!("is {other}'s already"));
            }
            if let Some(other) = earlier(&|other| net.tap.is_some() && other.tap == net.tap) {
                return error(format!("net[{n}].tap"), format!("is {other}'s already"));
            }
            if let Some(other) = earlier(&|other| net.mac.is_some() && other.mac == net.mac) {
                return error(format!("net[{n}].mac"), format!("is {other}'s already"));
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

    /// Name of the `n`th network card in messages: its id, or `net` and its number.
    pub fn net_name(&self, n: usize) -> String {
        let id = self.net.get(n).and_then(|net| net.id.clone());
        id.unwrap_or_else(|| format!("net{n}"))
    }
}
