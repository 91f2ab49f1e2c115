//! A request that takes file operations, one after the other: which is next, and what the request
//! has come to when one ends.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::overlaid::{Edges, Fill};
use super::qcow2::Qcow2;
use super::request::{ByteRange, Status};
use super::{Backing, MAX_RANGE_SECTORS, SECTOR};
use crate::virtio::device::{Action, Blocking, FileOperation, IoVecs};
use crate::virtio::iobuf::{GuestByte, IoBuf};

/// A request under way.
pub(super) struct Pending {
    pub(super) status: GuestByte,
    pub(super) step: Step,
    /// When it was seen, by its worker's clock.
    pub(super) start: u64,
    /// Of blocks that are written in part to where they were not: the other parts.
    pub(super) edges: Option<Box<Edges>>,
    /// Ranges that come after this step.
    pub(super) later: VecDeque<ByteRange>,
    /// The driver asked for ranges to be zeroes, not for a write.
    pub(super) was_range: bool,
}

/// What is left of a request.
pub(super) enum Step {
    /// A write to blocks that the overlay does not have: `data` at `offset`, of `len` bytes in all.
    Hold { data: IoBuf, offset: u64, len: u64 },
    /// As above; what is around the data is read first.
    Fill { data: IoBuf, offset: u64, len: u64 },
    /// The rest of the buffers, where on the disk they go on, and what was filled before.
    Read { rest: IoBuf, offset: u64, done: u32 },
    /// Likewise; `len` bytes in all.
    Write { rest: IoBuf, offset: u64, len: u64 },
    /// A flush, or the last step of zeroing.
    Sync { zeroed: bool },
    /// The first range is under way, by this method.
    Ranges { ranges: VecDeque<ByteRange>, method: Method },
}

/// Ways to zero or discard a range, from the best to the one that always works.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    ZeroRange,
    PunchHole,
    /// Written zeroes; bytes done so far.
    Write(u64),
}

impl Pending {
    pub(super) fn new(status: GuestByte, step: Step, start: u64) -> Pending {
        Pending { status, step, start, edges: None, later: VecDeque::new(), was_range: false }
    }

    /// A request to zero or discard `ranges`, of which there is at least one.
    pub(super) fn ranges(status: GuestByte, ranges: VecDeque<ByteRange>) -> Pending {
        let method = first_method(ranges.front());
        Pending::new(status, Step::Ranges { ranges, method }, 0)
    }

    /// A request for what was written to be on the disk.
    pub(super) fn flush(status: GuestByte) -> Pending {
        Pending::new(status, Step::Sync { zeroed: false }, 0)
    }

    /// The operation that comes next. With `durable`, what is written is on the disk when it ends.
    pub(super) fn operation(&self, disk: &Backing, durable: bool) -> FileOperation {
        if let Some(image) = disk.image() {
            return self.call(Arc::clone(image), durable);
        }
        let fd = disk.fd();
        let sync = FileOperation { fd, offset: 0, action: Action::Sync };
        match &self.step {
            Step::Read { rest, offset, .. } => {
                let place = disk.place(*offset, rest.len());
                let bufs = match place.len == rest.len() {
                    true => IoVecs::of(rest),
                    false => IoVecs::part(rest, 0, place.len),
                };
                FileOperation { fd: place.fd, offset: place.offset, action: Action::Read(bufs) }
            }
            Step::Write { rest, offset, .. } => {
                let bufs = IoVecs::of(rest);
                let action = Action::Write { bufs, durable };
                FileOperation { fd, offset: disk.in_top(*offset), action }
            }
            Step::Fill { .. } => match self.edges.as_ref().and_then(|edges| edges.next()) {
                Some(Fill { offset, bytes }) => {
                    let place = disk.place(offset, bytes.len() as u64);
                    // SAFETY: the edges are on the heap, where they stay until the request ended.
                    let bufs = unsafe { IoVecs::of_bytes(bytes) };
                    FileOperation { fd: place.fd, offset: place.offset, action: Action::Read(bufs) }
                }
                None => sync,
            },
            Step::Ranges { ranges, method } => match ranges.front() {
                Some(range) => {
                    let operation = range_operation(fd, range, *method);
                    FileOperation { offset: disk.in_top(operation.offset), ..operation }
                }
                // Not reached: a request with no range left is finished.
                None => sync,
            },
            // The first is not reached: nothing is done while a request waits for blocks.
            Step::Hold { .. } | Step::Sync { .. } => sync,
        }
    }

    /// As [`Pending::operation`], on an image.
    fn call(&self, image: Arc<Qcow2>, durable: bool) -> FileOperation {
        let call = match &self.step {
            Step::Read { rest, offset, .. } => {
                let (bufs, offset) = (IoVecs::of(rest), *offset);
                Blocking::new(move || image.read(bufs.as_slice(), offset))
            }
            Step::Write { rest, offset, .. } => {
                let (bufs, offset) = (IoVecs::of(rest), *offset);
                Blocking::new(move || image.write(bufs.as_slice(), offset, durable))
            }
            Step::Ranges { ranges, .. } => {
                let range = ranges.front().copied();
                Blocking::new(move || range.map_or(Ok(0), |range| image.range(range, durable)))
            }
            // The first two are an overlay's.
            Step::Hold { .. } | Step::Fill { .. } | Step::Sync { .. } => {
                Blocking::new(move || image.save().map(|()| 0))
            }
        };
        FileOperation { fd: -1, offset: 0, action: Action::Call(call) }
    }

    /// What follows when its operation ended: its final status and the bytes written
    /// to guest memory, or `None` if there is another operation to do. With `durable`, zeroes are
    /// on the disk before they are reported.
    pub(super) fn advance(
        &mut self,
        result: io::Result<u32>,
        durable: bool,
    ) -> Option<(Status, u32)> {
        if let Err(err) = &result
            && matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
        {
            return None;
        }
        match &mut self.step {
            Step::Read { rest, offset, done } => match result {
                Ok(read) if read > 0 => {
                    rest.advance(u64::from(read));
                    *offset += u64::from(read);
                    *done += read;
                    rest.is_empty().then_some((Status::Ok, *done))
                }
                // 0: the file is shorter than it was when it was opened.
                _ => Some((Status::IoError, *done)),
            },
            Step::Write { rest, offset, .. } => match result {
                Ok(written) if written > 0 => {
                    rest.advance(u64::from(written));
                    *offset += u64::from(written);
                    rest.is_empty().then_some((Status::Ok, 0))
                }
                _ => Some((Status::IoError, 0)),
            },
            Step::Hold { .. } => None,
            Step::Fill { .. } => match (result, &mut self.edges) {
                (Ok(read), Some(edges)) if read > 0 => {
                    edges.filled(read);
                    None
                }
                // 0: what is below is shorter than it was when it was opened.
                _ => Some((Status::IoError, 0)),
            },
            Step::Sync { .. } => {
                let status = if result.is_ok() { Status::Ok } else { Status::IoError };
                Some((status, 0))
            }
            Step::Ranges { ranges, method } => {
                let range = ranges.front()?;
                match (result, *method) {
                    (Ok(written), Method::Write(done)) => {
                        let done = done + u64::from(written);
                        if written == 0 {
                            return Some((Status::IoError, 0));
                        }
                        if done < range.len {
                            *method = Method::Write(done);
                            return None;
                        }
                    }
                    (Ok(_), _) => {}
                    (Err(err), Method::Write(_)) => {
                        tracing::debug!(%err, "zeroing by writing failed");
                        return Some((Status::IoError, 0));
                    }
                    (Err(err), tried) => match err.raw_os_error() {
                        // A discard is advice: what the file cannot do is done.
                        Some(libc::EOPNOTSUPP) if !range.zero => {}
                        Some(libc::EOPNOTSUPP) => {
                            *method = match tried {
                                Method::ZeroRange => Method::PunchHole,
                                _ => Method::Write(0),
                            };
                            return None;
                        }
                        _ => return Some((Status::IoError, 0)),
                    },
                }
                let zeroed = range.zero;
                ranges.pop_front();
                *method = first_method(ranges.front());
                if ranges.is_empty() && zeroed && durable {
                    self.step = Step::Sync { zeroed };
                    return None;
                }
                ranges.is_empty().then_some((Status::Ok, 0))
            }
        }
    }
}

pub(super) fn first_method(range: Option<&ByteRange>) -> Method {
    match range {
        Some(range) if range.zero && !range.unmap => Method::ZeroRange,
        _ => Method::PunchHole,
    }
}

/// Zeroes to write where nothing better is possible.
pub(super) static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

fn range_operation(fd: i32, range: &ByteRange, method: Method) -> FileOperation {
    let allocate = |mode| FileOperation {
        fd,
        offset: range.offset,
        action: Action::Allocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, len: range.len },
    };
    match method {
        Method::ZeroRange => allocate(libc::FALLOC_FL_ZERO_RANGE),
        Method::PunchHole => allocate(libc::FALLOC_FL_PUNCH_HOLE),
        Method::Write(done) => {
            let bufs = IoVecs::repeat(&ZEROES, range.len - done);
            let action = Action::Write { bufs, durable: false };
            FileOperation { fd, offset: range.offset + done, action }
        }
    }
}

// The list for one range stays below IOV_MAX.
const _: () = assert!(MAX_RANGE_SECTORS as u64 * SECTOR / ZEROES.len() as u64 <= 1024);
