//! What a network card counts.

use crate::metrics;
use crate::metrics::Counter;

metrics! {
    /// What a network card counts; "received" is by the guest.
    pub struct NetMetrics {
        /// Frames that the guest received.
        rx_packets_count: Counter,
        /// Bytes of frames that the guest received.
        rx_bytes_count: Counter,
        /// Frames for the guest that got lost.
        rx_fails: Counter,
        /// Times that frames waited since the guest offered too few buffers.
        no_rx_avail_buffer: Counter,
        /// Times that the guest offered buffers.
        rx_queue_event_count: Counter,
        /// Times that the interface had frames.
        rx_tap_event_count: Counter,
        /// Reads from the interface that failed.
        tap_read_fails: Counter,
        /// Times that frames for the guest had to wait for the rate limit.
        rx_rate_limiter_throttled: Counter,
        /// Frames that the guest sent.
        tx_packets_count: Counter,
        /// Bytes of frames that the guest sent.
        tx_bytes_count: Counter,
        /// Frames of the guest that got lost.
        tx_fails: Counter,
        /// Frames of the guest that are none by their length.
        tx_malformed_frames: Counter,
        /// Times that the guest had something to send.
        tx_queue_event_count: Counter,
        /// Writes to the interface that failed.
        tap_write_fails: Counter,
        /// Times that the interface had no room.
        tx_remaining_reqs_count: Counter,
        /// Times that frames of the guest had to wait for the rate limit.
        tx_rate_limiter_throttled: Counter,
    }
}

metrics! {
    /// What a metadata service counts.
    pub struct MmdsMetrics {
        /// Frames that the service took.
        rx_accepted: Counter,
        /// Frames for the service that are none of it.
        rx_accepted_err: Counter,
        /// Requests that were answered.
        rx_count: Counter,
        /// Frames that the service sent.
        tx_count: Counter,
        /// Bytes of frames that the service sent.
        tx_bytes: Counter,
        /// Connections that were opened.
        connections_created: Counter,
        /// Connections that are over.
        connections_destroyed: Counter,
    }
}
