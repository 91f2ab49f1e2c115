//! Serves all queues of a balloon. Giving pages back is not cheap, and a driver can ask for any
//! amount of it in one request, so requests are worked off piece by piece.

use std::sync::Arc;
use std::time::Duration;

use super::{BalloonMetrics, Discard, Observed, PAGE, QUEUES, Role, STATISTICS};
use crate::virtio::device::{BATCH, Fault, Message, Reactor, Worker};
use crate::virtio::iobuf::IoBuf;
use crate::virtio::queue::{Chain, Queue, QueueError, QueueState};

/// Page numbers that are read at once, which is as many as Linux sends.
const LIST: usize = 256;
/// Bytes that one page number takes in a request.
const NUMBER: usize = 4;

/// Work that is done before the other devices of the thread have their turn, in page numbers or in
/// pieces of reported memory.
const BUDGET: usize = 4 * LIST;

/// Reported memory that is given back in one call, in bytes: as much work as a list of pages.
const PIECE: usize = 4 << 20;

/// A statistic in a request: tag and value, packed (§ 5.5.6.4).
const STATISTIC: usize = 2 + 8;
/// Statistics that are read from a request. There are fewer tags; what follows is not looked at.
const MOST_STATISTICS: usize = 64;

/// What a worker is made from.
pub(super) struct Settings {
    pub(super) roles: [Option<Role>; QUEUES.len()],
    pub(super) interval: Duration,
    pub(super) observed: Arc<Observed>,
    pub(super) discard: Arc<dyn Discard>,
    pub(super) metrics: Arc<BalloonMetrics>,
}

/// A request that is being worked off.
struct Pending {
    head: u16,
    rest: IoBuf,
}

/// A queue and what it is for.
struct Served {
    role: Role,
    queue: Queue,
    /// Also the buffer of a statistics queue, which waits to be asked for.
    pending: Option<Pending>,
}

/// The data half of a balloon.
pub(super) struct BalloonWorker {
    settings: Settings,
    queues: [Option<Served>; QUEUES.len()],
    /// Queues without a role, to be given back.
    unused: [Option<Queue>; QUEUES.len()],
    chain: Chain,
}

impl BalloonWorker {
    pub(super) fn new(settings: Settings) -> BalloonWorker {
        BalloonWorker {
            settings,
            queues: Default::default(),
            unused: Default::default(),
            chain: Chain::default(),
        }
    }

    /// Asks the guest for statistics by giving it its buffer back, and later again.
    fn ask(&mut self, reactor: &mut dyn Reactor) {
        if self.settings.interval.is_zero() {
            return;
        }
        for (index, served) in (0..).zip(&mut self.queues) {
            if let Some(served) = served.as_mut().filter(|one| one.role == Role::Statistics) {
                if let Some(Pending { head, .. }) = served.pending.take() {
                    served.queue.complete(head, 0);
                    served.queue.notify();
                    // A driver that gave two would not say so again.
                    reactor.again(index);
                }
                reactor.set_timer(self.settings.interval);
            }
        }
    }
}

impl Served {
    /// Serves requests. Returns true if there is more to do.
    fn serve(&mut self, settings: &Settings, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.role == Role::Statistics && self.pending.is_some() {
            // One buffer is held, and a driver has no more.
            return Ok(false);
        }
        let queue = &mut self.queue;
        queue.disable_kicks();
        let mut budget = BUDGET;
        for _ in 0..BATCH {
            let Some(pending) = &mut self.pending else {
                let Some(head) = queue.pop(chain)? else {
                    if queue.enable_kicks()? {
                        continue;
                    }
                    return Ok(false);
                };
                let data = match self.role {
                    Role::Report => &mut chain.writable,
                    Role::Inflate | Role::Deflate | Role::Statistics => &mut chain.readable,
                };
                let rest = std::mem::take(data);
                self.pending = Some(Pending { head, rest });
                if self.role == Role::Statistics {
                    break;
                }
                continue;
            };
            match self.role {
                // It is the driver that knows these pages.
                Role::Deflate => pending.rest.advance(u64::MAX),
                Role::Inflate => inflate(&mut pending.rest, &mut budget, settings.discard.as_ref()),
                Role::Report => report(&mut pending.rest, &mut budget, settings.discard.as_ref()),
                Role::Statistics => return Ok(false),
            }
            if !pending.rest.is_empty() {
                return Ok(true);
            }
            queue.complete(pending.head, 0);
            self.pending = None;
            match self.role {
                Role::Inflate => settings.metrics.inflate_count.count(),
                Role::Deflate => settings.metrics.deflate_count.count(),
                Role::Report => settings.metrics.report_count.count(),
                Role::Statistics => {}
            }
            if budget == 0 {
                return Ok(true);
            }
        }
        if self.role == Role::Statistics {
            if let Some(pending) = &mut self.pending {
                settings.observed.set(&statistics(&mut pending.rest));
                settings.metrics.stats_updates_count.count();
            }
            queue.enable_kicks()?;
            return Ok(false);
        }
        Ok(true)
    }
}

/// Gives back the pages whose numbers are in `rest`, as many as `budget` allows.
fn inflate(rest: &mut IoBuf, budget: &mut usize, discard: &dyn Discard) {
    while *budget > 0 && !rest.is_empty() {
        let mut bytes = [0; LIST * NUMBER];
        let len = rest.read(&mut bytes);
        let mut pages = [0u32; LIST];
        let mut count = 0;
        for (page, number) in pages.iter_mut().zip(bytes[..len].chunks_exact(NUMBER)) {
            *page = number.iter().rev().fold(0, |all, &byte| all << 8 | u32::from(byte));
            count += 1;
        }
        let pages = &mut pages[..count];
        pages.sort_unstable();
        for run in runs(pages) {
            discard.discard(run.start * PAGE, (run.end - run.start) * PAGE);
        }
        // Part of a number at the end is none.
        *budget = budget.saturating_sub(count.max(1));
    }
}

/// The runs of neighbours in sorted `pages`, in which a page may be more than once.
fn runs(pages: &[u32]) -> impl Iterator<Item = std::ops::Range<u64>> {
    pages
        .chunk_by(|&page, &next| next - page <= 1)
        .filter_map(|run| Some(u64::from(*run.first()?)..u64::from(*run.last()?) + 1))
}

/// Gives back the buffers in `rest`, as many as `budget` allows.
fn report(rest: &mut IoBuf, budget: &mut usize, discard: &dyn Discard) {
    while let Some(buffer) = rest.iovecs().first().filter(|_| *budget > 0) {
        // Cut where pages of any size end.
        let len = buffer.iov_len.min(PIECE - buffer.iov_base as usize % PIECE);
        discard.discard_host(buffer.iov_base.cast(), len);
        rest.advance(len as u64);
        // A piece takes as long as a list.
        *budget = budget.saturating_sub(if len > PAGE as usize { LIST } else { 1 });
    }
}

/// Reads statistics. Tags that are not known are left out; of two with one tag the last counts.
fn statistics(buffer: &mut IoBuf) -> [Option<u64>; STATISTICS.len()] {
    let mut bytes = [0; MOST_STATISTICS * STATISTIC];
    let len = buffer.read(&mut bytes);
    let mut all = [None; STATISTICS.len()];
    for entry in bytes[..len].chunks_exact(STATISTIC) {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
        let (tag, value) = entry.split_at(2);
        let place = usize::try_from(number(tag)).ok().and_then(|tag| all.get_mut(tag));
        if let Some(place) = place {
            *place = Some(number(value));
        }
    }
    all
}

impl Worker for BalloonWorker {
    fn start_queue(&mut self, index: u16, queue: Queue, reactor: &mut dyn Reactor) {
        let place = usize::from(index);
        let Some(&role) = self.settings.roles.get(place) else { return };
        let Some(role) = role else {
            self.unused[place] = Some(queue);
            return;
        };
        self.queues[place] = Some(Served { role, queue, pending: None });
        if role == Role::Statistics && !self.settings.interval.is_zero() {
            reactor.set_timer(self.settings.interval);
        }
    }

    fn stop_queue(&mut self, index: u16, _reactor: &mut dyn Reactor) -> Option<QueueState> {
        let place = usize::from(index);
        let unused = self.unused.get_mut(place).and_then(Option::take);
        let served = self.queues.get_mut(place).and_then(Option::take).map(|served| {
            let Served { mut queue, pending, .. } = served;
            // What is done twice is done: the pages are the guest's no more until it is answered.
            queue.undo(pending.map(|pending| pending.head).as_slice());
            queue
        });
        Some(served.or(unused).map(|queue| queue.state()).unwrap_or_default())
    }

    fn on_kick(&mut self, index: u16, reactor: &mut dyn Reactor) {
        let served = self.queues.get_mut(usize::from(index)).and_then(Option::as_mut);
        let Some(served) = served else { return };
        match served.serve(&self.settings, &mut self.chain) {
            Ok(true) => reactor.again(index),
            Ok(false) => {}
            Err(err) => reactor.fault(Fault::Queue(index, err)),
        }
        served.queue.notify();
    }

    fn on_timer(&mut self, reactor: &mut dyn Reactor) {
        self.ask(reactor);
    }

    fn on_message(&mut self, message: Message, reactor: &mut dyn Reactor) {
        // A new target reaches the driver through the configuration space.
        if let Message::StatisticsInterval(interval) = message {
            self.settings.interval = interval;
            self.ask(reactor);
        }
    }
}
