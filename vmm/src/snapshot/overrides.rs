//! What a machine has otherwise where it goes on: its files and interfaces are the host's, and a card's address
//! may be one of its own.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, MacAddress, VmConfig};
use crate::hook::{Addresses, Hook};

/// Other host resources and addresses than those that were saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Overrides {
    /// Names of network cards, and the TAP interfaces that they have.
    pub nets: Vec<(String, String)>,
    /// Names of network cards, and their MAC addresses.
    pub macs: Vec<(String, MacAddress)>,
    /// Names of disks, and their files.
    pub disks: Vec<(String, PathBuf)>,
    /// The socket of the socket device.
    pub vsock: Option<PathBuf>,
    /// The guest's address (CID).
    pub cid: Option<u64>,
}

impl Overrides {
    /// Changes `config` so.
    ///
    /// # Errors
    /// There is no device of that name.
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), ConfigError> {
        let unknown = |what: &str, name: &str, known: Vec<String>| {
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            ConfigError {
                field: what.to_owned(),
                problem: format!("there is none with the id {name}; known are: {known}"),
            }
        };
        let card = |config: &VmConfig, name: &str| {
            let all: Vec<String> = (0..config.net.len()).map(|n| config.net_name(n)).collect();
            let place = all.iter().position(|known| known == name);
            place.ok_or_else(|| unknown("net", name, all))
        };
        for (name, tap) in &self.nets {
            let place = card(config, name)?;
            config.net[place].tap = Some(tap.clone());
            config.net[place].fd = None;
        }
        for (name, mac) in &self.macs {
            let place = card(config, name)?;
            config.net[place].mac = Some(*mac);
        }
        for (name, path) in &self.disks {
            let all: Vec<String> = (0..config.disk.len()).map(|n| config.disk_name(n)).collect();
            let place = all.iter().position(|known| known == name);
            let place = place.ok_or_else(|| unknown("disk", name, all))?;
            // Of an overlay it is the overlay that is another: its base is the same.
            config.disk[place].set_file(path);
        }
        if self.vsock.is_none() && self.cid.is_none() {
            return Ok(());
        }
        let vsock = config.vsock.as_mut().ok_or_else(|| ConfigError {
            field: "vsock".to_owned(),
            problem: "the machine has no vsock device".to_owned(),
        })?;
        if let Some(path) = &self.vsock {
            vsock.path.clone_from(path);
        }
        vsock.cid = self.cid.unwrap_or(vsock.cid);
        Ok(())
    }

    /// Has the cards and the hook of the guest agree: a MAC address that is said of a card is told to the hook, and one
    /// that is told to the hook is the card's.
    ///
    /// # Errors
    /// A card is to have two.
    pub fn agree(&mut self, hook: Option<&mut Hook>) -> Result<(), ConfigError> {
        let Some(hook) = hook else { return self.check_macs() };
        let told = hook.nets.iter().filter_map(|net| Some((net.card.clone(), net.mac?)));
        let told: Vec<_> = told.filter(|pair| !self.macs.contains(pair)).collect();
        for (card, mac) in &self.macs {
            let knows = |net: &Addresses| net.card == *card && net.mac == Some(*mac);
            if !hook.nets.iter().any(knows) {
                let (card, mac) = (card.clone(), Some(*mac));
                hook.nets.push(Addresses { card, mac, ..Addresses::default() });
            }
        }
        self.macs.extend(told);
        self.check_macs()
    }

    fn check_macs(&self) -> Result<(), ConfigError> {
        for (n, (card, mac)) in self.macs.iter().enumerate() {
            let earlier = self.macs.iter().take(n).find(|(other, _)| other == card);
            if let Some((_, other)) = earlier.filter(|(_, other)| other != mac) {
                let problem = format!("{card} cannot have both {other} and {mac}");
                return Err(ConfigError { field: "mac".to_owned(), problem });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetConfig;

    fn mac(text: &str) -> MacAddress {
        text.parse().unwrap()
    }

    fn overrides(macs: &[(&str, &str)]) -> Overrides {
        let macs = macs.iter().map(|(card, text)| ((*card).to_owned(), mac(text))).collect();
        Overrides { macs, ..Overrides::default() }
    }

    const A: &str = "06:00:00:00:00:0a";
    const B: &str = "06:00:00:00:00:0b";

    #[test]
    fn a_card_gets_the_address_that_is_said_of_it() {
        let mut config = VmConfig {
            net: vec![
                NetConfig { mac: Some(mac(A)), ..NetConfig::default() },
                NetConfig::default(),
            ],
            ..VmConfig::default()
        };
        overrides(&[("net1", B)]).apply(&mut config).unwrap();
        assert_eq!([config.net[0].mac, config.net[1].mac], [Some(mac(A)), Some(mac(B))]);
        // What both would have then is for who looks at all of it.
        overrides(&[("net1", A)]).apply(&mut config).unwrap();
        let problem = config.validate_without_kernel().unwrap_err();
        assert_eq!(problem.to_string(), "net[1].mac: is net0's already");
        let unknown = overrides(&[("net7", B)]).apply(&mut config).unwrap_err();
        assert_eq!(
            unknown.to_string(),
            "net: there is none with the id net7; known are: net0, net1"
        );
    }

    #[test]
    fn cards_and_the_hook_are_told_the_same() {
        let told = |card: &str, text: Option<&str>| Addresses {
            card: card.to_owned(),
            mac: text.map(mac),
            ip: text.is_none().then(|| "10.0.0.2/24".parse().unwrap()),
            ..Addresses::default()
        };
        let mut hook = Hook {
            nets: vec![told("a", None), told("b", Some(B)), told("c", Some(A))],
            ..Hook::default()
        };
        let mut both = overrides(&[("a", A), ("b", B)]);
        both.agree(Some(&mut hook)).unwrap();
        assert_eq!(both, overrides(&[("a", A), ("b", B), ("c", A)]));
        let before = [told("a", None), told("b", Some(B)), told("c", Some(A)), told("a", Some(A))];
        assert_eq!(hook.nets, before);
        // A second time nothing is left to be said.
        both.agree(Some(&mut hook)).unwrap();
        assert_eq!((both.macs.len(), hook.nets.len()), (3, 4));
        let refused = |mut overrides: Overrides, hook: Option<&mut Hook>| {
            overrides.agree(hook).unwrap_err().to_string()
        };
        let twice = format!("mac: b cannot have both {A} and {B}");
        assert_eq!(refused(overrides(&[("b", A)]), Some(&mut hook)), twice);
        assert_eq!(refused(overrides(&[("b", A), ("b", B)]), None), twice);
    }
}
