//! Rate limits: token buckets for bytes and for operations.
//!
//! A [`RateLimiter`] is shared by all queues of a device and outlives their workers, so that a
//! driver that resets its device does not get a full bucket each time. It reads no clock: the
//! caller says what time it is, before each request that it takes.
//!
//! ```text
//!   ready(now)? ── yes ──> take a request, charge(its bytes)
//!       └─ wait ──> leave the queue alone for so long, then ask again
//! ```
//!
//! A bucket's level is kept as the moment at which it was empty, or will be again. A request may be
//! taken when there is a token at all, and costs what it costs: a request that is larger than its
//! bucket passes, and the next ones wait until the debt is paid. So nothing starves, and over time
//! exactly the rate passes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A token bucket as Firecracker describes it: `size` tokens at first, filled at the rate of `size`
/// per `refill_ms`, and `one_time_burst` tokens beside it that do not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Tokens that it holds. With 0 there is no limit.
    pub size: u64,
    /// Tokens in addition that are used up first.
    pub one_time_burst: u64,
    /// Milliseconds that an empty bucket takes to fill. With 0 there is no limit.
    pub refill_ms: u64,
}

/// What a limiter limits. Without a bucket there is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens are bytes.
    pub bandwidth: Option<Bucket>,
    /// Tokens are operations.
    pub ops: Option<Bucket>,
}

/// Limits the requests of one device, or of one direction of it. Clones are the same limiter.
#[derive(Clone, Debug)]
pub struct RateLimiter(Arc<Account>);

#[derive(Debug)]
struct Account {
    limits: Limits,
    /// The 0 of all times in here.
    epoch: Instant,
    bandwidth: Option<Level>,
    ops: Option<Level>,
    /// Somebody was told to wait and has not come to the end of its requests since.
    waiting: AtomicBool,
}

/// Time is counted in sixteenths of a nanosecond, so that rounding what a request costs makes no
/// difference: a request that the host serves in 100 ns is off by less than 0.1 %.
const GRAINS_PER_NANO: u64 = 16;
const NANOS_PER_MILLI: u64 = 1_000_000;
const GRAINS_PER_MILLI: i64 = (GRAINS_PER_NANO * NANOS_PER_MILLI) as i64;

/// Longest time to fill a bucket, four years: what is longer makes no difference. A single charge
/// costs no more either, so that sums stay far below overflow.
const LONGEST: i64 = 1 << 61;

/// Whoever has to wait waits for at least so much, or half a bucket: wake-ups cost something too.
const SLICE: i64 = GRAINS_PER_MILLI;

/// A queue that waits for tokens is often looked at later than it asked for. For up to so long, what
/// came meanwhile counts even if the bucket overflows, or small buckets would lose by it.
const LATE: i64 = 100 * GRAINS_PER_MILLI;

/// The level of one bucket.
#[derive(Debug)]
struct Level {
    size: u64,
    /// Time to fill it from empty, in grains.
    refill: i64,
    /// Least time in grains that brings one token.
    token: i64,
    /// When the bucket was empty, or will be, in grains after the epoch.
    empty: AtomicI64,
    /// What is left of the burst.
    burst: AtomicU64,
}

impl Level {
    /// A full bucket, or `None` if it is no limit.
    fn new(bucket: Bucket) -> Option<Level> {
        let grains = u128::from(bucket.refill_ms) * u128::from(GRAINS_PER_MILLI.unsigned_abs());
        let refill = i64::try_from(grains).unwrap_or(LONGEST).min(LONGEST);
        if bucket.size == 0 || refill == 0 {
            return None;
        }
        let token = refill.unsigned_abs().div_ceil(bucket.size) as i64;
        Some(Level {
            size: bucket.size,
            refill,
            token,
            empty: AtomicI64::new(-refill),
            burst: AtomicU64::new(bucket.one_time_burst),
        })
    }

    /// Grains to wait at `now` until a request may be taken, 0 for none.
    fn wait(&self, now: i64, waiting: bool) -> i64 {
        if self.burst.load(Ordering::Relaxed) > 0 {
            return 0;
        }
        let empty = self.settle(now, waiting);
        if now - empty >= self.token {
            return 0;
        }
        let slice = SLICE.min(self.refill / 2).max(self.token);
        empty + slice - now
    }

    /// Lets overflow what does not fit. Returns when the bucket was empty.
    fn settle(&self, now: i64, waiting: bool) -> i64 {
        let earliest = now - self.refill - if waiting { LATE } else { 0 };
        self.empty.fetch_max(earliest, Ordering::Relaxed).max(earliest)
    }

    /// Tokens that are there.
    fn tokens(&self, now: i64) -> u64 {
        let filled = now.saturating_sub(self.empty.load(Ordering::Relaxed)).max(0).unsigned_abs();
        let tokens =
            u128::from(filled) * u128::from(self.size) / u128::from(self.refill.unsigned_abs());
        let tokens = u64::try_from(tokens).unwrap_or(u64::MAX);
        tokens.saturating_add(self.burst.load(Ordering::Relaxed))
    }

    fn charge(&self, tokens: u64) {
        let take = |burst: u64| burst.checked_sub(tokens.min(burst)).filter(|_| burst > 0);
        let burst =
            self.burst.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).unwrap_or(0);
        let rest = tokens - tokens.min(burst);
        let size = u128::from(self.size);
        let cost = (u128::from(rest) * u128::from(self.refill.unsigned_abs()) + size / 2) / size;
        let cost = i64::try_from(cost).unwrap_or(LONGEST).min(LONGEST);
        self.empty.fetch_add(cost, Ordering::Relaxed);
    }
}

impl RateLimiter {
    /// A limiter with full buckets, or `None` if `limits` do not limit anything. `now` must not be
    /// later than any time it is asked about.
    pub fn new(limits: Limits, now: Instant) -> Option<RateLimiter> {
        let bandwidth = limits.bandwidth.and_then(Level::new);
        let ops = limits.ops.and_then(Level::new);
        if bandwidth.is_none() && ops.is_none() {
            return None;
        }
        let waiting = AtomicBool::new(false);
        Some(RateLimiter(Arc::new(Account { limits, epoch: now, bandwidth, ops, waiting })))
    }

    /// What it was made from.
    pub fn limits(&self) -> Limits {
        self.0.limits
    }

    fn levels(&self) -> impl Iterator<Item = &Level> {
        self.0.bandwidth.iter().chain(&self.0.ops)
    }

    fn grains(&self, now: Instant) -> i64 {
        let nanos = now.saturating_duration_since(self.0.epoch).as_nanos();
        i64::try_from(nanos * u128::from(GRAINS_PER_NANO)).unwrap_or(i64::MAX / 2)
    }

    /// Whether a request may be taken at `now`.
    ///
    /// # Errors
    /// The time to wait before asking again, never 0.
    pub fn ready(&self, now: Instant) -> Result<(), Duration> {
        let now = self.grains(now);
        let waiting = self.0.waiting.load(Ordering::Relaxed);
        let wait = self.levels().map(|level| level.wait(now, waiting)).max().unwrap_or(0);
        if wait <= 0 {
            return Ok(());
        }
        self.0.waiting.store(true, Ordering::Relaxed);
        Err(Duration::from_nanos(wait.unsigned_abs().div_ceil(GRAINS_PER_NANO)))
    }

    /// Bytes that may be taken at `now` without debt, at least 1: for a stream that can be cut
    /// anywhere.
    ///
    /// # Errors
    /// As [`RateLimiter::ready`].
    pub fn allowance(&self, now: Instant) -> Result<u64, Duration> {
        self.ready(now)?;
        let now = self.grains(now);
        Ok(self.0.bandwidth.as_ref().map_or(u64::MAX, |level| level.tokens(now).max(1)))
    }

    /// An operation of `bytes` bytes was taken.
    pub fn charge(&self, bytes: u64) {
        if let Some(bandwidth) = &self.0.bandwidth {
            bandwidth.charge(bytes);
        }
        if let Some(ops) = &self.0.ops {
            ops.charge(1);
        }
    }

    /// There are no more requests to be taken: from now on what does not fit into the buckets is
    /// lost.
    pub fn idle(&self) {
        if self.0.waiting.load(Ordering::Relaxed) {
            self.0.waiting.store(false, Ordering::Relaxed);
        }
    }
}

/// Two are equal if they are the same.
impl PartialEq for RateLimiter {
    fn eq(&self, other: &RateLimiter) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for RateLimiter {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, refill_ms: u64) -> Bucket {
        Bucket { size, one_time_burst, refill_ms }
    }

    fn bandwidth(bucket: Bucket, now: Instant) -> RateLimiter {
        RateLimiter::new(Limits { bandwidth: Some(bucket), ops: None }, now).unwrap()
    }

    #[test]
    fn what_limits_nothing_is_no_limiter() {
        let now = Instant::now();
        assert!(RateLimiter::new(Limits::default(), now).is_none());
        for bucket in [bucket(0, 7, 100), bucket(100, 7, 0)] {
            let limits = Limits { bandwidth: Some(bucket), ops: Some(bucket) };
            assert!(RateLimiter::new(limits, now).is_none());
        }
    }

    #[test]
    fn the_burst_goes_first_and_does_not_come_back() {
        let start = Instant::now();
        let limiter = bandwidth(bucket(1000, 500, 1000), start);
        assert_eq!(limiter.allowance(start), Ok(1500));
        limiter.charge(500);
        // The bucket itself is full: nothing comes while the burst is used up.
        let later = start + Duration::from_secs(5);
        assert_eq!(limiter.allowance(later), Ok(1000));
        limiter.charge(1000);
        assert_eq!(limiter.ready(later), Err(Duration::from_millis(1)));
        assert_eq!(limiter.allowance(later + Duration::from_millis(100)), Ok(100));
        limiter.idle();
        assert_eq!(limiter.allowance(later + Duration::from_secs(60)), Ok(1000));
    }

    #[test]
    fn a_request_larger_than_the_bucket_passes_and_is_paid_for() {
        let start = Instant::now();
        let limiter = bandwidth(bucket(1000, 0, 1000), start);
        limiter.charge(10_000);
        assert_eq!(limiter.ready(start), Err(Duration::from_millis(9001)));
        assert!(limiter.ready(start + Duration::from_millis(9000)).is_err());
        assert!(limiter.ready(start + Duration::from_millis(9001)).is_ok());
    }

    #[test]
    fn both_buckets_count_and_the_emptier_one_decides() {
        let start = Instant::now();
        let ops = Some(bucket(10, 0, 1000));
        let limits = Limits { bandwidth: Some(bucket(1 << 20, 0, 1000)), ops };
        let limiter = RateLimiter::new(limits, start).unwrap();
        for _ in 0..10 {
            limiter.ready(start).unwrap();
            limiter.charge(1);
        }
        assert_eq!(limiter.ready(start), Err(Duration::from_millis(100)));
        // A flush has no bytes and is an operation all the same.
        let later = start + Duration::from_millis(100);
        limiter.ready(later).unwrap();
        limiter.charge(0);
        assert!(limiter.ready(later).is_err());
    }

    #[test]
    fn clones_are_one_account() {
        let now = Instant::now();
        let limiter = bandwidth(bucket(1000, 0, 1000), now);
        limiter.clone().charge(1000);
        assert!(limiter.ready(now).is_err());
        assert_eq!(limiter, limiter.clone());
        assert_ne!(limiter, bandwidth(bucket(1000, 0, 1000), now));
    }

    #[test]
    fn extremes_neither_overflow_nor_hang() {
        let start = Instant::now();
        for (size, burst, refill) in [
            (u64::MAX, u64::MAX, u64::MAX),
            (1, 0, u64::MAX),
            (u64::MAX, 0, 1),
            (1, 1, 1),
            (1, u64::MAX, 1),
        ] {
            let limiter = bandwidth(bucket(size, burst, refill), start);
            for second in 0..100 {
                let now = start + Duration::from_secs(second * 1_000_000);
                if limiter.ready(now).is_ok() {
                    limiter.charge(u64::MAX);
                }
                let _ = limiter.allowance(now);
            }
        }
    }

    proptest! {
        /// A queue that always has requests gets the rate and no more, however small the bucket is
        /// and although it is woken late.
        #[test]
        fn the_rate_is_held(
            rate in 1_000u64..2_000_000_000,
            refill_ms in 1u64..2000,
            burst in 0u64..1_000_000,
            sizes in prop::collection::vec(1u64..100_000, 1..20),
            late_us in prop::collection::vec(0u64..5_000, 1..20),
        ) {
            let size = (rate * refill_ms / 1000).max(1);
            let rate = size as f64 * 1000.0 / refill_ms as f64;
            let start = Instant::now();
            let limiter = bandwidth(bucket(size, burst, refill_ms), start);
            let largest = *sizes.iter().max().unwrap();
            // Long enough for some requests, and for what the bucket holds at first not to matter.
            let end = Duration::from_secs(2).max(Duration::from_secs_f64(50.0 * largest as f64 / rate));
            let (mut sizes, mut late) = (sizes.iter().cycle(), late_us.iter().cycle());
            let (mut time, mut total, mut steps) = (Duration::ZERO, 0u64, 0);
            while time < end && steps < 20_000 {
                steps += 1;
                match limiter.ready(start + time) {
                    Ok(()) => {
                        let bytes = *sizes.next().unwrap();
                        limiter.charge(bytes);
                        total += bytes;
                        // The host takes time as well.
                        time += Duration::from_nanos(bytes / 100);
                    }
                    Err(wait) => {
                        prop_assert!(!wait.is_zero());
                        time += wait + Duration::from_micros(*late.next().unwrap());
                    }
                }
            }
            let due = rate * time.as_secs_f64();
            let most = due * 1.001 + (size + burst + largest) as f64;
            prop_assert!(total as f64 <= most, "{total} of {most}");
            prop_assert!(total as f64 >= due * 0.95, "{total} of {due} in {time:?}");
        }

        /// Whoever waits as long as it was told need not wait again.
        #[test]
        fn a_wait_is_long_enough(
            size in 1u64..1_000_000, refill_ms in 1u64..10_000, spent in 0u64..10_000_000)
        {
            let start = Instant::now();
            let limiter = bandwidth(bucket(size, 0, refill_ms), start);
            limiter.charge(spent);
            if let Err(wait) = limiter.ready(start) {
                prop_assert!(limiter.ready(start + wait).is_ok());
            }
        }

        /// Someone who comes now and then finds a full bucket, and no more.
        #[test]
        fn an_idle_bucket_overflows(size in 1u64..1_000_000, refill_ms in 1u64..1000) {
            let start = Instant::now();
            let limiter = bandwidth(bucket(size, 0, refill_ms), start);
            for round in 1..10 {
                let now = start + Duration::from_secs(round * 100);
                limiter.idle();
                prop_assert_eq!(limiter.allowance(now), Ok(size));
                limiter.charge(size);
                prop_assert!(limiter.ready(now).is_err());
            }
        }
    }
}
