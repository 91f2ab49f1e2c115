//! A driver of the entropy device that does anything in any order.
#![no_main]

use devices::virtio::conformance::fuzz;
use devices::virtio::rng::Rng;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| fuzz(Rng::default(), data));
