//! Virtio devices (virtio 1.3) over the MMIO transport.
//!
//! ```text
//!   guest ── MMIO exit ──> mmio::Registers ── effect ──> vmm (main) ── start/stop ──┐
//!     │                     (vCPU thread)                  owns each Device          v
//!     └── notify (ioeventfd) ────────────────────────────────────────────> Worker (io thread)
//!     <── irqfd ───────────────── Interrupt <── Queue::notify ──────────────────────┘
//! ```
//!
//! - [`queue`]: the split virtqueue, popped and completed by a worker; [`iobuf`] what a descriptor
//!   chain points to.
//! - [`mmio`]: the transport's registers as a plain value.
//! - [`device`]: the contract: what a device offers, what a worker does, what it may ask of its
//!   io thread.
//! - one file per device: [`rng`], [`blk`], [`net`], [`console`], [`vsock`],
//!   [`balloon`].

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod iobuf;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod vsock;

#[cfg(any(test, feature = "conformance"))]
pub mod conformance;

/// Feature bits that belong to virtio itself rather than to a device (virtio 1.3 § 6).
pub mod features {
    /// VIRTIO_F_INDIRECT_DESC: a descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX: notifications and interrupts are suppressed by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_RESET (§ 2.6.1): not offered; named so that tests can ask for it.
    pub const RING_RESET: u64 = 1 << 40;

    /// What every Hull device offers beside its own bits.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// Device types (virtio 1.3 § 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
    /// Memory that the guest lends to the host.
    Balloon = 5,
    /// Socket.
    Vsock = 19,
}

impl Kind {
    /// Short name, as in configuration keys and messages.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Net => "net",
            Kind::Block => "blk",
            Kind::Console => "console",
            Kind::Rng => "rng",
            Kind::Balloon => "balloon",
            Kind::Vsock => "vsock",
        }
    }
}
