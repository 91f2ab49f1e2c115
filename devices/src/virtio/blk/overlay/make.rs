//! Making the files of overlays.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format::{LONGEST_PATH, PAGE};
use super::open::{Access, boot_id, folder_of, length, modified_ns, random};
use super::{BaseRef, DEEPEST, FormatError, Header, Overlay, OverlayError};
use crate::virtio::blk::DiskFile;
use crate::virtio::blk::file::lock;

/// What a base is. It is never guessed: a guest can make its raw disk look like an overlay that stands on
/// any file of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseFormat {
    /// Raw; a file that looks like an overlay is refused.
    #[default]
    Raw,
    /// Raw, whatever it looks like.
    CertainlyRaw,
    /// An overlay.
    Overlay,
}

/// What is below an overlay that is about to be made.
#[derive(Clone, Debug)]
pub(super) struct Under {
    /// Where; absolute.
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    /// Of an overlay.
    pub(super) header: Option<Header>,
    pub(super) size: u64,
    /// It may not be on the disk yet.
    pub(super) unsynced: bool,
}

/// True if the file begins as an overlay does. A raw disk can, if its guest wants it to.
///
/// # Errors
/// The file cannot be read.
pub fn looks_like_overlay(path: &Path) -> io::Result<bool> {
    let mut page = Vec::new();
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(false);
    }
    file.take(PAGE as u64).read_to_end(&mut page)?;
    Ok(Header::parse(&page, 0) != Err(FormatError::Magic))
}

/// Makes an overlay of `base` at `path`, where nothing is yet. It is on the disk when this returns.
///
/// # Errors
/// [`OverlayError`].
pub fn create(path: &Path, base: &Path, format: BaseFormat) -> Result<Header, OverlayError> {
    let (file, header) = create_unsynced(path, base, format)?;
    file.sync_all()
        .and_then(|()| File::open(folder_of(path))?.sync_all())
        .map_err(|source| OverlayError::File { verb: "sync", path: path.to_owned(), source })?;
    Ok(header)
}

pub(super) fn create_unsynced(
    path: &Path,
    base: &Path,
    format: BaseFormat,
) -> Result<(File, Header), OverlayError> {
    let failed = |source| OverlayError::File { verb: "find", path: base.to_owned(), source };
    let under = match format {
        BaseFormat::Overlay => {
            let access = Access { read_only: true, lock: true, ..Access::default() };
            let overlay = Overlay::open_as(base, access, &mut None)?;
            Under {
                path: fs::canonicalize(base).map_err(failed)?,
                file: Arc::clone(&overlay.top_layer().file),
                header: Some(overlay.header.clone()),
                size: overlay.len(),
                unsynced: true,
            }
        }
        BaseFormat::Raw | BaseFormat::CertainlyRaw => {
            if format == BaseFormat::Raw && looks_like_overlay(base).unwrap_or(false) {
                return Err(OverlayError::Ambiguous(base.to_owned()));
            }
            let disk = DiskFile::open(base, true, false)?;
            let path = fs::canonicalize(base).map_err(failed)?;
            let size = disk.len();
            Under { path, file: Arc::new(disk.into_file()), header: None, size, unsynced: true }
        }
    };
    make(path, &under)
}

/// Makes an overlay's file. It is there as a whole or not at all, and locked.
pub(super) fn make(path: &Path, under: &Under) -> Result<(File, Header), OverlayError> {
    let failed = |verb| {
        let path = path.to_owned();
        move |source: io::Error| match source.kind() {
            ErrorKind::AlreadyExists => OverlayError::Exists(path),
            _ => OverlayError::File { verb, path, source },
        }
    };
    if under.path.as_os_str().len() > LONGEST_PATH {
        let reason = format!("its path is longer than {LONGEST_PATH} bytes");
        return Err(OverlayError::Unfit { path: under.path.clone(), reason });
    }
    let depth = under.header.as_ref().map_or(0, |header| header.depth) + 1;
    if depth as usize >= DEEPEST {
        return Err(OverlayError::Deep(under.path.clone()));
    }
    let metadata = under.file.metadata().map_err(failed("measure the base of"))?;
    let id = random().map_err(failed("find a name for"))?;
    let base = BaseRef {
        path: seen_from(path, &under.path),
        overlay: under.header.as_ref().map(|header| header.id),
        len: length(&under.file, under.size).map_err(failed("measure the base of"))?,
        modified_ns: if metadata.is_file() { modified_ns(&metadata) } else { 0 },
        unsynced: boot_id().filter(|_| under.unsynced),
    };
    let header = Header::new(id, under.size, depth, base);
    let page = header
        .to_page()
        .map_err(|source| OverlayError::Format { path: path.to_owned(), source })?;
    let aside = aside(path).map_err(failed("find a name for"))?;
    let made = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .map_err(failed("make"))?;
    let written = made
        .set_len(header.file_len())
        .and_then(|()| made.write_all_at(&page[..], 0))
        .and_then(|()| lock(&made, false))
        .and_then(|()| settle(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written.map_err(failed("make"))?;
    Ok((made, header))
}

/// A name beside `path` that nobody else has.
pub(in crate::virtio::blk) fn aside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy();
    let word = u128::from_le_bytes(random()?);
    Ok(path.with_file_name(format!(".{name}.{word:032x}")))
}

/// Gives the file at `aside` its name, which nothing has yet.
pub(in crate::virtio::blk) fn settle(aside: &Path, path: &Path) -> io::Result<()> {
    match fs::hard_link(aside, path) {
        Ok(()) => fs::remove_file(aside),
        // A file system without links.
        Err(err) if matches!(err.raw_os_error(), Some(libc::EPERM | libc::EOPNOTSUPP)) => {
            if fs::symlink_metadata(path).is_ok() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            fs::rename(aside, path)
        }
        Err(err) => Err(err),
    }
}

/// The path of a base as what stands on it has it: of neighbours without folder, so that they can be moved together.
pub(in crate::virtio::blk) fn seen_from(overlay: &Path, base: &Path) -> PathBuf {
    let folder = folder_of(overlay);
    let (folder, base_folder) = (fs::canonicalize(folder).ok(), base.parent());
    match base.file_name().filter(|_| folder.as_deref() == base_folder) {
        Some(name) => name.into(),
        None => base.to_owned(),
    }
}
