//! What a disk counts.

use crate::metrics;
use crate::metrics::{Counter, Latency};

metrics! {
    /// What a disk counts.
    pub struct BlockMetrics {
        /// Reads that were done.
        read_count: Counter,
        /// Bytes that were read.
        read_bytes: Counter,
        /// From seeing a read to telling the driver that it is done.
        read_agg: Latency,
        /// Writes that were done.
        write_count: Counter,
        /// Bytes that were written.
        write_bytes: Counter,
        /// From seeing a write to telling the driver that it is done.
        write_agg: Latency,
        /// Flushes that were done.
        flush_count: Counter,
        /// Requests to discard or zero ranges that were done.
        range_count: Counter,
        /// Requests that the disk could not do, or that failed.
        execute_fails: Counter,
        /// Requests that make no sense.
        invalid_reqs_count: Counter,
        /// Times that the queue was looked at.
        queue_event_count: Counter,
        /// Times that requests had to wait for the rate limit.
        rate_limiter_throttled_events: Counter,
        /// Times that the disk got another file.
        update_count: Counter,
        /// Times that the disk could not have another file.
        update_fails: Counter,
    }
}
