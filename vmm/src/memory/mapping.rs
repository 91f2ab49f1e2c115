//! One mapped range of host address space.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Mappings are aligned to this, so that guest and host huge pages coincide.
const ALIGN: usize = 2 << 20;

/// A private mapping, unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory; access to it is the owner's business.
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives out nothing but its address and length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes of zeroed memory, 2 MiB aligned. With `huge_pages` they come from the
    /// host's pool of 2 MiB pages, and `len` must be a multiple of that.
    ///
    /// # Errors
    /// The host refused.
    pub fn anonymous(len: u64, huge_pages: bool) -> io::Result<Mapping> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // Small mappings (the identity pages) need no alignment beyond a page.
        let slack = if len >= ALIGN && !huge_pages { ALIGN } else { 0 };
        let reserve =
            len.checked_add(slack).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        if huge_pages {
            // Without MAP_NORESERVE, so that a pool that is too small is refused now, not by a
            // SIGBUS later.
            flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        }
        let base = map(std::ptr::null_mut(), reserve, flags, -1, 0)?;
        if slack == 0 {
            return Ok(Mapping { ptr: base, len });
        }
        let head = base.as_ptr().align_offset(ALIGN);
        // SAFETY: head < ALIGN = slack, so both cut-offs lie inside the fresh mapping, outside the
        // part that is kept.
        unsafe {
            let start = base.as_ptr().add(head);
            if head > 0 {
                libc::munmap(base.as_ptr().cast(), head);
            }
            if slack > head {
                libc::munmap(start.add(len).cast(), slack - head);
            }
            Ok(Mapping { ptr: NonNull::new_unchecked(start), len })
        }
    }

    /// Length in bytes, never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// First address.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The bytes. Only for memory that no guest runs on yet.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` readable and writable bytes, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }

    /// Replaces `len` bytes at `at` by a copy-on-write view of `file` from `offset`.
    ///
    /// # Errors
    /// The range is not inside this mapping, or the host refused; nothing is changed then.
    pub(super) fn overlay_file(
        &self,
        at: u64,
        len: u64,
        file: &File,
        offset: u64,
    ) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        self.replace(at, len, flags, file.as_raw_fd(), offset)
    }

    /// Replaces `len` bytes at `at` by a view of `file` from `offset`: what is written is in the file.
    ///
    /// # Errors
    /// As of [`Mapping::overlay_file`].
    pub(super) fn share_file(&self, at: u64, len: u64, file: &File, offset: u64) -> io::Result<()> {
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        self.replace(at, len, flags, file.as_raw_fd(), offset)
    }

    /// Replaces `len` bytes at `at` by zeroes.
    ///
    /// # Errors
    /// As of [`Mapping::overlay_file`].
    pub(super) fn clear(&self, at: u64, len: u64) -> io::Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        self.replace(at, len, flags, -1, 0)
    }

    fn replace(&self, at: u64, len: u64, flags: i32, fd: i32, offset: u64) -> io::Result<()> {
        let at = usize::try_from(at).map_err(|_| invalid())?;
        let len = usize::try_from(len).map_err(|_| invalid())?;
        let offset = libc::off_t::try_from(offset).map_err(|_| invalid())?;
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid());
        }
        // SAFETY: at + len <= self.len.
        let target = unsafe { self.ptr.as_ptr().add(at) };
        map(target, len, flags | libc::MAP_FIXED, fd, offset).map(|_| ())
    }

    /// Replaces `len` bytes at `at` by anonymous memory with the same contents. Nobody may write to
    /// the range meanwhile.
    ///
    /// # Errors
    /// The range is not inside this mapping, or the host has no memory; nothing is changed then.
    pub(super) fn detach(&self, at: u64, len: u64) -> io::Result<()> {
        let at = usize::try_from(at).map_err(|_| invalid())?;
        let len = usize::try_from(len).map_err(|_| invalid())?;
        if at.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let copy = map(std::ptr::null_mut(), len, flags, -1, 0)?;
        // SAFETY: at + len <= self.len; the new mapping has `len` bytes and is nobody else's. With
        // MREMAP_FIXED it takes the place of the old pages in one step.
        unsafe {
            let target = self.ptr.as_ptr().add(at);
            std::ptr::copy_nonoverlapping(target, copy.as_ptr(), len);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let moved = libc::mremap(copy.as_ptr().cast(), len, len, flags, target);
            if moved == libc::MAP_FAILED {
                let err = io::Error::last_os_error();
                libc::munmap(copy.as_ptr().cast(), len);
                return Err(err);
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own; nobody may use it after its owner is gone.
        unsafe { libc::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn map(
    at: *mut u8,
    len: usize,
    flags: i32,
    fd: i32,
    offset: libc::off_t,
) -> io::Result<NonNull<u8>> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: with MAP_FIXED the callers pass a range that they own; without, the kernel chooses
    // a free one.
    let ptr = unsafe { libc::mmap(at.cast(), len, prot, flags, fd, offset) };
    if ptr == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(ptr.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}
