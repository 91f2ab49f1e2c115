//! Network: frames in both directions through a TAP in a namespace of the test's own.

use machine_tests::{Guest, Outcome};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use testnet::{GUEST, Link, NAME, frame, in_namespace};

fn guest(scenario: &str) -> Guest {
    with_options(scenario, "")
}

fn with_options(scenario: &str, more: &str) -> Guest {
    Guest::new(&format!("net {scenario}"))
        .option("--net", format!("tap={NAME},mac=02:00:00:00:00:01{more}"))
}

fn isolated(queues: bool, body: impl FnOnce() + Send) {
    let outcome = in_namespace(queues, || {
        body();
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn frames_go_out_whole() {
    isolated(false, || {
        for (size, more) in
            [(64, ""), (1514, ""), (60, " segs=2"), (1000, " noevent=1"), (200, " indirect=1")]
        {
            let link = Link::open().unwrap();
            let running = guest(&format!("op=tx size={size} count=50 broadcast=1{more}")).start();
            let mut seen = 0;
            let mut buffer = [0; 2048];
            while seen < 50 {
                let length = link.receive(&mut buffer).unwrap();
                let length = length.unwrap_or_else(|| panic!("only {seen} frames{more}"));
                if buffer[6..12] == GUEST {
                    assert_eq!(length, size, "{more}");
                    assert_eq!(buffer[..6], [0xff; 6]);
                    assert!(buffer[14..length].iter().all(|byte| *byte == 0));
                    seen += 1;
                }
            }
            let outcome = running.finish();
            outcome.ok();
            assert_eq!(outcome.number("count"), 50);
        }
    });
}

/// Sends `count` frames of different sizes to a guest that returns them, and checks each.
fn echo(more: &str, options: &str, count: u32) -> Outcome {
    let link = Link::open().unwrap();
    let running = with_options(&format!("op=ping count=1000000{more}"), options).start();
    running.wait_for("ready\n");
    let mut buffer = [0; 4096];
    for number in 0..count {
        let size = 18 + (number as usize * 97) % (1514 - 18);
        let mut sent = frame(size, &number.to_le_bytes());
        for (index, byte) in sent.iter_mut().enumerate().skip(18) {
            *byte = (index as u32 + number) as u8;
        }
        assert!(link.send(&sent).unwrap(), "no room for one frame");
        loop {
            let length = link.receive(&mut buffer).unwrap();
            let length = length.unwrap_or_else(|| panic!("frame {number} did not come back{more}"));
            if buffer[6..12] == GUEST {
                // A driver sends no less than an Ethernet frame's 60 bytes? Not this one.
                assert_eq!(buffer[12..length], sent[12..], "frame {number}{more}");
                break;
            }
        }
    }
    assert!(link.send(&frame(64, b"end")).unwrap());
    let outcome = running.finish();
    outcome.ok();
    outcome
}

#[test]
fn frames_come_back_unchanged() {
    isolated(false, || {
        for more in ["", " nomrg=1", " noevent=1", " offload=1", " buffer=256", " buffer=128"] {
            let outcome = echo(more, "", 200);
            // The last one is the end's.
            assert_eq!(outcome.number("frames"), 201, "{more}");
            if more == " buffer=128" {
                assert!(outcome.number("buffers") > 201 * 3, "large frames take many buffers");
            }
        }
    });
}

#[test]
fn a_flood_neither_blocks_nor_grows() {
    isolated(false, || {
        let link = Link::open().unwrap();
        let mut guest = guest("op=rx count=20000").start();
        guest.wait_for("ready\n");
        let before = guest.kilobytes("RssAnon");
        assert!(before > 0);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let frame = frame(200, b"");
                while !over.load(Ordering::Relaxed) {
                    for _ in 0..64 {
                        link.send(&frame).unwrap();
                    }
                    std::thread::yield_now();
                }
            });
            let peak = guest.peak_kilobytes("RssAnon");
            over.store(true, Ordering::Relaxed);
            let outcome = guest.finish();
            outcome.ok();
            assert_eq!(outcome.number("frames"), 20000);
            assert_eq!(outcome.number("bytes"), 20000 * 200);
            // An eighth of what came.
            assert!(peak < before + 512, "from {before} to {peak} kB");
        });
    });
}

#[test]
fn a_guest_that_does_not_listen() {
    // No buffers, no driver even: frames are dropped, the machine ends as it should.
    isolated(false, || {
        let link = Link::open().unwrap();
        let running = guest("").start();
        for _ in 0..2000 {
            link.send(&frame(1000, b"")).unwrap();
        }
        running.finish().ok();
        let idle = Guest::new("halt").option("--net", format!("tap={NAME}")).start();
        idle.wait_for("halting");
        for _ in 0..5000 {
            link.send(&frame(1000, b"")).unwrap();
        }
        idle.signal(libc::SIGTERM);
        assert_eq!(idle.finish().code(), 143);
    });
}

#[test]
fn the_device_says_what_it_is() {
    isolated(false, || {
        let outcome = with_options("op=info", ",mtu=1400").run();
        outcome.ok();
        assert_eq!(outcome.value("mac"), "020000000001");
        assert_eq!(outcome.number("mtu"), 1400);
        let offered = outcome.number("offered");
        let bits = [0, 1, 3, 5, 7, 8, 11, 12, 15];
        for bit in bits {
            assert!(offered >> bit & 1 == 1, "feature {bit} is not offered: {offered:#x}");
        }
    });
}

#[test]
fn two_queue_pairs() {
    isolated(true, || {
        let outcome = with_options("op=mq pairs=2", ",queues=2").run();
        outcome.ok();
        assert_eq!(outcome.number("limit"), 2);
        assert_eq!(outcome.number("answer"), 0);
        assert_eq!(outcome.number("sent"), 2);
        echo("", ",queues=2", 50);
    });
}

#[test]
fn taps_that_cannot_be_had() {
    isolated(false, || {
        let run = |options: &str| Guest::new("hello").option("--net", options).run();
        let failed = |options: &str, words: &[&str]| {
            let before = interfaces();
            let outcome = run(options);
            outcome.failed(words);
            outcome.failed(&["hull: cannot set up net0\n"]);
            assert_eq!(outcome.stdout, "");
            assert_eq!(interfaces(), before);
        };
        failed(
            "tap=nosuch0",
            &[
                "there is no network interface nosuch0\n",
                "hint: make it with `ip tuntap add nosuch0 mode tap user $USER`, or write --net tap",
            ],
        );
        let named = format!("tap={NAME}");
        failed(
            &format!("{named},queues=2"),
            &[
                &format!("TAP interface {NAME} has a single queue, 2 queue pairs were asked for\n"),
                &format!(
                    "hint: leave out queues=, or make it anew with `ip tuntap add {NAME} mode tap \
                     multi_queue`"
                ),
            ],
        );
        let holder = Guest::new("halt").option("--net", &named).start();
        holder.wait_for("halting");
        failed(&named, &[&format!("TAP interface {NAME} is in use by another process\n")]);
        drop(holder);
        assert_eq!(run(&named).ok(), "hello\n");
        failed("tap=lo", &["lo is not a TAP interface\n"]);
        let long = "x".repeat(40);
        let name = format!("net[0].tap: \"{long}\" is not an interface name (1 to 15 characters)");
        run(&format!("tap={long}")).misused(&[&name]);
        run("tap,mac=01:00:00:00:00:01").misused(&["is a multicast address"]);
        run("tap=a,fd=7").misused(&["net[0].fd: cannot be given together with a name"]);
        // Neither open, nor an interface's.
        run("fd=77").refused(&["77 is not open"]);
    });
}

fn interfaces() -> HashSet<String> {
    // The links of the namespace that this thread is in.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let names = text.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

#[test]
fn a_tap_of_the_run_goes_with_it() {
    isolated(false, || {
        let before = interfaces();
        let guest = Guest::new("halt").option("--net", "tap").start();
        guest.wait_for("halting");
        assert_eq!(interfaces().len(), before.len() + 1);
        guest.signal(libc::SIGTERM);
        assert_eq!(guest.finish().code(), 143);
        assert_eq!(interfaces(), before);
        // And when it is killed, or fails after it was made.
        let guest = Guest::new("halt").option("--net", "tap").start();
        guest.wait_for("halting");
        guest.signal(libc::SIGKILL);
        assert_eq!(guest.finish().code(), 137);
        assert_eq!(interfaces(), before);
        let missing = std::path::Path::new("/nowhere/disk.img");
        let outcome = Guest::new("hello").option("--net", "tap").disk(missing, "").run();
        outcome.failed(&["cannot open /nowhere/disk.img for reading and writing"]);
        assert_eq!(interfaces(), before);
    });
}
