//! Any text as the value of `--disk`, `--net` or `--console`.
#![no_main]

#[path = "../../hull/src/keyvalue.rs"]
#[allow(dead_code)]
mod keyvalue;

use keyvalue::{Pair, read, split};
use libfuzzer_sys::fuzz_target;
use vmm::config::{ConsoleConfig, DiskConfig, NetConfig};

fuzz_target!(|text: &str| {
    let pairs: Vec<Pair> = split(text);
    let errors = [
        read::<DiskConfig>(&pairs).map(drop).err(),
        read::<NetConfig>(&pairs).map(drop).err(),
        read::<ConsoleConfig>(&pairs).map(drop).err(),
    ];
    for err in errors.into_iter().flatten() {
        assert!(!err.to_string().is_empty());
    }
});
