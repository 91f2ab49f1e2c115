use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::golden;
use crate::virtio::conformance::{Harness, Probe, RAM, RINGS, conformance};
use crate::virtio::features::{EVENT_IDX, VERSION_1};
use crate::virtio::mmio::reg;
use crate::virtio::queue::INTERRUPT_CONFIG;

/// Remembers what it was to discard.
#[derive(Default)]
struct Recorder {
    guest: Mutex<Vec<(u64, u64)>>,
    host: Mutex<Vec<usize>>,
}

impl Discard for Recorder {
    fn discard(&self, gpa: u64, len: u64) {
        assert!(len > 0 && gpa.checked_add(len).is_some());
        self.guest.lock().unwrap().push((gpa, len));
    }

    fn discard_host(&self, start: *const u8, len: usize) {
        assert!(!start.is_null() && len > 0);
        self.host.lock().unwrap().push(len);
    }
}

impl Recorder {
    fn guest(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.guest.lock().unwrap())
    }

    fn host(&self) -> Vec<usize> {
        std::mem::take(&mut self.host.lock().unwrap())
    }
}

const SECOND: Duration = Duration::from_secs(1);

fn made(stats: Option<Duration>, reporting: bool) -> (Balloon, Arc<Recorder>) {
    let recorder = Arc::<Recorder>::default();
    let balloon = Balloon::new(BalloonOptions {
        target: 16,
        deflate_on_oom: true,
        stats_interval: stats,
        reporting,
        discard: Arc::<Recorder>::clone(&recorder),
    });
    (balloon, recorder)
}

fn balloon() -> (Balloon, Arc<Recorder>) {
    made(Some(SECOND), true)
}

type Subject = (Balloon, Arc<Recorder>);

fn started() -> Harness<Subject> {
    let mut harness = Harness::new(balloon());
    harness.activate();
    harness
}

fn numbers(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn probe() -> Probe<Subject> {
    Probe {
        request: |harness| {
            let (gpa, len) = harness.readable(&numbers(&[3, 4, 9]));
            vec![(gpa, len, false)]
        },
        check: |harness, written| {
            assert_eq!(written, 0);
            let discarded = harness.device().1.guest();
            assert!(discarded.ends_with(&[(3 * PAGE, 2 * PAGE), (9 * PAGE, PAGE)]));
        },
        ..Probe::default()
    }
}

mod everything {
    use super::*;
    conformance!(balloon, probe());
}

mod reporting_without_statistics {
    use super::*;
    conformance!(|| made(None, true), probe());
}

mod statistics_alone {
    use super::*;
    conformance!(|| made(Some(SECOND), false), probe());
}

mod nothing_beside {
    use super::*;
    conformance!(|| made(None, false), probe());
}

fn inflate(harness: &mut Harness<Subject>, pages: &[u32]) -> Vec<(u64, u64)> {
    let (gpa, len) = harness.readable(&numbers(pages));
    assert_eq!(harness.request(INFLATE, &[(gpa, len, false)]), Some(0));
    harness.device().1.guest()
}

#[test]
fn neighbours_are_given_back_together() {
    let mut harness = started();
    let discarded = inflate(&mut harness, &[7, 5, 6, 100, 5, 102, 0, u32::MAX, u32::MAX - 1]);
    let page = |first: u64, count: u64| (first * PAGE, count * PAGE);
    let last = u64::from(u32::MAX) - 1;
    assert_eq!(discarded, [page(0, 1), page(5, 3), page(100, 1), page(102, 1), page(last, 2)]);
}

#[test]
fn deflating_needs_nothing_done() {
    let mut harness = started();
    let (gpa, len) = harness.readable(&numbers(&[1, 2, 3]));
    assert_eq!(harness.request(DEFLATE, &[(gpa, len, false)]), Some(0));
    assert!(harness.device().1.guest().is_empty());
}

#[test]
fn lists_of_odd_length_and_empty_ones_are_answered() {
    let mut harness = started();
    let (gpa, _) = harness.readable(&numbers(&[1, 2]));
    assert_eq!(harness.request(INFLATE, &[(gpa, 7, false)]), Some(0));
    assert_eq!(harness.device().1.guest(), [(PAGE, PAGE)]);
    assert_eq!(harness.request(INFLATE, &[(gpa, 3, false)]), Some(0));
    assert_eq!(harness.request(INFLATE, &[(gpa, 8, true)]), Some(0));
    assert!(harness.device().1.guest().is_empty());
    // A number may be split over buffers.
    assert_eq!(harness.request(INFLATE, &[(gpa, 3, false), (gpa + 3, 5, false)]), Some(0));
    assert_eq!(harness.device().1.guest(), [(PAGE, 2 * PAGE)]);
}

#[test]
fn a_long_list_is_worked_off_in_pieces() {
    let mut harness = started();
    let page = |n: u32| n * 2;
    // 512 KiB of numbers.
    let count = 1 << 17;
    let bytes = numbers(&(0..count).map(page).collect::<Vec<_>>());
    harness.write(0x10000, &bytes);
    let head = harness.offer(INFLATE, &[(0x10000, bytes.len() as u32, false)]);
    harness.kick(INFLATE);
    harness.turn();
    let first = harness.device().1.guest().len();
    assert!((1..=1024).contains(&first), "{first} pages in one turn");
    assert_eq!(harness.used(INFLATE), None);
    // A pause in the middle of it begins it anew.
    harness.pause();
    harness.resume();
    let mut discarded = Vec::new();
    for _ in 0..1000 {
        harness.turn();
        discarded.extend(harness.device().1.guest());
    }
    assert_eq!(harness.used(INFLATE), Some((head, 0)));
    let all: Vec<_> = (0..count).map(|n| (u64::from(page(n)) * PAGE, PAGE)).collect();
    assert!(discarded == all);
}

#[test]
fn reported_memory_is_given_back_in_pieces() {
    let mut harness = started();
    for queue in [3, 4] {
        let buffers = [(0, RAM as u32, true), (RINGS + 0x80000, 8192, true)];
        assert_eq!(harness.request(queue, &buffers), Some(0));
        let host = harness.device().1.host();
        assert_eq!(host.iter().sum::<usize>(), RAM as usize + 8192, "queue {queue}");
        assert!(host.len() <= 3, "{host:?}");
    }
    // The same 2 MiB many times over.
    let buffers = [(0, RAM as u32, true); 100];
    harness.offer(3, &buffers);
    harness.kick(3);
    harness.turn();
    assert!(harness.device().1.host().len() <= 8);
    assert!(harness.run());
    assert!(harness.used(3).is_some());
}

#[test]
fn queues_have_the_numbers_that_drivers_expect() {
    let (stats, report) = (feature::STATS_VQ, feature::PAGE_REPORTING);
    let roles = |negotiated| [0, 1, 2, 3, 4].map(|index| Role::of(index, negotiated));
    let [inflate, deflate] = [Some(Role::Inflate), Some(Role::Deflate)];
    let reports = Some(Role::Report);
    assert_eq!(roles(stats | report), [inflate, deflate, Some(Role::Statistics), reports, reports]);
    assert_eq!(roles(report), [inflate, deflate, reports, reports, reports]);
    assert_eq!(roles(stats), [inflate, deflate, Some(Role::Statistics), None, None]);
    assert_eq!(roles(0), [inflate, deflate, None, None, None]);
    for (subject, count) in [
        (made(None, false), 2),
        (made(Some(SECOND), false), 3),
        (made(None, true), 5),
        (made(Some(SECOND), true), 5),
    ] {
        assert_eq!(subject.0.queues().len(), count);
    }
    // Reports of a driver that did not agree on them are left alone.
    let mut harness = Harness::new(balloon());
    harness.activate_with(VERSION_1 | EVENT_IDX | feature::STATS_VQ);
    assert_eq!(harness.request(3, &[(0, 8192, true)]), None);
    assert!(harness.device().1.host().is_empty());
    harness.pause();
}

fn entries(statistics: &[(u16, u64)]) -> Vec<u8> {
    let entry =
        |&(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat();
    statistics.iter().flat_map(entry).collect()
}

fn status(harness: &Harness<Subject>) -> BalloonStatus {
    let Some(Status::Balloon(status)) = harness.device().status() else { panic!("no status") };
    status
}

/// Gives the device a buffer of statistics. Returns its head.
fn give(harness: &mut Harness<Subject>, bytes: &[u8]) -> u16 {
    let (gpa, len) = harness.readable(bytes);
    let head = harness.offer(THIRD, &[(gpa, len, false)]);
    harness.notify(THIRD);
    harness.run();
    head
}

#[test]
fn statistics_are_asked_for_and_kept() {
    let mut harness = started();
    assert_eq!(status(&harness).named().count(), 0);
    let head = give(&mut harness, &entries(&[(4, 1000), (5, 2000), (15, 7), (99, 1), (4, 1001)]));
    let named = |harness: &Harness<Subject>| status(harness).named().collect::<Vec<_>>();
    assert_eq!(
        named(&harness),
        [("free_memory", 1001), ("total_memory", 2000), ("direct_reclaim", 7)]
    );
    // The buffer is kept until the next time.
    assert_eq!(harness.used(THIRD), None);
    harness.pause();
    harness.resume();
    harness.run();
    assert_eq!(harness.used(THIRD), None);
    harness.interrupts();
    assert!(harness.expire_timers());
    assert_eq!(harness.used(THIRD), Some((head, 0)));
    assert_eq!(harness.interrupts(), 1);
    // The driver is late; it is asked again.
    assert!(harness.expire_timers());
    give(&mut harness, &entries(&[(0, 5)]));
    assert_eq!(named(&harness), [("swap_in", 5)], "what is not said any more is gone");
    assert!(harness.expire_timers());
    assert!(harness.used(THIRD).is_some());
    give(&mut harness, &[]);
    harness.reset();
    assert_eq!(named(&harness), []);
}

#[test]
fn a_new_interval_asks_at_once_and_none_stops_asking() {
    let mut harness = started();
    give(&mut harness, &entries(&[(4, 1)]));
    let set = |harness: &mut Harness<Subject>, interval| {
        let message = Message::StatisticsInterval(interval);
        assert_eq!(harness.device_mut().update(&message), None);
        harness.message(&message);
    };
    set(&mut harness, 2 * SECOND);
    assert!(harness.used(THIRD).is_some());
    give(&mut harness, &entries(&[(4, 2)]));
    set(&mut harness, Duration::ZERO);
    harness.expire_timers();
    assert!(!harness.expire_timers());
    assert_eq!(harness.used(THIRD), None);
    // Also for the next worker.
    harness.pause();
    harness.resume();
    assert!(!harness.expire_timers());
}

#[test]
fn hostile_statistics_are_read_as_far_as_they_make_sense() {
    let mut harness = started();
    give(&mut harness, &[1, 2, 3]);
    assert_eq!(status(&harness).named().count(), 0);
    // A second buffer while there is one, and one that is far too long.
    give(&mut harness, &entries(&[(4, 1)]));
    assert_eq!(status(&harness).named().count(), 0);
    assert!(harness.expire_timers());
    harness.kick(THIRD);
    harness.run();
    assert_eq!(status(&harness).named().collect::<Vec<_>>(), [("free_memory", 1)]);
    assert!(harness.expire_timers());
    give(&mut harness, &entries(&vec![(6, 9); 5000]));
    assert_eq!(status(&harness).named().collect::<Vec<_>>(), [("available_memory", 9)]);
}

#[test]
fn the_driver_learns_the_target_and_says_what_it_gave() {
    let mut harness = started();
    assert_eq!(harness.read_register(reg::CONFIG), 16);
    assert_eq!(harness.device_mut().update(&Message::BalloonTarget(16)), None);
    let config = harness.device_mut().update(&Message::BalloonTarget(77)).unwrap();
    assert_eq!(config[..4], 77u32.to_le_bytes());
    harness.write_register(reg::CONFIG + 4, 70);
    assert!(harness.interrupt().status() & INTERRUPT_CONFIG != 0);
    assert_eq!(harness.read_register(reg::CONFIG + 4), 70);
    // The target is not the driver's to write.
    harness.write_register(reg::CONFIG, 5);
    harness.write_bytes(reg::CONFIG + 4, &[1, 2]);
    let status = status(&harness);
    assert_eq!((status.target, status.actual), (77, 70));
    let saved = harness.device().save();
    let mut other = balloon();
    other.restore(&saved).unwrap();
    assert_eq!(other.0.status(), harness.device().status());
    harness.reset();
    assert_eq!(self::status(&harness).actual, 0);
    assert_eq!(self::status(&harness).target, 77);
}

#[test]
fn poisoning_is_never_offered() {
    const POISON: u64 = 1 << 4;
    const MUST_TELL_HOST: u64 = 1 << 0;
    for reporting in [false, true] {
        let features = made(Some(SECOND), reporting).0.features();
        assert_eq!(features & (POISON | MUST_TELL_HOST), 0);
    }
}

proptest! {
    #[test]
    fn each_page_is_given_back_and_no_other(
        pages in prop::collection::vec(prop_oneof![0u32..64, any::<u32>()], 1..600))
    {
        let mut harness = started();
        let discarded = inflate(&mut harness, &pages);
        let mut expected: Vec<u64> = pages.iter().map(|&page| u64::from(page)).collect();
        expected.sort_unstable();
        expected.dedup();
        let mut all: Vec<u64> = discarded
            .iter()
            .flat_map(|&(gpa, len)| gpa / PAGE..(gpa + len) / PAGE)
            .collect();
        all.sort_unstable();
        all.dedup();
        prop_assert_eq!(all, expected);
    }
}

#[test]
fn what_is_half_done_is_done_by_another_machine() {
    let mut harness = started();
    let held = give(&mut harness, &entries(&[(4, 1000)]));
    // More than is worked off in one turn, in pages that are no neighbours.
    let pages: Vec<u32> = (0..3000).map(|n| n * 2).collect();
    let (gpa, len) = harness.readable(&numbers(&pages));
    let long = harness.offer(INFLATE, &[(gpa, len, false)]);
    harness.kick(INFLATE);
    harness.turn();
    let begun = harness.device().1.guest().len();
    assert!((1..pages.len()).contains(&begun), "{begun}");
    harness.write_register(reg::CONFIG + 4, 70);
    harness.pause();

    let mut other = harness.moved_to(balloon());
    assert_eq!(status(&other).actual, 70);
    other.resume();
    other.run();
    let discarded = other.device().1.guest();
    assert_eq!(discarded, pages.iter().map(|&n| (u64::from(n) * PAGE, PAGE)).collect::<Vec<_>>());
    assert_eq!(other.used(INFLATE), Some((long, 0)));
    assert_eq!(other.used(INFLATE), None);
    // The buffer of statistics is read again, and asked for when it is time.
    assert_eq!(status(&other).named().collect::<Vec<_>>(), [("free_memory", 1000)]);
    assert_eq!(other.used(THIRD), None);
    assert!(other.expire_timers());
    assert_eq!(other.used(THIRD), Some((held, 0)));
    assert_eq!(other.used(THIRD), None);
}

#[test]
fn the_payload_is_as_it_was() {
    let (mut balloon, _) = balloon();
    balloon.write_config(ACTUAL_OFFSET, &70u32.to_le_bytes());
    golden::check(&balloon.save(), "virtio-balloon", 1, "10000000 46000000", |payload| {
        let (mut other, _) = made(None, false);
        other.update(&Message::BalloonTarget(3));
        other.restore(payload).map(|()| other.save())
    });
}
