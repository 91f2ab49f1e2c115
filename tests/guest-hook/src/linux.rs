//! What the kernel is asked for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `_IOW('R', 0x03, int[2])`, linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
/// Any address of this machine (`VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// How long the host may be silent, in seconds.
const PATIENCE: i64 = 10;

pub fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A socket of this domain, closed in other programs.
pub fn socket(domain: libc::c_int, kind: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: the call has no memory arguments; a good result is a new descriptor, ours alone.
    unsafe {
        let socket = libc::socket(domain, kind | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        Ok(OwnedFd::from_raw_fd(socket))
    }
}

/// Listens on a vsock port.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket(libc::AF_VSOCK, libc::SOCK_STREAM)?;
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = ANY;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is valid for its length; the other call has no memory arguments.
    unsafe {
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        check(libc::listen(socket.as_raw_fd(), 16))?;
    }
    Ok(socket)
}

/// The next connection, and whose it is.
pub fn accept(listener: &OwnedFd) -> io::Result<(File, u32)> {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let patience = libc::timeval { tv_sec: PATIENCE, tv_usec: 0 };
    // SAFETY: addresses and option are valid for their lengths; a good descriptor is new, ours alone.
    unsafe {
        let (into, flags) = ((&raw mut address).cast(), libc::SOCK_CLOEXEC);
        let stream = libc::accept4(listener.as_raw_fd(), into, &raw mut length, flags);
        check(stream)?;
        let stream = OwnedFd::from_raw_fd(stream);
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let (value, length) = ((&raw const patience).cast(), size_of_val(&patience) as u32);
            let fd = stream.as_raw_fd();
            check(libc::setsockopt(fd, libc::SOL_SOCKET, option, value, length))?;
        }
        Ok((File::from(stream), address.svm_cid))
    }
}

/// `rand_pool_info` (linux/random.h) with room for as much as a seed can have.
#[repr(C)]
struct Pool {
    bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; 256],
}

/// Has the kernel's random numbers depend on `seed` from now on, all of them.
pub fn reseed(seed: &[u8]) -> io::Result<()> {
    let mut pool = Pool { bits: 8 * seed.len() as i32, bytes: seed.len() as i32, buffer: [0; 256] };
    match pool.buffer.get_mut(..seed.len()) {
        Some(room) if !seed.is_empty() => room.copy_from_slice(seed),
        _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "too short or too long")),
    }
    let device = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the structure says how much of it there is; the other call has no argument.
    unsafe {
        check(libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool))?;
        check(libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG))
    }
}

/// Sets the clock that shows the time of day, in nanoseconds since 1970.
pub fn set_time(ns: u64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) })
}

/// Changes what this machine calls itself.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: the name is valid for its length.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
}
