//! Drivers that break the rules.

use super::super::connections::MOST_REFUSALS;
use super::*;

#[test]
fn breaches_cost_the_connection_and_no_other() {
    let mut guest = Guest::new(16, 4096);
    let mut other = guest.connect(2, 10);
    type Breach = fn(Packet) -> Packet;
    let breaches: [(&str, Breach); 6] = [
        ("a second request", |p| Packet { op: Op::Request as u16, ..p }),
        ("an answer to nothing", |p| Packet { op: Op::Response as u16, ..p }),
        ("an unknown operation", |p| Packet { op: 77, ..p }),
        ("operation 0", |p| Packet { op: 0, ..p }),
        ("less than it says", |p| Packet { op: Op::Data as u16, len: 100, ..p }),
        ("more than fits", |p| Packet { op: Op::Data as u16, len: u32::MAX, ..p }),
    ];
    for (what, breach) in breaches {
        let mut program = guest.connect(1, 9);
        guest.send(breach(packet(Op::Data, 1, 9)), b"some bytes");
        let reset = guest.one(Op::Reset);
        assert_eq!((reset.from, reset.to), (9, 1), "{what}");
        assert_eq!(read(&mut program), None, "{what}");
        assert_eq!(guest.connections(), 1, "{what}");
    }
    let mut program = guest.connect(1, 9);
    guest.send(Packet { flags: NO_SEND, ..packet(Op::Shutdown, 1, 9) }, b"");
    guest.send(packet(Op::Data, 1, 9), b"after the end");
    guest.one(Op::Reset);
    assert_eq!(read(&mut program), None);
    guest.send(packet(Op::Data, 2, 10), b"unharmed");
    assert_eq!(read(&mut other).unwrap(), b"unharmed");
}

#[test]
fn packets_that_belong_to_nothing() {
    let mut guest = Guest::new(16, 4096);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(packet(op, 1, 9), b"");
        guest.one(Op::Reset);
    }
    guest.send(packet(Op::Reset, 1, 9), b"");
    guest.nothing();
    guest.send(Packet { source: CID + 1, ..packet(Op::Request, 1, 9) }, b"");
    assert_eq!(guest.one(Op::Reset).destination, CID + 1, "back to where it came from");
    let _listener = guest.listen(9);
    guest.send(Packet { kind: 2, ..packet(Op::Request, 1, 9) }, b"");
    let reset = guest.one(Op::Reset);
    assert_eq!((reset.kind, reset.destination), (2, CID));
    // Shorter than a header.
    let (gpa, _) = guest.harness.readable(&[1; 44]);
    assert_eq!(guest.harness.request(1, &[(gpa, 43, false)]), Some(0));
    guest.nothing();
    // Another machine's address; the answer comes from there.
    guest.send(Packet { destination: 77, ..packet(Op::Request, 1, 9) }, b"");
    guest.harness.run();
    let (head, written) = guest.harness.used(0).unwrap();
    let (gpa, _) = guest.offered[&head];
    let reset = Packet::parse(&guest.harness.read(gpa, written));
    assert_eq!((reset.source, reset.op), (77, Op::Reset as u16));
}

#[test]
fn a_flood_without_buffers_stops_by_itself() {
    let mut guest = Guest::new(0, 0);
    let mut taken = 0;
    for number in 0..2000u32 {
        if guest.harness.free_descriptors(1) == 0 {
            break;
        }
        guest.offer_packet(&packet(Op::Data, number, 9), b"");
        guest.harness.notify(1);
        guest.harness.run();
        while guest.harness.used(1).is_some() {
            taken += 1;
        }
    }
    assert_eq!(taken, MOST_REFUSALS, "the rest waits in the queue");
    // With buffers it goes on, and every packet is answered.
    guest.spare = (0..64).map(|_| guest.harness.writable(4096)).collect();
    guest.offer();
    let answers = guest.receive().len();
    while guest.harness.used(1).is_some() {
        taken += 1;
    }
    assert_eq!(answers, taken);
    assert!(taken > MOST_REFUSALS + 200);

    // The same with packets of a connection: it owes few answers, however often it is asked.
    let mut guest = Guest::new(4, 4096);
    let _program = guest.connect(1, 9);
    for _ in 0..5000 {
        guest.send(packet(Op::CreditRequest, 1, 9), b"");
    }
    assert_eq!(guest.harness.used_index(0), 5, "an answer to the request, four updates");
    assert_eq!(guest.take().len(), 4);
    guest.offer();
    assert_eq!(guest.receive().len(), 1, "all others were one");
}
