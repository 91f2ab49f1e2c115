//! `--pidfile`: a file with the process id, locked while the machine lives.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use vmm::files::remove_if_same;

use crate::last_words::Leftovers;

/// More than a process id and white space are long, in bytes.
const LONGEST: u64 = 32;

/// Why there is no pid file.
#[derive(Debug, thiserror::Error)]
pub enum PidFileError {
    /// The system refused.
    #[error("cannot write the pid file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is a pipe, a device, a folder.
    #[error("the pid file {} is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// It holds something else.
    #[error("{} does not hold a process id; it is not overwritten", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Another machine's.
    #[error("the pid file {} belongs to a process that lives", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
    },
}

/// A pid file, removed when dropped unless another has taken its place.
#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    c_path: CString,
    identity: (u64, u64),
    // Its lock says that the process lives.
    _file: File,
}

impl PidFile {
    /// Writes this process's id to the file at `path`. A file that is there must be empty or hold the
    /// id of a process that is gone; links are not followed.
    ///
    /// # Errors
    /// [`PidFileError`]; a file that is another's is as it was then.
    pub fn create(path: &Path) -> Result<PidFile, PidFileError> {
        let failed = |source| PidFileError::Io { path: path.to_owned(), source };
        let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|e| failed(e.into()))?;
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o644)
                // A pipe without a reader would make the caller wait.
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path)
                .map_err(failed)?;
            let ours = file.metadata().map_err(failed)?;
            if !ours.is_file() {
                return Err(PidFileError::NotAFile { path: path.to_owned() });
            }
            // SAFETY: flock has no memory arguments.
            if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } < 0 {
                let err = io::Error::last_os_error();
                return Err(match err.kind() {
                    io::ErrorKind::WouldBlock => PidFileError::Locked { path: path.to_owned() },
                    _ => failed(err),
                });
            }
            let identity = (ours.dev(), ours.ino());
            // Between opening and locking its last owner may have removed it.
            let here = |now: fs::Metadata| (now.dev(), now.ino()) == identity;
            if !fs::symlink_metadata(path).is_ok_and(here) {
                continue;
            }
            let mut text = Vec::new();
            (&file).take(LONGEST).read_to_end(&mut text).map_err(failed)?;
            let number =
                text.iter().all(|byte| byte.is_ascii_digit() || byte.is_ascii_whitespace());
            if !number || text.len() as u64 == LONGEST {
                return Err(PidFileError::Foreign { path: path.to_owned() });
            }
            let id = std::process::id();
            let written = file.set_len(0).and_then(|()| {
                io::Seek::rewind(&mut file)?;
                writeln!(file, "{id}")
            });
            let made = PidFile { path: path.to_owned(), c_path, identity, _file: file };
            // An error from here on removes the file.
            return written.map(|()| made).map_err(failed);
        }
    }

    /// Tells signal handlers to remove it.
    pub fn leave_to(&self, leftovers: &mut Leftovers) {
        let (device, inode) = self.identity;
        leftovers.add_if_same(&self.path, device, inode);
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        remove_if_same(&self.c_path, self.identity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_somebody_else_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        for text in ["precious\n", "12\nroot\n", "1234567890123456789012345678901234567890\n"] {
            fs::write(&path, text).unwrap();
            assert!(matches!(PidFile::create(&path), Err(PidFileError::Foreign { .. })));
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(PidFile::create(&link), Err(PidFileError::Io { .. })));
        assert!(link.is_symlink());
        assert!(PidFile::create(folder.path()).is_err());
    }

    #[test]
    fn a_stale_id_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        fs::write(&path, "1234567\n").unwrap();
        let first = PidFile::create(&path).unwrap();
        let own = format!("{}\n", std::process::id());
        assert_eq!(fs::read_to_string(&path).unwrap(), own);
        assert!(matches!(PidFile::create(&path), Err(PidFileError::Locked { .. })));
        assert_eq!(fs::read_to_string(&path).unwrap(), own);
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn the_file_of_a_successor_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let first = PidFile::create(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = PidFile::create(&path).unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }
}
