//! From a kernel file to a guest that can be entered.
//!
//! ```text
//!   vmlinux ───────────────────────────> segments mapped copy-on-write (or copied)
//!   bzImage ── unpack, once ── cache ──┘                 │
//!        └──── --boot bzimage: its own 64-bit entry      v
//!   initrd ──────────────> as high as it fits ──> placement check ──> zero page / PVH info
//! ```
//!
//! `arch` parses images and writes the boot protocols; this module opens files, decides what is
//! mapped and what is copied, and keeps a mapped file from changing under the guest.

mod cache;
mod lease;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use arch::boot::cpu_state::PageSize;
use arch::boot::linux64::LinuxBoot;
use arch::boot::placement::{self, Extent, PlacementError};
use arch::boot::pvh::PvhBoot;
use arch::boot::{BootError, Entry, Initrd, linux64, pvh};
use arch::kernel::{BzImage, ElfKernel, KernelImage, SetupHeader};
use vm_memory::{Bytes, GuestAddress};

use crate::config::{BootMode, KernelConfig};
use crate::memory::{GuestRam, MemoryError, PAGE_SIZE};
pub use lease::{Lease, break_signal as lease_break_signal};

/// Segments smaller than this are copied: a mapping costs more than it saves.
const MAP_THRESHOLD: u64 = 64 * 1024;

/// Why a machine has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened.
    #[error("cannot open the {what} {}", path.display())]
    Open {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A directory, device or socket.
    #[error("the {what} {} is not a regular file", path.display())]
    NotAFile {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// The kernel file is not one that can be booted.
    #[error("cannot use the kernel {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: arch::kernel::KernelError,
    },
    /// `--boot` asks for an entry that this kernel does not have.
    #[error("the kernel {} cannot be booted this way: {reason}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        reason: &'static str,
    },
    /// The host's KVM cannot run the kernel.
    #[error("the kernel {} cannot run on this host: its KVM has no hardware behind it (PVM), and a kernel not built for that stops before its first message", path.display())]
    NoHardware {
        /// The file.
        path: PathBuf,
    },
    /// The root disk's driver is a module and there is nothing to load it from.
    #[error("the kernel {} has no built-in {driver} driver, and there is no initrd to load it from: the root disk could not be mounted", path.display())]
    ModularRoot {
        /// The file.
        path: PathBuf,
        /// Module that is missing.
        driver: &'static str,
    },
    /// Kernel or initrd do not fit into the guest's memory.
    #[error("kernel and initrd do not fit into the guest's memory")]
    Placement(#[from] PlacementError),
    /// A file could not be read, or changed while it was.
    #[error("cannot read the {what} {}", path.display())]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Guest memory refused a range.
    #[error("cannot place the kernel in guest memory")]
    Memory(#[from] MemoryError),
    /// The boot protocol cannot express it.
    #[error("cannot hand the kernel over")]
    Boot(#[from] BootError),
}

/// What loading depends on beside the files.
pub struct Context<'a> {
    /// The whole command line.
    pub cmdline: &'a str,
    /// A disk holds the root file system, so the kernel must be able to reach it.
    pub root_disk: bool,
    /// KVM has no hardware behind it.
    pub pvm: bool,
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
    /// Pages for the first page tables.
    pub page_size: PageSize,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// How vCPU 0 enters it.
    pub entry: Entry,
    /// Ranges of RAM that map a file that others may write, and the lease that tells us first.
    pub leased: Option<(Lease, Vec<(u64, u64)>)>,
}

/// Loads kernel and initrd and writes what the boot protocol wants.
///
/// # Errors
/// [`LoadError`]; the guest's memory is then in no useful state.
pub fn load(
    config: &KernelConfig,
    ram: &mut GuestRam,
    context: &Context<'_>,
) -> Result<LoadedKernel, LoadError> {
    let path = &config.path;
    let kernel_error = |source| LoadError::Kernel { path: path.clone(), source };
    let mut file = open("kernel", path)?;
    let image = KernelImage::parse(&mut file).map_err(kernel_error)?;
    let wrong = |reason| Err(LoadError::Entry { path: path.clone(), reason });
    let mut loader = Loader { config, ram, context, leased: None };
    let entry = match (image, config.boot) {
        (KernelImage::Elf(_), BootMode::Bzimage) => {
            return wrong("it is an ELF file, not a bzImage");
        }
        (KernelImage::Elf(elf), boot) => {
            loader.check(&file, &elf)?;
            let lease = Lease::take(&file).ok();
            loader.boot_elf(&file, &elf, lease, boot, None)?
        }
        (KernelImage::BzImage(image), BootMode::Bzimage) => {
            loader.check_bzimage()?;
            // Whether it has its drivers is seen inside only.
            if loader.needs_drivers()
                && let Ok(unpacked) = cache::unpacked(&mut file, &image)
            {
                loader.check(&unpacked.file, &unpacked.elf)?;
            }
            loader.boot_bzimage(&mut file, &image)?
        }
        (KernelImage::BzImage(image), boot) => {
            loader.check_bzimage()?;
            match cache::unpacked(&mut file, &image) {
                Ok(unpacked) => {
                    loader.check(&unpacked.file, &unpacked.elf)?;
                    loader.boot_unpacked(&unpacked, boot, &image.header)?
                }
                // An unknown compression, or none of ours: the image can still unpack itself.
                Err(err) if boot == BootMode::Auto && cache::is_unknown(&err) => {
                    tracing::info!(%err, "booting the bzImage by its own entry");
                    loader.boot_bzimage(&mut file, &image)?
                }
                Err(err) => return Err(kernel_error(err)),
            }
        }
    };
    Ok(LoadedKernel { entry, leased: loader.leased })
}

fn open(what: &'static str, path: &Path) -> Result<File, LoadError> {
    let error = |source| LoadError::Open { what, path: path.to_owned(), source };
    // O_NONBLOCK: a FIFO must not make us wait for a writer.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(error)?;
    if !file.metadata().map_err(error)?.is_file() {
        return Err(LoadError::NotAFile { what, path: path.to_owned() });
    }
    Ok(file)
}

struct Loader<'a> {
    config: &'a KernelConfig,
    ram: &'a mut GuestRam,
    context: &'a Context<'a>,
    leased: Option<(Lease, Vec<(u64, u64)>)>,
}

impl Loader<'_> {
    fn check_bzimage(&self) -> Result<(), LoadError> {
        if self.context.pvm && !self.config.force {
            return Err(LoadError::NoHardware { path: self.config.path.clone() });
        }
        Ok(())
    }

    /// True if the kernel has to reach a root disk by drivers of its own.
    fn needs_drivers(&self) -> bool {
        self.context.root_disk && self.config.initrd.is_none() && !self.config.force
    }

    /// Refuses a kernel that is known not to come up here, rather than let a user wait for it.
    fn check(&self, file: &File, elf: &ElfKernel) -> Result<(), LoadError> {
        if self.config.force {
            return Ok(());
        }
        let path = || self.config.path.clone();
        if self.context.pvm && elf.is_linux {
            return Err(LoadError::NoHardware { path: path() });
        }
        if self.needs_drivers() && elf.is_linux {
            for driver in ["virtio_blk", "virtio_mmio"] {
                let found = contains(file, driver).map_err(|source| LoadError::Read {
                    what: "kernel",
                    path: path(),
                    source,
                })?;
                if !found {
                    return Err(LoadError::ModularRoot { path: path(), driver });
                }
            }
        }
        Ok(())
    }

    fn boot_unpacked(
        &mut self,
        unpacked: &cache::Unpacked,
        boot: BootMode,
        header: &SetupHeader,
    ) -> Result<Entry, LoadError> {
        let lease = unpacked.stable.then(Lease::not_needed);
        self.boot_elf(&unpacked.file, &unpacked.elf, lease, boot, Some(header))
    }

    fn boot_elf(
        &mut self,
        file: &File,
        elf: &ElfKernel,
        lease: Option<Lease>,
        boot: BootMode,
        header: Option<&SetupHeader>,
    ) -> Result<Entry, LoadError> {
        // A kernel that was linked to be relocated needs its init_size free, .bss and brk included.
        let kernel = Extent::new("the kernel", elf.start(), elf.end() - elf.start());
        let reserve =
            header.map_or(kernel.size, |header| kernel.size.max(u64::from(header.0.init_size)));
        let keep_free = Extent { size: reserve, ..kernel.clone() };
        let extents: Vec<Extent> = elf
            .segments
            .iter()
            .map(|segment| Extent::new("the kernel", segment.gpa, segment.mem_size))
            .collect();
        let initrd = self.place_initrd(header, &keep_free, extents)?;
        let large = elf.segments.iter().any(|segment| segment.file_size >= MAP_THRESHOLD);
        let map = lease.as_ref().filter(|_| large && self.ram.maps_files());
        let mut mapped = Vec::new();
        for segment in &elf.segments {
            let range = (segment.file_offset, segment.gpa, segment.file_size);
            self.load_segment(file, range, map, &mut mapped)?;
        }
        if let Some(lease) = lease.filter(|lease| lease.is_held() && !mapped.is_empty()) {
            self.leased = Some((lease, mapped));
        }
        match boot {
            BootMode::Pvh => {
                let entry = elf.pvh_entry.ok_or_else(|| LoadError::Entry {
                    path: self.config.path.clone(),
                    reason: "it has no PVH entry (CONFIG_PVH)",
                })?;
                let boot = PvhBoot {
                    ram_size: self.ram.size(),
                    entry,
                    cmdline: self.context.cmdline.as_bytes(),
                    initrd,
                    rsdp: Some(self.context.rsdp),
                };
                Ok(pvh::write_boot(self.ram.memory().guest().as_ref(), &boot)?)
            }
            BootMode::Auto | BootMode::Bzimage => {
                self.write_linux(elf.entry, &keep_free, initrd, header)
            }
        }
    }

    /// Loads the protected-mode part of `image` and enters it at its own 64-bit entry.
    fn boot_bzimage(&mut self, file: &mut File, image: &BzImage) -> Result<Entry, LoadError> {
        let kernel =
            Extent::new("the kernel", image.load_address, image.init_size.max(image.code_size));
        let initrd = self.place_initrd(Some(&image.header), &kernel, vec![kernel.clone()])?;
        self.copy(file, image.code_offset, image.load_address, image.code_size, "kernel")?;
        self.write_linux(image.entry(), &kernel, initrd, Some(&image.header))
    }

    fn write_linux(
        &self,
        entry: u64,
        kernel: &Extent,
        initrd: Option<Initrd>,
        header: Option<&SetupHeader>,
    ) -> Result<Entry, LoadError> {
        let boot = LinuxBoot {
            ram_size: self.ram.size(),
            entry,
            cmdline: self.context.cmdline.as_bytes(),
            initrd,
            header,
            rsdp: Some(self.context.rsdp),
            kernel_end: kernel.start + kernel.size,
            page_size: self.context.page_size,
        };
        Ok(linux64::write_boot(self.ram.memory().guest().as_ref(), &boot)?)
    }

    /// Loads the initrd clear of `kernel`, and checks that everything has its place.
    fn place_initrd(
        &mut self,
        header: Option<&SetupHeader>,
        kernel: &Extent,
        mut extents: Vec<Extent>,
    ) -> Result<Option<Initrd>, LoadError> {
        let ram_size = self.ram.size();
        let Some(path) = &self.config.initrd else {
            placement::check(ram_size, &extents)?;
            return Ok(None);
        };
        let file = open("initrd", path)?;
        let read = |source| LoadError::Read { what: "initrd", path: path.clone(), source };
        let size = file.metadata().map_err(read)?.len();
        if size == 0 {
            return Err(read(io::Error::other("the file is empty")));
        }
        let addr_max = header.map(|header| header.0.initrd_addr_max);
        // The kernel's own problem is reported before the initrd's.
        placement::check(ram_size, &extents)?;
        let address = placement::initrd_address(ram_size, size, addr_max, kernel)?;
        extents.push(Extent::new("the initrd", address, size));
        placement::check(ram_size, &extents)?;
        self.copy(&file, 0, address, size, "initrd")?;
        Ok(Some(Initrd { address, size }))
    }

    /// Puts `len` bytes of `file` at `gpa`: whole pages by mapping them if it pays and `map`
    /// says that nobody changes them, the rest by copying. Mapped ranges are added to `mapped`.
    fn load_segment(
        &mut self,
        file: &File,
        (offset, gpa, len): (u64, u64, u64),
        map: Option<&Lease>,
        mapped: &mut Vec<(u64, u64)>,
    ) -> Result<(), LoadError> {
        let congruent = offset % PAGE_SIZE == gpa % PAGE_SIZE;
        let start = gpa.next_multiple_of(PAGE_SIZE);
        let end = (gpa + len) / PAGE_SIZE * PAGE_SIZE;
        let pays = congruent && end.saturating_sub(start) >= MAP_THRESHOLD;
        let Some(lease) = map.filter(|_| pays) else {
            return self.copy(file, offset, gpa, len, "kernel");
        };
        let head = start - gpa;
        self.copy(file, offset, gpa, head, "kernel")?;
        self.ram.map_file(file, offset + head, start, end - start, lease.is_held())?;
        mapped.push((start, end - start));
        self.copy(file, offset + (end - gpa), end, gpa + len - end, "kernel")
    }

    fn copy(
        &self,
        file: &File,
        offset: u64,
        gpa: u64,
        len: u64,
        what: &'static str,
    ) -> Result<(), LoadError> {
        let path = if what == "initrd" { self.config.initrd.clone() } else { None };
        let path = path.unwrap_or_else(|| self.config.path.clone());
        let mut reader = file;
        reader
            .seek(SeekFrom::Start(offset))
            .and_then(|_| {
                let len = usize::try_from(len).map_err(io::Error::other)?;
                self.ram
                    .memory()
                    .guest()
                    .read_exact_volatile_from(GuestAddress(gpa), &mut reader, len)
                    .map_err(io::Error::other)
            })
            .map_err(|source| LoadError::Read { what, path, source })
    }
}

/// True if `text` occurs in `file`.
fn contains(file: &File, text: &str) -> io::Result<bool> {
    let mut reader = file;
    reader.seek(SeekFrom::Start(0))?;
    let mut window = vec![0; 1 << 20];
    let mut kept = 0;
    loop {
        let read = match reader.read(&mut window[kept..]) {
            Ok(0) => return Ok(false),
            Ok(read) => kept + read,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        };
        if memchr::memmem::find(&window[..read], text.as_bytes()).is_some() {
            return Ok(true);
        }
        // The text may straddle two reads.
        let tail = read.min(text.len() - 1);
        window.copy_within(read - tail..read, 0);
        kept = tail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn text_is_found_across_reads() {
        let mut file = tempfile::tempfile().unwrap();
        let mut bytes = vec![b'.'; (1 << 20) - 4];
        bytes.extend_from_slice(b"virtio_blk");
        file.write_all(&bytes).unwrap();
        assert!(contains(&file, "virtio_blk").unwrap());
        assert!(!contains(&file, "virtio_net").unwrap());
    }

    #[test]
    fn a_directory_and_a_missing_file_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(open("kernel", dir.path()), Err(LoadError::NotAFile { .. })));
        let missing = dir.path().join("none");
        assert!(matches!(open("kernel", &missing), Err(LoadError::Open { .. })));
    }
}
