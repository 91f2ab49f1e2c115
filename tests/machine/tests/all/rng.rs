//! Entropy, and with it the ways of a queue and of interrupts.

use machine_tests::Guest;

fn guest(scenario: &str) -> Guest {
    Guest::new(scenario).flag("--rng")
}

#[test]
fn bytes_differ() {
    let bytes = |outcome: &str| {
        outcome.lines().find_map(|line| line.strip_prefix("bytes ")).unwrap().to_owned()
    };
    let first = bytes(guest("rng size=64").run().ok());
    let second = bytes(guest("rng size=64").run().ok());
    assert_eq!(first.len(), 128);
    assert_ne!(first, second);
}

#[test]
fn many_requests_with_and_without_event_index() {
    for more in ["", " noevent=1", " indirect=1"] {
        let outcome = guest(&format!("rng size=100 count=1000{more}")).run();
        outcome.ok();
        assert_eq!(outcome.number("size"), 100, "{more}");
    }
}

#[test]
fn interrupts_come_one_for_one() {
    for how in ["", " halt=1", " noevent=1", " noevent=1 halt=1"] {
        let outcome = guest(&format!("irq count=200{how}")).run();
        outcome.ok();
        assert_eq!(outcome.number("interrupts"), 200, "{how}");
        assert_eq!(outcome.number("completed"), 200, "{how}");
        assert_eq!(outcome.number("status"), 1, "{how}");
    }
}

#[test]
fn no_device_unless_asked_for() {
    let outcome = Guest::new("rng").run();
    assert!(outcome.ok().contains("no virtio device"), "{}", outcome.stdout);
}
