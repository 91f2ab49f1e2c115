//! A driver of a network card that does anything in any order, while frames wait for it. The first
//! byte chooses the card.
#![no_main]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use devices::virtio::conformance::fuzz;
use devices::virtio::net::mmds::{DEFAULT_ADDRESS, Options, TokenKey, Version};
use devices::virtio::net::tap::Tap;
use devices::virtio::net::{Net, NetOptions};
use libfuzzer_sys::fuzz_target;

/// A card's end of a wire, and the host's.
fn wire() -> (Tap, OwnedFd) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socketpair fills in two descriptors, which are then ours.
    let [ours, theirs] = unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        fds.map(|fd| OwnedFd::from_raw_fd(fd))
    };
    (Tap::over_socket(ours).unwrap(), theirs)
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let (taps, peers): (Vec<_>, Vec<_>) = (0..=choice & 1).map(|_| wire()).unzip();
    for peer in &peers {
        for len in [12, 13, 72, 1526, 9000, usize::from(choice) * 256] {
            let frame = vec![choice; len];
            // SAFETY: the buffer is valid for its length. A full socket takes no more, which is fine.
            unsafe { libc::write(peer.as_raw_fd(), frame.as_ptr().cast(), len) };
        }
    }
    let mtu = (choice & 2 != 0).then_some(1500);
    let mut net = Net::new(NetOptions { taps, mac: [2, 0, 0, 0, 0, 1], mtu }).unwrap();
    if choice & 4 != 0 {
        let (address, key) = (DEFAULT_ADDRESS, TokenKey::random().unwrap());
        let options = Options { version: Version::V2, address, imds_compat: false, key };
        // A card with two pairs refuses it.
        let _ = net.set_mmds(options);
    }
    fuzz((net, peers), data);
});
