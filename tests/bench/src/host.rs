//! What the numbers were taken on: without it they mean nothing.

use crate::Result;
use crate::system::{Programs, System};
use serde::{Deserialize, Serialize};
use std::process::Command;

/// The machine, as far as it bears on the numbers.
#[derive(Serialize, Deserialize, Debug, Clone)]
pub struct Host {
    pub kernel: String,
    pub processor: String,
    pub processors: usize,
    /// `vmx`, `svm`, `pvm` or `unknown`.
    pub kvm: String,
    /// /sys/kernel/mm/transparent_hugepage/enabled
    pub transparent_hugepages: String,
    /// Load average of the last minute, before the run: what it takes, the runs do not get.
    pub load: f64,
    /// Share of the processors' time that the machine below took away during the run (steal).
    #[serde(default)]
    pub stolen: f64,
    /// First line of each program's --version.
    pub versions: Vec<String>,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Share of stolen time above which a sample is taken again: a vCPU, an io thread and a bench that
/// wait for each other measure the neighbours then.
const DISTURBED: f64 = 0.02;
/// How often a sample is taken at most.
const ATTEMPTS: u32 = 4;

/// Processor time of all processors since boot, and the part of it that the machine below gave to
/// others: the eight times of the first line of /proc/stat.
#[derive(Clone, Copy)]
pub struct Clock {
    all: u64,
    stolen: u64,
}

impl Clock {
    /// Reads the clock.
    pub fn now() -> Clock {
        let line = read("/proc/stat").lines().next().unwrap_or_default().to_owned();
        let times: Vec<u64> =
            line.split_whitespace().skip(1).take(8).filter_map(|time| time.parse().ok()).collect();
        Clock { all: times.iter().sum(), stolen: times.get(7).copied().unwrap_or_default() }
    }

    /// Share of the time since this reading that was stolen.
    pub fn stolen(self) -> f64 {
        let now = Clock::now();
        (now.stolen - self.stolen) as f64 / (now.all - self.all).max(1) as f64
    }
}

/// Takes a sample, again if too much time was stolen from it; of several, the one that lost least.
///
/// # Errors
/// Those of `sample`.
pub fn undisturbed<T>(mut sample: impl FnMut() -> Result<T>) -> Result<T> {
    let mut best: Option<(f64, T)> = None;
    for _ in 0..ATTEMPTS {
        let start = Clock::now();
        let value = sample()?;
        let stolen = start.stolen();
        if best.as_ref().is_none_or(|(least, _)| stolen < *least) {
            best = Some((stolen, value));
        }
        if stolen <= DISTURBED {
            break;
        }
    }
    best.map(|(_, value)| value).ok_or_else(|| "no sample".into())
}

/// Has everything written to the disk that waits for it: pages of a new file count as dirty until
/// then, and writing them disturbs what is measured.
pub fn sync() {
    // SAFETY: takes nothing and returns nothing.
    unsafe { libc::sync() };
}

/// Describes this host.
pub fn describe(programs: &Programs) -> Host {
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
            .unwrap_or_default()
    };
    let flags = field("flags");
    let kvm = if std::path::Path::new("/sys/module/kvm_pvm").exists() {
        "pvm"
    } else if flags.split(' ').any(|flag| flag == "vmx") {
        "vmx"
    } else if flags.split(' ').any(|flag| flag == "svm") {
        "svm"
    } else {
        "unknown"
    };
    let versions = [System::Hull, System::Firecracker, System::Qemu]
        .into_iter()
        .filter(|system| programs.missing(*system).is_none())
        .filter_map(|system| Command::new(programs.program(system)).arg("--version").output().ok())
        .filter_map(|output| {
            String::from_utf8_lossy(&output.stdout).lines().next().map(str::to_owned)
        })
        .collect();
    Host {
        kernel: read("/proc/sys/kernel/osrelease"),
        processor: field("model name"),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        kvm: kvm.to_owned(),
        transparent_hugepages: read("/sys/kernel/mm/transparent_hugepage/enabled"),
        load: read("/proc/loadavg")
            .split(' ')
            .next()
            .and_then(|load| load.parse().ok())
            .unwrap_or_default(),
        stolen: 0.0,
        versions,
    }
}
