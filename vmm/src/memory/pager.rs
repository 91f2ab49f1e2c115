//! RAM that another process fills, page by page, when the guest touches it (userfaultfd(2)).
//!
//! ```text
//!   Hull                         pager
//!     userfaultfd, ranges
//!     connect ────────────────────> listens on a Unix socket
//!     ranges as JSON, descriptor ─>
//!     a vCPU faults ··············> reads the fault, UFFDIO_COPY
//! ```
//!
//! The message is Firecracker's, and so is the rest: no event but faults of missing pages. A page that a
//! balloon gave back is asked for again when the guest touches it.
//!
//! A thread that waits for a page waits until it is there. When the pager dies the machine cannot go on;
//! before anybody waits for the machine's threads, [`GuestRam::release_pager`] lets them go.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use devices::virtio::vsock::connect;
use serde_json::json;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::freeze::Image;
use super::runs::Runs;
use super::{GuestRam, PAGE_SIZE, Ranges};
use crate::files::SocketPath;

/// How long a pager may take to accept a connection, and to bring the first pages.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries to connect to one that has too many connections waiting.
const AGAIN: Duration = Duration::from_millis(5);
/// Pages that are asked for at a time when all of memory is wanted.
const PIECE: u64 = (2 << 20) / PAGE_SIZE;
/// Bytes of a page that is from the host's pool.
const HUGE_PAGE: u64 = 2 << 20;

/// How often it is looked whether a pager reads the faults.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A pager that brought no page between so many looks, although somebody waited at each, hangs.
const HANGS: u32 = 5;
/// After so many it is gone if it has closed its socket.
const GONE: u32 = 10;

/// Numbers of Linux, include/uapi/linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_UNREGISTER: libc::c_ulong = 0x8010_aa01;
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Why memory cannot be had from a pager.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The kernel has no userfaultfd for this process.
    #[error("the host does not let this process have its page faults handled (userfaultfd)")]
    Refused(#[source] io::Error),
    /// RAM cannot be registered.
    #[error("cannot have page faults of the guest's memory handled")]
    Register(#[source] io::Error),
    /// Nobody listens.
    #[error("cannot connect to the pager at {}", path.display())]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It does not take what it is sent.
    #[error("the pager at {} does not take its message", path.display())]
    Send {
        /// Its socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It brings no pages.
    #[error("the pager at {} brings no pages: none came within {} s", .0.display(), PATIENCE.as_secs())]
    Silent(PathBuf),
    /// It brings other pages.
    #[error("the pager at {} brings other pages than those that were saved", .0.display())]
    Wrong(PathBuf),
}

/// The process that brings pages.
#[derive(Debug)]
pub struct Pager {
    uffd: OwnedFd,
    stream: UnixStream,
    /// Readable when the process is gone.
    process: Option<OwnedFd>,
    ranges: Ranges,
    waits: Waits,
}

/// What can be seen of a pager's work: the kernel's files, which this process may not open later.
#[derive(Debug)]
struct Waits {
    /// /proc/self/fdinfo of the descriptor (Linux, fs/userfaultfd.c).
    faults: File,
    /// /proc/self/statm.
    size: File,
    /// Pages that were there at the last look.
    resident: u64,
    /// Looks one after the other at which somebody waited, and nothing had come.
    number: u32,
}

impl Waits {
    fn new(uffd: RawFd) -> io::Result<Waits> {
        let faults = File::open(format!("/proc/self/fdinfo/{uffd}"))?;
        Ok(Waits { faults, size: File::open("/proc/self/statm")?, resident: 0, number: 0 })
    }

    /// Looks again.
    fn look(&mut self) -> io::Result<u32> {
        let word = |file: &File, before: &str, n: usize| {
            let mut bytes = [0; 512];
            let len = file.read_at(&mut bytes, 0)?;
            let text = String::from_utf8_lossy(bytes.get(..len).unwrap_or_default());
            let words = text.split_once(before).map_or("", |(_, words)| words);
            let word = words.split_whitespace().nth(n).and_then(|word| word.parse::<u64>().ok());
            word.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        };
        // Both those that nobody read and those that nobody answered.
        let waiting = word(&self.faults, "total:", 0)?;
        let resident = word(&self.size, "", 1)?;
        let come = resident != std::mem::replace(&mut self.resident, resident);
        self.number = if waiting == 0 || come { 0 } else { self.number.saturating_add(1) };
        Ok(self.number)
    }
}

/// How a pager does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagerHealth {
    /// As far as can be seen.
    Well,
    /// For some seconds it has brought nothing, and the guest waits. Said once, until something comes.
    Hangs,
    /// Nobody can bring a page any more, or wants to: it hung up, and brings nothing.
    Gone,
}

/// The pager of a machine, as long as it needs one.
pub(super) type Slot = Arc<Mutex<Option<Pager>>>;

pub(super) fn lock(slot: &Slot) -> MutexGuard<'_, Option<Pager>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

/// A userfaultfd for faults of the kernel too: KVM's are.
fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = File::options().read(true).write(true).open("/dev/userfaultfd");
    let by_device = device.map(|device| {
        // SAFETY: the call takes flags and returns a new descriptor.
        unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }
    });
    let fd = match by_device {
        Ok(fd) if fd >= 0 => fd,
        // SAFETY: as above.
        _ => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as i32 },
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the structure is what the call takes, and lives through it.
    match unsafe { libc::ioctl(fd, UFFDIO_API, &raw mut api) } {
        0 => Ok(uffd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a Unix socket, and waits a bounded time for room.
fn connect_patiently(path: &Path) -> io::Result<UnixStream> {
    let short = SocketPath::of(path)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match connect(short.as_path()) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(AGAIN);
            }
            connected => return connected.map(UnixStream::from),
        }
    }
}

/// A descriptor that says when the process at the other end is gone; nothing if it is out of sight.
fn process_of(stream: &UnixStream) -> Option<OwnedFd> {
    // SAFETY: the structure is plain data of the length that is given.
    unsafe {
        let mut peer: libc::ucred = std::mem::zeroed();
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        let (fd, level) = (stream.as_raw_fd(), libc::SOL_SOCKET);
        let asked =
            libc::getsockopt(fd, level, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len);
        if asked != 0 || peer.pid <= 0 {
            return None;
        }
        let fd = libc::syscall(libc::SYS_pidfd_open, peer.pid, 0) as i32;
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
    }
}

impl Pager {
    /// Has RAM filled by the process that listens at `path`.
    fn new(path: &Path, ranges: &Ranges, page: u64) -> Result<Pager, PagerError> {
        let uffd = userfaultfd().map_err(PagerError::Refused)?;
        let stream = connect_patiently(path)
            .map_err(|source| PagerError::Connect { path: path.to_owned(), source })?;
        let process = process_of(&stream);
        let waits = Waits::new(uffd.as_raw_fd()).map_err(PagerError::Refused)?;
        let pager = Pager { uffd, stream, process, ranges: Arc::clone(ranges), waits };
        let mut offset = 0;
        let mut message = Vec::new();
        for (_, mapping) in ranges.iter() {
            let (start, len) = (mapping.as_ptr() as u64, mapping.len() as u64);
            let mode = UFFDIO_REGISTER_MODE_MISSING;
            let mut register = Register { start, len, mode, ioctls: 0 };
            let fd = pager.uffd.as_raw_fd();
            // SAFETY: the structure is what the call takes; the range is this machine's RAM.
            if unsafe { libc::ioctl(fd, UFFDIO_REGISTER, &raw mut register) } != 0 {
                return Err(PagerError::Register(io::Error::last_os_error()));
            }
            message.push(json!({
                "base_host_virt_addr": start, "size": len, "offset": offset,
                // Bytes, whatever the second one's name says.
                "page_size": page, "page_size_kib": page,
            }));
            offset += len;
        }
        let message = serde_json::Value::from(message).to_string();
        let sent = pager.stream.send_with_fd(message.as_bytes(), pager.uffd.as_raw_fd());
        let failed = |source| PagerError::Send { path: path.to_owned(), source };
        match sent {
            Ok(sent) if sent == message.len() => Ok(pager),
            Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
            Err(err) => Err(failed(err.into())),
        }
    }

    /// True if it closed its socket; true if its process is over or out of sight.
    fn ends(&self) -> (bool, bool) {
        let fd = |fd: RawFd, events| libc::pollfd { fd, events, revents: 0 };
        let process = self.process.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut fds = [fd(self.stream.as_raw_fd(), 0), fd(process, libc::POLLIN)];
        // SAFETY: the array is as long as is said.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, 0) };
        (fds[0].revents & libc::POLLHUP != 0, process < 0 || fds[1].revents != 0)
    }

    /// True if there is nobody any more who could bring a page.
    fn is_gone(&self) -> bool {
        // A pager may close its socket when it has what it needs, or have had another process listen.
        self.ends() == (true, true)
    }

    fn look(&mut self) -> PagerHealth {
        let waits = self.waits.look().unwrap_or_default();
        match self.ends() {
            (true, true) => PagerHealth::Gone,
            // Whether it has closed the descriptor as well cannot be seen.
            (true, false) if waits >= GONE => PagerHealth::Gone,
            _ if waits == HANGS => PagerHealth::Hangs,
            _ => PagerHealth::Well,
        }
    }
}

impl Drop for Pager {
    /// Whoever waits for a page goes on with zeroes.
    fn drop(&mut self) {
        for (_, mapping) in self.ranges.iter() {
            let mut range = Range { start: mapping.as_ptr() as u64, len: mapping.len() as u64 };
            let fd = self.uffd.as_raw_fd();
            // SAFETY: the structure is what the call takes. It can fail only where nothing is registered.
            unsafe { libc::ioctl(fd, UFFDIO_UNREGISTER, &raw mut range) };
        }
    }
}

impl GuestRam {
    /// Has RAM, which nobody wrote yet, filled by the process that listens at `path`. `known` are some pages,
    /// and say whether it holds what they should: they are asked for at once.
    ///
    /// # Errors
    /// [`PagerError`]; RAM is as before then.
    pub fn page_from(&mut self, path: &Path, known: Vec<(u64, Check)>) -> Result<(), PagerError> {
        let page = if self.huge_pages { HUGE_PAGE } else { PAGE_SIZE };
        let pager = Pager::new(path, &self.ranges, page)?;
        *lock(&self.pager) = Some(pager);
        let image = self.image();
        let (sender, answer) = mpsc::channel();
        // It may wait for ever.
        let body = move || {
            let is_right = known.iter().all(|(page, check)| image.check(*page, check));
            // Whoever hears of it may need the room at once: of huge pages there are not many.
            drop(image);
            let _ = sender.send(is_right);
        };
        std::thread::Builder::new().spawn(body).map_err(PagerError::Register)?;
        let refusal = match answer.recv_timeout(PATIENCE) {
            Ok(true) => return Ok(()),
            Ok(false) => PagerError::Wrong(path.to_owned()),
            Err(_) => PagerError::Silent(path.to_owned()),
        };
        self.release_pager();
        Err(refusal)
    }

    /// Nobody brings pages any more: who waits for one goes on with zeroes. For machines that end.
    pub fn release_pager(&self) {
        drop(lock(&self.pager).take());
    }

    /// Descriptors that change when the pager may be gone.
    pub fn pager_fds(&self) -> Vec<RawFd> {
        lock(&self.pager).as_ref().map_or_else(Vec::new, |pager| {
            let process = pager.process.as_ref().map(AsRawFd::as_raw_fd);
            process.into_iter().chain([pager.stream.as_raw_fd()]).collect()
        })
    }

    /// How the pager does, if there is one: to be asked each [`LOOK_EVERY`].
    pub fn look_at_pager(&self) -> Option<PagerHealth> {
        lock(&self.pager).as_mut().map(Pager::look)
    }

    /// True if there is a pager, and it is gone.
    pub fn has_lost_pager(&self) -> bool {
        lock(&self.pager).as_ref().is_some_and(Pager::is_gone)
    }
}

/// Whether a page is what it should be.
pub type Check = Box<dyn Fn(&[u8; PAGE_SIZE as usize]) -> bool + Send>;

impl Image {
    /// True if a pager has pages that are not here.
    pub fn is_lazy(&self) -> bool {
        lock(&self.pager).is_some()
    }

    fn check(&self, page: u64, check: &Check) -> bool {
        let mut bytes = [0; PAGE_SIZE as usize];
        match self.host(page) {
            // SAFETY: a page of the mapping, which this image keeps; no guest runs yet.
            Some((host, _)) => unsafe {
                std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len());
            },
            None => return false,
        }
        check(&bytes)
    }

    /// Fetches all that the pager still has, and does without it from then on. The guest may run. Waits for
    /// the pager as long as it takes.
    ///
    /// # Errors
    /// The host has no memory for it.
    pub fn populate(&self) -> io::Result<()> {
        if !self.is_lazy() {
            return Ok(());
        }
        for piece in Runs::first(self.size() / PAGE_SIZE).pieces(PIECE) {
            self.fetch(piece)?;
        }
        drop(lock(&self.pager).take());
        Ok(())
    }
}
