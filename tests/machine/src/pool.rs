//! The host's pool of huge pages.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::LazyLock;

/// How many pages the pool has.
const SIZE: &str = "/proc/sys/vm/nr_hugepages";

/// Pages of 2 MiB that are free, for one test at a time on this machine. When it is dropped the pool is as
/// it was.
#[derive(Debug)]
pub struct HugePages {
    before: u64,
    /// Whoever has the next turn takes the size of the pool for what it always was.
    _turn: Option<File>,
}

/// What the kernel counts.
fn number(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

/// Pages that nobody has and nobody was promised.
fn available() -> u64 {
    number("HugePages_Free:").saturating_sub(number("HugePages_Rsvd:"))
}

fn size() -> u64 {
    fs::read_to_string(SIZE).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

impl HugePages {
    /// Has the pool enlarged until so many pages are free.
    pub fn new(wanted: u64) -> HugePages {
        let turn = File::create(std::env::temp_dir().join("hull-huge-pages.lock")).ok();
        if let Some(file) = &turn {
            // SAFETY: takes a descriptor that is open. Another user's lock cannot be had, nor is it needed.
            unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
        }
        let this = HugePages { before: size(), _turn: turn };
        let missing = wanted.saturating_sub(available());
        let set = fs::write(SIZE, (this.before + missing).to_string());
        let free = available();
        assert!(
            free >= wanted,
            "the host gives {free} huge pages; the test needs {wanted} and the right to set {SIZE} ({set:?})"
        );
        this
    }

    /// The same for guests: what they are made of is built before others have to wait for their turn.
    pub fn for_guests(wanted: u64) -> HugePages {
        LazyLock::force(&crate::HULL);
        LazyLock::force(&crate::PAYLOAD);
        HugePages::new(wanted)
    }

    /// Pages that nobody has.
    pub fn free() -> u64 {
        number("HugePages_Free:")
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // It could be set before. What is still in use goes when it is not any more.
        let _ = fs::write(SIZE, self.before.to_string());
    }
}
