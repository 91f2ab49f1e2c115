//! Opening an image and what it stands on: by path before anything runs, or as files that were handed over.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;
use imago::qcow2::Qcow2 as Driver;
use imago::raw::Raw;

use super::check::{self, Found, Problem};
use super::file::ImageFile;
use super::header::{self, BackingName, Header};
use crate::virtio::blk::file::{go_direct, reopened};
use crate::virtio::blk::{DiskFile, OpenError};

/// Images that one image may stand on.
const MAX_DEPTH: usize = 63;

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// Its file, or that of one below, cannot be opened or is in use.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is no image, one that contradicts itself, or one of a kind that is not supported.
    #[error("{} cannot be used as a qcow2 image: {problem}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, as a clause about the image.
        problem: String,
    },
    /// It names a backing file, and nobody said that such a file may be opened.
    #[error("{} stands on {name:?}, and files that an image names are not opened by default", path.display())]
    Backing {
        /// The image.
        path: PathBuf,
        /// The name as it is in the image.
        name: String,
    },
    /// It cannot be read or written.
    #[error("cannot read the tables of {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// Nothing is written.
    pub read_only: bool,
    /// Past the page cache.
    pub direct: bool,
    /// A backing file that the image names may be opened, and those below it. They are only read.
    pub backing: bool,
    /// So many images are below that forks put there: what those name, and the image itself, is opened in any case.
    pub forked: u32,
}

/// An image whose header was read, and what it stands on.
pub(super) struct Layer {
    pub(super) file: ImageFile,
    pub(super) header: Header,
    read_only: bool,
    below: Option<Below>,
}

enum Below {
    Image(Box<Layer>),
    Raw(ImageFile),
}

impl Layer {
    /// Opens and locks the image at `path` and all that it stands on, and reads the headers. Changes nothing.
    pub(super) fn open(path: &Path, access: Access) -> Result<Layer, Qcow2Error> {
        let disk = DiskFile::open_image(path, access.read_only, access.direct)?;
        Layer::of(disk, access, &mut None, 0)
    }

    /// The image `top`, which was just made, over files that are open already, the lowest first. What their names lead
    /// to now does not matter: each is opened anew.
    pub(super) fn over(
        top: DiskFile,
        files: Vec<Arc<File>>,
        forked: u32,
    ) -> Result<Layer, Qcow2Error> {
        let access = Access { read_only: false, direct: top.direct(), backing: true, forked };
        Layer::of(top, access, &mut Some(files), 0)
    }

    fn of(
        disk: DiskFile,
        access: Access,
        given: &mut Option<Vec<Arc<File>>>,
        depth: usize,
    ) -> Result<Layer, Qcow2Error> {
        let Access { read_only, direct, backing, forked } = access;
        let file = ImageFile::new(disk);
        let path = file.disk().path();
        let header = read_header(&file, path)?;
        let refuse = |problem| Qcow2Error::Image { path: path.to_owned(), problem };
        if let Some(problem) = header.refused(!read_only) {
            return Err(refuse(problem));
        }
        let below = match &header.backing {
            None => None,
            Some(BackingName { name, .. }) if !backing && depth >= forked as usize => {
                return Err(Qcow2Error::Backing { path: path.to_owned(), name: name.clone() });
            }
            Some(_) if depth == MAX_DEPTH => {
                return Err(refuse(format!("it stands on an image that is {MAX_DEPTH} others up")));
            }
            Some(name) => {
                let (next, is_image) = below(path, name).map_err(refuse)?;
                let access = Access { read_only: true, ..access };
                let disk = match given {
                    Some(files) => {
                        let none = || refuse("too few files were handed over".into());
                        let file = files.pop().ok_or_else(none)?;
                        handed(&file, &next, is_image, direct)?
                    }
                    None if is_image => DiskFile::open_image(&next, true, direct)?,
                    None => DiskFile::open(&next, true, direct)?,
                };
                Some(match is_image {
                    true => Below::Image(Box::new(Layer::of(disk, access, given, depth + 1)?)),
                    false => Below::Raw(ImageFile::new(disk)),
                })
            }
        };
        if header.version >= 3 {
            file.has_dirty_bit();
        }
        Ok(Layer { file, header, read_only, below })
    }

    /// What it stands on, the lowest first, each with the length of its disk if it is an image.
    pub(super) fn files_below(&self) -> Vec<(ImageFile, Option<u64>)> {
        let (mut files, mut below) = (Vec::new(), &self.below);
        loop {
            match below {
                Some(Below::Image(layer)) => {
                    files.push((layer.file.clone(), Some(layer.header.size)));
                    below = &layer.below;
                }
                Some(Below::Raw(file)) => {
                    files.push((file.clone(), None));
                    below = &None;
                }
                None => break,
            }
        }
        files.reverse();
        files
    }

    /// Checks the tables if the image is to be written, and hands it to imago.
    pub(super) fn start(self) -> Result<(FormatAccess<ImageFile>, Found), Qcow2Error> {
        let Layer { file, header, read_only, below } = self;
        let path = file.disk().path().to_owned();
        let failed = |source| Qcow2Error::Io { path: path.clone(), source };
        let below = match below {
            None => None,
            Some(Below::Image(layer)) => Some(layer.start()?.0),
            Some(Below::Raw(file)) => {
                Some(FormatAccess::new(Raw::open_image(file, false).map_err(failed)?))
            }
        };
        let mut tables = Found::default();
        if !read_only {
            file.set_limit(limit(&file, &header));
            if header.is_dirty() {
                file.was_left_dirty();
            }
            tables = found(check::repair(&file, &header), &path)?;
            if tables.raised > 0 {
                tracing::info!(
                    path = %path.display(),
                    raised = tables.raised,
                    "a qcow2 image was not closed; its refcounts were mended"
                );
            }
        }
        let mut image = Driver::open_image(file, !read_only).map_err(failed)?;
        image.set_data_file(None);
        image.set_backing(below);
        Ok((FormatAccess::new(image), tables))
    }
}

/// True if the file at `path`, a regular one or a block device, begins as an image does.
///
/// # Errors
/// It cannot be read.
pub fn looks_like_qcow2(path: &Path) -> io::Result<bool> {
    let mut start = [0; header::MAGIC.len()];
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    match io::Read::read_exact(&mut file?, &mut start) {
        Ok(()) => Ok(start == header::MAGIC),
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(err) => Err(err),
    }
}

/// Reads and checks the header of an image.
pub(super) fn read_header(file: &ImageFile, path: &Path) -> Result<Header, Qcow2Error> {
    let failed = |source| Qcow2Error::Io { path: path.to_owned(), source };
    let refuse = |problem| Qcow2Error::Image { path: path.to_owned(), problem };
    let start = file.bytes(0, 512).map_err(failed)?;
    let start: &[u8; 512] =
        start.as_slice().try_into().map_err(io::Error::other).map_err(failed)?;
    let len = header::first_cluster(start).map_err(refuse)?;
    let first = file.bytes(0, len).map_err(failed)?;
    Header::parse(&first, file.len()).map_err(refuse)
}

/// A file that was handed over, by a descriptor of its own.
fn handed(file: &File, path: &Path, is_image: bool, direct: bool) -> Result<DiskFile, OpenError> {
    let failed = |source| OpenError::Host { what: "open", path: path.to_owned(), source };
    let file = reopened(file, path)?;
    if direct {
        go_direct(&file).map_err(failed)?;
    }
    let of = if is_image { DiskFile::of_image } else { DiskFile::of };
    of(file, path, true, direct)
}

fn limit(file: &ImageFile, header: &Header) -> u64 {
    longest(file.len().next_multiple_of(header.cluster_size()), header.size)
}

/// Length that the file of an image may come to: what it has `now`, all of the disk, and tables for that. With the
/// smallest clusters and the widest refcounts they are a thirty-second of it.
pub(super) fn longest(now: u64, size: u64) -> u64 {
    const ROOM: u64 = 64 << 20;
    let disk = size.saturating_add(size / 16);
    // What a file's offset can tell.
    now.saturating_add(disk).saturating_add(ROOM).min(i64::MAX as u64)
}

fn found(result: Result<Found, Problem>, path: &Path) -> Result<Found, Qcow2Error> {
    result.map_err(|problem| match problem {
        Problem::Corrupt(problem) => Qcow2Error::Image { path: path.to_owned(), problem },
        Problem::Io(source) => Qcow2Error::Io { path: path.to_owned(), source },
    })
}

/// The file that the image at `path` names, and whether it is an image itself. That is never taken from its
/// contents, which may be a guest's.
fn below(
    path: &Path,
    BackingName { name, format }: &BackingName,
) -> Result<(PathBuf, bool), String> {
    // QEMU takes "nbd://...", "json:{...}" and the like for other things than files.
    let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if protocol {
        return Err(format!("its backing file is {name:?}, which is not the name of a file"));
    }
    let is_image = match format.as_deref() {
        Some("qcow2") => true,
        Some("raw") => false,
        Some(other) => {
            return Err(format!(
                "its backing file is of the format {other:?}; raw and qcow2 can be read"
            ));
        }
        None => {
            return Err(
                "it does not say of which format its backing file is; `qemu-img rebase -u -b FILE -F FORMAT` notes it"
                    .into(),
            );
        }
    };
    Ok((path.parent().unwrap_or(Path::new("")).join(name), is_image))
}

/// What there is to know about an image.
#[derive(Debug)]
pub struct Described {
    /// Its header.
    pub header: Header,
    /// Bytes that its file has.
    pub file_len: u64,
    /// What its tables tell, or what is wrong with them.
    pub found: Result<Found, String>,
}

/// Describes the image at `path`. A machine may be using it. The file that it stands on is not opened.
///
/// # Errors
/// It cannot be read, or is no image.
pub fn describe(path: &Path) -> Result<Described, Qcow2Error> {
    let file = ImageFile::new(DiskFile::unlocked_image(path)?);
    let header = read_header(&file, path)?;
    file.set_limit(limit(&file, &header));
    let found = match header.refused(false) {
        Some(problem) => Err(problem),
        None => match check::look(&file, &header) {
            Ok(found) => Ok(found),
            Err(Problem::Corrupt(problem)) => Err(problem),
            Err(Problem::Io(source)) => {
                return Err(Qcow2Error::Io { path: path.to_owned(), source });
            }
        },
    };
    Ok(Described { header, file_len: file.len(), found })
}
