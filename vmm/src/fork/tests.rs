//! Whatever comes, it is a machine or an error: no panic, no wait without end, no descriptor that is left.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use devices::virtio::blk::DiskFile;
use devices::virtio::blk::qcow2::{Access, Qcow2};
use proptest::prelude::*;

use super::*;
use crate::config::{DiskConfig, DiskFormat, VmConfig};
use crate::memory::{PAGE_SIZE, Runs};
use crate::snapshot::{Header, MemoryHeader};

fn state() -> State {
    let memory = MemoryHeader {
        id: "x".to_owned(),
        aside: String::new(),
        size: 64 * PAGE_SIZE,
        data: 0,
        sum: None,
        samples: Vec::new(),
        base: None,
    };
    let header = Header {
        hull: "x".to_owned(),
        created_ms: 1,
        host: None,
        config: VmConfig::default(),
        memory,
        disks: Vec::new(),
    };
    let payload = Payload { kind: "vm", version: 1, bytes: vec![1, 2, 3] };
    State { header, parts: vec![Part { owner: "vm".to_owned(), payload }] }
}

fn layer(byte: u8, pages: std::ops::Range<u64>) -> Layer {
    let file = sealed_copy(&[byte; 64 * PAGE_SIZE as usize]).unwrap();
    Layer::new(Arc::new(file), &Runs::new([pages]))
}

/// Two disks that begin with `a` and `b`.
fn disks(folder: &Path) -> (Disks, disks::Switch) {
    let disk = |name: &str| {
        let path = folder.join(name);
        std::fs::write(&path, name.repeat(4096)).unwrap();
        (name.to_owned(), Arc::new(DiskFile::open(&path, false, false).unwrap().into()))
    };
    Disks::freeze(&[disk("a"), disk("b")], &[child("c")], "m", None).unwrap()
}

fn child(name: &str) -> Child {
    Child { name: Some(name.to_owned()), number: 1, of: 2, resume: true, ..Child::default() }
}

/// An empty qcow2 image: header, refcount table, refcount block and L1 table in clusters of 512 bytes.
fn image() -> Vec<u8> {
    let mut image = vec![0; 4 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    for (at, word) in [(20, 9_u32), (36, 1), (56, 1), (96, 4), (100, 104)] {
        put(at, &word.to_be_bytes());
    }
    for (at, word) in [(24, 4096_u64), (40, 3 * 512), (48, 512), (512, 2 * 512)] {
        put(at, &word.to_be_bytes());
    }
    put(2 * 512, &[0, 1, 0, 1, 0, 1, 0, 1]);
    image
}

fn pair() -> (UnixStream, UnixStream) {
    let (own, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (own, theirs)
}

/// A deadline that is not met only by who stands still.
fn soon() -> Instant {
    Instant::now() + PAUSE
}

/// How many descriptors of this process are of the files that these are of. Other tests may open theirs meanwhile.
fn descriptors(of: &[RawFd]) -> usize {
    let file = |fd: &str| {
        let found = std::fs::metadata(format!("/proc/self/fd/{fd}")).ok()?;
        Some((found.dev(), found.ino()))
    };
    let files: Vec<_> = of.iter().map(|fd| file(&fd.to_string()).unwrap()).collect();
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let all = all.filter_map(|entry| file(entry.unwrap().file_name().to_str().unwrap()));
    all.filter(|one| files.contains(one)).count()
}

fn notice(name: &str) -> Notice {
    let config = VmConfig { name: Some("m".to_owned()), ..VmConfig::default() };
    Notice { child: child(name), config, host: Some("h".to_owned()), disks: true }
}

/// What comes of these bytes and descriptors after a notice, behind which there is nothing.
fn received(bytes: &[u8], fds: &[RawFd]) -> Result<(Origin, Disks), HandOverError> {
    let (own, theirs) = pair();
    announce(&own, &notice("a"), soon()).unwrap();
    assert_eq!(peek(&theirs), Some(Shape::of(&VmConfig::default())));
    assert_eq!(hear(&theirs).unwrap(), notice("a"));
    let sent = match fds {
        [] => (&own).write(bytes).unwrap(),
        fds => own.send_with_fds(&[bytes], fds).unwrap(),
    };
    (&own).write_all(&bytes[sent..]).unwrap();
    own.shutdown(Shutdown::Write).unwrap();
    receive(&theirs)
}

#[test]
fn an_image_is_handed_over_and_opened_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("a"), image()).unwrap();
    let open = |disk: &DiskConfig| {
        Qcow2::open(&disk.path, Access { forked: disk.forked, ..Access::default() })
    };
    let disk = DiskConfig { path: at("a"), format: Some(DiskFormat::Qcow2), ..Default::default() };
    let mut parent = VmConfig { disk: vec![disk.clone()], ..VmConfig::default() };
    let mut copy = parent.clone();
    let opened = ("disk0".to_owned(), Arc::new(open(&disk).unwrap().into()));
    let (disks, switch) = Disks::freeze(&[opened], &[child("c")], "m", None).unwrap();
    let files = disks.files().map(|file| file.try_clone().unwrap()).collect();
    let handed = Disks::from_bytes(&disks.to_bytes().unwrap(), files).unwrap();
    let mut copies = handed.copy(&child("c"), "c", &mut copy).unwrap();
    assert_eq!(copies.files(), [("disk0".to_owned(), at("a.c.qcow2"))]);
    assert_eq!(switch.done(&mut parent)[0].1.path(), at("a.m.qcow2"));
    for (config, name) in [(&copy, "a.c.qcow2"), (&parent, "a.m.qcow2")] {
        assert_eq!(config.disk, [DiskConfig { path: at(name), forked: 1, ..disk.clone() }]);
        config.validate_without_kernel().unwrap();
    }
    drop((copies.take(), handed, disks));
    open(&copy.disk[0]).unwrap();
    // Of another file in its place nothing is known.
    let mut config = copy.clone();
    let disks = vec![("disk0".to_owned(), at("a.m.qcow2"))];
    Overrides { disks, ..Overrides::default() }.apply(&mut config).unwrap();
    assert!(open(&config.disk[0]).unwrap_err().to_string().contains("stands on \"a\""));
    config.disk[0] = DiskConfig { format: None, ..copy.disk[0].clone() };
    assert!(config.validate_without_kernel().unwrap_err().to_string().contains("disk[0].forked"));
    drop(copies);
    assert!(!at("a.c.qcow2").exists());
}

#[test]
fn what_is_sent_arrives() {
    let shifted = layer(4, 7..9);
    let mut bytes = shifted.to_bytes();
    [7u64, 2, 30].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    let shifted = Layer::from_bytes(Arc::clone(shifted.file()), &bytes).unwrap();
    let layers = vec![layer(1, 0..64), layer(2, 3..9), layer(3, 5..6), shifted];
    let folder = tempfile::tempdir().unwrap();
    let (disks, _switch) = disks(folder.path());
    let listed = disks.to_bytes().unwrap();
    let seed = Seed::new(state(), layers.clone(), disks).unwrap();
    // A long message comes in parts.
    for name in ["a".to_owned(), "long".repeat(20_000)] {
        let (own, theirs) = pair();
        let notice = notice(&name);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                announce(&own, &notice, soon()).unwrap();
                seed.send(&own, soon()).unwrap();
            });
            assert_eq!(hear(&theirs).unwrap(), notice);
            let (origin, disks) = receive(&theirs).unwrap();
            assert_eq!(origin.state.parts, state().parts);
            let Source::Layers(received) = origin.memory else { panic!("no layers") };
            let pages = |layers: &[Layer]| layers.iter().map(Layer::to_bytes).collect::<Vec<_>>();
            assert_eq!(pages(&received), pages(&layers));
            assert_eq!(disks.to_bytes().unwrap(), listed);
            let byte = |file: &Arc<File>| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, 0).unwrap();
                byte[0]
            };
            assert_eq!(disks.files().map(byte).collect::<Vec<_>>(), b"ab");
        });
        let born = Born { name, pid: 7, api: PathBuf::from("/x"), disks: Vec::new(), hook: None };
        for said in [Ok(born), Err("no".to_owned())] {
            std::thread::scope(|scope| {
                scope.spawn(|| answer(&theirs, &said).unwrap());
                let heard = outcome(&own, Instant::now() + Duration::from_secs(5)).unwrap();
                assert_eq!(heard, said);
            });
        }
    }
}

#[test]
fn there_is_a_most_of_everything() {
    let most = Seed::new(state(), vec![layer(1, 0..1); MOST_FILES], Disks::default()).unwrap();
    let (own, theirs) = pair();
    most.send(&own, soon()).unwrap();
    let Source::Layers(layers) = receive(&theirs).unwrap().0.memory else { panic!("no layers") };
    assert_eq!(layers.len(), MOST_FILES);
    let more = Seed::new(state(), vec![layer(1, 0..1); MOST_FILES + 1], Disks::default());
    assert!(matches!(more, Err(HandOverError::Files { layers: 253, files: 0 })), "{more:?}");
    let long = announce(&own, &notice(&"x".repeat(LONGEST)), soon());
    assert!(matches!(long, Err(HandOverError::Invalid(_))), "{long:?}");
}

#[test]
fn who_says_nothing_is_not_waited_for() {
    let (own, theirs) = pair();
    let start = Instant::now();
    let soon = Instant::now() + Duration::from_millis(50);
    assert!(matches!(outcome(&own, soon), Err(HandOverError::Late)));
    drop(theirs);
    let err = outcome(&own, start + Duration::from_secs(60)).unwrap_err();
    assert!(err.to_string().contains("without a word"), "{err}");
    let (own, theirs) = pair();
    assert!(hear(&theirs).is_err());
    // Nor is who stops in the middle.
    (&own).write_all(&[b'H', b'U', b'L', MAGIC[3], 9, 0, 0, 0, b'{']).unwrap();
    assert!(receive(&theirs).is_err());
    (&theirs).write_all(&[b'H', b'U', b'L', MAGIC[3], 9, 0, 0, 0, b'{']).unwrap();
    let soon = Instant::now() + Duration::from_millis(50);
    assert!(matches!(outcome(&own, soon), Err(HandOverError::Late)));
    assert!(start.elapsed() < PAUSE * 3);
}

#[test]
fn who_says_a_little_at_a_time_is_not_waited_for_either() {
    let (own, theirs) = pair();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let messages = message(&notice(&"x".repeat(1000))).unwrap();
            let mut bytes = messages.iter();
            // As long as somebody listens.
            while bytes.next().is_some_and(|byte| (&own).write_all(&[*byte]).is_ok()) {
                std::thread::sleep(PAUSE / 50);
            }
        });
        assert!(hear(&theirs).is_err());
        assert!(start.elapsed() < PAUSE + Duration::from_secs(2), "{:?}", start.elapsed());
        // It hears why.
        answer(&theirs, &Err("late".to_owned())).unwrap();
        assert_eq!(outcome(&own, soon()).unwrap(), Err("late".to_owned()));
        drop(theirs);
    });
}

#[test]
fn who_takes_nothing_is_not_waited_for() {
    let (own, theirs) = pair();
    let seed = Seed::new(state(), vec![layer(1, 0..1)], Disks::default()).unwrap();
    let long = notice(&"x".repeat(LONGEST / 2));
    let start = Instant::now();
    let in_a_moment = start + Duration::from_millis(50);
    assert!(matches!(announce(&own, &long, in_a_moment), Err(HandOverError::Late)));
    let (other, _theirs) = pair();
    other.set_nonblocking(true).unwrap();
    while (&other).write(&[0; 4096]).is_ok() {}
    other.set_nonblocking(false).unwrap();
    assert!(matches!(seed.send(&other, in_a_moment), Err(HandOverError::Late)));
    assert!(start.elapsed() < PAUSE);
    // Nor does who begins later find a whole message.
    assert!(hear(&theirs).is_err());
}

#[test]
fn a_state_that_is_none_is_refused() {
    let message = message(&()).unwrap();
    let long = memfd(1 << 60);
    let other = sealed_copy(b"hello").unwrap();
    let plain = sealed_copy(&write(&state()).unwrap()).unwrap();
    let folder = File::open("/").unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let fds = [&long, &other, &plain, &folder].map(AsRawFd::as_raw_fd);
    for fd in fds.into_iter().chain([pipe.as_raw_fd()]) {
        received(&message, &[fd]).unwrap_err();
    }
    let err = received(&message, &[]).unwrap_err().to_string();
    assert!(err.contains("no state"), "{err}");
}

#[test]
fn who_was_given_up_cannot_say_that_it_lives() {
    let (own, theirs) = pair();
    let lives = Ok(Born {
        name: "a".to_owned(),
        pid: 7,
        api: PathBuf::new(),
        disks: Vec::new(),
        hook: None,
    });
    assert!(!is_over(&theirs));
    assert!(matches!(outcome(&own, Instant::now()), Err(HandOverError::Late)));
    assert!(is_over(&theirs));
    answer(&theirs, &lives).unwrap_err();
    // One that said so in time was heard, however late somebody looks.
    let (own, theirs) = pair();
    answer(&theirs, &lives).unwrap();
    assert_eq!(outcome(&own, Instant::now()).unwrap(), lives);
    // One that was asked by who is gone knows that nobody waits, before it reads what was sent.
    let (own, theirs) = pair();
    (&own).write_all(b"x").unwrap();
    assert!(!is_over(&theirs));
    drop(own);
    assert!(is_over(&theirs));
}

#[test]
fn another_version_is_said_to_be_one() {
    let state = sealed_copy(&write(&state()).unwrap()).unwrap();
    let mut message = message(&()).unwrap();
    message[3] += 1;
    let err = received(&message, &[state.as_raw_fd()]).unwrap_err();
    assert!(matches!(err, HandOverError::Version(4)), "{err:?}");
    assert!(err.to_string().contains("another version of Hull"), "{err}");
}

#[test]
fn descriptors_that_did_not_come_are_missed() {
    let layers = vec![layer(1, 0..64), layer(2, 3..9)];
    let seed = Seed::new(state(), layers, Disks::default()).unwrap();
    let fds = [seed.state.as_raw_fd(), seed.layers[0].file().as_raw_fd()];
    let err = received(&message(&()).unwrap(), &fds).unwrap_err().to_string();
    assert!(err.contains("1 of its 2 layers") && err.contains("ulimit -n"), "{err}");
}

/// A file of which nothing is there.
fn memfd(len: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(len).unwrap();
    file
}

proptest! {
    #[test]
    fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..9000), fds in 0usize..5) {
        // Nobody else has it open.
        let file = tempfile::tempfile().unwrap();
        // Without a byte there are no descriptors.
        let fds = if bytes.is_empty() { 0 } else { fds };
        prop_assert!(received(&bytes, &vec![file.as_raw_fd(); fds]).is_err());
        prop_assert_eq!(descriptors(&[file.as_raw_fd()]), 1);
        let (own, theirs) = pair();
        (&own).write_all(&bytes).unwrap();
        peek(&theirs);
        own.shutdown(Shutdown::Write).unwrap();
        prop_assert!(outcome(&theirs, Instant::now() + Duration::from_secs(5)).is_err());
    }

    /// One that is right but for a byte, its end, the number of its descriptors, or a byte of its state.
    #[test]
    fn what_is_nearly_right_does_no_harm(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), damage in 0u8..5)
    {
        let layers = vec![layer(1, 0..64), layer(2, 3..9)];
        let folder = tempfile::tempdir().unwrap();
        let (disks, _switch) = disks(folder.path());
        let seed = Seed::new(state(), layers, disks).unwrap();
        let mut message = message(&()).unwrap();
        let mut fds: Vec<RawFd> = std::iter::once(seed.state.as_raw_fd())
            .chain(seed.layers.iter().map(|layer| layer.file().as_raw_fd()))
            .chain(seed.disks.files().map(|file| file.as_raw_fd()))
            .collect();
        let mut bytes = vec![0; seed.state.metadata().unwrap().len() as usize];
        seed.state.read_exact_at(&mut bytes, 0).unwrap();
        let place = at.index(bytes.len());
        bytes[place] ^= byte;
        let damaged = sealed_copy(&bytes).unwrap();
        let mut whole = false;
        match damage {
            0 => {
                let place = at.index(message.len());
                message[place] ^= byte;
                whole = true;
            }
            1 => message.truncate(1 + at.index(message.len() - 1)),
            2 => { fds.remove(at.index(fds.len())); }
            3 => fds.insert(at.index(fds.len()), fds[1]),
            _ => {
                fds[0] = damaged.as_raw_fd();
                whole = byte == 0;
            }
        }
        let before = descriptors(&fds);
        let received = received(&message, &fds);
        prop_assert!(whole || received.is_err(), "{:?}", received);
        drop(received);
        prop_assert_eq!(descriptors(&fds), before);
    }
}
