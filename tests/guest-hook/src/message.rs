//! What the host says.

use std::io;
use std::net::Ipv4Addr;

use serde::Deserialize;

/// The version that is understood here.
pub const VERSION: u32 = 1;

/// A message. What it has beside this is for others.
#[derive(Debug, Deserialize)]
pub struct Message {
    pub hull: u32,
    pub resumed: Option<Resumed>,
}

/// The machine goes on as a copy.
#[derive(Debug, Deserialize)]
pub struct Resumed {
    pub time_ns: u64,
    seed: String,
    pub hostname: Option<String>,
    #[serde(default)]
    pub net: Vec<Net>,
}

/// Other addresses for the network card that is the `index`th.
#[derive(Debug, Deserialize)]
pub struct Net {
    pub id: String,
    pub index: usize,
    pub mac: Option<String>,
    pub ip: Option<String>,
    pub gateway: Option<Ipv4Addr>,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn byte(digits: &str) -> io::Result<u8> {
    let plain = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let value = u8::from_str_radix(digits, 16).ok().filter(|_| plain);
    value.ok_or_else(|| invalid("no hexadecimal digits"))
}

impl Resumed {
    /// Bytes that no other machine has.
    pub fn seed(&self) -> io::Result<Vec<u8>> {
        let digits = self.seed.as_bytes().chunks(2);
        digits.map(|pair| byte(std::str::from_utf8(pair).unwrap_or_default())).collect()
    }
}

impl Net {
    /// The MAC address, if there is to be another.
    pub fn mac(&self) -> io::Result<Option<[u8; 6]>> {
        let Some(text) = &self.mac else { return Ok(None) };
        let bytes: Vec<u8> = text.split(':').map(byte).collect::<io::Result<_>>()?;
        bytes.try_into().map(Some).map_err(|_| invalid("no MAC address"))
    }

    /// The address and the mask, if there is to be another.
    pub fn ip(&self) -> io::Result<Option<(Ipv4Addr, Ipv4Addr)>> {
        let Some(text) = &self.ip else { return Ok(None) };
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let prefix: u32 = prefix.parse().ok().filter(|&prefix| prefix <= 32)?;
            let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
            Some((address.parse().ok()?, Ipv4Addr::from_bits(mask)))
        });
        parsed.map(Some).ok_or_else(|| invalid("no address with a prefix"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_says_is_read() {
        let text = r#"{"hull":1,"resumed":{"clone":1,"of":2,"name":"a","generation":"00","time_ns":5,
            "seed":"00ff10","hostname":"b","net":[{"id":"net0","index":0,"mac":"06:00:00:00:00:0a",
            "ip":"10.0.0.2/30","gateway":"10.0.0.1"}]}}"#;
        let Message { hull, resumed } = serde_json::from_str(text).unwrap();
        let resumed = resumed.unwrap();
        assert_eq!((hull, resumed.seed().unwrap()), (1, vec![0, 255, 16]));
        let net = &resumed.net[0];
        assert_eq!(net.mac().unwrap(), Some([6, 0, 0, 0, 0, 10]));
        let (address, mask) = net.ip().unwrap().unwrap();
        assert_eq!((address, mask), ([10, 0, 0, 2].into(), [255, 255, 255, 252].into()));
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let net = |mac: &str, ip: &str| Net {
            id: "net0".to_owned(),
            index: 0,
            mac: Some(mac.to_owned()),
            ip: Some(ip.to_owned()),
            gateway: None,
        };
        assert!(net("06:00:00:00:00", "").mac().is_err());
        assert!(net("06:00:00:00:00:+a", "").mac().is_err());
        for ip in ["10.0.0.2", "10.0.0.2/33", "10.0.0/8", "/"] {
            assert!(net("", ip).ip().is_err(), "{ip}");
        }
        assert_eq!(net("", "10.0.0.2/0").ip().unwrap().unwrap().1, Ipv4Addr::UNSPECIFIED);
        let seed = |seed: &str| {
            let seed = seed.to_owned();
            Resumed { time_ns: 0, seed, hostname: None, net: Vec::new() }.seed()
        };
        for wrong in ["0", "0g", "€", "00f"] {
            assert!(seed(wrong).is_err(), "{wrong}");
        }
    }
}
