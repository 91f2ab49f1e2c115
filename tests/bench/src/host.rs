//! What the numbers were taken on: without it they mean nothing.

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
    /// First line of each program's --version.
    pub versions: Vec<String>,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
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
        versions,
    }
}
