//! What happens to a machine, for those who want to be told.
//!
//! ```text
//!   session, control thread, vCPUs ── note ──> Journal ── Reader ──> GET /events
//! ```
//!
//! Whoever notes something waits for nobody. A reader gets what is still remembered, then what comes;
//! one that is slow misses some, which it sees by their numbers.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

/// Entries that are remembered.
const REMEMBERED: usize = 256;

/// A device that fails again within this time is not heard: its guest may make it fail at will.
const QUIET: Duration = Duration::from_secs(1);

/// How long the end waits for readers to be told of it, and for what they have to say to be on its way.
const LAST_WORDS: Duration = Duration::from_millis(250);
const ON_ITS_WAY: Duration = Duration::from_millis(3);

/// Why a machine stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The guest switched it off.
    PowerOff,
    /// The guest reset it.
    Reset,
    /// The guest crashed: its CPU gave up (triple fault).
    Crash,
    /// Somebody ended it from outside.
    Quit,
    /// A signal ended it.
    Signal,
    /// It could not go on.
    Error,
}

impl Reason {
    /// Its name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Reason::PowerOff => "power-off",
            Reason::Reset => "reset",
            Reason::Crash => "crash",
            Reason::Quit => "quit",
            Reason::Signal => "signal",
            Reason::Error => "error",
        }
    }
}

/// What can happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happening {
    /// There is a monitor with a name, which can be told what machine it is to be.
    Created,
    /// The vCPUs run for the first time.
    Started,
    /// The guest says that it is up.
    Ready,
    /// Somebody halted it.
    Paused,
    /// It goes on.
    Resumed,
    /// It is being saved.
    Saving {
        /// Bytes of memory that are written.
        done: u64,
        /// Bytes of memory that are to be written.
        total: u64,
    },
    /// It was saved.
    Saved {
        /// The state file.
        state: PathBuf,
    },
    /// The guest's kernel says that it panicked.
    Panicked,
    /// A device does not work any more, at least until its driver resets it.
    DeviceError {
        /// Its name.
        device: String,
        /// What is wrong.
        message: String,
        /// Errors of this device before this one that were not noted.
        unheard: u64,
    },
    /// It runs no more.
    Stopped {
        /// Why.
        reason: Reason,
        /// More about that, for people.
        message: Option<String>,
        /// The same machine starts again.
        again: bool,
    },
}

impl Happening {
    /// Its name for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Happening::Created => "created",
            Happening::Started => "started",
            Happening::Ready => "ready",
            Happening::Paused => "paused",
            Happening::Resumed => "resumed",
            Happening::Saving { .. } => "saving",
            Happening::Saved { .. } => "saved",
            Happening::Panicked => "panicked",
            Happening::DeviceError { .. } => "device-error",
            Happening::Stopped { .. } => "stopped",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Counts from 1.
    pub sequence: u64,
    /// When.
    pub time: SystemTime,
    /// What.
    pub what: Happening,
}

#[derive(Default)]
struct Inner {
    entries: VecDeque<Arc<Entry>>,
    /// Number of the last entry.
    last: u64,
    /// Nothing will come any more.
    over: bool,
    /// Those who read, and how they want to be woken.
    readers: HashMap<u64, Option<Waker>>,
    next_reader: u64,
    /// When each device was heard last, and how often it was not since.
    failures: HashMap<String, (Instant, u64)>,
}

/// What happened to a machine so far.
#[derive(Default)]
pub struct Journal {
    inner: Mutex<Inner>,
    left: Condvar,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").finish_non_exhaustive()
    }
}

impl Journal {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that something happened now.
    pub fn note(&self, what: Happening) {
        let mut inner = self.lock();
        inner.last += 1;
        let entry = Entry { sequence: inner.last, time: SystemTime::now(), what };
        if inner.entries.len() == REMEMBERED {
            inner.entries.pop_front();
        }
        inner.over = matches!(entry.what, Happening::Stopped { again: false, .. });
        inner.entries.push_back(Arc::new(entry));
        for waker in inner.readers.values_mut().filter_map(Option::take) {
            waker.wake();
        }
    }

    /// Notes that a device failed, unless it did so a moment ago.
    pub fn device_failed(&self, device: &str, message: String) {
        let now = Instant::now();
        let unheard = {
            let mut inner = self.lock();
            match inner.failures.get_mut(device) {
                Some((heard, unheard)) if now.saturating_duration_since(*heard) < QUIET => {
                    *unheard += 1;
                    return;
                }
                Some((heard, unheard)) => {
                    *heard = now;
                    std::mem::take(unheard)
                }
                None => {
                    inner.failures.insert(device.to_owned(), (now, 0));
                    0
                }
            }
        };
        self.note(Happening::DeviceError { device: device.to_owned(), message, unheard });
    }

    /// Starts to read behind entry `after`, or as far back as is remembered.
    pub fn read(self: &Arc<Journal>, after: u64) -> Reader {
        let mut inner = self.lock();
        let id = inner.next_reader;
        inner.next_reader += 1;
        inner.readers.insert(id, None);
        drop(inner);
        Reader { journal: Arc::clone(self), id, after }
    }

    /// Gives readers a moment to pass on the last entry, if there are readers.
    pub fn finish(&self) {
        let inner = self.lock();
        if inner.readers.is_empty() {
            return;
        }
        let some_left = |inner: &mut Inner| !inner.readers.is_empty();
        let waited = self.left.wait_timeout_while(inner, LAST_WORDS, some_left);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // They have it, and are about to hand it to the kernel.
        drop(self.left.wait_timeout(inner, ON_ITS_WAY));
    }
}

/// Somebody who reads.
#[derive(Debug)]
pub struct Reader {
    journal: Arc<Journal>,
    id: u64,
    after: u64,
}

impl Reader {
    /// The next entry; `None` behind the last one of all. Who gets neither is woken when there is one.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Arc<Entry>>> {
        let mut inner = self.journal.lock();
        // In order, without gaps.
        let first = inner.entries.front().map_or(0, |entry| entry.sequence);
        let place = self.after.saturating_add(1).saturating_sub(first);
        let next = usize::try_from(place).ok().and_then(|place| inner.entries.get(place));
        if let Some(entry) = next {
            self.after = entry.sequence;
            return Poll::Ready(Some(Arc::clone(entry)));
        }
        if inner.over {
            return Poll::Ready(None);
        }
        inner.readers.insert(self.id, Some(context.waker().clone()));
        Poll::Pending
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.journal.lock().readers.remove(&self.id);
        self.journal.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(reader: &mut Reader) -> Poll<Option<&'static str>> {
        let mut context = Context::from_waker(Waker::noop());
        reader.poll_next(&mut context).map(|entry| entry.map(|entry| entry.what.name()))
    }

    fn stopped(again: bool) -> Happening {
        Happening::Stopped { reason: Reason::Reset, message: None, again }
    }

    #[test]
    fn a_reader_gets_what_was_what_comes_and_the_end() {
        let journal = Arc::new(Journal::default());
        journal.note(Happening::Created);
        let (mut all, mut rest) = (journal.read(0), journal.read(1));
        journal.note(Happening::Started);
        assert_eq!(next(&mut all), Poll::Ready(Some("created")));
        for reader in [&mut all, &mut rest] {
            assert_eq!(next(reader), Poll::Ready(Some("started")));
            assert_eq!(next(reader), Poll::Pending);
        }
        journal.note(stopped(true));
        journal.note(stopped(false));
        assert_eq!(next(&mut all), Poll::Ready(Some("stopped")));
        assert_eq!(next(&mut all), Poll::Ready(Some("stopped")));
        assert_eq!(next(&mut all), Poll::Ready(None));
    }

    #[test]
    fn a_slow_reader_goes_on_with_what_is_remembered() {
        let journal = Arc::new(Journal::default());
        let mut reader = journal.read(0);
        for _ in 0..REMEMBERED + 5 {
            journal.note(Happening::Paused);
        }
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(Some(entry)) = reader.poll_next(&mut context) else { panic!("nothing") };
        assert_eq!(entry.sequence, 6);
        // From a number that is not there yet, or never will be.
        for after in [u64::MAX - 1, u64::MAX] {
            assert_eq!(next(&mut journal.read(after)), Poll::Pending);
        }
    }

    #[test]
    fn a_device_that_fails_at_will_is_not_heard_each_time() {
        let journal = Arc::new(Journal::default());
        for _ in 0..1000 {
            journal.device_failed("disk0", "broken".into());
        }
        journal.device_failed("net0", "broken".into());
        assert_eq!(journal.lock().last, 2);
    }

    #[test]
    fn the_end_waits_for_readers_and_not_for_ever() {
        let journal = Arc::new(Journal::default());
        journal.note(stopped(false));
        journal.finish();
        let reader = journal.read(0);
        let start = Instant::now();
        journal.finish();
        assert!(start.elapsed() >= LAST_WORDS);
        std::thread::scope(|scope| {
            scope.spawn(|| drop(reader));
            journal.finish();
        });
    }
}
