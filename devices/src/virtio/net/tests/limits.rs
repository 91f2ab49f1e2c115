//! Limits of what is sent and received.

use std::time::Instant;

use super::*;
use crate::rate::{Bucket, Limits};
use crate::virtio::device::{Message, Traffic};

/// A limiter that lets so many bytes and frames pass, and no more while a test runs.
fn limiter(bytes: Option<u64>, frames: Option<u64>) -> Option<RateLimiter> {
    let bucket = |size| Bucket { size, one_time_burst: 0, refill_ms: 1 << 40 };
    let limits = Limits { bandwidth: bytes.map(bucket), ops: frames.map(bucket) };
    RateLimiter::new(limits, Instant::now())
}

fn limited(traffic: Traffic, limit: Option<RateLimiter>) -> Harness<Wired> {
    let mut subject = wired(1);
    subject.0.set_limit(traffic, limit);
    let mut harness = Harness::new(subject);
    harness.activate_with(PLAIN);
    harness
}

fn send(harness: &mut Harness<Wired>, len: usize) -> bool {
    let (gpa, len) = harness.readable(&frame(len, 1));
    harness.offer(TX, &[(gpa, len, false)]);
    harness.kick(TX);
    harness.run();
    peer(harness).receive().is_some()
}

fn limit(harness: &mut Harness<Wired>, traffic: Traffic, limit: Option<RateLimiter>) {
    let message = Message::RateLimit(traffic, limit);
    harness.device_mut().update(&message);
    harness.message(&message);
}

#[test]
fn frames_that_are_sent_count_without_their_header() {
    let mut harness = limited(Traffic::Sent, limiter(Some(200), None));
    assert!(send(&mut harness, 100) && send(&mut harness, 99) && send(&mut harness, 1000));
    assert!(!send(&mut harness, 60));
    assert!(harness.expire_timers());
    harness.run();
    assert!(peer(&harness).receive().is_none());
    // A pause and a reset change nothing; receiving is not concerned.
    harness.pause();
    harness.resume();
    harness.run();
    assert!(peer(&harness).receive().is_none());
    offer(&mut harness, &[2000]);
    assert!(peer(&harness).send(&frame(60, 2)));
    harness.run();
    assert!(harness.used(RX).is_some());
    limit(&mut harness, Traffic::Received, limiter(None, Some(1)));
    assert!(peer(&harness).receive().is_none());
    limit(&mut harness, Traffic::Sent, None);
    assert_eq!(peer(&harness).receive(), Some(frame(60, 1)), "the frame that waited");
    assert!(send(&mut harness, 60) && send(&mut harness, 60));
}

#[test]
fn frames_that_are_received_wait_in_the_tap() {
    let mut harness = limited(Traffic::Received, limiter(None, Some(2)));
    offer(&mut harness, &[2000; 8]);
    for seed in 0..4 {
        assert!(peer(&harness).send(&frame(60, seed)));
        harness.run();
    }
    let received = |harness: &mut Harness<Wired>| {
        harness.run();
        std::iter::from_fn(|| harness.used(RX)).count()
    };
    assert_eq!(received(&mut harness), 2);
    assert!(harness.expire_timers(), "nobody looks at the wire again");
    assert_eq!(received(&mut harness), 0);
    harness.pause();
    harness.resume();
    assert_eq!(received(&mut harness), 0);
    limit(&mut harness, Traffic::Received, limiter(None, Some(1)));
    assert_eq!(received(&mut harness), 1);
    limit(&mut harness, Traffic::Received, None);
    assert_eq!(received(&mut harness), 1);
    assert!(send(&mut harness, 60), "sending is not concerned");
}

#[test]
fn all_pairs_share_a_limit() {
    let mut subject = wired(2);
    subject.0.set_limit(Traffic::Sent, limiter(None, Some(3)));
    let mut harness = Harness::new(subject);
    harness.activate();
    for _ in 0..2 {
        for queue in [1, 3] {
            let (gpa, len) = harness.readable(&frame(60, 1));
            harness.offer(queue, &[(gpa, len, false)]);
            harness.kick(queue);
        }
    }
    harness.run();
    let peers = &harness.device().1;
    let sent = peers.iter().map(|peer| std::iter::from_fn(|| peer.receive()).count());
    assert_eq!(sent.sum::<usize>(), 3);
}
