//! Ends of connections: of one direction, of both, from either side.

use super::super::connections::CLOSE_TICKS;
use super::super::packet::NO_RECEIVE;
use super::*;

#[test]
fn the_host_closes_one_direction_and_then_the_other() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    program.write_all(b"last words").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    let came = guest.receive();
    assert_eq!(data(&came), b"last words");
    assert_eq!((came[1].0.op, came[1].0.flags), (Op::Shutdown as u16, NO_SEND));
    // The guest may still talk.
    guest.send(packet(Op::Data, 1, 9), b"answer");
    assert_eq!(read(&mut program).unwrap(), b"answer");
    guest.nothing();
    drop(program);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
    // What is on its way does no harm.
    guest.send(packet(Op::Data, 1, 9), b"too late");
    guest.nothing();
    guest.send(packet(Op::Reset, 1, 9), b"");
    assert_eq!(guest.connections(), 0);
    guest.nothing();
}

#[test]
fn the_host_stops_reading() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    program.shutdown(std::net::Shutdown::Read).unwrap();
    guest.send(packet(Op::Data, 1, 9), b"for nobody");
    assert_eq!(guest.one(Op::Shutdown).flags, NO_RECEIVE);
    program.write_all(b"still here").unwrap();
    assert_eq!(data(&guest.receive()), b"still here");
}

#[test]
fn the_guest_closes_one_direction_and_then_the_other() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(packet(Op::Data, 1, 9), b"last words");
    guest.send(Packet { flags: NO_SEND, ..packet(Op::Shutdown, 1, 9) }, b"");
    assert_eq!(read(&mut program).unwrap(), b"last words");
    assert_eq!(read(&mut program), None);
    program.write_all(b"answer").unwrap();
    assert_eq!(data(&guest.receive()), b"answer");
    guest.send(Packet { flags: NO_RECEIVE, ..packet(Op::Shutdown, 1, 9) }, b"");
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 0);
    assert!(program.write_all(b"x").is_err());
}

#[test]
fn the_guest_stops_reading() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    guest.send(Packet { flags: NO_RECEIVE, ..packet(Op::Shutdown, 1, 9) }, b"");
    assert!(program.write_all(b"x").is_err());
    guest.send(packet(Op::Data, 1, 9), b"still here");
    assert_eq!(read(&mut program).unwrap(), b"still here");
    drop(program);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
}

#[test]
fn what_a_guest_sent_arrives_after_it_closed() {
    for op in [Op::Shutdown, Op::Reset] {
        let mut guest = Guest::new(16, 4096);
        let mut program = guest.connect(1, 9);
        let mut expected = Vec::new();
        // More than the socket takes.
        for number in 0..8 {
            let bytes = pattern(50_000, number);
            guest.send(packet(Op::Data, 1, 9), &bytes);
            expected.extend(bytes);
            guest.receive();
        }
        guest.send(Packet { flags: NEITHER, ..packet(op, 1, 9) }, b"");
        guest.one(Op::Reset);
        // The port is free for another.
        let _other = guest.connect(1, 9);
        let mut got = Vec::new();
        while let Some(bytes) = read(&mut program) {
            got.extend(bytes);
            guest.harness.run();
        }
        assert!(got == expected, "{} of {} bytes", got.len(), expected.len());
        assert_eq!(guest.connections(), 1);
    }
}

#[test]
fn a_guest_that_does_not_agree_to_an_end() {
    let mut guest = Guest::new(16, 4096);
    drop(guest.connect(1, 9));
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
    guest.ticks(CLOSE_TICKS - 1);
    guest.nothing();
    guest.ticks(1);
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 0);
}
