//! Looking for more before sleeping.
//!
//! A driver often answers what it was just given within microseconds: a reply to a frame, the next
//! read after one. To find that without having slept saves a wake-up, which costs more than the wait.
//! Where nothing comes, the thread soon looks less often: after `n` waits in vain it sleeps at once
//! 2^n - 1 times.

use std::time::{Duration, Instant};

/// How long to look. A wake-up costs about as much.
const WINDOW: Duration = Duration::from_micros(20);

/// Bound of `n` above: looking costs an idle guest's thread at most a 64th of [`WINDOW`] per event.
const MOST_MISSES: u32 = 6;

/// When to look, and when to sleep at once.
#[derive(Debug)]
pub(super) struct Linger {
    /// There is a CPU for the guest meanwhile.
    possible: bool,
    until: Option<Instant>,
    misses: u32,
    skips: u32,
}

impl Linger {
    /// For the calling thread.
    pub(super) fn new() -> Linger {
        Linger { possible: cpus() > 1, until: None, misses: 0, skips: 0 }
    }

    /// Timeout in milliseconds for the next wait for events: 0 to look, -1 to sleep until one comes.
    pub(super) fn timeout(&self) -> i32 {
        if self.until.is_some() { 0 } else { -1 }
    }

    /// A wait found `events`.
    pub(super) fn found(&mut self, events: usize, now: Instant) {
        match self.until {
            Some(until) if events == 0 => {
                if now >= until {
                    self.until = None;
                    self.misses = (self.misses + 1).min(MOST_MISSES);
                    self.skips = (1 << self.misses) - 1;
                }
            }
            None if self.skips > 0 => self.skips -= 1,
            looked => {
                if looked.is_some() {
                    self.misses = 0;
                }
                self.until = self.possible.then(|| now + WINDOW);
            }
        }
    }
}

/// CPUs that this thread may run on; 1 if they cannot be counted.
fn cpus() -> i32 {
    // SAFETY: the set is plain data, which the call fills, and is counted after that.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set);
        if got < 0 { 1 } else { libc::CPU_COUNT(&set) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linger() -> Linger {
        Linger { possible: true, until: None, misses: 0, skips: 0 }
    }

    #[test]
    fn looks_as_long_as_something_comes() {
        let (mut linger, now) = (linger(), Instant::now());
        assert_eq!(linger.timeout(), -1);
        for _ in 0..100 {
            linger.found(1, now);
            assert_eq!(linger.timeout(), 0);
            linger.found(0, now);
            assert_eq!(linger.timeout(), 0, "the time is not over");
        }
    }

    #[test]
    fn looks_less_and_less_where_nothing_comes() {
        let (mut linger, mut now) = (linger(), Instant::now());
        let mut looks = Vec::new();
        for event in 0..1000 {
            now += Duration::from_millis(1);
            linger.found(1, now);
            if linger.timeout() == 0 {
                looks.push(event);
                linger.found(0, now + WINDOW);
            }
            assert_eq!(linger.timeout(), -1);
        }
        assert_eq!(looks[..6], [0, 2, 6, 14, 30, 62]);
        assert!(looks.windows(2).skip(6).all(|pair| pair[1] - pair[0] == 64), "{looks:?}");
        // One answer, and it looks each time again.
        while linger.timeout() < 0 {
            linger.found(1, now);
        }
        linger.found(1, now);
        assert_eq!((linger.timeout(), linger.misses), (0, 0));
    }

    #[test]
    fn sleeps_where_the_guest_has_no_other_cpu() {
        let mut linger = Linger { possible: false, ..linger() };
        linger.found(1, Instant::now());
        assert_eq!(linger.timeout(), -1);
    }

    #[test]
    fn counts_cpus() {
        assert!(cpus() >= 1);
    }
}
