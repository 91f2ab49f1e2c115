//! How much may be on its way, and into which buffers it goes.

use super::*;

#[test]
fn the_guest_stops_where_its_credit_ends() {
    let mut guest = Guest::new(16, 4096);
    let listener = guest.listen(9);
    guest.send(packet(Op::Request, 1, 9), b"");
    let room = guest.one(Op::Response).buffer;
    let mut program = listener.accept().unwrap().0;
    program.set_nonblocking(true).unwrap();
    // Two sockets' worth, of which the program reads nothing.
    let (mut sent, mut told) = (0u32, 0u32);
    let mut expected = Vec::new();
    while sent - told < room {
        let bytes = pattern(50_000.min(room - (sent - told)) as usize, sent as usize);
        guest.send(packet(Op::Data, 1, 9), &bytes);
        sent += bytes.len() as u32;
        expected.extend(bytes);
        for (update, _) in guest.receive() {
            assert_eq!((update.op, update.buffer), (Op::CreditUpdate as u16, room));
            told = update.forwarded;
        }
        assert!(sent < 8 << 20, "a program that reads nothing takes everything");
    }
    guest.nothing();
    // The program reads: nothing is lost, and there is room again.
    let mut got = Vec::new();
    while got.len() < expected.len() {
        got.extend(read(&mut program).unwrap());
        guest.harness.run();
    }
    assert_eq!(got, expected);
    let updates = guest.receive();
    assert_eq!(updates.last().unwrap().0.forwarded, sent);
    // What does not fit into socket and room costs the connection.
    let bytes = pattern(room as usize / 2, 0);
    for _ in 0..8 {
        guest.offer_packet(&packet(Op::Data, 1, 9), &bytes);
    }
    guest.harness.kick(1);
    let came = guest.receive();
    assert!(came.iter().any(|(packet, _)| packet.op == Op::Reset as u16), "{came:?}");
    assert_eq!(guest.connections(), 0);
}

#[test]
fn the_host_stops_where_the_guests_credit_ends() {
    let mut guest = Guest::new(32, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(Packet { buffer: 10_000, ..packet(Op::CreditUpdate, 1, 9) }, b"");
    let bytes = pattern(30_000, 3);
    program.write_all(&bytes).unwrap();
    let mut got = data(&guest.receive());
    assert_eq!(got.len(), 10_000);
    guest.ticks(1);
    guest.one(Op::CreditRequest);
    guest.ticks(10);
    guest.nothing();
    guest.send(Packet { buffer: 10_000, ..packet(Op::CreditUpdate, 1, 9) }, b"");
    guest.nothing();
    let more = Packet { buffer: 10_000, forwarded: 4_000, ..packet(Op::CreditUpdate, 1, 9) };
    guest.send(more, b"");
    got.extend(data(&guest.receive()));
    assert_eq!(got.len(), 14_000);
    guest.send(Packet { buffer: 50_000, ..more }, b"");
    got.extend(data(&guest.receive()));
    assert_eq!(got, bytes);
    guest.send(packet(Op::CreditRequest, 1, 9), b"");
    guest.one(Op::CreditUpdate);
}

#[test]
fn buffers_of_any_shape_are_filled() {
    for (count, size) in [(3, 45), (7, 1000), (16, 4096), (2, 70_000)] {
        let mut guest = Guest::new(count, size);
        let mut program = guest.connect(1, 9);
        let bytes = pattern(150_000, 1);
        program.write_all(&bytes[..5]).unwrap();
        let mut got = data(&guest.receive());
        assert_eq!(got.len(), 5);
        let mut rest = &bytes[5..];
        while got.len() < bytes.len() {
            let len = program.write(rest).unwrap_or(0);
            rest = &rest[len..];
            got.extend(data(&guest.receive()));
            let update = Packet { forwarded: got.len() as u32, ..packet(Op::CreditUpdate, 1, 9) };
            guest.send(update, b"");
        }
        assert!(got == bytes, "{count} buffers of {size}");
    }
    // The header in pieces, as a driver may lay it out.
    let mut guest = Guest::new(0, 0);
    let (gpa, _) = guest.harness.writable(4096);
    let pieces: Vec<Buffer> =
        [(0, 10), (10, 33), (43, 2), (45, 100)].map(|(at, len)| (gpa + at, len, true)).to_vec();
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.harness.offer(0, &pieces);
    guest.harness.notify(0);
    guest.harness.run();
    assert_eq!(guest.harness.used(0).map(|(_, written)| written), Some(44));
    assert_eq!(Packet::parse(&guest.harness.read(gpa, 44)).op, Op::Reset as u16);
}
