//! Drivers that break the rules: every case of the payload on every device. The monitor neither
//! ends nor grows, and the device works again after a reset.

use machine_tests::{Guest, Outcome};
use std::time::Duration;

/// Kilobytes that the monitor may grow by over all cases.
const GROWTH: u64 = 512;

/// Runs all cases of a device and looks at each line.
fn all(device: &str, more: &str, prepare: impl Fn(Guest) -> Guest) -> Outcome {
    // Touches all the memory that the cases have, so that what grows is the monitor.
    let scenario = format!("hostile dev={device} case=all {more}");
    let mut guest = prepare(Guest::new(&scenario)).patience(Duration::from_secs(150)).start();
    guest.wait_for("hostile loop-of-two");
    let before = guest.kilobytes("RssAnon");
    assert!(before > 0);
    let peak = guest.peak_kilobytes("RssAnon");
    let outcome = guest.finish();
    outcome.ok();
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
    let broken: Vec<&str> =
        outcome.stdout.lines().filter(|line| line.contains(" broken ")).collect();
    assert!(broken.is_empty(), "{broken:#?}\n{}", outcome.stderr);
    assert_eq!(outcome.number("broken"), 0);
    assert!(outcome.number("cases") > 70, "{}", outcome.stdout);
    assert!(!outcome.stdout.contains("changed after a reset"), "{}", outcome.stdout);
    assert!(!outcome.stdout.contains("unknown features were agreed"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("hostile registers-without-a-name"), "{}", outcome.stdout);
    assert!(peak < before + GROWTH, "from {before} to {peak} kB");
    outcome
}

/// The status that a case left behind.
fn status(outcome: &Outcome, case: &str) -> u64 {
    let start = format!("hostile {case} status=0x");
    let digits = outcome
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix(&start)?.split(' ').next())
        .unwrap_or_else(|| panic!("no {case} in {}", outcome.stdout));
    u64::from_str_radix(digits, 16).unwrap()
}

/// Cases in which nothing can be returned to the driver: its rings make no sense any more.
fn hopeless(outcome: &Outcome) {
    const NEEDS_RESET: u64 = 0x40;
    for case in [
        "loop-of-one",
        "loop-of-two",
        "loop-of-all",
        "next-outside-table",
        "head-outside-table",
        "available-index-too-far",
        "available-index-half-way-round",
        "available-index-backwards",
        "queue-size-odd",
        "rings-nowhere",
        "rings-wrap",
    ] {
        let status = status(outcome, case);
        assert!(status & NEEDS_RESET != 0, "{case} left status {status:#x}");
    }
}

#[test]
fn entropy_device() {
    hopeless(&all("rng", "", |guest| guest.flag("--rng")));
}

#[test]
fn disk() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for more in ["", ",direct"] {
        let path = folder.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(4 << 20).unwrap();
        hopeless(&all("blk", "", |guest| guest.disk(&path, more)));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4 << 20);
    }
}

#[test]
fn network_card() {
    for queue in ["", "queue=0"] {
        let outcome = testnet::in_namespace(false, || {
            let name = format!("tap={}", testnet::NAME);
            Ok(all("net", queue, |guest| guest.option("--net", &name)))
        });
        let outcome = outcome.unwrap();
        if queue.is_empty() {
            hopeless(&outcome);
        }
    }
}

#[test]
fn console() {
    let outcome = all("console", "", |guest| guest.console("stdio,device=virtio"));
    hopeless(&outcome);
}
