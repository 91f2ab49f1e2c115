//! Opening overlays with everything below.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bitmap::{Bitmap, UNSAVED};
use super::format::{BITMAP_START, BLOCKS_PER_PAGE, NO_ID, NOTE_START, PAGE};
use super::make::create_unsynced;
use super::{
    BaseFormat, FormatError, Header, Id, Layer, Note, OpenError, Overlay, OverlayError, Owners,
    Spot, sync,
};
use crate::virtio::blk::DiskFile;
use crate::virtio::blk::file::{direct_alignment, go_direct, lock, reopened};

/// How a chain is opened.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Access {
    pub(super) read_only: bool,
    pub(super) direct: bool,
    /// Locks are taken. Somebody who only looks does without.
    pub(super) lock: bool,
    /// The base may have been written since.
    pub(super) any_base: bool,
}

/// The folder that a file is in.
pub(in crate::virtio::blk) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Overlay {
    /// Opens the overlay at `path`, and all that is below it read-only. Others may share what is below.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn open(path: &Path, read_only: bool, direct: bool) -> Result<Overlay, OverlayError> {
        let access = Access { read_only, direct, lock: true, any_base: false };
        Overlay::open_as(path, access, &mut None)
    }

    /// As [`Overlay::open`], where the files below are open already, the lowest first: a process that
    /// was given them may not be able to open their paths, or might find others there. Each is opened anew.
    ///
    /// # Errors
    /// [`OverlayError`]; there are fewer files than the chain has.
    pub fn open_over(
        path: &Path,
        below: Vec<Arc<File>>,
        read_only: bool,
        direct: bool,
    ) -> Result<Overlay, OverlayError> {
        let access = Access { read_only, direct, lock: true, any_base: false };
        Overlay::open_as(path, access, &mut Some(below))
    }

    /// Opens the overlay at `path`, which is made over `base` if it is not there.
    ///
    /// # Errors
    /// [`OverlayError`]; it is there and stands on something else.
    pub fn open_or_create(
        path: &Path,
        base: &Path,
        read_only: bool,
        direct: bool,
    ) -> Result<Overlay, OverlayError> {
        match fs::metadata(path) {
            Err(err) if err.kind() == ErrorKind::NotFound => {
                if read_only {
                    let (path, access) = (path.to_owned(), "reading");
                    return Err(OpenError::Open { path, access, source: err }.into());
                }
                match create_unsynced(path, base, BaseFormat::Raw) {
                    Err(OverlayError::Exists(_)) => {}
                    created => drop(created?),
                }
            }
            _ => {}
        }
        let mut overlay = Overlay::open(path, read_only, direct)?;
        overlay.expect_base(base)?;
        // Whoever made it may have been killed before it flushed anything.
        if !read_only {
            let folder = File::open(folder_of(path));
            let failed = |source| OverlayError::File {
                verb: "open the folder of",
                path: path.to_owned(),
                source,
            };
            overlay.new_in(folder.map_err(failed)?);
        }
        Ok(overlay)
    }

    /// The top was just made in `folder`, which has to be synced before what is flushed is safe.
    pub(super) fn new_in(&mut self, folder: File) {
        self.folder = Some(Arc::new(folder));
        self.base_synced.store(false, Ordering::Relaxed);
    }

    /// Refuses another base than `named`.
    ///
    /// # Errors
    /// [`OverlayError::NotItsBase`].
    pub fn expect_base(&self, named: &Path) -> Result<(), OverlayError> {
        let base = &self.layers[self.layers.len() - 2];
        let identity = |metadata: fs::Metadata| match metadata.file_type().is_block_device() {
            true => (0, metadata.rdev()),
            false => (metadata.dev(), metadata.ino()),
        };
        let named_as = fs::metadata(named).ok().map(identity);
        let is_it = base.file.metadata().ok().map(identity);
        if is_it.is_some() && named_as == is_it {
            return Ok(());
        }
        Err(OverlayError::NotItsBase {
            overlay: self.path.clone(),
            path: base.path.clone(),
            named: named.to_owned(),
        })
    }

    pub(super) fn open_as(
        path: &Path,
        access: Access,
        given: &mut Option<Vec<Arc<File>>>,
    ) -> Result<Overlay, OverlayError> {
        let boot = boot_id();
        let file = open_file(path, access.read_only)?;
        let (top, mut note) = layer(file, path, access, access.read_only)?;
        let Some(header) = top.header.clone() else { return Err(not_one(path)) };
        let mut vouched = note.synced.clone();
        // The top first, with what is noted of each.
        let mut files = vec![(top, note.clone())];
        let mut above = header.clone();
        let mut any_base = access.any_base || note.committing;
        let mut lower_block_size = 0;
        for depth in (0..header.depth).rev() {
            let overlay = files.last().map(|(layer, _)| layer.path.clone()).unwrap_or_default();
            let base_path = folder_of(&overlay).join(&above.base.path);
            let given = match given {
                Some(files) => {
                    let file = files.pop().ok_or_else(|| OverlayError::Unfit {
                        path: overlay.clone(),
                        reason: "too few files were handed over".to_owned(),
                    })?;
                    Some(reopened(&file, &base_path)?)
                }
                None => None,
            };
            let (mut base, below) = match above.base.overlay {
                Some(id) => {
                    let file = given.map_or_else(|| open_file(&base_path, true), Ok)?;
                    let (base, note) = layer(file, &base_path, access, true)?;
                    match &base.header {
                        Some(found) if found.id == id && found.depth == depth => {}
                        _ => return Err(OverlayError::OtherBase { path: base_path, overlay }),
                    }
                    (base, note)
                }
                None => {
                    let disk = match given {
                        Some(file) => {
                            if access.direct {
                                let failed = |source| OverlayError::File {
                                    verb: "go past the page cache with",
                                    path: base_path.clone(),
                                    source,
                                };
                                go_direct(&file).map_err(failed)?;
                            }
                            DiskFile::of(file, &base_path, true, access.direct)?
                        }
                        None if access.lock => DiskFile::open(&base_path, true, access.direct)?,
                        None => DiskFile::unlocked_reader(&base_path)?,
                    };
                    lower_block_size = disk.block_size();
                    (raw_layer(disk, base_path), Note::default())
                }
            };
            let unknown =
                |source| OverlayError::File { verb: "measure", path: base.path.clone(), source };
            let found = length(&base.file, header.size).map_err(unknown)?;
            if found != above.base.len {
                let expected = above.base.len;
                return Err(OverlayError::BaseLength { path: base.path, overlay, found, expected });
            }
            let metadata = base.file.metadata().map_err(unknown)?;
            let same =
                above.base.modified_ns == 0 || modified_ns(&metadata) == above.base.modified_ns;
            if !same && !any_base {
                return Err(OverlayError::BaseWritten { path: base.path, overlay });
            }
            let size = base.header.as_ref().map_or(found, |header| header.size);
            if size != header.size {
                let source = FormatError::Invalid("its base is a disk of another size");
                return Err(OverlayError::Format { path: overlay, source });
            }
            base.unsynced = above.base.unsynced.is_some()
                && above.base.unsynced == boot
                && (base.stamp == NO_ID || !vouched.contains(&base.stamp));
            vouched.extend(&below.synced);
            any_base = access.any_base || below.committing;
            if let Some(next) = &base.header {
                above = next.clone();
            }
            files.push((base, below));
        }
        files.reverse();
        let failed = |verb, path: &Path| {
            let path = path.to_owned();
            move |source| OverlayError::File { verb, path, source }
        };
        let owners =
            Owners::new(header.blocks()).map_err(failed("find room for the map of", path))?;
        let bitmap = Bitmap::new(header.bitmap_pages())
            .map_err(failed("find room for the bitmap of", path))?;
        let top_place = files.len().saturating_sub(1);
        for (place, (layer, note)) in files.iter_mut().enumerate() {
            let Some(header) = &layer.header else { continue };
            let claim = |block| {
                owners.set(block, place as u8);
                if place == top_place {
                    bitmap.load(block);
                }
            };
            bits(&layer.file, BITMAP_START, header, claim)
                .map_err(failed("read the bitmap of", &layer.path))?;
            if holds(note, boot, &vouched) {
                bits(&layer.file, header.noted_start(), header, claim)
                    .map_err(failed("read the bitmap of", &layer.path))?;
            } else {
                // It must never be said of that bitmap that it holds.
                layer.stamp = NO_ID;
            }
        }
        let layers: Vec<Layer> = files.into_iter().map(|(layer, _)| layer).collect();
        let top = &layers[layers.len() - 1];
        let trusted = holds(&note, boot, &[]);
        if !trusted {
            note = Note {
                committing: note.committing,
                ..Note::new(&note.synced).map_err(failed("find a name for", path))?
            };
        }
        if !access.read_only && access.lock && !trusted {
            begin_note(&top.file, &header, &note).map_err(failed("write", path))?;
        }
        let base_synced = !layers.iter().any(|layer| layer.unsynced);
        let mut overlay = Overlay {
            path: path.to_owned(),
            header,
            spots: Spot::of(&layers),
            layers,
            owners: Arc::new(owners),
            read_only: access.read_only,
            direct: access.direct,
            block_size: lower_block_size,
            bitmap,
            written: AtomicBool::new(true),
            base_synced: AtomicBool::new(base_synced),
            complained: AtomicBool::new(false),
            boot,
            stamp: note.stamp,
            committing: note.committing,
            vouched: note.synced,
            folder: None,
        };
        if trusted {
            overlay.find_unsaved().map_err(failed("read the bitmap of", path))?;
        }
        if access.direct {
            for layer in overlay.layers.iter().filter(|layer| layer.header.is_some()) {
                go_direct(&layer.file)
                    .map_err(failed("go past the page cache with", &layer.path))?;
                overlay.block_size = overlay.block_size.max(direct_alignment(&layer.file));
            }
        }
        Ok(overlay)
    }

    /// Marks the pages whose bits are in the second bitmap only.
    fn find_unsaved(&self) -> io::Result<()> {
        let top = self.top_layer();
        for page in 0..self.header.bitmap_pages() as usize {
            let (mut saved, mut noted) = ([0; PAGE], [0; PAGE]);
            let offset = (page * PAGE) as u64;
            read_page(&top.file, BITMAP_START + offset, &mut saved)?;
            read_page(&top.file, self.header.noted_start() + offset, &mut noted)?;
            if noted.iter().zip(&saved).any(|(noted, saved)| noted & !saved != 0) {
                self.bitmap.mark(page, UNSAVED);
            }
        }
        Ok(())
    }
}

/// The second bitmap of a file with this note is as good as the first.
pub(super) fn holds(note: &Note, boot: Option<Id>, vouched: &[Id]) -> bool {
    (note.boot.is_some() && note.boot == boot)
        || (note.stamp != NO_ID && vouched.contains(&note.stamp))
}

fn not_one(path: &Path) -> OverlayError {
    OverlayError::Format { path: path.to_owned(), source: FormatError::Magic }
}

fn open_file(path: &Path, read_only: bool) -> Result<File, OverlayError> {
    let access = if read_only { "reading" } else { "reading and writing" };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).write(!read_only).custom_flags(flags).open(path);
    Ok(file.map_err(|source| OpenError::Open { path: path.to_owned(), access, source })?)
}

/// The header of an overlay's file.
pub(super) fn header_of(file: &File, path: &Path) -> Result<Header, OverlayError> {
    let failed = |source| OverlayError::File { verb: "read", path: path.to_owned(), source };
    let len = file.metadata().map_err(failed)?.len();
    let mut page = [0; PAGE];
    let read = read_page(file, 0, &mut page).map_err(failed)?;
    Header::parse(&page[..read], len)
        .map_err(|source| OverlayError::Format { path: path.to_owned(), source })
}

/// An overlay's file, and its note.
fn layer(
    file: File,
    path: &Path,
    access: Access,
    read_only: bool,
) -> Result<(Layer, Note), OverlayError> {
    let failed = |source| OverlayError::File { verb: "read", path: path.to_owned(), source };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(not_one(path));
    }
    if access.lock {
        lock(&file, read_only).map_err(|source| match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => {
                OpenError::Locked { path: path.to_owned(), read_only }
            }
            _ => OpenError::Host { what: "lock", path: path.to_owned(), source },
        })?;
    }
    let header = header_of(&file, path)?;
    let mut page = [0; PAGE];
    read_page(&file, NOTE_START, &mut page).map_err(failed)?;
    let note = Note::parse(&page);
    let layer = Layer {
        file: Arc::new(file),
        path: path.to_owned(),
        start: header.data_start(),
        header: Some(header),
        stamp: if note.boot.is_some() { note.stamp } else { NO_ID },
        unsynced: false,
    };
    Ok((layer, note))
}

pub(super) fn raw_layer(disk: DiskFile, path: PathBuf) -> Layer {
    let file = Arc::new(disk.into_file());
    Layer { file, path, start: 0, header: None, stamp: NO_ID, unsynced: false }
}

/// Reads up to the end of the file.
pub(super) fn read_page(file: &File, offset: u64, page: &mut [u8; PAGE]) -> io::Result<usize> {
    let mut done = 0;
    while done < PAGE {
        match file.read_at(&mut page[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(done)
}

/// Calls `claim` for each block that a bitmap names. Holes are passed over.
pub(super) fn bits(
    file: &File,
    start: u64,
    header: &Header,
    claim: impl Fn(u64),
) -> io::Result<()> {
    let pages = header.bitmap_pages();
    let mut page = 0;
    while page < pages {
        let data = match seek(file, start + page * PAGE as u64, libc::SEEK_DATA) {
            Ok(data) => data,
            Err(err) if err.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            // A file system that does not tell.
            Err(_) => start + page * PAGE as u64,
        };
        page = page.max(data.saturating_sub(start) / PAGE as u64);
        if page >= pages {
            return Ok(());
        }
        let mut words = [0; PAGE];
        read_page(file, start + page * PAGE as u64, &mut words)?;
        for (place, word) in words.chunks_exact(8).enumerate() {
            let mut word = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|at| word[at]));
            while word != 0 {
                let bit = u64::from(word.trailing_zeros());
                let block = page * BLOCKS_PER_PAGE + place as u64 * 64 + bit;
                if block < header.blocks() {
                    claim(block);
                }
                word &= word - 1;
            }
        }
        page += 1;
    }
    Ok(())
}

pub(super) fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    // SAFETY: no memory is involved.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// Begins another life of a file in another start of the host: what its second bitmap has counts no more, and what is
/// written to it from now on does. To who looks at its time the file is as it was.
fn begin_note(file: &File, header: &Header, note: &Note) -> io::Result<()> {
    let (start, len) = (header.noted_start(), header.bitmap_pages() * PAGE as u64);
    let before = sync::modified(file);
    // Looked at whatever the old note says: it may have been cut off in the middle.
    if seek(file, start, libc::SEEK_DATA).map_or_else(may_have_data, |data| data < start + len) {
        clear(file, start, len)?;
    }
    note.write(file)?;
    before.map_or(Ok(()), |before| sync::set_modified(file, before))
}

/// After a search for data failed.
fn may_have_data(err: io::Error) -> bool {
    err.raw_os_error() != Some(libc::ENXIO)
}

/// Makes a range zeroes.
fn clear(file: &File, start: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (offset, bytes) = (start as libc::off_t, len as libc::off_t);
    // SAFETY: no memory is involved.
    if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) } == 0 {
        return Ok(());
    }
    for page in 0..len / PAGE as u64 {
        file.write_all_at(&[0; PAGE], start + page * PAGE as u64)?;
    }
    Ok(())
}

/// Length of a file; of a block device, that of the disk, which was measured.
pub(super) fn length(file: &File, size: u64) -> io::Result<u64> {
    let metadata = file.metadata()?;
    match metadata.is_file() {
        true => Ok(metadata.len()),
        false => Ok(seek(file, 0, libc::SEEK_END).unwrap_or(size)),
    }
}

pub(super) fn modified_ns(metadata: &fs::Metadata) -> u64 {
    let seconds = u64::try_from(metadata.mtime()).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec() as u64)
}

/// Which start of the host this is, if the kernel says.
pub(super) fn boot_id() -> Option<Id> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let id = u128::from_str_radix(&digits, 16).ok()?;
    Some(id.to_be_bytes()).filter(|id| *id != NO_ID)
}

pub(super) fn random() -> io::Result<Id> {
    let mut id = NO_ID;
    // SAFETY: the buffer is valid for its length, and so few bytes are not cut short.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if got == id.len() as isize { Ok(id) } else { Err(io::Error::last_os_error()) }
}
