//! Telling the guest that all connections are gone (virtio 1.3 § 5.10.6.7).
//!
//! ```text
//!             a buffer in the          the driver gives
//!             event queue              a buffer back
//!   owed ───────────────────> told ───────────────────> over
//!     └───────────────────────┴── 2 s ──> nobody waits any more
//! ```
//!
//! A driver closes what is open when it comes to the event, and says nothing of it. A connection that
//! began shortly before would be one for the host only, so until then none begins: programs wait to be
//! accepted, and the guest's packets in their queue.

use super::connections::ANSWER_TICKS;
use super::{EVENT, TRANSPORT_RESET};
use crate::virtio::device::Fault;
use crate::virtio::queue::{Chain, Queue};

#[derive(Debug, Default)]
pub(super) struct TransportReset {
    /// The guest is to be told.
    owed: bool,
    /// It was told, and had given so many buffers beside the event's.
    told: Option<u16>,
    /// Ticks for which others wait.
    patience: u16,
}

impl TransportReset {
    /// All connections are gone.
    pub(super) fn new() -> TransportReset {
        TransportReset { owed: true, told: None, patience: ANSWER_TICKS }
    }

    /// Others wait for the guest to close its side.
    pub(super) fn holds(&self) -> bool {
        self.patience > 0
    }

    /// Time passed.
    pub(super) fn tick(&mut self) {
        self.patience = self.patience.saturating_sub(1);
    }

    /// Does what can be done with the event queue. Returns true if the guest is told now, so that no
    /// connection may be left.
    pub(super) fn advance(&mut self, queue: &mut Queue, chain: &mut Chain) -> Result<bool, Fault> {
        let broken = |err| Fault::Queue(EVENT, err);
        let tells = self.owed && self.tell(queue, chain)?;
        if let Some(before) = self.told
            && queue.enable_kicks_for_more().map_err(broken)? > before
        {
            (self.told, self.patience) = (None, 0);
        }
        Ok(tells)
    }

    fn tell(&mut self, queue: &mut Queue, chain: &mut Chain) -> Result<bool, Fault> {
        let broken = |err| Fault::Queue(EVENT, err);
        let head = loop {
            if let Some(head) = queue.pop(chain).map_err(broken)? {
                break head;
            }
            if !queue.enable_kicks().map_err(broken)? {
                return Ok(false);
            }
        };
        let before = queue.available().map_err(broken)?;
        let written = chain.writable.write(&TRANSPORT_RESET);
        queue.complete(head, written as u32);
        if written < TRANSPORT_RESET.len() {
            return Err(Fault::Request(EVENT, "an event does not fit into its buffer"));
        }
        *self = TransportReset { owed: false, told: Some(before), patience: ANSWER_TICKS };
        Ok(true)
    }
}
