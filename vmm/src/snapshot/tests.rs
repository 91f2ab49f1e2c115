//! Layers against a plain array: whatever is written, frozen, given back, saved, merged and gone on from,
//! memory is what it should be.

use std::path::Path;

use devices::virtio::balloon::Discard;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::Source;
use crate::memory::{GuestRam, Layer, PAGE_SIZE};

const PAGES: u64 = 64;
const RAM: u64 = 1 << 20;

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
    /// Goes on from a snapshot.
    Restore {
        which: prop::sample::Index,
    },
    /// Makes a diff whole, where it is.
    Merge {
        which: prop::sample::Index,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || (0..PAGES, 1u64..20);
    let which = any::<prop::sample::Index>;
    prop_oneof![
        6 => (pages(), prop_oneof![Just(0u8), 1u8..5])
            .prop_map(|((page, len), byte)| Step::Write { page, len, byte }),
        2 => pages().prop_map(|(page, len)| Step::Discard { page, len }),
        1 => Just(Step::Freeze),
        3 => any::<bool>().prop_map(|diff| Step::Save { diff }),
        1 => which().prop_map(|which| Step::SaveOver { which }),
        2 => which().prop_map(|which| Step::Restore { which }),
        1 => which().prop_map(|which| Step::Merge { which }),
    ]
}

/// A byte for each page.
type Model = [u8; PAGES as usize];

struct Run<'a> {
    folder: &'a Path,
    ram: GuestRam,
    now: Model,
    /// What a page is when it is given back.
    below: Model,
    /// What was saved, as it was and as it should be read.
    saved: Vec<(Files, Model)>,
    base: Option<Base>,
    folders: u32,
}

fn layers(files: &Files) -> Vec<Layer> {
    match load(files, None).unwrap().memory {
        Source::Layers(layers) => layers,
        Source::Pager(_) => panic!("there is none"),
    }
}

fn ram() -> GuestRam {
    GuestRam::new(RAM, false).unwrap()
}

impl Run<'_> {
    fn freeze(&mut self) {
        self.ram.image().freeze().unwrap();
        self.below = self.now;
    }

    fn save(&mut self, diff: bool, files: Files) {
        self.freeze();
        let image = self.ram.image();
        let base = self.base.take().filter(|_| diff);
        let diff =
            base.map(|base| Diff { pages: image.changed(), base: Some(base), partial: false });
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

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { page, len, byte } => {
                for page in page..PAGES.min(page + len) {
                    let bytes = [byte; PAGE_SIZE as usize];
                    let at = GuestAddress(page * PAGE_SIZE);
                    self.ram.memory().guest().write_slice(&bytes, at).unwrap();
                    self.now[page as usize] = byte;
                }
            }
            Step::Discard { page, len } => {
                self.ram.discarder().discard(page * PAGE_SIZE, len * PAGE_SIZE);
                for page in page..PAGES.min(page + len) {
                    self.now[page as usize] = self.below[page as usize];
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
                self.save(true, files);
            }
            Step::Restore { which } if !self.saved.is_empty() => {
                let (files, model) = which.get(&self.saved);
                let origin = load(files, None).unwrap();
                (self.now, self.below) = (*model, *model);
                self.ram = ram();
                self.ram.map_layers(layers(files)).unwrap();
                self.base = origin.base;
            }
            Step::Merge { which } if !self.saved.is_empty() => {
                let (files, _) = which.get(&self.saved).clone();
                merge(&files, None, &files, &|_, _| {}).unwrap();
            }
            Step::SaveOver { .. } | Step::Restore { .. } | Step::Merge { .. } => {}
        }
    }

    fn check(&self) {
        let page = |ram: &GuestRam, page: usize| -> u8 {
            let mut bytes = [0; PAGE_SIZE as usize];
            let at = GuestAddress(page as u64 * PAGE_SIZE);
            ram.memory().guest().read_slice(&mut bytes, at).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
            bytes[0]
        };
        for (n, byte) in self.now.iter().enumerate() {
            assert_eq!(page(&self.ram, n), *byte, "page {n}");
        }
        for (files, model) in &self.saved {
            let mut ram = ram();
            ram.map_layers(layers(files)).unwrap();
            for (n, byte) in model.iter().enumerate() {
                assert_eq!(page(&ram, n), *byte, "page {n} of {files:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn layers_are_what_was_written(steps in prop::collection::vec(step(), 1..40)) {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let (now, below) = ([0; PAGES as usize], [0; PAGES as usize]);
        let (folder, saved) = (folder.path(), Vec::new());
        let mut run = Run { folder, ram: ram(), now, below, saved, base: None, folders: 0 };
        for step in steps {
            run.step(step);
        }
        run.check();
    }
}
