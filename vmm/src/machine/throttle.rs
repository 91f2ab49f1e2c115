//! How often the driver of a device gets into the log: a guest decides how often it breaks a rule,
//! and must not fill the log's disk. Reboots do not start the count anew, so the count is the
//! process's.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines in a row.
const BURST: u32 = 8;

/// How long it takes until there may be one more.
const PERIOD: Duration = Duration::from_secs(10);

/// Which lines may be logged.
pub(super) struct Throttle(Mutex<Count>);

struct Count {
    /// Lines that may come now.
    left: u32,
    /// When one was added to them last.
    since: Option<Instant>,
    /// Lines that were not logged since the last that was.
    held_back: u64,
}

impl Throttle {
    pub(super) const fn new() -> Throttle {
        Throttle(Mutex::new(Count { left: BURST, since: None, held_back: 0 }))
    }

    /// Whether a line may be logged now; how many were not, since the last that was.
    pub(super) fn pass(&self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> Option<u64> {
        let mut count = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *count.since.get_or_insert(now);
        let periods = now.saturating_duration_since(since).as_secs() / PERIOD.as_secs();
        if periods > 0 {
            let more = u32::try_from(periods).unwrap_or(BURST);
            count.left = count.left.saturating_add(more).min(BURST);
            count.since = Some(now);
        }
        if count.left == 0 {
            count.held_back += 1;
            return None;
        }
        count.left -= 1;
        Some(std::mem::take(&mut count.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_at_once_and_then_one_a_period() {
        let throttle = Throttle::new();
        let start = Instant::now();
        for _ in 0..BURST {
            assert_eq!(throttle.pass_at(start), Some(0));
        }
        for _ in 0..1000 {
            assert_eq!(throttle.pass_at(start + PERIOD / 2), None);
        }
        assert_eq!(throttle.pass_at(start + PERIOD), Some(1000));
        assert_eq!(throttle.pass_at(start + PERIOD), None);
        let later = start + 1000 * PERIOD;
        let passed = (0..100).filter(|_| throttle.pass_at(later).is_some()).count();
        assert_eq!(passed, BURST as usize);
    }
}
