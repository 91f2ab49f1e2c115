//! Making processes for machines that are copied: `hull pool`, and what `hull fork` does where there is none.
//!
//! A machine cannot make processes: its filters do not let it. It connects here; whoever comes in is a new
//! process's standard input, and the machine speaks with that one from then on.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use api_server::{ServerError, Socket, SocketFile};
use rustix::event::{PollFd, PollFlags, poll};
use vmm::fork;
use vmm::machine::Shape;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::cli::Seccomp;
use crate::runtime;

/// The subcommand that such a process has.
pub const CLONE: &str = "clone";

/// What a process says to its pool when it is ready.
const READY: u8 = 1;
/// Most bytes of what it says when it will not be.
const LONGEST_EXCUSE: usize = 1024;
/// Most processes that serve somebody and have no machine yet.
const MOST_ASKED: usize = 64;
/// How long another may take to begin to listen: microseconds, unless the scheduler steps in.
const TURN: Duration = Duration::from_secs(3);

/// Where a pool listens, unless it was told otherwise.
pub fn default_socket() -> PathBuf {
    // No machine has such a name.
    runtime::directory().join(".pool")
}

/// Why nobody can ask for processes.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The directory cannot be made.
    #[error("cannot make the directory {}", path.display())]
    Folder {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Somebody is about to listen there, and does not come to an end.
    #[error("another process holds a lock on {}", .0.display())]
    Locked(PathBuf),
    /// The socket cannot be had.
    #[error(transparent)]
    Socket(#[from] ServerError),
}

/// Listens at `path`, for this user alone. The socket goes with its file, unless that is another's by then.
///
/// # Errors
/// Something else than what a dead process left is there, or the system refused. What is there stays then.
pub fn listen(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let failed = |source| ListenError::Folder { path: folder.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    // Who finds a socket dead removes it: it must not be that of one who is just about to listen.
    let _turn = turn(folder)?;
    let (listener, file) = Socket::bind(path)?.into_parts();
    Ok((listener.into(), file))
}

/// Locks a folder, as long as the result lives. Nothing if it may not be opened.
fn turn(folder: &Path) -> Result<Option<File>, ListenError> {
    let Ok(file) = File::open(folder) else { return Ok(None) };
    let patience = Instant::now() + TURN;
    // Where there are no such locks, nobody has one.
    while !runtime::lock(&file).unwrap_or(true) {
        if Instant::now() >= patience {
            return Err(ListenError::Locked(folder.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Some(file))
}

/// True if who connected may have processes made: this user, who could make them, and root. Others are told.
pub fn admits(stream: &UnixStream) -> bool {
    // SAFETY: has no arguments and cannot fail.
    let own = unsafe { libc::geteuid() };
    let theirs = rustix::net::sockopt::socket_peercred(stream).map(|peer| peer.uid.as_raw());
    let admitted = theirs.is_ok_and(|user| user == own || user == 0);
    if !admitted {
        tracing::warn!(user = ?theirs, "another user asks for a process, and gets none");
        let why = format!("processes are made for user {own} and root alone");
        let _ = fork::answer(stream, &Err(why));
    }
    admitted
}

/// Has a process of its own serve whoever is at the other end of `stream`. The result is closed when that has a
/// machine.
///
/// # Errors
/// There is no process to be had, which the other end is told.
pub fn spawn(stream: &UnixStream, filter: Seccomp) -> io::Result<UnixStream> {
    let spawned = Zygote::start(None, filter).and_then(|blank| blank.give(stream));
    if let Err(err) = &spawned {
        // Nobody else does.
        let _ = fork::answer(stream, &Err(format!("no process can be made: {err}")));
    }
    spawned
}

/// Processes that serve somebody and have no machine yet, of which there is a most: who asks for processes and says
/// no more has not any number of them.
#[derive(Debug, Default)]
pub struct Asked(Vec<UnixStream>);

impl Asked {
    /// No other one can be asked.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MOST_ASKED
    }

    /// They are there to be waited for: there is nothing to be read.
    pub fn fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.0.iter().map(|stream| PollFd::new(stream, PollFlags::empty()))
    }

    /// Forgets those that have a machine, or ended.
    pub fn look(&mut self) {
        self.0.retain(|stream| !fork::is_over(stream));
    }

    /// Waits until another one can be asked.
    pub fn wait_for_room(&mut self) {
        self.look();
        while self.is_full() {
            // One that fails waits for nobody, and may be made again.
            let _ = poll(&mut self.fds().collect::<Vec<_>>(), None);
            self.look();
        }
    }
}

impl Extend<UnixStream> for Asked {
    fn extend<T: IntoIterator<Item = UnixStream>>(&mut self, streams: T) {
        self.0.extend(streams);
    }
}

/// A process that has a machine's parts ready and waits for one to be handed over.
#[derive(Debug)]
pub struct Zygote(UnixStream);

impl Zygote {
    /// Has one made: for machines of this shape, or one that has nothing ready but itself and need not be waited for.
    /// It has something to say when its descriptor can be read.
    ///
    /// # Errors
    /// There is no process to be had.
    pub fn start(shape: Option<Shape>, filter: Seccomp) -> io::Result<Zygote> {
        let (own, theirs) = UnixStream::pair()?;
        let mut options = Vec::new();
        match shape {
            None => options.push("--asked".to_owned()),
            Some(Shape { cpus, memory, huge_pages }) => {
                options.extend([format!("--cpus={cpus}"), format!("--memory={memory}")]);
                options.extend(huge_pages.then(|| "--huge-pages".to_owned()));
            }
        }
        start(theirs, filter, &options)?;
        Ok(Zygote(own))
    }

    /// That it is ready, or why it is not. To be asked when its descriptor can be read.
    pub fn readiness(&mut self) -> Result<(), String> {
        let mut said = [0; LONGEST_EXCUSE];
        match self.0.read(&mut said).map(|len| said.split_at(len).0) {
            Ok([READY]) => Ok(()),
            Ok([]) | Err(_) => Err("it ended without a word".to_owned()),
            Ok(why) => Err(String::from_utf8_lossy(why).into_owned()),
        }
    }

    /// Has it serve whoever is at the other end of `stream`. The result is closed when it has a machine.
    ///
    /// # Errors
    /// It is gone.
    pub fn give(self, stream: &UnixStream) -> io::Result<UnixStream> {
        self.0.send_with_fd(&[1u8][..], stream.as_raw_fd())?;
        Ok(self.0)
    }
}

impl AsFd for Zygote {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes this process one that nobody's terminal ends, and that outlives whoever made it.
pub fn leave_home() {
    // SAFETY: has no arguments. It fails where it was done before.
    unsafe { libc::setsid() };
}

/// Says to the pool why this process will not be ready.
pub fn apologize(mut pool: &UnixStream, why: &str) {
    let most = why.floor_char_boundary(LONGEST_EXCUSE);
    // A pool that is gone needs no reason.
    let _ = pool.write_all(why.get(..most).unwrap_or_default().as_bytes());
}

/// Says that this process is ready, and waits for who is to be served. Nobody if the pool is gone.
///
/// # Errors
/// The pool does not take it, or what comes is no socket.
pub fn wait(mut pool: &UnixStream) -> io::Result<Option<UnixStream>> {
    pool.write_all(&[READY])?;
    served(pool)
}

/// Waits for who is to be served. Nobody if the pool is gone.
///
/// # Errors
/// What comes is no socket.
pub fn served(pool: &UnixStream) -> io::Result<Option<UnixStream>> {
    match pool.recv_with_fd(&mut [0]) {
        Ok((1, Some(file))) => Ok(Some(UnixStream::from(OwnedFd::from(file)))),
        Ok(_) => Ok(None),
        // It has not even read that this process is ready.
        Err(err) if err.errno() == libc::ECONNRESET => Ok(None),
        Err(err) => Err(err.into()),
    }
}

fn start(stream: UnixStream, filter: Seccomp, options: &[String]) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([CLONE, "--seccomp", filter.as_str()])
        .args(options)
        .stdin(Stdio::from(OwnedFd::from(stream)));
    // With nothing to be called before it is executed, std makes it without a copy of this process's memory.
    command.stdout(Stdio::null()).stderr(Stdio::null());
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
