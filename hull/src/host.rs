//! What kind of KVM this host has, and who may use it.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use vmm::hypervisor::kvm::DEVICE;

/// What stands behind `/dev/kvm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// PVM: no hardware support; guest kernel code is interpreted.
    Pvm,
    /// No KVM module is loaded, or one that is not known.
    None,
}

impl KvmKind {
    /// What the loaded modules say. Looked up once, by the time a machine is made: later the thread
    /// that reports an error may not look at files any more.
    pub fn detect() -> KvmKind {
        static KIND: OnceLock<KvmKind> = OnceLock::new();
        *KIND.get_or_init(KvmKind::look_up)
    }

    fn look_up() -> KvmKind {
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        if loaded("kvm_pvm") {
            KvmKind::Pvm
        } else if loaded("kvm_intel") {
            KvmKind::Vmx
        } else if loaded("kvm_amd") {
            KvmKind::Svm
        } else {
            KvmKind::None
        }
    }
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvmKind::Vmx => "Intel VT-x (vmx)",
            KvmKind::Svm => "AMD-V (svm)",
            KvmKind::Pvm => "PVM, without hardware support",
            KvmKind::None => "none",
        })
    }
}

/// How a user who may not open KVM's device gets to do so.
pub fn how_to_be_let_in() -> String {
    // SAFETY: geteuid has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        return format!("root is refused too: let this container or service have {DEVICE}");
    }
    match group() {
        Some(group) => format!(
            "join the group that may use KVM (`usermod -aG {group} $USER`, then log in again) or \
             run as root"
        ),
        None => format!(
            "{DEVICE} is root's alone: run as root, or have root give it to a group (`chgrp kvm \
             {DEVICE} && chmod 660 {DEVICE}`) and join that"
        ),
    }
}

/// The group whose members may open KVM's device, unless that is root's.
fn group() -> Option<String> {
    const READ_AND_WRITE: u32 = 0o060;
    let device = fs::metadata(DEVICE).ok()?;
    if device.mode() & READ_AND_WRITE != READ_AND_WRITE || device.gid() == 0 {
        return None;
    }
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    Some(name_of(&groups, device.gid()).unwrap_or_else(|| device.gid().to_string()))
}

/// The name that a group file has for a number.
fn name_of(groups: &str, number: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(number)).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_names() {
        let groups = "root:x:0:\nbroken\nkvm:x:104:ann,bob\n";
        assert_eq!(name_of(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(name_of(groups, 105), None);
    }
}
