//! The io thread of a [`Harness`](super::Harness): file operations are performed in place,
//! readiness comes from a real epoll.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::virtio::device::{Action, Fault, FileOperation, Interest, Reactor};
use crate::virtio::queue::QueueState;

/// A file operation that has not ended.
pub(super) struct Operation {
    pub(super) group: usize,
    pub(super) token: u64,
    pub(super) operation: FileOperation,
}

struct Watch {
    fd: RawFd,
    group: usize,
    token: u32,
}

pub(super) struct TestReactor {
    /// The group whose worker runs.
    pub(super) group: usize,
    pub(super) operations: VecDeque<Operation>,
    pub(super) hold: bool,
    pub(super) alone: bool,
    /// Something was submitted since workers were last told that all was started.
    pub(super) unsettled: bool,
    pub(super) again: Vec<u16>,
    pub(super) timers: Vec<usize>,
    /// Queues to be looked at later, with their groups.
    pub(super) later: Vec<(usize, u16)>,
    pub(super) stopped: Vec<(u16, QueueState)>,
    pub(super) faults: Vec<Fault>,
    watches: Vec<Watch>,
    epoll: Epoll,
}

impl TestReactor {
    pub(super) fn new() -> TestReactor {
        TestReactor {
            group: 0,
            operations: VecDeque::new(),
            hold: false,
            alone: false,
            unsettled: false,
            again: Vec::new(),
            timers: Vec::new(),
            later: Vec::new(),
            stopped: Vec::new(),
            faults: Vec::new(),
            watches: Vec::new(),
            epoll: Epoll::new().unwrap(),
        }
    }

    /// Group and token of each descriptor that became ready.
    pub(super) fn poll(&mut self) -> Vec<(usize, u32)> {
        if self.watches.is_empty() {
            return Vec::new();
        }
        let mut events = [EpollEvent::default(); 16];
        let count = self.epoll.wait(0, &mut events).unwrap();
        events[..count]
            .iter()
            .filter_map(|event| {
                let fd = event.data() as RawFd;
                self.watches.iter().find(|w| w.fd == fd).map(|w| (w.group, w.token))
            })
            .collect()
    }

    /// Performs the oldest operation of `group`, or of any.
    pub(super) fn finish_operation(
        &mut self,
        group: Option<usize>,
    ) -> Option<(u64, io::Result<u32>)> {
        let at = self.operations.iter().position(|op| group.is_none_or(|g| g == op.group))?;
        let operation = self.operations.remove(at)?;
        Some((operation.token, perform(operation.operation)))
    }

    /// Forgets what belongs to the worker of `group`, which is gone.
    pub(super) fn forget(&mut self, group: usize) {
        self.timers.retain(|&g| g != group);
        self.later.retain(|&(g, _)| g != group);
        self.again.clear();
        for watch in self.watches.extract_if(.., |watch| watch.group == group) {
            let _ = self.epoll.ctl(ControlOperation::Delete, watch.fd, EpollEvent::default());
        }
    }
}

impl Reactor for TestReactor {
    fn watch(&mut self, fd: RawFd, token: u32, interest: Interest) -> io::Result<()> {
        let set = match interest {
            Interest::Readable => EventSet::IN,
            Interest::Writable => EventSet::OUT,
            Interest::Both => EventSet::IN | EventSet::OUT,
        };
        let event = EpollEvent::new(set | EventSet::EDGE_TRIGGERED, fd as u64);
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        self.watches.push(Watch { fd, group: self.group, token });
        Ok(())
    }

    fn unwatch(&mut self, fd: RawFd) {
        self.watches.retain(|watch| watch.fd != fd);
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn submit(&mut self, token: u64, operation: FileOperation) {
        self.unsettled = true;
        self.operations.push_back(Operation { group: self.group, token, operation });
    }

    fn batches(&self) -> bool {
        true
    }

    fn alone(&self) -> bool {
        self.alone
    }

    fn again(&mut self, index: u16) {
        if !self.again.contains(&index) {
            self.again.push(index);
        }
    }

    fn later(&mut self, index: u16, delay: Duration) {
        assert!(!delay.is_zero());
        if !self.later.contains(&(self.group, index)) {
            self.later.push((self.group, index));
        }
    }

    fn set_timer(&mut self, _delay: Duration) {
        if !self.timers.contains(&self.group) {
            self.timers.push(self.group);
        }
    }

    fn stopped(&mut self, index: u16, state: QueueState) {
        self.stopped.push((index, state));
    }

    fn consumed(&mut self, _bytes: usize) {}

    fn fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }
}

/// Does `operation` now.
fn perform(operation: FileOperation) -> io::Result<u32> {
    let invalid = |_| io::Error::from_raw_os_error(libc::EINVAL);
    let fd = operation.fd;
    let offset = libc::off_t::try_from(operation.offset).map_err(invalid)?;
    let result = match operation.action {
        Action::Call(call) => return call.run(),
        Action::Read(bufs) => {
            let (list, count) = (bufs.as_slice().as_ptr(), bufs.as_slice().len() as i32);
            // SAFETY: the list describes guest RAM, which the harness keeps mapped.
            unsafe { libc::preadv(fd, list, count, offset) }
        }
        Action::Write { bufs, durable } => {
            let (list, count) = (bufs.as_slice().as_ptr(), bufs.as_slice().len() as i32);
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, list, count, offset, flags) }
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
            let len = libc::off_t::try_from(len).map_err(invalid)?;
            // SAFETY: no memory is involved.
            unsafe { libc::fallocate(fd, mode, offset, len) as isize }
        }
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
