//! TAP interfaces: the host's end of the wire.
//!
//! Every queue pair of a network card has a descriptor of its own. Frames carry the 12-byte header
//! of virtio in front, little endian, so that they pass between guest memory and the kernel as they
//! are. An interface that was made here disappears with its last descriptor.

mod users;

use std::io;
use std::mem::MaybeUninit;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use libc::{c_int, c_short, c_ulong};

use super::HEADER;

const TUN: &std::ffi::CStr = c"/dev/net/tun";
/// Largest packet of an interface that does not say.
const DEFAULT_MTU: u16 = 1500;

/// Why a TAP interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// `/dev/net/tun` cannot be opened.
    #[error("cannot open /dev/net/tun")]
    Tun(#[source] io::Error),
    /// No interface has this name.
    #[error("there is no network interface {name}")]
    Missing {
        /// The name.
        name: String,
    },
    /// An interface of this name exists already and was to be made.
    #[error("a network interface {name} exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Another process uses the interface.
    #[error("TAP interface {name} is in use by another process")]
    Busy {
        /// The name.
        name: String,
    },
    /// This user may not make the interface, or not use it.
    #[error("no permission to use {}", interface(name))]
    Permission {
        /// The name, or the pattern of a name.
        name: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The interface was made for one queue.
    #[error("TAP interface {name} has a single queue, {queues} queue pairs were asked for")]
    SingleQueue {
        /// The name.
        name: String,
        /// Queue pairs asked for.
        queues: u16,
    },
    /// The interface, or the inherited descriptor, is something else.
    #[error("{name} is not a TAP interface")]
    NotTap {
        /// Name of the interface, or number of the descriptor.
        name: String,
    },
    /// The inherited descriptor belongs to an interface with other framing.
    #[error("the descriptor of TAP interface {name} was opened {problem}")]
    Framing {
        /// The name.
        name: String,
        /// E.g. "without IFF_VNET_HDR".
        problem: &'static str,
    },
    /// The name is too long for an interface, empty, or has characters that it must not have.
    #[error("{name:?} is not the name of a network interface")]
    Name {
        /// The name.
        name: String,
    },
    /// A call failed for a reason that has no case of its own.
    #[error("{operation} of TAP interface {name}")]
    System {
        /// The name.
        name: String,
        /// The ioctl.
        operation: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// An interface in words; what is to be made has a pattern in place of a name.
fn interface(name: &str) -> String {
    if name.contains('%') {
        "a new TAP interface".to_owned()
    } else {
        format!("TAP interface {name}")
    }
}

/// One queue pair of a TAP interface.
#[derive(Clone, Debug)]
pub struct Tap {
    file: Arc<OwnedFd>,
    // A second descriptor of the same queue: a thread can wait for room through it while it waits
    // for frames through the first.
    waiting: Arc<OwnedFd>,
    interface: Option<Arc<str>>,
    multi_queue: bool,
    mtu: u16,
}

impl Tap {
    /// Opens `queues` queue pairs of the existing interface `name`.
    ///
    /// # Errors
    /// Any [`TapError`] but `Exists` and `Framing`; nothing is made.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Tap>, TapError> {
        let request = request(name)?;
        // SAFETY: the name is a NUL-terminated array.
        let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
        if index == 0 {
            return Err(TapError::Missing { name: name.to_owned() });
        }
        // The kernel refuses an interface that exists unless the flag says what the interface is.
        let first = match attach(name, queues > 1, 0) {
            Err(TapError::System { source, .. }) if is(&source, libc::EINVAL) => {
                match attach(name, queues <= 1, 0) {
                    Ok(_) if queues > 1 => {
                        return Err(TapError::SingleQueue { name: name.to_owned(), queues });
                    }
                    Err(TapError::System { source, .. }) if is(&source, libc::EINVAL) => {
                        return Err(TapError::NotTap { name: name.to_owned() });
                    }
                    // Busy means that it is a TAP of the other kind.
                    Err(TapError::Busy { .. }) if queues > 1 => {
                        return Err(TapError::SingleQueue { name: name.to_owned(), queues });
                    }
                    other => other?,
                }
            }
            other => other?,
        };
        let taps = first.with_siblings(queues)?;
        // One with several queues refuses nobody. Of two that come at once, at least one sees both.
        match users::queues(index) {
            Ok(Some(all)) if all > u32::from(queues) => {
                Err(TapError::Busy { name: name.to_owned() })
            }
            _ => Ok(taps),
        }
    }

    /// Makes an interface with `queues` queue pairs. `name` may contain one `%d`, for which the
    /// kernel takes the lowest free number. The interface is gone when the last descriptor closes.
    ///
    /// # Errors
    /// [`TapError::Exists`], `Permission`, `Name`, `Tun` or `System`.
    pub fn create(name: &str, queues: u16) -> Result<Vec<Tap>, TapError> {
        let exclusive = attach(name, queues > 1, libc::IFF_TUN_EXCL);
        let first = exclusive.map_err(|err| match err {
            TapError::Busy { name } => TapError::Exists { name },
            other => other,
        })?;
        first.with_siblings(queues)
    }

    /// Takes over an inherited descriptor of one queue pair, which `name` stands for in errors.
    ///
    /// # Errors
    /// [`TapError::NotTap`], `Framing` or `System`.
    pub fn from_fd(fd: OwnedFd, name: &str) -> Result<Tap, TapError> {
        let not_tap = || TapError::NotTap { name: name.to_owned() };
        let mut request = empty_request();
        // SAFETY: TUNGETIFF writes one ifreq.
        ioctl(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF as _, &mut request) })
            .map_err(|_| not_tap())?;
        let name = name_of(&request);
        // SAFETY: TUNGETIFF filled in the flags.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(not_tap());
        }
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(TapError::Framing { name, problem: "without IFF_VNET_HDR" });
        }
        if flags & libc::IFF_NO_PI == 0 {
            return Err(TapError::Framing { name, problem: "without IFF_NO_PI" });
        }
        let system = |operation| {
            let name = name.clone();
            move |source| TapError::System { name, operation, source }
        };
        // SAFETY: F_GETFL and F_SETFL have no memory arguments.
        let nonblocking = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            ioctl(flags).and_then(|()| {
                let flags = flags | libc::O_NONBLOCK;
                ioctl(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags))
            })
        };
        nonblocking.map_err(system("O_NONBLOCK"))?;
        Tap::new(fd, name, flags & libc::IFF_MULTI_QUEUE != 0)
    }

    /// Uses `socket`, which keeps message boundaries (SOCK_SEQPACKET or SOCK_DGRAM, non-blocking),
    /// in place of a TAP: its peer exchanges frames with a virtio header in front, and handles
    /// whatever offloads the guest has negotiated.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn over_socket(socket: OwnedFd) -> io::Result<Tap> {
        let waiting = Arc::new(socket.try_clone()?);
        let file = Arc::new(socket);
        Ok(Tap { file, waiting, interface: None, multi_queue: false, mtu: DEFAULT_MTU })
    }

    fn new(file: OwnedFd, name: String, multi_queue: bool) -> Result<Tap, TapError> {
        let system = |operation| {
            let name = name.clone();
            move |source| TapError::System { name, operation, source }
        };
        let (size, little_endian) = (HEADER as c_int, 1 as c_int);
        let fd = file.as_raw_fd();
        // SAFETY: both read one int.
        ioctl(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ as _, &size) })
            .map_err(system("TUNSETVNETHDRSZ"))?;
        // SAFETY: as above.
        ioctl(unsafe { libc::ioctl(fd, libc::TUNSETVNETLE as _, &little_endian) })
            .map_err(system("TUNSETVNETLE"))?;
        let waiting = Arc::new(file.try_clone().map_err(system("dup"))?);
        let interface = Arc::from(name);
        let mut tap =
            Tap { file: Arc::new(file), waiting, interface: Some(interface), multi_queue, mtu: 0 };
        tap.mtu = tap.read_mtu().unwrap_or(DEFAULT_MTU);
        Ok(tap)
    }

    /// This queue pair and `queues - 1` more of the same interface.
    fn with_siblings(self, queues: u16) -> Result<Vec<Tap>, TapError> {
        let name = self.name().to_owned();
        let mut taps = vec![self];
        for _ in 1..queues {
            taps.push(attach(&name, true, 0)?);
        }
        Ok(taps)
    }

    /// Name of the interface; empty for a socket.
    pub fn name(&self) -> &str {
        self.interface.as_deref().unwrap_or_default()
    }

    /// Largest packet of the interface in bytes, without Ethernet header, when it was opened or
    /// its MTU was last set here.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// A descriptor of the same queue, to wait for room with.
    pub(super) fn waiting_fd(&self) -> RawFd {
        self.waiting.as_raw_fd()
    }

    /// Tells the kernel what the reader of frames can handle: TUN_F_* bits.
    pub(super) fn set_offloads(&self, bits: u32) -> io::Result<()> {
        if self.interface.is_none() {
            return Ok(());
        }
        // SAFETY: the argument is a number.
        ioctl(unsafe { libc::ioctl(self.fd(), libc::TUNSETOFFLOAD as _, c_ulong::from(bits)) })
    }

    /// Makes the kernel deliver frames to this queue, or not. It keeps its place either way.
    pub(super) fn set_enabled(&self, enabled: bool) -> io::Result<()> {
        if !self.multi_queue {
            return Ok(());
        }
        let mut request = empty_request();
        let flags = if enabled { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: TUNSETQUEUE reads one ifreq.
        match ioctl(unsafe { libc::ioctl(self.fd(), libc::TUNSETQUEUE as _, &request) }) {
            // The queue is in that state already.
            Err(err) if is(&err, libc::EINVAL) => Ok(()),
            result => result,
        }
    }

    /// Gives the host's side of the interface an IPv4 address; `prefix` is 0 to 32.
    ///
    /// # Errors
    /// [`TapError::Permission`] or [`TapError::System`].
    pub fn set_address(&self, address: Ipv4Addr, prefix: u8) -> Result<(), TapError> {
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        let fields = [
            ("SIOCSIFADDR", libc::SIOCSIFADDR, address),
            ("SIOCSIFNETMASK", libc::SIOCSIFNETMASK, Ipv4Addr::from_bits(mask)),
        ];
        for (operation, code, address) in fields {
            let mut request = request(self.name())?;
            // SAFETY: the whole ifreq was zeroed, and sockaddr_in fits into a sockaddr.
            unsafe {
                let place = (&raw mut request.ifr_ifru.ifru_addr).cast::<libc::sockaddr_in>();
                (*place).sin_family = libc::AF_INET as libc::sa_family_t;
                (*place).sin_addr.s_addr = u32::from_ne_bytes(address.octets());
            }
            self.configure(operation, code, &mut request)?;
        }
        Ok(())
    }

    /// Sets the largest packet of the interface, in bytes without Ethernet header.
    ///
    /// # Errors
    /// [`TapError::Permission`] or [`TapError::System`].
    pub fn set_mtu(&mut self, mtu: u16) -> Result<(), TapError> {
        let mut request = request(self.name())?;
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        self.configure("SIOCSIFMTU", libc::SIOCSIFMTU, &mut request)?;
        self.mtu = mtu;
        Ok(())
    }

    /// Sets the Ethernet address of the host's side of the interface.
    ///
    /// # Errors
    /// [`TapError::Permission`] or [`TapError::System`].
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<(), TapError> {
        let mut request = request(self.name())?;
        let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.configure("SIOCSIFHWADDR", libc::SIOCSIFHWADDR, &mut request)
    }

    /// Turns the interface on.
    ///
    /// # Errors
    /// [`TapError::Permission`] or [`TapError::System`].
    pub fn bring_up(&self) -> Result<(), TapError> {
        let mut request = request(self.name())?;
        self.configure("SIOCGIFFLAGS", libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as c_short;
        self.configure("SIOCSIFFLAGS", libc::SIOCSIFFLAGS, &mut request)
    }

    fn read_mtu(&self) -> Option<u16> {
        let mut request = request(self.name()).ok()?;
        self.configure("SIOCGIFMTU", libc::SIOCGIFMTU, &mut request).ok()?;
        // SAFETY: SIOCGIFMTU filled in the MTU.
        u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
    }

    /// Runs one of the SIOC*IF* calls, which want a socket of the interface's network namespace.
    fn configure(
        &self,
        operation: &'static str,
        code: c_ulong,
        request: &mut libc::ifreq,
    ) -> Result<(), TapError> {
        let call = || {
            let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
            // SAFETY: no memory arguments; a descriptor that is not negative is ours.
            let socket = unsafe {
                let fd = libc::socket(libc::AF_INET, kind, 0);
                ioctl(fd)?;
                OwnedFd::from_raw_fd(fd)
            };
            // SAFETY: all of the callers' requests take one ifreq.
            ioctl(unsafe { libc::ioctl(socket.as_raw_fd(), code as _, request) })
        };
        call().map_err(|source| refused(self.name(), operation, source))
    }
}

/// Attaches a new descriptor to the interface `name`, which is made if it does not exist.
fn attach(name: &str, multi_queue: bool, more_flags: c_int) -> Result<Tap, TapError> {
    let mut request = request(name)?;
    let queue = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queue | more_flags;
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the path is NUL-terminated; a descriptor that is not negative is ours.
    let file = unsafe {
        let fd = libc::open(TUN.as_ptr(), libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC);
        ioctl(fd).map_err(TapError::Tun)?;
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    ioctl(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) })
        .map_err(|source| refused(name, "TUNSETIFF", source))?;
    Tap::new(file, name_of(&request), multi_queue)
}

fn refused(name: &str, operation: &'static str, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy { name },
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { name, source },
        _ => TapError::System { name, operation, source },
    }
}

fn is(err: &io::Error, errno: c_int) -> bool {
    err.raw_os_error() == Some(errno)
}

fn ioctl(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an ifreq is integers, bytes and pointers, for all of which 0 is valid.
    unsafe { MaybeUninit::<libc::ifreq>::zeroed().assume_init() }
}

/// A request about the interface `name`.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let mut request = empty_request();
    let valid = !name.is_empty()
        && name.len() < request.ifr_name.len()
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if !valid {
        return Err(TapError::Name { name: name.to_owned() });
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn name_of(request: &libc::ifreq) -> String {
    request.ifr_name.iter().take_while(|&&c| c != 0).map(|&c| char::from(c as u8)).collect()
}
