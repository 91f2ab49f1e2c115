//! What kind of KVM this host has.

use std::fmt;
use std::path::Path;
use std::sync::OnceLock;

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
