//! What a socket device counts.

use crate::metrics;
use crate::metrics::Counter;

metrics! {
    /// What a socket device counts; "received" is by the guest.
    pub struct VsockMetrics {
        /// Times that the guest offered buffers.
        rx_queue_event_count: Counter,
        /// Packets that the guest received.
        rx_packets_count: Counter,
        /// Bytes of streams that the guest received.
        rx_bytes_count: Counter,
        /// Reads from a program of the host that failed.
        rx_read_fails: Counter,
        /// Times that the guest had packets.
        tx_queue_event_count: Counter,
        /// Packets that the guest sent.
        tx_packets_count: Counter,
        /// Bytes of streams that the guest sent.
        tx_bytes_count: Counter,
        /// Connections that began.
        conns_added: Counter,
        /// Connections that were ended before both sides had closed them.
        conns_killed: Counter,
        /// Connections that are over.
        conns_removed: Counter,
        /// Packets of the guest's that belonged to no connection, or were refused.
        refused_count: Counter,
    }
}
