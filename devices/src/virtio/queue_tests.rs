use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::QueueOwnedT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::conformance::{INDIRECT, NEXT, WRITE, descriptor_bytes};

const RAM: usize = 0x40000;
const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Where buffers and indirect tables may lie.
const DATA: u64 = 0x8000;
const SIZE: u16 = 8;

/// A queue of eight descriptors and the driver's side of it.
struct Rig {
    memory: Memory,
    interrupt: Interrupt,
    irq: EventFd,
    avail: u16,
}

impl Rig {
    fn new() -> Rig {
        let guest = GuestMemory::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(irq.try_clone().unwrap());
        Rig { memory: Memory::new(Arc::new(guest)), interrupt, irq, avail: 0 }
    }

    fn state(event_idx: bool) -> QueueState {
        QueueState {
            max_size: 256,
            size: SIZE,
            ready: true,
            event_idx_enabled: event_idx,
            desc_table: DESC,
            avail_ring: AVAIL,
            used_ring: USED,
            ..QueueState::default()
        }
    }

    fn queue(&self, event_idx: bool) -> Queue {
        self.start(Self::state(event_idx)).unwrap()
    }

    fn start(&self, state: QueueState) -> Result<Queue, QueueError> {
        Queue::new(&self.memory, &self.interrupt, state)
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        self.memory.guest().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn u16(&self, gpa: u64) -> u16 {
        self.memory.guest().read_obj(GuestAddress(gpa)).unwrap()
    }

    fn desc(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        self.write(DESC + 16 * u64::from(index), &descriptor_bytes(gpa, len, flags, next));
    }

    fn offer(&mut self, head: u16) {
        self.write(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(AVAIL + 2, &self.avail.to_le_bytes());
    }

    fn used(&self, slot: u16) -> (u32, u32) {
        let at = GuestAddress(USED + 4 + 8 * u64::from(slot));
        let element: u64 = self.memory.guest().read_obj(at).unwrap();
        (element as u32, (element >> 32) as u32)
    }

    fn fired(&self) -> bool {
        self.interrupt.acknowledge(u32::MAX);
        self.irq.read().is_ok()
    }

    /// Eight one-buffer chains, readable where the index is even.
    fn simple_chains(&self) {
        for index in 0..SIZE {
            let flags = if index % 2 == 0 { 0 } else { WRITE };
            self.desc(index, DATA + 0x100 * u64::from(index), 0x100, flags, 0);
        }
    }
}

#[test]
fn a_configuration_that_cannot_work_is_refused() {
    let rig = Rig::new();
    let good = Rig::state(false);
    assert!(rig.start(good).is_ok());
    let bad = [
        QueueState { ready: false, ..good },
        QueueState { size: 0, ..good },
        QueueState { size: 3, ..good },
        QueueState { size: 512, ..good },
        QueueState { max_size: 512, size: 512, ..good },
        QueueState { max_size: 0, ..good },
        QueueState { desc_table: DESC + 8, ..good },
        QueueState { avail_ring: AVAIL + 1, ..good },
        QueueState { used_ring: USED + 2, ..good },
        QueueState { desc_table: RAM as u64 - 16, ..good },
        QueueState { avail_ring: RAM as u64, ..good },
        QueueState { used_ring: u64::MAX - 3, ..good },
        QueueState { desc_table: !15, ..good },
    ];
    for state in bad {
        let err = rig.start(state).unwrap_err();
        assert!(matches!(err, QueueError::Config(_)), "{state:?} led to {err}");
    }
    // The last byte that a ring needs, with its EVENT_IDX word, is the last byte of RAM.
    let fits = RAM as u64 - (6 + 8 * u64::from(SIZE)).next_multiple_of(4);
    assert!(rig.start(QueueState { used_ring: fits, ..good }).is_ok());
    assert!(rig.start(QueueState { used_ring: fits + 4, ..good }).is_err());
}

#[test]
fn chains_come_out_in_order_and_go_back_in_any() {
    let mut rig = Rig::new();
    let mut queue = rig.queue(false);
    rig.desc(0, DATA, 10, NEXT, 3);
    rig.desc(3, DATA + 0x100, 20, NEXT | WRITE, 5);
    rig.desc(5, DATA + 0x200, 30, WRITE, 0);
    rig.desc(1, DATA + 0x300, 40, 0, 0);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(None));
    rig.offer(0);
    rig.offer(1);
    assert_eq!(queue.pop(&mut chain), Ok(Some(0)));
    assert_eq!((chain.readable.len(), chain.writable.len()), (10, 50));
    assert_eq!(chain.writable.iovecs().len(), 2);
    assert_eq!(queue.pop(&mut chain), Ok(Some(1)));
    assert_eq!((chain.readable.len(), chain.writable.len()), (40, 0));
    assert_eq!(queue.pop(&mut chain), Ok(None));
    assert_eq!(queue.in_flight(), 2);

    queue.complete(1, 0);
    assert_eq!((rig.u16(USED + 2), rig.used(0)), (1, (1, 0)));
    queue.complete(0, 50);
    assert_eq!((rig.u16(USED + 2), rig.used(1)), (2, (0, 50)));
    assert_eq!(queue.in_flight(), 0);
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let mut rig = Rig::new();
    let mut queue = rig.queue(false);
    let entry = |gpa, len, flags, next| descriptor_bytes(gpa, len, flags, next);
    // § 2.7.5.3 sets no alignment for the table.
    let at = DATA + 0x1003;
    rig.write(at, &[entry(DATA, 1, NEXT, 2), entry(0, 0, 7, 9), entry(DATA, 2, WRITE, 0)].concat());
    rig.desc(0, DATA, 4, NEXT, 1);
    rig.desc(1, at, 48, INDIRECT, 0);
    rig.offer(0);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(0)));
    assert_eq!((chain.readable.len(), chain.writable.len()), (5, 2));
}

#[test]
fn a_broken_chain_is_not_taken() {
    let mut rig = Rig::new();
    let mut queue = rig.queue(false);
    rig.desc(0, DATA, 16, NEXT, 0);
    rig.offer(0);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Err(QueueError::TooLong { head: 0 }));
    assert_eq!(queue.in_flight(), 0);
    assert_eq!(queue.state().next_avail, 0);
}

#[test]
fn a_head_that_is_held_cannot_be_taken_again() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut queue = rig.queue(false);
    rig.offer(2);
    rig.offer(2);
    let mut chain = Chain::default();
    assert_eq!(queue.pop(&mut chain), Ok(Some(2)));
    assert_eq!(queue.pop(&mut chain), Err(QueueError::InFlight { head: 2 }));
    queue.complete(2, 0);
    assert_eq!(queue.pop(&mut chain), Ok(Some(2)));
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_and_no_longer() {
    let mut rig = Rig::new();
    for index in 0..SIZE {
        let flags = if index + 1 < SIZE { NEXT } else { 0 };
        rig.desc(index, DATA, 1, flags, index + 1);
    }
    rig.offer(0);
    let mut chain = Chain::default();
    assert_eq!(rig.queue(false).pop(&mut chain), Ok(Some(0)));
    assert_eq!(chain.readable.len(), u64::from(SIZE));
    // One more through an indirect table at the end.
    rig.desc(SIZE - 1, DATA + 0x100, 32, INDIRECT, 0);
    let table = [descriptor_bytes(DATA, 1, NEXT, 1), descriptor_bytes(DATA, 1, 0, 0)].concat();
    rig.write(DATA + 0x100, &table);
    assert_eq!(rig.queue(false).pop(&mut chain), Err(QueueError::TooLong { head: 0 }));
}

#[test]
fn undone_requests_come_again() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut queue = rig.queue(false);
    for head in [4, 5, 6] {
        rig.offer(head);
    }
    let mut chain = Chain::default();
    for head in [4, 5, 6] {
        assert_eq!(queue.pop(&mut chain), Ok(Some(head)));
    }
    queue.complete(4, 0);
    queue.undo(&[5, 6]);
    assert_eq!(queue.in_flight(), 0);
    let state = queue.state();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    let mut queue = rig.start(state).unwrap();
    assert_eq!(queue.pop(&mut chain), Ok(Some(5)));
}

#[test]
fn staged_entries_show_together() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut queue = rig.queue(false);
    let mut chain = Chain::default();
    for head in [1, 3] {
        rig.offer(head);
        queue.pop(&mut chain).unwrap();
    }
    queue.stage(1, 100);
    queue.stage(3, 7);
    assert_eq!(rig.u16(USED + 2), 0);
    queue.publish();
    assert_eq!(rig.u16(USED + 2), 2);
    assert_eq!((rig.used(0), rig.used(1)), ((1, 100), (3, 7)));
}

#[test]
fn indices_wrap() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let start = u16::MAX - 2;
    rig.avail = start;
    rig.write(AVAIL + 2, &start.to_le_bytes());
    for event_idx in [false, true] {
        let state =
            QueueState { next_avail: rig.avail, next_used: rig.avail, ..Rig::state(event_idx) };
        let mut queue = rig.start(state).unwrap();
        let mut chain = Chain::default();
        for round in 0..20u16 {
            // The driver wants to hear of this very entry.
            rig.write(AVAIL + 4 + 2 * u64::from(SIZE), &rig.avail.to_le_bytes());
            rig.offer(round % SIZE);
            assert_eq!(queue.pop(&mut chain), Ok(Some(round % SIZE)));
            assert_eq!(queue.pop(&mut chain), Ok(None));
            queue.complete(round % SIZE, 1);
            queue.notify();
            assert!(rig.fired(), "round {round}");
            assert_eq!(rig.u16(USED + 2), rig.avail);
            assert_eq!(queue.enable_kicks(), Ok(false));
        }
    }
}

#[test]
fn interrupts_are_suppressed_by_flag() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut queue = rig.queue(false);
    let mut chain = Chain::default();
    queue.notify();
    assert!(!rig.fired(), "nothing was completed");
    for (flags, fires) in [(0u16, true), (1, false), (0, true)] {
        rig.write(AVAIL, &flags.to_le_bytes());
        rig.offer(0);
        queue.pop(&mut chain).unwrap();
        queue.complete(0, 0);
        queue.notify();
        assert_eq!(rig.fired(), fires, "flags {flags}");
        queue.notify();
        assert!(!rig.fired(), "once is enough");
    }
}

#[test]
fn interrupts_are_suppressed_by_index() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut queue = rig.queue(true);
    let mut chain = Chain::default();
    let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
    // The driver asks for an interrupt once entry 2 is used; the flag has no meaning then.
    rig.write(AVAIL, &1u16.to_le_bytes());
    rig.write(used_event, &2u16.to_le_bytes());
    for (entry, fires) in [(0, false), (1, false), (2, true), (3, false)] {
        rig.offer(entry);
        queue.pop(&mut chain).unwrap();
        queue.complete(entry, 0);
        queue.notify();
        assert_eq!(rig.fired(), fires, "entry {entry}");
    }
    // A batch that passes the index fires too.
    rig.write(used_event, &5u16.to_le_bytes());
    for entry in 4..8 {
        rig.offer(entry);
        queue.pop(&mut chain).unwrap();
        queue.complete(entry, 0);
    }
    queue.notify();
    assert!(rig.fired());
}

#[test]
fn kicks_are_suppressed_by_flag_or_index() {
    let mut rig = Rig::new();
    rig.simple_chains();
    let mut chain = Chain::default();

    let mut queue = rig.queue(false);
    queue.disable_kicks();
    assert_eq!(rig.u16(USED), 1);
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(rig.u16(USED), 0);
    rig.offer(0);
    assert_eq!(queue.enable_kicks(), Ok(true), "a request came in the meantime");

    let mut queue = rig.queue(true);
    let avail_event = USED + 4 + 8 * u64::from(SIZE);
    queue.pop(&mut chain).unwrap();
    queue.disable_kicks();
    assert_eq!(rig.u16(USED), 0, "the flag stays clear with EVENT_IDX");
    assert_eq!(queue.enable_kicks(), Ok(false));
    assert_eq!(rig.u16(avail_event), 1);
    rig.offer(1);
    assert_eq!(queue.enable_kicks(), Ok(true));
    rig.write(AVAIL + 2, &100u16.to_le_bytes());
    assert!(matches!(queue.enable_kicks(), Err(QueueError::AvailJump { .. })));
}

#[test]
fn kicks_are_asked_for_behind_what_is_left_to_wait() {
    for event_idx in [false, true] {
        let mut rig = Rig::new();
        rig.simple_chains();
        let mut queue = rig.queue(event_idx);
        for head in 0..3 {
            rig.offer(head);
        }
        queue.disable_kicks();
        assert_eq!(queue.enable_kicks_for_more(), Ok(3));
        assert_eq!(rig.u16(USED), 0);
        let event = rig.u16(USED + 4 + 8 * u64::from(SIZE));
        assert_eq!(event, if event_idx { 3 } else { 0 });
        rig.offer(3);
        assert_eq!(queue.enable_kicks_for_more(), Ok(4));
        rig.write(AVAIL + 2, &100u16.to_le_bytes());
        assert!(matches!(queue.enable_kicks_for_more(), Err(QueueError::AvailJump { .. })));
    }
}

#[test]
fn an_interrupt_sets_its_status_before_it_fires() {
    let rig = Rig::new();
    rig.interrupt.raise(INTERRUPT_USED);
    assert_eq!(rig.interrupt.status(), INTERRUPT_USED);
    assert!(rig.irq.read().is_ok());
    rig.interrupt.raise(INTERRUPT_CONFIG);
    rig.interrupt.acknowledge(INTERRUPT_USED);
    assert_eq!(rig.interrupt.status(), INTERRUPT_CONFIG);
    rig.irq.read().unwrap();
    rig.interrupt.refresh();
    assert!(rig.irq.read().is_ok(), "not everything is acknowledged");
    rig.interrupt.acknowledge(INTERRUPT_CONFIG);
    rig.interrupt.refresh();
    assert!(rig.irq.read().is_err());
}

/// One chain of the property test: lengths of the readable and of the writable buffers, and how
/// many of the descriptors go into an indirect table.
type Shape = (Vec<u32>, Vec<u32>, bool);

fn shape() -> impl Strategy<Value = Shape> {
    let lens = || proptest::collection::vec(1u32..0x200, 0..4);
    (lens(), lens(), any::<bool>())
        .prop_filter("a chain has a descriptor", |(r, w, _)| !r.is_empty() || !w.is_empty())
}

/// Writes a chain of `shape` that starts at `head`; descriptors after it are free to use.
fn lay_out(rig: &Rig, head: u16, (readable, writable, indirect): &Shape, data: &mut u64) -> u16 {
    let count = (readable.len() + writable.len()) as u16;
    let table = *data;
    let base = if *indirect { 0 } else { head };
    if *indirect {
        *data += 16 * u64::from(count);
        rig.desc(head, table, 16 * u32::from(count), INDIRECT, 0);
    }
    let lens = readable.iter().map(|&len| (len, 0)).chain(writable.iter().map(|&l| (l, WRITE)));
    for (i, (len, write)) in (0..).zip(lens) {
        let flags = write | if i + 1 < count { NEXT } else { 0 };
        let bytes = descriptor_bytes(*data, len, flags, base + i + 1);
        *data += u64::from(len);
        if *indirect {
            rig.write(table + 16 * u64::from(i), &bytes);
        } else {
            rig.write(DESC + 16 * u64::from(head + i), &bytes);
        }
    }
    if *indirect { 1 } else { count }
}

proptest! {
    /// On valid rings this queue and the reference take the same chains, publish the same used
    /// ring and want the same notifications.
    #[test]
    fn agrees_with_the_reference(
        start in any::<u16>(),
        event_idx in any::<bool>(),
        rounds in proptest::collection::vec(
            (proptest::collection::vec(shape(), 1..3), any::<u16>(), any::<bool>()), 1..12),
    ) {
        let mut ours = Rig::new();
        let mut theirs = Rig::new();
        let state = QueueState { next_avail: start, next_used: start, ..Rig::state(event_idx) };
        for rig in [&mut ours, &mut theirs] {
            rig.avail = start;
            rig.write(AVAIL + 2, &start.to_le_bytes());
            rig.write(USED + 2, &start.to_le_bytes());
        }
        let mut queue = ours.start(state).unwrap();
        let mut reference = virtio_queue::Queue::try_from(state).unwrap();
        for (shapes, used_event, no_interrupt) in rounds {
            let mut heads = Vec::new();
            for rig in [&mut ours, &mut theirs] {
                let (mut head, mut data) = (0, DATA);
                heads.clear();
                // Reference and test differ where NO_INTERRUPT is concerned: it ignores the flag.
                let flag = u16::from(no_interrupt && event_idx);
                rig.write(AVAIL, &flag.to_le_bytes());
                rig.write(AVAIL + 4 + 2 * u64::from(SIZE), &used_event.to_le_bytes());
                for shape in &shapes {
                    if head + (shape.0.len() + shape.1.len()) as u16 > SIZE {
                        break;
                    }
                    heads.push(head);
                    head += lay_out(rig, head, shape, &mut data);
                }
                for &head in &heads {
                    rig.offer(head);
                }
            }
            let guest = theirs.memory.guest();
            let expected: Vec<_> = reference
                .iter(guest.as_ref())
                .unwrap()
                .map(|chain| {
                    let sum = |descs: Vec<virtio_queue::desc::split::Descriptor>| {
                        descs.iter().map(|d| u64::from(d.len())).sum::<u64>()
                    };
                    let head = chain.head_index();
                    let readable = chain.clone().readable().collect();
                    (head, sum(readable), sum(chain.writable().collect()))
                })
                .collect();
            let mut found = Vec::new();
            let mut chain = Chain::default();
            while let Some(head) = queue.pop(&mut chain).unwrap() {
                found.push((head, chain.readable.len(), chain.writable.len()));
            }
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(found.len(), heads.len());
            for &(head, _, writable) in found.iter().rev() {
                queue.complete(head, writable as u32);
                reference.add_used(guest.as_ref(), head, writable as u32).unwrap();
            }
            queue.notify();
            prop_assert_eq!(ours.fired(), reference.needs_notification(guest.as_ref()).unwrap());
            prop_assert_eq!(queue.enable_kicks().unwrap(),
                reference.enable_notification(guest.as_ref()).unwrap());
            prop_assert_eq!(queue.state(), reference.state());
            let mut rings = [vec![0; 0x100], vec![0; 0x100]];
            for (rig, ring) in [&ours, &theirs].into_iter().zip(&mut rings) {
                rig.memory.guest().read_slice(ring, GuestAddress(USED)).unwrap();
            }
            prop_assert_eq!(&rings[0], &rings[1]);
        }
    }
}
