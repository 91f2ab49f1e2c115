//! Limits of bytes and operations.

use super::*;

fn limited(queues: u16, bytes: Option<u64>, ops: Option<u64>) -> Harness<Subject> {
    let mut subject = disk_with(Cache::Writeback, false, queues);
    subject.0.set_limit(limiter(bytes, ops));
    started(subject)
}

/// Offers a request in each of `queues` and says how many were answered.
fn served(
    harness: &mut Harness<Subject>,
    queues: &[u16],
    kind: u32,
    data: &[u8],
    room: u32,
) -> usize {
    for &queue in queues {
        let request = Request::new(harness, kind, 0, data, room);
        harness.offer(queue, &request.buffers);
        harness.kick(queue);
    }
    harness.run();
    answered(harness, queues)
}

fn answered(harness: &mut Harness<Subject>, queues: &[u16]) -> usize {
    queues.iter().map(|&queue| std::iter::from_fn(|| harness.used(queue)).count()).sum()
}

#[test]
fn bytes_are_limited_both_ways_and_a_flush_costs_none() {
    let mut harness = limited(1, Some(3 * SECTOR), None);
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 1);
    assert_eq!(served(&mut harness, &[0], OUT, &[7; 512], 0), 1);
    for _ in 0..10 {
        assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 1);
    }
    // One sector is left; the request is larger and passes.
    assert_eq!(served(&mut harness, &[0], IN, &[], 2048), 1);
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 0);
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 0, "requests are not overtaken");
}

#[test]
fn a_flush_is_an_operation() {
    let mut harness = limited(1, None, Some(2));
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 1);
    assert_eq!(served(&mut harness, &[0], IN, &[], 4096), 1);
    assert_eq!(served(&mut harness, &[0], FLUSH, &[], 0), 0);
}

#[test]
fn all_queues_share_a_limit() {
    let mut harness = limited(3, None, Some(4));
    assert_eq!(served(&mut harness, &[0, 1, 2], IN, &[], 512), 3);
    assert_eq!(served(&mut harness, &[0, 1, 2], IN, &[], 512), 1);
}

#[test]
fn a_limited_disk_stops_resets_and_goes_on() {
    let mut harness = limited(1, None, Some(2));
    for _ in 0..3 {
        served(&mut harness, &[0], IN, &[], 512);
    }
    // What waits is neither lost nor served in a pause, and pauses do not fill the bucket.
    for _ in 0..3 {
        harness.pause();
        harness.resume();
        assert!(harness.run());
        assert!(harness.expire_timers());
        assert!(harness.run());
        assert_eq!(answered(&mut harness, &[0]), 0);
    }
    let message = Message::RateLimit(Traffic::All, limiter(None, Some(2)));
    harness.device_mut().update(&message);
    harness.message(&message);
    harness.run();
    assert_eq!(answered(&mut harness, &[0]), 1);
    assert_eq!(served(&mut harness, &[0, 0], IN, &[], 512), 1);
    harness.reset();
    harness.activate();
    assert_eq!(served(&mut harness, &[0], IN, &[], 512), 0, "a reset filled the bucket");
    let message = Message::RateLimit(Traffic::All, None);
    harness.device_mut().update(&message);
    harness.message(&message);
    harness.run();
    assert_eq!(answered(&mut harness, &[0]), 1);
    assert_eq!(served(&mut harness, &[0; 30], IN, &[], 512), 30);
}
