//! A disk that hangs: a file system with one file in it, whose reads are never answered. Where it
//! begins, it reads as zeroes, for who looks at what kind of image it is.

use crate::Result;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The one file's name, and its node.
const NAME: &[u8] = b"disk";
const NODE: u64 = 2;
/// Bytes that can be read.
const READABLE: u64 = 1 << 20;

/// Requests, linux/fuse.h.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
/// Bytes of the heads of requests and answers.
const HEAD_IN: usize = 40;
const HEAD_OUT: usize = 16;
/// Most bytes of a request: what this file system says that it takes, with its head.
const LONGEST: usize = 1 << 20;

/// The file system, for as long as it is mounted.
pub struct Hanging<'a> {
    device: File,
    bytes: u64,
    /// Reads that are not answered.
    waiting: &'a AtomicUsize,
}

impl Hanging<'_> {
    /// Mounts it on `folder` for a thread of its own and what that starts, and has the thread run
    /// `body` with the file's path and the number of reads that wait. The file has `bytes` bytes.
    pub fn mounted<T: Send>(
        folder: &Path,
        bytes: u64,
        body: impl FnOnce(&Path, &AtomicUsize) -> Result<T> + Send,
    ) -> Result<T> {
        let waiting = AtomicUsize::new(0);
        let waiting = &waiting;
        let outcome = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let run = || -> Result<T> {
                    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
                    mount(folder, &device)?;
                    let mut server = Hanging { device, bytes, waiting };
                    let serving = scope.spawn(move || server.serve().map_err(|e| e.to_string()));
                    let mounted = Mounted(folder.to_owned());
                    let outcome = body(&folder.join("disk"), waiting);
                    drop(mounted);
                    match serving.join() {
                        Ok(served) => served?,
                        Err(_) => return Err("the file system panicked".into()),
                    }
                    outcome
                };
                run().map_err(|error| error.to_string())
            });
            thread.join()
        });
        match outcome {
            Ok(outcome) => outcome.map_err(Into::into),
            Err(_) => Err("the thread with the file system panicked".into()),
        }
    }

    /// Answers what comes until it is unmounted.
    fn serve(&mut self) -> Result<()> {
        let mut buffer = vec![0; LONGEST + 4096];
        loop {
            let length = match self.device.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
                Err(error)
                    if error.kind() == ErrorKind::Interrupted
                        || error.raw_os_error() == Some(libc::ENOENT) =>
                {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let request = buffer.get(..length).unwrap_or_default();
            self.answer(request)?;
        }
    }

    fn answer(&mut self, request: &[u8]) -> Result<()> {
        let (operation, unique, node) = (word(request, 4), long(request, 8), long(request, 16));
        let arguments = request.get(HEAD_IN..).unwrap_or_default();
        let answer = match operation {
            FORGET | BATCH_FORGET | INTERRUPT => return Ok(()),
            INIT => Ok(init()),
            LOOKUP if arguments.strip_suffix(b"\0") == Some(NAME) => {
                // Node and generation, both kinds of validity, then what it is.
                let mut entry = Vec::new();
                put(&mut entry, &[NODE, 0, u64::MAX >> 1, u64::MAX >> 1, 0]);
                entry.extend(self.attributes(NODE));
                Ok(entry)
            }
            LOOKUP => Err(libc::ENOENT),
            GETATTR => {
                let mut attributes = Vec::new();
                put(&mut attributes, &[u64::MAX >> 1, 0]);
                attributes.extend(self.attributes(node));
                Ok(attributes)
            }
            OPEN => Ok(vec![0; 16]),
            // File, offset, length.
            READ if long(arguments, 8) + u64::from(word(arguments, 16)) <= READABLE => {
                Ok(vec![0; word(arguments, 16) as usize])
            }
            READ => {
                self.waiting.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            FLUSH | RELEASE => Ok(Vec::new()),
            _ => Err(libc::ENOSYS),
        };
        let (error, body) = answer.map_or_else(|error| (-error, Vec::new()), |body| (0, body));
        let mut message = Vec::with_capacity(HEAD_OUT + body.len());
        message.extend(((HEAD_OUT + body.len()) as u32).to_ne_bytes());
        message.extend(error.to_ne_bytes());
        put(&mut message, &[unique]);
        message.extend(body);
        match self.device.write_all(&message) {
            // Whoever asked is gone.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => Ok(other?),
        }
    }

    /// `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Vec<u8> {
        let (mode, size) = match node {
            NODE => (libc::S_IFREG | 0o600, self.bytes),
            _ => (libc::S_IFDIR | 0o700, 0),
        };
        let mut text = Vec::new();
        put(&mut text, &[node, size, size / 512, 0, 0, 0]);
        for value in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            text.extend(value.to_ne_bytes());
        }
        text
    }
}

/// `struct fuse_init_out`: version 7.31, no options, and the longest write.
fn init() -> Vec<u8> {
    let mut text = Vec::new();
    for value in [7u32, 31, 0, 0, 0, LONGEST as u32, 1] {
        text.extend(value.to_ne_bytes());
    }
    text.resize(64, 0);
    text
}

fn put(text: &mut Vec<u8>, values: &[u64]) {
    values.iter().for_each(|value| text.extend(value.to_ne_bytes()));
}

/// The number at `at`, or 0 where the request ends before.
fn word(text: &[u8], at: usize) -> u32 {
    let bytes = text.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

fn long(text: &[u8], at: usize) -> u64 {
    let bytes = text.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_ne_bytes)
}

fn check(value: libc::c_int) -> Result<()> {
    if value < 0 { Err(Error::last_os_error().into()) } else { Ok(()) }
}

fn mount(folder: &Path, device: &File) -> Result<()> {
    let path = CString::new(folder.as_os_str().as_bytes())?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV;
    // SAFETY: plain system calls on strings that outlive them; the first changes only this thread.
    unsafe {
        check(libc::unshare(libc::CLONE_NEWNS))?;
        let all = libc::MS_REC | libc::MS_PRIVATE;
        check(libc::mount(ptr::null(), c"/".as_ptr(), ptr::null(), all, ptr::null()))?;
        let (name, data) = (c"fuse".as_ptr(), options.as_ptr().cast());
        check(libc::mount(name, path.as_ptr(), name, flags, data))
    }
}

/// Unmounted when dropped, whoever still waits for an answer.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let Ok(path) = CString::new(self.0.as_os_str().as_bytes()) else { return };
        // SAFETY: plain system calls on a string that outlives them. The first ends all waits, and
        // says that the file system is busy.
        unsafe {
            libc::umount2(path.as_ptr(), libc::MNT_FORCE);
            libc::umount2(path.as_ptr(), libc::MNT_DETACH);
        }
    }
}
