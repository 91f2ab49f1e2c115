//! `hull doctor`: can this host run machines, and if not, what mends it?

use std::ffi::CString;
use std::fmt::Write;
use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;
use vmm::devices::virtio::net::tap::{Tap, TapError};
use vmm::hypervisor::Hypervisor;
use vmm::hypervisor::kvm::{DEVICE, Kvm};

use crate::cli::{DoctorArgs, Result};
use crate::exit::Code;
use crate::host::{self, KvmKind};
use crate::runtime;
use crate::streams;

const TUN: &str = "/dev/net/tun";

/// Makes an interface for a user, as root.
const MAKE_TAP: &str = "ip tuntap add NAME mode tap user $USER";

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Ok,
    /// Machines run, but something is slower or missing.
    Warn,
    /// Machines do not run, or not as one would think.
    Fail,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What a person can do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), mend: None }
    }

    fn bad(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        mend: impl Into<String>,
    ) -> Check {
        Check { name, verdict, found: found.into(), mend: Some(mend.into()) }
    }
}

/// Checks the host. Fails if machines cannot run here.
pub fn doctor(args: &DoctorArgs) -> Result {
    let kind = KvmKind::detect();
    let checks = [
        processor(kind),
        device(),
        kvm_kind(kind),
        capabilities(),
        tap(),
        io_uring(),
        descriptors(),
        memory(),
        runtime_directory(),
    ];
    let text =
        if args.json { serde_json::to_string_pretty(&checks)? + "\n" } else { table(&checks) };
    streams::print(&text)?;
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Ok(if failed { Code::FAILURE } else { Code::SUCCESS })
}

fn table(checks: &[Check]) -> String {
    let mut text = String::new();
    let colour = io::stdout().is_terminal();
    for check in checks {
        let (mark, code) = match check.verdict {
            Verdict::Ok => ("ok  ", "32"),
            Verdict::Warn => ("warn", "33"),
            Verdict::Fail => ("FAIL", "31"),
        };
        let mark = if colour { format!("\x1b[{code}m{mark}\x1b[0m") } else { mark.to_owned() };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{mark}  {:<17} {}", check.name, check.found);
        if let Some(mend) = &check.mend {
            let _ = writeln!(text, "{:24}-> {mend}", "");
        }
    }
    text
}

/// Flags of the first processor in `/proc/cpuinfo`.
fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
        .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect())
        .unwrap_or_default()
}

fn processor(kind: KvmKind) -> Check {
    let flags = cpu_flags();
    let has = |flag: &str| flags.iter().any(|found| found == flag);
    let guest = has("hypervisor");
    let nested = if guest { ", inside a virtual machine" } else { "" };
    match (has("vmx"), has("svm")) {
        (true, _) => Check::ok("processor", format!("VT-x (vmx){nested}")),
        (_, true) => Check::ok("processor", format!("AMD-V (svm){nested}")),
        _ if guest => Check::bad(
            "processor",
            if kind == KvmKind::Pvm { Verdict::Warn } else { Verdict::Fail },
            "no hardware virtualisation in this virtual machine",
            "switch nested virtualisation on in its host, or use a bare-metal machine",
        ),
        _ => Check::bad(
            "processor",
            Verdict::Fail,
            "no hardware virtualisation",
            "switch VT-x or SVM on in the firmware set-up",
        ),
    }
}

fn device() -> Check {
    let name = "/dev/kvm";
    match fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Check::ok(name, "can be opened"),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Check::bad(
            name,
            Verdict::Fail,
            "is missing",
            "`modprobe kvm_intel` or `modprobe kvm_amd`; in a container, pass the device in",
        ),
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => Check::bad(
            name,
            Verdict::Fail,
            "may not be opened by this user",
            host::how_to_be_let_in(),
        ),
        Err(err) => Check::bad(name, Verdict::Fail, err.to_string(), "look into the kernel log"),
    }
}

fn kvm_kind(kind: KvmKind) -> Check {
    let name = "KVM";
    match kind {
        KvmKind::Vmx | KvmKind::Svm => Check::ok(name, kind.to_string()),
        KvmKind::Pvm => Check::bad(
            name,
            Verdict::Fail,
            "PVM: guest kernel code is interpreted, stock kernels do not boot",
            "use a host with hardware virtualisation, or boot kernels built with \
             CONFIG_PVM_GUEST; in Hull's tree, `make lab` emulates such a host",
        ),
        KvmKind::None => Check::bad(
            name,
            Verdict::Warn,
            "no KVM module is loaded (it may be built in)",
            "`modprobe kvm_intel` or `modprobe kvm_amd`",
        ),
    }
}

fn capabilities() -> Check {
    let name = "KVM capabilities";
    let look = || {
        let kvm = Kvm::open(Path::new(DEVICE))?;
        let capabilities = kvm.capabilities()?;
        kvm.create_vm()?;
        Ok::<_, vmm::hypervisor::HypervisorError>(capabilities)
    };
    match look() {
        Ok(capabilities) => Check::ok(
            name,
            format!("a machine can be made, with up to {} vCPUs", capabilities.max_vcpus),
        ),
        Err(err) => {
            let source = std::error::Error::source(&err).map(ToString::to_string);
            let found = format!("{err}: {}", source.unwrap_or_default());
            Check::bad(name, Verdict::Fail, found, "mend what stands above, or use a newer kernel")
        }
    }
}

fn tap() -> Check {
    judge_tap(Tap::create("hulldoctor%d", 1).map(drop))
}

fn judge_tap(made: std::result::Result<(), TapError>) -> Check {
    let name = "network (TAP)";
    match made {
        Ok(()) => Check::ok(name, "interfaces can be made"),
        Err(TapError::Permission { .. }) => Check::bad(
            name,
            Verdict::Warn,
            "this user may not make TAP interfaces",
            format!("run as root, or make one beforehand: `{MAKE_TAP}`"),
        ),
        Err(TapError::Tun(err)) if err.kind() == io::ErrorKind::PermissionDenied => Check::bad(
            name,
            Verdict::Warn,
            format!("{TUN} may not be opened by this user"),
            format!(
                "run as root; or `chmod 0666 {TUN}` as root, as most hosts have it, and make an \
                 interface beforehand: `{MAKE_TAP}`"
            ),
        ),
        Err(TapError::Tun(err)) => Check::bad(
            name,
            Verdict::Warn,
            format!("{TUN} cannot be opened: {err}"),
            "`modprobe tun`; in a container, pass the device in",
        ),
        Err(err) => Check::bad(name, Verdict::Warn, err.to_string(), "machines run without --net"),
    }
}

fn io_uring() -> Check {
    let name = "io_uring";
    if vmm::io::has_io_uring() {
        return Check::ok(name, "available");
    }
    let setting = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let mend = match setting.trim() {
        "1" | "2" => "`sysctl kernel.io_uring_disabled=0`; until then a thread pool does the work",
        _ => "a kernel from 5.10 on; until then a thread pool does the work",
    };
    Check::bad(name, Verdict::Warn, "refused by this host", mend)
}

fn limit(resource: libc::__rlimit_resource_t) -> u64 {
    // SAFETY: rlimit is plain data that the call fills in.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        match libc::getrlimit(resource, &mut limit) {
            0 => limit.rlim_cur,
            _ => 0,
        }
    }
}

/// Descriptors that the largest machine uses, with room to spare.
const DESCRIPTORS: u64 = 512;

fn descriptors() -> Check {
    let name = "limits";
    let (files, space) = (limit(libc::RLIMIT_NOFILE), limit(libc::RLIMIT_AS));
    if files < DESCRIPTORS {
        let found = format!("{files} open files");
        return Check::bad(name, Verdict::Warn, found, format!("`ulimit -n {DESCRIPTORS}`"));
    }
    if space != libc::RLIM_INFINITY {
        let found = format!("{} MiB of address space", space >> 20);
        return Check::bad(name, Verdict::Warn, found, "`ulimit -v unlimited`");
    }
    Check::ok(name, format!("{files} open files, no limit on address space"))
}

fn memory() -> Check {
    let name = "memory";
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| -> u64 {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let (free, huge) = (kib("MemAvailable:") >> 10, kib("HugePages_Free:"));
    let thp = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let thp = thp.split(['[', ']']).nth(1).unwrap_or("unknown");
    let found =
        format!("{free} MiB available, {huge} huge pages free, transparent huge pages: {thp}");
    if free < 256 {
        return Check::bad(name, Verdict::Warn, found, "end something, or use small guests");
    }
    Check::ok(name, found)
}

fn runtime_directory() -> Check {
    judge_directory(&runtime::directory())
}

/// Looks only: the first machine makes the directory, with the mode that it is to have.
fn judge_directory(path: &Path) -> Check {
    let name = "runtime directory";
    // What of it is there already.
    let there = path.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(path);
    match may_write(there) {
        Ok(()) if there == path => Check::ok(name, path.display().to_string()),
        Ok(()) => Check::ok(name, format!("{} (the first machine makes it)", path.display())),
        Err(err) => Check::bad(
            name,
            Verdict::Warn,
            format!("{}: {err}", there.display()),
            "set XDG_RUNTIME_DIR to a directory that this user may write; without one, machines \
             have no names, and `hull ps` and `hull stop` do not see them",
        ),
    }
}

/// Whether files can be made in the directory `path`.
fn may_write(path: &Path) -> io::Result<()> {
    if !fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mode = libc::W_OK | libc::X_OK;
    // SAFETY: the path ends in NUL.
    match unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tun_device_is_missing_or_not_for_this_user() {
        let mend = |kind: io::ErrorKind| judge_tap(Err(TapError::Tun(kind.into()))).mend.unwrap();
        assert!(mend(io::ErrorKind::NotFound).contains("modprobe"));
        let mend = mend(io::ErrorKind::PermissionDenied);
        assert!(mend.contains("chmod") && !mend.contains("modprobe"), "{mend}");
    }

    #[test]
    fn a_directory_is_looked_at_and_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hull");
        assert_eq!(judge_directory(&path).verdict, Verdict::Ok);
        assert!(!path.exists());
        fs::write(&path, "").unwrap();
        let check = judge_directory(&path);
        assert_eq!(check.verdict, Verdict::Warn, "{}", check.found);
    }
}
