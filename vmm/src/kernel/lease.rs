//! A read lease on a kernel file that guests map: whoever opens it for writing waits until we have
//! let go of it (fcntl(2), "Leases").

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `F_SETSIG` of `linux/fcntl.h`, which libc does not name.
const F_SETSIG: i32 = 10;

/// The signal that says a lease is about to be broken; arrives at `main`'s signalfd.
pub fn break_signal() -> i32 {
    libc::SIGRTMIN() + 1
}

/// A held lease, or the knowledge that none is needed. Given up when dropped.
#[derive(Debug)]
pub struct Lease {
    file: Option<File>,
}

impl Lease {
    /// Takes a read lease on `file`.
    ///
    /// # Errors
    /// Somebody has the file open for writing, it is another user's, or its file system has no
    /// leases.
    pub fn take(file: &File) -> io::Result<Lease> {
        let file = file.try_clone()?;
        let fd = file.as_raw_fd();
        // SAFETY: fcntl with integer arguments.
        let result = unsafe {
            if libc::fcntl(fd, F_SETSIG, break_signal()) < 0 {
                -1
            } else {
                libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK)
            }
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Lease { file: Some(file) })
    }

    /// For a file that nobody writes: Hull's own cache copy.
    pub fn not_needed() -> Lease {
        Lease { file: None }
    }

    /// True if there is a lease that can be broken.
    pub fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            // SAFETY: fcntl with integer arguments.
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_refused_while_there_is_a_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = File::open(file.path()).unwrap();
        assert!(Lease::take(&reader).is_err());
        let path = file.into_temp_path();
        let lease = Lease::take(&File::open(&path).unwrap());
        assert!(lease.unwrap().is_held());
        // Given up: a writer does not have to wait.
        File::options().write(true).open(&path).unwrap();
    }
}
