//! Machines that are forked, and forked again, while they are written to, saved and restored, and die.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use super::*;
use crate::memory::{Layer, Runs};

/// Machines that there may be at a time, each of which has four files of its own.
const MOST: usize = 12;

#[derive(Clone, Debug)]
enum Deed {
    Step(Step),
    Fork,
    Die,
}

fn deed(pagers: bool) -> impl Strategy<Value = (prop::sample::Index, Deed)> {
    let deed = prop_oneof![
        6 => step(pagers).prop_map(Deed::Step),
        3 => Just(Deed::Fork),
        1 => Just(Deed::Die),
    ];
    (any::<prop::sample::Index>(), deed)
}

fn path(file: &File) -> String {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::read_link(link).unwrap().to_string_lossy().into_owned()
}

/// That nobody who is given this layer can change it, if it was made here.
fn is_sealed(layer: &Layer) {
    if !path(layer.file()).starts_with("/memfd:") {
        return;
    }
    let refused = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EPERM));
    };
    // Whoever has the descriptor can open the file once more.
    let link = format!("/proc/self/fd/{}", layer.file().as_raw_fd());
    let again = File::options().read(true).write(true).open(link).unwrap();
    for file in [&**layer.file(), &again] {
        refused(file.write_at(&[1], 0).map(drop));
        refused(file.set_len(0));
        refused(file.set_len(1 << 30));
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let unsealed = libc::F_SEAL_SHRINK;
        // SAFETY: system calls on a file that is open, with numbers; a mapping that nobody looks at.
        unsafe {
            let result =
                |code| if code < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
            refused(result(libc::fallocate(file.as_raw_fd(), hole, 0, PAGE_SIZE as i64)));
            refused(result(libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, unsealed)));
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let mapped = libc::mmap(
                std::ptr::null_mut(),
                PAGE_SIZE as usize,
                prot,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_eq!(mapped, libc::MAP_FAILED);
            refused(Err(std::io::Error::last_os_error()));
        }
    }
}

impl<'a> Run<'a> {
    /// Maps pages of a file that are somewhere else in RAM, as those of a kernel are.
    fn boot(&mut self, file: &File) {
        const AT: u64 = 5;
        const FROM: u64 = 2;
        for (page, byte) in [1u8, 2, 3].into_iter().enumerate() {
            let page = page as u64;
            let bytes = [byte; PAGE_SIZE as usize];
            file.write_all_at(&bytes, (FROM + page) * PAGE_SIZE).unwrap();
            self.now[(AT + page) as usize] = Some(byte);
        }
        let (offset, gpa) = (FROM * PAGE_SIZE, self.kind.at(AT).0);
        self.ram.map_file(file, offset, gpa, 3 * PAGE_SIZE, false).unwrap();
        self.below = self.now;
    }

    fn fork(&mut self, folder: &'a Path) -> Run<'a> {
        let image = self.ram.image();
        image.populate().unwrap();
        self.paged = None;
        let shared = image.share(u64::MAX).unwrap().unwrap();
        shared.layers.iter().for_each(is_sealed);
        let zeroes = [Some(0); PAGES as usize];
        if !self.kind.huge_pages {
            self.below = self.now;
        }
        let mut ram = self.kind.ram();
        // As another process hears of them.
        let again =
            |layer: Layer| Layer::from_bytes(Arc::clone(layer.file()), &layer.to_bytes()).unwrap();
        ram.map_layers(shared.layers.into_iter().map(again).collect()).unwrap();
        Run {
            ram,
            below: if self.kind.huge_pages { zeroes } else { self.now },
            saved: Vec::new(),
            base: None,
            paged: None,
            folder,
            ..*self
        }
    }
}

fn tree(kind: Kind, most: usize, deeds: Vec<(prop::sample::Index, Deed)>) {
    let folders: Vec<_> =
        (0..=deeds.len()).map(|_| tempfile::tempdir_in("/dev/shm").unwrap()).collect();
    let mut fresh = folders.iter().map(tempfile::TempDir::path);
    let mut machines = vec![Run::new(kind, fresh.next().unwrap())];
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    if !kind.huge_pages && !kind.forkable {
        machines[0].boot(&file);
    }
    for (which, deed) in deeds {
        let at = which.index(machines.len());
        match deed {
            Deed::Step(step) => machines[at].step(step),
            Deed::Fork if machines.len() < most => {
                let child = machines[at].fork(fresh.next().unwrap());
                machines.push(child);
            }
            Deed::Die if machines.len() > 1 => drop(machines.swap_remove(at)),
            Deed::Fork | Deed::Die => {}
        }
        // Nobody has anything of what another does.
        for (n, machine) in machines.iter().enumerate() {
            kind.compare(&machine.ram, &machine.now, &format!("machine {n}"));
        }
    }
    machines.iter().for_each(Run::check);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn whoever_is_forked_has_memory_of_its_own(
        deeds in prop::collection::vec(deed(false), 1..60))
    {
        tree(SMALL, MOST, deeds);
    }

    #[test]
    fn so_has_whose_memory_is_a_file(deeds in prop::collection::vec(deed(false), 1..60)) {
        tree(FORKABLE, MOST, deeds);
    }

    #[test]
    fn so_has_who_lives_on_a_pager(deeds in prop::collection::vec(deed(true), 1..40)) {
        tree(SMALL, MOST, deeds);
    }

    #[test]
    fn so_has_who_has_huge_pages(deeds in prop::collection::vec(deed(true), 1..25)) {
        // Three machines', and those of one that is looked at or takes the place of one.
        let _pool = HugePages::new(16);
        tree(HUGE, 3, deeds);
    }

    /// With a page for each fork there are soon more layers than are kept.
    #[test]
    fn many_layers_become_few(
        pages in prop::collection::vec((0..PAGES, 0u8..5), 40..120), children in 0usize..40)
    {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut machine = Run::new(SMALL, folder.path());
        let mut last = None;
        for (n, (page, byte)) in pages.into_iter().enumerate() {
            machine.step(Step::Write { page, len: 1, byte });
            let mut child = machine.fork(folder.path());
            SMALL.compare(&child.ram, &child.now, "a child");
            assert!(machine.ram.image().share(u64::MAX).unwrap().unwrap().layers.len() <= 34);
            // Now and then the child is who goes on.
            if n % 41 == children {
                std::mem::swap(&mut machine, &mut child);
            }
            SMALL.compare(&machine.ram, &machine.now, "the machine");
            last = Some(child);
        }
        if let Some(last) = last {
            last.check();
        }
    }
}

/// True if something here is mapped from a file.
fn is_mapped(inode: u64) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| line.split_whitespace().nth(4) == Some(&inode.to_string()))
}

/// How many mappings there are in this process between two addresses. Other tests may map theirs meanwhile.
fn mappings(between: &Range<u64>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    let ranges = maps.lines().map(|line| line.split_once(' ').unwrap().0.split_once('-').unwrap());
    let ranges = ranges.map(|(start, end)| number(start)..number(end));
    ranges.filter(|range| range.start < between.end && between.start < range.end).count()
}

/// Each third time memory is only frozen, or always.
fn in_pieces(base: bool, shared: bool) {
    const SIZE: u64 = 128 << 20;
    let mut ram = GuestRam::new(SIZE, false).unwrap();
    let start = ram.memory().host_range(0, SIZE).unwrap() as u64;
    let whole = start..start + SIZE;
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(SIZE).unwrap();
    let half = Layer::new(Arc::new(file), &Runs::first(SIZE / PAGE_SIZE / 2));
    ram.map_layers(if base { vec![half] } else { Vec::new() }).unwrap();
    let guest = Arc::clone(ram.memory().guest());
    for round in 1..20u8 {
        // No two of them are neighbours, whatever was written before.
        for page in (0..SIZE / PAGE_SIZE).skip(usize::from(round % 8)).step_by(8) {
            guest.write_obj(round, GuestAddress(page * PAGE_SIZE)).unwrap();
        }
        if round % 3 == 0 || !shared {
            ram.image().freeze().unwrap();
        } else {
            ram.image().share(u64::MAX).unwrap().unwrap();
        }
        let mappings = mappings(&whole);
        assert!(mappings < 40_000, "{mappings} in round {round}");
    }
    let contents = ram.image().contents();
    for page in 0..SIZE / PAGE_SIZE {
        let last = (1..20u8).rev().find(|round| u64::from(round % 8) == page % 8).unwrap();
        let mut bytes = [0; PAGE_SIZE as usize];
        contents.read_page(page, &mut bytes).unwrap();
        assert_eq!(
            (bytes[0], guest.read_obj(GuestAddress(page * PAGE_SIZE)).unwrap()),
            (last, last)
        );
    }
}

#[test]
fn memory_does_not_fall_into_ever_more_pieces() {
    for (base, shared) in [(true, true), (true, false), (false, true), (false, false)] {
        in_pieces(base, shared);
    }
}

#[test]
fn what_nobody_looks_for_any_more_is_gone() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut machine = Run::new(SMALL, folder.path());
    let mut before: Option<(Weak<File>, u64)> = None;
    for byte in 1..5 {
        machine.step(Step::Write { page: 0, len: PAGES, byte });
        let layers = machine.ram.image().share(u64::MAX).unwrap().unwrap().layers;
        assert_eq!(layers.len(), 1);
        if let Some((file, inode)) = before {
            assert!(file.upgrade().is_none(), "a descriptor is left");
            assert!(!is_mapped(inode), "it is mapped");
        }
        let file = layers[0].file();
        let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        before = Some((Arc::downgrade(file), inode));
    }
    // Nothing was written since.
    let image = machine.ram.image();
    assert_eq!(image.share(u64::MAX).unwrap().unwrap().copied, 0);
    assert_eq!(image.share(u64::MAX).unwrap().unwrap().layers.len(), 1);
}
