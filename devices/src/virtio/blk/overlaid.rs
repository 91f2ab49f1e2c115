//! Serving the queues of an overlay: as of a raw file, but for what [`Cow`] is there for.
//!
//! ```text
//!   write ──> Hold ──> Fill ──> Write ──> durable: flush, new blocks: note ──> answer
//!               │ held by another: waits
//!   zeroes ─> Ranges: an edge that is not in the overlay is a write of zeroes, the rest is one operation on the file
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::cow::{Cow, FLUSH, NOTE, Who, blocks};
use super::overlay::{BLOCK, Overlay};
use super::pending::{Pending, Step, ZEROES, first_method};
use super::request::{ByteRange, Status};
use super::worker::{BlockWorker, Settings, transfer};
use crate::virtio::device::{Message, Reactor, Worker};
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Queue, QueueState};

/// A block that O_DIRECT takes.
#[repr(C, align(4096))]
struct Block([u8; BLOCK as usize]);

/// What is around data that does not begin or end where a block does: read from below, written with it.
pub(super) struct Edges {
    blocks: [Block; 2],
    /// Bytes before and after the data.
    before: usize,
    after: usize,
    /// What is still to be read: where on the disk, which block, and where in it.
    todo: VecDeque<(u64, usize, std::ops::Range<usize>)>,
}

/// Bytes to be read.
pub(super) struct Fill<'a> {
    /// From here of the disk.
    pub(super) offset: u64,
    pub(super) bytes: &'a [u8],
}

impl Edges {
    /// What has to be read for a write of `len` bytes at `offset`, if anything.
    fn around(overlay: &Overlay, offset: u64, len: u64) -> Option<Box<Edges>> {
        let end = offset + len;
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let last_end = ((last + 1) * BLOCK).min(overlay.len());
        let before = if overlay.has(first) { 0 } else { (offset - first * BLOCK) as usize };
        let after = if overlay.has(last) { 0 } else { (last_end - end) as usize };
        if before == 0 && after == 0 {
            return None;
        }
        let mut todo = VecDeque::new();
        if before > 0 {
            todo.push_back((first * BLOCK, 0, 0..before));
        }
        if after > 0 {
            todo.push_back((end, 1, 0..after));
        }
        let blocks = [Block([0; BLOCK as usize]), Block([0; BLOCK as usize])];
        Some(Box::new(Edges { blocks, before, after, todo }))
    }

    /// What is to be read next.
    pub(super) fn next(&self) -> Option<Fill<'_>> {
        let (offset, block, range) = self.todo.front()?;
        Some(Fill { offset: *offset, bytes: self.blocks.get(*block)?.0.get(range.clone())? })
    }

    /// So many bytes of it were read.
    pub(super) fn filled(&mut self, count: u32) {
        let Some((offset, _, range)) = self.todo.front_mut() else { return };
        *offset += u64::from(count);
        range.start += count as usize;
        if range.start >= range.end {
            self.todo.pop_front();
        }
    }

    /// Reads what can be had at once.
    fn fill_now(&mut self, overlay: &Overlay) {
        while let Some(Fill { offset, bytes }) = self.next() {
            let place = overlay.place(offset, bytes.len() as u64);
            let iov_base = bytes.as_ptr().cast_mut().cast();
            let list = [libc::iovec { iov_base, iov_len: bytes.len() }];
            match transfer(libc::preadv2, place.fd, &list, place.offset, libc::RWF_NOWAIT) {
                Ok(read) if read > 0 => self.filled(read as u32),
                _ => return,
            }
        }
    }

    /// `data` with what is around it; `list` is empty.
    fn with(&mut self, data: &IoBuf, mut list: IoBuf) -> IoBuf {
        list.clear();
        if self.before > 0 {
            list.push(self.blocks[0].0.as_mut_ptr(), self.before as u32);
        }
        for iov in data.iovecs() {
            list.push(iov.iov_base.cast(), iov.iov_len as u32);
        }
        if self.after > 0 {
            list.push(self.blocks[1].0.as_mut_ptr(), self.after as u32);
        }
        list
    }
}

/// Zeroes to be written, fewer than a block has.
fn zeroes(len: u64) -> IoBuf {
    let mut list = IoBuf::default();
    // They are only ever read.
    list.push(ZEROES.as_ptr().cast_mut(), len.min(ZEROES.len() as u64) as u32);
    list
}

impl BlockWorker {
    /// Does what comes next for the request at `head`. Returns its status if that was the last.
    pub(super) fn go_on(&mut self, head: u16, reactor: &mut dyn Reactor) -> Option<Status> {
        let disk = Arc::clone(&self.settings.disk);
        let overlay = disk.overlay()?;
        let who = Who { queue: self.index, head };
        loop {
            let here = self.may_write_here(reactor);
            let nowait = !disk.direct();
            let cow = self.cow.as_mut()?;
            let pending = self.pending.get_mut(usize::from(head))?.as_mut()?;
            match &mut pending.step {
                Step::Hold { data, offset, len } => {
                    let wanted = blocks(*offset, *len);
                    if cow.is_held(&wanted, who) {
                        cow.wait(who);
                        return None;
                    }
                    let (data, offset, len) = (std::mem::take(data), *offset, *len);
                    if !overlay.has_all(wanted.clone()) {
                        cow.hold(wanted, who);
                        pending.edges = Edges::around(overlay, offset, len);
                    }
                    pending.step = Step::Fill { data, offset, len };
                }
                Step::Fill { data, offset, len } => {
                    let (mut start, len) = (*offset, *len);
                    let mut rest = std::mem::take(data);
                    if let Some(edges) = &mut pending.edges {
                        if nowait {
                            edges.fill_now(overlay);
                        }
                        if edges.next().is_some() {
                            *data = rest;
                            self.start_operation(head, reactor);
                            return None;
                        }
                        start -= edges.before as u64;
                        let all = edges.with(&rest, self.spare.pop().unwrap_or_default());
                        self.spare.push(std::mem::replace(&mut rest, all));
                    }
                    overlay.wrote();
                    let done = if here { self.try_write(&rest, start) } else { 0 };
                    rest.advance(done);
                    let landed = rest.is_empty();
                    let pending = self.pending.get_mut(usize::from(head))?.as_mut()?;
                    pending.step = Step::Write { rest, offset: start + done, len };
                    if landed {
                        return self.landed(head, Status::Ok, reactor);
                    }
                    self.start_operation(head, reactor);
                    return None;
                }
                Step::Ranges { ranges, method } => {
                    let Some(front) = ranges.front().copied() else {
                        return self.landed(head, Status::Ok, reactor);
                    };
                    overlay.wrote();
                    if front.zero && !overlay.has_all(blocks(front.offset, front.len)) {
                        if cow.is_held(&blocks(front.offset, front.len), who) {
                            cow.wait(who);
                            return None;
                        }
                        pending.was_range = true;
                        if let Some(edge) = split(overlay, ranges) {
                            pending.later = std::mem::take(ranges);
                            let data = zeroes(edge.len);
                            pending.step = Step::Hold { data, offset: edge.offset, len: edge.len };
                            continue;
                        }
                        if let Some(front) = ranges.front()
                            && cow.hold(blocks(front.offset, front.len), who)
                        {
                            *method = first_method(Some(front));
                        }
                    }
                    self.start_operation(head, reactor);
                    return None;
                }
                Step::Sync { .. } => {
                    cow.flush(who, overlay, reactor);
                    return None;
                }
                Step::Read { .. } | Step::Write { .. } => {
                    self.start_operation(head, reactor);
                    return None;
                }
            }
        }
    }

    /// A write of the request at `head` ended.
    fn landed(&mut self, head: u16, status: Status, reactor: &mut dyn Reactor) -> Option<Status> {
        let disk = Arc::clone(&self.settings.disk);
        let overlay = disk.overlay()?;
        let who = Who { queue: self.index, head };
        let durable = self.durable();
        let cow = self.cow.as_mut()?;
        if let Some(held) = cow.release(who)
            && status == Status::Ok
        {
            overlay.own(held);
        }
        if status != Status::Ok {
            return Some(status);
        }
        let pending = self.pending.get_mut(usize::from(head))?.as_mut()?;
        pending.edges = None;
        if !pending.later.is_empty() {
            let ranges = std::mem::take(&mut pending.later);
            let method = first_method(ranges.front());
            pending.step = Step::Ranges { ranges, method };
            return self.go_on(head, reactor);
        }
        if durable {
            cow.flush(who, overlay, reactor);
            return None;
        }
        if cow.has_unnoted(overlay) {
            cow.wait_for_note(who);
            return None;
        }
        Some(Status::Ok)
    }

    /// An operation of the request at `head` ended.
    pub(super) fn on_overlay_completion(
        &mut self,
        head: u16,
        result: io::Result<u32>,
        reactor: &mut dyn Reactor,
    ) {
        let slot = self.pending.get_mut(usize::from(head));
        let Some(pending) = slot.and_then(Option::as_mut) else { return };
        let ranges_before = ranges_left(pending);
        let outcome = pending.advance(result, false);
        let range_ended = ranges_left(pending) != ranges_before;
        match outcome {
            Some((status, written)) if matches!(pending.step, Step::Read { .. }) => {
                self.end_later(head, status, written);
            }
            Some((status, _)) => {
                if let Some(status) = self.landed(head, status, reactor) {
                    self.end_later(head, status, 0);
                }
            }
            None => {
                if range_ended {
                    let who = Who { queue: self.index, head };
                    let held = self.cow.as_mut().and_then(|cow| cow.release(who));
                    let disk = &self.settings.disk;
                    if let (Some(held), Some(overlay)) = (held, disk.overlay()) {
                        overlay.own(held);
                    }
                }
                if let Some(status) = self.go_on(head, reactor) {
                    self.end_later(head, status, 0);
                }
            }
        }
    }
}

fn ranges_left(pending: &Pending) -> usize {
    match &pending.step {
        Step::Ranges { ranges, .. } => ranges.len(),
        _ => 0,
    }
}

/// Takes the first edge off the first range that a block which is not in the overlay has in part. What comes
/// before it, if anything, stays first. `None` if the first range has none.
fn split(overlay: &Overlay, ranges: &mut VecDeque<ByteRange>) -> Option<ByteRange> {
    let front = ranges.front().copied()?;
    let end = front.offset + front.len;
    let partial = |block: u64| {
        let whole = block * BLOCK..((block + 1) * BLOCK).min(overlay.len());
        !overlay.has(block) && (whole.start < front.offset || whole.end > end)
    };
    let (first, last) = (front.offset / BLOCK, (end - 1) / BLOCK);
    if partial(first) {
        let cut = ((first + 1) * BLOCK).min(end);
        ranges.pop_front();
        if cut < end {
            ranges.push_front(ByteRange { offset: cut, len: end - cut, ..front });
        }
        return Some(ByteRange { len: cut - front.offset, ..front });
    }
    if partial(last) {
        let cut = last * BLOCK;
        ranges.pop_front();
        ranges.push_front(ByteRange { offset: cut, len: end - cut, ..front });
        ranges.push_front(ByteRange { len: cut - front.offset, ..front });
    }
    None
}

/// The data half of a disk that is an overlay: serves all of its queues.
pub(super) struct OverlayWorker {
    settings: Settings,
    lanes: Vec<BlockWorker>,
    // Lent to the lane that is served.
    cow: Option<Box<Cow>>,
}

impl OverlayWorker {
    pub(super) fn new(settings: Settings) -> OverlayWorker {
        OverlayWorker { settings, lanes: Vec::new(), cow: Some(Box::default()) }
    }

    /// Calls a method of the lane of queue `index`, then those of all whose turn it is by that.
    fn with<R>(
        &mut self,
        index: u16,
        reactor: &mut dyn Reactor,
        call: impl FnOnce(&mut BlockWorker, &mut dyn Reactor) -> R,
    ) -> Option<R> {
        let result = self.lend(index, reactor, call);
        self.catch_up(reactor);
        result
    }

    fn lend<R>(
        &mut self,
        index: u16,
        reactor: &mut dyn Reactor,
        call: impl FnOnce(&mut BlockWorker, &mut dyn Reactor) -> R,
    ) -> Option<R> {
        let lane = self.lanes.iter_mut().find(|lane| lane.index == index)?;
        lane.cow = self.cow.take();
        let result = call(lane, reactor);
        self.cow = lane.cow.take();
        Some(result)
    }

    /// Goes on with requests that waited for blocks, a flush or the second bitmap, and tells the drivers.
    fn catch_up(&mut self, reactor: &mut dyn Reactor) {
        if self.cow.as_ref().is_none_or(|cow| cow.is_idle()) {
            return;
        }
        let mut touched = Vec::new();
        loop {
            let Some(cow) = &mut self.cow else { return };
            if let Some(who) = cow.ready.pop_front() {
                touched.push(who.queue);
                self.lend(who.queue, reactor, |lane, reactor| {
                    if let Some(status) = lane.go_on(who.head, reactor) {
                        lane.end_later(who.head, status, 0);
                    }
                });
            } else if let Some((who, worked)) = cow.done.pop() {
                touched.push(who.queue);
                let status = if worked { Status::Ok } else { Status::IoError };
                self.lend(who.queue, reactor, |lane, _| lane.end_later(who.head, status, 0));
            } else if cow.is_to_note() {
                let disk = Arc::clone(&self.settings.disk);
                let (Some(cow), Some(overlay)) = (&mut self.cow, disk.overlay()) else { return };
                cow.note(overlay, reactor);
            } else if let Some(index) = touched.pop() {
                touched.retain(|other| *other != index);
                self.lend(index, reactor, |lane, reactor| lane.on_settled(reactor));
            } else {
                return;
            }
        }
    }

    fn indices(&self) -> Vec<u16> {
        self.lanes.iter().map(|lane| lane.index).collect()
    }
}

impl Drop for OverlayWorker {
    fn drop(&mut self) {
        if let Some(overlay) = self.settings.disk.overlay()
            && let Err(err) = overlay.note_bits()
        {
            tracing::warn!(path = %overlay.path().display(), %err, "cannot note what an overlay has");
        }
    }
}

impl Worker for OverlayWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, reactor: &mut dyn Reactor) {
        let mut lane = BlockWorker::new(self.settings.clone());
        lane.start_queue(index, queue, reactor);
        self.lanes.retain(|lane| lane.index != index);
        self.lanes.push(lane);
    }

    fn stop_queue(&mut self, index: u16, reactor: &mut dyn Reactor) -> Option<QueueState> {
        let stopped = self.with(index, reactor, |lane, reactor| lane.stop_queue(index, reactor));
        stopped.unwrap_or_else(|| Some(QueueState::default()))
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        self.with(index, reactor, |lane, reactor| lane.on_kick(index, reactor));
    }

    fn on_completion(&mut self, token: u64, result: io::Result<u32>, reactor: &mut dyn Reactor) {
        if token == FLUSH || token == NOTE {
            if let (Some(cow), Some(overlay)) = (&mut self.cow, self.settings.disk.overlay()) {
                match token {
                    FLUSH => cow.on_completion(result, overlay, reactor),
                    _ => cow.on_noted(result, overlay, reactor),
                }
            }
            return self.catch_up(reactor);
        }
        let index = Who::of(token).queue;
        self.with(index, reactor, |lane, reactor| lane.on_completion(token, result, reactor));
    }

    fn on_settled(&mut self, reactor: &mut dyn Reactor) {
        for place in 0..self.lanes.len() {
            let index = self.lanes[place].index;
            self.with(index, reactor, |lane, reactor| lane.on_settled(reactor));
        }
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        if let Message::RateLimit(_, limit) = &message {
            self.settings.limit.clone_from(limit);
        }
        for index in self.indices() {
            let message = message.clone();
            self.with(index, reactor, |lane, reactor| lane.on_message(message, reactor));
        }
    }
}
