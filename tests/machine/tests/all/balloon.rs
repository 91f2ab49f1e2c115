//! The balloon: what the guest gives away is the host's, and nothing else is.

use machine_tests::{Guest, Running};
use std::process::Command;

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

fn guest(scenario: &str, options: &str) -> Guest {
    Guest::new(&format!("balloon {scenario}")).option("--balloon", options)
}

#[test]
fn the_guest_learns_what_is_wanted_of_it() {
    for (options, pages, offered) in [
        ("size=64M", 64 << 8, 0),
        ("size=4K,deflate-on-oom", 1, F_DEFLATE_ON_OOM),
        ("stats-interval=2,reporting", 0, F_STATS | F_REPORTING),
    ] {
        let outcome = guest("op=info", options).run();
        outcome.ok();
        assert_eq!(outcome.number("target"), pages, "{options}");
        let known = F_STATS | F_DEFLATE_ON_OOM | F_REPORTING;
        assert_eq!(outcome.number("features") & known, offered, "{options}");
    }
    let outcome = Guest::new("balloon").run();
    assert!(outcome.ok().contains("no virtio device"), "{}", outcome.stdout);
}

/// What the guest has of the host's memory, in KiB, when it has printed `line`.
fn resident(guest: &mut Running, line: &str) -> i64 {
    guest.wait_for(line);
    let resident = guest.kilobytes("VmRSS") as i64;
    guest.write("x");
    resident
}

#[test]
fn what_the_guest_gives_away_is_the_hosts() {
    const SIZE: i64 = 16 << 10;
    for (scenario, options) in [
        ("op=pages", "size=16M"),
        ("op=pages report=1", "reporting"),
        ("op=pages noevent=1", "size=0"),
    ] {
        let mut guest = guest(scenario, options).start();
        let touched = resident(&mut guest, "touched");
        let given = resident(&mut guest, "given");
        let taken = resident(&mut guest, "taken");
        let outcome = guest.finish();
        outcome.ok();
        // Hull itself may need a little meanwhile.
        let near = |difference: i64| (difference - SIZE).abs() < 300;
        assert!(near(touched - given), "{scenario}: {touched} KiB before, {given} after");
        assert!(near(taken - given), "{scenario}: {given} KiB before, {taken} after");
        assert_eq!((outcome.number("given"), outcome.number("taken")), (1, 1));
        assert_eq!(outcome.number("zero"), 16 << 8, "{scenario}: pages that came back");
    }
}

#[test]
fn the_guest_is_asked_for_statistics() {
    let start = std::time::Instant::now();
    let outcome = guest("op=stats count=3", "stats-interval=1").run();
    outcome.ok();
    assert_eq!(outcome.number("asked"), 3);
    let took = start.elapsed().as_secs_f64();
    assert!((2.9..6.0).contains(&took), "three questions took {took} s");
}

#[test]
fn pages_that_are_not_the_guests_to_give_stay() {
    let outcome = guest("op=hostile", "reporting").run();
    outcome.ok();
    assert_eq!(outcome.number("answered"), 10, "{}", outcome.stdout);
    // One page was named; one was reported whole.
    assert_eq!(outcome.number("kept"), 14);
    assert_eq!(outcome.number("identity"), 1);
}

#[test]
fn huge_pages_are_given_back_whole() {
    let free = || {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("HugePages_Free:"));
        line.and_then(|number| number.trim().parse::<i64>().ok()).unwrap_or(0)
    };
    // 128 MiB for the guest. Where the pool is empty and not ours to fill, there is nothing to see.
    let pool = "/proc/sys/vm/nr_hugepages";
    let before = std::fs::read_to_string(pool).unwrap();
    let _ = Command::new("sh").args(["-c", &format!("echo 80 > {pool}")]).status();
    if free() < 64 {
        let got = free();
        let _ = std::fs::write(pool, &before);
        panic!("the host gives {got} huge pages; the test needs 64 and the right to set {pool}");
    }
    let outcome = std::panic::catch_unwind(|| {
        let mut guest =
            guest("op=pages report=1 size=32M", "reporting").flag("--huge-pages").start();
        guest.wait_for("touched");
        let touched = free();
        guest.write("x");
        guest.wait_for("given");
        let given = free();
        guest.write("x");
        guest.wait_for("taken");
        guest.write("x");
        guest.finish().ok();
        (touched, given)
    });
    let _ = std::fs::write(pool, &before);
    let (touched, given) = outcome.unwrap();
    // 32 MiB that need not begin at a huge page.
    assert!((15..=16).contains(&(given - touched)), "{touched} free before, {given} after");
}

#[test]
fn balloons_that_cannot_be_are_refused() {
    for (options, words) in [
        ("size=129M", ["balloon.size", "128M"]),
        ("size=1000", ["balloon.size", "4K"]),
        ("size=much", ["size: ", "much"]),
        ("stats=1", ["stats", "stats-interval"]),
    ] {
        guest("op=info", options).run().refused(&words);
    }
}
