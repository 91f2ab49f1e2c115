//! With real TAP interfaces, each test in a network namespace of its own. They need the right to
//! make one (root, or CAP_SYS_ADMIN and CAP_NET_ADMIN) and fail without it.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::super::tap::{Tap, TapError};
use super::*;

/// Runs `test` in a thread with a network of its own.
fn in_own_network(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        // SAFETY: no memory arguments; only this thread is concerned.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "cannot make a network: {}", std::io::Error::last_os_error());
        // Frames that the host sends by itself would get between. Where there is no IPv6 there
        // are none.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

/// Makes an interface that stays when it is closed.
fn make_persistent(name: &str, queues: u16) {
    let taps = Tap::create(name, queues).unwrap();
    // SAFETY: the argument is a number.
    assert_eq!(unsafe { libc::ioctl(taps[0].fd(), libc::TUNSETPERSIST as _, 1) }, 0);
}

/// A socket that sees and sends the frames of an interface, as the host's stack does.
struct Host(OwnedFd);

const ETHERTYPE: u16 = 0x88b5;
const IPV4: u16 = 0x0800;

impl Host {
    fn on(tap: &Tap, protocol: u16) -> Host {
        let name = std::ffi::CString::new(tap.name()).unwrap();
        let protocol = protocol.to_be();
        // SAFETY: plain system calls; the address is a valid sockaddr_ll.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
            assert!(fd >= 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let len = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
            Host(OwnedFd::from_raw_fd(fd))
        }
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::write(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { libc::read(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len()) };
        frame.truncate(usize::try_from(got).ok()?);
        Some(frame)
    }
}

fn ethernet(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC);
    frame.extend(ETHERTYPE.to_be_bytes());
    frame.extend((0..len).map(|i| (i as u8).wrapping_add(seed)));
    frame
}

#[test]
fn an_interface_is_made_configured_and_gone_again() {
    in_own_network(|| {
        let mut taps = Tap::create("hull%d", 1).unwrap();
        assert_eq!(taps[0].name(), "hull0");
        assert_eq!(Tap::create("hull%d", 2).unwrap()[1].name(), "hull1");
        assert_eq!(taps[0].mtu(), 1500);
        taps[0].set_mtu(4000).unwrap();
        let address = Ipv4Addr::new(172, 30, 0, 1);
        let neighbours = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        assert!(neighbours.connect("172.30.0.2:9").is_err());
        taps[0].set_address(address, 30).unwrap();
        taps[0].set_mac([2, 0, 0, 0, 0, 9]).unwrap();
        taps[0].bring_up().unwrap();
        neighbours.connect("172.30.0.2:9").unwrap();
        assert_eq!(neighbours.local_addr().unwrap().ip(), address);
        assert!(neighbours.connect("172.30.0.5:9").is_err(), "not in a network of 4 addresses");
        assert!(matches!(Tap::create("hull0", 1), Err(TapError::Exists { .. })));
        drop(taps);
        assert!(matches!(Tap::open("hull0", 1), Err(TapError::Missing { .. })));
    });
}

#[test]
fn an_existing_interface_is_opened_or_refused_with_the_reason() {
    in_own_network(|| {
        assert!(matches!(Tap::open("nosuch", 1), Err(TapError::Missing { .. })));
        assert!(matches!(Tap::open("nosuch", 1), Err(TapError::Missing { .. })), "it was made");
        assert!(matches!(Tap::open("lo", 1), Err(TapError::NotTap { .. })));
        assert!(matches!(Tap::open("lo", 2), Err(TapError::NotTap { .. })));
        for name in ["", "a/b", "a b", "sixteen-letters-"] {
            assert!(matches!(Tap::open(name, 1), Err(TapError::Name { .. })), "{name:?}");
        }
        make_persistent("one", 1);
        make_persistent("many", 2);
        let single = |result| {
            assert!(matches!(result, Err(TapError::SingleQueue { queues: 2, .. })), "{result:?}");
        };
        single(Tap::open("one", 2));
        let taps = Tap::open("one", 1).unwrap();
        single(Tap::open("one", 2));
        assert!(matches!(Tap::open("one", 1), Err(TapError::Busy { .. })));
        drop(taps);
        Tap::open("one", 1).unwrap();
        assert_eq!(Tap::open("many", 2).unwrap().len(), 2);
        assert_eq!(Tap::open("many", 1).unwrap().len(), 1);
    });
}

#[test]
fn an_inherited_descriptor_is_checked() {
    in_own_network(|| {
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(Tap::from_fd(null, "it"), Err(TapError::NotTap { .. })));
        let tun: OwnedFd =
            std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap().into();
        assert!(matches!(Tap::from_fd(tun, "it"), Err(TapError::NotTap { .. })), "not attached");
        let taps = Tap::create("mine", 1).unwrap();
        // SAFETY: a new descriptor of ours.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::dup(taps[0].fd())) };
        drop(taps);
        assert_eq!(Tap::from_fd(fd, "it").unwrap().name(), "mine");
    });
}

#[test]
fn frames_pass_both_ways() {
    for features in [PLAIN, PLAIN | feature::MRG_RXBUF, u64::MAX] {
        in_own_network(move || {
            let taps = Tap::create("hull%d", 1).unwrap();
            taps[0].bring_up().unwrap();
            let host = Host::on(&taps[0], ETHERTYPE);
            let net = Net::new(NetOptions { taps, mac: MAC, mtu: None }).unwrap();
            let mut harness = Harness::new((net, Vec::<Peer>::new()));
            let offered = harness.offered();
            harness.activate_with(features & offered);
            let buffers: Vec<_> = (0..64).map(|_| harness.writable(2048)).collect();
            for &(gpa, len) in &buffers {
                harness.offer(RX, &[(gpa, len, true)]);
            }
            harness.kick(RX);
            harness.run();
            for round in 0..20u8 {
                host.send(&ethernet(200 + usize::from(round), round));
                harness.run();
                let (_, len) = harness.used(RX).expect("the frame did not arrive");
                let bytes = harness.read(buffers[usize::from(round)].0, len);
                assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
                assert_eq!(bytes[12..], ethernet(200 + usize::from(round), round));

                let mut frame = vec![0; HEADER as usize];
                frame.extend(ethernet(300, round));
                let (gpa, len) = harness.readable(&frame);
                assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
                while let Some(seen) = host.receive() {
                    if seen == ethernet(300, round) {
                        break;
                    }
                }
            }
            // What the kernel refuses is lost, and nothing else happens.
            let mut wrong = frame(60, 0);
            wrong[1] = 0x77;
            let (gpa, len) = harness.readable(&wrong);
            assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
            assert!(harness.take_fault().is_none());
        });
    }
}

#[test]
fn a_packet_that_the_guest_left_to_segment_passes_whole() {
    in_own_network(|| {
        let taps = Tap::create("hull%d", 1).unwrap();
        taps[0].set_address(Ipv4Addr::new(172, 30, 0, 1), 24).unwrap();
        taps[0].bring_up().unwrap();
        let socket = UdpSocket::bind("172.30.0.1:7777").unwrap();
        socket.set_nonblocking(true).unwrap();
        let net = Net::new(NetOptions { taps, mac: MAC, mtu: None }).unwrap();
        let mut harness = Harness::new((net, Vec::<Peer>::new()));
        harness.activate();
        // A UDP datagram with a partial checksum, which the host's stack must accept as complete.
        let payload = b"checksum left to the host";
        let udp_len = 8 + payload.len() as u16;
        let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 172, 30, 0, 2, 172, 30, 0, 1];
        ip[2..4].copy_from_slice(&(20 + udp_len).to_be_bytes());
        let sum = |bytes: &[u8], start: u32| {
            let words = bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(c[1]));
            let sum = words.sum::<u32>() + start;
            (sum & 0xffff) as u16 + (sum >> 16) as u16
        };
        let ip_sum = !sum(&ip, 0);
        ip[10..12].copy_from_slice(&ip_sum.to_be_bytes());
        // The pseudo-header's sum stands where the checksum goes.
        let pseudo = sum(&ip[12..20], 17 + u32::from(udp_len));
        let mut frame = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
        frame.extend([0xff; 6]);
        frame.extend(MAC);
        frame.extend([8, 0]);
        frame.extend(&ip);
        for word in [5555, 7777, udp_len, pseudo] {
            frame.extend(word.to_be_bytes());
        }
        frame.extend(payload);
        let (gpa, len) = harness.readable(&frame);
        assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
        let mut received = [0; 100];
        let (len, from) = socket.recv_from(&mut received).expect("the datagram did not arrive");
        assert_eq!(
            (&received[..len], from.to_string().as_str()),
            (&payload[..], "172.30.0.2:5555")
        );
    });
}

#[test]
fn only_the_pairs_that_the_driver_uses_get_frames() {
    in_own_network(|| {
        let taps = Tap::create("hull%d", 2).unwrap();
        taps[0].bring_up().unwrap();
        let host = Host::on(&taps[0], IPV4);
        let net = Net::new(NetOptions { taps, mac: MAC, mtu: None }).unwrap();
        let mut harness = Harness::new((net, Vec::<Peer>::new()));
        let count = |harness: &mut Harness<Wired>| {
            for queue in [0, 2] {
                while harness.free_descriptors(queue) > 128 {
                    let (gpa, len) = harness.writable(2048);
                    harness.offer(queue, &[(gpa, len, true)]);
                }
                harness.kick(queue);
            }
            harness.run();
            // Different flows, which the kernel spreads over the queues.
            for flow in 0..64 {
                let mut frame = ethernet(0, 0);
                frame[12..14].copy_from_slice(&[8, 0]);
                frame.extend([0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0]);
                frame.extend([172, 30, 0, 1, 172, 30, 0, 2, 1, flow, 2, flow, 0, 26, 0, 0]);
                frame.resize(60, 0);
                host.send(&frame);
            }
            harness.run();
            [0, 2].map(|queue| std::iter::from_fn(|| harness.used(queue)).count())
        };
        harness.activate_with(harness_features());
        assert_eq!(count(&mut harness), [64, 0], "one pair to begin with");
        assert_eq!(command(&mut harness, 4, [4, 0, 2, 0]), 0);
        let [first, second] = count(&mut harness);
        assert_eq!(first + second, 64);
        assert!(first > 0 && second > 0, "{first} and {second}");
        // A restart keeps what the driver chose, a reset does not.
        harness.pause();
        harness.resume();
        harness.run();
        assert!(count(&mut harness)[1] > 0);
        harness.reset();
        harness.activate_with(harness_features());
        assert_eq!(count(&mut harness), [64, 0]);
    });
}

fn harness_features() -> u64 {
    PLAIN | feature::MQ | feature::CTRL_VQ
}

#[test]
fn an_interface_with_several_queues_is_one_machines() {
    in_own_network(|| {
        make_persistent("many0", 4);
        let first = Tap::open("many0", 2).unwrap();
        for queues in [2, 4] {
            let refused = Tap::open("many0", queues).err();
            assert!(matches!(refused, Some(TapError::Busy { .. })), "{queues}: {refused:?}");
        }
        drop(first);
        assert_eq!(Tap::open("many0", 4).unwrap().len(), 4);
    });
}
