//! Sockets: streams between a guest and programs on this side of the device's Unix socket.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use machine_tests::{Guest, Running};
use tempfile::TempDir;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(30);
const MIB: usize = 1 << 20;

/// A folder whose path is short enough for sockets.
fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("v.sock");
    (folder, path)
}

fn guest(path: &Path, scenario: &str) -> Guest {
    Guest::new(&format!("vsock {scenario}")).option("--vsock", path)
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Waits for its end, which is hasty where it was not listened to.
fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(len) => len == 0,
        Err(err) => err.kind() == ErrorKind::ConnectionReset,
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

/// Connects to the guest's `port`.
fn connect(path: &Path, port: u32) -> UnixStream {
    let mut stream = patient(UnixStream::connect(path).unwrap());
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let answer = line(&mut stream);
    let port = answer.strip_prefix("OK ").and_then(|port| port.trim_end().parse::<u32>().ok());
    assert!(port.is_some_and(|port| port >= 1 << 30), "the answer is {answer:?}");
    stream
}

/// Listens for a guest that connects to `port`.
fn listen(path: &Path, port: u32) -> UnixListener {
    UnixListener::bind(format!("{}_{port}", path.display())).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 % 251) as u8).collect()
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed * 2 + 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// As the guest adds its bytes up.
fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, &byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)))
}

/// Sends `bytes` and closes this direction; returns what comes back until the other one is closed.
fn echoed(stream: &UnixStream, bytes: &[u8]) -> Vec<u8> {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (&*stream).write_all(bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        let mut back = Vec::new();
        (&*stream).read_to_end(&mut back).unwrap();
        back
    })
}

#[test]
fn the_device_says_what_it_is() {
    let (_folder, path) = folder();
    let options = format!("path={},cid=42", path.display());
    let outcome = Guest::new("vsock op=info").option("--vsock", options).run();
    outcome.ok();
    assert_eq!(outcome.number("cid"), 42);
    assert_eq!((outcome.number("rx"), outcome.number("tx")), (256, 256));
}

#[test]
fn a_program_talks_to_the_guest() {
    for more in ["", " noevent=1", " buffer=45", " buffer=65536 size=65536", " size=1 room=5000"] {
        let (_folder, path) = folder();
        let running = guest(&path, &format!("op=listen port=77{more}")).start();
        running.wait_for("ready\n");
        let len = if more.contains("=45") || more.contains("=1 ") { 20_000 } else { 3 * MIB + 1 };
        let bytes = noise(len, 1);
        assert!(echoed(&connect(&path, 77), &bytes) == bytes, "other bytes came back{more}");
        running.finish().ok();
    }
}

#[test]
fn the_guest_talks_to_a_program() {
    let (_folder, path) = folder();
    let listener = listen(&path, 9000);
    let running = guest(&path, "op=connect port=9000").start();
    let stream = patient(listener.accept().unwrap().0);
    let bytes = noise(2 * MIB, 2);
    assert!(echoed(&stream, &bytes) == bytes, "other bytes came back");
    let outcome = running.finish();
    outcome.ok();
    assert_eq!(outcome.number("bytes"), bytes.len() as u64);
    // Where nobody listens, the guest is refused.
    let outcome = guest(&path, "op=connect port=9001").run();
    outcome.ok();
    assert_eq!(outcome.number("refused"), 1);
}

#[test]
fn bulk_in_both_directions_is_whole() {
    for more in ["", " noevent=1", " buffer=65536"] {
        let (_folder, path) = folder();
        let running = guest(&path, &format!("op=listen mode=sink check=1{more}")).start();
        running.wait_for("ready\n");
        let bytes = noise(8 * MIB, 3);
        let mut stream = connect(&path, 9000);
        stream.write_all(&bytes).unwrap();
        drop(stream);
        let outcome = running.finish();
        outcome.ok();
        assert_eq!(outcome.number("bytes"), bytes.len() as u64, "{more}");
        assert_eq!(outcome.number("sum"), sum(&bytes), "{more}");
    }
    for (more, size) in [("", 4096), (" noevent=1", 65536), ("", 1000)] {
        let (_folder, path) = folder();
        let listener = listen(&path, 9000);
        let len = 8 * MIB;
        let scenario =
            format!("op=connect mode=source check=1 half=1 count={len} size={size}{more}");
        let running = guest(&path, &scenario).start();
        let mut stream = patient(listener.accept().unwrap().0);
        // A reader that takes its time in between.
        let mut bytes = vec![0; MIB];
        stream.read_exact(&mut bytes).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        stream.read_to_end(&mut bytes).unwrap();
        assert!(bytes == pattern(len), "{} bytes of {len} came{more}", bytes.len());
        drop(stream);
        running.finish().ok();
    }
}

#[test]
fn many_streams_at_once() {
    let (_folder, path) = folder();
    let running = guest(&path, "op=listen conns=64 room=65536").start();
    running.wait_for("ready\n");
    let streams: Vec<UnixStream> = (0..64).map(|_| connect(&path, 9000)).collect();
    std::thread::scope(|scope| {
        for (seed, stream) in (10..).zip(&streams) {
            scope.spawn(move || {
                let bytes = noise(200_000, seed);
                assert!(echoed(stream, &bytes) == bytes, "bytes of another stream");
            });
        }
    });
    let outcome = running.finish();
    outcome.ok();
    assert_eq!(outcome.number("bytes"), 64 * 200_000);
}

#[test]
fn programs_that_misbehave() {
    let (_folder, path) = folder();
    let running = guest(&path, "op=listen").start();
    running.wait_for("ready\n");
    // Silent ones, slow ones, wrong ones: more than may be connected.
    let silent: Vec<UnixStream> =
        (0..1100).map(|_| patient(UnixStream::connect(&path).unwrap())).collect();
    for text in ["GET / HTTP/1.1\r\n\r\n", "CONNECT\n", "CONNECT 4294967296\n", "connect me\n"] {
        let mut stream = patient(UnixStream::connect(&path).unwrap());
        stream.write_all(text.as_bytes()).unwrap();
        assert!(is_closed(&mut stream), "{text:?} was taken");
    }
    let mut long = patient(UnixStream::connect(&path).unwrap());
    // It may be closed before all of it is written.
    let _ = long.write_all(&[b'C'; 100_000]);
    assert!(is_closed(&mut long));
    // A port that nobody in the guest listens on.
    let mut nobody = patient(UnixStream::connect(&path).unwrap());
    nobody.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(line(&mut nobody), "");
    // None of it delays anybody.
    let start = Instant::now();
    let bytes = noise(100_000, 4);
    assert!(echoed(&connect(&path, 9000), &bytes) == bytes);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    // By now, or in two seconds.
    for mut stream in silent {
        assert!(is_closed(&mut stream));
    }
    running.finish().ok();
}

#[test]
fn a_guest_that_nobody_hears_fills_no_memory() {
    let (_folder, path) = folder();
    let listener = listen(&path, 9000);
    let running = guest(&path, "op=connect mode=source count=1G size=65536").start();
    let stream = patient(listener.accept().unwrap().0);
    let before = running.kilobytes("RssAnon");
    std::thread::sleep(Duration::from_millis(500));
    let after = running.kilobytes("RssAnon");
    assert!(after < before + 4096, "from {before} to {after} kB");
    drop(stream);
    running.signal(libc::SIGTERM);
    assert_eq!(running.finish().code(), 143);
}

#[test]
fn a_guest_that_sends_nonsense() {
    for (seed, more) in [(1, ""), (2, " starve=1"), (3, " noevent=1"), (4, " buffer=45")] {
        let (_folder, path) = folder();
        let listener = listen(&path, 9000);
        listener.set_nonblocking(true).unwrap();
        let mut running =
            guest(&path, &format!("op=hostile seed={seed} count=100000{more}")).start();
        let before = running.kilobytes("RssAnon");
        let mut streams = Vec::new();
        let outcome = loop {
            match listener.accept() {
                Ok((stream, _)) => streams.push(stream),
                Err(err) if err.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(err) => panic!("{err}"),
            }
            if streams.len() > 100 {
                streams.drain(..50);
            }
            let after = running.kilobytes("RssAnon").max(before);
            assert!(after < before + (24 << 10), "from {before} to {after} kB{more}");
            if running.has_ended() {
                break running.finish();
            }
        };
        outcome.ok();
        assert!(outcome.number("sent") > 500, "{more}");
        assert_eq!(outcome.number("status") & 0x40, 0, "{more}: the device needs a reset");
    }
}

#[test]
fn the_socket_is_private_and_goes_with_the_machine() {
    let (_folder, path) = folder();
    let hear = |running: &Running| {
        running.wait_for("ready\n");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    };
    let running = guest(&path, "op=listen").start();
    hear(&running);
    // A second machine cannot have it, and leaves it as it is.
    let second = guest(&path, "op=listen").run();
    second.refused(&["vsock", "v.sock", "lives"]);
    let bytes = noise(1000, 5);
    assert!(echoed(&connect(&path, 9000), &bytes) == bytes);
    running.finish().ok();
    assert!(!path.exists());
    let running = guest(&path, "op=listen").start();
    hear(&running);
    running.signal(libc::SIGTERM);
    assert_eq!(running.finish().code(), 143);
    assert!(!path.exists());
    // What a killed one left is replaced.
    let running = guest(&path, "op=listen").start();
    hear(&running);
    running.signal(libc::SIGKILL);
    running.finish();
    assert!(path.exists());
    let running = guest(&path, "op=listen").start();
    hear(&running);
    assert!(echoed(&connect(&path, 9000), &bytes) == bytes);
    running.finish().ok();
    // A file stays a file.
    std::fs::write(&path, "precious").unwrap();
    guest(&path, "op=listen").run().refused(&["vsock", "not a socket"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn sockets_that_cannot_be_had() {
    let (folder, _) = folder();
    let long = folder.path().join("x".repeat(90));
    guest(&long, "op=info").run().refused(&["vsock.path", "96"]);
    guest(Path::new("/nowhere/v.sock"), "op=info").run().refused(&["vsock", "/nowhere/v.sock"]);
    for options in ["path=/dev/shm/v,cid=2", "path=/dev/shm/v,cid=4294967295"] {
        Guest::new("hello").option("--vsock", options).run().refused(&["vsock.cid"]);
    }
}

#[test]
fn a_restarted_machine_listens_again() {
    let (_folder, path) = folder();
    // The payload ends with a reset.
    let running = guest(&path, "op=listen").option("--on-reboot", "restart").start();
    running.wait_for("ready\n");
    for seed in 0..3 {
        let bytes = noise(1000, seed);
        let start = Instant::now();
        let mut stream = loop {
            // Between two rounds there may be no socket, or one that is about to close.
            if let Ok(stream) = UnixStream::connect(&path) {
                let mut stream = patient(stream);
                let asked = stream.write_all(b"CONNECT 9000\n");
                if asked.is_ok() && line(&mut stream).starts_with("OK ") {
                    break stream;
                }
            }
            assert!(start.elapsed() < PATIENCE, "nobody listens");
            std::thread::sleep(Duration::from_millis(5));
        };
        stream.flush().unwrap();
        assert!(echoed(&stream, &bytes) == bytes);
    }
    running.signal(libc::SIGTERM);
    assert_eq!(running.finish().code(), 143);
    assert!(!path.exists());
}
