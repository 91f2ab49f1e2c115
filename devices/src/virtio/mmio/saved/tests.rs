use proptest::prelude::*;

use super::super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK};
use super::super::{Effect, reg};
use super::*;
use crate::golden;

const OWN: u64 = 1 << 5 | 1 << 40;
const CONFIG: [u8; 5] = [1, 2, 3, 4, 5];
const OK: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

fn registers() -> Registers {
    Registers::new(2, OWN, &[256, 64], CONFIG.to_vec())
}

fn write(regs: &mut Registers, offset: u64, value: u32) -> Effect {
    regs.write(offset, &value.to_le_bytes())
}

/// Registers of a driver that has come as far as FEATURES_OK.
fn negotiated() -> Registers {
    let mut regs = registers();
    write(&mut regs, reg::STATUS, ACKNOWLEDGE);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER);
    for half in 0..2 {
        write(&mut regs, reg::DRIVER_FEATURES_SEL, half);
        write(&mut regs, reg::DRIVER_FEATURES, ((OWN | features::TRANSPORT) >> (32 * half)) as u32);
    }
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    regs
}

/// Registers of a driver that uses the second queue.
fn running() -> Registers {
    let mut regs = negotiated();
    write(&mut regs, reg::QUEUE_SEL, 1);
    for (offset, value) in [
        (reg::QUEUE_SIZE, 32),
        (reg::QUEUE_DESC_LOW, 0x1000),
        (reg::QUEUE_DESC_HIGH, 1),
        (reg::QUEUE_DRIVER_LOW, 0x2002),
        (reg::QUEUE_DRIVER_HIGH, 2),
        (reg::QUEUE_DEVICE_LOW, 0x3004),
        (reg::QUEUE_DEVICE_HIGH, 3),
        (reg::QUEUE_READY, 1),
    ] {
        assert_eq!(write(&mut regs, offset, value), Effect::None);
    }
    assert_eq!(write(&mut regs, reg::STATUS, OK), Effect::Activate);
    regs.set_progress(
        1,
        QueueState { next_avail: 0xfffe, next_used: 0xfffe, ..Default::default() },
    );
    regs
}

/// Registers like new that took `payload`, and the interrupt status.
fn restored(payload: &Payload) -> Result<(Registers, u32), RestoreError> {
    let mut fresh = registers();
    let interrupt = fresh.restore(payload, CONFIG.to_vec())?;
    Ok((fresh, interrupt))
}

#[test]
fn saved_registers_go_on_where_they_were() {
    let mut regs = running();
    let saved = regs.save(INTERRUPT_USED);
    assert_eq!(restored(&saved).unwrap(), (regs.clone(), INTERRUPT_USED));
    assert!(regs.needs_reset());
    assert_eq!(restored(&regs.save(0)).unwrap(), (regs, 0));
}

#[test]
fn a_driver_hears_of_another_configuration() {
    let regs = running();
    let saved = regs.save(INTERRUPT_USED);
    let mut other = registers();
    let interrupt = other.restore(&saved, vec![9; 7]).unwrap();
    assert_eq!(interrupt, INTERRUPT_USED | INTERRUPT_CONFIG);
    assert_eq!(
        (other.config.as_slice(), other.generation),
        ([9; 7].as_slice(), regs.generation + 1)
    );
    // One that does not listen yet finds it.
    let mut other = registers();
    assert_eq!(other.restore(&negotiated().save(0), vec![9]), Ok(0));
    assert_eq!((other.config.as_slice(), other.generation), ([9].as_slice(), 1));
}

#[test]
fn what_a_driver_got_wrong_does_not_keep_it_from_being_saved() {
    // Features that there are not are no matter before they are agreed on.
    let mut regs = registers();
    write(&mut regs, reg::STATUS, ACKNOWLEDGE);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER);
    write(&mut regs, reg::DRIVER_FEATURES, u32::MAX);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(regs.status() & FEATURES_OK, 0);
    assert_eq!(restored(&regs.save(0)).unwrap(), (regs, 0));
    // A queue that cannot work, before and after the device found out.
    for (offset, value) in [
        (reg::QUEUE_SIZE, 65),
        (reg::QUEUE_SIZE, 3),
        (reg::QUEUE_SIZE, 0),
        (reg::QUEUE_DESC_LOW, 1),
    ] {
        let mut regs = negotiated();
        write(&mut regs, reg::QUEUE_SEL, 1);
        write(&mut regs, offset, value);
        write(&mut regs, reg::QUEUE_READY, 1);
        assert_eq!(restored(&regs.save(0)).unwrap(), (regs.clone(), 0), "{offset:#x} {value}");
        write(&mut regs, reg::STATUS, OK);
        assert!(regs.needs_reset());
        assert_eq!(restored(&regs.save(0)).unwrap(), (regs, 0), "{offset:#x} {value}");
    }
}

/// Something that no driver can lead to.
type Nonsense = fn(&mut Registers);

#[test]
fn what_cannot_have_been_saved_is_refused() {
    let nonsense: [(&str, Nonsense); 16] = [
        ("another kind", |r| r.device_id = 1),
        ("number of queues", |r| r.queues.truncate(1)),
        ("number of queues", |r| r.queues.push(r.queues[1])),
        ("another size", |r| r.queues[0].max_size = 128),
        ("status bits that there are not", |r| r.status |= 0x100),
        ("out of order", |r| r.status &= !FEATURES_OK),
        ("out of order", |r| r.status &= !ACKNOWLEDGE),
        ("does not have here", |r| r.driver_features |= 1 << 7),
        ("legacy", |r| r.driver_features &= !features::VERSION_1),
        ("before features", |r| r.status = ACKNOWLEDGE | DRIVER),
        ("larger than it can be", |r| r.queues[1].size = 128),
        ("in flight", |r| r.queues[1].next_avail = 3),
        ("cannot work", |r| r.queues[1].size = 0),
        ("cannot work", |r| r.queues[1].size = 48),
        ("cannot work", |r| r.queues[1].desc_table += 8),
        ("cannot work", |r| r.queues[1].used_ring += 2),
    ];
    for (reason, make) in nonsense {
        let mut regs = running();
        make(&mut regs);
        let err = restored(&regs.save(0)).unwrap_err().to_string();
        assert!(err.contains(reason), "{err}");
    }
    let err = restored(&running().save(4)).unwrap_err().to_string();
    assert!(err.contains("interrupts that there are not"), "{err}");
    let mut flag = running().save(0);
    let ready = 28 + 8 + 2 + 8;
    assert_eq!(flag.bytes[ready], 0);
    flag.bytes[ready] = 2;
    let err = restored(&flag).unwrap_err().to_string();
    assert!(err.contains("neither set nor clear"), "{err}");
}

#[test]
fn a_payload_is_taken_whole_or_not_at_all() {
    let saved = running().save(0);
    let mut regs = negotiated();
    let before = regs.clone();
    let mut refused = |payload: &Payload| {
        assert!(regs.restore(payload, CONFIG.to_vec()).is_err());
        assert_eq!(regs, before);
    };
    for len in 0..saved.bytes.len() {
        refused(&Payload { bytes: saved.bytes[..len].to_vec(), ..saved.clone() });
    }
    refused(&Payload { bytes: [saved.bytes.as_slice(), &[0]].concat(), ..saved.clone() });
    refused(&Payload { version: VERSION + 1, ..saved.clone() });
    refused(&Payload { kind: "virtio-blk", ..saved });
}

#[test]
fn the_payload_is_as_it_was() {
    let golden = "02000000 00000000 01000000 01000000 0f000000 00000000 01000000
        20000030 01010000 0200
        0001 0001 0000 0000 00 0000000000000000 0000000000000000 0000000000000000
        4000 2000 feff feff 01 0010000001000000 0220000002000000 0430000003000000
        05000000 0102030405";
    golden::check(&running().save(INTERRUPT_USED), "transport", 2, golden, |payload| {
        restored(payload).map(|(regs, interrupt)| regs.save(interrupt))
    });
}

/// A driver's access to the registers, mostly such that it comes far.
fn access() -> impl Strategy<Value = (u64, Vec<u8>)> {
    let steps = [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, OK & !DRIVER_OK, OK, 0];
    let status = prop::sample::select(steps.to_vec()).prop_map(|step| (reg::STATUS, step));
    let words = prop::sample::select(vec![
        (reg::DRIVER_FEATURES_SEL, 0),
        (reg::DRIVER_FEATURES_SEL, 1),
        (reg::DRIVER_FEATURES, 1),
        (reg::DRIVER_FEATURES, 0),
        (reg::QUEUE_SEL, 0),
        (reg::QUEUE_SEL, 1),
        (reg::QUEUE_SIZE, 16),
        (reg::QUEUE_READY, 1),
    ]);
    let any_word = ((0u64..0x40).prop_map(|index| 4 * index), any::<u32>());
    let word = prop_oneof![3 => status, 3 => words, 2 => any_word];
    let word = word.prop_map(|(offset, value)| (offset, value.to_le_bytes().to_vec()));
    let odd = (0u64..0x140, prop::collection::vec(any::<u8>(), 0..9));
    prop_oneof![9 => word, 1 => odd]
}

/// What a machine does upon an access.
fn act(regs: &mut Registers, (offset, data): &(u64, Vec<u8>)) -> (Effect, Vec<u8>) {
    let effect = regs.write(*offset, data);
    match &effect {
        Effect::Reset => regs.finish_reset(),
        // As it finds a queue that cannot work.
        Effect::Activate if regs.ready_queues().any(|(_, queue)| !is_sound(&queue)) => {
            assert!(regs.needs_reset());
        }
        Effect::Config { data, .. } => regs.publish_config(data.clone()),
        _ => {}
    }
    let mut found = vec![0; data.len()];
    regs.read(*offset, &mut found);
    (effect, found)
}

proptest! {
    /// Whatever a driver did, the registers can be saved, and those that took the state behave as
    /// those that it was of.
    #[test]
    fn a_copy_behaves_like_the_original(
        before in prop::collection::vec(access(), 0..60),
        after in prop::collection::vec(access(), 0..60))
    {
        let mut regs = registers();
        for access in &before {
            act(&mut regs, access);
        }
        let saved = regs.save(0);
        let mut copy = registers();
        copy.restore(&saved, regs.config.clone()).unwrap();
        prop_assert_eq!(copy.save(0), saved);
        for access in &after {
            prop_assert_eq!(act(&mut copy, access), act(&mut regs, access));
        }
        prop_assert_eq!(copy, regs);
    }

    /// What is in a payload that was changed is either taken, all of it, or nothing.
    #[test]
    fn changed_payloads_are_taken_whole_or_not_at_all(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        rest in any::<prop::sample::Index>(),
        cut in any::<bool>())
    {
        let mut payload = running().save(INTERRUPT_USED);
        for (place, value) in changes {
            let place = place.index(payload.bytes.len());
            payload.bytes[place] = value;
        }
        if cut {
            payload.bytes.truncate(rest.index(payload.bytes.len()));
        }
        let mut regs = registers();
        let config = payload.bytes.split_at(payload.bytes.len().saturating_sub(CONFIG.len())).1;
        match regs.restore(&payload, config.to_vec()) {
            Ok(interrupt) => prop_assert_eq!(regs.save(interrupt), payload),
            Err(_) => prop_assert_eq!(regs, registers()),
        }
    }
}
