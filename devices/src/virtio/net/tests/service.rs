//! The metadata service between the queues of a card.

use std::net::Ipv4Addr;

use serde_json::json;

use super::*;
use crate::virtio::device::Message;
use crate::virtio::net::mmds::{Options, TokenKey, Version};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

fn served(features: u64) -> Harness<Wired> {
    let mut subject = wired(1);
    let key = TokenKey::random().unwrap();
    let options = Options { version: Version::V1, address: ADDRESS, imds_compat: false, key };
    subject.0.set_mmds(options).unwrap();
    subject.0.update(&Message::Metadata(Arc::new(json!({"a": "b"}))));
    let mut harness = Harness::new(subject);
    harness.activate_with(features);
    harness
}

/// A request for the address of whoever has this one.
fn arp(target: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0; HEADER as usize];
    frame.extend([0xff; 6]);
    frame.extend(MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC);
    frame.extend([172, 16, 0, 2, 0, 0, 0, 0, 0, 0]);
    frame.extend(target.octets());
    frame
}

/// Sends a frame, cut into descriptors of these lengths and a last one for the rest.
fn send(harness: &mut Harness<Wired>, frame: &[u8], cuts: &[u32]) {
    let (mut gpa, len) = harness.readable(frame);
    let end = gpa + u64::from(len);
    let mut parts = Vec::new();
    for &cut in cuts {
        parts.push((gpa, cut, false));
        gpa += u64::from(cut);
    }
    parts.push((gpa, (end - gpa) as u32, false));
    harness.offer(TX, &parts);
    harness.notify(TX);
    assert!(harness.run(), "it spins");
    assert!(harness.used(TX).is_some());
}

#[test]
fn requests_for_its_address_stay_here_however_they_are_cut() {
    let mut harness = served(PLAIN);
    let cuts: [&[u32]; 5] = [&[], &[12], &[12, 14, 24], &[1, 11, 1], &[24, 2, 1, 1]];
    for cuts in cuts {
        let buffers = offer(&mut harness, &[2000]);
        send(&mut harness, &arp(ADDRESS), cuts);
        let (_, written) = harness.used(RX).unwrap();
        assert_eq!(written, 12 + 42, "{cuts:?}");
        let answer = harness.read(buffers[0].0, written);
        assert_eq!(answer[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "header with one buffer");
        assert_eq!(answer[12..18], MAC);
        assert_eq!(answer[12 + 28..12 + 32], ADDRESS.octets());
    }
    assert!(peer(&harness).receive().is_none());
    // What others have goes out, and so does what is too short to say.
    let other = arp(Ipv4Addr::new(169, 254, 169, 253));
    send(&mut harness, &other, &[12]);
    assert_eq!(peer(&harness).receive(), Some(other));
    let short = arp(ADDRESS)[..50].to_vec();
    send(&mut harness, &short, &[]);
    assert_eq!(peer(&harness).receive(), Some(short));
}

#[test]
fn answers_wait_for_buffers_and_spread_over_them() {
    let mut harness = served(PLAIN | feature::MRG_RXBUF);
    send(&mut harness, &arp(ADDRESS), &[]);
    assert!(harness.used(RX).is_none());
    // Frames of the network follow behind.
    assert!(peer(&harness).send(&frame(60, 3)));
    let buffers = offer(&mut harness, &[20; 200]);
    let lens: Vec<u32> = (0..3).map(|_| harness.used(RX).unwrap().1).collect();
    assert_eq!(lens, [20, 20, 14]);
    assert_eq!(harness.read(buffers[0].0, 12)[10..], [3, 0]);
    // For those there may have to be more: the driver gets its time to offer them.
    harness.expire_timers();
    harness.run();
    let lens: Vec<u32> = (0..4).map(|_| harness.used(RX).unwrap().1).collect();
    assert_eq!(lens, [20, 20, 20, 12]);
}

#[test]
fn buffers_that_are_too_small_lose_answers_and_nothing_else() {
    let mut harness = served(PLAIN);
    offer(&mut harness, &[40]);
    send(&mut harness, &arp(ADDRESS), &[]);
    assert!(harness.used(RX).is_none());
    assert!(peer(&harness).send(&frame(10, 3)));
    harness.run();
    assert_eq!(harness.used(RX).unwrap().1, 22);
}

#[test]
fn a_pause_forgets_nothing_and_a_reset_all() {
    let mut harness = served(PLAIN);
    send(&mut harness, &arp(ADDRESS), &[]);
    harness.pause();
    harness.resume();
    offer(&mut harness, &[2000]);
    assert_eq!(harness.used(RX).unwrap().1, 54);
    send(&mut harness, &arp(ADDRESS), &[]);
    harness.reset();
    harness.activate_with(PLAIN);
    offer(&mut harness, &[2000]);
    assert!(harness.used(RX).is_none());
    send(&mut harness, &arp(ADDRESS), &[]);
    assert_eq!(harness.used(RX).unwrap().1, 54);
}

#[test]
fn several_pairs_are_refused() {
    let (mut net, _peers) = wired(2);
    let key = TokenKey::random().unwrap();
    let options = Options { version: Version::V2, address: ADDRESS, imds_compat: true, key };
    assert!(matches!(net.set_mmds(options), Err(NetError::MmdsPairs(2))));
}

mod conformance_of_a_card_with_it {
    use super::*;

    fn subject() -> Wired {
        let mut subject = wired(1);
        let key = TokenKey::random().unwrap();
        let options = Options { version: Version::V2, address: ADDRESS, imds_compat: false, key };
        subject.0.set_mmds(options).unwrap();
        subject
    }

    conformance!(subject, probe());
}
