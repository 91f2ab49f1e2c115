//! Network cards.

use std::ffi::CString;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::linux::{check, socket};
use crate::message::Net;

/// Names of the virtio network cards, in the order of their devices: that in which the host counts them.
pub fn cards() -> io::Result<Vec<String>> {
    let mut cards = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        // Interfaces without a device, such as lo, have no such link.
        let Ok(device) = std::fs::read_link(entry.path().join("device")) else { continue };
        let device = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = device.strip_prefix("virtio").and_then(|number| number.parse::<u32>().ok());
        if let (Some(number), Ok(name)) = (number, entry.file_name().into_string()) {
            cards.push((number, name));
        }
    }
    cards.sort();
    Ok(cards.into_iter().map(|(_, name)| name).collect())
}

/// Gives a card its addresses.
pub fn configure(cards: &[String], net: &Net) -> io::Result<()> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "there is no such card");
    let name = cards.get(net.index).ok_or_else(missing)?;
    let card = Card { name, socket: socket(libc::AF_INET, libc::SOCK_DGRAM)? };
    if let Some(mac) = net.mac()? {
        card.set_mac(mac)?;
    }
    if let Some((address, mask)) = net.ip()? {
        card.set_address(libc::SIOCSIFADDR, address)?;
        card.set_address(libc::SIOCSIFNETMASK, mask)?;
        card.bring_up()?;
    }
    net.gateway.map_or(Ok(()), |gateway| card.route(gateway))
}

struct Card<'a> {
    name: &'a str,
    socket: OwnedFd,
}

impl Card<'_> {
    fn request(&self) -> libc::ifreq {
        // SAFETY: all zeros are a value of this plain structure.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let room = libc::IFNAMSIZ - 1;
        for (slot, byte) in request.ifr_name.iter_mut().zip(self.name.bytes()).take(room) {
            *slot = byte as libc::c_char;
        }
        request
    }

    fn ask(&self, call: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the structure outlives the call, which reads and fills nothing else.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), call, &raw mut *request) })
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        let mut request = self.request();
        let mut address =
            libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: Default::default() };
        for (slot, byte) in address.sa_data.iter_mut().zip(mac) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.ask(libc::SIOCSIFHWADDR as libc::Ioctl, &mut request)
    }

    fn set_address(&self, call: libc::c_ulong, address: Ipv4Addr) -> io::Result<()> {
        let mut request = self.request();
        request.ifr_ifru.ifru_addr = named(address);
        self.ask(call as libc::Ioctl, &mut request)
    }

    fn bring_up(&self) -> io::Result<()> {
        let mut request = self.request();
        self.ask(libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
        // SAFETY: the call filled this field.
        unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short };
        self.ask(libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
    }

    /// Sends what goes nowhere else to `gateway`. The routes of the address before went with it.
    fn route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        let name = CString::new(self.name)?;
        // SAFETY: all zeros are a value of this plain structure.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = named(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = named(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = named(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        route.rt_dev = name.as_ptr().cast_mut();
        let call = libc::SIOCADDRT as libc::Ioctl;
        // SAFETY: the structure and the name outlive the call, which changes neither.
        let added = check(unsafe { libc::ioctl(self.socket.as_raw_fd(), call, &raw const route) });
        match added {
            Err(err) if err.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            added => added,
        }
    }
}

/// An IPv4 address as old calls have it.
fn named(address: Ipv4Addr) -> libc::sockaddr {
    let mut named =
        libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: [0; 14] };
    // Behind the port, which has two bytes.
    for (slot, byte) in named.sa_data.iter_mut().skip(2).zip(address.octets()) {
        *slot = byte as libc::c_char;
    }
    named
}
