//! What every device owes, as functions over a device and its [`Probe`]; the `conformance!` macro
//! makes a test of each.

use super::{Buffer, Harness, INDIRECT, NEXT, Probe, RAM, RINGS, RINGS_LEN, WRITE};
use crate::virtio::device::{Device, Fault};
use crate::virtio::features;
use crate::virtio::mmio::{reg, status};
use crate::virtio::queue::{INTERRUPT_CONFIG, MAX_SIZE, QueueError};

/// Requests that are under way when a device is stopped.
pub(super) const IN_FLIGHT: usize = 8;

pub(super) fn works<D: Device>(harness: &mut Harness<D>, probe: &Probe<D>) {
    let buffers = (probe.request)(harness);
    let written = harness.request(probe.queue, &buffers).expect("a valid request was not served");
    (probe.check)(harness, written);
    assert!(harness.take_fault().is_none());
}

/// Features, queue sizes and identity can be read, and all of what is offered accepted.
pub fn negotiates_what_it_offers<D: Device>(make: impl Fn() -> D, _probe: Probe<D>) {
    let mut harness = Harness::new(make());
    assert_eq!(harness.read_register(reg::DEVICE_ID), harness.device().kind() as u32);
    let offered = harness.offered();
    assert_eq!(offered & features::TRANSPORT, features::TRANSPORT);
    assert_eq!(offered & !features::TRANSPORT, harness.device().features());
    let queues = harness.device().queues().to_vec();
    assert!(!queues.is_empty());
    for (index, &size) in (0..).zip(&queues) {
        assert!(size.is_power_of_two() && size <= MAX_SIZE);
        harness.write_register(reg::QUEUE_SEL, index);
        assert_eq!(harness.read_register(reg::QUEUE_SIZE_MAX), u32::from(size));
    }
    harness.write_register(reg::QUEUE_SEL, queues.len() as u32);
    assert_eq!(harness.read_register(reg::QUEUE_SIZE_MAX), 0);
    let mut grouped: Vec<u16> = harness.device().groups().into_iter().flatten().collect();
    grouped.sort_unstable();
    assert_eq!(grouped, (0..queues.len() as u16).collect::<Vec<_>>());
    assert!(harness.negotiate(offered));
}

/// FEATURES_OK stays clear when the driver wants more than is offered, or a legacy device.
pub fn refuses_features_it_did_not_offer<D: Device>(make: impl Fn() -> D, _probe: Probe<D>) {
    let offered = Harness::new(make()).offered();
    for bit in (0..64).map(|bit| 1u64 << bit).filter(|bit| offered & bit == 0) {
        assert!(!Harness::new(make()).negotiate(offered | bit), "bit {bit:#x} was accepted");
    }
    assert!(!Harness::new(make()).negotiate(offered & !features::VERSION_1));
    assert!(Harness::new(make()).negotiate(features::VERSION_1));
}

/// Requests are served with all features, and with as few as a driver may accept.
pub fn works_once_activated<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    for event_idx in [0, features::EVENT_IDX] {
        let mut harness = Harness::new(make());
        let offered = harness.offered() & !features::EVENT_IDX;
        harness.activate_with(offered | event_idx);
        assert_eq!(harness.read_register(reg::STATUS) & status::NEEDS_RESET, 0);
        // Many, so that the rings wrap.
        for _ in 0..MAX_SIZE * 3 {
            works(&mut harness, &probe);
        }
        assert!(harness.interrupt().status() != 0, "the driver was never interrupted");
    }
}

/// A reset stops the device, also with requests under way, and it can be initialised again.
pub fn works_after_a_reset<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    let mut harness = Harness::new(make());
    for _ in 0..3 {
        harness.activate();
        works(&mut harness, &probe);
        start_requests(&mut harness, &probe, IN_FLIGHT);
        harness.hold_operations(true);
        harness.kick(probe.queue);
        harness.turn();
        harness.reset();
        harness.hold_operations(false);
        assert_eq!(harness.interrupt().status(), 0);
    }
    harness.activate();
    works(&mut harness, &probe);
}

pub(super) fn start_requests<D: Device>(
    harness: &mut Harness<D>,
    probe: &Probe<D>,
    count: usize,
) -> Vec<u16> {
    (0..count)
        .map(|_| {
            let buffers = (probe.request)(harness);
            harness.offer(probe.queue, &buffers)
        })
        .collect()
}

/// An idle device stops where it stands and goes on from there.
pub fn stops_and_goes_on<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    let mut harness = Harness::new(make());
    harness.activate();
    let queues = harness.device().queues().len();
    for round in 1..5u16 {
        works(&mut harness, &probe);
        let states = harness.pause();
        assert_eq!(states.len(), queues);
        for &(index, state) in &states {
            assert_eq!(state.next_avail, state.next_used, "queue {index} has requests in flight");
        }
        let (_, state) = states[usize::from(probe.queue)];
        assert_eq!(state.next_used, round);
        harness.resume();
        harness.run();
    }
}

/// A device that is stopped with requests under way ends or gives back each of them, and after
/// going on each has been served exactly once.
pub fn stops_with_work_half_done<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    for finished in 0..IN_FLIGHT {
        let mut harness = Harness::new(make());
        harness.activate();
        harness.hold_operations(true);
        let mut heads = start_requests(&mut harness, &probe, IN_FLIGHT);
        harness.kick(probe.queue);
        harness.turn();
        for _ in 0..finished {
            harness.finish_operation();
        }
        for (index, state) in harness.pause() {
            assert_eq!(state.next_avail, state.next_used, "queue {index} has requests in flight");
            assert_eq!(state.next_used, harness.used_index(index), "unpublished entries");
        }
        harness.hold_operations(false);
        harness.resume();
        harness.run();
        let mut used: Vec<u16> =
            std::iter::from_fn(|| harness.used(probe.queue)).map(|(head, _)| head).collect();
        used.sort_unstable();
        heads.sort_unstable();
        assert_eq!(used, heads);
        works(&mut harness, &probe);
    }
}

/// A way to break the rules of the ring.
struct Malformed<D: Device> {
    name: &'static str,
    /// Puts it into a queue.
    make: fn(&mut Harness<D>, u16),
    /// The error that it has to lead to.
    expected: fn(&QueueError) -> bool,
}

fn table<D: Device>(
    harness: &mut Harness<D>,
    queue: u16,
    len: u32,
    entries: &[(u64, u32, u16, u16)],
) {
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|&(gpa, len, flags, next)| super::descriptor_bytes(gpa, len, flags, next))
        .collect();
    let (gpa, _) = harness.readable(&bytes);
    harness.descriptor(queue, 0, gpa, len, INDIRECT, 0);
    harness.make_available(queue, 0);
}

fn single<D: Device>(
    harness: &mut Harness<D>,
    queue: u16,
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    harness.descriptor(queue, 0, gpa, len, flags, next);
    harness.make_available(queue, 0);
}

fn malformed<D: Device>() -> Vec<Malformed<D>> {
    fn is_buffer(err: &QueueError) -> bool {
        matches!(err, QueueError::Buffer { .. })
    }
    fn is_index(err: &QueueError) -> bool {
        matches!(err, QueueError::Index { .. })
    }
    fn is_too_long(err: &QueueError) -> bool {
        matches!(err, QueueError::TooLong { .. })
    }
    fn is_indirect(err: &QueueError) -> bool {
        matches!(err, QueueError::Indirect { .. })
    }
    let mut all: Vec<Malformed<D>> = Vec::new();
    let mut add = |name, expected, make| all.push(Malformed { name, make, expected });
    add("loop of one", is_too_long, |h, q| single(h, q, 0x10000, 16, NEXT, 0));
    add("loop of two", is_too_long, |h, q| {
        h.descriptor(q, 1, 0x10000, 16, NEXT, 0);
        single(h, q, 0x10000, 16, NEXT, 1);
    });
    add("between the pieces of RAM", is_buffer, |h, q| single(h, q, RAM, 16, 0, 0));
    add("past the end of a piece", is_buffer, |h, q| single(h, q, RAM - 8, 16, WRITE, 0));
    add("past the end of RAM", is_buffer, |h, q| single(h, q, RINGS + RINGS_LEN, 1, 0, 0));
    add("wraps", is_buffer, |h, q| single(h, q, u64::MAX - 8, 64, WRITE, 0));
    add("empty", is_buffer, |h, q| single(h, q, 0x10000, 0, 0, 0));
    add("huge", is_buffer, |h, q| single(h, q, 0x10000, u32::MAX, WRITE, 0));
    add(
        "readable after writable",
        |err| matches!(err, QueueError::Order { .. }),
        |h, q| {
            h.descriptor(q, 1, 0x10000, 16, 0, 0);
            single(h, q, 0x10000, 16, NEXT | WRITE, 1);
        },
    );
    add("next outside the table", is_index, |h, q| single(h, q, 0x10000, 16, NEXT, u16::MAX));
    add("head outside the table", is_index, |h, q| {
        let size = h.device().queues()[usize::from(q)];
        h.make_available(q, size);
    });
    add(
        "index jump",
        |err| matches!(err, QueueError::AvailJump { .. }),
        |h, q| {
            let size = h.device().queues()[usize::from(q)];
            h.set_available_index(q, size + 1);
        },
    );
    add(
        "index goes back",
        |err| matches!(err, QueueError::AvailJump { .. }),
        |h, q| {
            h.set_available_index(q, u16::MAX);
        },
    );
    add("indirect table outside RAM", is_buffer, |h, q| single(h, q, RAM, 16, INDIRECT, 0));
    add("empty indirect table", is_indirect, |h, q| single(h, q, 0x10000, 0, INDIRECT, 0));
    add("broken indirect length", is_indirect, |h, q| table(h, q, 24, &[(0x10000, 16, 0, 0); 2]));
    add("oversized indirect table", is_indirect, |h, q| {
        let size = h.device().queues()[usize::from(q)];
        single(h, q, 0x10000, 16 * (u32::from(size) + 1), INDIRECT, 0);
    });
    add("nested indirect table", is_indirect, |h, q| {
        table(h, q, 16, &[(0x10000, 16, INDIRECT, 0)]);
    });
    add("indirect with next", is_indirect, |h, q| {
        single(h, q, 0x10000, 16, INDIRECT | NEXT, 1);
    });
    add("indirect next outside its table", is_index, |h, q| {
        table(h, q, 32, &[(0x10000, 16, NEXT, 2), (0x10000, 16, 0, 0)]);
    });
    add("loop in an indirect table", is_too_long, |h, q| {
        table(h, q, 32, &[(0x10000, 16, NEXT, 1), (0x10000, 16, NEXT, 0)]);
    });
    all
}

/// Each way to break the rules of the ring, in each queue, makes the device ask for a reset, and
/// nothing else; after the reset it works.
pub fn survives_malformed_chains<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    let mut harness = Harness::new(make());
    for queue in 0..harness.device().queues().len() as u16 {
        for case in malformed::<D>() {
            let name = case.name;
            harness.activate();
            (case.make)(&mut harness, queue);
            harness.kick(queue);
            harness.run();
            (probe.stimulus)(&mut harness);
            harness.run();
            match harness.take_fault() {
                Some(Fault::Queue(index, err)) if index == queue && (case.expected)(&err) => {}
                other => panic!("{name} in queue {queue} led to {other:?}"),
            }
            assert!(harness.read_register(reg::STATUS) & status::NEEDS_RESET != 0);
            assert!(harness.interrupt().status() & INTERRUPT_CONFIG != 0);
            assert_eq!(harness.used_index(queue), 0, "{name} was completed");
            // A device that is broken is not served, and neither does it spin.
            harness.kick(queue);
            assert!(harness.run(), "{name} in queue {queue} keeps the device busy");
            harness.reset();
            harness.activate();
            works(&mut harness, &probe);
            harness.reset();
        }
        // The same head twice is an error only while the device holds it.
        harness.activate();
        let buffers: Vec<Buffer> = (probe.request)(&mut harness);
        let head = harness.offer(queue, &buffers);
        harness.make_available(queue, head);
        harness.hold_operations(true);
        harness.kick(queue);
        harness.run();
        harness.hold_operations(false);
        harness.run();
        harness.reset();
        harness.activate();
        works(&mut harness, &probe);
        harness.reset();
    }
}

/// Rings and descriptor tables full of nonsense neither crash the device nor keep it busy.
#[cfg(test)]
pub fn survives_random_rings<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    use std::cell::RefCell;

    let harness = RefCell::new(Harness::new(make()));
    // Mostly plausible, so that chains get some way before they break.
    let gpa = prop_oneof![
        8 => 0..RAM,
        2 => RINGS..RINGS + RINGS_LEN,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![8 => 1u32..0x1000, 2 => 0u32..0x30000, 1 => any::<u32>()];
    let flags = prop_oneof![12 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![12 => 0u16..32, 1 => any::<u16>()];
    let desc = prop::collection::vec((gpa, len, flags, next), 32);
    let heads = prop::collection::vec(prop_oneof![12 => 0u16..32, 1 => any::<u16>()], 0..40);
    let queue = any::<u16>();
    let noise = prop::collection::vec(any::<u8>(), 0..256);
    let mut runner =
        TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    runner
        .run(&(desc, heads, queue, noise, any::<bool>()), |(desc, heads, queue, noise, jump)| {
            let harness = &mut *harness.borrow_mut();
            let queue = queue % harness.device().queues().len() as u16;
            harness.activate();
            // Requests headers and indirect tables may come out of this.
            harness.write(0, &noise.repeat(0x1000 / noise.len().max(1)));
            for (index, &(gpa, len, flags, next)) in (0..).zip(&desc) {
                harness.descriptor(queue, index, gpa, len, flags, next);
            }
            for &head in &heads {
                harness.make_available(queue, head);
            }
            if jump {
                harness.set_available_index(queue, heads.len() as u16 * 9);
            }
            harness.kick(queue);
            harness.run();
            (probe.stimulus)(harness);
            harness.run();
            harness.reset();
            harness.activate();
            works(harness, &probe);
            harness.reset();
            Ok(())
        })
        .unwrap();
}

/// Whatever a driver does in whatever order, the device survives it.
#[cfg(test)]
pub fn survives_a_random_driver<D: Device>(make: impl Fn() -> D, _probe: Probe<D>) {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    let mut runner =
        TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    runner
        .run(&prop::collection::vec(any::<u8>(), 0..1500), |bytes| {
            super::fuzz(make(), &bytes);
            Ok(())
        })
        .unwrap();
}

/// The configuration space takes accesses of any size at any offset.
pub fn takes_any_configuration_access<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    let mut harness = Harness::new(make());
    harness.activate();
    let config = harness.device().config();
    let offsets = (0..config.len() as u64 + 16).chain([0xfff, u64::MAX - reg::CONFIG - 1]);
    for offset in offsets {
        for len in 0..17 {
            let mut data = vec![0xaa; len];
            harness.registers().read(reg::CONFIG + offset, &mut data);
            for (i, &byte) in data.iter().enumerate() {
                let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
                assert_eq!(byte, config.get(at).copied().unwrap_or(0));
            }
        }
    }
    for offset in (0..64).chain([0xfff, u64::MAX - reg::CONFIG]) {
        for len in 0..17 {
            harness.write_bytes(reg::CONFIG + offset, &vec![0x5a; len]);
        }
    }
    works(&mut harness, &probe);
}
