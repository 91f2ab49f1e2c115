//! What the user of a running machine can do to it: pause, resume, end it, and take its kernel file
//! away.

// All of this is tests; clippy sees that of functions with the attribute only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command as Process};
use std::time::{Duration, Instant};

use common::{Running, add_disk, alone, flood, one_segment_kernel, payload};
use vmm::config::{BalloonConfig, ByteSize};
use vmm::devices::virtio::balloon::BalloonStatus;
use vmm::devices::virtio::blk::{Candidate, DiskFile};
use vmm::devices::virtio::device::BackEnd;
use vmm::machine::{Command, DeviceStatus, Ending, Message, Refusal, State, Traffic};
use vmm::signals::Signals;

/// What is to happen soon.
const SOON: Duration = Duration::from_secs(10);

fn paused(machine: &Running) {
    assert_eq!(machine.handle.call(Command::Pause), Ok(State::Paused));
}

fn resumed(machine: &Running) {
    assert_eq!(machine.handle.call(Command::Resume), Ok(State::Running));
}

#[test]
fn a_busy_guest_does_not_notice_that_it_is_paused() {
    let folder = tempfile::tempdir().unwrap();
    // Alone, and with other vCPUs and a second queue's worth of devices beside it.
    for cpus in [1, 3] {
        let mut config = payload("blk op=verify size=4096 count=4096");
        config.cpus = cpus;
        config.rng = true;
        add_disk(&mut config, &folder, 16);
        let machine = Running::start(config, None);
        let mut pauses = 0;
        while pauses < 25 && !machine.is_over() {
            match machine.handle.call(Command::Pause) {
                Ok(state) => assert_eq!(state, State::Paused),
                Err(Refusal::Gone(_)) => break,
                Err(other) => panic!("{other}"),
            }
            assert_eq!(machine.handle.call(Command::Status), Ok(State::Paused));
            resumed(&machine);
            pauses += 1;
            // At once, and after some work.
            std::thread::sleep(Duration::from_millis(pauses % 4));
        }
        assert_eq!(pauses, 25, "the guest was too quick");
        let (ending, text) = machine.finish();
        assert_eq!(ending, Ok(Ending::Reset), "{text}");
        assert!(text.contains("count=4096 failed=0 bad=0"), "{text}");
    }
}

#[test]
fn interrupts_are_neither_lost_nor_repeated_by_pauses() {
    let mut config = payload("irq count=3000 halt=1");
    config.rng = true;
    let machine = Running::start(config, None);
    for pause in 0..20 {
        if machine.handle.call(Command::Pause) != Ok(State::Paused) {
            break;
        }
        std::thread::sleep(Duration::from_millis(pause % 3));
        resumed(&machine);
    }
    let (ending, text) = machine.finish();
    assert_eq!(ending, Ok(Ending::Reset), "{text}");
    assert!(text.contains("completed=3000"), "{text}");
}

#[test]
fn a_limit_that_is_reached_holds_up_the_guest_and_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = payload("blk op=verify size=4096 count=64");
    add_disk(&mut config, &folder, 16);
    // Some requests, and the next one in an hour.
    config.disk[0].rate = Some("20ops/72000s".parse().unwrap());
    let machine = Running::start(config, None);
    // While a queue waits for its limit, pauses are as quick as ever and change nothing.
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        paused(&machine);
        resumed(&machine);
        assert!(start.elapsed() < SOON);
    }
    assert!(!machine.is_over(), "the limit was not kept");
    let update = |device: &str, rate: &str| {
        let limit = rate.parse::<vmm::config::RateLimit>().unwrap().limiter();
        let message = Message::RateLimit(Traffic::All, limit);
        machine.handle.call(Command::Update { device: device.to_owned(), message })
    };
    assert_eq!(update("disk7", "1M"), Err(Refusal::NoDevice("disk7".into())));
    assert_eq!(update("disk0", "20ops/72000s"), Ok(State::Running));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!machine.is_over(), "the new limit was not kept");
    // Taken away in a pause, for the workers that come after it.
    paused(&machine);
    assert_eq!(update("disk0", "0"), Ok(State::Paused));
    resumed(&machine);
    let (ending, text) = machine.finish();
    assert_eq!(ending, Ok(Ending::Reset), "{text}");
    assert!(text.contains("count=64 failed=0 bad=0"), "{text}");
}

#[test]
fn a_balloon_is_changed_and_asked_while_the_guest_runs() {
    let mut config = payload("balloon op=info wait=1");
    config.balloon = Some(BalloonConfig { size: ByteSize(8 << 20), ..Default::default() });
    config.rng = true;
    let mut machine = Running::start(config, None);
    machine.wait_for("waiting");
    let status = |device: &str| {
        let (answer, status) = std::sync::mpsc::sync_channel(1);
        let device = device.to_owned();
        machine.handle.call(Command::DeviceStatus { device, answer })?;
        Ok(status.try_recv().unwrap())
    };
    let balloon =
        |target| DeviceStatus::Balloon(BalloonStatus { target, ..BalloonStatus::default() });
    assert_eq!(status("balloon"), Ok(balloon(8 << 8)));
    for name in ["rng", "balloon2"] {
        assert_eq!(status(name), Err(Refusal::NoDevice(name.into())));
    }
    // In a pause, too; the guest learns of it afterwards.
    paused(&machine);
    let message = Message::BalloonTarget(77);
    let update = Command::Update { device: "balloon".into(), message };
    assert_eq!(machine.handle.call(update), Ok(State::Paused));
    assert_eq!(status("balloon"), Ok(balloon(77)));
    resumed(&machine);
    let (ending, text) = machine.finish();
    assert_eq!(ending, Ok(Ending::Reset), "{text}");
    assert!(text.contains("result balloon target=77"), "{text}");
}

/// Bytes that wait in a pipe.
fn waiting(pipe: &PipeReader) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD stores one int.
    assert_eq!(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut count) }, 0);
    count as usize
}

/// Waits until the first vCPU of this process's only machine waits for its console.
fn blocked() {
    let task = |path: std::path::PathBuf| {
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        (name.trim() == "vcpu 0").then_some(path.join("stat"))
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let stat = tasks.filter_map(|entry| task(entry.path())).next().expect("no vCPU");
    let deadline = Instant::now() + 6 * SOON;
    let mut asleep = 0;
    // A guest that runs is seen to run every now and then.
    while asleep < 30 {
        assert!(Instant::now() < deadline, "the guest goes on writing");
        let text = std::fs::read_to_string(&stat).unwrap();
        let state = text.rsplit(") ").next().unwrap().chars().next();
        asleep = if state == Some('S') { asleep + 1 } else { 0 };
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A guest that prints `size` characters into a pipe of one page that nobody reads, when it cannot
/// go on.
fn flooding(size: usize) -> Running {
    let machine = Running::start(payload(&format!("serialflood size={size}")), None);
    // SAFETY: F_SETPIPE_SZ takes a number.
    assert!(unsafe { libc::fcntl(machine.console.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    soon("the first byte", || waiting(&machine.console) > 0);
    blocked();
    machine
}

#[test]
fn nothing_happens_in_a_pause() {
    let mut machine = Running::start(payload("spin say=1"), None);
    machine.wait_for(".");
    paused(&machine);
    std::thread::sleep(Duration::from_millis(50));
    let before = waiting(&machine.console);
    // Long enough for a few dots.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(waiting(&machine.console), before);
    resumed(&machine);
    machine.wait_for(".");
    assert_eq!(machine.handle.call(Command::Quit), Ok(State::Stopped));
    assert_eq!(machine.finish().0, Ok(Ending::Quit));
}

/// Asserts that `command` is refused in `state`.
fn refused(machine: &Running, command: Command, state: State) {
    let asked = format!("{command:?}");
    match machine.handle.call(command) {
        Err(Refusal::State { state: said, .. }) => assert_eq!(said, state),
        other => panic!("{asked} while {state}: {other:?}"),
    }
}

#[test]
fn what_is_not_possible_is_refused_and_changes_nothing() {
    let mut machine = Running::start(payload("spin say=1"), None);
    machine.wait_for("hello");
    assert_eq!(machine.handle.call(Command::Status), Ok(State::Running));
    refused(&machine, Command::Resume, State::Running);
    assert_eq!(machine.handle.call(Command::PowerButton), Ok(State::Running));
    paused(&machine);
    refused(&machine, Command::Pause, State::Paused);
    assert_eq!(machine.handle.call(Command::PowerButton), Ok(State::Paused));
    assert_eq!(machine.handle.call(Command::Status), Ok(State::Paused));
    resumed(&machine);
    machine.wait_for(".");
    paused(&machine);
    // The power can be cut in a pause as well.
    let handle = machine.handle.clone();
    assert_eq!(handle.call(Command::Quit), Ok(State::Stopped));
    assert_eq!(machine.finish().0, Ok(Ending::Quit));
    for command in [Command::Status, Command::Pause, Command::Quit] {
        assert!(matches!(handle.call(command), Err(Refusal::Gone(_))));
    }
}

#[test]
fn a_second_change_while_one_is_under_way_is_refused() {
    let machine = Running::start(payload("spin"), None);
    for _ in 0..20 {
        let (sender, answers) = std::sync::mpsc::channel();
        // Sent together, so that some of them arrive while the first is under way.
        for command in [Command::Pause, Command::Pause, Command::Resume, Command::PowerButton] {
            let sender = sender.clone();
            let asked = format!("{command:?}");
            let reply = Box::new(move |reply| sender.send((asked, reply)).unwrap());
            machine.handle.send(command, reply);
        }
        drop(sender);
        let answers: Vec<_> = answers.iter().collect();
        assert_eq!(answers.len(), 4, "each gets an answer: {answers:?}");
        let done =
            |command: &str| answers.iter().filter(|(c, r)| c == command && r.is_ok()).count();
        assert_eq!(done("Pause"), 1, "{answers:?}");
        if done("Resume") == 0 {
            resumed(&machine);
        }
    }
    machine.handle.call(Command::Quit).unwrap();
    assert_eq!(machine.finish().0, Ok(Ending::Quit));
}

fn replaced(machine: &Running, path: &Path) -> Result<State, Refusal> {
    let candidate = Candidate::open(path, false, false).unwrap();
    let back_end = BackEnd::Disk(candidate);
    machine.handle.call(Command::Replace { device: "disk0".into(), back_end })
}

#[test]
fn a_disk_gets_another_file_while_the_guest_uses_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = payload("blk op=read depth=32 count=300000");
    add_disk(&mut config, &folder, 16);
    let first = config.disk[0].path.clone();
    let second = folder.path().join("second.img");
    std::fs::copy(&first, &second).unwrap();
    let taken = folder.path().join("taken.img");
    std::fs::copy(&first, &taken).unwrap();
    let holder = DiskFile::open(&taken, false, false).unwrap();
    let machine = Running::start(config, None);
    let mut rounds = 0;
    while rounds < 40 && !machine.is_over() {
        // In turns with the one that it began with, which others may have meanwhile.
        let (next, before) = if rounds % 2 == 0 { (&second, &first) } else { (&first, &second) };
        match replaced(&machine, next) {
            Ok(state) => assert_eq!(state, State::Running),
            Err(Refusal::Gone(_)) => break,
            Err(other) => panic!("{other}"),
        }
        drop(DiskFile::open(before, false, false).unwrap());
        assert!(DiskFile::open(next, false, false).is_err(), "the new file is locked");
        // The same file again: it may have grown.
        assert_eq!(replaced(&machine, next), Ok(State::Running));
        match replaced(&machine, &taken) {
            Err(Refusal::Device { device, reason }) => {
                assert_eq!(device, "disk0");
                assert!(reason.contains("in use"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        if rounds % 8 == 0 {
            paused(&machine);
            assert_eq!(replaced(&machine, next), Ok(State::Paused));
            resumed(&machine);
        }
        rounds += 1;
    }
    assert_eq!(rounds, 40, "the guest was too quick");
    drop(holder);
    let (ending, text) = machine.finish();
    assert_eq!(ending, Ok(Ending::Reset), "{text}");
    assert!(text.contains("count=300000 failed=0"), "{text}");
}

#[test]
fn a_guest_whose_console_nobody_reads_can_be_paused_and_loses_nothing() {
    alone("a_guest_whose_console_nobody_reads_can_be_paused_and_loses_nothing", || {
        const SIZE: usize = 90_000;
        let mut machine = flooding(SIZE);
        let full = waiting(&machine.console);
        for _ in 0..5 {
            let start = Instant::now();
            paused(&machine);
            resumed(&machine);
            assert!(start.elapsed() < SOON);
            blocked();
        }
        paused(&machine);
        assert_eq!(waiting(&machine.console), full);
        // What waits is delivered in the pause too: it is the guest that stands still.
        let mut bytes = vec![0; full];
        machine.console.read_exact(&mut bytes).unwrap();
        machine.text.extend(bytes);
        soon("the rest", || waiting(&machine.console) > 0);
        resumed(&machine);
        let (ending, text) = machine.finish();
        assert_eq!(ending, Ok(Ending::Reset));
        let expected = flood(SIZE) + "done\n";
        let same = text.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
        assert_eq!(text.len(), expected.len(), "the texts differ from byte {same} on");
        assert_eq!(same, text.len());
    });
}

#[test]
fn a_guest_whose_console_nobody_reads_can_be_ended() {
    alone("a_guest_whose_console_nobody_reads_can_be_ended", || {
        let machine = flooding(90_000);
        let start = Instant::now();
        machine.handle.call(Command::Quit).unwrap();
        assert_eq!(machine.finish_unread(), Ok(Ending::Quit));
        assert!(start.elapsed() < 2 * SOON);
    });
}

/// Empties `path` in another process.
fn emptier(path: &Path) -> Child {
    Process::new("sh").args(["-c", ": > \"$0\""]).arg(path).spawn().unwrap()
}

fn soon(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "{what} takes too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn is_mapped(path: &Path) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.contains(&*path.to_string_lossy())
}

#[test]
fn a_guest_goes_on_when_its_kernel_file_is_emptied() {
    alone("a_guest_goes_on_when_its_kernel_file_is_emptied", || {
        let signals = Signals::block().unwrap();
        for in_a_pause in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let mut config = payload("spin say=1");
            config.cpus = 2;
            let path = one_segment_kernel(&folder);
            config.kernel.path = path.clone();
            let mut machine = Running::start(config, Some(signals.try_clone().unwrap()));
            machine.wait_for("hello");
            assert!(is_mapped(&path), "the kernel was copied, not mapped");
            if in_a_pause {
                paused(&machine);
            }
            let mut writer = emptier(&path);
            soon("the writer's open", || writer.try_wait().unwrap().is_some());
            assert!(writer.wait().unwrap().success());
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);
            assert!(!is_mapped(&path));
            if in_a_pause {
                assert_eq!(machine.handle.call(Command::Status), Ok(State::Paused));
                resumed(&machine);
            }
            // Its code was in that file.
            machine.wait_for("..");
            paused(&machine);
            resumed(&machine);
            machine.wait_for(".");
            machine.handle.call(Command::Quit).unwrap();
            assert_eq!(machine.finish().0, Ok(Ending::Quit));
        }
    });
}

#[test]
fn a_kernel_file_that_is_being_written_is_copied() {
    alone("a_kernel_file_that_is_being_written_is_copied", || {
        let folder = tempfile::tempdir().unwrap();
        let mut config = payload("spin say=1");
        let path = one_segment_kernel(&folder);
        config.kernel.path = path.clone();
        let writer = std::fs::File::options().write(true).open(&path).unwrap();
        let mut machine = Running::start(config, None);
        machine.wait_for("hello");
        assert!(!is_mapped(&path));
        writer.set_len(0).unwrap();
        machine.wait_for(".");
        machine.handle.call(Command::Quit).unwrap();
        assert_eq!(machine.finish().0, Ok(Ending::Quit));
    });
}
