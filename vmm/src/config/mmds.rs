//! The metadata service of a machine.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use devices::virtio::net::mmds::DEFAULT_ADDRESS;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use super::{ConfigError, VmConfig, error};

/// What a guest has to bring with its requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Nothing.
    #[default]
    #[serde(alias = "v1")]
    V1,
    /// A token, which the service gives it.
    #[serde(alias = "v2")]
    V2,
}

/// Contents that the guest reads over HTTP through its network card.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct MmdsConfig {
    /// File with the contents, in JSON, at most 1 MiB. Without it they come over the API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Names of the cards that have the service, or one name; all cards if there is none. Such a card
    /// has one queue pair.
    #[serde(deserialize_with = "one_or_several", skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<String>,
    /// Whether tokens are needed.
    pub version: MmdsVersion,
    /// Address of the service, a link-local one (RFC 3927: 169.254.1.0 to 169.254.254.255).
    pub address: Ipv4Addr,
    /// Answers are plain text whatever is asked for, as those of EC2's service are.
    pub imds_compat: bool,
}

impl Default for MmdsConfig {
    fn default() -> MmdsConfig {
        MmdsConfig {
            path: None,
            net: Vec::new(),
            version: MmdsVersion::default(),
            address: DEFAULT_ADDRESS,
            imds_compat: false,
        }
    }
}

fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Vec<String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the name of a network card, or a list of them")
        }

        fn visit_str<E>(self, name: &str) -> Result<Vec<String>, E> {
            Ok(vec![name.to_owned()])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
            let mut names = Vec::new();
            while let Some(name) = list.next_element()? {
                names.push(name);
            }
            Ok(names)
        }
    }
    deserializer.deserialize_any(Names)
}

impl MmdsConfig {
    /// True if an address is one that the service may have.
    pub fn allows(address: Ipv4Addr) -> bool {
        matches!(address.octets(), [169, 254, 1..=254, _])
    }

    /// True if the card called `name` has the service.
    pub fn is_on(&self, name: &str) -> bool {
        self.net.is_empty() || self.net.iter().any(|net| net == name)
    }

    /// The service of `config`, for somebody who has contents for it.
    ///
    /// # Errors
    /// There is none.
    pub fn of(config: &mut VmConfig) -> Result<&mut MmdsConfig, ConfigError> {
        config.mmds.as_mut().ok_or_else(|| ConfigError {
            field: "metadata".to_owned(),
            problem:
                "the machine has no metadata service; it has to be started with one (`--mmds`, or \
                      `PUT /mmds/config`)"
                    .to_owned(),
        })
    }

    pub(super) fn validate(&self, config: &VmConfig) -> Result<(), ConfigError> {
        if !MmdsConfig::allows(self.address) {
            let problem =
                format!("{} is not between 169.254.1.0 and 169.254.254.255", self.address);
            return error("mmds.address", problem);
        }
        let cards: Vec<_> = (0..config.net.len()).map(|n| config.net_name(n)).collect();
        if let Some(unknown) = self.net.iter().find(|name| !cards.contains(name)) {
            return error("mmds.net", format!("there is no network card {unknown}"));
        }
        if cards.is_empty() {
            return error("mmds", "there is no network card to reach it by");
        }
        let several = |(name, net): &(&String, &super::NetConfig)| {
            self.is_on(name) && net.queues.unwrap_or(1) > 1
        };
        if let Some((name, _)) = cards.iter().zip(&config.net).find(several) {
            let problem = format!("{name} has several queue pairs; it has to have one");
            return error("mmds.net", problem);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetConfig;

    fn validated(mmds: MmdsConfig, nets: &[(&str, u16)]) -> Result<(), String> {
        let net = |&(id, queues): &(&str, u16)| NetConfig {
            id: Some(id.to_owned()),
            queues: Some(queues),
            ..NetConfig::default()
        };
        let config = VmConfig {
            mmds: Some(mmds),
            net: nets.iter().map(net).collect(),
            ..VmConfig::default()
        };
        config.validate_without_kernel().map_err(|error| error.to_string())
    }

    #[test]
    fn it_needs_a_card_and_a_link_local_address() {
        let on = |net: &[&str]| MmdsConfig {
            net: net.iter().map(|&name| name.to_owned()).collect(),
            ..MmdsConfig::default()
        };
        assert_eq!(validated(on(&[]), &[("a", 1)]), Ok(()));
        assert_eq!(validated(on(&["a"]), &[("a", 1), ("b", 2)]), Ok(()));
        let problem = |mmds, nets: &[_]| validated(mmds, nets).unwrap_err();
        assert_eq!(problem(on(&[]), &[]), "mmds: there is no network card to reach it by");
        assert_eq!(problem(on(&["b"]), &[("a", 1)]), "mmds.net: there is no network card b");
        assert_eq!(
            problem(on(&[]), &[("a", 1), ("b", 2)]),
            "mmds.net: b has several queue pairs; it has to have one"
        );
        for [c, d] in [[0, 1], [255, 1]] {
            let address = Ipv4Addr::new(169, 254, c, d);
            let text = problem(MmdsConfig { address, ..on(&[]) }, &[("a", 1)]);
            assert!(text.starts_with("mmds.address: 169.254."), "{text}");
        }
        assert!(!MmdsConfig::allows(Ipv4Addr::new(10, 0, 0, 1)));
    }

    #[test]
    fn cards_are_a_name_or_a_list() {
        let read = |json| serde_json::from_str::<MmdsConfig>(json).unwrap();
        assert_eq!(read("{}"), MmdsConfig::default());
        assert_eq!(read(r#"{"net": "a"}"#).net, ["a"]);
        let config = read(r#"{"net": ["a", "b"], "version": "v2"}"#);
        assert_eq!((config.net.len(), config.version), (2, MmdsVersion::V2));
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(read(&json), config);
        assert!(serde_json::from_str::<MmdsConfig>(r#"{"net": 1}"#).is_err());
    }
}
