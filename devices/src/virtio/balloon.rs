//! Virtio balloon (virtio 1.3 § 5.5): the guest lends memory to the host.
//!
//! - Inflating: the driver names pages that it does without; they are given back to the host.
//! - Deflating: it takes pages back. They fault in again when touched, so nothing is to be done.
//! - Statistics: the driver says how it is off for memory, each time it is asked.
//! - Reporting: the driver names free pages, which it may use again without saying so.
//!
//! Which index a queue has depends on features: Linux numbers the queues that are there one after
//! the other, so that reporting is queue 3, or 2 without statistics; the specification gives it
//! index 4 in any case. All of them work.
//!
//! What a given-back page holds afterwards is not defined (it may be what was in the kernel's file),
//! so page poisoning is never offered.

mod worker;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use super::Kind;
use super::device::{Device, Message, Payload, RestoreError, Status, Worker};
use crate::metrics;
use crate::metrics::{Counter, Metrics, Set};

const NAME: &str = "virtio-balloon";
const VERSION: u16 = 1;

/// Bytes of the pages that the protocol counts in (§ 5.5.6).
pub const PAGE: u64 = 4096;

const QUEUE_SIZE: u16 = 128;
const QUEUES: [u16; 5] = [QUEUE_SIZE; 5];
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// The statistics queue, or the reporting queue if there are none.
const THIRD: u16 = 2;

/// Feature bits (§ 5.5.3).
mod feature {
    pub(super) const STATS_VQ: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_REPORTING: u64 = 1 << 5;
}

/// Offset of `actual` in the configuration space (§ 5.5.4), after `num_pages`.
const ACTUAL_OFFSET: u64 = 4;

/// What gives pages of guest RAM back to the host: `vmm/memory`.
pub trait Discard: Send + Sync {
    /// Gives the whole pages of the `len` bytes at guest-physical address `gpa` back, as far as they
    /// are RAM. Numbers are the guest's: anything may come.
    fn discard(&self, gpa: u64, len: u64);

    /// The same for `len` bytes at an address in this process, which a driver's buffer has.
    fn discard_host(&self, start: *const u8, len: usize);
}

/// What a [`Balloon`] is made from.
pub struct BalloonOptions {
    /// Pages of 4 KiB that the guest is to do without.
    pub target: u32,
    /// The driver may take pages back when the guest runs out of memory (for Linux: before it kills
    /// a process).
    pub deflate_on_oom: bool,
    /// How often the guest is asked for statistics. Without it they are not offered.
    pub stats_interval: Option<Duration>,
    /// Offer free page reporting.
    pub reporting: bool,
    /// Where pages go.
    pub discard: Arc<dyn Discard>,
}

/// Names of the statistics by their tag (§ 5.5.6.4), as Firecracker's API has them. Amounts of
/// memory are in bytes, the others are counts since the guest started.
pub const STATISTICS: [&str; 16] = [
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kill",
    "alloc_stall",
    "async_scan",
    "direct_scan",
    "async_reclaim",
    "direct_reclaim",
];

/// How a balloon stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Pages of 4 KiB that the guest is to do without.
    pub target: u32,
    /// Pages that it does without, as it says itself.
    pub actual: u32,
    /// What it said last about its memory, by tag; see [`STATISTICS`]. All are `None` before it said
    /// anything.
    pub statistics: [Option<u64>; STATISTICS.len()],
}

impl BalloonStatus {
    /// The statistics that the guest gave, with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        STATISTICS.into_iter().zip(self.statistics).filter_map(|(name, value)| Some((name, value?)))
    }
}

/// The last statistics, as the worker leaves them for the device.
#[derive(Debug, Default)]
struct Observed {
    values: [AtomicU64; STATISTICS.len()],
    /// A bit for each value that the guest gave.
    present: AtomicU32,
}

impl Observed {
    /// Takes the place of what was there.
    fn set(&self, statistics: &[Option<u64>; STATISTICS.len()]) {
        let mut present = 0;
        for (tag, (place, value)) in self.values.iter().zip(statistics).enumerate() {
            if let Some(value) = value {
                place.store(*value, Ordering::Relaxed);
                present |= 1 << tag;
            }
        }
        self.present.store(present, Ordering::Release);
    }

    fn get(&self) -> [Option<u64>; STATISTICS.len()] {
        let present = self.present.load(Ordering::Acquire);
        std::array::from_fn(|tag| {
            let value = self.values.get(tag)?.load(Ordering::Relaxed);
            (present & 1 << tag != 0).then_some(value)
        })
    }
}

metrics! {
    /// What a balloon counts.
    pub struct BalloonMetrics {
        /// Times that the guest gave pages.
        inflate_count: Counter,
        /// Times that the guest took pages back.
        deflate_count: Counter,
        /// Times that the guest reported pages that it does not use.
        report_count: Counter,
        /// Statistics that the guest gave.
        stats_updates_count: Counter,
    }
}

/// The device.
pub struct Balloon {
    target: u32,
    actual: u32,
    features: u64,
    queues: usize,
    interval: Duration,
    observed: Arc<Observed>,
    discard: Arc<dyn Discard>,
    metrics: Arc<BalloonMetrics>,
}

impl fmt::Debug for Balloon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balloon").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Balloon {
    /// A balloon that the guest has not inflated yet.
    pub fn new(options: BalloonOptions) -> Balloon {
        let BalloonOptions { target, deflate_on_oom, stats_interval, reporting, discard } = options;
        let bit = |wanted: bool, feature: u64| if wanted { feature } else { 0 };
        let features = bit(deflate_on_oom, feature::DEFLATE_ON_OOM)
            | bit(stats_interval.is_some(), feature::STATS_VQ)
            | bit(reporting, feature::PAGE_REPORTING);
        let queues = match (reporting, stats_interval) {
            (true, _) => QUEUES.len(),
            (false, Some(_)) => 3,
            (false, None) => 2,
        };
        Balloon {
            target,
            actual: 0,
            features,
            queues,
            interval: stats_interval.unwrap_or_default(),
            observed: Arc::default(),
            discard,
            metrics: Arc::default(),
        }
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Report,
}

impl Role {
    /// The role of queue `index` for a driver that agreed on `negotiated`.
    fn of(index: u16, negotiated: u64) -> Option<Role> {
        match index {
            INFLATE => Some(Role::Inflate),
            DEFLATE => Some(Role::Deflate),
            THIRD if negotiated & feature::STATS_VQ != 0 => Some(Role::Statistics),
            _ if negotiated & feature::PAGE_REPORTING != 0 => Some(Role::Report),
            _ => None,
        }
    }
}

impl Device for Balloon {
    fn kind(&self) -> Kind {
        Kind::Balloon
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[u16] {
        QUEUES.get(..self.queues).unwrap_or(&QUEUES)
    }

    fn config(&self) -> Vec<u8> {
        [self.target.to_le_bytes(), self.actual.to_le_bytes()].concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Option<Vec<u8>> {
        // § 5.5.6: the driver says how many pages it gave.
        let actual = u32::from_le_bytes(<[u8; 4]>::try_from(data).ok()?);
        if offset != ACTUAL_OFFSET || actual == self.actual {
            return None;
        }
        self.actual = actual;
        Some(self.config())
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        match *message {
            Message::BalloonTarget(pages) if pages != self.target => {
                self.target = pages;
                Some(self.config())
            }
            Message::StatisticsInterval(interval) => {
                self.interval = interval;
                None
            }
            _ => None,
        }
    }

    fn status(&self) -> Option<Status> {
        let statistics = self.observed.get();
        let (target, actual) = (self.target, self.actual);
        Some(Status::Balloon(BalloonStatus { target, actual, statistics }))
    }

    fn worker(&mut self, _group: usize, negotiated: u64) -> io::Result<Box<dyn Worker>> {
        let roles = std::array::from_fn(|index| Role::of(index as u16, negotiated));
        Ok(Box::new(worker::BalloonWorker::new(worker::Settings {
            roles,
            interval: self.interval,
            observed: Arc::clone(&self.observed),
            discard: Arc::clone(&self.discard),
            metrics: Arc::clone(&self.metrics),
        })))
    }

    fn metrics(&self) -> Vec<Set> {
        vec![("balloon", Arc::clone(&self.metrics) as Arc<dyn Metrics>)]
    }

    fn reset(&mut self) {
        // All pages are the guest's again.
        self.actual = 0;
        self.observed.set(&Default::default());
    }

    fn save(&self) -> Payload {
        Payload { kind: NAME, version: VERSION, bytes: self.config() }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        let bytes = payload.expect(NAME, VERSION)?;
        let bytes = <[u8; 8]>::try_from(bytes)
            .map_err(|_| RestoreError::Invalid { kind: NAME, reason: "it is not 8 bytes long" })?;
        let both = u64::from_le_bytes(bytes);
        (self.target, self.actual) = (both as u32, (both >> 32) as u32);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
