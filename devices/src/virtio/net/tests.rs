use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use proptest::prelude::*;

use super::*;
use crate::virtio::conformance::{Harness, Probe, conformance};
use crate::virtio::device::{BATCH, Fault};
use crate::virtio::features::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use crate::virtio::mmio::reg;

mod interface;
mod limits;
mod saved;
mod service;

const RX: u16 = 0;
const TX: u16 = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Negotiated where frames are to come as they are, so that few buffers are enough.
const PLAIN: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | feature::MAC;

/// The host's end of a socket that stands in for a TAP.
struct Peer(OwnedFd);

impl Peer {
    fn send(&self, frame: &[u8]) -> bool {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::write(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
        sent == frame.len() as isize
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        // SAFETY: the buffer is valid for its length.
        let got = unsafe { libc::read(self.0.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len()) };
        frame.truncate(usize::try_from(got).ok()?);
        Some(frame)
    }
}

fn wire() -> (Tap, Peer) {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socketpair fills in two descriptors, which are then ours.
    let [ours, theirs] = unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()), 0);
        fds.map(|fd| OwnedFd::from_raw_fd(fd))
    };
    // Room for more frames than a batch has.
    let bytes: libc::c_int = 1 << 20;
    let (option, len) = (libc::SO_SNDBUF, size_of_val(&bytes) as u32);
    // SAFETY: the option is an int.
    let result = unsafe {
        let value = (&raw const bytes).cast();
        libc::setsockopt(theirs.as_raw_fd(), libc::SOL_SOCKET, option, value, len)
    };
    assert_eq!(result, 0);
    (Tap::over_socket(ours).unwrap(), Peer(theirs))
}

type Wired = (Net, Vec<Peer>);

fn wired(pairs: usize) -> Wired {
    let (taps, peers) = (0..pairs).map(|_| wire()).unzip();
    (Net::new(NetOptions { taps, mac: MAC, mtu: Some(9000) }).unwrap(), peers)
}

/// `len` bytes of frame after the header, different for each `seed`.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER as usize];
    frame.extend((0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)));
    frame
}

fn probe() -> Probe<Wired> {
    Probe {
        queue: TX,
        request: |harness| {
            // What earlier requests left in the socket would block it.
            while harness.device().1[0].receive().is_some() {}
            let (gpa, len) = harness.readable(&frame(60, 7));
            vec![(gpa, HEADER as u32, false), (gpa + HEADER, len - HEADER as u32, false)]
        },
        check: |harness, written| {
            assert_eq!(written, 0);
            assert_eq!(harness.device().1[0].receive(), Some(frame(60, 7)));
        },
        stimulus: |harness| {
            for peer in &harness.device().1 {
                peer.send(&frame(60, 1));
            }
        },
    }
}

mod one_pair {
    use super::*;
    conformance!(|| wired(1), probe());
}

mod three_pairs {
    use super::*;
    conformance!(|| wired(3), probe());
}

fn started(features: u64) -> Harness<Wired> {
    let mut harness = Harness::new(wired(1));
    harness.activate_with(features);
    harness
}

/// Offers receive buffers of these lengths. Returns where they are.
fn offer(harness: &mut Harness<Wired>, lens: &[u32]) -> Vec<(u64, u32)> {
    let buffers: Vec<_> = lens.iter().map(|&len| harness.writable(len)).collect();
    for &(gpa, len) in &buffers {
        harness.offer(RX, &[(gpa, len, true)]);
    }
    harness.notify(RX);
    assert!(harness.run(), "it spins");
    buffers
}

fn peer(harness: &Harness<Wired>) -> &Peer {
    &harness.device().1[0]
}

#[test]
fn identity_is_in_the_configuration() {
    let (net, _peers) = wired(2);
    assert_eq!(net.config(), [2, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0x28, 0x23]);
    let mq = feature::MQ | feature::CTRL_VQ;
    assert_eq!(net.features() & (mq | feature::MTU), mq | feature::MTU);
    assert_eq!(net.groups(), [0..2, 2..4, 4..5]);
    let (tap, _peer) = wire();
    let plain = Net::new(NetOptions { taps: vec![tap], mac: MAC, mtu: None }).unwrap();
    assert_eq!(plain.features() & (mq | feature::MTU), 0);
    assert_eq!(plain.groups(), std::iter::once(0..2).collect::<Vec<_>>());
    assert!(matches!(
        Net::new(NetOptions { taps: Vec::new(), mac: MAC, mtu: None }),
        Err(NetError::Pairs(0))
    ));
    let (tap, _peer) = wire();
    let small = NetOptions { taps: vec![tap], mac: MAC, mtu: Some(67) };
    assert!(matches!(Net::new(small), Err(NetError::Mtu(67))));
}

#[test]
fn offloads_follow_what_the_driver_can_take() {
    use feature::*;
    use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO};
    assert_eq!(offloads(CSUM | HOST_TSO4), 0);
    assert_eq!(offloads(GUEST_TSO4 | GUEST_UFO), 0, "segments need checksums");
    assert_eq!(offloads(GUEST_CSUM | GUEST_ECN), TUN_F_CSUM, "ECN needs segments");
    assert_eq!(offloads(GUEST_CSUM | GUEST_TSO6), TUN_F_CSUM | TUN_F_TSO6);
    let all = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_UFO;
    assert_eq!(offloads(u64::MAX), all);
}

#[test]
fn a_batch_of_frames_goes_out_in_order_with_one_interrupt() {
    let mut harness = started(PLAIN);
    for n in 0..100 {
        let (gpa, len) = harness.readable(&frame(60 + n, n as u8));
        harness.offer(TX, &[(gpa, 5, false), (gpa + 5, len - 5, false)]);
    }
    harness.interrupts();
    harness.kick(TX);
    harness.run();
    for n in 0..100 {
        assert_eq!(peer(&harness).receive(), Some(frame(60 + n, n as u8)));
    }
    assert_eq!(harness.interrupts(), 1);
}

#[test]
fn a_ring_that_is_full_is_worked_off_and_looked_at_again() {
    for features in [PLAIN, PLAIN & !EVENT_IDX] {
        let mut harness = started(features);
        let (gpa, len) = harness.readable(&frame(20, 1));
        for _ in 0..3 {
            for _ in 0..QUEUE_SIZE {
                harness.offer(TX, &[(gpa, len, false)]);
            }
            assert!(harness.notify(TX), "the device does not want to know");
            for _ in 0..100 {
                harness.run();
                while peer(&harness).receive().is_some() {}
            }
            let used = std::iter::from_fn(|| harness.used(TX)).count();
            assert_eq!(used, usize::from(QUEUE_SIZE));
        }
    }
}

#[test]
fn frames_of_impossible_length_are_completed_and_not_sent() {
    let mut harness = started(PLAIN);
    let (gpa, _) = harness.readable(&[0; 1000]);
    assert_eq!(harness.request(TX, &[(gpa, 11, false)]), Some(0));
    assert_eq!(harness.request(TX, &[(gpa, 100, true)]), Some(0), "nothing to send");
    let whole = harness.request(TX, &[(0, MAX_FRAME as u32, false), (0, 1, false)]);
    assert_eq!(whole, Some(0));
    assert_eq!(peer(&harness).receive(), None);
    assert_eq!(harness.request(TX, &[(0, MAX_FRAME as u32, false)]), Some(0));
    assert_eq!(peer(&harness).receive().unwrap().len(), MAX_FRAME as usize);
    assert!(harness.take_fault().is_none());
}

/// Offers frames until the wire is full. Returns how many.
fn clog(harness: &mut Harness<Wired>) -> u32 {
    let (gpa, len) = harness.readable(&frame(30_000, 3));
    let mut offered = 0;
    while harness.free_descriptors(TX) > 0 {
        harness.offer(TX, &[(gpa, len, false)]);
        offered += 1;
        harness.kick(TX);
        harness.run();
        if harness.used_index(TX) < offered {
            return u32::from(offered);
        }
    }
    panic!("the wire has no end");
}

#[test]
fn a_full_wire_makes_the_guest_wait() {
    let mut harness = started(PLAIN);
    for _ in 0..3 {
        let already = u32::from(harness.used_index(TX));
        let offered = clog(&mut harness);
        harness.offer(TX, &[(0, 100, false)]);
        harness.kick(TX);
        assert!(harness.run(), "it spins");
        assert_eq!(u32::from(harness.used_index(TX)), already + offered - 1 - already);
        let mut received = 0;
        loop {
            while peer(&harness).receive().is_some() {
                received += 1;
            }
            harness.run();
            if u32::from(harness.used_index(TX)) == offered + 1 {
                break;
            }
        }
        while peer(&harness).receive().is_some() {
            received += 1;
        }
        assert_eq!(received, offered + 1 - already);
        harness.reset();
        harness.activate_with(PLAIN);
    }
}

#[test]
fn a_worker_that_waits_for_room_stops_and_goes_on() {
    let mut harness = started(PLAIN);
    let offered = clog(&mut harness);
    let states = harness.pause();
    assert_eq!(u32::from(states[usize::from(TX)].1.next_avail), offered - 1);
    harness.resume();
    harness.run();
    while peer(&harness).receive().is_some() {}
    harness.run();
    assert_eq!(u32::from(harness.used_index(TX)), offered);
}

#[test]
fn a_frame_spreads_over_mergeable_buffers() {
    let mut harness = started(PLAIN | feature::MRG_RXBUF);
    // Enough for a packet of the MTU.
    let buffers = offer(&mut harness, &[600; 40]);
    let sent = frame(1388, 9);
    assert!(peer(&harness).send(&sent));
    harness.run();
    let used: Vec<_> = std::iter::from_fn(|| harness.used(RX)).map(|(_, len)| len).collect();
    assert_eq!(used, [600, 600, 200]);
    let mut received: Vec<u8> =
        buffers.iter().take(3).flat_map(|&(gpa, len)| harness.read(gpa, len)).collect();
    assert_eq!(received[10..12], [3, 0], "num_buffers");
    received[10] = 0;
    assert_eq!(received[..1400], sent);
    // The buffers that are left serve the next frame.
    assert!(peer(&harness).send(&frame(50, 8)));
    harness.run();
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(62));
    assert_eq!(harness.read(buffers[3].0 + 10, 2), [1, 0]);
    assert_eq!(harness.read(buffers[3].0 + 12, 50), frame(50, 8)[12..]);
}

#[test]
fn without_mergeable_buffers_a_frame_fits_or_is_dropped() {
    let mut harness = started(PLAIN);
    let buffers = offer(&mut harness, &[100, 200]);
    for len in [89, 3000, 88, 188] {
        assert!(peer(&harness).send(&frame(len, len as u8)));
    }
    harness.run();
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(100));
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(200));
    let expected = frame(88, 88);
    assert_eq!(harness.read(buffers[0].0 + 12, 88), expected[12..]);
    assert_eq!(harness.read(buffers[0].0 + 10, 2), [1, 0]);
    assert!(harness.take_fault().is_none());
}

#[test]
fn frames_wait_for_buffers() {
    let mut harness = started(PLAIN);
    for n in 0..5 {
        assert!(peer(&harness).send(&frame(100, n)));
    }
    assert!(harness.run(), "it spins");
    for n in 0..5u8 {
        let buffers = offer(&mut harness, &[1526]);
        assert_eq!(harness.used(RX).map(|(_, len)| len), Some(112));
        assert_eq!(harness.read(buffers[0].0 + 12, 100), frame(100, n)[12..]);
    }
    offer(&mut harness, &[1526]);
    assert_eq!(harness.used(RX), None);
    harness.interrupts();
    assert!(peer(&harness).send(&frame(100, 9)));
    harness.run();
    assert!(harness.used(RX).is_some());
    assert_eq!(harness.interrupts(), 1);
}

#[test]
fn a_small_ring_gets_what_fits_after_a_while() {
    let wanted = PLAIN | feature::MRG_RXBUF | feature::GUEST_CSUM | feature::GUEST_TSO4;
    let mut harness = started(wanted);
    offer(&mut harness, &[2000, 2000]);
    for len in [3000, 5000, 500] {
        assert!(peer(&harness).send(&frame(len, 1)));
    }
    harness.run();
    assert_eq!(harness.used(RX), None, "the guest may have more buffers on their way");
    assert!(harness.expire_timers());
    harness.run();
    let used: Vec<_> = std::iter::from_fn(|| harness.used(RX)).map(|(_, len)| len).collect();
    assert_eq!(used, [2000, 1012]);
    // The long one and the short one wait for the next buffers.
    offer(&mut harness, &[2000]);
    assert!(harness.expire_timers());
    harness.run();
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(512), "the long one never fits");
    assert!(!harness.expire_timers(), "no timer runs when there are no buffers at all");
}

#[test]
fn held_buffers_are_given_back() {
    let mut harness = started(PLAIN | feature::MRG_RXBUF);
    offer(&mut harness, &[1526; 20]);
    assert!(peer(&harness).send(&frame(100, 1)));
    harness.run();
    assert!(harness.used(RX).is_some());
    let states = harness.pause();
    let (_, state) = states[usize::from(RX)];
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    assert!(peer(&harness).send(&frame(200, 2)));
    harness.resume();
    harness.run();
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(212));
}

#[test]
fn more_frames_than_a_batch_all_arrive() {
    let mut harness = started(PLAIN);
    let mut sent = 0u32;
    while sent < BATCH as u32 + 50 && peer(&harness).send(&frame(60, sent as u8)) {
        sent += 1;
    }
    assert!(sent > BATCH as u32, "the wire holds {sent} frames only");
    // From here on readiness is not reported again.
    harness.run();
    let mut received = 0;
    while received < sent {
        let room = harness.free_descriptors(RX);
        offer(&mut harness, &vec![1526; room]);
        let before = received;
        while let Some((_, len)) = harness.used(RX) {
            assert_eq!(len, 72);
            received += 1;
        }
        assert!(received > before, "no progress after {received} frames");
    }
}

#[test]
fn a_receive_buffer_that_is_not_writable_is_a_fault() {
    for (first, second) in [(false, false), (false, true)] {
        let mut harness = started(PLAIN);
        let (gpa, len) = harness.readable(&[0; 100]);
        harness.request(RX, &[(gpa, len, first), (gpa, len, second)]);
        assert!(matches!(harness.take_fault(), Some(Fault::Request(RX, _))));
    }
}

#[test]
fn a_peer_that_hangs_up_is_the_end_of_receiving_only() {
    let mut harness = started(PLAIN);
    offer(&mut harness, &[1526; 4]);
    harness.device_mut().1.clear();
    assert!(harness.run(), "it spins");
    assert_eq!(harness.used(RX), None);
    let (gpa, len) = harness.readable(&frame(60, 0));
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
    assert!(harness.take_fault().is_none());
}

fn command<const N: usize>(harness: &mut Harness<Wired>, queue: u16, bytes: [u8; N]) -> u8 {
    let (gpa, len) = harness.readable(&bytes);
    let (answer, _) = harness.writable(1);
    harness.write(answer, &[0xee]);
    assert_eq!(harness.request(queue, &[(gpa, len, false), (answer, 1, true)]), Some(1));
    harness.read(answer, 1)[0]
}

#[test]
fn the_driver_chooses_how_many_pairs_it_uses() {
    let mut harness = Harness::new(wired(3));
    harness.activate();
    let pairs = |harness: &Harness<Wired>| harness.device().save().bytes[..2].to_vec();
    assert_eq!(pairs(&harness), [1, 0]);
    assert_eq!(command(&mut harness, 6, [4, 0, 3, 0]), 0);
    assert_eq!(pairs(&harness), [3, 0]);
    for wrong in [[4, 0, 0, 0], [4, 0, 4, 0], [4, 0, 3, 1], [4, 1, 1, 0], [5, 0, 1, 0]] {
        assert_eq!(command(&mut harness, 6, wrong), 1, "{wrong:?}");
    }
    assert_eq!(command(&mut harness, 6, [4, 0, 1]), 1);
    let (answer, _) = harness.writable(1);
    assert_eq!(harness.request(6, &[(answer, 1, true)]), Some(1));
    assert_eq!(harness.read(answer, 1), [1]);
    let (gpa, len) = harness.readable(&[4, 0, 1, 0]);
    assert_eq!(harness.request(6, &[(gpa, len, false)]), Some(0), "no room for an answer");
    assert_eq!(command(&mut harness, 6, [4, 0, 3, 0]), 0);
    assert_eq!(pairs(&harness), [3, 0]);
    harness.pause();
    harness.resume();
    assert_eq!(pairs(&harness), [3, 0]);
    harness.reset();
    assert_eq!(pairs(&harness), [1, 0]);

    let mut device = wired(2);
    let three = Payload { bytes: vec![3, 0, 2, 0, 0, 0, 0, 1], ..device.save() };
    assert!(matches!(device.restore(&three), Err(RestoreError::Invalid { .. })));
}

#[test]
fn without_mq_the_control_queue_follows_the_first_pair() {
    let mut harness = Harness::new(wired(3));
    harness.activate_with(PLAIN | feature::CTRL_VQ);
    assert_eq!(command(&mut harness, 2, [4, 0, 1, 0]), 1, "MQ was not negotiated");
    assert_eq!(harness.read_register(reg::STATUS) & 0xf, 0xf);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// However the driver cuts its buffers, frames arrive whole and in order, each in as many
    /// buffers as its header says.
    #[test]
    fn mergeable_buffers_of_any_size(
        sizes in prop::collection::vec(
            prop::collection::vec(prop_oneof![1u32..20, 100u32..3000], 1..4), 1..20),
        lens in prop::collection::vec(14usize..1500, 1..20))
    {
        let mut harness = started(PLAIN | feature::MRG_RXBUF);
        let mut chains = std::collections::HashMap::new();
        let mut turn = sizes.iter().cycle();
        let mut arrived = Vec::new();
        for (seed, &len) in (0..).zip(&lens) {
            prop_assert!(peer(&harness).send(&frame(len, seed)));
        }
        let mut current: (Vec<u8>, u16) = (Vec::new(), 0);
        let mut idle = 0;
        while arrived.len() < lens.len() && idle < 300 {
            idle += 1;
            if let Some(chain) = turn.next().filter(|c| c.len() <= harness.free_descriptors(RX)) {
                let buffers: Vec<_> = chain.iter().map(|&len| harness.writable(len)).collect();
                let list: Vec<_> = buffers.iter().map(|&(gpa, len)| (gpa, len, true)).collect();
                chains.insert(harness.offer(RX, &list), buffers);
            } else {
                harness.expire_timers();
            }
            harness.notify(RX);
            harness.run();
            while let Some((head, used)) = harness.used(RX) {
                idle = 0;
                let mut bytes: Vec<u8> =
                    chains[&head].iter().flat_map(|&(gpa, len)| harness.read(gpa, len)).collect();
                prop_assert!(used as usize <= bytes.len());
                bytes.truncate(used as usize);
                current.0.extend(bytes);
                current.1 += 1;
                // A header that is cut says how many buffers there are only when it is complete.
                if current.0.len() >= 12
                    && u16::from_le_bytes([current.0[10], current.0[11]]) == current.1
                {
                    let mut whole = std::mem::take(&mut current).0;
                    whole[10..12].fill(0);
                    arrived.push(whole);
                }
            }
        }
        // Frames that were longer than all that was held when time was up are dropped.
        let mut expected = (0..).zip(&lens).map(|(seed, &len)| frame(len, seed));
        for whole in &arrived {
            prop_assert!(expected.any(|sent| sent == *whole), "a frame came out damaged");
        }
        prop_assert_eq!(current.1, 0, "a frame came out in part");
    }
}
