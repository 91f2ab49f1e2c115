//! File operations that may block, away from the event loop: one io_uring per io thread, or a
//! small pool of threads where the host refuses io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::virtio::device::{Action, FileOperation};
use io_uring::{IoUring, Probe, opcode, register::Restriction, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{STACK_SIZE, WorkerId};
use crate::seccomp::{self, ThreadKind};

/// Submission entries; more operations than this wait in a list until entries are free.
const RING_ENTRIES: u32 = 128;

/// Threads of the pool: a stuck file keeps at most this many operations of one io thread waiting.
const POOL_THREADS: usize = 4;

/// Who asked for an operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) worker: WorkerId,
    pub(super) token: u64,
}

/// An operation that ended.
pub(super) struct Completion {
    pub(super) origin: Origin,
    pub(super) result: io::Result<u32>,
}

/// Runs file operations. Completions are signalled at [`Engine::events`] and taken with
/// [`Engine::reap`]. There is a ring, a pool, or both.
pub(super) struct Engine {
    // Goes first: its end waits for operations.
    ring: Option<Box<Uring>>,
    pool: Option<Pool>,
}

impl Engine {
    /// An io_uring if the host has one that knows what is needed, else a pool; and a pool as well if there will be
    /// `calls` ([`Action::Call`]), which nothing else can run.
    pub(super) fn new(index: usize, calls: bool, seccomp: seccomp::Mode) -> io::Result<Engine> {
        let ring = match Uring::new() {
            Ok(ring) => Some(Box::new(ring)),
            Err(err) => {
                tracing::info!(%err, "no io_uring on this host, file I/O uses a thread pool");
                None
            }
        };
        let needed = calls || ring.is_none();
        let pool = needed.then(|| Pool::new(index, seccomp)).transpose()?;
        Ok(Engine { ring, pool })
    }

    /// Operations that are submitted together cost less.
    pub(super) fn batches(&self) -> bool {
        self.ring.is_some()
    }

    /// Readable (edge-triggered) when operations ended.
    pub(super) fn events(&self) -> impl Iterator<Item = RawFd> {
        // The ring itself: no signal is sent for what ended at submission and was reaped.
        let ring = self.ring.iter().map(|ring| ring.ring.as_raw_fd());
        ring.chain(self.pool.iter().map(|pool| pool.event.as_raw_fd()))
    }

    /// Queues an operation; [`Engine::flush`] starts it.
    pub(super) fn submit(&mut self, origin: Origin, operation: FileOperation) {
        match (&mut self.ring, &mut self.pool) {
            (Some(ring), _) if !matches!(operation.action, Action::Call(_)) => {
                ring.submit(origin, operation);
            }
            (_, Some(pool)) => pool.submit(origin, operation),
            (Some(ring), None) => {
                let result = Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
                ring.failed.push_back(Completion { origin, result });
            }
            // Not reached: there is one of them.
            (None, None) => {}
        }
    }

    /// Starts what was queued.
    pub(super) fn flush(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.flush();
        }
    }

    /// The next operation that ended, if any.
    pub(super) fn reap(&mut self) -> Option<Completion> {
        let ring = self.ring.as_mut().and_then(|ring| ring.reap());
        ring.or_else(|| self.pool.as_ref()?.done.try_recv().ok())
    }
}

/// True if a ring can be made.
pub(super) fn has_io_uring() -> bool {
    Uring::new().is_ok()
}

/// An operation under way: the kernel uses its buffers list until submission only, but the
/// operation is kept to say what a completion belongs to.
struct InFlight {
    origin: Origin,
    operation: FileOperation,
}

/// One io_uring, restricted to the operations of a disk.
pub(super) struct Uring {
    ring: IoUring,
    waiting: VecDeque<(Origin, FileOperation)>,
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
    failed: VecDeque<Completion>,
}

impl Uring {
    fn new() -> io::Result<Uring> {
        // One thread submits, and it comes by soon enough to complete what others did: less locking
        // and no interrupt per completion, since Linux 6.0.
        let ring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .build(RING_ENTRIES)
            .or_else(|_| IoUring::builder().setup_r_disabled().build(RING_ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // From here on the ring can do nothing else, whoever gets hold of it.
        let mut allowed = needed.map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Uring {
            ring,
            waiting: VecDeque::new(),
            in_flight: Vec::new(),
            free: Vec::new(),
            failed: VecDeque::new(),
        })
    }

    fn submit(&mut self, origin: Origin, operation: FileOperation) {
        if self.waiting.is_empty() && self.has_room() {
            self.push(origin, operation);
        } else {
            self.waiting.push_back((origin, operation));
        }
    }

    /// True if another operation fits, here and in the completion queue: the kernel keeps what does
    /// not fit there to itself until asked.
    fn has_room(&mut self) -> bool {
        let under_way = self.in_flight.len() - self.free.len();
        under_way < self.ring.params().cq_entries() as usize && !self.ring.submission().is_full()
    }

    /// Puts an operation into the submission queue, which has room.
    fn push(&mut self, origin: Origin, operation: FileOperation) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.in_flight.push(None);
            self.in_flight.len() - 1
        });
        let in_flight = self.in_flight[slot].insert(InFlight { origin, operation });
        let entry = entry(&in_flight.operation).user_data(slot as u64);
        // SAFETY: the buffers are guest RAM, mapped until the worker that submitted gets the
        // completion; a list of several buffers is on the heap and lives in `in_flight` until then.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.fail(slot, io::Error::from_raw_os_error(libc::EBUSY));
        }
    }

    fn flush(&mut self) {
        loop {
            while self.has_room() {
                let Some((origin, operation)) = self.waiting.pop_front() else { break };
                self.push(origin, operation);
            }
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(0) => return,
                Ok(_) => {}
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is out of resources: what is queued stays in the ring and goes with the
                // next flush, after completions were reaped.
                Err(err) => {
                    tracing::warn!(%err, "io_uring submission deferred");
                    return;
                }
            }
        }
    }

    fn fail(&mut self, slot: usize, err: io::Error) {
        if let Some(InFlight { origin, .. }) = self.in_flight[slot].take() {
            self.free.push(slot);
            self.failed.push_back(Completion { origin, result: Err(err) });
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        if let Some(failed) = self.failed.pop_front() {
            return Some(failed);
        }
        loop {
            let entry = self.ring.completion().next()?;
            let slot = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(done) = self.in_flight.get_mut(slot).and_then(Option::take) else { continue };
            self.free.push(slot);
            let result = u32::try_from(entry.result())
                .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            drop(done.operation);
            return Some(Completion { origin: done.origin, result });
        }
    }
}

/// How long the end of an io thread waits for operations under way.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

impl Drop for Uring {
    /// Waits for what is under way: the kernel may write to guest RAM until then, and the memory at
    /// those addresses may be the next machine's a moment later.
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN_DEADLINE;
        self.waiting.clear();
        loop {
            while self.reap().is_some() {}
            if self.in_flight.iter().all(Option::is_none) {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::error!("a file operation does not end; its back-end hangs");
                return;
            }
            let timeout = types::Timespec::from(left);
            let args = types::SubmitArgs::new().timespec(&timeout);
            // An error is a timeout or a signal; the loop looks at the clock.
            let _ = self.ring.submitter().submit_with_args(1, &args);
        }
    }
}

fn entry(operation: &FileOperation) -> squeue::Entry {
    let fd = types::Fd(operation.fd);
    let offset = operation.offset;
    match &operation.action {
        // One buffer goes without its list, which saves the kernel a copy; and a list of several is
        // on the heap, where it stays when its owner moves.
        Action::Read(bufs) => match bufs.as_slice() {
            &[buf] => opcode::Read::new(fd, buf.iov_base.cast(), buf.iov_len as u32)
                .offset(offset)
                .build(),
            bufs => opcode::Readv::new(fd, bufs.as_ptr(), bufs.len() as u32).offset(offset).build(),
        },
        Action::Write { bufs, durable } => match bufs.as_slice() {
            &[buf] => opcode::Write::new(fd, buf.iov_base.cast(), buf.iov_len as u32)
                .offset(offset)
                .rw_flags(write_flags(*durable))
                .build(),
            bufs => opcode::Writev::new(fd, bufs.as_ptr(), bufs.len() as u32)
                .offset(offset)
                .rw_flags(write_flags(*durable))
                .build(),
        },
        Action::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Action::SyncAll => opcode::Fsync::new(fd).build(),
        Action::Allocate { mode, len } => {
            opcode::Fallocate::new(fd, *len).offset(offset).mode(*mode).build()
        }
        // Not reached: these go to the pool.
        Action::Call(_) => opcode::Nop::new().build(),
    }
}

fn write_flags(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

type Job = (Origin, FileOperation);

/// A few threads that do one blocking call at a time.
pub(super) struct Pool {
    jobs: Option<mpsc::Sender<Job>>,
    done: mpsc::Receiver<Completion>,
    event: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    fn new(index: usize, seccomp: seccomp::Mode) -> io::Result<Pool> {
        let (jobs, receiver) = mpsc::channel::<Job>();
        let receiver = Arc::new(Mutex::new(receiver));
        let (done_tx, done) = mpsc::channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let mut pool = Pool { jobs: Some(jobs), done, event, threads: Vec::new() };
        for n in 0..POOL_THREADS {
            let receiver = Arc::clone(&receiver);
            let (done, event) = (done_tx.clone(), Arc::clone(&pool.event));
            let thread = std::thread::Builder::new()
                .name(format!("pool {index}.{n}"))
                .stack_size(STACK_SIZE)
                .spawn(move || {
                    if let Err(err) = seccomp::apply(ThreadKind::Pool, seccomp) {
                        tracing::error!(%err, "pool thread could not be filtered and ends");
                        return;
                    }
                    loop {
                        // The lock is held while waiting: one thread waits for the next job, the
                        // others for the lock.
                        let job = receiver.lock().ok().and_then(|jobs| jobs.recv().ok());
                        let Some((origin, operation)) = job else { return };
                        let completion = Completion { origin, result: perform(operation) };
                        if done.send(completion).is_err() || event.write(1).is_err() {
                            return;
                        }
                    }
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    fn submit(&mut self, origin: Origin, operation: FileOperation) {
        if let Some(jobs) = &self.jobs {
            // Fails only if every pool thread ended; the request then stays in flight and the
            // device's stop deadline names it.
            let _ = jobs.send((origin, operation));
        }
    }
}

impl Drop for Pool {
    /// Waits for what is under way, as for a ring.
    fn drop(&mut self) {
        self.jobs = None;
        let deadline = Instant::now() + DRAIN_DEADLINE;
        // Each thread holds a sender: the channel closes with the last of them.
        loop {
            match self.done.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    tracing::error!("a file operation does not end; its back-end hangs");
                    return;
                }
            }
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Does `operation` now, on this thread.
fn perform(operation: FileOperation) -> io::Result<u32> {
    let FileOperation { fd, offset, action } = operation;
    let action = match action {
        Action::Call(call) => return call.run(),
        action => action,
    };
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let offset = libc::off_t::try_from(offset).map_err(invalid)?;
    loop {
        let result = match &action {
            Action::Read(bufs) => {
                let (ptr, len) = (bufs.as_slice().as_ptr(), bufs.as_slice().len() as i32);
                // SAFETY: the list describes guest RAM that stays mapped until completion.
                unsafe { libc::preadv(fd, ptr, len, offset) }
            }
            Action::Write { bufs, durable } => {
                let (ptr, len) = (bufs.as_slice().as_ptr(), bufs.as_slice().len() as i32);
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, ptr, len, offset, write_flags(*durable)) }
            }
            Action::Sync => {
                // SAFETY: no memory is involved.
                unsafe { libc::fdatasync(fd) as isize }
            }
            Action::SyncAll => {
                // SAFETY: no memory is involved.
                unsafe { libc::fsync(fd) as isize }
            }
            Action::Allocate { mode, len } => {
                let len = libc::off_t::try_from(*len).map_err(invalid)?;
                // SAFETY: no memory is involved.
                unsafe { libc::fallocate(fd, *mode, offset, len) as isize }
            }
            // Not reached: it was run above.
            Action::Call(_) => 0,
        };
        match u32::try_from(result) {
            Ok(done) => return Ok(done),
            Err(_) => {
                let err = io::Error::last_os_error();
                if err.kind() != io::ErrorKind::Interrupted {
                    return Err(err);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::{Duration, Instant};

    const ORIGIN: Origin = Origin { worker: WorkerId { device: 0, group: 0 }, token: 7 };

    fn ring() -> Engine {
        Engine { ring: Some(Box::new(Uring::new().unwrap())), pool: None }
    }

    fn pool() -> Engine {
        Engine { ring: None, pool: Some(Pool::new(0, seccomp::Mode::Off).unwrap()) }
    }

    fn wait(engine: &mut Engine) -> Completion {
        let start = Instant::now();
        loop {
            if let Some(completion) = engine.reap() {
                return completion;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "operation never ended");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn exercise(mut engine: Engine) {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 8192]).unwrap();
        let fd = file.as_raw_fd();
        let mut run = |action, offset| {
            engine.submit(ORIGIN, FileOperation { fd, offset, action });
            engine.flush();
            let completion = wait(&mut engine);
            assert_eq!(completion.origin.token, 7);
            completion.result
        };
        assert_eq!(run(Action::Sync, 0).unwrap(), 0);
        assert_eq!(run(Action::SyncAll, 0).unwrap(), 0);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(run(Action::Allocate { mode: punch, len: 4096 }, 4096).unwrap(), 0);
        let err = run(Action::Allocate { mode: -1, len: 4096 }, 0).unwrap_err();
        assert!(err.raw_os_error().is_some());
        use std::os::unix::fs::FileExt;
        let mut bytes = [9; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..4096].iter().all(|&b| b == 1) && bytes[4096..].iter().all(|&b| b == 0));
    }

    #[test]
    fn pool_runs_operations() {
        exercise(pool());
    }

    #[test]
    fn ring_runs_operations() {
        exercise(ring());
    }

    #[test]
    fn calls_go_to_a_pool() {
        use devices::virtio::device::Blocking;
        let call = || {
            let thread = std::thread::current();
            let in_pool = thread.name().is_some_and(|name| name.starts_with("pool"));
            FileOperation {
                fd: -1,
                offset: 0,
                action: Action::Call(Blocking::new(move || {
                    let here = std::thread::current();
                    let here = here.name().is_some_and(|name| name.starts_with("pool"));
                    Ok(u32::from(here && !in_pool))
                })),
            }
        };
        let mut both = Engine::new(0, true, seccomp::Mode::Off).unwrap();
        assert_eq!(both.events().count(), 2);
        for engine in [&mut both, &mut pool()] {
            engine.submit(ORIGIN, call());
            assert_eq!(wait(engine).result.unwrap(), 1);
        }
        // Whoever forgets to ask for one gets an error, not a request that never ends.
        let mut ring = ring();
        ring.submit(ORIGIN, call());
        wait(&mut ring).result.unwrap_err();
    }

    #[test]
    fn a_ring_waits_for_what_is_under_way() {
        static ZEROES: [u8; 4096] = [0; 4096];
        // A full pipe: another write ends only when somebody reads.
        const FULL: usize = 64 * 1024;
        let (mut reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&[1; FULL]).unwrap();
        let mut engine = ring();
        let bufs = devices::virtio::device::IoVecs::repeat(&ZEROES, 4096);
        let action = Action::Write { bufs, durable: false };
        engine.submit(ORIGIN, FileOperation { fd: writer.as_raw_fd(), offset: u64::MAX, action });
        engine.flush();
        assert!(engine.reap().is_none());
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            let mut all = Vec::new();
            io::Read::read_to_end(&mut reader, &mut all).unwrap();
            all.len()
        });
        drop(engine);
        // Had the ring not waited, closing the pipe here would lose the write.
        drop(writer);
        assert_eq!(late.join().unwrap(), FULL + 4096);
    }

    #[test]
    fn more_operations_than_ring_entries_all_end() {
        let mut engine = ring();
        let file = tempfile::tempfile().unwrap();
        let count = RING_ENTRIES as usize * 3;
        for _ in 0..count {
            let operation = FileOperation { fd: file.as_raw_fd(), offset: 0, action: Action::Sync };
            engine.submit(ORIGIN, operation);
        }
        engine.flush();
        for _ in 0..count {
            engine.flush();
            wait(&mut engine).result.unwrap();
        }
        assert!(engine.reap().is_none());
    }
}
