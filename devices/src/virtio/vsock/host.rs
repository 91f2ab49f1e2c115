//! The host's side: a Unix socket that programs connect to, and those that they listen on.

use std::ffi::{CString, OsString};
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use libc::{sockaddr_un, socklen_t};

/// Longest path of the listening socket in bytes: `sun_path` has 108 with its terminating zero, and
/// `_` and a port of ten digits follow the path where the guest connects to the host.
pub const LONGEST_PATH: usize = 107 - 11;

/// Connections that wait to be accepted.
const BACKLOG: libc::c_int = 1024;

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into a socket address.
    #[error(
        "{} is too long for a socket: {} bytes of at most {LONGEST_PATH}",
        path.display(), path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody listens there.
    #[error("{} is the socket of a process that lives", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is a file, a folder, a link.
    #[error("{} is there already and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The listening socket; its file goes with it, unless another has taken its place.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    c_path: CString,
    /// Device and inode of the file, until it is removed.
    identity: Option<(u64, u64)>,
    keep: bool,
}

impl Listener {
    /// Listens on `path` with mode 0600. A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`ListenError`]; what is at the path is as it was then.
    pub fn open(path: &Path) -> Result<Listener, ListenError> {
        let failed = |source| ListenError::Io { path: path.to_owned(), source };
        if path.as_os_str().len() > LONGEST_PATH {
            return Err(ListenError::TooLong { path: path.to_owned() });
        }
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
        let address = Address::new(path).map_err(failed)?;
        let socket = new_socket().map_err(failed)?;
        // What the file gets: a socket takes its mode from its descriptor, less the umask.
        // SAFETY: the call has no memory arguments.
        check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) }).map_err(failed)?;
        match address.bind(&socket) {
            Err(err) if err.raw_os_error() == Some(libc::EADDRINUSE) => {
                remove_stale(path, &c_path, &address)?;
                address.bind(&socket).map_err(failed)?;
            }
            result => result.map_err(failed)?,
        }
        let (_, identity) = look(&c_path).map_err(failed)?;
        let listener = Listener {
            socket,
            path: path.to_owned(),
            c_path,
            identity: Some(identity),
            keep: false,
        };
        // SAFETY: the call has no memory arguments.
        check(unsafe { libc::listen(listener.socket.as_raw_fd(), BACKLOG) }).map_err(failed)?;
        Ok(listener)
    }

    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The next connection, non-blocking. `None` if there is none.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        let none = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let fd = unsafe { libc::accept4(self.fd(), none, none.cast(), flags) };
        match check(fd) {
            // SAFETY: a new descriptor, ours alone.
            Ok(()) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
            Err(err) => match err.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(err),
            },
        }
    }

    /// Connects to who listens on this socket's path with `_` and `port` behind it.
    ///
    /// # Errors
    /// `WouldBlock` if too many wait there already: it may be tried again.
    pub(super) fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let mut path = self.path.as_os_str().as_bytes().to_vec();
        path.extend(format!("_{port}").bytes());
        connect(Path::new(&OsString::from_vec(path)))
    }

    /// Whether the file stays at [`Listener::end`].
    pub(super) fn keep_at_end(&mut self, keep: bool) {
        self.keep = keep;
    }

    /// The machine ended: the file goes, unless it is to stay.
    pub(super) fn end(&mut self) {
        if self.keep {
            self.identity = None;
        }
        self.remove();
    }

    /// Removes the file, if it still is this socket's.
    pub fn remove(&mut self) {
        if let Some(identity) = self.identity.take()
            && look(&self.c_path).is_ok_and(|(_, now)| now == identity)
        {
            // SAFETY: the path is valid.
            unsafe { libc::unlink(self.c_path.as_ptr()) };
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes the socket at `path` if nobody listens there.
fn remove_stale(path: &Path, c_path: &CString, address: &Address) -> Result<(), ListenError> {
    let failed = |source| ListenError::Io { path: path.to_owned(), source };
    let before = match look(c_path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(failed)?,
    };
    if before.0 != libc::S_IFSOCK {
        return Err(ListenError::NotASocket { path: path.to_owned() });
    }
    match new_socket().and_then(|socket| address.connect(&socket)) {
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => {
            // Not what somebody put there in the meantime.
            if look(c_path).is_ok_and(|now| now == before) {
                // SAFETY: the path is valid.
                unsafe { libc::unlink(c_path.as_ptr()) };
            }
            Ok(())
        }
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => Err(failed(err)),
        // It is taken, or too many wait for it, or it is of another kind: somebody's in any case.
        _ => Err(ListenError::InUse { path: path.to_owned() }),
    }
}

/// Kind of the file at `path`, its device and inode. Links are not followed.
fn look(path: &CString) -> io::Result<(libc::mode_t, (u64, u64))> {
    // SAFETY: the path is valid; stat is plain data, which the call fills.
    unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        // The one of its family that a filtered thread may make.
        let (call, flags) = (libc::SYS_newfstatat, libc::AT_SYMLINK_NOFOLLOW);
        if libc::syscall(call, libc::AT_FDCWD, path.as_ptr(), &raw mut stat, flags) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((stat.st_mode & libc::S_IFMT, (stat.st_dev, stat.st_ino)))
    }
}

/// Connects to who listens at `path`, at most 107 bytes long. Nothing that is done with the connection waits.
///
/// # Errors
/// `WouldBlock` if too many wait there already: it may be tried again.
pub fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = Address::new(path)?;
    let socket = new_socket()?;
    address.connect(&socket)?;
    Ok(socket)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn new_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: the call has no memory arguments; a good result is a new descriptor, ours alone.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, kind, 0);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// The address of a Unix socket.
struct Address {
    address: sockaddr_un,
    len: socklen_t,
}

impl Address {
    fn new(path: &Path) -> io::Result<Address> {
        let bytes = path.as_os_str().as_bytes();
        let mut sun_path = [0; 108];
        if bytes.len() >= sun_path.len() {
            return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
        }
        for (slot, &byte) in sun_path.iter_mut().zip(bytes) {
            *slot = byte as libc::c_char;
        }
        let len = offset_of!(sockaddr_un, sun_path) + bytes.len() + 1;
        let sun_family = libc::AF_UNIX as libc::sa_family_t;
        Ok(Address { address: sockaddr_un { sun_family, sun_path }, len: len as socklen_t })
    }

    fn bind(&self, socket: &OwnedFd) -> io::Result<()> {
        // SAFETY: the address is valid for its length.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const self.address).cast(), self.len) })
    }

    fn connect(&self, socket: &OwnedFd) -> io::Result<()> {
        // SAFETY: as above.
        check(unsafe {
            libc::connect(socket.as_raw_fd(), (&raw const self.address).cast(), self.len)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_is_private_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let listener = Listener::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file");
        let listener = Listener::open(&path).unwrap();
        let second = Listener::open(&path).unwrap_err();
        assert!(matches!(second, ListenError::InUse { .. }), "{second}");
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some(), "the one who came was heard as well");
        drop(listener);

        fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::open(&path), Err(ListenError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &link).unwrap();
        assert!(matches!(Listener::open(&link), Err(ListenError::NotASocket { .. })));
        assert!(matches!(Listener::open(folder.path()), Err(ListenError::NotASocket { .. })));
        assert!(matches!(
            Listener::open(&folder.path().join("no/such/folder")),
            Err(ListenError::Io { .. })
        ));
        let datagrams = folder.path().join("datagrams");
        let _held = std::os::unix::net::UnixDatagram::bind(&datagrams).unwrap();
        assert!(matches!(Listener::open(&datagrams), Err(ListenError::InUse { .. })));
        assert!(datagrams.exists());
    }

    #[test]
    fn a_busy_listener_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let address = Address::new(&path).unwrap();
        let owner = new_socket().unwrap();
        address.bind(&owner).unwrap();
        // SAFETY: the call has no memory arguments.
        assert_eq!(unsafe { libc::listen(owner.as_raw_fd(), 0) }, 0);
        let _first = UnixStream::connect(&path).unwrap();
        assert!(matches!(Listener::open(&path), Err(ListenError::InUse { .. })));
    }

    #[test]
    fn the_socket_of_a_successor_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("v.sock");
        let first = Listener::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Listener::open(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn paths_fit_or_are_refused() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let name = |len: usize| {
            let rest = len - folder.path().as_os_str().len() - 1;
            folder.path().join("x".repeat(rest))
        };
        let listener = Listener::open(&name(LONGEST_PATH)).unwrap();
        let program = folder.path().join(format!(
            "{}_{}",
            name(LONGEST_PATH).file_name().unwrap().display(),
            u32::MAX
        ));
        let program = UnixListener::bind(program).unwrap();
        listener.connect(u32::MAX).unwrap();
        program.accept().unwrap();
        assert_eq!(listener.connect(5).unwrap_err().kind(), io::ErrorKind::NotFound);
        let long = Listener::open(&name(LONGEST_PATH + 1)).unwrap_err();
        assert!(long.to_string().contains("97 bytes of at most 96"), "{long}");
    }
}
