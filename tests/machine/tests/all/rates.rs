//! Rate limits: a limit of R gives no more than R, and no far less. Each test leaves a second or more of
//! work to the limit; `--nocapture` shows how much off it is. That is about 1 % on a quiet machine,
//! and machines that run tests are busy: a bucket that was full while its guest did not run does
//! not make up for it.

use machine_tests::{Guest, Outcome};
use std::fs::File;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use testnet::{Link, NAME, frame, in_namespace};

const MIB: f64 = (1 << 20) as f64;

/// Ticks of the guest's clock, which is the host's, in a second.
static TICKS: LazyLock<f64> = LazyLock::new(|| {
    // SAFETY: every CPU that Hull runs on has a time stamp counter.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, first) = (Instant::now(), ticks());
    std::thread::sleep(Duration::from_millis(200));
    (ticks() - first) as f64 / start.elapsed().as_secs_f64()
});

/// Asserts that `count` operations of `each` tokens took as long as they should at `rate` per
/// second, after `burst` tokens that were there at once.
fn held(what: &str, outcome: &Outcome, each: f64, burst: f64, rate: f64) {
    outcome.ok();
    let count = outcome.number("count") as f64;
    let took = outcome.number("ticks") as f64 * count / *TICKS;
    within(what, count * each - burst, took, rate);
}

fn within(what: &str, tokens: f64, took: f64, rate: f64) {
    let measured = tokens / took;
    println!("{what}: {:+.1} % in {took:.2} s", (measured / rate - 1.0) * 100.0);
    assert!(took > 0.9, "{what}: too little to measure: {took} s");
    assert!((0.5..1.1).contains(&(measured / rate)), "{what}: {measured} of {rate}");
}

fn disk() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    (folder, path)
}

#[test]
fn a_disk_keeps_its_bandwidth() {
    let (_folder, path) = disk();
    for op in ["read", "write"] {
        for (size, depth) in [(4096, 1), (4096, 32), (65536, 8)] {
            let scenario =
                format!("blk op={op} size={size} depth={depth} count={}", (16 << 20) / size);
            let outcome = Guest::new(&scenario).disk(&path, ",rate=1M/100ms").run();
            held(&scenario, &outcome, f64::from(size), MIB, 10.0 * MIB);
        }
    }
}

#[test]
fn a_small_bucket_is_no_slower() {
    let (_folder, path) = disk();
    // 1 ms of tokens at a time.
    let outcome =
        Guest::new("blk op=read size=4096 depth=8 count=4096").disk(&path, ",rate=10K/1ms").run();
    held("10K/1ms", &outcome, 4096.0, 10.0 * 1024.0, 10_240_000.0);
}

#[test]
fn a_disk_keeps_its_rate_of_requests() {
    let (_folder, path) = disk();
    let outcome = Guest::new("blk op=write size=512 depth=4 count=4000 flush=100")
        .disk(&path, ",rate=1000M:100ops/50ms")
        .run();
    // A flush after each hundred writes.
    held("2000 requests/s", &outcome, 1.01, 100.0, 2000.0);
}

#[test]
fn a_burst_comes_once() {
    let (_folder, path) = disk();
    let outcome = Guest::new("blk op=read size=65536 depth=4 count=512")
        .disk(&path, ",rate=1M/100ms+16M")
        .run();
    held("a burst of 16M", &outcome, 65536.0, 17.0 * MIB, 10.0 * MIB);
}

#[test]
fn entropy_is_limited() {
    let outcome = Guest::new("rng size=4096 count=1000").flag("--rng=rate=100K/50ms").run();
    held("rng", &outcome, 4096.0, 102_400.0, 2_048_000.0);
}

fn isolated(body: impl FnOnce() + Send) {
    let outcome = in_namespace(false, || {
        body();
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn a_card_limits_what_is_sent() {
    isolated(|| {
        for (size, count, rate, burst, per_second, each) in [
            (1000, 12_000, "100K/10ms", 102_400.0, 10_240_000.0, 1000.0),
            (64, 8000, "50ops/10ms", 50.0, 5000.0, 1.0),
        ] {
            let outcome = Guest::new(&format!("net op=tx size={size} count={count}"))
                .option("--net", format!("tap={NAME},tx-rate={rate},rx-rate=1ops"))
                .run();
            held(rate, &outcome, each, burst, per_second);
        }
    });
}

#[test]
fn a_card_limits_what_is_received() {
    isolated(|| {
        let link = Link::open().unwrap();
        let options = format!("tap={NAME},mac=02:00:00:00:00:01,rx-rate=100K/10ms,tx-rate=1ops");
        let guest = Guest::new("net op=rx count=12000").option("--net", options).start();
        guest.wait_for("ready\n");
        let over = AtomicBool::new(false);
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                let frame = frame(1000, b"");
                while !over.load(Ordering::Relaxed) {
                    for _ in 0..16 {
                        link.send(&frame).unwrap();
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
            });
            let outcome = guest.finish();
            over.store(true, Ordering::Relaxed);
            outcome
        });
        outcome.ok();
        let (frames, bytes) = (outcome.number("frames") as f64, outcome.number("bytes") as f64);
        assert_eq!(frames, 12_000.0);
        let took = outcome.number("ticks") as f64 * frames / *TICKS;
        within("received", bytes - 102_400.0, took, 10_240_000.0);
    });
}

#[test]
fn the_console_is_as_slow_as_it_may_be() {
    // Slow enough for a machine on which each character costs 100 µs.
    for (scenario, device) in [("echo", "serial"), ("console", "virtio")] {
        let console = format!("stdio,device={device},rate=100/50ms");
        let mut guest = Guest::new(scenario).console(console).start();
        guest.wait_for("ready");
        // The bucket is full again, and more than full it does not get.
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        for _ in 0..64 {
            guest.write(&("x".repeat(63) + "\n"));
        }
        guest.write("over");
        guest.wait_for("over");
        let took = start.elapsed().as_secs_f64();
        within(device, f64::from(4100 - 100), took, 2000.0);
        guest.write("q");
        assert_eq!(guest.finish().code(), 0);
    }
}

#[test]
fn a_guest_that_waits_for_its_limit_ends_at_once() {
    let (_folder, path) = disk();
    let guest = Guest::new("blk op=read size=4096 depth=8 count=1000")
        .disk(&path, ",rate=1ops/60s")
        .start();
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.finish().code(), 128 + libc::SIGTERM);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_is_no_rate_is_refused() {
    let (_folder, path) = disk();
    Guest::new("hello").disk(&path, ",rate=fast").run().refused(&["rate: ", "fast", "10M"]);
    Guest::new("hello").flag("--rng=rate=-1").run().refused(&["rate: ", "-1"]);
    Guest::new("hello").option("--net", "tap,rate=1M").run().refused(&["rate", "rx-rate"]);
}
