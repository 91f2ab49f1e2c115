use proptest::prelude::*;

use super::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
use super::*;

const OWN: u64 = 1 << 5 | 1 << 40;

fn registers() -> Registers {
    Registers::new(2, OWN, &[256, 64], vec![1, 2, 3, 4, 5])
}

fn read(regs: &Registers, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    regs.read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(regs: &mut Registers, offset: u64, value: u32) -> Effect {
    regs.write(offset, &value.to_le_bytes())
}

fn features(regs: &mut Registers, wanted: u64) {
    for half in 0..2 {
        assert_eq!(write(regs, reg::DRIVER_FEATURES_SEL, half), Effect::None);
        let value = (wanted >> (32 * half)) as u32;
        assert_eq!(write(regs, reg::DRIVER_FEATURES, value), Effect::None);
    }
}

/// Registers of a driver that has come as far as FEATURES_OK.
fn negotiated() -> Registers {
    let mut regs = registers();
    write(&mut regs, reg::STATUS, ACKNOWLEDGE);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER);
    features(&mut regs, OWN | features::TRANSPORT);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(read(&regs, reg::STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    regs
}

fn is_ignored(effect: &Effect) -> bool {
    matches!(effect, Effect::Ignored(_))
}

#[test]
fn identity_can_be_read() {
    let regs = registers();
    assert_eq!(read(&regs, 0), 0x7472_6976);
    assert_eq!(read(&regs, 4), 2);
    assert_eq!(read(&regs, 8), 2);
    assert_eq!(read(&regs, reg::STATUS), 0);
    for offset in (reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH).step_by(4) {
        assert_eq!(read(&regs, offset), u32::MAX, "no shared memory region");
    }
    for offset in [reg::QUEUE_NOTIFY, reg::DRIVER_FEATURES, reg::QUEUE_DESC_LOW, 0xf0] {
        assert_eq!(read(&regs, offset), 0);
    }
}

#[test]
fn features_are_read_by_halves() {
    let mut regs = registers();
    let all = OWN | features::TRANSPORT;
    for (selector, expected) in [(0, all as u32), (1, (all >> 32) as u32), (2, 0), (u32::MAX, 0)] {
        write(&mut regs, reg::DEVICE_FEATURES_SEL, selector);
        assert_eq!(read(&regs, reg::DEVICE_FEATURES), expected);
    }
}

#[test]
fn initialisation_goes_through_in_order() {
    let mut regs = negotiated();
    assert_eq!(regs.negotiated(), OWN | features::TRANSPORT);
    let ok = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(write(&mut regs, reg::STATUS, ok), Effect::Activate);
    assert_eq!(write(&mut regs, reg::STATUS, ok), Effect::None, "activated once only");
    assert_eq!(write(&mut regs, reg::STATUS, ok | FAILED), Effect::None);
    assert_eq!(read(&regs, reg::STATUS), ok | FAILED);
}

#[test]
fn steps_out_of_order_are_ignored() {
    for (before, after) in [
        (0, DRIVER),
        (0, FEATURES_OK),
        (ACKNOWLEDGE, ACKNOWLEDGE | FEATURES_OK),
        (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER_OK),
        (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | DRIVER_OK),
        (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE),
    ] {
        let mut regs = registers();
        for bits in [before & ACKNOWLEDGE, before].into_iter().filter(|&bits| bits != 0) {
            write(&mut regs, reg::STATUS, bits);
        }
        let effect = write(&mut regs, reg::STATUS, after);
        assert!(is_ignored(&effect), "{before:#x} -> {after:#x} gave {effect:?}");
        assert_eq!(read(&regs, reg::STATUS), before);
    }
    let mut regs = negotiated();
    assert!(is_ignored(&write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER)));
    assert_ne!(read(&regs, reg::STATUS) & FEATURES_OK, 0);
}

#[test]
fn unacceptable_features_leave_features_ok_clear() {
    for wanted in [OWN, features::VERSION_1 | 1, features::VERSION_1 | 1 << 63, 0] {
        let mut regs = registers();
        write(&mut regs, reg::STATUS, ACKNOWLEDGE);
        write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER);
        features(&mut regs, wanted);
        write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(read(&regs, reg::STATUS), ACKNOWLEDGE | DRIVER);
        // Not even in one step with DRIVER_OK.
        let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
        assert_eq!(write(&mut regs, reg::STATUS, all), Effect::None);
        assert_eq!(read(&regs, reg::STATUS), ACKNOWLEDGE | DRIVER);
        // The driver may try again with less.
        features(&mut regs, features::VERSION_1);
        write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(read(&regs, reg::STATUS) & FEATURES_OK, 0);
    }
}

#[test]
fn features_are_final_once_accepted() {
    let mut regs = registers();
    assert!(is_ignored(&write(&mut regs, reg::DRIVER_FEATURES, 1)), "before DRIVER");
    let mut regs = negotiated();
    assert!(is_ignored(&write(&mut regs, reg::DRIVER_FEATURES, 0)), "after FEATURES_OK");
    assert_eq!(regs.negotiated(), OWN | features::TRANSPORT);
}

fn set_up(regs: &mut Registers, index: u32) -> Vec<Effect> {
    write(regs, reg::QUEUE_SEL, index);
    [
        (reg::QUEUE_SIZE, 32),
        (reg::QUEUE_DESC_LOW, 0x1000),
        (reg::QUEUE_DESC_HIGH, 1),
        (reg::QUEUE_DRIVER_LOW, 0x2000),
        (reg::QUEUE_DRIVER_HIGH, 2),
        (reg::QUEUE_DEVICE_LOW, 0x3000),
        (reg::QUEUE_DEVICE_HIGH, 3),
        (reg::QUEUE_READY, 1),
    ]
    .map(|(offset, value)| write(regs, offset, value))
    .to_vec()
}

#[test]
fn queues_are_configured_between_features_ok_and_driver_ok() {
    let mut regs = registers();
    assert!(set_up(&mut regs, 0).iter().all(is_ignored), "before FEATURES_OK");

    let mut regs = negotiated();
    assert!(set_up(&mut regs, 1).iter().all(|effect| *effect == Effect::None));
    assert_eq!(read(&regs, reg::QUEUE_READY), 1);
    let ready: Vec<_> = regs.ready_queues().collect();
    let expected = QueueState {
        max_size: 64,
        size: 32,
        ready: true,
        event_idx_enabled: true,
        desc_table: 0x1_0000_1000,
        avail_ring: 0x2_0000_2000,
        used_ring: 0x3_0000_3000,
        ..QueueState::default()
    };
    assert_eq!(ready, vec![(1, expected)]);
    assert!(is_ignored(&write(&mut regs, reg::QUEUE_SIZE, 16)), "while it is ready");

    let ok = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    write(&mut regs, reg::STATUS, ok);
    let before = regs.clone();
    assert!(set_up(&mut regs, 1).iter().all(is_ignored));
    assert!(is_ignored(&write(&mut regs, reg::QUEUE_READY, 0)));
    assert!(set_up(&mut regs, 0).iter().all(is_ignored));
    write(&mut regs, reg::QUEUE_SEL, 1);
    assert_eq!(regs, before);
}

#[test]
fn a_queue_that_does_not_exist_has_no_size() {
    let mut regs = negotiated();
    for index in [2, u32::from(u16::MAX), u32::MAX] {
        assert!(set_up(&mut regs, index).iter().all(is_ignored));
        assert_eq!(read(&regs, reg::QUEUE_SIZE_MAX), 0);
        assert_eq!(read(&regs, reg::QUEUE_READY), 0);
        assert!(is_ignored(&write(&mut regs, reg::QUEUE_NOTIFY, index)));
    }
    assert_eq!(write(&mut regs, reg::QUEUE_NOTIFY, 1), Effect::Notify(1));
    write(&mut regs, reg::QUEUE_SEL, 0);
    write(&mut regs, reg::QUEUE_SIZE, 0x1_0020);
    write(&mut regs, reg::QUEUE_READY, 1);
    assert_eq!(regs.ready_queues().next().unwrap().1.size, 0, "not truncated to 32");
}

#[test]
fn a_reset_ends_with_everything_but_the_configuration_forgotten() {
    let mut regs = negotiated();
    set_up(&mut regs, 0);
    write(&mut regs, reg::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    regs.publish_config(vec![9]);
    let running = regs.clone();
    assert_eq!(write(&mut regs, reg::STATUS, 0), Effect::Reset);
    assert_eq!(regs, running, "not before the queues have stopped");
    regs.finish_reset();
    let mut fresh = Registers::new(2, OWN, &[256, 64], vec![9]);
    fresh.generation = 1;
    assert_eq!(regs, fresh);
}

#[test]
fn progress_is_kept_for_a_restart() {
    let mut regs = negotiated();
    set_up(&mut regs, 0);
    let (_, state) = regs.ready_queues().next().unwrap();
    regs.set_progress(0, QueueState { next_avail: 7, next_used: 5, size: 1, ..state });
    regs.set_progress(9, state);
    let expected = QueueState { next_avail: 7, next_used: 5, ..state };
    assert_eq!(regs.ready_queues().next().unwrap().1, expected);
}

#[test]
fn needs_reset_is_told_once_the_driver_runs_and_only_a_reset_clears_it() {
    let mut regs = negotiated();
    assert!(!regs.needs_reset(), "the driver does not listen yet");
    assert!(regs.is_broken());
    let ok = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    assert_eq!(write(&mut regs, reg::STATUS, ok), Effect::None, "a broken device does not start");
    assert_eq!(read(&regs, reg::STATUS), ok | NEEDS_RESET);
    assert!(set_up(&mut regs, 0).iter().all(is_ignored));
    assert!(regs.needs_reset());
    regs.finish_reset();
    assert!(!regs.is_broken());

    let mut regs = negotiated();
    assert_eq!(write(&mut regs, reg::STATUS, ok | NEEDS_RESET), Effect::Activate);
    assert!(!regs.is_broken(), "the bit is the device's");
}

#[test]
fn the_generation_changes_with_the_configuration() {
    let mut regs = registers();
    let mut bytes = [0xff; 8];
    regs.read(reg::CONFIG + 1, &mut bytes);
    assert_eq!(bytes, [2, 3, 4, 5, 0, 0, 0, 0]);
    let before = read(&regs, reg::CONFIG_GENERATION);
    regs.publish_config(vec![7; 3]);
    assert_ne!(read(&regs, reg::CONFIG_GENERATION), before);
    regs.read(reg::CONFIG, &mut bytes);
    assert_eq!(bytes, [7, 7, 7, 0, 0, 0, 0, 0]);
    regs.generation = u32::MAX;
    regs.publish_config(Vec::new());
    assert_eq!(read(&regs, reg::CONFIG_GENERATION), 0);
}

#[test]
fn configuration_writes_reach_the_device_once_there_is_a_driver() {
    let mut regs = registers();
    assert!(is_ignored(&regs.write(reg::CONFIG, &[1])));
    let mut regs = negotiated();
    let effect = regs.write(reg::CONFIG + 3, &[1, 2]);
    assert_eq!(effect, Effect::Config { offset: 3, data: vec![1, 2] });
    assert_eq!(read(&regs, reg::CONFIG), 0x0403_0201, "the device decides");
}

#[test]
fn registers_take_aligned_words_only() {
    let mut regs = negotiated();
    let before = regs.clone();
    for len in [0, 1, 2, 3, 5, 8] {
        let mut data = vec![0xff; len];
        regs.read(0, &mut data);
        assert_eq!(data, vec![0; len]);
        assert!(is_ignored(&regs.write(reg::STATUS, &vec![0; len])));
    }
    assert_eq!(read(&regs, 1), 0);
    assert!(is_ignored(&write(&mut regs, reg::STATUS + 2, 0)));
    assert!(is_ignored(&write(&mut regs, reg::MAGIC, 1)));
    assert_eq!(regs, before);
}

proptest! {
    /// Whatever is written, the status only ever takes steps that the state machine has, and an
    /// activation comes with everything before it.
    #[test]
    fn no_access_breaks_the_state_machine(
        accesses in proptest::collection::vec(
            (0u64..0x140, proptest::collection::vec(any::<u8>(), 0..9), 0u8..8), 0..200))
    {
        let mut regs = registers();
        let steps = [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 0xb, 0xf];
        for (offset, mut data, kind) in accesses {
            let before = regs.status();
            let effect = match kind {
                0..4 => write(&mut regs, reg::STATUS, steps[usize::from(kind)]),
                4 => {
                    write(&mut regs, reg::DRIVER_FEATURES_SEL, 1);
                    write(&mut regs, reg::DRIVER_FEATURES, 1)
                }
                _ => regs.write(offset, &data),
            };
            regs.read(offset, &mut data);
            let after = regs.status();
            prop_assert_eq!(after & before, before, "bits were cleared without a reset");
            if after & FEATURES_OK != 0 {
                prop_assert_eq!(after & (ACKNOWLEDGE | DRIVER), ACKNOWLEDGE | DRIVER);
                prop_assert_eq!(regs.negotiated() & !(OWN | features::TRANSPORT), 0);
                prop_assert_ne!(regs.negotiated() & features::VERSION_1, 0);
            }
            match effect {
                Effect::Activate => {
                    prop_assert_eq!(before & DRIVER_OK, 0);
                    prop_assert_ne!(after & FEATURES_OK, 0);
                }
                Effect::Reset => regs.finish_reset(),
                Effect::Notify(index) => prop_assert!(index < 2),
                _ => {}
            }
        }
    }
}
