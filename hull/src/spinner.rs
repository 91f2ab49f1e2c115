//! A line on a person's terminal that says what is waited for, and that it still is.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crate::streams;

/// Most characters of the text: a line that wraps could not be taken back.
const LONGEST: usize = 70;

const FRAMES: [char; 4] = ['|', '/', '-', '\\'];

/// The line; taken back when dropped.
#[derive(Debug)]
pub struct Spinner {
    turns: usize,
}

impl Spinner {
    /// A line that is not shown yet; none if there is no person.
    pub fn new() -> Option<Spinner> {
        std::io::stderr().is_terminal().then_some(Spinner { turns: 0 })
    }

    /// Shows `text`, behind a mark that turns a little with each call.
    pub fn turn(&mut self, text: &str) {
        let mut clean = String::with_capacity(text.len());
        streams::push_printable(&mut clean, text, false);
        let text: String = clean.chars().take(LONGEST).collect();
        streams::say(&format!("\r\x1b[K{} {text}", FRAMES[self.turns % FRAMES.len()]));
        self.turns += 1;
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        if self.turns > 0 {
            streams::say("\r\x1b[K");
        }
    }
}

/// Does `work` and shows a person how far it is: it tells how many bytes are done, and of how many.
pub fn watched<T: Send>(verb: &str, work: impl FnOnce(&(dyn Fn(u64, u64) + Sync)) -> T) -> T {
    let (done, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |now: u64, all: u64| {
        done.fetch_max(now, Ordering::Relaxed);
        total.store(all, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        // It ends when nobody can send any more.
        let (over, ended) = mpsc::channel::<()>();
        if let Some(mut spinner) = Spinner::new() {
            let (done, total) = (&done, &total);
            scope.spawn(move || {
                let turn = Duration::from_millis(100);
                while ended.recv_timeout(turn) == Err(mpsc::RecvTimeoutError::Timeout) {
                    let (done, total) =
                        (done.load(Ordering::Relaxed), total.load(Ordering::Relaxed));
                    let percent = done * 100 / total.max(1);
                    spinner.turn(&format!("{verb}: {percent} % of {} MiB", total >> 20));
                }
            });
        }
        let outcome = work(&progress);
        drop(over);
        outcome
    })
}
