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

/// The entry at `path`, if there is one that can be trusted: ours or root's, and not writable.
fn find(path: &Path) -> Option<Unpacked> {
    let mut file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    // SAFETY: geteuid has no arguments and cannot fail.
    let own = metadata.uid() == unsafe { libc::geteuid() } || metadata.uid() == 0;
    if !own || !metadata.is_file() || metadata.mode() & 0o222 != 0 {
        tracing::warn!(path = %path.display(), "kernel cache entry ignored: wrong owner or mode");
        return None;
    }
    match KernelImage::parse(&mut file) {
        Ok(KernelImage::Elf(elf)) => Some(Unpacked { file, elf, stable: true }),
        _ => {
            tracing::warn!(path = %path.display(), "kernel cache entry is damaged and replaced");
            let _ = fs::remove_file(path);
            None
        }
    }
}

/// Writes a new entry and opens it.
fn store(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut file =
        File::options().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)?;
    file.write_all(bytes)?;
    file.set_permissions(Permissions::from_mode(0o444))?;
    // The data must be there before the name: after a crash of the host an entry is whole.
    file.sync_all()?;
    let from = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())?;
    // SAFETY: both are valid C strings.
    let linked = unsafe {
        libc::linkat(
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            libc::AT_SYMLINK_FOLLOW,
        )
    };
    if linked < 0 {
        let err = io::Error::last_os_error();
        // Another process was faster; its entry has the same bytes.
        if err.kind() != io::ErrorKind::AlreadyExists {
            return Err(err);
        }
    }
    drop(file);
    File::open(path)
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
    fn a_writable_entry_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.elf");
        fs::write(&path, b"anything").unwrap();
        assert!(find(&path).is_none());
        assert!(path.exists());
    }
}
