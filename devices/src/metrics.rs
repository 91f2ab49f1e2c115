//! Counters of what a device did, for whoever looks at it from outside.
//!
//! A device makes its set and shares it with its workers; nobody waits for anybody. Names are those
//! of Firecracker's metrics where the meaning is the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Something that is counted. One thread at a time writes it: of two, one could go unheard. Any
/// thread may look.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts `n` more. No atomic addition, which would cost as much as a small request.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Counts one more.
    #[inline]
    pub fn count(&self) {
        self.add(1);
    }

    /// How many it is.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long things took: the shortest, the longest, all together. Written as a [`Counter`] is.
#[derive(Debug, Default)]
pub struct Latency {
    // Nanoseconds.
    min: AtomicU64,
    max: AtomicU64,
    sum: Counter,
    count: Counter,
}

impl Latency {
    /// Notes that something took this long.
    pub fn note(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.note_many(1, nanos, nanos, nanos);
    }

    /// Notes `count` things, of which the shortest took `min` nanoseconds, the longest `max` and all
    /// together `sum`.
    pub fn note_many(&self, count: u64, min: u64, max: u64, sum: u64) {
        if self.count.get() == 0 || min < self.min.load(Ordering::Relaxed) {
            self.min.store(min, Ordering::Relaxed);
        }
        if max > self.max.load(Ordering::Relaxed) {
            self.max.store(max, Ordering::Relaxed);
        }
        self.sum.add(sum);
        self.count.add(count);
    }
}

/// A value as it is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// Only grows.
    Count(u64),
    /// The last of its kind, whatever was before.
    Level(u64),
    /// Durations in nanoseconds.
    Latency {
        /// The shortest.
        min: u64,
        /// The longest.
        max: u64,
        /// All together.
        sum: u64,
        /// How many.
        count: u64,
    },
}

/// What has a value.
pub trait Metric {
    /// The value.
    fn value(&self) -> Value;
}

impl Metric for Counter {
    fn value(&self) -> Value {
        Value::Count(self.get())
    }
}

impl Metric for Latency {
    fn value(&self) -> Value {
        Value::Latency {
            min: self.min.load(Ordering::Relaxed),
            max: self.max.load(Ordering::Relaxed),
            sum: self.sum.get(),
            count: self.count.get(),
        }
    }
}

/// A value that is replaced and not counted.
#[derive(Debug, Default)]
pub struct Level(AtomicU64);

impl Level {
    /// Puts it at `value`.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

impl Metric for Level {
    fn value(&self) -> Value {
        Value::Level(self.0.load(Ordering::Relaxed))
    }
}

/// Metrics that belong together, e.g. those of a device.
pub trait Metrics: Send + Sync {
    /// Shows each of them with its name and what it says.
    fn visit(&self, visitor: &mut dyn FnMut(&'static str, &'static str, Value));
}

/// A set of metrics that its owner shares, and the group that it is part of.
pub type Set = (&'static str, Arc<dyn Metrics>);

/// Declares a struct of metrics: its fields are [`Metric`]s, their comments say what they mean to
/// whoever reads them.
#[macro_export]
macro_rules! metrics {
    (
        $(#[$about:meta])*
        $visibility:vis struct $name:ident {
            $(#[doc = $help:literal] $field:ident: $kind:ty,)*
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        $visibility struct $name {
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl $crate::metrics::Metrics for $name {
            fn visit(
                &self,
                visitor: &mut dyn FnMut(&'static str, &'static str, $crate::metrics::Value),
            ) {
                $(visitor(
                    stringify!($field),
                    $help.trim_ascii(),
                    $crate::metrics::Metric::value(&self.$field),
                );)*
            }
        }
    };
}

/// Requests of a batch that end together, to be noted in one go: when each began is added up, and
/// one look at the clock serves them all.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch {
    count: u64,
    first: u64,
    last: u64,
    sum: u64,
}

impl Batch {
    /// Adds a request that began at `start`, in nanoseconds of some clock.
    #[inline]
    pub fn add(&mut self, start: u64) {
        self.first = if self.count == 0 { start } else { self.first.min(start) };
        self.last = self.last.max(start);
        self.sum = self.sum.wrapping_add(start);
        self.count += 1;
    }

    /// All of them end at `now` of the same clock.
    pub fn end(&mut self, now: u64, latency: &Latency) {
        let Batch { count, first, last, sum } = std::mem::take(self);
        if count > 0 {
            let total = now.wrapping_mul(count).wrapping_sub(sum);
            latency.note_many(count, now.saturating_sub(last), now.saturating_sub(first), total);
        }
    }

    /// True if there is nothing to be noted.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    metrics! {
        /// A set.
        struct Set {
            /// Things.
            things: Counter,
            /// How long things took.
            took: Latency,
        }
    }

    #[test]
    fn a_set_shows_its_fields() {
        let set = Set::default();
        set.things.add(2);
        set.took.note(Duration::from_nanos(7));
        set.took.note(Duration::from_nanos(5));
        let mut seen = Vec::new();
        set.visit(&mut |name, help, value| seen.push((name, help, value)));
        let took = Value::Latency { min: 5, max: 7, sum: 12, count: 2 };
        let expected =
            [("things", "Things.", Value::Count(2)), ("took", "How long things took.", took)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_batch_is_as_good_as_its_parts() {
        let (one, many, mut batch) = (Latency::default(), Latency::default(), Batch::default());
        for start in [40, 10, 70] {
            one.note(Duration::from_nanos(100 - start));
            batch.add(start);
        }
        batch.end(100, &many);
        assert_eq!(one.value(), many.value());
        batch.end(100, &many);
        assert_eq!(one.value(), many.value());
    }
}
