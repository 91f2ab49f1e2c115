//! A device whose machine goes on elsewhere: connections do not.

use super::*;
use crate::golden;
use crate::virtio::features::EVENT_IDX;
use crate::virtio::queue::{INTERRUPT_CONFIG, INTERRUPT_USED};

/// The guest's address where it goes on.
const OTHER: u64 = 6;

impl Guest {
    /// This guest with another device, which is not yet resumed; and what is left of this one.
    fn restored(&mut self, cid: u64) -> Guest {
        self.harness.pause();
        let (device, folder) = device_of(cid);
        let harness = self.harness.restored(device, &self.harness.save()).unwrap();
        let (offered, spare) = (self.offered.clone(), self.spare.clone());
        Guest { harness, folder, offered, spare }
    }

    /// Offers buffers for events. Returns whether the device wanted to know.
    fn offer_events(&mut self, count: usize) -> bool {
        for _ in 0..count {
            let (gpa, len) = self.harness.writable(8);
            self.harness.offer(EVENT, &[(gpa, len, true)]);
        }
        let wanted = self.harness.notify(EVENT);
        self.harness.run();
        wanted
    }

    /// Takes events out of their queue. Returns how many there were.
    fn events(&mut self) -> usize {
        let lens = std::iter::from_fn(|| self.harness.used(EVENT).map(|(_, written)| written));
        let lens: Vec<u32> = lens.collect();
        assert!(lens.iter().all(|&len| len == 4), "{lens:?}");
        lens.len()
    }

    fn is_held(&mut self) -> bool {
        let _program = self.program(b"CONNECT 1\n");
        let came = self.receive();
        let held = came.is_empty();
        for (request, _) in came {
            self.send(packet(Op::Reset, 1, request.from), b"");
        }
        held
    }
}

/// A packet of the guest's under its new address.
fn renamed(op: Op, guest: u32, host: u32) -> Packet {
    Packet { source: OTHER, ..packet(op, guest, host) }
}

#[test]
fn the_guest_loses_its_connections_and_gets_another_address() {
    for features in [u64::MAX, !EVENT_IDX] {
        let mut old = Guest::with(features, 16, 4096);
        assert!(old.offer_events(8));
        let mut outward = old.connect(1, 9);
        let (mut inward, port) = old.accept(52);
        // Sent, and not taken by the device.
        old.offer_packet(&packet(Op::Data, 1, 9), b"for the other end");
        let mut guest = old.restored(OTHER);
        drop(old);
        assert_eq!(read(&mut outward), None);
        assert_eq!(read(&mut inward), None);

        assert_eq!(guest.harness.read_register(reg::CONFIG), OTHER as u32);
        assert_eq!(guest.harness.read_register(reg::CONFIG + 4), 0);
        assert_ne!(guest.harness.interrupt().status() & INTERRUPT_CONFIG, 0);
        guest.harness.interrupts();
        let mut early = guest.program(b"CONNECT 52\n");
        guest.harness.resume();
        guest.harness.run();
        assert_ne!(guest.harness.interrupt().status() & INTERRUPT_USED, 0);
        assert_eq!(guest.events(), 1);
        // Nothing begins or is answered until the driver had a look at the event.
        guest.nothing();
        assert_eq!(read(&mut early), Some(Vec::new()));
        assert_eq!(guest.harness.used(TX), None);
        assert!(guest.offer_events(1), "the device does not ask for what it waits for");
        let mut came = guest.receive();
        came.sort_by_key(|(packet, _)| packet.op);
        let [(request, _), (reset, _)] = came.as_slice() else { panic!("{came:?}") };
        assert_eq!((request.op, request.to), (Op::Request as u16, 52));
        assert_eq!((reset.op, reset.from, reset.to), (Op::Reset as u16, 9, 1));
        assert_eq!(reset.destination, CID, "the driver knows its connection by that");
        assert!(guest.harness.used(TX).is_some());
        assert_eq!(guest.events(), 0);

        // Who did not hear of it hears of it now.
        for stale in [packet(Op::Data, 52, port), renamed(Op::Data, 1, 9)] {
            guest.send(stale, b"anybody there?");
            assert_eq!(guest.one(Op::Reset).destination, stale.source);
        }
        // New connections are with the programs of the new device.
        guest.send(renamed(Op::Response, 52, request.from), b"");
        guest.send(renamed(Op::Data, 52, request.from), b"hello");
        assert_eq!(read(&mut early).unwrap(), format!("OK {}\nhello", request.from).into_bytes());
        let listener = guest.listen(9);
        guest.send(renamed(Op::Request, 1, 9), b"");
        assert_eq!(guest.one(Op::Response).destination, OTHER);
        let (mut program, _) = listener.accept().unwrap();
        program.write_all(b"hello yourself").unwrap();
        assert_eq!(data(&guest.receive()), b"hello yourself");
        assert_eq!(guest.connections(), 2);
    }
}

#[test]
fn a_buffer_that_comes_late_is_not_waited_for_and_gets_the_event() {
    let mut old = Guest::new(16, 4096);
    let _old_program = old.connect(1, 9);
    let mut guest = old.restored(CID);
    assert_eq!(guest.harness.interrupt().status() & INTERRUPT_CONFIG, 0, "it has its address");
    guest.harness.resume();
    guest.ticks(ANSWER_TICKS - 1);
    assert!(guest.is_held());
    // A pause changes nothing about it.
    guest.harness.pause();
    guest.harness.resume();
    assert!(guest.is_held());
    guest.ticks(1);
    // Those that waited are gone.
    for (request, _) in guest.receive() {
        assert_eq!((request.op, request.to), (Op::Request as u16, 1));
        guest.send(packet(Op::Reset, 1, request.from), b"");
    }
    let mut between = guest.connect(1, 9);
    assert_eq!(guest.events(), 0);
    guest.offer_events(2);
    assert_eq!(guest.events(), 1);
    // The driver closes that one too.
    assert_eq!(read(&mut between), None);
    assert!(guest.is_held());
    guest.offer_events(1);
    guest.receive();
    assert!(!guest.is_held());
    let _program = guest.connect(1, 9);
    assert_eq!(guest.events(), 0);
}

#[test]
fn a_driver_that_does_not_give_the_buffer_back_is_not_waited_for_long() {
    let mut old = Guest::new(16, 4096);
    old.offer_events(1);
    let mut guest = old.restored(CID);
    guest.harness.resume();
    guest.harness.run();
    assert_eq!(guest.events(), 1);
    assert!(guest.is_held());
    guest.ticks(ANSWER_TICKS);
    guest.receive();
    let _program = guest.connect(1, 9);
    // Should it come after all, it is one buffer like others.
    guest.offer_events(1);
    assert_eq!(guest.events(), 0);
    guest.send(packet(Op::CreditRequest, 1, 9), b"");
    guest.one(Op::CreditUpdate);
}

#[test]
fn a_reset_that_was_pending_or_not_yet_seen_is_told_once() {
    for told in [false, true] {
        let mut old = Guest::new(16, 4096);
        old.harness.message(&Message::TransportReset);
        if told {
            old.offer_events(2);
        }
        let mut guest = old.restored(CID);
        // And again, without that anything happened in between.
        let mut guest = guest.restored(OTHER);
        guest.harness.resume();
        guest.offer_events(2);
        assert_eq!(guest.events(), 1 + usize::from(told));
        guest.offer_events(2);
        assert_eq!(guest.events(), 0);
        assert!(!guest.is_held());
    }
}

#[test]
fn nobody_waits_for_a_new_driver_or_for_one_without_an_event_queue() {
    let mut old = Guest::new(0, 4096);
    let mut guest = old.restored(CID);
    guest.harness.resume();
    guest.harness.reset();
    guest.harness.activate();
    guest.spare = (0..16).map(|_| guest.harness.writable(4096)).collect();
    guest.offer();
    assert!(!guest.is_held());
    guest.offer_events(2);
    assert_eq!(guest.events(), 0);

    guest.harness.reset();
    let offered = guest.harness.offered();
    assert!(guest.harness.negotiate(offered));
    for queue in [RX, TX] {
        guest.harness.set_up_queue(queue, None);
    }
    let mut guest = guest.restored(CID);
    let state = guest.harness.read_register(reg::STATUS);
    guest.harness.write_register(reg::STATUS, state | status::DRIVER_OK);
    guest.offered.clear();
    guest.spare = (0..16).map(|_| guest.harness.writable(4096)).collect();
    guest.offer();
    assert!(!guest.is_held());
}

#[test]
fn the_payload_is_as_it_was() {
    let (device, _folder) = device();
    golden::check(&device.save(), "virtio-vsock", 1, "", |payload| {
        let (mut other, _folder) = device_of(OTHER);
        other.restore(payload).map(|()| other.save())
    });
}

#[test]
fn a_call_begins_when_the_driver_knows_that_it_is_elsewhere() {
    let mut old = Guest::new(16, 4096);
    assert!(old.offer_events(8));
    let mut guest = old.restored(OTHER);
    let (message, mut own) = call(52, Duration::from_secs(5));
    // The device keeps it: no worker runs.
    guest.harness.device_mut().update(&message);
    drop(message);
    guest.harness.resume();
    guest.harness.run();
    assert_eq!(guest.events(), 1);
    guest.nothing();
    assert!(guest.offer_events(1));
    let request = guest.one(Op::Request);
    assert_eq!((request.to, request.destination), (52, OTHER));
    guest.send(renamed(Op::Response, 52, request.from), b"");
    assert_eq!(read(&mut own).unwrap(), format!("OK {}\n", request.from).into_bytes());
}
