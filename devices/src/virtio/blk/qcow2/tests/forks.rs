//! Images that others come to stand on while their machine goes on.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::virtio::blk::overlay::{Base, Frozen, MOST_LAYERS, OverlayError, Way, freeze};
use crate::virtio::blk::{Backing, DiskFile, OpenError};

fn image(disk: &Backing) -> &Qcow2 {
    disk.image().unwrap()
}

fn open(path: &Path, access: Access) -> Backing {
    Qcow2::open(path, access).unwrap().into()
}

fn forked(forked: u32) -> Access {
    Access { forked, ..WRITE }
}

/// Freezes a disk; nobody can write what others stand on.
fn frozen(disk: &Backing, fresh: &Path) -> Frozen {
    let frozen = freeze(disk, fresh).unwrap();
    for file in &frozen.base.files {
        assert_eq!(file.write_at(&[1], 0).unwrap_err().raw_os_error(), Some(libc::EBADF));
        // SAFETY: the call has no memory arguments.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
    }
    frozen
}

fn entries(folder: &Folder) -> Vec<PathBuf> {
    let mut all: Vec<_> =
        fs::read_dir(&folder.0).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn is_locked(path: &Path) {
    let opened = DiskFile::open_image(path, true, false);
    assert!(matches!(opened, Err(OpenError::Locked { .. })), "{opened:?}");
}

#[test]
fn parent_and_children_diverge() {
    for (version, bits) in [(2, 9), (2, 16), (3, 9), (3, 12), (3, 16), (3, 21)] {
        for direct in [false, true] {
            let folder = Folder::new();
            let builder = mixed(version, bits);
            builder.write(&folder.path("a"));
            let mut model = builder.disk();
            let access = Access { direct, ..WRITE };
            let mut parent = open(&folder.path("a"), access);
            try_write(image(&parent), 1024, &[0x77; 3000]).unwrap();
            model[1024..4024].fill(0x77);
            let frozen = frozen(&parent, &folder.path("p"));
            assert_eq!(frozen.base.path, folder.path("a").canonicalize().unwrap());
            let copy = |name: &str| frozen.base.copy(&folder.path(name), direct).unwrap();
            let children = [copy("b"), copy("c")];
            parent = frozen.disk.unwrap();
            let mut all: Vec<_> = [parent].into_iter().chain(children).collect();
            for (n, disk) in all.iter().enumerate() {
                assert!(whole(image(disk)) == model, "version {version}, 2^{bits}, {n}");
                try_write(image(disk), 512, &vec![n as u8 + 1; 2560 * (n + 1)]).unwrap();
            }
            for (n, disk) in all.iter().enumerate() {
                let mut model = model.clone();
                model[512..][..2560 * (n + 1)].fill(n as u8 + 1);
                assert!(whole(image(disk)) == model, "version {version}, 2^{bits}, {n}");
            }
            // And when they are opened by their names.
            let last = whole(image(&all[2]));
            all.clear();
            let refused = refused(&folder.path("c"), access);
            assert!(refused.contains("stands on \"a\""), "{refused}");
            let again = open(&folder.path("c"), Access { forked: 1, ..access });
            assert!(whole(image(&again)) == last);
            assert_eq!(describe(&folder.path("c")).unwrap().header.cluster_bits, 16);
        }
    }
}

#[test]
fn an_image_over_others_is_forked_with_them() {
    let folder = Folder::new();
    fs::write(folder.path("raw"), vec![0xb5; 700 * 512]).unwrap();
    let mut builder = Builder::new(3, 12, 1 << 20);
    builder.backing = Some(("raw".into(), Some("raw".into())));
    builder.write(&folder.path("a"));
    let access = Access { backing: true, ..WRITE };
    let parent = open(&folder.path("a"), access);
    try_write(image(&parent), 0, &[1; 512]).unwrap();
    let frozen = frozen(&parent, &folder.path("p"));
    assert_eq!((frozen.base.files.len(), frozen.base.way), (2, Way::Image { forked: 1 }));
    assert_eq!(Frozen::known_as(&parent), folder.path("raw"));
    // Whatever has their names by then.
    fs::rename(folder.path("raw"), folder.path("elsewhere")).unwrap();
    fs::write(folder.path("raw"), vec![0xee; 700 * 512]).unwrap();
    let child = frozen.base.copy(&folder.path("c"), false).unwrap();
    assert_eq!(read(image(&child), 0, 1024), [[1; 512], [0xb5; 512]].concat());
    let own = frozen.disk.as_ref().unwrap();
    assert_eq!(read(image(own), 699 * 512, 1024), [[0xb5; 512], [0; 512]].concat());
    drop((frozen, child, parent));
    // What the user's own image names is still for the user to allow.
    fs::rename(folder.path("elsewhere"), folder.path("raw")).unwrap();
    assert!(refused(&folder.path("c"), forked(1)).contains("\"raw\""));
    open(&folder.path("c"), Access { backing: true, ..forked(1) });
}

#[test]
fn a_fork_that_is_undone_leaves_all_as_it_was() {
    let folder = Folder::new();
    mixed(3, 12).write(&folder.path("a"));
    let parent = open(&folder.path("a"), WRITE);
    try_write(image(&parent), 0, &[9; 9000]).unwrap();
    let (before, disk) = (entries(&folder), whole(image(&parent)));
    is_locked(&folder.path("a"));
    let frozen = frozen(&parent, &folder.path("p"));
    DiskFile::open_image(&folder.path("a"), true, false).unwrap();
    let writer = DiskFile::open_image(&folder.path("a"), false, false);
    assert!(matches!(writer, Err(OpenError::Locked { .. })), "{writer:?}");
    drop(frozen.base.copy(&folder.path("c"), false).unwrap());
    fs::remove_file(folder.path("c")).unwrap();
    let again = freeze(&parent, &folder.path("p"));
    assert!(matches!(again, Err(OverlayError::Exists(_))), "{again:?}");
    frozen.undo();
    assert_eq!(entries(&folder), before);
    is_locked(&folder.path("a"));
    let nowhere = freeze(&parent, &folder.path("nowhere/p"));
    assert!(matches!(nowhere, Err(OverlayError::File { .. })), "{nowhere:?}");
    is_locked(&folder.path("a"));
    // It goes on.
    assert!(whole(image(&parent)) == disk);
    try_write(image(&parent), 0, &[8; 9000]).unwrap();
    drop(parent);
    let found = whole(image(&open(&folder.path("a"), WRITE)));
    assert!(found[..9000] == [8; 9000] && found[9000..] == disk[9000..]);
}

#[test]
fn nobody_writes_to_what_others_stand_on() {
    let folder = Folder::new();
    mixed(3, 12).write(&folder.path("a"));
    let parent = open(&folder.path("a"), WRITE);
    let before = fs::read(folder.path("a")).unwrap();
    let frozen = frozen(&parent, &folder.path("p"));
    let child = frozen.base.copy(&folder.path("c"), false).unwrap();
    try_write(image(&child), 0, &[1; 40_000]).unwrap();
    drop(parent);
    // Also when the machine that had it is gone.
    drop(frozen);
    let writer = || DiskFile::open_image(&folder.path("a"), false, false);
    assert!(matches!(writer(), Err(OpenError::Locked { .. })));
    drop(child);
    writer().unwrap();
    assert!(fs::read(folder.path("a")).unwrap() == before);
}

#[test]
fn what_nobody_wrote_to_since_is_shared_as_it_is() {
    let folder = Folder::new();
    mixed(3, 12).write(&folder.path("a"));
    let parent = frozen(&open(&folder.path("a"), WRITE), &folder.path("p")).disk.unwrap();
    let before = entries(&folder);
    let frozen = self::frozen(&parent, &folder.path("p2"));
    assert!(frozen.disk.is_none());
    assert_eq!(frozen.base.path, folder.path("a").canonicalize().unwrap());
    assert_eq!((frozen.base.files.len(), frozen.base.way), (1, Way::Image { forked: 1 }));
    frozen.undo();
    assert_eq!(entries(&folder), before);
    // Also in another life of the machine; and not once a sector was written, or taken away.
    drop(parent);
    for n in 0..2 {
        let parent = open(&folder.path("p"), forked(1));
        assert!(freeze(&parent, &folder.path("p2")).unwrap().disk.is_none());
        match n {
            0 => {
                let range = ByteRange { offset: 0, len: 512, zero: true, unmap: false };
                image(&parent).range(range, false).unwrap();
            }
            _ => try_write(image(&parent), 0, &[1; 512]).unwrap(),
        }
        let frozen = self::frozen(&parent, &folder.path("p2"));
        assert_eq!(frozen.base.way, Way::Image { forked: 2 });
        frozen.undo();
        drop(parent);
        assert!(
            freeze(&open(&folder.path("p"), forked(1)), &folder.path("p2")).unwrap().disk.is_some()
        );
        fs::remove_file(folder.path("p2")).unwrap();
        drop(self::frozen(&open(&folder.path("a"), WRITE), &folder.path("p3")));
        fs::remove_file(folder.path("p")).unwrap();
        fs::rename(folder.path("p3"), folder.path("p")).unwrap();
    }
}

/// What was flushed is in the files, whenever a machine is killed.
#[test]
fn a_kill_loses_nothing_that_was_flushed() {
    let folder = Folder::new();
    mixed(3, 12).write(&folder.path("a"));
    let parent = open(&folder.path("a"), WRITE);
    try_write(image(&parent), 0, &[5; 9000]).unwrap();
    let frozen = frozen(&parent, &folder.path("p"));
    let child = frozen.base.copy(&folder.path("c"), false).unwrap();
    let left = |flushed: &[(&str, u8)]| {
        let copies = Folder::new();
        for path in entries(&folder) {
            fs::copy(&path, copies.path(path.file_name().unwrap().to_str().unwrap())).unwrap();
        }
        for (name, byte) in flushed {
            let disk = open(&copies.path(name), forked(1));
            assert!(read(image(&disk), 0, 9000) == vec![*byte; 9000], "{name}");
        }
    };
    left(&[("a", 5), ("p", 5), ("c", 5)]);
    let own = frozen.disk.as_ref().unwrap();
    for (byte, disk) in [(6, own), (7, &child)] {
        try_write(image(disk), 0, &[byte; 9000]).unwrap();
        image(disk).save().unwrap();
        try_write(image(disk), 20_000, &[byte; 9000]).unwrap();
    }
    left(&[("a", 5), ("p", 6), ("c", 7)]);
}

#[test]
fn the_name_of_a_new_image_is_on_the_disk_before_anything_counts() {
    let folder = Folder::new();
    mixed(3, 12).write(&folder.path("a"));
    let parent = open(&folder.path("a"), WRITE);
    let frozen = frozen(&parent, &folder.path("p"));
    let uses: [fn(&Qcow2); 3] = [
        |image| image.save().unwrap(),
        |image| image.close().unwrap(),
        |image| assert_eq!(image.write(&[iov(&[1; 512])], 0, true).unwrap(), 512),
    ];
    for (n, counts) in uses.into_iter().enumerate() {
        let child = frozen.base.copy(&folder.path(&format!("c{n}")), false).unwrap();
        assert!(image(&child).file.is_new());
        counts(image(&child));
        assert!(!image(&child).file.is_new());
    }
}

#[test]
fn a_chain_of_forks_does_not_grow_without_end() {
    let folder = Folder::new();
    let mut builder = Builder::new(3, 16, 64 << 16);
    builder = builder.with(5, Content::Data(vec![0xa5; 1 << 16]));
    builder.write(&folder.path("a"));
    let mut model = vec![0_u8; 64];
    model[5] = 0xa5;
    let mut parent = open(&folder.path("a"), WRITE);
    let mut longest = 0;
    for n in 0..60_u32 {
        let cluster = (n * 7) % 64;
        match n % 5 {
            4 => {
                let range = ByteRange {
                    offset: u64::from(cluster) << 16,
                    len: 1 << 16,
                    zero: true,
                    unmap: n % 2 == 0,
                };
                image(&parent).range(range, false).unwrap();
                model[cluster as usize] = 0;
            }
            _ => {
                let bytes = vec![n as u8 + 1; 1 << 16];
                try_write(image(&parent), u64::from(cluster) << 16, &bytes).unwrap();
                model[cluster as usize] = n as u8 + 1;
            }
        }
        if n == 40 {
            // One that is undone takes the file away that was made on the way.
            let before = entries(&folder);
            frozen(&parent, &folder.path("undone")).undo();
            assert_eq!(entries(&folder), before);
            is_locked(image(&parent).disk().path());
        }
        let frozen = frozen(&parent, &folder.path(&format!("p{n}")));
        longest = longest.max(frozen.base.files.len());
        let Way::Image { forked: deep } = frozen.base.way else { panic!("{frozen:?}") };
        assert_eq!(deep as usize, frozen.base.files.len());
        parent = frozen.disk.unwrap();
        let found: Vec<u8> = whole(image(&parent)).chunks(1 << 16).map(|bytes| bytes[70]).collect();
        assert_eq!(found, model, "{n}");
        if n % 10 == 9 {
            // By their names as well.
            let path = image(&parent).disk().path().to_owned();
            drop(parent);
            parent = open(&path, forked(deep));
            assert_eq!(image(&parent).below.len(), deep as usize);
        }
    }
    assert_eq!(longest, MOST_LAYERS - 1);
    assert!(entries(&folder).iter().any(|path| path.extension().is_some_and(|end| end == "base")));
}

/// Nothing that is handed over makes more of this process than an error, and no name is followed.
#[test]
fn hostile_files_are_refused() {
    let folder = Folder::new();
    let build = |name: &str, backing: Option<(&str, &str)>| {
        let mut builder = mixed(3, 12);
        builder.backing = backing.map(|(name, format)| (name.into(), Some(format.into())));
        builder.write(&folder.path(name));
        Arc::new(File::open(folder.path(name)).unwrap())
    };
    let whole = build("whole", None);
    let over = build("over", Some(("whole", "qcow2")));
    let strange = build("strange", Some(("nbd://host/x", "raw")));
    let unnamed = build("unnamed", Some(("whole", "vmdk")));
    fs::write(folder.path("text"), "no image").unwrap();
    fs::write(folder.path("nothing"), "").unwrap();
    let text = Arc::new(File::open(folder.path("text")).unwrap());
    let nothing = Arc::new(File::open(folder.path("nothing")).unwrap());
    let null = Arc::new(File::open("/dev/null").unwrap());
    let directory = Arc::new(File::open(&folder.0).unwrap());
    let (pipe, _end) = io::pipe().unwrap();
    let pipe = Arc::new(File::from(std::os::fd::OwnedFd::from(pipe)));
    let before = entries(&folder);
    let copy = |files: &[&Arc<File>], forked| {
        let files = files.iter().map(|file| Arc::clone(file)).collect();
        let path = folder.path("whole");
        let base = Base { path, files, unsynced: false, way: Way::Image { forked } };
        base.copy(&folder.path("c"), false)
    };
    let deep: Vec<_> = std::iter::repeat_n(&over, 80).collect();
    let cases: [(&[&Arc<File>], &str); 11] = [
        (&[], "no file"),
        (&[&text], "magic"),
        (&[&nothing], "magic"),
        (&[&null], "regular file"),
        (&[&directory], "regular file"),
        (&[&pipe], "regular file"),
        (&[&over], "too few files"),
        (&[&text, &over], "magic"),
        (&[&whole, &strange], "not the name of a file"),
        (&[&whole, &unnamed], "vmdk"),
        (&deep, "others up"),
    ];
    for (files, words) in cases {
        for forked in [0, 1, u32::MAX] {
            let refused = copy(files, forked).unwrap_err().to_string();
            assert!(refused.contains(words), "{words}: {refused}");
        }
    }
    assert_eq!(entries(&folder), before);
    // More than there are names, and one that says too much of itself.
    for files in [&[&text, &whole, &over][..], &[&whole]] {
        let disk = copy(files, u32::MAX).unwrap();
        assert!(image(&disk).forked as usize <= image(&disk).below.len());
        drop(disk);
        fs::remove_file(folder.path("c")).unwrap();
    }
}

#[test]
fn what_an_image_cannot_name_is_said() {
    let folder = Folder::new();
    let long = "l".repeat(200);
    let mut deep = folder.0.path().to_owned();
    for _ in 0..6 {
        deep.push(&long);
    }
    fs::create_dir_all(&deep).unwrap();
    let odd = std::os::unix::ffi::OsStrExt::from_bytes(b"odd\xff".as_slice());
    for (path, words) in [
        (deep.join("a"), "longer than"),
        (folder.0.path().join(Path::new::<std::ffi::OsStr>(odd)), "UTF-8"),
    ] {
        mixed(3, 12).write(&path);
        let parent = open(&path, WRITE);
        let before = entries(&folder);
        let refused = freeze(&parent, &folder.path("p")).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
        assert_eq!(entries(&folder), before);
        is_locked(&path);
    }
    // What QEMU would take for something else than a file.
    mixed(3, 12).write(&folder.path("nbd:a"));
    let parent = open(&folder.path("nbd:a"), WRITE);
    drop(frozen(&parent, &folder.path("p")));
    drop(parent);
    let name = describe(&folder.path("p")).unwrap().header.backing.unwrap().name;
    assert_eq!(name, "./nbd:a");
    open(&folder.path("p"), forked(1));
}

/// Of disks of all sizes; none is larger than it can be filled.
#[test]
fn an_empty_image_is_in_order() {
    let folder = Folder::new();
    let base = folder.path("base");
    for size in [512, 1 << 16, (1 << 29) + 512, 1 << 40, 14 << 40, 1 << 45, 1 << 48] {
        let path = folder.path("made");
        drop(make::make(&path, &base, size).unwrap());
        let described = describe(&path).unwrap();
        let found = described.found.unwrap();
        assert_eq!((described.header.size, found.data, found.zeroes), (size, 0, 0));
        assert_eq!(described.header.cluster_bits > 16, size > 14 << 40, "{size}");
        let file = ImageFile::new(DiskFile::open_image(&path, false, false).unwrap());
        file.set_limit(open::longest(file.len(), size));
        let found = check::repair(&file, &described.header).unwrap();
        assert_eq!(found.raised, 0);
        drop(file);
        fs::remove_file(path).unwrap();
    }
    let refused = make::make(&folder.path("made"), &base, 1 << 62).unwrap_err();
    assert!(matches!(refused, OverlayError::File { .. }), "{refused}");
    assert!(entries(&folder).is_empty());
}

/// What a machine of a family does.
#[derive(Clone, Debug)]
enum Deed {
    Write { sector: u64, sectors: u64, byte: u8 },
    Range { sector: u64, sectors: u64, zero: bool, unmap: bool },
    Flush,
    Fork,
    Undo,
    Kill,
    Reopen,
    End,
}

/// Sectors of its disk.
const FEW: u64 = 640;

fn deed() -> impl Strategy<Value = Deed> {
    let span = || (0..FEW, 1..=200_u64).prop_map(|(sector, len)| (sector, len.min(FEW - sector)));
    prop_oneof![
        8 => (span(), 1..=255_u8)
            .prop_map(|((sector, sectors), byte)| Deed::Write { sector, sectors, byte }),
        3 => (span(), any::<bool>(), any::<bool>()).prop_map(|((sector, sectors), zero, unmap)| {
            Deed::Range { sector, sectors, zero, unmap: unmap || !zero }
        }),
        2 => Just(Deed::Flush),
        5 => Just(Deed::Fork),
        1 => Just(Deed::Undo),
        2 => Just(Deed::Kill),
        1 => Just(Deed::Reopen),
        1 => Just(Deed::End),
    ]
}

/// A machine's disk, what is on it, and how many images of forks are below.
struct Member {
    disk: Backing,
    model: Model,
    forked: u32,
}

impl Member {
    fn path(&self) -> PathBuf {
        image(&self.disk).disk().path().to_owned()
    }

    fn check(&self) {
        assert!(sectors(&whole(image(&self.disk))) == self.model.now, "{}", self.path().display());
    }

    fn act(&mut self, deed: &Deed) {
        match *deed {
            Deed::Write { sector, sectors, byte } => {
                let bytes = vec![byte; sectors as usize * 512];
                try_write(image(&self.disk), sector * 512, &bytes).unwrap();
                (sector..sector + sectors).for_each(|sector| self.model.set(sector, byte));
            }
            Deed::Range { sector, sectors: count, zero, unmap } => {
                let range = ByteRange { offset: sector * 512, len: count * 512, zero, unmap };
                image(&self.disk).range(range, false).unwrap();
                let found = sectors(&read(image(&self.disk), range.offset, range.len as usize));
                for (sector, byte) in (sector..).zip(found) {
                    let stays = !zero && byte == self.model.now[sector as usize];
                    assert!(byte == 0 || stays, "{deed:?} {sector}");
                    self.model.set(sector, byte);
                }
            }
            _ => {
                image(&self.disk).save().unwrap();
                self.model.saved();
            }
        }
    }

    fn fork(&mut self, folder: &Folder, number: usize) -> Member {
        let frozen = frozen(&self.disk, &folder.path(&format!("p{number}")));
        self.model.saved();
        assert!(frozen.base.files.len() <= MOST_LAYERS, "{} files", frozen.base.files.len());
        let Way::Image { forked } = frozen.base.way else { panic!("{frozen:?}") };
        let disk = frozen.base.copy(&folder.path(&format!("c{number}")), false).unwrap();
        if let Some(disk) = frozen.disk {
            (self.disk, self.forked) = (disk, forked);
        }
        let may = vec![Vec::new(); FEW as usize];
        Member { disk, model: Model { now: self.model.now.clone(), may }, forked }
    }

    /// Goes on as a machine that finds its file as it is now, by its name, in the place of this one.
    fn killed(self, folder: &Folder, number: usize) -> Member {
        let Member { disk, mut model, forked } = self;
        let path = folder.path(&format!("k{number}"));
        fs::copy(image(&disk).disk().path(), &path).unwrap();
        drop(disk);
        let disk = open(&path, Access { forked, ..WRITE });
        for (sector, byte) in sectors(&whole(image(&disk))).into_iter().enumerate() {
            let may = byte == model.now[sector] || model.may[sector].contains(&byte);
            assert!(may, "sector {sector} of {} has {byte:#x}", path.display());
            model.now[sector] = byte;
        }
        model.saved();
        Member { disk, model, forked }
    }
}

fn a_family_follows_its_model(version: u32, bits: u32, direct: bool, deeds: &[(u8, Deed)]) {
    let folder = Folder::new();
    let mut builder = Builder::new(version, bits, FEW * 512);
    let mut now = vec![0; FEW as usize];
    for index in (0..builder.size >> bits).step_by(3).take(40) {
        builder.clusters.insert(index, Content::Compressed(vec![0xc3; builder.cluster()]));
        let per_cluster = builder.cluster() / 512;
        now[index as usize * per_cluster..][..per_cluster].fill(0xc3);
    }
    builder.write(&folder.path("a"));
    let model = Model { now, may: vec![Vec::new(); FEW as usize] };
    let disk = open(&folder.path("a"), Access { direct, ..WRITE });
    let mut family = vec![Member { disk, model, forked: 0 }];
    for (number, (who, deed)) in deeds.iter().enumerate() {
        let who = *who as usize % family.len();
        match deed {
            Deed::Fork => {
                let child = family[who].fork(&folder, number);
                family.push(child);
            }
            Deed::Undo => {
                let (before, member) = (entries(&folder), &mut family[who]);
                frozen(&member.disk, &folder.path("undone")).undo();
                member.model.saved();
                assert_eq!(entries(&folder), before);
                is_locked(&member.path());
            }
            Deed::Kill => {
                let killed = family.swap_remove(who).killed(&folder, number);
                family.push(killed);
            }
            Deed::Reopen => {
                let Member { disk, mut model, forked } = family.swap_remove(who);
                let path = image(&disk).disk().path().to_owned();
                drop(disk);
                model.saved();
                assert!(!is_dirty(&path));
                let disk = open(&path, Access { forked, ..WRITE });
                family.push(Member { disk, model, forked });
            }
            Deed::End if family.len() > 1 => drop(family.swap_remove(who)),
            deed => family[who].act(deed),
        }
        if number % 8 == 0 {
            family.iter().for_each(Member::check);
        }
    }
    for member in family {
        member.check();
        let path = member.path();
        drop(member);
        describe(&path).unwrap().found.unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_tree_of_forks_is_as_plain_bytes(
        version in 2..=3_u32,
        bits in prop_oneof![Just(9_u32), Just(12), Just(16)],
        direct in prop::bool::weighted(0.2),
        deeds in prop::collection::vec((any::<u8>(), deed()), 1..60),
    ) {
        a_family_follows_its_model(version, bits, direct, &deeds);
    }
}
