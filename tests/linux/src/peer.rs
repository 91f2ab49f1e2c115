//! The guest's side of the socket tests: this program once more, as a guest runs it. What
//! `linux-tests load` does is said in [`crate::load`], `linux-tests warm` in [`crate::warm`].
//!
//!     linux-tests vsock-cid                  prints the guest's address
//!     linux-tests vsock-listen PORT COUNT    sends COUNT connections back what they say
//!     linux-tests vsock-connect PORT COUNT   the same for COUNT connections to the host's PORT
//!     linux-tests vsock-send PORT BYTES      sends bytes to the host's PORT, and is gone

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::thread;

use crate::load;
use crate::pattern::Pattern;
use crate::warm;

/// The host's address.
const HOST: u32 = 2;
/// Any address of this machine (`VMADDR_CID_ANY`).
const ANY: u32 = u32::MAX;
/// IOCTL_VM_SOCKETS_GET_LOCAL_CID (linux/vm_sockets.h).
const GET_LOCAL_CID: libc::c_ulong = 0x7b9;

/// Does what the command line says, if that is a guest's part.
pub fn play() -> Option<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse::<u32>().map_err(io::Error::other);
    let result = match words[..] {
        ["vsock-cid"] => address(),
        ["vsock-listen", port, count] => number(port).and_then(|port| listen(port, number(count)?)),
        ["vsock-connect", port, count] => {
            number(port).and_then(|port| each(number(count)?, || connect(port)))
        }
        ["vsock-send", port, bytes] => number(port).and_then(|port| {
            let bytes = number(bytes)? as usize;
            connect(port)?.write_all(&sample(bytes))
        }),
        ["warm"] => warm::run(),
        ["load", address, disk, folder, status] => load::run(address, disk, folder, status),
        _ => return None,
    };
    Some(match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    })
}

/// What is sent through a socket.
pub fn sample(length: usize) -> Vec<u8> {
    Pattern::bytes(0, length)
}

fn address() -> io::Result<()> {
    let device = File::open("/dev/vsock")?;
    let mut cid = 0u32;
    // SAFETY: the call writes one u32.
    check(unsafe { libc::ioctl(device.as_raw_fd(), GET_LOCAL_CID, &raw mut cid) })?;
    println!("{cid}");
    Ok(())
}

/// Sends `count` connections, made by `next` and served at once, back what they say.
fn each(count: u32, next: impl Fn() -> io::Result<File>) -> io::Result<()> {
    let mut threads = Vec::new();
    for _ in 0..count {
        let stream = next()?;
        threads.push(thread::spawn(move || echo(stream)));
    }
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
    }
    Ok(())
}

fn echo(mut stream: File) -> io::Result<()> {
    let mut piece = vec![0; 1 << 16];
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(()),
            length => stream.write_all(&piece[..length])?,
        }
    }
}

fn listen(port: u32, count: u32) -> io::Result<()> {
    let socket = listener(port)?;
    each(count, || accept(&socket))
}

/// Listens on the guest's `port`.
pub fn listener(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let (address, length) = named(ANY, port);
    // SAFETY: the address is valid for its length; the other call has no memory arguments.
    unsafe {
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
        check(libc::listen(socket.as_raw_fd(), 128))?;
    }
    Ok(socket)
}

/// Who comes next.
pub fn accept(listener: &OwnedFd) -> io::Result<File> {
    let nobody = std::ptr::null_mut();
    // SAFETY: no address is asked for; a good result is a new descriptor, ours alone.
    unsafe {
        let stream = libc::accept(listener.as_raw_fd(), nobody, nobody.cast());
        check(stream)?;
        Ok(File::from(OwnedFd::from_raw_fd(stream)))
    }
}

/// Connects to the host's `port`.
pub fn connect(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let (address, length) = named(HOST, port);
    // SAFETY: the address is valid for its length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(File::from(socket))
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: the call has no memory arguments; a good result is a new descriptor, ours alone.
    unsafe {
        let socket = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        check(socket)?;
        Ok(OwnedFd::from_raw_fd(socket))
    }
}

fn named(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    (address, size_of::<libc::sockaddr_vm>() as libc::socklen_t)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
