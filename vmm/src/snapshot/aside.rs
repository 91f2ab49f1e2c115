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
use std::time::{Duration, Instant};

use super::store::StoreError;

/// How long somebody else may move files in a folder, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_millis(10);
/// Most links that lead to a file, as the kernel has it.
const MOST_LINKS: usize = 40;

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
        // Without a slash behind it.
        let name = target.file_name().ok_or_else(|| StoreError::NotAFile(target.to_owned()))?;
        let target = followed(&target.with_file_name(name));
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
        let deadline = Instant::now() + PATIENCE;
        while !lock(&folder, libc::LOCK_EX | libc::LOCK_NB) {
            // Whoever may read the folder can hold it.
            if Instant::now() > deadline {
                let busy = io::Error::from_raw_os_error(libc::EWOULDBLOCK);
                return Err(self.failed("have to itself the folder of")(busy));
            }
            std::thread::sleep(AGAIN);
        }
        Ok(folder)
    }

    /// Removes what others who died left beside the same place.
    pub(super) fn clean(&self) {
        clean(&self.target);
    }
}

/// The file that `path` names, through links. What cannot be followed is as it is.
fn followed(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Ok(next) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("")).join(next);
    }
    path
}

/// Removes what others who died left beside `target`. Nothing of it belongs to the state that is there.
pub(super) fn clean(target: &Path) {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let prefix = prefix(target);
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

/// The attribute of a memory file that says whose it is.
const LABEL: &std::ffi::CStr = c"user.hull.snapshot";

/// Notes on a memory file of which snapshot it is. A file system that cannot do that, or a program that copies
/// without, leaves it out.
pub(super) fn label(file: &File, id: &str) {
    // SAFETY: texts and their lengths.
    unsafe {
        libc::fsetxattr(file.as_raw_fd(), LABEL.as_ptr(), id.as_ptr().cast(), id.len(), 0);
    }
}

/// Of which snapshot a memory file is, if it says so.
pub(super) fn labelled(file: &File) -> Option<String> {
    let mut bytes = [0u8; 64];
    // SAFETY: the buffer is as long as is said.
    let len = unsafe {
        let (fd, name) = (file.as_raw_fd(), LABEL.as_ptr());
        libc::fgetxattr(fd, name, bytes.as_mut_ptr().cast(), bytes.len())
    };
    let bytes = bytes.get(..usize::try_from(len).ok()?)?;
    String::from_utf8(bytes.to_vec()).ok()
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
