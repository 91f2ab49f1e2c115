//! Making processes for machines that are copied: `hull pool`, and what `hull fork` does where there is none.
//!
//! A machine cannot make processes: its filters do not let it. It connects here; whoever comes in is a new
//! process's standard input, and the machine speaks with that one from then on.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmm::files::SocketPath;

use crate::runtime;

/// The subcommand that such a process has.
pub const CLONE: &str = "clone";

/// Where a pool listens, unless it was told otherwise.
pub fn default_socket() -> PathBuf {
    // No machine has such a name.
    runtime::directory().join(".pool")
}

/// Listens at `path`.
///
/// # Errors
/// Somebody else does, or the system refused.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let short = SocketPath::of(path)?;
    let bind = || UnixListener::bind(short.as_path());
    match bind() {
        Err(err) if err.kind() == io::ErrorKind::AddrInUse => {
            // What a dead one left answers nobody.
            if UnixStream::connect(short.as_path()).is_ok() {
                return Err(err);
            }
            std::fs::remove_file(path)?;
            bind()
        }
        bound => bound,
    }
}

/// Has a process of its own serve whoever is at the other end of `stream`.
///
/// # Errors
/// There is no process to be had.
pub fn spawn(stream: UnixStream) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(OsStr::new(CLONE)).stdin(Stdio::from(OwnedFd::from(stream)));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: setsid and signal are all that is called between fork and exec, and may be.
    unsafe {
        command.pre_exec(|| {
            // Nobody's terminal ends it, and it outlives whoever made it.
            if libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signal(libc::SIGCHLD, libc::SIG_DFL);
            Ok(())
        });
    }
    let child = command.spawn()?;
    // Who ends is taken away by the kernel: see `forget_children`.
    drop(child);
    Ok(())
}

/// Has the kernel take away processes that ended: nobody asks how.
pub fn forget_children() {
    // SAFETY: sets a disposition.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}
