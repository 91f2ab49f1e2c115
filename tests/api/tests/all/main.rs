//! Machines that are configured, started and changed through their socket.

// Marked as tests, so that clippy lets them unwrap.
#[cfg(test)]
mod abuse;
#[cfg(test)]
mod cpu;
#[cfg(test)]
mod docs;
#[cfg(test)]
mod drop_in;
#[cfg(test)]
mod events;
#[cfg(test)]
mod fork;
#[cfg(test)]
mod hook;
#[cfg(test)]
mod life;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod mmds;
#[cfg(test)]
mod pager;
#[cfg(test)]
mod settings;
#[cfg(test)]
mod snapshot;
#[cfg(test)]
mod verbs;
