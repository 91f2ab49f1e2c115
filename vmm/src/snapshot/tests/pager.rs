//! A pager that is a thread of the same process.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{HUGE_PAGE, Kind, PAGES};
use crate::memory::PAGE_SIZE;

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

/// Listens at `socket`, and brings one machine its memory until that does without it.
pub(super) fn start(socket: &Path, kind: Kind, model: [u8; PAGES as usize]) {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut bytes = [0; 4096];
        let (len, uffd) = stream.recv_with_fd(&mut bytes).unwrap();
        let ranges: serde_json::Value = serde_json::from_slice(&bytes[..len]).unwrap();
        // All of it lies below the gap.
        let number = |key: &str| ranges[0][key].as_u64().unwrap();
        let (start, page) = (number("base_host_virt_addr"), number("page_size"));
        assert_eq!(page, if kind.huge_pages { HUGE_PAGE } else { PAGE_SIZE });
        assert_eq!((number("size"), number("offset")), (kind.size(), 0));
        serve(&stream, &uffd.unwrap(), |fault| {
            let first = (fault - start) / page * page;
            let mut bytes = vec![0; page as usize];
            for (n, byte) in model.iter().enumerate() {
                let at = (kind.at(n as u64).0).checked_sub(first).filter(|at| *at < page);
                if let Some(at) = at {
                    bytes[at as usize..(at + PAGE_SIZE) as usize].fill(*byte);
                }
            }
            (start + first, bytes)
        });
    });
}

/// Answers faults by what `page` says: where to, and which bytes.
fn serve(stream: &UnixStream, uffd: &File, page: impl Fn(u64) -> (u64, Vec<u8>)) {
    loop {
        let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = [poll(uffd.as_raw_fd(), libc::POLLIN), poll(stream.as_raw_fd(), 0)];
        // SAFETY: the array is as long as is said.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if fds[1].revents & libc::POLLHUP != 0 {
            return;
        }
        let mut message = [0u8; MESSAGE];
        // SAFETY: the buffer is as long as is said.
        let len = unsafe { libc::read(uffd.as_raw_fd(), message.as_mut_ptr().cast(), MESSAGE) };
        if len != MESSAGE as isize || message[0] != EVENT_PAGEFAULT {
            continue;
        }
        let (dst, bytes) = page(u64::from_le_bytes(message[16..24].try_into().unwrap()));
        let (src, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
        let mut copy = Copy { dst, src, len, mode: 0, copy: 0 };
        // SAFETY: the buffer is as long as is said. A page that is there already is no error.
        unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_COPY, &raw mut copy) };
    }
}
