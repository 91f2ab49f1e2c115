//! What is said to `hull clone` and to a pool by who does not know how to hand a machine over.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use machine_tests::{Family, HULL, eventually};
use serde_json::Value;

use super::{children, fork, fork_at_work, goes_on, kill, pool};

/// What becomes of `hull clone` with this as its input: its exit code, what it says to a person.
fn cloned(input: impl Into<OwnedFd>, words: &[&str]) -> (i32, String) {
    let start = Instant::now();
    let mut process = Command::new(&*HULL)
        .arg("clone")
        .args(words)
        .stdin(Stdio::from(input.into()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while process.try_wait().unwrap().is_none() {
        if start.elapsed() > Duration::from_secs(20) {
            process.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = process.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap_or(-1), text)
}

/// A message: what each begins with, its length, and as much text.
fn message(text: &str) -> Vec<u8> {
    [&b"HUL\x03"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

const SHAPE: &str = "{\"cpus\": 1, \"memory\": 67108864, \"huge-pages\": false}";

/// That a machine is about to come, of which all is as it is by itself.
const NOTICE: &str = "{\"child\": {}, \"config\": {}, \"host\": null, \"disks\": false}";

/// What is answered, behind what each message begins with.
fn answer(mut stream: &UnixStream) -> String {
    let mut said = Vec::new();
    // What was not read of a message resets the connection behind the answer.
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(said.get(8..).unwrap_or_default()).into_owned()
}

#[test]
fn who_asks_hears_what_was_wrong() {
    let other = [&b"HUL\x04"[..], &2u32.to_le_bytes(), b"{}"].concat();
    for (bytes, why) in [
        (other, "another version of Hull"),
        (message("{\"wings\": 2}"), "unknown field `wings`"),
        ([message(SHAPE), message("{\"wings\": 2}")].concat(), "unknown field `wings`"),
        ([message(SHAPE), message(NOTICE), message("null")].concat(), "there is no state"),
    ] {
        let (own, theirs) = UnixStream::pair().unwrap();
        (&own).write_all(&bytes).unwrap();
        let (code, text) = cloned(theirs, &[]);
        assert!([1, 2].contains(&code), "{code} {text}");
        let answer = answer(&own);
        assert!(answer.contains(why), "{answer}");
    }
}

#[test]
fn a_pool_says_why_nothing_is_ready() {
    let family = Family::default();
    // As much as there is address space for, and more than there is.
    let most = 1u64 << 30;
    let pool = family.hull("pool").option("--keep", "number=1,memory=4G");
    let pool = pool.on(machine_tests::Surroundings::new().limit(libc::RLIMIT_AS, most)).start();
    pool.wait_for_message("no process is ready");
    pool.wait_for_message("memory");
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
}

#[test]
fn an_input_that_is_no_socket_is_refused() {
    let (pipe, _end) = std::io::pipe().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let unix = UnixListener::bind(folder.path().join("s")).unwrap();
    let inputs: [OwnedFd; 6] = [
        File::open("/dev/null").unwrap().into(),
        File::open("/etc/passwd").unwrap().into(),
        File::open("/").unwrap().into(),
        pipe.into(),
        tcp.into(),
        unix.into(),
    ];
    for input in inputs {
        let (code, text) = cloned(input, &[]);
        assert!(code == 1 && text.contains("no socket"), "{code} {text}");
    }
    let (one, other) = UnixDatagram::pair().unwrap();
    one.send(b"hello").unwrap();
    drop(one);
    assert_eq!(cloned(other, &[]).0, 1);
}

#[test]
fn what_is_no_machine_is_refused() {
    let long = message(&"x".repeat((2 << 20) + 1));
    let mut cut = message("{}");
    cut.pop();
    for bytes in [
        &b""[..],
        b"x",
        b"GET / HTTP/1.1\r\n\r\n",
        &[255; 5000],
        &long,
        &cut,
        &message("{}"),
        &message("[]"),
        &message("{\"name\": 7}"),
        &message("{\"what\": \"is this\"}"),
    ] {
        let (own, theirs) = UnixStream::pair().unwrap();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // It may not listen to the end.
                let _ = (&own).write_all(bytes);
                let _ = own.shutdown(Shutdown::Write);
            });
            let (code, text) = cloned(theirs, &[]);
            assert!(code == 1 && text.starts_with("hull: "), "{code} {text}");
            assert!(answer(&own).starts_with("{\"Err\":\""));
        });
        assert!(start.elapsed() < Duration::from_secs(4));
    }
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    for bytes in [&b""[..], b"HU", b"HUL\x03\x20\0\0\0{"] {
        let (mut own, theirs) = UnixStream::pair().unwrap();
        own.write_all(bytes).unwrap();
        let (code, text) = cloned(theirs, &[]);
        assert!(code == 1 && text.contains("other process"), "{code} {text}");
    }
}

#[test]
fn who_says_a_little_at_a_time_is_not_waited_for_either() {
    let (own, theirs) = UnixStream::pair().unwrap();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = message(&" ".repeat(1000));
            let mut bytes = bytes.iter();
            while bytes.next().is_some_and(|byte| (&own).write_all(&[*byte]).is_ok()) {
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let (code, text) = cloned(theirs, &[]);
        assert!(code == 1 && text.contains("timed out"), "{code} {text}");
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    });
}

/// Most processes that have no machine yet.
const MOST: usize = 64;

/// So many connect and say this, and not more. There are never more than so many processes, and nobody is refused.
fn crowd(family: &Family, socket: &Path, count: usize, most: usize, bytes: &[u8]) {
    let mut streams: Vec<UnixStream> = (0..count)
        .map(|_| {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.write_all(bytes).unwrap();
            stream.set_read_timeout(Some(machine_tests::PATIENCE)).unwrap();
            stream
        })
        .collect();
    let is_over = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let mut seen = 0;
            while !is_over.load(Ordering::Relaxed) {
                seen = seen.max(family.processes().len());
                std::thread::sleep(Duration::from_millis(20));
            }
            seen
        });
        let said: Vec<String> = streams.iter_mut().map(|stream| answer(stream)).collect();
        is_over.store(true, Ordering::Relaxed);
        let odd: Vec<_> = said.iter().filter(|said| !said.contains("timed out")).collect();
        assert!(odd.is_empty(), "{odd:?}");
        seen.join().unwrap()
    });
    // One that has just closed its files may still be there.
    assert!((most - MOST / 2..most + 8).contains(&seen), "{seen} processes");
}

#[test]
fn who_asks_and_says_no_more_has_not_any_number_of_processes() {
    let family = Family::default();
    let parent = family.parent("m");
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    // The parent, the pool, what is ready, and what is being made.
    crowd(&family, &family.at("hull/.pool"), 300, MOST + 4, b"H");
    eventually(|| family.processes().len() == 4, || format!("{:?}", family.processes()));
    for child in fork_at_work(&family, "m", 4, &[]) {
        kill(&child);
    }
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
    goes_on(&parent);
}

#[test]
fn nor_has_who_asks_a_fork_without_a_pool() {
    let family = Family::default();
    let parent = family.parent("m");
    // As long as it is not answered, it makes processes.
    parent.signal(libc::SIGSTOP);
    let forking = family.hull("fork").flag("m").flag("--json").option("-n", "2").start();
    let socket = family.at(&format!("hull/.fork-{}", forking.id()));
    eventually(|| UnixStream::connect(&socket).is_ok(), || format!("{:?}", family.entries()));
    // The parent, and who forks it.
    crowd(&family, &socket, 150, MOST + 2, b"");
    parent.signal(libc::SIGCONT);
    let outcome = forking.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    children(&outcome).iter().for_each(kill);
    goes_on(&parent);
}

#[test]
fn a_pool_that_stands_still_is_not_waited_for_again_and_again() {
    let family = Family::default();
    let parent = family.parent("m");
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let stalled = |words: &[&str]| {
        let start = Instant::now();
        let outcome = fork(&family, &[&["m", "--json", "--timeout", "2"], words].concat());
        let took = start.elapsed();
        assert_eq!(outcome.code(), 1, "{}", outcome.stderr);
        let children = children(&outcome);
        let why = |child: &Value| child["fault_message"].as_str().unwrap().to_owned();
        let why: Vec<String> = children.iter().map(why).collect();
        let late = why.iter().filter(|why| why.contains("did not run in time")).count();
        let others = why.iter().filter(|why| why.contains("stands still")).count();
        assert!((1..=4).contains(&late) && late + others == why.len(), "{late} {others} {why:?}");
        assert!((2..15).contains(&took.as_secs()), "{took:?}");
        goes_on(&parent);
        why.len()
    };
    pool.signal(libc::SIGSTOP);
    assert_eq!(stalled(&["-n", "10000"]), 10_000);
    // What was reported as failed does not come later.
    pool.signal(libc::SIGCONT);
    for child in fork_at_work(&family, "m", 2, &[]) {
        kill(&child);
    }
    eventually(|| family.processes().len() == 4, || format!("{:?}", family.processes()));
    // One who does not even let in who is there.
    let path = family.at("full");
    let full = UnixListener::bind(&path).unwrap();
    // SAFETY: takes a descriptor that is open.
    assert_eq!(unsafe { libc::listen(full.as_raw_fd(), 0) }, 0);
    assert_eq!(stalled(&["-n", "40", "--pool", path.to_str().unwrap()]), 40);
    drop(full);
    fork(&family, &["m", "--timeout=-1"]).failed(&["--timeout"]);
    fork(&family, &["m", "--timeout", "1e6"]).failed(&["timeout_ms", "600000"]);
}

#[test]
fn shapes_that_cannot_be_had_are_refused() {
    for (cpus, memory) in [
        ("0", "67108864"),
        ("100000", "67108864"),
        ("1", "0"),
        ("1", "1"),
        ("1", "18446744073709551615"),
        ("1", "9223372036854775808"),
    ] {
        let (own, theirs) = UnixStream::pair().unwrap();
        drop(own);
        let (code, text) = cloned(theirs, &["--cpus", cpus, "--memory", memory]);
        assert!([1, 2].contains(&code) && !text.is_empty(), "{cpus} {memory}: {code} {text}");
    }
    let family = Family::default();
    let refused = |keep: &str| family.hull("pool").option("--keep", keep).run();
    for keep in [
        "number=0",
        "number=5000",
        "cpus=0",
        "cpus=65",
        "memory=0",
        "memory=4095",
        "x=1",
        "memory=x",
    ] {
        let outcome = refused(keep);
        assert!([1, 2].contains(&outcome.code()), "{keep}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("--keep"), "{keep}: {}", outcome.stderr);
    }
}

#[test]
fn a_pool_hears_many_that_make_no_sense() {
    let family = Family::default();
    let parent = family.parent("m");
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let connect = || {
        let stream = UnixStream::connect(family.at("hull/.pool")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    };
    let start = Instant::now();
    let mut silent: Vec<UnixStream> = (0..100).map(|_| connect()).collect();
    let mut others = Vec::new();
    for bytes in
        [&b"x"[..], b"GET / HTTP/1.1\r\n\r\n", &[255; 5000], &message("{}"), b"HUL\x03\x20\0\0\0{"]
    {
        let mut stream = connect();
        // It may be gone already.
        let _ = stream.write_all(bytes);
        others.push(stream);
        // One that is gone before it is heard.
        let _ = connect().write_all(bytes);
        drop(connect());
    }
    // Who knows how is served meanwhile.
    for child in fork_at_work(&family, "m", 4, &[]) {
        kill(&child);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    for stream in silent.iter_mut().chain(&mut others) {
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
    }
    let took = start.elapsed();
    assert!((4..12).contains(&took.as_secs()), "{took:?}");
    // Nobody waits for the rest of what was not said to its end.
    eventually(|| family.processes().len() == 4, || format!("{:?}", family.processes()));
    // As many as a process may have files for, and more.
    let crowd: Vec<_> = (0..2000)
        .map_while(|_| {
            let stream = UnixStream::connect(family.at("hull/.pool"));
            stream.ok()
        })
        .collect();
    let outcome = fork(&family, &["m", "--json"]);
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    kill(&children(&outcome)[0]);
    drop(crowd);
    goes_on(&parent);
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
}
