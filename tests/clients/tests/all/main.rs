//! Libraries in Rust that drive Firecracker.

// Marked as tests, so that clippy lets them unwrap.
#[cfg(test)]
mod fctools;
#[cfg(test)]
mod sdk;
