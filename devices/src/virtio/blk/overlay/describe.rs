//! What the files of a chain say of themselves.

use std::path::{Path, PathBuf};

use super::bitmap::Bitmap;
use super::format::{BITMAP_START, NOTE_START, PAGE};
use super::open::{Access, bits, holds, read_page};
use super::{Header, Note, Overlay, OverlayError};

/// What a file of a chain says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerInfo {
    /// The file.
    pub path: PathBuf,
    /// Of an overlay.
    pub header: Option<Header>,
    /// Blocks that it has; of a raw file none is counted.
    pub allocated: u64,
}

/// What a chain of files says of itself, the top first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// The files.
    pub layers: Vec<LayerInfo>,
}

/// Reads what the overlay at `path` and the files below it say of themselves. A machine may be using them.
///
/// # Errors
/// [`OverlayError`].
pub fn describe(path: &Path) -> Result<Described, OverlayError> {
    let access = Access { read_only: true, any_base: true, ..Access::default() };
    let overlay = Overlay::open_as(path, access, &mut None)?;
    let boot = overlay.boot;
    let mut vouched = Vec::new();
    let mut layers = Vec::new();
    for layer in overlay.layers.iter().rev() {
        let mut allocated = 0;
        if let Some(header) = &layer.header {
            let failed =
                |source| OverlayError::File { verb: "read", path: layer.path.clone(), source };
            let mut page = [0; PAGE];
            read_page(&layer.file, NOTE_START, &mut page).map_err(failed)?;
            let note = Note::parse(&page);
            let seen = Bitmap::new(header.bitmap_pages()).map_err(failed)?;
            bits(&layer.file, BITMAP_START, header, |block| seen.load(block)).map_err(failed)?;
            if holds(&note, boot, &vouched) {
                bits(&layer.file, header.noted_start(), header, |block| seen.load(block))
                    .map_err(failed)?;
            }
            vouched.extend(note.synced);
            allocated = seen.count();
        }
        let (path, header) = (layer.path.clone(), layer.header.clone());
        layers.push(LayerInfo { path, header, allocated });
    }
    Ok(Described { layers })
}
