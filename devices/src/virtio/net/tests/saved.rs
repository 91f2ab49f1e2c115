//! A card whose machine goes on elsewhere.

use super::*;
use crate::golden;
use crate::virtio::mmio::reg;
use crate::virtio::queue::INTERRUPT_CONFIG;

#[test]
fn a_half_full_receive_queue_is_filled_by_another_machine() {
    // Buffers for a frame each, and such that a frame takes three of.
    for (features, len, each) in [(PLAIN, 2000, 1), (PLAIN | feature::MRG_RXBUF, 100, 3)] {
        let mut harness = started(features);
        let mut buffers = offer(&mut harness, &[len; 120]);
        for number in 0..5 {
            assert!(peer(&harness).send(&frame(270, number)));
        }
        harness.run();
        assert_eq!(harness.used_index(RX), 5 * each);
        // The driver has not looked, and offers some that the device does not look at either.
        for _ in 0..30 {
            let (gpa, len) = harness.writable(len);
            harness.offer(RX, &[(gpa, len, true)]);
            buffers.push((gpa, len));
        }
        harness.pause();
        let mut other = harness.moved_to(wired(1));
        drop(harness);
        other.resume();
        other.run();
        for number in 5..10 {
            assert!(peer(&other).send(&frame(270, number)));
        }
        other.run();
        let mut buffers = buffers.into_iter();
        for number in 0..10 {
            let mut bytes = Vec::new();
            for _ in 0..each {
                let (_, written) = other.used(RX).expect("a frame was lost");
                bytes.extend(other.read(buffers.next().unwrap().0, written));
            }
            assert_eq!(bytes[HEADER as usize..], frame(270, number)[HEADER as usize..]);
        }
        assert_eq!(other.used(RX), None);
    }
}

#[test]
fn a_card_keeps_its_address_and_the_pairs_that_its_driver_uses() {
    let mut harness = Harness::new(wired(3));
    harness.activate();
    assert_eq!(command(&mut harness, 6, [4, 0, 2, 0]), 0);
    harness.pause();
    let (taps, peers) = (0..3).map(|_| wire()).unzip();
    let options = NetOptions { taps, mac: [6; 6], mtu: Some(9000) };
    let mut other = harness.moved_to((Net::new(options).unwrap(), peers));
    assert_eq!(other.device().config()[..6], MAC);
    other.resume();
    assert_eq!(other.interrupt().status() & INTERRUPT_CONFIG, 0);
    assert_eq!(other.device().0.used_pairs(feature::MQ), 2);
    // A machine with fewer cannot have it.
    assert!(harness.restored(wired(1), &harness.save()).is_err());
}

#[test]
fn a_card_has_the_address_that_was_asked_for() {
    let mut harness = Harness::new(wired(1));
    harness.activate();
    harness.pause();
    let generation = harness.read_register(reg::CONFIG_GENERATION);
    let (taps, peers) = (0..1).map(|_| wire()).unzip();
    let options = NetOptions { taps, mac: [6; 6], mtu: Some(9000) };
    let mut net = Net::new(options).unwrap();
    net.keep_mac();
    let mut other = harness.restored((net, peers), &harness.save()).unwrap();
    other.resume();
    assert_eq!(other.read_register(reg::CONFIG), 0x0606_0606);
    assert_ne!(other.read_register(reg::CONFIG_GENERATION), generation);
    assert_ne!(other.interrupt().status() & INTERRUPT_CONFIG, 0);
    // Copies of the copy have it as well.
    let saved = other.device().0.save();
    assert_eq!(saved.bytes[2..], [6; 6]);
}

#[test]
fn the_payload_is_as_it_was() {
    let (mut net, _peers) = wired(3);
    net.pairs.store(2, Ordering::Relaxed);
    golden::check(&net.save(), "virtio-net", 1, "0200 020000000001", |payload| {
        net.reset();
        net.restore(payload).map(|()| net.save())
    });
    for wrong in [0u16, 4, 0xffff] {
        let bytes = [&wrong.to_le_bytes()[..], &MAC].concat();
        assert!(net.restore(&Payload { bytes, ..net.save() }).is_err(), "{wrong}");
    }
}
