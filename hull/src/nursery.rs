//! Making processes for machines that are copied: `hull pool`, and what `hull fork` does where there is none.
//!
//! A machine cannot make processes: its filters do not let it. It connects here; whoever comes in is a new
//! process's standard input, and the machine speaks with that one from then on.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmm::files::SocketPath;
use vmm::fork;
use vmm::machine::Shape;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

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
/// There is no process to be had, which the other end is told.
pub fn spawn(stream: &UnixStream) -> io::Result<()> {
    let started = stream.try_clone().and_then(|theirs| start(theirs, &[]));
    if let Err(err) = &started {
        // Nobody else does.
        let _ = fork::answer(stream, &Err(format!("no process can be made: {err}")));
    }
    started
}

/// A process that has a machine's parts ready and waits for one to be handed over.
#[derive(Debug)]
pub struct Zygote(UnixStream);

impl Zygote {
    /// Has one made. It is ready when its descriptor can be read; if nothing is there then, it is gone.
    ///
    /// # Errors
    /// There is no process to be had.
    pub fn start(shape: Shape) -> io::Result<Zygote> {
        let (own, theirs) = UnixStream::pair()?;
        let (cpus, memory) = (shape.cpus.to_string(), shape.memory.to_string());
        let mut options = vec!["--cpus", &cpus, "--memory", &memory];
        if shape.huge_pages {
            options.push("--huge-pages");
        }
        start(theirs, &options)?;
        Ok(Zygote(own))
    }

    /// True if it is ready; false if it is gone. To be asked when its descriptor can be read.
    pub fn is_ready(&mut self) -> bool {
        self.0.read(&mut [0]).is_ok_and(|len| len == 1)
    }

    /// Has it serve whoever is at the other end of `stream`.
    ///
    /// # Errors
    /// It is gone.
    pub fn give(self, stream: &UnixStream) -> io::Result<()> {
        let sent = self.0.send_with_fd(&[1u8][..], stream.as_raw_fd());
        sent.map(drop).map_err(io::Error::from)
    }
}

impl AsFd for Zygote {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Says that this process is ready, and waits for who is to be served. Nobody if the pool is gone.
///
/// # Errors
/// The pool does not take it, or what comes is no socket.
pub fn wait(mut pool: &UnixStream) -> io::Result<Option<UnixStream>> {
    pool.write_all(&[1])?;
    match pool.recv_with_fd(&mut [0]) {
        Ok((1, Some(file))) => Ok(Some(UnixStream::from(OwnedFd::from(file)))),
        Ok(_) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

fn start(stream: UnixStream, options: &[&str]) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(CLONE).args(options).stdin(Stdio::from(OwnedFd::from(stream)));
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
    // The kernel takes processes away that end: nobody asks how. Only if there is nothing to be executed,
    // std does, and panics if it has no answer.
    let reaping = Reaping::pause();
    let child = command.spawn();
    drop(reaping);
    child.map(drop)
}

/// As long as it lives, the kernel leaves it to this process to take its children away.
struct Reaping;

impl Reaping {
    fn pause() -> Reaping {
        // SAFETY: sets a disposition.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        Reaping
    }
}

impl Drop for Reaping {
    fn drop(&mut self) {
        // SAFETY: sets a disposition; takes children away that ended meanwhile, of which nobody waits for one.
        unsafe {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
        }
    }
}
