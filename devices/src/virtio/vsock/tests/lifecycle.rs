//! What a pause, a reset and the end of the machine do to connections.

use super::*;

#[test]
fn a_pause_keeps_connections_and_a_reset_does_not() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    let (mut other, port) = guest.accept(52);
    guest.harness.pause();
    program.write_all(b"while paused").unwrap();
    let mut late = guest.program(b"CONNECT 8\n");
    assert_eq!(read(&mut other), Some(Vec::new()));
    guest.harness.resume();
    let came = guest.receive();
    assert_eq!(data(&came), b"while paused");
    assert!(came.iter().any(|(p, _)| p.op == Op::Request as u16 && p.to == 8));
    guest.send(packet(Op::Data, 52, port), b"after it");
    assert_eq!(read(&mut other).unwrap(), b"after it");
    // A backlog lives through it as well.
    let mut expected = Vec::new();
    for number in 0..8 {
        let bytes = pattern(50_000, number);
        guest.send(packet(Op::Data, 1, 9), &bytes);
        expected.extend(bytes);
        guest.receive();
    }
    guest.harness.pause();
    guest.harness.resume();
    guest.harness.run();
    let mut got = Vec::new();
    while got.len() < expected.len() {
        got.extend(read(&mut program).unwrap());
        guest.harness.run();
    }
    assert!(got == expected);
    // Deadlines go on.
    guest.ticks(ANSWER_TICKS);
    assert_eq!(read(&mut late), None);

    guest.harness.reset();
    assert_eq!(read(&mut program), None);
    assert_eq!(read(&mut other), None);
    guest.harness.activate();
    assert_eq!(guest.connections(), 0);
}

#[test]
fn a_transport_reset_is_told_and_closes_everything() {
    let mut guest = Guest::new(16, 4096);
    let mut program = guest.connect(1, 9);
    let (gpa, len) = guest.harness.writable(8);
    guest.harness.message(&Message::TransportReset);
    assert_eq!(read(&mut program), None);
    assert_eq!(guest.harness.used(2), None);
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), Some(4));
    assert_eq!(guest.harness.read(gpa, 4), TRANSPORT_RESET);
    assert_eq!(guest.connections(), 0);
    // Told while paused, and told once.
    guest.harness.pause();
    guest.harness.device_mut().update(&Message::TransportReset);
    guest.harness.resume();
    guest.harness.run();
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), Some(4));
    assert_eq!(guest.harness.request(2, &[(gpa, len, true)]), None);
}

#[test]
fn the_socket_goes_with_the_machine() {
    let (mut device, folder) = device();
    assert!(folder.path().join("v").exists());
    device.end();
    assert!(!folder.path().join("v").exists());
    // Whoever had connected is let go.
    let guest = Guest::new(4, 4096);
    let mut program = guest.program(b"CONNECT 1\n");
    program.set_nonblocking(false).unwrap();
    program.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    drop(guest.harness);
    assert!(matches!(program.read(&mut [0; 1]), Ok(0) | Err(_)));
}
