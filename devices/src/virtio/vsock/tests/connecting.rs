//! Who connects to whom, what is said before, and who waits for how long.

use super::*;

#[test]
fn the_guest_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1025, 9000);
    guest.send(packet(Op::Data, 1025, 9000), b"from the guest");
    assert_eq!(read(&mut program).unwrap(), b"from the guest");
    program.write_all(b"from the host").unwrap();
    let came = guest.receive();
    assert_eq!(came.len(), 1);
    assert_eq!(came[0].0.op, Op::Data as u16);
    assert_eq!((came[0].0.from, came[0].0.to), (9000, 1025));
    assert_eq!(came[0].0.forwarded, 14);
    assert_eq!(came[0].1, b"from the host");
}

#[test]
fn a_program_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let (mut program, port) = guest.accept(52);
    assert_eq!(port, 1 << 30);
    program.write_all(b"hello").unwrap();
    assert_eq!(data(&guest.receive()), b"hello");
    guest.send(packet(Op::Data, 52, port), b"hello yourself");
    assert_eq!(read(&mut program).unwrap(), b"hello yourself");
    let (_other, next) = guest.accept(52);
    assert_eq!(next, port + 1);
}

#[test]
fn bytes_behind_the_line_are_not_lost() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.program(b"CONNECT 7\nearly bytes");
    let request = guest.one(Op::Request);
    // Even where the program is gone by the time that the guest answers.
    program.write_all(b", and more").unwrap();
    drop(program);
    guest.send(packet(Op::Response, 7, request.from), b"");
    let came = guest.receive();
    assert_eq!(data(&came), b"early bytes, and more");
    // It cannot receive and will not send.
    let last = came.last().unwrap().0;
    assert_eq!((last.op, last.flags), (Op::Shutdown as u16, NEITHER));
}

#[test]
fn lines_come_in_pieces_or_not_at_all() {
    let mut guest = Guest::new(64, 4096);
    let mut slow = guest.program(b"CON");
    let mut silent = guest.program(b"");
    guest.nothing();
    // Others do not wait for them.
    let (_quick, _) = guest.accept(1);
    slow.write_all(b"NECT 5").unwrap();
    guest.nothing();
    slow.write_all(b"2\n").unwrap();
    assert_eq!(guest.one(Op::Request).to, 52);
    for line in [
        "\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT 99999999999\n",
        "CONNECT 1 2\n",
        "CONNECT 00000000000000000000000000000000000000001\n",
    ] {
        let mut program = guest.program(line.as_bytes());
        guest.nothing();
        assert!(matches!(program.read(&mut [0; 9]), Ok(0) | Err(_)), "{line:?} was taken");
    }
    drop(guest.program(b"CONNECT 4"));
    guest.nothing();
    assert_eq!(guest.connections(), 3);
    guest.ticks(ANSWER_TICKS - 1);
    assert_eq!(read(&mut silent), Some(Vec::new()));
    guest.ticks(1);
    assert_eq!(read(&mut silent), None, "a silent program is closed");
    assert_eq!(read(&mut slow), None, "the guest did not answer");
    guest.one(Op::Reset);
    assert_eq!(guest.connections(), 1);
}

#[test]
fn this_process_connects_and_talks() {
    let mut guest = Guest::new(16, 4096);
    let (message, mut own) = call(52, Duration::from_secs(5));
    guest.harness.message(&message);
    drop(message);
    let request = guest.one(Op::Request);
    assert_eq!(request.to, 52);
    guest.send(packet(Op::Response, 52, request.from), b"");
    guest.send(packet(Op::Data, 52, request.from), b"hello");
    let came = read(&mut own).unwrap();
    assert_eq!(came, format!("OK {}\nhello", request.from).into_bytes());
    own.write_all(b"hello yourself").unwrap();
    assert_eq!(data(&guest.receive()), b"hello yourself");
    drop(own);
    assert_eq!(guest.one(Op::Shutdown).flags, NEITHER);
}

#[test]
fn a_call_that_nobody_answers_ends_when_it_said() {
    let mut guest = Guest::new(16, 4096);
    let (message, mut refused) = call(52, Duration::from_secs(5));
    guest.harness.message(&message);
    drop(message);
    let request = guest.one(Op::Request);
    guest.send(packet(Op::Reset, 52, request.from), b"");
    assert_eq!(read(&mut refused), None);
    // Longer and shorter than a program would wait.
    for ticks in [2 * ANSWER_TICKS, 1] {
        let (message, mut own) = call(52, 50 * Duration::from_millis(ticks.into()));
        guest.harness.message(&message);
        drop(message);
        assert_eq!(guest.one(Op::Request).to, 52);
        guest.ticks(ticks - 1);
        assert_eq!(read(&mut own), Some(Vec::new()));
        guest.ticks(1);
        assert_eq!(read(&mut own), None);
        guest.one(Op::Reset);
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_guest_that_refuses() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.program(b"CONNECT 52\n");
    let request = guest.one(Op::Request);
    guest.send(packet(Op::Reset, 52, request.from), b"");
    assert_eq!(read(&mut program), None);
    assert_eq!(guest.connections(), 0);
    guest.nothing();
}

#[test]
fn a_host_that_does_not_listen() {
    let mut guest = Guest::new(16, 4096);
    guest.send(packet(Op::Request, 1, 9), b"");
    let answer = guest.one(Op::Reset);
    assert_eq!((answer.from, answer.to), (9, 1));
    // A file that is no socket, and a socket that nobody listens on.
    std::fs::write(guest.folder.path().join("v_9"), "").unwrap();
    drop(UnixListener::bind(guest.folder.path().join("v_10")).unwrap());
    for port in [9, 10] {
        guest.send(packet(Op::Request, 1, port), b"");
        guest.one(Op::Reset);
    }
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_busy_program_is_asked_again() {
    let mut guest = Guest::new(16, 4096);
    let path = guest.folder.path().join("v_9");
    let listener = UnixListener::bind(&path).unwrap();
    // SAFETY: the call has no memory arguments.
    unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
    let _first = UnixStream::connect(&path).unwrap();
    guest.send(packet(Op::Request, 1, 9), b"");
    guest.nothing();
    guest.ticks(3);
    guest.nothing();
    listener.accept().unwrap();
    guest.ticks(1);
    guest.one(Op::Response);
    // It never has room: the guest is told in the end.
    guest.send(packet(Op::Request, 2, 9), b"");
    guest.ticks(ANSWER_TICKS);
    assert_eq!(guest.one(Op::Reset).to, 2);
}
