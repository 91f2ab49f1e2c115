//! The REST API of a machine, on a Unix socket: Firecracker's, so that its clients can drive Hull
//! unchanged, and more on paths of its own.
//!
//! ```text
//!   client ── HTTP ──> server ──> routes ──> Instance ── Start ─────> whoever builds machines
//!                      (thread `api`)            └── Command ──> Handle ──> the running machine
//! ```
//!
//! Everything in here runs on one thread, which never touches guest memory and waits for nothing
//! but sockets. Requests become changes of a [`vmm::config::VmConfig`] until the machine is started,
//! and [`vmm::machine::Command`]s from then on.

mod body;
mod fault;
mod instance;
mod lasting;
#[cfg(test)]
mod openapi;
mod patience;
mod prometheus;
mod requests;
mod routes;
mod server;
pub mod types;

pub use fault::{Fault, chain};
pub use instance::{Instance, Limits, Link, LogSettings, Program, Start, Wish};
pub use server::{Listener, ServerError, Socket, SocketFile, serve};
