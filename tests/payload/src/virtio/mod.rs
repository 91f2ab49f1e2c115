//! A clean driver for virtio 1.3 devices behind virtio-mmio (§ 4.2) with split virtqueues (§ 2.7).

pub mod balloon;
pub mod blk;
pub mod console;
pub mod mmds;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

use crate::boot::Boot;
use crate::println;
use mmio::Transport;
use queue::Queue;

/// Device ids (§ 5).
pub const NET: u32 = 1;
/// See `NET`.
pub const BLOCK: u32 = 2;
/// See `NET`.
pub const CONSOLE: u32 = 3;
/// See `NET`.
pub const ENTROPY: u32 = 4;
/// See `NET`.
pub const BALLOON: u32 = 5;
/// See `NET`.
pub const SOCKET: u32 = 19;

/// Descriptor continues in `next`.
pub const NEXT: u16 = 1;
/// Descriptor is written by the device.
pub const WRITE: u16 = 2;
/// Descriptor refers to a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Feature bits that do not belong to one device (§ 6).
pub const F_INDIRECT: u64 = 1 << 28;
/// See `F_INDIRECT`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// See `F_INDIRECT`.
pub const F_VERSION_1: u64 = 1 << 32;

/// Finds the `skip=`-th device of a kind, or says that there is none.
pub fn find(boot: &Boot, kind: u32) -> Option<Transport> {
    let skip = boot.number("skip", 0) as usize;
    let device = Transport::all(boot).filter(|device| device.kind() == kind).nth(skip);
    if device.is_none() {
        println!("no virtio device of kind {kind}");
    }
    device
}

/// Resets a device, negotiates what it offers of `wanted`, sets up queues 0 to `N - 1` of at most
/// `size` entries and tells it to go. `noevent=1` and `indirect=1` shape what is negotiated.
pub fn start<const N: usize>(
    boot: &Boot,
    device: &Transport,
    wanted: u64,
    size: u16,
) -> Option<(u64, [Queue; N])> {
    let mut wanted = wanted | F_VERSION_1 | F_EVENT_IDX;
    if boot.flag("noevent") {
        wanted &= !F_EVENT_IDX;
    }
    if boot.flag("indirect") {
        wanted |= F_INDIRECT;
    }
    let Some(features) = device.negotiate(wanted) else {
        println!("negotiation failed, status {:#x}", device.status());
        return None;
    };
    let mut queues = [Queue::absent(); N];
    for (index, slot) in queues.iter_mut().enumerate() {
        let memory = boot.allocate(Queue::BYTES)?;
        let events = features & F_EVENT_IDX != 0;
        let Some(queue) = device.set_up_queue(index as u16, size, memory, events) else {
            println!("queue {index} cannot be set up");
            return None;
        };
        *slot = queue;
    }
    device.driver_ok();
    Some((features, queues))
}
