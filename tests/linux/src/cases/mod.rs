//! The tests, by subject.

mod balloon;
mod boot;
mod disk;
mod fork;
mod lifecycle;
mod metadata;
mod network;
mod resources;
mod rounds;
mod snapshot;
mod vsock;

use crate::guest::Failure;
use crate::site::Site;

/// A test. Whatever it started ends with it.
pub type Case = fn(&Site) -> Result<(), Failure>;

/// Every test, by name.
pub fn all() -> Vec<(&'static str, Case)> {
    let devices =
        [disk::CASES, network::CASES, metadata::CASES, vsock::CASES, balloon::CASES].concat();
    [
        boot::CASES,
        resources::CASES,
        &devices,
        lifecycle::CASES,
        snapshot::CASES,
        fork::CASES,
        rounds::CASES,
    ]
    .concat()
}

/// Fails with `what` unless `held`.
fn check(held: bool, what: impl FnOnce() -> String) -> Result<(), Failure> {
    if held { Ok(()) } else { Err(what().into()) }
}
