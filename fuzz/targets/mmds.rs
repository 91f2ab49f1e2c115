//! A guest that sends the metadata service of its network card anything in any order.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| devices::virtio::net::mmds::fuzz(data));
