//! Layers against a plain array: whatever is written, frozen, given back, saved, merged and gone on from,
//! memory is what it should be.

mod forks;
mod pager;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use devices::virtio::balloon::Discard;
use machine_tests::HugePages;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::{Origin, restore_memory};
use crate::memory::{GuestRam, PAGE_SIZE};

const PAGES: u64 = 64;

#[derive(Clone, Debug)]
enum Step {
    /// Writes a byte to these pages; 0 makes them zero again.
    Write {
        page: u64,
        len: u64,
        byte: u8,
    },
    /// Gives pages back to the host.
    Discard {
        page: u64,
        len: u64,
    },
    Freeze,
    /// Saves what changed, or everything.
    Save {
        diff: bool,
    },
    /// Saves what changed over a snapshot that is there.
    SaveOver {
        which: prop::sample::Index,
    },
    /// Goes on from a snapshot, whose memory a pager may bring.
    Restore {
        which: prop::sample::Index,
        paged: bool,
    },
    /// Makes a diff whole, where it is.
    Merge {
        which: prop::sample::Index,
    },
}

fn step(pagers: bool) -> impl Strategy<Value = Step> {
    let pages = |most: u64| (0..PAGES, 1..most);
    let which = any::<prop::sample::Index>;
    let paged = any::<bool>().prop_map(move |paged| paged && pagers);
    prop_oneof![
        6 => (pages(20), prop_oneof![Just(0u8), 1u8..5])
            .prop_map(|((page, len), byte)| Step::Write { page, len, byte }),
        2 => pages(40).prop_map(|(page, len)| Step::Discard { page, len }),
        1 => Just(Step::Freeze),
        3 => any::<bool>().prop_map(|diff| Step::Save { diff }),
        1 => which().prop_map(|which| Step::SaveOver { which }),
        2 => (which(), paged).prop_map(|(which, paged)| Step::Restore { which, paged }),
        1 => which().prop_map(|which| Step::Merge { which }),
    ]
}

/// A byte for each page; nothing where a guest may find one thing or another.
type Model = [Option<u8>; PAGES as usize];

/// What RAM is made of.
#[derive(Clone, Copy)]
struct Kind {
    huge_pages: bool,
    /// The first one lies in a file of its own.
    forkable: bool,
    /// Bytes from one page of the model to the next.
    apart: u64,
}

const SMALL: Kind = Kind { huge_pages: false, forkable: false, apart: PAGE_SIZE };
const FORKABLE: Kind = Kind { forkable: true, ..SMALL };
/// Four of them, in each of which some pages are looked at.
const HUGE: Kind = Kind { huge_pages: true, forkable: false, apart: 128 << 10 };
const HUGE_PAGE: u64 = 2 << 20;

impl Kind {
    fn size(self) -> u64 {
        (self.apart * PAGES).max(1 << 20)
    }

    fn ram(self) -> GuestRam {
        GuestRam::new(self.size(), self.huge_pages).unwrap()
    }

    fn at(self, page: u64) -> GuestAddress {
        GuestAddress(page * self.apart)
    }

    fn byte(self, ram: &GuestRam, page: u64) -> u8 {
        let mut bytes = [0; PAGE_SIZE as usize];
        ram.memory().guest().read_slice(&mut bytes, self.at(page)).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
        bytes[0]
    }

    fn compare(self, ram: &GuestRam, model: &Model, what: &str) {
        for (page, byte) in (0..).zip(model) {
            if let Some(byte) = byte {
                assert_eq!(self.byte(ram, page), *byte, "page {page} of {what}");
            }
        }
    }

    /// RAM of a machine that goes on from this snapshot.
    fn loaded(self, files: &Files) -> (GuestRam, Origin) {
        let mut ram = self.ram();
        let origin = load(files, None).unwrap();
        restore_memory(&origin, &mut ram).unwrap();
        (ram, origin)
    }
}

struct Run<'a> {
    kind: Kind,
    folder: &'a Path,
    ram: GuestRam,
    now: Model,
    /// What a page is when it is given back.
    below: Model,
    /// What the pager has.
    paged: Option<Model>,
    /// What was saved, as it was and as it should be read.
    saved: Vec<(Files, Model)>,
    base: Option<Base>,
    folders: u32,
}

impl<'a> Run<'a> {
    fn new(kind: Kind, folder: &'a Path) -> Run<'a> {
        let zeroes = [Some(0); PAGES as usize];
        Run {
            kind,
            folder,
            ram: if kind.forkable { GuestRam::forkable(kind.size()).unwrap() } else { kind.ram() },
            now: zeroes,
            below: zeroes,
            paged: None,
            saved: Vec::new(),
            base: None,
            folders: 0,
        }
    }

    fn freeze(&mut self) {
        self.ram.image().freeze().unwrap();
        // Huge pages stay where they are.
        if !self.kind.huge_pages {
            self.below = self.now;
        }
    }

    fn save(&mut self, diff: bool, files: Files) {
        let image = self.ram.image();
        if !diff {
            image.populate().unwrap();
            self.paged = None;
        }
        self.freeze();
        let partial = image.is_lazy();
        let base = self.base.take().filter(|_| diff);
        if let (None, Some(paged)) = (&base, &self.paged) {
            // What changed is nothing without what the pager has.
            let file = File::create(&files.memory).unwrap();
            file.set_len(self.kind.size()).unwrap();
            for (page, byte) in (0..).zip(paged) {
                let bytes = [byte.unwrap(); PAGE_SIZE as usize];
                file.write_all_at(&bytes, self.kind.at(page).0).unwrap();
            }
        }
        let diff = (diff && (partial || base.is_some())).then(|| Diff {
            pages: image.changed(),
            base,
            partial,
        });
        let contents = image.contents();
        let taken = Taken {
            id: None,
            created_ms: now_ms(),
            host: None,
            parts: Vec::new(),
            config: VmConfig::default(),
            disks: Vec::new(),
            contents,
            diff,
        };
        let header = store(taken, &files, &|_, _| {}).unwrap();
        image.saved();
        self.base = Some(Base {
            id: header.memory.id,
            state: files.state.clone(),
            memory: files.memory.clone(),
        });
        // A snapshot that was written over takes those with it that stand on it.
        self.saved.retain(|(other, _)| *other != files);
        self.saved.push((files, self.now));
        let standing: Vec<bool> =
            self.saved.iter().map(|(files, _)| load(files, None).is_ok()).collect();
        let mut standing = standing.into_iter();
        self.saved.retain(|_| standing.next().unwrap());
        assert!(self.saved.iter().any(|(_, model)| *model == self.now), "the last one is gone");
    }

    fn restore(&mut self, files: &Files, mut model: Model, paged: bool) {
        let (ram, origin) = self.kind.loaded(files);
        self.base = origin.base;
        if !paged {
            self.ram = ram;
            self.paged = None;
            self.now = model;
            let zeroes = [Some(0); PAGES as usize];
            self.below = if self.kind.huge_pages { zeroes } else { model };
            return;
        }
        for (page, byte) in (0..).zip(&mut model) {
            byte.get_or_insert_with(|| self.kind.byte(&ram, page));
        }
        drop(ram);
        let socket = self.folder.join("pager");
        pager::start(&socket, self.kind, model.map(Option::unwrap));
        let origin = load_paged(&files.state, socket.clone()).unwrap();
        self.ram = self.kind.ram();
        restore_memory(&origin, &mut self.ram).unwrap();
        std::fs::remove_file(socket).unwrap();
        (self.now, self.below, self.paged, self.base) = (model, model, Some(model), origin.base);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { page, len, byte } => {
                for page in page..PAGES.min(page + len) {
                    let bytes = [byte; PAGE_SIZE as usize];
                    self.ram.memory().guest().write_slice(&bytes, self.kind.at(page)).unwrap();
                    self.now[page as usize] = Some(byte);
                }
            }
            Step::Discard { page, len } => {
                let Kind { huge_pages, apart, .. } = self.kind;
                let end = PAGES.min(page + len);
                self.ram.discarder().discard(self.kind.at(page).0, len * apart);
                let unit = if huge_pages { HUGE_PAGE / apart } else { 1 };
                for page in page.next_multiple_of(unit)..end / unit * unit {
                    // Of a huge page that is not there anything may be saved that it ever was.
                    let below = self.below[page as usize];
                    self.now[page as usize] = if huge_pages { None } else { below };
                }
            }
            Step::Freeze => self.freeze(),
            Step::Save { diff } => {
                self.folders += 1;
                let folder = self.folder.join(self.folders.to_string());
                std::fs::create_dir(&folder).unwrap();
                self.save(diff, Files::within(&folder));
            }
            Step::SaveOver { which } if !self.saved.is_empty() => {
                let files = which.get(&self.saved).0.clone();
                // What changed is nothing without what the pager has.
                let is_base = self.base.as_ref().is_some_and(|base| base.state == files.state);
                self.save(is_base || self.paged.is_none(), files);
            }
            Step::Restore { which, paged } if !self.saved.is_empty() => {
                let (files, model) = which.get(&self.saved).clone();
                self.restore(&files, model, paged);
            }
            Step::Merge { which } if !self.saved.is_empty() => {
                let (files, _) = which.get(&self.saved).clone();
                merge(&files, None, &files, &|_, _| {}).unwrap();
            }
            Step::SaveOver { .. } | Step::Restore { .. } | Step::Merge { .. } => {}
        }
    }

    fn check(&self) {
        self.kind.compare(&self.ram, &self.now, "the machine");
        for (files, model) in &self.saved {
            let (ram, _) = self.kind.loaded(files);
            self.kind.compare(&ram, model, &format!("{files:?}"));
        }
    }
}

fn run(kind: Kind, steps: impl FnOnce(&mut Run)) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut run = Run::new(kind, folder.path());
    steps(&mut run);
    run.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn layers_are_what_was_written(steps in prop::collection::vec(step(false), 1..40)) {
        run(SMALL, |run| steps.into_iter().for_each(|step| run.step(step)));
    }

    #[test]
    fn what_a_pager_brings_is_too(steps in prop::collection::vec(step(true), 1..40)) {
        run(SMALL, |run| steps.into_iter().for_each(|step| run.step(step)));
    }

    #[test]
    fn huge_pages_are_too(steps in prop::collection::vec(step(true), 1..25)) {
        // A machine's, and those of one that is looked at or takes its place.
        let _pool = HugePages::new(8);
        run(HUGE, |run| steps.into_iter().for_each(|step| run.step(step)));
    }
}

/// What a page was where the machine was restored is not what its last snapshot has.
#[test]
fn a_diff_can_be_loaded_after_huge_pages_were_given_back() {
    let _pool = HugePages::new(8);
    run(HUGE, |run| {
        let all = |byte| Step::Write { page: 0, len: PAGES, byte };
        run.step(all(1));
        run.step(Step::Save { diff: false });
        let (files, model) = run.saved[0].clone();
        run.restore(&files, model, false);
        run.step(all(2));
        run.step(Step::Save { diff: false });
        run.step(Step::Discard { page: PAGES / 4, len: PAGES / 2 });
        run.step(Step::Save { diff: true });
        assert_eq!(run.saved.len(), 3);
    });
}

/// The guest lives on a pager: what did not change since the second diff is in what that stands on.
#[test]
fn a_diff_can_be_laid_over_a_diff() {
    run(SMALL, |run| {
        run.step(Step::Write { page: 0, len: 30, byte: 1 });
        run.step(Step::Save { diff: false });
        let (files, model) = run.saved[0].clone();
        run.restore(&files, model, true);
        for (page, len) in [(0, 10), (5, 10)] {
            run.step(Step::Write { page, len, byte: 2 });
            run.step(Step::Save { diff: true });
        }
        run.step(Step::Write { page: 6, len: 1, byte: 3 });
        let files = run.saved[2].0.clone();
        run.save(true, files);
    });
}
