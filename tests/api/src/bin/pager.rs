//! A process that brings the memory of guests, page by page, as Firecracker's clients have it:
//!
//!     pager SOCKET MEMORY [BEHAVIOUR]
//!
//! It behaves as it should, or is `deaf` (never accepts), `silent` (brings nothing), `wrong` (brings other
//! pages), `closes` (its end of the socket, and goes on), `dies` at a fault, `hangs` there, or `leaves` (closes all
//! that it has, and lives on); the last three with the number of pages behind a `=` that it brings before.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use serde_json::Value;

/// `struct uffd_msg` and `struct uffdio_copy` (Linux, include/uapi/linux/userfaultfd.h).
const MESSAGE: usize = 32;
const EVENT_PAGEFAULT: u8 = 0x12;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// The message of a client and the descriptor that comes with it.
fn receive(stream: &UnixStream) -> io::Result<(Value, OwnedFd)> {
    let mut bytes = [0u8; 4096];
    let mut control = [0u64; 8];
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: the structures live through the call, and are as long as is said.
    let (len, fd) = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control);
        let len = libc::recvmsg(stream.as_raw_fd(), &raw mut header, 0);
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        if len <= 0 || first.is_null() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        (len as usize, libc::CMSG_DATA(first).cast::<i32>().read_unaligned())
    };
    // SAFETY: the descriptor came with the message.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((serde_json::from_slice(&bytes[..len])?, fd))
}

fn number(range: &Value, key: &str) -> u64 {
    range[key].as_u64().unwrap_or_default()
}

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let (Some(socket), Some(memory)) = (args.get(1), args.get(2)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let behaviour = args.get(3).map_or("good", String::as_str);
    let (behaviour, most) = match behaviour.split_once('=') {
        Some((behaviour, most)) => (behaviour, most.parse().ok()),
        None => (behaviour, None),
    };
    let memory = File::open(memory)?;
    let listener = UnixListener::bind(socket)?;
    println!("listening");
    if behaviour == "deaf" {
        return wait();
    }
    let (stream, _) = listener.accept()?;
    let (ranges, uffd) = receive(&stream)?;
    let stream = if behaviour == "closes" { None } else { Some(stream) };
    if behaviour == "silent" {
        return wait();
    }
    let ranges = ranges.as_array().cloned().unwrap_or_default();
    let mut brought = 0;
    loop {
        let mut poll = libc::pollfd { fd: uffd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one structure, as is said.
        unsafe { libc::poll(&raw mut poll, 1, 100) };
        if stream.as_ref().is_some_and(is_over) {
            return Ok(());
        }
        let mut message = [0u8; MESSAGE];
        // SAFETY: the buffer is as long as is said.
        let len = unsafe { libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), MESSAGE) };
        if len != MESSAGE as isize || message[0] != EVENT_PAGEFAULT {
            continue;
        }
        if most == Some(brought) {
            return match behaviour {
                "hangs" => wait(),
                "leaves" => {
                    drop((stream, uffd));
                    wait()
                }
                _ => Ok(()),
            };
        }
        let address = message[16..24].iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
        let start = |range: &Value| number(range, "base_host_virt_addr");
        let inside = |range: &&Value| {
            (start(range)..start(range) + number(range, "size")).contains(&address)
        };
        let Some(range) = ranges.iter().find(inside) else { continue };
        let page = number(range, "page_size");
        let address = address / page * page;
        let mut bytes = vec![0u8; page as usize];
        memory.read_exact_at(&mut bytes, number(range, "offset") + (address - start(range)))?;
        if behaviour == "wrong" {
            bytes.fill(0xff);
        }
        let mut copy =
            Copy { dst: address, src: bytes.as_ptr() as u64, len: page, mode: 0, copy: 0 };
        // SAFETY: the buffer is as long as is said. A page that is there already is no error.
        unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
        brought += 1;
    }
}

/// True if the client is gone.
fn is_over(stream: &UnixStream) -> bool {
    let (fd, events) = (stream.as_raw_fd(), libc::POLLIN);
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one structure, as is said.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents & libc::POLLHUP != 0
}

/// Until whoever started this closes its input.
fn wait() -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new()).map(drop)
}
