use std::sync::{Arc, Mutex};

use super::*;
use crate::golden;
use crate::virtio::conformance::{Harness, Probe, RAM, conformance};
use crate::virtio::mmio::reg;
use crate::virtio::queue::INTERRUPT_CONFIG;

/// A sink that takes up to `room` bytes.
#[derive(Default)]
struct Screen {
    text: Vec<u8>,
    room: usize,
    calls: usize,
}

#[derive(Clone)]
struct Sink(Arc<Mutex<Screen>>);

impl ConsoleOutput for Sink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut screen = self.0.lock().unwrap();
        let taken = screen.room.min(bytes.len());
        screen.text.extend(&bytes[..taken]);
        screen.room -= taken;
        screen.calls += 1;
        taken
    }
}

impl Sink {
    fn new(room: usize) -> Sink {
        Sink(Arc::new(Mutex::new(Screen { room, ..Screen::default() })))
    }

    fn text(&self) -> Vec<u8> {
        self.0.lock().unwrap().text.clone()
    }

    fn make_room(&self, room: usize) {
        self.0.lock().unwrap().room += room;
    }

    fn calls(&self) -> usize {
        self.0.lock().unwrap().calls
    }
}

fn console(sink: &Sink) -> Console {
    let sink = sink.clone();
    Console::new(Box::new(move || Box::new(sink.clone())), Some((80, 25)))
}

type Subject = (Console, Sink);

fn subject() -> Subject {
    let sink = Sink::new(usize::MAX);
    (console(&sink), sink)
}

fn probe() -> Probe<Subject> {
    Probe {
        queue: TX,
        request: |harness| {
            let (gpa, len) = harness.readable(b"hello");
            vec![(gpa, len, false)]
        },
        check: |harness, written| {
            assert_eq!(written, 0);
            assert!(harness.device().1.text().ends_with(b"hello"));
        },
        stimulus: |harness| harness.message(&Message::Input(vec![b'x'; 100])),
    }
}

conformance!(subject, probe());

#[test]
fn output_spans_buffers_and_pieces() {
    let sink = Sink::new(usize::MAX);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let text: Vec<u8> = (0..PIECE * 3 + 5).map(|i| i as u8).collect();
    let (first, first_len) = harness.readable(&text[..10]);
    let (second, second_len) = harness.readable(&text[10..]);
    let used = harness.request(TX, &[(first, first_len, false), (second, second_len, false)]);
    assert_eq!(used, Some(0));
    assert_eq!(sink.text(), text);
}

#[test]
fn a_full_sink_makes_the_guest_wait_and_loses_nothing() {
    let sink = Sink::new(3);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let (gpa, len) = harness.readable(b"hello");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), None);
    let (gpa, len) = harness.readable(b" world");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), None);
    assert_eq!(sink.calls(), 1, "a full sink is asked again only when the timer says so");
    assert!(harness.expire_timers());
    assert_eq!(sink.calls(), 2);
    assert_eq!(sink.text(), b"hel");
    sink.make_room(100);
    assert!(harness.expire_timers());
    harness.run();
    assert_eq!(sink.text(), b"hello world");
    assert!(harness.used(TX).is_some() && harness.used(TX).is_some());
    assert!(!harness.expire_timers(), "no timer runs when there is nothing to do");
}

#[test]
fn a_stop_in_the_middle_of_a_line_neither_loses_nor_repeats() {
    let sink = Sink::new(3);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let (gpa, len) = harness.readable(b"hello");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), None);
    let states = harness.pause();
    assert_eq!(states[1].1.next_avail, 0, "the request was given back");
    let payload = harness.device().save();
    let mut restored = console(&sink);
    restored.restore(&payload).unwrap();
    *harness.device_mut() = restored;
    sink.make_room(100);
    harness.resume();
    harness.run();
    assert_eq!(sink.text(), b"hello");
    let (gpa, len) = harness.readable(b" world");
    let head = harness.offer(TX, &[(gpa, len, false)]);
    harness.kick(TX);
    harness.run();
    assert_eq!(harness.used(TX).map(|(_, len)| len), Some(0));
    assert_eq!(harness.used(TX), Some((head, 0)));
    assert_eq!(sink.text(), b"hello world");
}

#[test]
fn a_reset_in_the_middle_of_a_line_forgets_it() {
    let sink = Sink::new(3);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let (gpa, len) = harness.readable(b"hello");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), None);
    harness.reset();
    sink.make_room(100);
    harness.activate();
    let (gpa, len) = harness.readable(b"world");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
    assert_eq!(sink.text(), b"helworld");
}

#[test]
fn input_fills_buffers_as_they_come() {
    let mut harness = Harness::new(console(&Sink::new(0)));
    harness.activate();
    harness.message(&Message::Input(b"abcdef".to_vec()));
    let (first, _) = harness.writable(4);
    assert_eq!(harness.request(RX, &[(first, 4, true)]), Some(4));
    assert_eq!(harness.read(first, 4), b"abcd");
    let (second, _) = harness.writable(4);
    assert_eq!(harness.request(RX, &[(second, 4, true)]), Some(2));
    assert_eq!(harness.read(second, 4), b"ef\0\0");
    let (third, _) = harness.writable(4);
    assert_eq!(harness.request(RX, &[(third, 4, true)]), None, "nothing was typed");
    harness.interrupts();
    harness.message(&Message::Input(b"g".to_vec()));
    assert_eq!(harness.used(RX).map(|(_, len)| len), Some(1));
    assert_eq!(harness.interrupts(), 1);
}

#[test]
fn input_is_bounded_and_survives_a_pause() {
    let mut harness = Harness::new(console(&Sink::new(0)));
    harness.activate();
    for _ in 0..100 {
        harness.message(&Message::Input(vec![b'x'; 1000]));
    }
    harness.pause();
    harness.resume();
    harness.run();
    let mut received = 0;
    loop {
        let (gpa, len) = harness.writable(2000);
        match harness.request(RX, &[(gpa, len, true)]) {
            Some(len) => received += len as usize,
            None => break,
        }
    }
    assert_eq!(received, INPUT_MAX);
}

#[test]
fn a_receive_buffer_that_is_not_writable_is_a_fault() {
    let mut harness = Harness::new(console(&Sink::new(0)));
    harness.activate();
    let (gpa, len) = harness.readable(b"?");
    harness.request(RX, &[(gpa, len, false)]);
    harness.message(&Message::Input(b"x".to_vec()));
    assert!(matches!(harness.take_fault(), Some(Fault::Request(RX, _))));
}

#[test]
fn a_chain_as_large_as_the_queue_allows_is_passed_on_in_turns() {
    let sink = Sink::new(usize::MAX);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let chain = [(0, RAM as u32, false); 8];
    harness.offer(TX, &chain);
    harness.kick(TX);
    harness.turn();
    let once = sink.text().len();
    assert!(once <= BATCH * PIECE, "one turn takes {once} bytes");
    harness.run();
    assert_eq!(sink.text().len(), 8 * RAM as usize);
}

#[test]
fn the_driver_learns_of_a_new_size() {
    let mut harness = Harness::new(console(&Sink::new(0)));
    harness.activate();
    assert_eq!(harness.read_register(reg::CONFIG), 25 << 16 | 80);
    let same = Message::Resize { columns: 80, rows: 25 };
    assert_eq!(harness.device_mut().update(&same), None);
    let config = harness.device_mut().update(&Message::Resize { columns: 132, rows: 50 });
    assert_eq!(config, Some(vec![132, 0, 50, 0]));
    assert_eq!(harness.interrupt().status() & INTERRUPT_CONFIG, 0, "publishing is the machine's");

    let mut sizeless = Console::new(Box::new(|| Box::new(Sink::new(0))), None);
    assert_eq!(sizeless.config(), [0; 4]);
    assert_eq!(sizeless.update(&same), Some(vec![80, 0, 25, 0]));
    assert_eq!(sizeless.update(&same), None);
}

#[test]
fn a_machine_goes_on_in_another_window_or_in_none() {
    let sink = Sink::new(usize::MAX);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    harness.pause();
    let saved = harness.save();
    for (size, config) in
        [(Some((132, 50)), 50 << 16 | 132), (None, 0), (Some((80, 25)), 25 << 16 | 80)]
    {
        let other = sink.clone();
        let console = Console::new(Box::new(move || Box::new(other.clone())), size);
        let mut harness = harness.restored(console, &saved).unwrap();
        assert_eq!(harness.read_register(reg::CONFIG), config);
        let changed = size != Some((80, 25));
        assert_eq!(harness.interrupt().status() & INTERRUPT_CONFIG != 0, changed, "{size:?}");
        harness.resume();
        let (gpa, len) = harness.readable(b"hello");
        assert_eq!(harness.request(TX, &[(gpa, len, false)]), Some(0));
    }
    assert_eq!(sink.text(), b"hello".repeat(3));
}

#[test]
fn output_that_was_half_written_goes_on_in_another_machine() {
    let sink = Sink::new(3);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    for text in [b"half-written", b" and the end"] {
        let (gpa, len) = harness.readable(text);
        harness.offer(TX, &[(gpa, len, false)]);
    }
    let (gpa, len) = harness.writable(4);
    harness.offer(RX, &[(gpa, len, true)]);
    harness.kick(TX);
    harness.run();
    // It is saved twice, since the first one goes on without having written anything.
    for _ in 0..2 {
        harness.pause();
        let mut other = harness.moved_to(console(&sink));
        other.resume();
        other.run();
        harness = other;
    }
    assert_eq!(sink.text(), b"hal");
    sink.make_room(usize::MAX - 3);
    harness.expire_timers();
    harness.run();
    assert_eq!(sink.text(), b"half-written and the end");
    assert_eq!((harness.used_index(TX), harness.used_index(RX)), (2, 0));
    // What was typed reaches the buffer that was offered to the other machine.
    harness.message(&Message::Input(b"typed".to_vec()));
    assert_eq!(harness.used(RX).map(|(_, written)| written), Some(4));
    assert_eq!(harness.read(gpa, len), b"type");
}

#[test]
fn the_payload_is_as_it_was() {
    let sink = Sink::new(3);
    let mut harness = Harness::new(console(&sink));
    harness.activate();
    let (gpa, len) = harness.readable(b"half-written");
    assert_eq!(harness.request(TX, &[(gpa, len, false)]), None);
    harness.pause();
    let saved = harness.device().save();
    golden::check(&saved, "virtio-console", 1, "0300000000000000", |payload| {
        let mut console = console(&sink);
        console.restore(payload).map(|()| console.save())
    });
}
