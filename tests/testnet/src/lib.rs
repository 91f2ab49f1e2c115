//! A TAP in a network namespace of its own, and frames on the host's side of it.
//!
//! The namespace belongs to the thread that made it and to the processes started from that thread;
//! when they are gone, so is everything in it.

use std::fs::OpenOptions;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// Anything that goes wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The one TAP of the namespace.
pub const NAME: &str = "tap0";
/// Ethertype for local experiments, as the payload has it.
pub const ETHERTYPE: u16 = 0x88b5;
/// `_IOW('T', 202, int)` and its neighbour, linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb;
/// The guest's and the host's made-up addresses.
pub const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// See [`GUEST`].
pub const HOST: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn check(value: libc::c_int) -> Result<libc::c_int> {
    if value < 0 { Err(Error::last_os_error().into()) } else { Ok(value) }
}

/// Runs `body` on a thread in a new network namespace with a TAP in it, which has several queues if
/// asked to.
///
/// # Errors
/// Whatever `body` says; or there is no right to make a namespace, or no TAP to be had.
pub fn in_namespace<T: Send>(queues: bool, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let prepared = (|| -> Result<()> {
                // SAFETY: moves only this thread.
                check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
                make_tap(NAME, queues)
            })();
            prepared.and_then(|()| body()).map_err(|error| error.to_string())
        });
        thread.join()
    });
    match outcome {
        Ok(outcome) => outcome.map_err(Into::into),
        Err(_) => Err("the thread in the namespace panicked".into()),
    }
}

fn interface_request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeroes is a value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

/// Makes another TAP of this name in the calling thread's namespace.
///
/// # Errors
/// There is one already, or no right to make it.
pub fn make_tap(name: &str, queues: bool) -> Result<()> {
    // Before the interface is there: nothing but the bench shall send on it.
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").ok();
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let more = if queues { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    let request = interface_request(name, flags);
    let up = interface_request(name, libc::IFF_UP);
    // SAFETY: `request` and `up` outlive their calls; the third takes a number.
    unsafe {
        check(libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw const request))?;
        check(libc::ioctl(tun.as_raw_fd(), TUNSETPERSIST, 1))?;
        let socket = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        let socket = OwnedFd::from_raw_fd(socket);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const up))?;
    }
    Ok(())
}

/// A packet socket on the host's side of the TAP.
pub struct Link {
    socket: OwnedFd,
}

impl Link {
    /// Opens it; a receive waits at most a second.
    ///
    /// # Errors
    /// There is no TAP, or no right to see its frames.
    pub fn open() -> Result<Link> {
        let protocol = ETHERTYPE.to_be();
        let name = std::ffi::CString::new(NAME)?;
        // SAFETY: plain system calls on structures that outlive them.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let socket =
                OwnedFd::from_raw_fd(check(libc::socket(libc::AF_PACKET, kind, protocol.into()))?);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as libc::c_int;
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
            let second = libc::timeval { tv_sec: 1, tv_usec: 0 };
            check(libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const second).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            ))?;
            Ok(Link { socket })
        }
    }

    /// Sends a frame; false if there is no room at the moment.
    ///
    /// # Errors
    /// The system's, other than lack of room.
    pub fn send(&self, frame: &[u8]) -> Result<bool> {
        let flags = libc::MSG_DONTWAIT;
        // SAFETY: the buffer outlives the call.
        let sent = unsafe {
            libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), flags)
        };
        if sent >= 0 {
            return Ok(true);
        }
        let error = Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR) => Ok(false),
            // Nobody has opened the TAP yet, or any more.
            Some(libc::ENETDOWN | libc::EIO) => {
                std::thread::sleep(Duration::from_millis(1));
                Ok(false)
            }
            _ => Err(error.into()),
        }
    }

    /// Receives a frame; `None` after a second without one. The host's own frames are heard too.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>> {
        // SAFETY: the buffer outlives the call and is as long as said.
        let length = unsafe {
            libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
        };
        if length >= 0 {
            return Ok(Some(length as usize));
        }
        let error = Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Ok(None),
            _ => Err(error.into()),
        }
    }
}

/// A frame of `size` bytes to the guest.
pub fn frame(size: usize, text: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; size.max(14 + text.len())];
    frame[..6].copy_from_slice(&GUEST);
    frame[6..12].copy_from_slice(&HOST);
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame[14..14 + text.len()].copy_from_slice(text);
    frame
}
