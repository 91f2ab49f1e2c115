//! What every device owes when it is saved and restored: nothing of its driver's is lost, nothing is
//! done twice, and what cannot have been saved is refused.

use super::checks::{IN_FLIGHT, start_requests, works};
use super::{Harness, Probe};
use crate::virtio::device::{Device, Payload, RestoreError};
use crate::virtio::features;
use crate::virtio::mmio::{Registers, reg, status};
use crate::virtio::queue::INTERRUPT_USED;

/// Timers that a device may let expire before it serves what it was restored with.
const PATIENCE: usize = 64;

/// What is saved of a transport and of its device.
pub type Saved = [Payload; 2];

impl<D: Device> Harness<D> {
    /// What is saved of transport and device.
    ///
    /// # Panics
    /// The device is not paused.
    pub fn save(&self) -> Saved {
        assert!(self.workers.is_empty(), "a worker runs");
        [self.registers.save(self.interrupt.status()), self.device.save()]
    }

    /// Another machine with this one's memory, whose `device` took what was `saved`. It goes on, and
    /// with it the driver, once it is resumed.
    ///
    /// # Errors
    /// [`RestoreError`] of the transport or of the device.
    pub fn restored(&self, device: D, saved: &Saved) -> Result<Harness<D>, RestoreError> {
        let mut other = Harness::with_memory(device, self.memory.clone());
        other.rings.clone_from(&self.rings);
        other.next_buffer = self.next_buffer;
        let [transport, own] = saved;
        other.device.restore(own)?;
        let interrupt = other.registers.restore(transport, other.device.config())?;
        other.interrupt.restore(interrupt);
        other.faulted = other.registers.is_broken();
        Ok(other)
    }

    /// As [`Harness::restored`] with what this one saves, which the other one then has to save as
    /// well, byte for byte.
    ///
    /// # Panics
    /// It does not.
    pub fn moved_to(&self, device: D) -> Harness<D> {
        let saved = self.save();
        let other = self.restored(device, &saved).expect("a device refused its own state");
        assert_eq!(other.save(), saved, "what was restored is not what was saved");
        other
    }

    /// Checks that other registers take what these save, which have to be paused. Unlike the device,
    /// which may have a back-end that there is once, they can be made anew at any time.
    ///
    /// # Panics
    /// They do not.
    pub fn registers_can_be_moved(&self) {
        let device = &self.device;
        let mut other = Registers::new(
            device.kind() as u32,
            device.features(),
            device.queues(),
            device.config(),
        );
        let interrupt = self.interrupt.status();
        let saved = self.registers.save(interrupt);
        assert_eq!(other.restore(&saved, device.config()), Ok(interrupt));
        assert_eq!(other, self.registers);
    }

    /// Heads of queue `queue` that were used since the last look, in order.
    fn heads_used(&mut self, queue: u16) -> Vec<u16> {
        let mut heads: Vec<u16> =
            std::iter::from_fn(|| self.used(queue)).map(|(head, _)| head).collect();
        heads.sort_unstable();
        heads
    }

    /// Runs until nothing is left to do, not even later.
    fn settle(&mut self) {
        self.run();
        for _ in 0..PATIENCE {
            if !self.expire_timers() {
                break;
            }
            self.run();
        }
    }
}

/// How the driver of a test wants to be interrupted.
#[derive(Clone, Copy, Debug)]
enum Wish {
    /// For all, by flag.
    Flag,
    /// For the first of what it asks for, by index.
    First,
    /// For the last.
    Last,
}

/// A device that is saved in the middle of its work goes on with it in another machine: with requests
/// that were ended and not yet seen by the driver, those that were under way, and those that were not
/// taken. Each is completed once, and the driver is interrupted when it asked for it.
pub fn goes_on_in_another_machine<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    for wish in [Wish::Flag, Wish::First, Wish::Last] {
        for ended in [0, 1, IN_FLIGHT / 2, IN_FLIGHT] {
            let mut old = Harness::new(make());
            let by_index = if matches!(wish, Wish::Flag) { 0 } else { features::EVENT_IDX };
            let offered = old.offered() & !features::EVENT_IDX;
            old.activate_with(offered | by_index);
            // The indices are to be somewhere else than at the start.
            for _ in 0..5 {
                works(&mut old, &probe);
            }
            old.interrupts();
            let first = old.used_index(probe.queue);
            let last = first + 2 * IN_FLIGHT as u16 - 1;
            match wish {
                Wish::Flag => {}
                Wish::First => old.set_used_event(probe.queue, first),
                Wish::Last => old.set_used_event(probe.queue, last),
            }

            old.hold_operations(true);
            let mut heads = start_requests(&mut old, &probe, IN_FLIGHT);
            old.kick(probe.queue);
            old.turn();
            for _ in 0..ended {
                old.finish_operation();
            }
            // These are not even told of.
            heads.extend(start_requests(&mut old, &probe, IN_FLIGHT));
            old.pause();
            let done = old.used_index(probe.queue) - first;
            let pending = old.interrupt().status();
            let context = format!("{wish:?}, {ended} ended, {done} done");
            let due = match wish {
                Wish::Flag | Wish::First => done > 0,
                Wish::Last => usize::from(done) == heads.len(),
            };
            assert_eq!(pending & INTERRUPT_USED != 0, due, "{context}");

            let mut new = old.moved_to(make());
            drop(old);
            assert_eq!(new.interrupt().status(), pending, "{context}");
            new.resume();
            assert_eq!(new.interrupts() != 0, pending != 0, "{context}: an edge was lost");
            new.settle();
            let rest = usize::from(done) < heads.len();
            let due = match wish {
                Wish::Flag | Wish::Last => rest,
                Wish::First => rest && done == 0,
            };
            let interrupted = new.interrupt().status() & INTERRUPT_USED != 0;
            assert_eq!(interrupted, due, "{context}: the rest was completed");
            heads.sort_unstable();
            assert_eq!(new.heads_used(probe.queue), heads, "{context}");
            assert!(new.take_fault().is_none());
            works(&mut new, &probe);
        }
    }
}

/// A way to come to a state.
struct Stage<D: Device> {
    name: &'static str,
    reach: fn(&mut Harness<D>, &Probe<D>),
}

fn stages<D: Device>() -> Vec<Stage<D>> {
    const BEFORE_OK: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    let mut all: Vec<Stage<D>> = Vec::new();
    let mut add = |name, reach| all.push(Stage { name, reach });
    add("power-on", |_, _| {});
    add("features asked for that there are not", |h, _| {
        assert!(!h.negotiate(u64::MAX));
    });
    add("features agreed on", |h, _| {
        let offered = h.offered();
        assert!(h.negotiate(offered));
    });
    add("a queue set up", |h, _| {
        let offered = h.offered();
        assert!(h.negotiate(offered));
        h.set_up_queue(0, None);
    });
    add("started without queues", |h, _| {
        assert!(h.negotiate(features::VERSION_1));
        h.write_register(reg::STATUS, BEFORE_OK | status::DRIVER_OK);
    });
    add("started with one queue", |h, _| {
        assert!(h.negotiate(features::VERSION_1));
        h.set_up_queue(0, Some(8));
        h.write_register(reg::STATUS, BEFORE_OK | status::DRIVER_OK);
        h.run();
    });
    add("idle", |h, _| h.activate());
    add("after some work", |h, probe| {
        h.activate();
        works(h, probe);
    });
    add("broken by a queue that cannot work", |h, _| {
        assert!(h.negotiate(features::VERSION_1));
        h.write_register(reg::QUEUE_SEL, 0);
        h.write_register(reg::QUEUE_SIZE, 24);
        h.write_register(reg::QUEUE_READY, 1);
        h.write_register(reg::STATUS, BEFORE_OK | status::DRIVER_OK);
        assert!(h.registers().is_broken());
    });
    add("broken by a ring", |h, probe| {
        h.activate();
        works(h, probe);
        h.set_available_index(probe.queue, 0x5555);
        h.kick(probe.queue);
        h.run();
        assert!(h.registers().is_broken());
    });
    add("reset", |h, probe| {
        h.activate();
        works(h, probe);
        h.reset();
    });
    all
}

/// A device is saved as well before it works, after it broke and after it was reset, and the driver
/// finds in the registers of the other machine what it had found in those of the first.
pub fn is_saved_at_any_stage<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    for Stage { name, reach } in stages::<D>() {
        let mut old = Harness::new(make());
        reach(&mut old, &probe);
        old.pause();
        let mut new = old.moved_to(make());
        new.resume();
        new.settle();
        for register in (0..reg::CONFIG + 0x40).step_by(4) {
            let (found, expected) = (new.read_register(register), old.read_register(register));
            assert_eq!(found, expected, "register {register:#x}, {name}");
        }
        let state = new.read_register(reg::STATUS);
        if state & status::NEEDS_RESET != 0 {
            let used = new.used_index(probe.queue);
            new.kick(probe.queue);
            assert!(new.run(), "{name}: a broken device is busy");
            assert_eq!(new.used_index(probe.queue), used, "{name}: a broken device works");
        } else if state & (status::FEATURES_OK | status::DRIVER_OK) == status::FEATURES_OK {
            // The driver goes on with what it was at.
            for index in 0..new.device().queues().len() as u16 {
                new.write_register(reg::QUEUE_SEL, index.into());
                if new.read_register(reg::QUEUE_READY) == 0 {
                    new.set_up_queue(index, None);
                }
            }
            new.write_register(reg::STATUS, state | status::DRIVER_OK);
            new.settle();
            works(&mut new, &probe);
        }
        new.reset();
        new.activate();
        works(&mut new, &probe);
    }
}

/// State of another device or version is refused, and so is one that cannot have been saved;
/// nothing changes then.
pub fn refuses_foreign_state<D: Device>(make: impl Fn() -> D, _probe: Probe<D>) {
    let mut device = make();
    let own = device.save();
    let foreign = Payload { kind: "virtio-nothing", ..own.clone() };
    let newer = Payload { version: own.version + 1, ..own.clone() };
    for payload in [foreign, newer] {
        let err = device.restore(&payload).expect_err("foreign state was accepted");
        assert!(matches!(err, RestoreError::Mismatch { .. }), "{err}");
        assert_eq!(device.save(), own);
    }
    for len in 0..own.bytes.len() {
        let short = Payload { bytes: own.bytes[..len].to_vec(), ..own.clone() };
        assert!(device.restore(&short).is_err(), "{len} bytes of state were accepted");
        assert_eq!(device.save(), own);
    }
    let mut long = own.clone();
    long.bytes.push(0);
    assert!(device.restore(&long).is_err(), "trailing bytes were accepted");
    assert_eq!(device.save(), own);
}

/// A state that was changed is taken, or refused with the device as it was; whatever it says, a device
/// that took it does nothing but what devices do.
#[cfg(test)]
pub fn survives_a_damaged_state<D: Device>(make: impl Fn() -> D, probe: Probe<D>) {
    use proptest::prelude::*;
    use proptest::sample::Index;
    use proptest::test_runner::{Config, TestRunner};

    let mut old = Harness::new(make());
    old.activate();
    works(&mut old, &probe);
    old.hold_operations(true);
    start_requests(&mut old, &probe, IN_FLIGHT);
    old.kick(probe.queue);
    old.turn();
    old.pause();
    let saved = old.save();
    let changes = prop::collection::vec((any::<Index>(), any::<u8>()), 0..4);
    // One byte more than there is, as many, or fewer.
    let len = prop_oneof![6 => Just(0), 1 => Just(1), 3 => any::<Index>().prop_map(|i| -(i.index(200) as isize))];
    let damage = (changes, len);
    let mut runner =
        TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() });
    runner
        .run(&(damage.clone(), damage), |damage| {
            let mut damaged = saved.clone();
            for (payload, (changes, len)) in damaged.iter_mut().zip([damage.0, damage.1]) {
                let len = payload.bytes.len().saturating_add_signed(len);
                payload.bytes.resize(len, 0);
                for (place, value) in changes.iter().filter(|_| len > 0) {
                    payload.bytes[place.index(len)] = *value;
                }
            }
            let mut device = make();
            let before = device.save();
            match device.restore(&damaged[1]) {
                Ok(()) => prop_assert_eq!(&device.save(), &damaged[1]),
                Err(_) => prop_assert_eq!(device.save(), before),
            }
            if let Ok(mut new) = old.restored(make(), &damaged) {
                new.resume();
                new.settle();
                new.pause();
                new.moved_to(make());
                new.reset();
                new.activate();
                works(&mut new, &probe);
            }
            Ok(())
        })
        .unwrap();
}
