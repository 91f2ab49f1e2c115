//! Working sets: the pages that a guest touches when it goes on, written down once and fetched ahead of the
//! guest from then on.
//!
//! Both are done by a thread beside the machine, and only if somebody asks for it. A page that was mapped
//! only because its neighbours were (the kernel maps up to 64 KiB of a file at a fault) counts as touched.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::StoreError;
use super::aside::Aside;
use super::store::word;
use crate::config::ByteSize;
use crate::memory::{Image, PAGE_SIZE, Runs};
use crate::seccomp::{self, ThreadKind};

/// Pages that are fetched at a time.
const PIECE: u64 = (1 << 20) / PAGE_SIZE;

/// Bytes a second that are fetched where nobody says otherwise.
const RATE: u64 = 256 << 20;

/// Writes down what the guest touches.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Record {
    /// The file.
    pub path: PathBuf,
    /// Seconds from the beginning until it is written. Without them it is written when the machine ends.
    #[serde(default)]
    pub after: Option<u64>,
}

/// Fetches what was written down.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Prefetch {
    /// The file.
    pub path: PathBuf,
    /// Bytes a second, at least 1.
    #[serde(default = "rate")]
    pub rate: ByteSize,
}

fn rate() -> ByteSize {
    ByteSize(RATE)
}

/// Why a working set cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file cannot be read.
    #[error("cannot read the working set {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is not a working set", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It is of another snapshot.
    #[error("the working set {} is another snapshot's", .0.display())]
    Other(PathBuf),
    /// There is no thread for it, or no file.
    #[error("cannot work on the working set {}", path.display())]
    Thread {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// The file, JSON: which snapshot, and which pages.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct WorkingSet {
    /// Id of the snapshot.
    id: String,
    /// First pages and numbers of pages, in order.
    pages: Vec<(u64, u64)>,
}

fn read(path: &Path, id: &str) -> Result<Runs, WorkingSetError> {
    let failed = |source| WorkingSetError::Read { path: path.to_owned(), source };
    let file = io::BufReader::new(File::open(path).map_err(failed)?);
    let set: WorkingSet = serde_json::from_reader(file)
        .map_err(|source| WorkingSetError::Foreign { path: path.to_owned(), source })?;
    if set.id != id {
        return Err(WorkingSetError::Other(path.to_owned()));
    }
    let mut ranges: Vec<_> =
        set.pages.into_iter().map(|(at, len)| at..at.saturating_add(len)).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    Ok(Runs::new(ranges))
}

fn write(path: &Path, id: &str, pages: &Runs) -> Result<(), StoreError> {
    let pages = pages.iter().map(|run| (run.start, run.end - run.start)).collect();
    let set = WorkingSet { id: id.to_owned(), pages };
    let mut aside = Aside::new(path, &word().map_err(StoreError::Random)?)?;
    serde_json::to_writer(io::BufWriter::new(&aside.file), &set)
        .map_err(|error| aside.failed("write")(error.into()))?;
    aside.sync()?;
    aside.place()?;
    aside.sync_folder()
}

/// A thread that looks after a working set. Told to end and waited for when it is dropped.
#[derive(Debug)]
pub(crate) struct Companion {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Companion {
    fn start(
        path: &Path,
        filter: seccomp::Mode,
        body: impl FnOnce(mpsc::Receiver<()>) + Send + 'static,
    ) -> Result<Companion, WorkingSetError> {
        let (stop, stopped) = mpsc::channel();
        let body = move || match seccomp::apply(ThreadKind::Api, filter) {
            Ok(()) => body(stopped),
            Err(error) => tracing::error!(%error, "the thread of a working set is not filtered"),
        };
        let thread = std::thread::Builder::new().name("working set".to_owned()).spawn(body);
        let failed = |source| WorkingSetError::Thread { path: path.to_owned(), source };
        Ok(Companion { stop: Some(stop), thread: Some(thread.map_err(failed)?) })
    }

    /// Writes down what is touched of `image`, the memory of the snapshot with this id.
    ///
    /// # Errors
    /// There is no thread for it.
    pub(crate) fn record(
        record: &Record,
        image: Image,
        id: &str,
        filter: seccomp::Mode,
    ) -> Result<Companion, WorkingSetError> {
        let Record { path, after } = record.clone();
        let id = id.to_owned();
        Companion::start(&record.path, filter, move |stopped| {
            let told = match after {
                Some(seconds) => stopped.recv_timeout(Duration::from_secs(seconds)),
                None => stopped.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            if told == Err(mpsc::RecvTimeoutError::Disconnected) {
                // The machine was not made.
                return;
            }
            let touched = image.touched().map_err(|source| StoreError::File {
                verb: "find out what belongs into",
                path: path.clone(),
                source,
            });
            let written = touched.and_then(|pages| write(&path, &id, &pages));
            if let Err(error) = written {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "the working set is not recorded");
            }
        })
    }

    /// Fetches what was written down of the snapshot with this id into `image`.
    ///
    /// # Errors
    /// It cannot be read, or is another snapshot's.
    pub(crate) fn prefetch(
        prefetch: &Prefetch,
        image: Image,
        id: &str,
        filter: seccomp::Mode,
    ) -> Result<Companion, WorkingSetError> {
        let pages = read(&prefetch.path, id)?;
        // It may name pages that no machine has.
        let pages = Runs::new(pages.within(0..image.size() / PAGE_SIZE));
        let rate = prefetch.rate.0.max(1);
        Companion::start(&prefetch.path, filter, move |stopped| {
            let (start, mut fetched) = (Instant::now(), 0u64);
            for piece in pages.pieces(PIECE) {
                fetched += (piece.end - piece.start) * PAGE_SIZE;
                if let Err(error) = image.fetch(piece) {
                    tracing::warn!(%error, "the working set is not fetched any further");
                    return;
                }
                let due = Duration::from_nanos(
                    u64::try_from(u128::from(fetched) * 1_000_000_000 / u128::from(rate))
                        .unwrap_or(u64::MAX),
                );
                let pause = due.saturating_sub(start.elapsed());
                if !matches!(stopped.recv_timeout(pause), Err(mpsc::RecvTimeoutError::Timeout)) {
                    return;
                }
            }
        })
    }
}

impl Companion {
    /// The machine ends.
    pub(crate) fn finish(self) {
        if let Some(stop) = &self.stop {
            let _ = stop.send(());
        }
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        let pages = Runs::new([1..5, 90..91]);
        write(&path, "a", &pages).unwrap();
        assert_eq!(read(&path, "a").unwrap(), pages);
        assert!(matches!(read(&path, "b"), Err(WorkingSetError::Other(_))));
        std::fs::write(&path, "[]").unwrap();
        assert!(matches!(read(&path, "a"), Err(WorkingSetError::Foreign { .. })));
        // Out of order, overlapping, without end: pages that are not there are not fetched.
        std::fs::write(&path, r#"{ "id": "a", "pages": [[7, 2], [3, 18446744073709551615]] }"#)
            .unwrap();
        assert_eq!(read(&path, "a").unwrap(), Runs::new(std::iter::once(3..u64::MAX)));
    }
}
