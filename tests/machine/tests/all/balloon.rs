//! The balloon: what the guest gives away is the host's, and nothing else is.

use machine_tests::{Guest, HugePages, Running};

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
    // 128 MiB for the guest.
    let _pool = HugePages::for_guests(64);
    let mut guest = guest("op=pages report=1 size=32M", "reporting").flag("--huge-pages").start();
    guest.wait_for("touched");
    let touched = HugePages::free();
    guest.write("x");
    guest.wait_for("given");
    let given = HugePages::free();
    guest.write("x");
    guest.wait_for("taken");
    guest.write("x");
    guest.finish().ok();
    // 32 MiB that need not begin at a huge page.
    let more = touched + 15..=touched + 16;
    assert!(more.contains(&given), "{touched} free before, {given} after");
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
