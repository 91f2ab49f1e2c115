//! How many descriptors an interface has, ours and others'. A TAP with several queues takes whoever
//! comes, and gives each of them some of the frames.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

// linux/rtnetlink.h, linux/if_link.h: attributes inside each other.
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
/// Length of a netlink message's header, and of the part that all link messages have behind it.
const HEADER: usize = 16;
const INTERFACE_INFO: usize = 16;

/// Queues of the TAP interface with this index that somebody has open, used or switched off
/// (`RTM_GETLINK`). `None` if the kernel does not say.
///
/// # Errors
/// The kernel cannot be asked.
pub(super) fn queues(index: u32) -> io::Result<Option<u32>> {
    // SAFETY: no memory arguments; a descriptor that is not negative is ours.
    let socket = unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = [0u8; HEADER + INTERFACE_INFO];
    request[0..4].copy_from_slice(&((HEADER + INTERFACE_INFO) as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&libc::RTM_GETLINK.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[HEADER + 4..HEADER + 8].copy_from_slice(&index.to_ne_bytes());
    let mut answer = vec![0u8; 16 * 1024];
    // SAFETY: both buffers are valid for their lengths. The kernel answers before send returns.
    let len = unsafe {
        let sent = libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0);
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let room = answer.len();
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), room, libc::MSG_DONTWAIT)
    };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let attributes = answer.get(HEADER + INTERFACE_INFO..len).unwrap_or_default();
    let data = find(attributes, IFLA_LINKINFO).and_then(|info| find(info, IFLA_INFO_DATA));
    let number = |kind| {
        let bytes = find(data?, kind)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    let (used, off) = (number(IFLA_TUN_NUM_QUEUES), number(IFLA_TUN_NUM_DISABLED_QUEUES));
    Ok(used.map(|used| used.saturating_add(off.unwrap_or(0))))
}

/// The value of the first attribute of this kind.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let (&[a, b, c, d], _) = attributes.split_first_chunk::<4>()?;
        let len = usize::from(u16::from_ne_bytes([a, b]));
        // The upper bits say how the value is written.
        let found = u16::from_ne_bytes([c, d]) & 0x3fff;
        let value = attributes.get(4..len)?;
        if found == kind {
            return Some(value);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_cut_ones_are_not() {
        let mut bytes = Vec::new();
        for (kind, value) in [(7u16, &[1u8, 2, 3][..]), (8, &[9, 0, 0, 0])] {
            bytes.extend((4 + value.len() as u16).to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        assert_eq!(find(&bytes, 8), Some(&[9, 0, 0, 0][..]));
        assert_eq!(find(&bytes, 7), Some(&[1, 2, 3][..]));
        assert_eq!(find(&bytes, 6), None);
        assert_eq!(find(&bytes[..bytes.len() - 1], 8), None);
        assert_eq!(find(&[2, 0, 7, 0], 7), None);
    }
}
