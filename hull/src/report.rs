//! Errors as a person reads them: the chain once, numbered, and a hint where there is a cure.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, ErrorKind};

use arch::boot::BootError;
use arch::boot::placement::PlacementError;
use vmm::config::ConfigError;
use vmm::devices::virtio::blk::DiskError;
use vmm::devices::virtio::blk::OpenError;
use vmm::devices::virtio::blk::overlay::OverlayError;
use vmm::devices::virtio::blk::qcow2::Qcow2Error;
use vmm::devices::virtio::net::tap::TapError;
use vmm::hypervisor::HypervisorError;
use vmm::kernel::LoadError;
use vmm::machine::{BuildError, RunError};
use vmm::memory::MemoryError;

use crate::cli::UsageError;
use crate::client::ClientError;
use crate::exit::Code;
use crate::runtime::RuntimeError;
use crate::streams::{self, printable};

/// Prints `err`, its causes and a hint to standard error.
pub fn print(err: &(dyn Error + Send + Sync + 'static)) {
    let mut text = format!("hull: {}\n", printable(&err));
    let causes = std::iter::successors(err.source(), |&err| err.source());
    // Writing to a String cannot fail.
    for (number, cause) in (1..).zip(causes) {
        let _ = writeln!(text, "  {number}: {}", printable(&cause));
    }
    if let Some(hint) = hint(err) {
        let _ = writeln!(text, "hint: {}", printable(&hint));
    }
    streams::say(&text);
}

/// `err` and its causes in one line.
pub fn line(err: &(dyn Error + Send + Sync + 'static)) -> String {
    let mut text = err.to_string();
    for cause in std::iter::successors(err.source(), |&err| err.source()) {
        // Writing to a String cannot fail.
        let _ = write!(text, ": {cause}");
    }
    if let Some(hint) = hint(err) {
        let _ = write!(text, " ({hint})");
    }
    text
}

/// The exit code that says what kind of error it was.
pub fn exit_code(err: &(dyn Error + Send + Sync + 'static)) -> Code {
    let usage = err.is::<UsageError>()
        || err.is::<ConfigError>()
        || matches!(err.downcast_ref(), Some(BuildError::Config(_)))
        || is_command_line(err);
    if usage { Code::USAGE } else { Code::FAILURE }
}

/// True if the kernel cannot be given the command line that was asked for.
fn is_command_line(err: &(dyn Error + Send + Sync + 'static)) -> bool {
    use BootError::{CmdlineNul, CmdlineTooLong};
    matches!(find::<BootError>(err), Some(CmdlineTooLong { .. } | CmdlineNul { .. }))
}

/// The error of type `T` in the chain of `err`.
fn find<'a, T: Error + 'static>(err: &'a (dyn Error + 'static)) -> Option<&'a T> {
    std::iter::successors(Some(err), |&err| err.source()).find_map(|err| err.downcast_ref())
}

/// True if the process may not open as many files as the machine needs.
fn out_of_descriptors(err: &(dyn Error + 'static)) -> bool {
    let is = |err: &(dyn Error + 'static)| {
        let io = err.downcast_ref::<io::Error>();
        io.and_then(io::Error::raw_os_error) == Some(libc::EMFILE)
    };
    std::iter::successors(Some(err), |&err| err.source()).any(is)
}

/// What a person can do about `err`.
fn hint(err: &(dyn Error + Send + Sync + 'static)) -> Option<String> {
    // `BuildError::Load` shows itself as the error inside, which is then not in the chain.
    if let Some(BuildError::Load(load)) = find::<BuildError>(err)
        && let Some(hint) = load_hint(load)
    {
        return Some(hint);
    }
    if out_of_descriptors(err) {
        return Some("allow more open files: `ulimit -n 1024`".into());
    }
    if let Some(BootError::CmdlineTooLong { .. }) = find::<BootError>(err) {
        return Some(
            "shorten --cmdline; --replace-cmdline leaves out the default arguments".into(),
        );
    }
    if let Some(hint) = find::<RuntimeError>(err).and_then(RuntimeError::hint) {
        return Some(hint);
    }
    if let Some(hint) = find::<ClientError>(err).and_then(ClientError::hint) {
        return Some(hint);
    }
    if let Some(disk) = find::<OpenError>(err)
        && let Some(hint) = disk_hint(disk)
    {
        return Some(hint);
    }
    if let Some(hint) = find::<OverlayError>(err).and_then(overlay_hint) {
        return Some(hint);
    }
    if let Some(hint) = find::<Qcow2Error>(err).and_then(qcow2_hint) {
        return Some(hint);
    }
    if let Some(DiskError::Ambiguous(_)) = find::<DiskError>(err) {
        return Some(
            "the format is not guessed: a guest can make its raw disk begin like an image".into(),
        );
    }
    if let Some(tap) = find::<TapError>(err)
        && let Some(hint) = tap_hint(tap)
    {
        return Some(hint);
    }
    if let Some(call) = find::<HypervisorError>(err) {
        let hint = match (call.call, call.source.kind()) {
            ("open", ErrorKind::NotFound) => {
                "load KVM with `modprobe kvm_intel` or `modprobe kvm_amd`; in a virtual machine, \
                 its host must allow nested virtualisation; `hull doctor` looks further"
            }
            ("open", ErrorKind::PermissionDenied) => return Some(crate::host::how_to_be_let_in()),
            ("KVM_CREATE_VM", _) => "`hull doctor` checks this host's KVM",
            _ => return None,
        };
        return Some(hint.to_owned());
    }
    if let Some(RunError::Vcpu { .. }) = find::<RunError>(err)
        && crate::host::KvmKind::detect() == crate::host::KvmKind::Pvm
    {
        return Some(
            "KVM on this host has no hardware behind it (PVM) and interprets kernel code; \
             `hull doctor` says more"
                .to_owned(),
        );
    }
    if let Some(MemoryError::Map { huge, .. }) = find::<MemoryError>(err)
        && !huge.is_empty()
    {
        return Some("fill the host's pool: `sysctl vm.nr_hugepages=N`, N pages of 2 MiB".into());
    }
    if let Some(io) = find::<io::Error>(err)
        && io.raw_os_error() == Some(libc::ENOMEM)
    {
        return Some("use less --memory, or look at `ulimit -v` and overcommit settings".into());
    }
    None
}

fn disk_hint(err: &OpenError) -> Option<String> {
    let hint = match err {
        OpenError::Open { source, .. } if source.kind() == ErrorKind::NotFound => {
            "make one: `truncate -s 1G FILE`, then `mkfs.ext4 FILE`"
        }
        OpenError::Open { source, access: "reading and writing", .. }
            if matches!(
                source.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            "add ,ro to the disk if the guest only reads it"
        }
        OpenError::Locked { .. } => {
            "`hull ps` lists the machines; a shared disk must be ,ro in all"
        }
        OpenError::Size { .. } => {
            "a raw disk has whole blocks; format=qcow2 says that it is a qcow2 image, \
             `qemu-img convert -O raw` converts others"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

fn qcow2_hint(err: &Qcow2Error) -> Option<String> {
    match err {
        Qcow2Error::Backing { .. } => Some(
            "if the image is trusted, add ,backing to the disk: what it names is opened then"
                .into(),
        ),
        _ => None,
    }
}

fn overlay_hint(err: &OverlayError) -> Option<String> {
    let hint = match err {
        OverlayError::Open(err) => return disk_hint(err),
        OverlayError::Ambiguous(_) => {
            "`hull disk create OVERLAY --base FILE --base-format raw` or `overlay` says what it is"
        }
        OverlayError::BaseWritten { .. } | OverlayError::BaseLength { .. } => {
            "a base must stay as it is: give each machine an overlay of its own, or make the overlay anew"
        }
        OverlayError::NotItsBase { .. } => {
            "name another file for the overlay; it is made if it is not there"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

fn load_hint(err: &LoadError) -> Option<String> {
    let hint = match err {
        LoadError::NoHardware { .. } => {
            "use a machine with hardware virtualisation, or a kernel built with CONFIG_PVM_GUEST; \
             --force starts it all the same"
        }
        LoadError::ModularRoot { .. } => {
            "add an --initrd that loads the virtio modules, or use a kernel that has them built \
             in; --force starts it all the same"
        }
        LoadError::Placement(
            PlacementError::OutsideRam { .. } | PlacementError::NoRoomForInitrd { .. },
        ) => "give the guest more --memory",
        LoadError::Open { what: "kernel", source, .. } if source.kind() == ErrorKind::NotFound => {
            "look for kernels in /boot, or let `make run` in Hull's tree fetch one"
        }
        LoadError::Open { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "distributions keep kernels and initrds from ordinary users: copy it, or `chmod a+r` it"
        }
        LoadError::Open { what: "initrd", source, .. } if source.kind() == ErrorKind::NotFound => {
            "look for one in /boot, or let `resources/initramfs` in Hull's tree make one"
        }
        _ => return None,
    };
    Some(hint.to_owned())
}

fn tap_hint(err: &TapError) -> Option<String> {
    Some(match err {
        TapError::Missing { name } => format!(
            "make it with `ip tuntap add {name} mode tap user $USER`, or write --net tap to have \
             one made for the life of the machine"
        ),
        TapError::Tun(source) if source.kind() == ErrorKind::PermissionDenied => {
            "run as root, or let this user open it: `chmod a+rw /dev/net/tun`; making an interface \
             takes CAP_NET_ADMIN all the same"
                .to_owned()
        }
        TapError::Permission { .. } => {
            "run as root, or make an interface for this user beforehand: `ip tuntap add NAME mode \
             tap user $USER`, then --net tap=NAME"
                .to_owned()
        }
        TapError::SingleQueue { name, .. } => format!(
            "leave out queues=, or make it anew with `ip tuntap add {name} mode tap multi_queue`"
        ),
        TapError::Tun(source) if source.kind() == ErrorKind::NotFound => {
            "load the driver with `modprobe tun`".to_owned()
        }
        _ => return None,
    })
}
