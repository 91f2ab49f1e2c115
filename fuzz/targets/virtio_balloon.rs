//! A driver of the balloon that does anything in any order.
#![no_main]

use std::sync::Arc;
use std::time::Duration;

use devices::virtio::balloon::{Balloon, BalloonOptions, Discard};
use devices::virtio::conformance::fuzz;
use libfuzzer_sys::fuzz_target;

/// Where no memory goes.
struct Nowhere;

impl Discard for Nowhere {
    fn discard(&self, gpa: u64, len: u64) {
        assert!(len > 0 && gpa.checked_add(len).is_some());
    }

    fn discard_host(&self, start: *const u8, len: usize) {
        assert!(!start.is_null() && len > 0);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let options = BalloonOptions {
        target: 1000,
        deflate_on_oom: choice & 1 != 0,
        stats_interval: (choice & 2 != 0).then_some(Duration::from_secs(1)),
        reporting: choice & 4 != 0,
        discard: Arc::new(Nowhere),
    };
    fuzz(Balloon::new(options), data);
});
