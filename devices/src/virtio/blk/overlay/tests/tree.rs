//! Disks that are forked, and forked again, while they are written to, lose their power, and die.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, RawFd};
use std::time::SystemTime;

use super::super::super::overlay::{Frozen, Header, Note};
use super::*;

/// First sector and number of sectors.
type Span = (u64, u64);

#[derive(Clone, Debug)]
enum Deed {
    Write(Span, u8),
    Zero(Span, bool),
    Discard(Span),
    Flush,
    Fork,
    /// A fork that is taken back, after somebody had stood on it or not.
    Undo(bool),
    /// As `kill -9` ends it; somebody else may go on with its file.
    Die(bool),
}

fn deed(forks: u32) -> impl Strategy<Value = (prop::sample::Index, Deed)> {
    let sectors = SIZE / 512;
    let span =
        (0..sectors).prop_flat_map(move |first| (Just(first), 1..=(sectors - first).min(40)));
    let deed = prop_oneof![
        8 => (span.clone(), 1u8..).prop_map(|(span, byte)| Deed::Write(span, byte)),
        2 => (span.clone(), any::<bool>()).prop_map(|(span, unmap)| Deed::Zero(span, unmap)),
        1 => span.prop_map(Deed::Discard),
        3 => Just(Deed::Flush),
        forks => Just(Deed::Fork),
        1 => any::<bool>().prop_map(Deed::Undo),
        1 => any::<bool>().prop_map(Deed::Die),
    ];
    (any::<prop::sample::Index>(), deed)
}

/// The base of the overlay at `path`, if it is one.
fn base_of(path: &Path) -> Option<PathBuf> {
    let file = File::open(path).unwrap();
    if file.metadata().unwrap().len() == SIZE {
        return None;
    }
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 0).unwrap();
    Some(path.with_file_name(Header::parse(&page, u64::MAX).unwrap().base.path))
}

/// The files that the disk at `top` consists of, the highest first.
fn chain(top: &Path) -> impl Iterator<Item = PathBuf> {
    std::iter::successors(Some(top.to_owned()), |path| base_of(path))
}

/// What is known to be on the disk of a file.
struct Durable {
    data: Vec<u8>,
    modified: SystemTime,
}

/// What is known to be on the disk of a folder. What else was written may be.
struct OnDisk {
    folder: Folder,
    files: BTreeMap<PathBuf, Durable>,
    names: BTreeSet<PathBuf>,
}

impl OnDisk {
    fn new() -> OnDisk {
        OnDisk { folder: Folder::new(), files: BTreeMap::new(), names: BTreeSet::new() }
    }

    fn all(&self) -> BTreeSet<PathBuf> {
        let entries = fs::read_dir(self.folder.folder.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.is_file()).collect()
    }

    /// All that is there.
    fn settle(&mut self) {
        self.names = self.all();
        for path in self.names.clone() {
            self.synced(&path, true);
        }
    }

    /// The file at `path` was synced; its times are on the disk as well only after an fsync(2).
    fn synced(&mut self, path: &Path, all: bool) {
        let file = File::open(path).unwrap();
        let metadata = file.metadata().unwrap();
        let mut data = vec![0; SIZE as usize];
        file.read_exact_at(&mut data, metadata.len() - SIZE).unwrap();
        let before = self.files.get(path).map_or(SystemTime::UNIX_EPOCH, |file| file.modified);
        let modified = if all { metadata.modified().unwrap() } else { before };
        self.files.insert(path.to_owned(), Durable { data, modified });
    }

    fn sync(&mut self, fd: RawFd, all: bool) {
        let link = PathBuf::from(format!("/proc/self/fd/{fd}"));
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        if link.is_dir() {
            self.names.extend(self.all());
        } else if let Some(path) = self.all().iter().find(|path| inode(path) == inode(&link)) {
            self.synced(path, all);
        }
    }

    /// The disk of which the file at `top` is the highest, as another start of the host finds it. Of data there is
    /// what is known to be, of all else everything.
    fn after_a_power_cut(&self, top: &Path) -> Result<Vec<u8>, OverlayError> {
        let after = tempfile::tempdir().unwrap();
        for path in chain(top) {
            let copy = after.path().join(path.file_name().unwrap());
            fs::copy(&path, &copy).unwrap();
            let file = File::options().read(true).write(true).open(&copy).unwrap();
            let len = file.metadata().unwrap().len();
            if len > SIZE {
                let mut page = [0; 4096];
                file.read_exact_at(&mut page, 4096).unwrap();
                let mut note = Note::parse(&page);
                note.boot = note.boot.map(|_| [3; 16]);
                file.write_all_at(&note.to_page()[..], 4096).unwrap();
            }
            let never = Durable { data: vec![0; SIZE as usize], modified: SystemTime::UNIX_EPOCH };
            let durable = self.files.get(&path).unwrap_or(&never);
            file.write_all_at(&durable.data, len - SIZE).unwrap();
            file.set_modified(durable.modified).unwrap();
        }
        let top = after.path().join(top.file_name().unwrap());
        match fs::metadata(&top).unwrap().len() {
            SIZE => Ok(fs::read(top).unwrap()),
            _ => Overlay::open(&top, true, false).map(contents),
        }
    }
}

/// What a sector may be.
type Sectors = BTreeSet<Vec<u8>>;

/// A machine with a disk.
struct Member {
    harness: Harness<(Block, ())>,
    bytes: Vec<u8>,
    /// What each sector may be after a power cut.
    allowed: Vec<Sectors>,
    /// What each sector ever was, here or where this is a copy of.
    ever: Vec<Sectors>,
    /// A copy that has flushed nothing yet: what was flushed where it comes from is there, and not here.
    is_new: bool,
    /// Something was flushed since it has this file.
    flushed: bool,
}

impl Member {
    fn new(disk: Backing, cache: Cache, from: Option<&Member>, bytes: Vec<u8>) -> Member {
        let mut harness = Harness::new((block_over(disk, cache, 1), ()));
        harness.activate();
        let known = bytes.chunks(512).map(|sector| BTreeSet::from([sector.to_vec()]));
        let allowed: Vec<Sectors> = known.collect();
        let ever = from.map_or(allowed.clone(), |member| member.ever.clone());
        let is_new = from.is_some();
        Member { harness, bytes, allowed, ever, is_new, flushed: !is_new }
    }

    fn disk(&self) -> &Arc<Backing> {
        self.harness.device().0.disk().unwrap()
    }

    fn path(&self) -> PathBuf {
        self.disk().path().to_owned()
    }

    fn read(&mut self) -> Vec<u8> {
        let answer = ask(&mut self.harness, IN, 0, &[], SIZE as u32);
        assert_eq!(answer.status, OK);
        answer.data
    }

    /// Makes a request, and keeps what it has synced.
    fn ask(&mut self, on_disk: &mut OnDisk, kind: u32, sector: u64, data: &[u8]) {
        let request = Request::new(&mut self.harness, kind, sector, data, 0);
        self.harness.hold_operations(true);
        self.harness.offer(0, &request.buffers);
        self.harness.kick(0);
        self.harness.run();
        while let Some(operation) = self.harness.oldest_operation() {
            let (fd, action) = (operation.fd, &operation.action);
            let synced = match action {
                Action::Sync => Some(false),
                Action::SyncAll => Some(true),
                // Of what it writes and of nothing else.
                Action::Write { durable: true, .. } => Some(false),
                _ => None,
            };
            self.harness.finish_operation();
            if let Some(all) = synced {
                on_disk.sync(fd, all);
            }
            self.harness.run();
        }
        self.harness.hold_operations(false);
        assert!(self.harness.used(0).is_some(), "no answer");
        assert_eq!(self.harness.read(request.status, 1), [OK]);
    }

    /// Was written: is read from now on, and may be on the disk, or is.
    fn wrote(&mut self, (first, len): Span, sector: impl Fn(u64) -> Vec<u8>, durable: bool) {
        for n in first..first + len {
            let sector = sector(n);
            self.bytes[n as usize * 512..][..512].copy_from_slice(&sector);
            if durable {
                self.allowed[n as usize].clear();
            }
            self.ever[n as usize].insert(sector.clone());
            self.allowed[n as usize].insert(sector);
        }
        self.flushed |= durable;
        self.is_new &= !durable;
    }

    fn write(&mut self, on_disk: &mut OnDisk, cache: Cache, deed: &Deed) {
        let through = cache == Cache::Writethrough;
        match *deed {
            Deed::Write(span, byte) => {
                let sector = |n: u64| vec![byte.wrapping_add((n - span.0) as u8); 512];
                let data: Vec<u8> = (span.0..span.0 + span.1).flat_map(sector).collect();
                self.ask(on_disk, OUT, span.0, &data);
                self.wrote(span, sector, through);
            }
            Deed::Zero(span, unmap) => {
                let flags = if unmap { UNMAP } else { 0 };
                let range = segment(span.0, span.1 as u32, flags);
                self.ask(on_disk, WRITE_ZEROES, 0, &range);
                self.wrote(span, |_| vec![0; 512], through);
            }
            Deed::Discard(span) => {
                self.ask(on_disk, DISCARD, 0, &segment(span.0, span.1 as u32, 0));
                // What is discarded may stay, and be gone after all.
                let now = self.read();
                let sectors = span.0 as usize..(span.0 + span.1) as usize;
                for n in sectors {
                    let bytes = n * 512..(n + 1) * 512;
                    let sector = &now[bytes.clone()];
                    assert!(sector == &self.bytes[bytes.clone()] || sector == [0; 512]);
                    self.bytes[bytes].copy_from_slice(sector);
                    self.allowed[n].insert(vec![0; 512]);
                    self.ever[n].insert(vec![0; 512]);
                }
            }
            Deed::Flush => {
                self.ask(on_disk, FLUSH, 0, &[]);
                for (allowed, sector) in self.allowed.iter_mut().zip(self.bytes.chunks(512)) {
                    *allowed = BTreeSet::from([sector.to_vec()]);
                }
                (self.flushed, self.is_new) = (true, false);
            }
            Deed::Fork | Deed::Undo(_) | Deed::Die(_) => {}
        }
    }

    fn freeze(&mut self, path: &Path) -> Frozen {
        self.harness.pause();
        let frozen = freeze(self.disk(), path).unwrap();
        for file in &frozen.base.files {
            assert_eq!(file.write_at(&[1], 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
            // SAFETY: the call has no memory arguments.
            let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
            assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
        }
        assert!(frozen.base.files.len() <= MOST_LAYERS, "{} files", frozen.base.files.len());
        frozen
    }

    fn fork(&mut self, folder: &Folder, cache: Cache, number: usize) -> Member {
        let frozen = self.freeze(&folder.path(&format!("p{number}")));
        let disk = frozen.base.copy(&folder.path(&format!("c{number}")), false).unwrap();
        let child = Member::new(disk, cache, Some(self), self.bytes.clone());
        if let Some(disk) = frozen.disk {
            self.harness.device_mut().0.replace(BackEnd::Frozen(disk)).unwrap();
            self.flushed = false;
        }
        self.harness.resume();
        child
    }

    fn undo(&mut self, on_disk: &OnDisk, number: usize, copied: bool) {
        let before = on_disk.all();
        let frozen = self.freeze(&on_disk.folder.path(&format!("p{number}")));
        if copied {
            let path = on_disk.folder.path(&format!("c{number}"));
            drop(frozen.base.copy(&path, false).unwrap());
            fs::remove_file(path).unwrap();
        }
        frozen.undo();
        assert_eq!(on_disk.all(), before);
        self.is_locked();
        self.harness.resume();
    }

    /// Nobody else gets what it writes.
    fn is_locked(&self) {
        let refused = match &**self.disk() {
            Backing::Raw(file) => DiskFile::open(file.path(), true, false).err(),
            _ => match Overlay::open(&self.path(), true, false) {
                Err(OverlayError::Open(err)) => Some(err),
                _ => None,
            },
        };
        assert!(matches!(refused, Some(OpenError::Locked { .. })), "{refused:?}");
    }

    /// What is left when its process is killed.
    fn die(self) -> Backing {
        let (path, bytes) = (self.path(), self.bytes);
        drop(self.harness);
        let left = match base_of(&path) {
            None => Backing::from(DiskFile::open(&path, false, false).unwrap()),
            Some(base) => Overlay::open_or_create(&path, &base, false, false).unwrap().into(),
        };
        let found = match &left {
            Backing::Overlay(overlay) => {
                let mut found = vec![0; SIZE as usize];
                overlay.read_at(&mut found, 0).unwrap();
                found
            }
            _ => fs::read(path).unwrap(),
        };
        assert!(found == bytes, "something is lost");
        left
    }

    /// What is left when the power goes.
    fn loses_power(&self, on_disk: &OnDisk) {
        let path = self.path();
        if self.flushed {
            let name = path.file_name();
            assert!(on_disk.names.contains(&path), "{name:?} is gone");
        }
        let found = match on_disk.after_a_power_cut(&path) {
            Ok(found) => found,
            Err(_) if !self.flushed => return,
            Err(err) => panic!("{err:?}"),
        };
        let allowed = if self.is_new { &self.ever } else { &self.allowed };
        for (n, (sector, allowed)) in found.chunks(512).zip(allowed).enumerate() {
            assert!(allowed.contains(sector), "sector {n} is {}..", sector[0]);
        }
    }
}

fn tree(raw: bool, cache: Cache, most: usize, deeds: Vec<(prop::sample::Index, Deed)>) -> usize {
    let mut on_disk = OnDisk::new();
    let disk = match raw {
        true => DiskFile::open(&on_disk.folder.path("base"), false, false).unwrap().into(),
        false => on_disk.folder.made().into(),
    };
    on_disk.settle();
    let bytes = on_disk.folder.bytes.clone();
    let mut members = vec![Member::new(disk, cache, None, bytes)];
    let mut deepest = 0;
    for (number, (which, deed)) in deeds.into_iter().enumerate() {
        let at = which.index(members.len());
        match deed {
            Deed::Fork => {
                let child = members[at].fork(&on_disk.folder, cache, number);
                members.push(child);
                if members.len() > most {
                    // Its parent, or another.
                    drop(members.swap_remove(number % most).die());
                }
            }
            Deed::Undo(copied) => members[at].undo(&on_disk, number, copied),
            Deed::Die(revived) if revived || members.len() > 1 => {
                let member = members.swap_remove(at);
                let Member { flushed, is_new, .. } = member;
                let (allowed, bytes) = (member.allowed.clone(), member.bytes.clone());
                let ever = member.ever.clone();
                let left = member.die();
                if revived {
                    let again = Member::new(left, cache, None, bytes);
                    members.push(Member { allowed, ever, flushed, is_new, ..again });
                }
            }
            Deed::Die(_) => {}
            write => members[at].write(&mut on_disk, cache, &write),
        }
        // Nobody has anything of what another does.
        for (n, member) in members.iter_mut().enumerate() {
            assert!(member.read() == member.bytes, "member {n}");
            deepest = deepest.max(member.disk().overlay().map_or(1, Overlay::depth));
        }
        if number % 3 == 0 {
            members[which.index(members.len())].loses_power(&on_disk);
        }
    }
    for member in members {
        member.loses_power(&on_disk);
        drop(member.die());
    }
    deepest
}

fn cache() -> impl Strategy<Value = Cache> {
    prop_oneof![3 => Just(Cache::Writeback), 1 => Just(Cache::Writethrough)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(32) })]

    #[test]
    fn whoever_is_forked_has_a_disk_of_its_own(
        deeds in prop::collection::vec(deed(4), 1..50), raw: bool, cache in cache())
    {
        tree(raw, cache, 6, deeds);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(8) })]

    /// With a write for each fork, chains soon have more files than are kept.
    #[test]
    fn long_chains_become_short(
        deeds in prop::collection::vec(deed(10), 80..120), raw: bool, cache in cache())
    {
        let deepest = tree(raw, cache, 2, deeds);
        prop_assert!(deepest <= MOST_LAYERS + 1, "{deepest} files");
    }
}
