//! Processor time of a process and its threads at any moment, exactly.
//!
//! What the kernel shows of other processes (`/proc/PID/stat`, their CPU clocks) is brought up to date
//! at ticks and when they sleep, milliseconds late. A perf event is read where its task runs.

use crate::Result;
use std::fs::File;
use std::io::{Error, Read};
use std::os::fd::FromRawFd;
use std::time::Duration;

/// `struct perf_event_attr` in its first version, linux/perf_event.h.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

const SOFTWARE: u32 = 1;
const TASK_CLOCK: u64 = 1;
const DISABLED: u64 = 1 << 0;
const INHERIT: u64 = 1 << 1;
const ENABLE_ON_EXEC: u64 = 1 << 12;

/// User and system time, from exec on, of what this thread starts while the counter is open.
pub struct Counter(File);

impl Counter {
    /// Opens a counter for the next process that this thread starts.
    pub fn open() -> Result<Counter> {
        let attributes = Attributes {
            kind: SOFTWARE,
            size: size_of::<Attributes>() as u32,
            config: TASK_CLOCK,
            flags: DISABLED | INHERIT | ENABLE_ON_EXEC,
            ..Attributes::default()
        };
        // Of this thread, on whatever CPU, in no group, closed at exec.
        let (thread, cpu, group, flags) = (0, -1, -1, 8);
        // SAFETY: the structure outlives the call, and its size is in it.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                thread,
                cpu,
                group,
                flags,
            )
        };
        if fd < 0 {
            return Err(format!("perf_event_open: {}", Error::last_os_error()).into());
        }
        // SAFETY: a new descriptor, which is nobody else's.
        Ok(Counter(unsafe { File::from_raw_fd(fd as libc::c_int) }))
    }

    /// The time so far.
    pub fn read(&mut self) -> Result<Duration> {
        let mut value = [0; 8];
        self.0.read_exact(&mut value)?;
        Ok(Duration::from_nanos(u64::from_ne_bytes(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn counts_what_is_started_and_nothing_else() {
        let mut counter = Counter::open().unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        assert_eq!(counter.read().unwrap(), Duration::ZERO);
        Command::new("sh")
            .args(["-c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); done"])
            .status()
            .unwrap();
        let seen = counter.read().unwrap();
        assert!(seen > Duration::from_micros(100) && seen < Duration::from_secs(5), "{seen:?}");
    }
}
