//! What is durable when, and how the driver has a say in it.

use super::*;
use crate::golden;
use crate::virtio::features::{EVENT_IDX, VERSION_1};
use crate::virtio::mmio::reg;
use crate::virtio::queue::INTERRUPT_CONFIG;

#[test]
fn a_flush_waits_for_the_file() {
    let mut harness = started(disk());
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    assert!(matches!(harness.oldest_operation().unwrap().action, Action::Sync));
    assert_eq!(answer_to(&mut harness, &request), None);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    harness.fail_operation(libc::EIO);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
}

#[test]
fn a_flush_does_nothing_where_durability_is_not_wanted() {
    let mut harness = started(disk_with(Cache::Unsafe, false, 1));
    let request = begin(&mut harness, FLUSH, 0, &[], 0);
    assert_eq!(harness.operations(), 0);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    // Not even for a driver that cannot flush.
    harness.reset();
    harness.activate_with(VERSION_1);
    assert_eq!(durability_of_a_write(&mut harness), Some(false));
}

/// Whether a write waits for the disk; `None` if it was done from the page cache.
fn durability_of_a_write(harness: &mut Harness<Subject>) -> Option<bool> {
    let request = begin(harness, OUT, 0, &[7; 512], 0);
    let durable = harness.oldest_operation().map(|operation| match operation.action {
        Action::Write { durable, .. } => durable,
        ref other => panic!("a write led to {other:?}"),
    });
    harness.finish_operation();
    assert_eq!(answer_to(harness, &request), Some(only_status(OK)));
    durable
}

#[test]
fn writes_are_durable_when_they_have_to_be() {
    let mut harness = started(disk());
    assert_ne!(durability_of_a_write(&mut harness), Some(true));
    // The driver switches its cache off and on again.
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    assert!(harness.interrupt().status() & INTERRUPT_CONFIG != 0);
    assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, 0);
    assert_eq!(durability_of_a_write(&mut harness), Some(true));
    harness.write_bytes(reg::CONFIG + 32, &[1]);
    assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, 1);
    assert_ne!(durability_of_a_write(&mut harness), Some(true));
    // Without FLUSH there is no other way to durability.
    harness.reset();
    harness.activate_with(VERSION_1 | EVENT_IDX);
    assert_eq!(durability_of_a_write(&mut harness), Some(true));

    let mut harness = started(disk_with(Cache::Writethrough, false, 1));
    assert_eq!(durability_of_a_write(&mut harness), Some(true));
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let mut harness = started(disk());
    let before = harness.device().config();
    let refused: [(u64, &[u8]); 5] =
        [(32, &[2]), (32, &[0, 0]), (33, &[0]), (0, &[1, 0, 0, 0, 0, 0, 0, 0]), (34, &[9])];
    for (offset, data) in refused {
        harness.write_bytes(reg::CONFIG + offset, data);
        assert_eq!(harness.device().config(), before, "{data:?} at {offset}");
    }
    let mut harness = started(disk_with(Cache::Writeback, true, 1));
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    assert_eq!(harness.device().config()[32], 1);
}

#[test]
fn a_reset_forgets_the_drivers_choice() {
    for (cache, first) in [(Cache::Writeback, 1), (Cache::Writethrough, 0)] {
        let mut harness = started(disk_with(cache, false, 1));
        harness.write_bytes(reg::CONFIG + 32, &[1 - first]);
        assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, u32::from(1 - first));
        harness.reset();
        assert_eq!(harness.read_register(reg::CONFIG + 32) & 0xff, u32::from(first));
        harness.activate();
        assert_eq!(durability_of_a_write(&mut harness) == Some(true), first == 0);
    }
}

#[test]
fn the_drivers_choice_is_saved() {
    let mut harness = started(disk());
    harness.write_bytes(reg::CONFIG + 32, &[0]);
    let payload = harness.device().save();
    let (mut restored, _image) = disk();
    restored.restore(&payload).unwrap();
    assert_eq!(restored.config()[32], 0);
    let invalid = Payload { bytes: vec![2], ..payload };
    assert!(matches!(restored.restore(&invalid), Err(RestoreError::Invalid { .. })));
}

#[test]
fn the_payload_is_as_it_was() {
    for (writeback, text) in [(0, "00"), (1, "01")] {
        let (mut block, _image) = disk();
        block.write_config(WRITEBACK_OFFSET as u64, &[writeback]);
        golden::check(&block.save(), "virtio-blk", 1, text, |payload| {
            // The machine that goes on was told something else, and its driver has not heard of that.
            for cache in [Cache::Writeback, Cache::Writethrough, Cache::Unsafe] {
                let (mut other, _image) = disk_with(cache, false, 1);
                other.restore(payload)?;
                assert_eq!(other.config()[WRITEBACK_OFFSET], writeback);
                assert_eq!(other.save(), *payload);
            }
            Ok(payload.clone())
        });
        let wrong = Payload { bytes: vec![2], ..block.save() };
        assert!(block.restore(&wrong).is_err());
    }
}
