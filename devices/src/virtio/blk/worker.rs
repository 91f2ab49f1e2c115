//! Serves one request queue of a disk.
//!
//! A read or write that the page cache can take at once is done here and now
//! (`preadv2(RWF_NOWAIT)`), which costs one system call. Where several reads wait and the io thread
//! has an io_uring, they are submitted together, which costs less. A disk that has its io thread to
//! itself makes short waits there too. Everything else goes through [`Reactor::submit`]. Requests
//! complete in any order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::cow::{Cow, Who, blocks};
use super::metrics::BlockMetrics;
use super::pending::{Pending, Step};
use super::request::{self, Disk, Kind, Status};
use super::{Backing, ID_LEN};
use crate::metrics::Batch;
use crate::rate::RateLimiter;
use crate::virtio::device::{BATCH, Fault, IoVecs, Message, Reactor, Traffic, Worker};
use crate::virtio::iobuf::{GuestByte, IoBuf};
use crate::virtio::queue::{Chain, Queue, QueueError, QueueState};

/// What a worker is made from.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) disk: Arc<Backing>,
    pub(super) id: [u8; ID_LEN],
    pub(super) writeback: Arc<AtomicBool>,
    pub(super) always_durable: bool,
    pub(super) ignore_flush: bool,
    pub(super) limit: Option<RateLimiter>,
    pub(super) metrics: Arc<BlockMetrics>,
}

/// The data half of a disk queue.
pub(super) struct BlockWorker {
    pub(super) settings: Settings,
    queue: Option<Queue>,
    pub(super) index: u16,
    stopping: bool,
    chain: Chain,
    /// Requests under way, by the head of their chain.
    pub(super) pending: Vec<Option<Pending>>,
    /// Lists of requests that ended, for the next ones.
    pub(super) spare: Vec<IoBuf>,
    /// What the queues of an overlay share, while this one is served.
    pub(super) cow: Option<Box<Cow>>,
    /// Requests that may be taken before other workers have their turn.
    budget: usize,
    /// Requests wait for [`Worker::on_settled`].
    more: bool,
    /// The file system takes RWF_NOWAIT reads; likewise writes. Cleared at the first refusal.
    nowait_reads: bool,
    nowait_writes: bool,
    /// Whether writes take long now, and whether flushes do.
    writes: Pace,
    flushes: Pace,
    tally: Tally,
}

/// What ended and was not told yet.
struct Tally {
    /// The clock's zero.
    epoch: Instant,
    /// Nanoseconds of that clock when the queue was looked at last.
    now: u64,
    reads: Batch,
    writes: Batch,
}

impl Tally {
    fn look_at_clock(&mut self) {
        self.now = u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    /// The driver is told of all that ended.
    fn told(&mut self, metrics: &BlockMetrics) {
        if !self.reads.is_empty() || !self.writes.is_empty() {
            self.look_at_clock();
            self.reads.end(self.now, &metrics.read_agg);
            self.writes.end(self.now, &metrics.write_agg);
        }
    }
}

/// How long calls of one kind take, which are quick as long as they need not wait for the disk.
#[derive(Debug, Default)]
pub(super) struct Pace {
    slow_until: Option<Instant>,
}

impl Pace {
    /// A call that takes longer than this waited for a slow or busy disk.
    const SLOW: Duration = Duration::from_millis(1);
    /// For how long after a slow call the next ones are expected to be slow as well.
    const SPELL: Duration = Duration::from_millis(500);

    pub(super) fn is_quick(&self) -> bool {
        self.slow_until.is_none_or(|until| Instant::now() >= until)
    }

    /// Makes a call and remembers whether it was slow. Returns how long it took as well.
    pub(super) fn time<T>(&mut self, call: impl FnOnce() -> T) -> (T, Duration) {
        let start = Instant::now();
        let result = call();
        let end = Instant::now();
        self.slow_until = (end - start > Self::SLOW).then_some(end + Self::SPELL);
        (result, end - start)
    }
}

/// As many reads go to the io_uring together: enough to share the cost of entering the kernel, few
/// enough that the driver works on the first while the next are read.
const READS_TOGETHER: usize = 16;

/// With fewer requests waiting, a system call for each read costs no more.
const WORTH_A_BATCH: u16 = 4;

/// Why [`BlockWorker::serve`] stopped taking requests.
enum Next {
    /// There are none.
    Kick,
    /// Reads were submitted, to be started before more are taken.
    Settle,
    /// The others' turn.
    Again,
    /// The limit is reached for so long.
    Later(Duration),
}

impl BlockWorker {
    pub(super) fn new(settings: Settings) -> BlockWorker {
        // Nothing of an image is tried here: its tables may have to be read first.
        let nowait = !settings.disk.direct() && settings.disk.image().is_none();
        BlockWorker {
            settings,
            queue: None,
            index: 0,
            stopping: false,
            chain: Chain::default(),
            pending: Vec::new(),
            spare: Vec::new(),
            cow: None,
            budget: 0,
            more: false,
            nowait_reads: nowait,
            nowait_writes: nowait,
            writes: Pace::default(),
            flushes: Pace::default(),
            tally: Tally {
                epoch: Instant::now(),
                now: 0,
                reads: Batch::default(),
                writes: Batch::default(),
            },
        }
    }

    /// Takes requests until there are no more or something else is to happen first.
    fn serve(&mut self, queue: &mut Queue, reactor: &mut dyn Reactor) -> Result<Next, Fault> {
        let index = self.index;
        let ring = |err: QueueError| Fault::Queue(index, err);
        let disk =
            Disk { len: self.settings.disk.len(), read_only: self.settings.disk.read_only() };
        let together = self.nowait_reads
            && reactor.batches()
            && queue.available().map_err(ring)? >= WORTH_A_BATCH;
        let mut submitted = 0;
        queue.disable_kicks();
        while self.budget > 0 {
            if let Some(limit) = &self.settings.limit
                && queue.has_available().map_err(ring)?
                && let Err(wait) = limit.ready(Instant::now())
            {
                self.settings.metrics.rate_limiter_throttled_events.count();
                return Ok(Next::Later(wait));
            }
            let Some(head) = queue.pop(&mut self.chain).map_err(ring)? else {
                if queue.enable_kicks().map_err(ring)? {
                    continue;
                }
                if let Some(limit) = &self.settings.limit {
                    limit.idle();
                }
                return Ok(Next::Kick);
            };
            self.budget -= 1;
            let (status, kind) = match request::parse(&mut self.chain, disk) {
                Ok(parsed) => parsed,
                Err(what) => {
                    queue.complete(head, 0);
                    self.settings.metrics.invalid_reqs_count.count();
                    return Err(Fault::Request(self.index, what));
                }
            };
            if let Some(limit) = &self.settings.limit {
                limit.charge(match kind {
                    Ok(Kind::Read(_)) => self.chain.writable.len(),
                    Ok(Kind::Write(_)) => self.chain.readable.len(),
                    _ => 0,
                });
            }
            match kind {
                Ok(Kind::Read(offset)) if together => {
                    self.submit_read(head, status, offset, 0, reactor);
                    submitted += 1;
                    if submitted == READS_TOGETHER {
                        return Ok(Next::Settle);
                    }
                }
                Ok(Kind::Read(offset)) => self.read(queue, head, status, offset, reactor),
                Ok(Kind::Write(offset)) if self.has_to_copy(offset) => {
                    let len = self.chain.readable.len();
                    let spare = self.spare.pop().unwrap_or_default();
                    let data = std::mem::replace(&mut self.chain.readable, spare);
                    let step = Step::Hold { data, offset, len };
                    self.put(head, Pending::new(status, step, self.tally.now));
                    self.begin(queue, head, reactor);
                }
                Ok(Kind::Write(offset)) => self.write(queue, head, status, offset, reactor),
                Ok(Kind::GetId) => {
                    self.chain.writable.write(&self.settings.id);
                    finish(queue, head, &status, Status::Ok, ID_LEN as u32);
                }
                Ok(Kind::Flush) if self.settings.ignore_flush => {
                    self.settings.metrics.flush_count.count();
                    finish(queue, head, &status, Status::Ok, 0);
                }
                Ok(Kind::Flush)
                    if queue.in_flight() == 1
                        && self.may_wait(reactor)
                        && self.cow.as_ref().is_none_or(|cow| cow.is_still())
                        && self.flushes.is_quick() =>
                {
                    self.flush(queue, head, &status);
                }
                Ok(Kind::Flush) => {
                    self.put(head, Pending::flush(status));
                    self.begin(queue, head, reactor);
                }
                Ok(Kind::Ranges(ranges)) => {
                    self.put(head, Pending::ranges(status, ranges));
                    self.begin(queue, head, reactor);
                }
                Err(refused) => {
                    self.settings.metrics.execute_fails.count();
                    finish(queue, head, &status, refused, 0);
                }
            }
        }
        Ok(Next::Again)
    }

    /// Serves the queue, if it runs, and tells the driver what was completed.
    fn run(&mut self, reactor: &mut dyn Reactor) {
        let Some(mut queue) = self.queue.take_if(|_| !self.stopping) else { return };
        self.more = false;
        self.settings.metrics.queue_event_count.count();
        self.tally.look_at_clock();
        match self.serve(&mut queue, reactor) {
            Ok(Next::Kick) => {}
            Ok(Next::Settle) => self.more = true,
            Ok(Next::Again) => reactor.again(self.index),
            Ok(Next::Later(wait)) => reactor.later(self.index, wait),
            Err(fault) => reactor.fault(fault),
        }
        queue.publish();
        queue.notify();
        self.queue = Some(queue);
        self.tally.told(&self.settings.metrics);
    }

    fn read(
        &mut self,
        queue: &mut Queue,
        head: u16,
        status: GuestByte,
        offset: u64,
        reactor: &mut dyn Reactor,
    ) {
        let len = self.chain.writable.len();
        let mut done = 0;
        while self.nowait_reads && done < len {
            let place = self.settings.disk.place(offset + done, len - done);
            let part;
            let into = match place.len == len {
                true => self.chain.writable.iovecs(),
                false => {
                    part = IoVecs::part(&self.chain.writable, done, place.len);
                    part.as_slice()
                }
            };
            match transfer(libc::preadv2, place.fd, into, place.offset, libc::RWF_NOWAIT) {
                Ok(read) => {
                    done += read;
                    if read != place.len {
                        break;
                    }
                }
                Err(err) => {
                    self.nowait_reads = err.raw_os_error() != Some(libc::EOPNOTSUPP);
                    break;
                }
            }
        }
        if done == len {
            self.was_read(self.tally.now, len);
            return finish(queue, head, &status, Status::Ok, len as u32);
        }
        self.submit_read(head, status, offset, done, reactor);
    }

    /// Submits what is left of the read in `chain` after its first `done` bytes.
    fn submit_read(
        &mut self,
        head: u16,
        status: GuestByte,
        offset: u64,
        done: u64,
        reactor: &mut dyn Reactor,
    ) {
        let spare = self.spare.pop().unwrap_or_default();
        let mut rest = std::mem::replace(&mut self.chain.writable, spare);
        rest.advance(done);
        let step = Step::Read { rest, offset: offset + done, done: done as u32 };
        self.submit(head, Pending::new(status, step, self.tally.now), reactor);
    }

    fn write(
        &mut self,
        queue: &mut Queue,
        head: u16,
        status: GuestByte,
        offset: u64,
        reactor: &mut dyn Reactor,
    ) {
        let len = self.chain.readable.len();
        let mut done = 0;
        if self.may_write_here(reactor) {
            let place = self.settings.disk.in_top(offset);
            let from = self.chain.readable.iovecs();
            done =
                write_here(&self.settings, &mut self.writes, &mut self.nowait_writes, from, place);
            if done == len {
                self.was_written(self.tally.now, len);
                return finish(queue, head, &status, Status::Ok, 0);
            }
        }
        let spare = self.spare.pop().unwrap_or_default();
        let mut rest = std::mem::replace(&mut self.chain.readable, spare);
        rest.advance(done);
        let step = Step::Write { rest, offset: offset + done, len };
        self.submit(head, Pending::new(status, step, self.tally.now), reactor);
    }

    /// True if a write may be tried here. One that is to be durable waits for the disk.
    pub(super) fn may_write_here(&self, reactor: &dyn Reactor) -> bool {
        let here = self.nowait_writes || self.may_wait(reactor) && self.writes.is_quick();
        here && !self.durable()
    }

    /// Writes `from` at `offset` of the disk, which the top has; returns the bytes done.
    pub(super) fn try_write(&mut self, from: &IoBuf, offset: u64) -> u64 {
        let place = self.settings.disk.in_top(offset);
        let from = from.iovecs();
        write_here(&self.settings, &mut self.writes, &mut self.nowait_writes, from, place)
    }

    /// True if the write in `chain` is one to blocks that the overlay does not have, or has so lately that the write
    /// cannot be answered at once.
    fn has_to_copy(&self, offset: u64) -> bool {
        let Some(overlay) = self.settings.disk.overlay() else { return false };
        overlay.wrote();
        let waits = self.cow.as_ref().is_some_and(|cow| cow.has_unnoted(overlay));
        waits || !overlay.has_all(blocks(offset, self.chain.readable.len()))
    }

    /// With nothing else under way. A driver that sent nothing meanwhile has not waited for anything
    /// but the flush, so that the next one is done here again, unless it took very long.
    fn flush(&mut self, queue: &mut Queue, head: u16, status: &GuestByte) {
        const LONG: Duration = Duration::from_millis(100);
        let disk = &self.settings.disk;
        let (done, took) = self.flushes.time(|| disk.save());
        // A broken ring is for the next look at it to find.
        if took < LONG && !queue.has_available().unwrap_or(true) {
            self.flushes = Pace::default();
        }
        let result = if done.is_ok() { Status::Ok } else { Status::IoError };
        match result {
            Status::Ok => self.settings.metrics.flush_count.count(),
            _ => self.settings.metrics.execute_fails.count(),
        }
        finish(queue, head, status, result, 0);
    }

    fn was_read(&mut self, start: u64, len: u64) {
        self.settings.metrics.read_count.count();
        self.settings.metrics.read_bytes.add(len);
        self.tally.reads.add(start);
    }

    fn was_written(&mut self, start: u64, len: u64) {
        self.settings.metrics.write_count.count();
        self.settings.metrics.write_bytes.add(len);
        self.tally.writes.add(start);
    }

    /// True if calls that usually are quick may be made here although they can wait: a buffered write
    /// on a file system that does not know RWF_NOWAIT for it (ext4 is one), a flush. An io_uring would
    /// hand each to another thread and wait for its answer. While calls of a kind do wait, they go
    /// through the io_uring, so that others pass them.
    fn may_wait(&self, reactor: &dyn Reactor) -> bool {
        let disk = &self.settings.disk;
        reactor.alone() && !disk.direct() && disk.image().is_none()
    }

    pub(super) fn durable(&self) -> bool {
        let settings = &self.settings;
        !settings.ignore_flush
            && (settings.always_durable || !settings.writeback.load(Ordering::Relaxed))
    }

    /// Starts the next operation of `pending`, which becomes the request at `head`.
    fn submit(&mut self, head: u16, pending: Pending, reactor: &mut dyn Reactor) {
        self.put(head, pending);
        self.start_operation(head, reactor);
    }

    fn put(&mut self, head: u16, pending: Pending) {
        let slot = usize::from(head);
        if self.pending.len() <= slot {
            self.pending.resize_with(slot + 1, || None);
        }
        self.pending[slot] = Some(pending);
    }

    /// Starts the next operation of the request at `head`.
    pub(super) fn start_operation(&mut self, head: u16, reactor: &mut dyn Reactor) {
        // What an overlay is to make durable takes more than one operation.
        let durable = self.durable() && self.settings.disk.overlay().is_none();
        if let Some(Some(pending)) = self.pending.get(usize::from(head)) {
            let operation = pending.operation(&self.settings.disk, durable);
            reactor.submit(Who { queue: self.index, head }.token(), operation);
        }
    }

    /// Starts the request at `head`, which may end at once.
    fn begin(&mut self, queue: &mut Queue, head: u16, reactor: &mut dyn Reactor) {
        if self.settings.disk.overlay().is_none() {
            return self.start_operation(head, reactor);
        }
        if let Some(status) = self.go_on(head, reactor) {
            self.end(queue, head, status, 0);
        }
    }

    /// Answers the request at `head`: `written` bytes of data, and the status byte. The driver is told later.
    fn end(&mut self, queue: &mut Queue, head: u16, status: Status, written: u32) {
        let pending = self.pending.get_mut(usize::from(head)).and_then(Option::take);
        let Some(pending) = pending else { return };
        pending.status.set(status as u8);
        queue.stage(head, written + 1);
        match (status, &pending.step) {
            (Status::Ok, Step::Read { .. }) => self.was_read(pending.start, written.into()),
            (Status::Ok, Step::Write { .. }) if pending.was_range => {
                self.settings.metrics.range_count.count();
            }
            (Status::Ok, Step::Write { len, .. }) => self.was_written(pending.start, *len),
            (Status::Ok, Step::Sync { zeroed: false }) => self.settings.metrics.flush_count.count(),
            (Status::Ok, _) => self.settings.metrics.range_count.count(),
            _ => self.settings.metrics.execute_fails.count(),
        }
        if let Step::Read { rest, .. } | Step::Write { rest, .. } = pending.step {
            self.spare.push(rest);
        }
    }

    /// As [`BlockWorker::end`], while the queue is not being served.
    pub(super) fn end_later(&mut self, head: u16, status: Status, written: u32) {
        if let Some(mut queue) = self.queue.take() {
            self.end(&mut queue, head, status, written);
            self.queue = Some(queue);
        }
    }
}

impl Drop for BlockWorker {
    /// The queue stopped: the file of an image is to be whole for whoever copies it now.
    fn drop(&mut self) {
        if let Some(image) = self.settings.disk.image()
            && let Err(err) = image.close()
        {
            tracing::error!(path = %self.settings.disk.path().display(), %err, "the last writes to a qcow2 image are not on it");
        }
    }
}

/// Tries a write, as far as it goes without a reactor; returns the bytes done.
fn write_here(
    settings: &Settings,
    pace: &mut Pace,
    nowait: &mut bool,
    from: &[libc::iovec],
    offset: u64,
) -> u64 {
    let flags = if *nowait { libc::RWF_NOWAIT } else { 0 };
    let fd = settings.disk.fd();
    match pace.time(|| transfer(libc::pwritev2, fd, from, offset, flags)).0 {
        Ok(written) => written,
        Err(err) => {
            *nowait &= err.raw_os_error() != Some(libc::EOPNOTSUPP);
            0
        }
    }
}

impl Worker for BlockWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, _reactor: &mut dyn Reactor) {
        self.index = index;
        self.stopping = false;
        self.more = false;
        self.queue = Some(queue);
    }

    fn stop_queue(&mut self, _index: u16, _reactor: &mut dyn Reactor) -> Option<QueueState> {
        self.stopping = true;
        match self.queue.take_if(|queue| queue.in_flight() == 0) {
            Some(queue) => Some(queue.state()),
            None if self.queue.is_none() => Some(QueueState::default()),
            None => None,
        }
    }

    fn on_kick(&mut self, _index: u16, reactor: &mut dyn Reactor) {
        self.budget = BATCH;
        self.run(reactor);
    }

    fn on_completion(&mut self, token: u64, result: io::Result<u32>, reactor: &mut dyn Reactor) {
        let head = Who::of(token).head;
        if self.settings.disk.overlay().is_some() {
            return self.on_overlay_completion(head, result, reactor);
        }
        let durable = self.durable();
        let slot = self.pending.get_mut(usize::from(head));
        let Some(pending) = slot.and_then(Option::as_mut) else { return };
        match pending.advance(result, durable) {
            Some((status, written)) => self.end_later(head, status, written),
            None => self.start_operation(head, reactor),
        }
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        if let Message::RateLimit(Traffic::All, limit) = message {
            self.settings.limit = limit;
            self.on_kick(self.index, reactor);
        }
    }

    fn on_settled(&mut self, reactor: &mut dyn Reactor) {
        let Some(queue) = &mut self.queue else { return };
        queue.publish();
        if self.more && !self.stopping {
            return self.run(reactor);
        }
        queue.notify();
        self.tally.told(&self.settings.metrics);
        if self.stopping
            && let Some(queue) = self.queue.take_if(|queue| queue.in_flight() == 0)
        {
            reactor.stopped(self.index, queue.state());
        }
    }
}

/// Answers a request: `written` bytes of data, and the status byte.
fn finish(queue: &mut Queue, head: u16, byte: &GuestByte, status: Status, written: u32) {
    byte.set(status as u8);
    queue.complete(head, written + 1);
}

pub(super) type Vectored = unsafe extern "C" fn(
    libc::c_int,
    *const libc::iovec,
    libc::c_int,
    libc::off_t,
    libc::c_int,
) -> libc::ssize_t;

/// One vectored read or write; returns the bytes done.
pub(super) fn transfer(
    call: Vectored,
    fd: i32,
    iovecs: &[libc::iovec],
    offset: u64,
    flags: i32,
) -> io::Result<u64> {
    // SAFETY: the list describes guest RAM that is mapped for as long as the queue lives, or memory of the
    // request. A chain has at most as many buffers as the queue (256), below IOV_MAX.
    let done =
        unsafe { call(fd, iovecs.as_ptr(), iovecs.len() as i32, offset as libc::off_t, flags) };
    u64::try_from(done).map_err(|_| io::Error::last_os_error())
}
