//! Unpacked kernels, kept under the hash of the bzImage that they came from.
//!
//! An entry is written once, under no name, then linked to its name with mode 0444: a process that
//! dies half-way leaves nothing, and an entry that is there is whole. The cache only saves time: if
//! it cannot be used, the kernel is unpacked into an unnamed file.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use arch::kernel::{BzImage, ElfKernel, KernelError, KernelImage, PayloadError};

/// An unpacked kernel.
pub(super) struct Unpacked {
    pub(super) file: File,
    pub(super) elf: ElfKernel,
    /// Nobody writes the file: it is an entry of the cache, or has no name.
    pub(super) stable: bool,
}

/// True if the payload is packed in a way that is not known here, so that the image has to unpack
/// itself.
pub(super) fn is_unknown(err: &KernelError) -> bool {
    matches!(
        err,
        KernelError::Payload(PayloadError::Unknown { .. } | PayloadError::Unsupported { .. })
    )
}

/// The directory of the cache: `$XDG_CACHE_HOME/hull`, `~/.cache/hull`, else `/var/cache/hull`.
fn directory() -> PathBuf {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("hull/kernels")
}

/// The kernel inside `image`, whose file is `source`.
pub(super) fn unpacked(source: &mut File, image: &BzImage) -> Result<Unpacked, KernelError> {
    let entry = digest(source).ok().map(|hash| directory().join(format!("{hash}.elf")));
    if let Some(unpacked) = entry.as_deref().and_then(find) {
        return Ok(unpacked);
    }
    tracing::info!("unpacking the kernel");
    let (bytes, elf) = image.unpack(source)?;
    let file = entry
        .and_then(|path| {
            store(&path, &bytes)
                .inspect_err(|err| {
                    tracing::warn!(path = %path.display(), %err, "kernel cache not usable");
                })
                .ok()
        })
        .map_or_else(|| unnamed(&bytes), Ok)
        .map_err(|source| KernelError::Read { offset: 0, source })?;
    Ok(Unpacked { file, elf, stable: true })
}

// Never inlined: the hasher's buffer of 64 KiB would become part of the stack frame of every start,
// and each of its pages is touched on entry.
#[inline(never)]
fn digest(file: &mut File) -> io::Result<blake3::Hash> {
    file.seek(SeekFrom::Start(0))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(&*file)?;
    Ok(hasher.finalize())
}

/// The entry at `path`, if there is one that can be trusted: ours or root's, not writable, in a
/// directory that is the same.
fn find(path: &Path) -> Option<Unpacked> {
    let warn = |what: &str| tracing::warn!(path = %path.display(), "kernel cache entry {what}");
    // Of a pipe that somebody put there, nobody may wait for the other end.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = match File::options().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return None,
        Err(err) => {
            warn(&format!("cannot be used: {err}"));
            return None;
        }
    };
    let metadata = file.metadata().ok()?;
    let directory = fs::metadata(path.parent()?).ok()?;
    if !metadata.is_file() || !is_ours(&metadata, 0o222) || !is_ours(&directory, 0o022) {
        warn("is not used: others own it, or may write it");
        return None;
    }
    match KernelImage::parse(&mut file) {
        Ok(KernelImage::Elf(elf)) => Some(Unpacked { file, elf, stable: true }),
        _ => {
            warn("is damaged and replaced");
            let _ = fs::remove_file(path);
            None
        }
    }
}

/// Writes a new entry and opens it for reading: what was written, whatever is at `path` by then.
fn store(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    if !is_ours(&fs::metadata(directory)?, 0o022) {
        return Err(io::Error::other("others may write the directory, or own it"));
    }
    let mut file =
        File::options().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)?;
    file.write_all(bytes)?;
    file.set_permissions(Permissions::from_mode(0o444))?;
    // The data must be there before the name: after a crash of the host an entry is whole.
    file.sync_all()?;
    let written = format!("/proc/self/fd/{}", file.as_raw_fd());
    let entry = File::open(&written)?;
    match link(Path::new(&written), path) {
        // Another process was faster, and its entry has the same bytes: or it is none.
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
            if find(path).is_none() {
                let aside = path.with_extension(std::process::id().to_string());
                let _ = fs::remove_file(&aside);
                link(Path::new(&written), &aside)?;
                fs::rename(&aside, path).inspect_err(|_| drop(fs::remove_file(&aside)))?;
            }
        }
        linked => linked?,
    }
    Ok(entry)
}

/// linkat(2) of what `from`, a link of /proc, stands for.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    let from = std::ffi::CString::new(from.as_os_str().as_encoded_bytes())?;
    let to = std::ffi::CString::new(to.as_os_str().as_encoded_bytes())?;
    let (here, follow) = (libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
    // SAFETY: both are valid C strings.
    match unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), follow) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// True if a file is this user's or root's, and nobody may write it by the bits of `writable`.
fn is_ours(metadata: &fs::Metadata, writable: u32) -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    let own = metadata.uid() == unsafe { libc::geteuid() } || metadata.uid() == 0;
    own && metadata.mode() & writable == 0
}

/// `bytes` in a file without a name.
fn unnamed(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name is a valid C string; the descriptor is new and owned by nobody else.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"hull-kernel".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        <File as std::os::fd::FromRawFd>::from_raw_fd(fd)
    };
    file.write_all(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn an_entry_is_read_only_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/x.elf");
        let mut file = store(&path, b"bytes").unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bytes");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o444);
        store(&path, b"bytes").unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_entry_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.elf");
        store(&path, b"not a kernel").unwrap();
        assert!(find(&path).is_none());
        assert!(!path.exists());
    }

    #[test]
    fn what_others_may_write_is_not_trusted_but_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.elf");
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, b"foreign").unwrap();
        let spoil: [(&str, &dyn Fn()); 3] = [
            ("writable", &|| fs::write(&path, b"anything").unwrap()),
            ("a link", &|| std::os::unix::fs::symlink(&elsewhere, &path).unwrap()),
            ("a pipe", &|| {
                let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
                // SAFETY: a valid C string.
                assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o444) }, 0);
            }),
        ];
        for (what, spoil) in spoil {
            let _ = fs::remove_file(&path);
            spoil();
            assert!(find(&path).is_none(), "{what}");
            let mut text = String::new();
            store(&path, b"bytes").unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "bytes", "{what}");
            let entry = fs::symlink_metadata(&path).unwrap();
            assert!(entry.is_file() && entry.mode() & 0o777 == 0o444, "{what}");
            assert_eq!(fs::read(&elsewhere).unwrap(), b"foreign");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "{what}");
        }
    }

    #[test]
    fn a_directory_that_others_may_write_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.elf");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(store(&path, b"bytes").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
