//! What the queues of an overlay share: blocks that are on their way into it, and the flush.
//!
//! A write to blocks that the overlay does not have holds them until it is done: a block that is written in part
//! is read from below first, and a second write to it in between would be lost. Who meets such a block waits, and
//! looks anew when it is free. Reads do not wait: a write that is under way may or may not be there.
//!
//! ```text
//!   flush ──> sync what is below, if that is to be ──> sync the top ──> write its bits ──> sync it ──> answer
//! ```
//!
//! One flush runs at a time; those that come meanwhile are answered by the next. A bit is taken before the top is
//! synced, so that the data that it tells of is on the disk when it is written.
//!
//! A write that is not to be durable is answered once the second bitmap tells of all blocks that are new, so that it is
//! there if this process is killed. All that wait for it are served by one write of each page.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use super::overlay::{BLOCK, Bits, Overlay};
use super::worker::Pace;
use crate::virtio::device::{Action, FileOperation, IoVecs, Reactor};

/// A request: the index of its queue, and the head of its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Who {
    pub(super) queue: u16,
    pub(super) head: u16,
}

impl Who {
    /// The name of its operations.
    pub(super) fn token(self) -> u64 {
        u64::from(self.queue) << 16 | u64::from(self.head)
    }

    pub(super) fn of(token: u64) -> Who {
        Who { queue: (token >> 16) as u16, head: token as u16 }
    }
}

/// The name of the flush's operations.
pub(super) const FLUSH: u64 = 1 << 32;
/// The name of those that write the second bitmap.
pub(super) const NOTE: u64 = 2 << 32;

/// What the queues share.
#[derive(Debug, Default)]
pub(super) struct Cow {
    held: Vec<(Range<u64>, Who)>,
    waiting: VecDeque<Who>,
    /// Requests that waited for blocks and may look again.
    pub(super) ready: VecDeque<Who>,
    run: Option<Run>,
    next: Vec<Who>,
    noting: Option<Noting>,
    unnoted: Vec<Who>,
    /// Whether writes to the second bitmap take long now.
    notes: Pace,
    /// Requests that are done, and whether that worked.
    pub(super) done: Vec<(Who, bool)>,
}

/// New blocks on their way into the second bitmap.
#[derive(Debug)]
struct Noting {
    for_whom: Vec<Who>,
    bits: Bits,
}

/// A flush under way.
#[derive(Debug)]
struct Run {
    for_whom: Vec<Who>,
    stage: Stage,
    below: Vec<RawFd>,
    bits: Bits,
    /// The note, if it has to say that what is below was synced.
    note: Bits,
    /// There are pages, written or to be written.
    has_written: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Below,
    Data,
    Bits,
    Settle,
}

/// The blocks that have bytes from `offset` on.
pub(super) fn blocks(offset: u64, len: u64) -> Range<u64> {
    offset / BLOCK..(offset + len).div_ceil(BLOCK)
}

impl Cow {
    /// True if somebody else than `who` is about to put one of these blocks into the overlay.
    pub(super) fn is_held(&self, blocks: &Range<u64>, who: Who) -> bool {
        let meets = |held: &Range<u64>| held.start < blocks.end && blocks.start < held.end;
        self.held.iter().any(|(held, holder)| *holder != who && meets(held))
    }

    /// Keeps others away from these blocks. Returns false if it did so before.
    pub(super) fn hold(&mut self, blocks: Range<u64>, who: Who) -> bool {
        let is_new = self.held.iter().all(|(_, holder)| *holder != who);
        if is_new {
            self.held.push((blocks, who));
        }
        is_new
    }

    pub(super) fn wait(&mut self, who: Who) {
        self.waiting.push_back(who);
    }

    /// Ends what `who` holds, if anything.
    pub(super) fn release(&mut self, who: Who) -> Option<Range<u64>> {
        let place = self.held.iter().position(|(_, holder)| *holder == who)?;
        self.ready.append(&mut self.waiting);
        Some(self.held.swap_remove(place).0)
    }

    /// True if no flush is under way.
    pub(super) fn is_still(&self) -> bool {
        self.run.is_none()
    }

    /// Flushes for `who`, who finds itself in [`Cow::done`].
    pub(super) fn flush(&mut self, who: Who, overlay: &Overlay, reactor: &mut dyn Reactor) {
        self.next.push(who);
        if self.run.is_none() {
            self.begin(overlay, reactor);
        }
    }

    /// True if a write that ends now has to wait for the second bitmap: it may be to a block whose bit is not there, whoever
    /// made it new.
    pub(super) fn has_unnoted(&self, overlay: &Overlay) -> bool {
        self.noting.is_some() || overlay.has_unnoted()
    }

    /// Has `who`, whose data are written, wait for the second bitmap. It finds itself in [`Cow::done`] after
    /// [`Cow::note`].
    pub(super) fn wait_for_note(&mut self, who: Who) {
        self.unnoted.push(who);
    }

    /// True if nobody's turn has come.
    pub(super) fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.done.is_empty() && !self.is_to_note()
    }

    /// True if somebody waits for the second bitmap, and it is not being written.
    pub(super) fn is_to_note(&self) -> bool {
        !self.unnoted.is_empty() && self.noting.is_none()
    }

    /// Writes the second bitmap for those who wait for it.
    pub(super) fn note(&mut self, overlay: &Overlay, reactor: &mut dyn Reactor) {
        let here = reactor.alone() && !overlay.direct() && self.notes.is_quick();
        if here {
            // A failure is told by the overlay: what has to be there after a kill nobody promised the driver.
            let _ = self.notes.time(|| overlay.note_bits());
            self.done.extend(self.unnoted.drain(..).map(|who| (who, true)));
            return;
        }
        let noting =
            Noting { for_whom: std::mem::take(&mut self.unnoted), bits: overlay.unnoted() };
        self.write_note(noting, overlay, reactor);
    }

    /// Writes the next page.
    fn write_note(&mut self, noting: Noting, overlay: &Overlay, reactor: &mut dyn Reactor) {
        let noting = self.noting.insert(noting);
        match noting.bits.last() {
            Some((offset, page)) => reactor.submit(NOTE, write(overlay, offset, page)),
            None => {
                self.done.extend(noting.for_whom.drain(..).map(|who| (who, true)));
                self.noting = None;
            }
        }
    }

    /// A write of the second bitmap ended.
    pub(super) fn on_noted(
        &mut self,
        result: io::Result<u32>,
        overlay: &Overlay,
        reactor: &mut dyn Reactor,
    ) {
        let Some(mut noting) = self.noting.take() else { return };
        let len = noting.bits.last().map_or(0, |(_, page)| page.len());
        match result {
            Ok(written) if written as usize == len => noting.bits.done(),
            Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            result => {
                overlay.not_noted(&result.err().unwrap_or(io::ErrorKind::WriteZero.into()));
                noting.bits = Bits::default();
            }
        }
        self.write_note(noting, overlay, reactor);
    }

    fn begin(&mut self, overlay: &Overlay, reactor: &mut dyn Reactor) {
        if self.next.is_empty() {
            return;
        }
        let run = Run {
            for_whom: std::mem::take(&mut self.next),
            stage: Stage::Below,
            below: overlay.unsynced_below(),
            bits: Bits::default(),
            note: Bits::default(),
            has_written: false,
        };
        submit(self.run.insert(run), overlay, reactor);
    }

    /// The flush's operation ended.
    pub(super) fn on_completion(
        &mut self,
        result: io::Result<u32>,
        overlay: &Overlay,
        reactor: &mut dyn Reactor,
    ) {
        let Some(run) = &mut self.run else { return };
        match result {
            Err(err) if matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                return submit(run, overlay, reactor);
            }
            Err(err) => {
                tracing::debug!(%err, "a flush failed");
                return self.end(false, overlay, reactor);
            }
            Ok(done) => {
                let whole = match run.stage {
                    Stage::Bits => {
                        run.current().is_none_or(|(_, page)| page.len() == done as usize)
                    }
                    _ => true,
                };
                if !whole {
                    return self.end(false, overlay, reactor);
                }
            }
        }
        match run.stage {
            Stage::Below => {
                run.below.pop();
                if run.below.is_empty() {
                    run.note = overlay.base_is_synced();
                }
            }
            Stage::Data => run.stage = Stage::Bits,
            Stage::Bits => match run.bits.is_empty() {
                false => run.bits.done(),
                true => run.note.done(),
            },
            Stage::Settle => return self.end(true, overlay, reactor),
        }
        if run.stage == Stage::Bits && run.current().is_none() {
            if !run.has_written {
                return self.end(true, overlay, reactor);
            }
            run.stage = Stage::Settle;
        }
        submit(run, overlay, reactor);
    }

    fn end(&mut self, worked: bool, overlay: &Overlay, reactor: &mut dyn Reactor) {
        if let Some(run) = self.run.take() {
            if !worked {
                overlay.not_saved();
            }
            self.done.extend(run.for_whom.into_iter().map(|who| (who, worked)));
        }
        self.begin(overlay, reactor);
    }
}

impl Run {
    /// The page that is written now.
    fn current(&self) -> Option<(u64, &[u8])> {
        self.bits.last().or_else(|| self.note.last())
    }
}

/// Starts the operation of the stage that a flush is at.
fn submit(run: &mut Run, overlay: &Overlay, reactor: &mut dyn Reactor) {
    let top = overlay.fd();
    if run.stage == Stage::Below && run.below.is_empty() {
        run.stage = Stage::Data;
        run.bits = overlay.unsaved();
        run.has_written = !run.bits.is_empty() || !run.note.is_empty();
        overlay.is_being_synced();
    }
    let sync = |fd, action| FileOperation { fd, offset: 0, action };
    let operation = match (run.stage, run.current()) {
        // An overlay knows its base by its time, too.
        (Stage::Below, _) => sync(run.below.last().copied().unwrap_or(top), Action::SyncAll),
        (Stage::Bits, Some((offset, page))) => write(overlay, offset, page),
        _ => sync(top, Action::Sync),
    };
    reactor.submit(FLUSH, operation);
}

/// Writes a page of [`Bits`], which has to stay where it is until that ended.
fn write(overlay: &Overlay, offset: u64, page: &[u8]) -> FileOperation {
    // SAFETY: the pages of bits are on the heap, and go when their write ended.
    let bufs = unsafe { IoVecs::of_bytes(page) };
    FileOperation { fd: overlay.fd(), offset, action: Action::Write { bufs, durable: false } }
}
