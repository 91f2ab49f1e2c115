//! The same requests, to Firecracker 1.12.1 and to Hull in its place.
//!
//! The tables in `tests/api/contract` say what is asked, in which states of a machine, and in what
//! Hull's answer differs, each time with a reason from `tests/api/contract/reasons`. Compared are
//! the status, the shape of the body (keys and types; of what is refused, that a `fault_message`
//! says why), and then, by value, what `GET` says of the machine: a request that was answered alike
//! and has done something else is a difference as well. One that is not listed fails the test, and so
//! does one that is listed and is not there.

// Marked as tests, so that clippy lets them unwrap.
#[cfg(test)]
mod compare;
#[cfg(test)]
mod peer;
#[cfg(test)]
mod table;
#[cfg(test)]
mod tests;
