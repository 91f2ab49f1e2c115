//! Connections beside others.

use super::super::connections::MOST;
use super::*;

#[test]
fn many_connections_at_once() {
    let mut guest = Guest::new(128, 4096);
    let listener = guest.listen(9);
    let mut streams = HashMap::new();
    for number in 0..1000u32 {
        if number % 2 == 0 {
            guest.send(packet(Op::Request, 5000 + number, 9), b"");
            guest.one(Op::Response);
            streams.insert((9, 5000 + number), listener.accept().unwrap().0);
        } else {
            let (program, host) = guest.accept(7);
            streams.insert((host, 7), program);
        }
    }
    assert_eq!(guest.connections(), 1000);
    // Each says its own number, both ways at once.
    for (&(host, port), program) in &mut streams {
        program.set_nonblocking(true).unwrap();
        program.write_all(format!("{host}/{port}").as_bytes()).unwrap();
        guest.send(packet(Op::Data, port, host), format!("{port}/{host}").as_bytes());
    }
    let mut heard = HashMap::new();
    for (packet, bytes) in guest.receive() {
        assert_eq!(packet.op, Op::Data as u16);
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(text, format!("{}/{}", packet.from, packet.to));
        heard.insert((packet.from, packet.to), text);
    }
    assert_eq!(heard.len(), 1000);
    for (&(host, port), program) in &mut streams {
        assert_eq!(read(program).unwrap(), format!("{port}/{host}").into_bytes());
    }
    // There is a limit, and it costs only those who come too late.
    for number in 1000..MOST as u32 {
        guest.send(packet(Op::Request, 5000 + number, 9), b"");
        guest.one(Op::Response);
    }
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.one(Op::Reset);
    let mut late = guest.program(b"CONNECT 7\n");
    guest.nothing();
    assert!(matches!(late.read(&mut [0; 9]), Ok(0) | Err(_)));
    drop(streams);
    let ends = guest.receive();
    assert_eq!(ends.len(), 1000);
    for (end, _) in ends {
        assert_eq!((end.op, end.flags), (Op::Shutdown as u16, NEITHER));
        guest.send(packet(Op::Reset, end.to, end.from), b"");
    }
    assert_eq!(guest.connections(), MOST - 1000);
}

#[test]
fn silent_programs_make_place() {
    let mut guest = Guest::new(16, 4096);
    let mut silent = Vec::new();
    for _ in 0..MOST {
        silent.push(guest.program(b""));
        guest.harness.run();
    }
    assert_eq!(guest.connections(), MOST);
    let _program = guest.connect(1, 9);
    let (_other, _) = guest.accept(4);
    assert_eq!(guest.connections(), MOST);
    let closed = silent.iter_mut().filter_map(|program| read(program).is_none().then_some(()));
    assert_eq!(closed.count(), 2);
}

#[test]
fn connections_have_turns() {
    let mut guest = Guest::new(16, 1044);
    let mut programs: Vec<UnixStream> = (0..4).map(|n| guest.connect(100 + n, 9)).collect();
    for program in &mut programs {
        program.write_all(&pattern(150_000, 0)).unwrap();
    }
    // Of the first half of what comes, each has its part.
    let mut bytes = [0u32; 4];
    while bytes.iter().sum::<u32>() < 300_000 {
        for (packet, _) in guest.take() {
            bytes[packet.to as usize - 100] += packet.len;
        }
        guest.offer();
    }
    assert!(bytes.iter().all(|&bytes| bytes >= 60_000), "{bytes:?}");
}
