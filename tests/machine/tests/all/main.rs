//! Payload guests under Hull: each test is a machine of milliseconds on the real /dev/kvm.

// Marked as tests, so that clippy lets them unwrap.
#[cfg(test)]
mod balloon;
#[cfg(test)]
mod basic;
#[cfg(test)]
mod blk;
#[cfg(test)]
mod console;
#[cfg(test)]
mod cpu;
#[cfg(test)]
mod crash;
#[cfg(test)]
mod endings;
#[cfg(test)]
mod filters;
#[cfg(test)]
mod fork;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod hosts;
#[cfg(test)]
mod input;
#[cfg(test)]
mod keys;
#[cfg(test)]
mod mmds;
#[cfg(test)]
mod names;
#[cfg(test)]
mod net;
#[cfg(test)]
mod options;
#[cfg(test)]
mod overlay;
#[cfg(test)]
mod qcow2;
#[cfg(test)]
mod rates;
#[cfg(test)]
mod rng;
#[cfg(test)]
mod snapshot;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod vsock;
