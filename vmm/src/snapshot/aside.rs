//! Files that are written beside the place where they belong, and moved there when they are whole.
//!
//! Two files cannot be moved at once. The state is moved first, and says what the memory file is called aside:
//! until that was moved too, it is found there. So whenever a process or the host dies,
//! the files at the two paths are those of before or the new ones.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::store::StoreError;

/// Ends the names of files that are not in their place.
const SUFFIX: &str = ".new";

/// The file of `target` aside.
fn path(target: &Path, word: &str) -> PathBuf {
    let mut name = prefix(target);
    name.push(word);
    name.push(SUFFIX);
    target.with_file_name(name)
}

fn prefix(target: &Path) -> OsString {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".");
    name
}

/// The file that belongs at `target`: there, or still aside.
pub(super) fn find(target: &Path, word: &str) -> PathBuf {
    let aside = path(target, word);
    if is_word(word) && aside.is_file() { aside } else { target.to_owned() }
}

/// Part of a name of a file.
fn is_word(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// A file beside its place. Gone when dropped, unless it was moved there.
pub(super) struct Aside {
    pub(super) file: File,
    path: PathBuf,
    target: PathBuf,
    placed: bool,
}

impl Aside {
    /// A new one for `target`, which is followed where it is a link.
    pub(super) fn new(target: &Path, word: &str) -> Result<Aside, StoreError> {
        let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
        match fs::metadata(&target) {
            Ok(there) if !there.is_file() => return Err(StoreError::NotAFile(target)),
            _ => {}
        }
        let path = path(&target, word);
        let mut options = File::options();
        // What a guest has in its memory is for nobody else.
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(|source| StoreError::File {
            verb: "make a file beside",
            path: target.clone(),
            source,
        })?;
        // Whoever cleans up later sees that it is in use.
        lock(&file, libc::LOCK_SH);
        Ok(Aside { file, path, target, placed: false })
    }

    pub(super) fn failed(
        &self,
        verb: &'static str,
    ) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = self.target.clone();
        move |source| StoreError::File { verb, path, source }
    }

    pub(super) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(self.failed("write out"))
    }

    /// Its name is on the disk too.
    pub(super) fn sync_folder(&self) -> Result<(), StoreError> {
        let folder = self.folder().and_then(|folder| folder.sync_all());
        folder.map_err(self.failed("write out the folder of"))
    }

    fn folder(&self) -> io::Result<File> {
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))
    }

    /// Moves it into its place. Where it is then is not on the disk before its folder is.
    pub(super) fn place(&mut self) -> Result<(), StoreError> {
        fs::rename(&self.path, &self.target).map_err(self.failed("move into its place"))?;
        self.placed = true;
        Ok(())
    }

    /// True if both are in one folder.
    pub(super) fn is_beside(&self, other: &Aside) -> bool {
        self.target.parent() == other.target.parent()
    }

    /// It stays where it is: the state that names it is in its place.
    pub(super) fn keep(&mut self) {
        self.placed = true;
    }

    /// Waits until nobody else moves files in this folder. Over when the file is dropped.
    pub(super) fn alone(&self) -> Result<File, StoreError> {
        let folder = self.folder().map_err(self.failed("look at the folder of"))?;
        lock(&folder, libc::LOCK_EX);
        Ok(folder)
    }

    /// Removes what others who died left beside the same place. Nothing of it belongs to the state that is
    /// there now.
    pub(super) fn clean(&self) {
        let folder = self.target.parent().unwrap_or(Path::new("."));
        let prefix = prefix(&self.target);
        let left_over = |name: &OsStr| {
            let name = name.as_encoded_bytes();
            name.strip_prefix(prefix.as_encoded_bytes())
                .and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()))
                .is_some_and(|word| std::str::from_utf8(word).is_ok_and(is_word))
        };
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if left_over(&entry.file_name())
                && let Ok(file) = File::open(entry.path())
                && lock(&file, libc::LOCK_EX | libc::LOCK_NB)
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// Locks a file (flock(2)) until it is closed. A file system without locks has one user.
fn lock(file: &File, how: i32) -> bool {
    // SAFETY: flock has no memory arguments.
    unsafe { libc::flock(file.as_raw_fd(), how) == 0 }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
