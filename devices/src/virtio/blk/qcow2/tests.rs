//! Images that are built here byte by byte, read and written, killed and corrupted.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::DeflateEncoder;
use libc::iovec;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

const WRITE: Access = Access { read_only: false, direct: false, backing: false, forked: 0 };
const READ: Access = Access { read_only: true, ..WRITE };

/// What a cluster of the disk has.
#[derive(Clone, Debug)]
enum Content {
    Data(Vec<u8>),
    Compressed(Vec<u8>),
    Zero,
}

/// What an image is built from. Nothing of imago is used for that.
#[derive(Clone, Debug)]
struct Builder {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    clusters: BTreeMap<u64, Content>,
    backing: Option<(String, Option<String>)>,
    extensions: Vec<(u32, Vec<u8>)>,
    encryption: u32,
    snapshots: u32,
    incompatible: u64,
}

impl Builder {
    fn new(version: u32, cluster_bits: u32, size: u64) -> Builder {
        Builder {
            version,
            cluster_bits,
            refcount_order: 4,
            size,
            clusters: BTreeMap::new(),
            backing: None,
            extensions: Vec::new(),
            encryption: 0,
            snapshots: 0,
            incompatible: 0,
        }
    }

    fn cluster(&self) -> usize {
        1 << self.cluster_bits
    }

    fn filled(&self, byte: u8) -> Vec<u8> {
        (0..self.cluster()).map(|at| byte ^ (at >> 7) as u8).collect()
    }

    fn with(mut self, index: u64, content: Content) -> Builder {
        self.clusters.insert(index, content);
        self
    }

    /// The image: header, refcount table, one refcount block, L1 table, then L2 tables and data.
    fn build(&self) -> Vec<u8> {
        let cluster = self.cluster();
        let per_l2 = cluster as u64 / 8;
        let l1_entries = self.size.div_ceil(per_l2 * cluster as u64);
        let l1_clusters = (l1_entries as usize * 8).div_ceil(cluster);
        let bits = 1 << self.refcount_order;
        let blocks = 8;
        let first = 2 + blocks + l1_clusters;
        let mut image = vec![0; first * cluster];
        let put = |image: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            image[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let mut l1 = vec![0_u64; l1_entries as usize];
        let mut shared = BTreeMap::new();
        for (&index, content) in &self.clusters {
            let slot = (index / per_l2) as usize;
            if l1[slot] == 0 {
                let table = image.len();
                l1[slot] = table as u64 | 1 << 63;
                image.resize(table + cluster, 0);
            }
            let table = (l1[slot] & !(1 << 63)) as usize;
            let at = image.len();
            let entry = match content {
                Content::Zero => 1,
                Content::Data(data) => {
                    image.extend(data);
                    at as u64 | 1 << 63
                }
                Content::Compressed(data) => {
                    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::best());
                    deflated.write_all(data).unwrap();
                    let deflated = deflated.finish().unwrap();
                    // Not at the start of a sector.
                    let offset = at + 7;
                    image.resize(offset, 0);
                    image.extend(&deflated);
                    image.resize(image.len().next_multiple_of(cluster), 0);
                    let sectors = (offset % 512 + deflated.len()).div_ceil(512) - 1;
                    for cluster in at / cluster..image.len() / cluster {
                        shared.insert(cluster, 1);
                    }
                    offset as u64 | (sectors as u64) << (62 - (self.cluster_bits - 8)) | 1 << 62
                }
            };
            put(&mut image, table + (index % per_l2) as usize * 8, &entry.to_be_bytes());
        }
        for (slot, entry) in l1.iter().enumerate() {
            put(&mut image, (2 + blocks) * cluster + slot * 8, &entry.to_be_bytes());
        }
        let used = image.len() / cluster;
        let per_block = cluster * 8 / bits;
        assert!(used <= per_block * blocks, "the image is too large to be built");
        for block in 0..blocks {
            let at = ((2 + block) * cluster) as u64;
            put(&mut image, cluster + block * 8, &at.to_be_bytes());
        }
        for index in 0..used {
            set_refcount(&mut image[2 * cluster..], index, bits);
        }
        let header = self.header(cluster, l1_entries as u32, blocks);
        put(&mut image, 0, &header);
        image
    }

    fn header(&self, cluster: usize, l1_entries: u32, blocks: usize) -> Vec<u8> {
        let mut header = Vec::new();
        let extensions: usize =
            self.extensions().iter().map(|(_, data)| 8 + data.len().next_multiple_of(8)).sum();
        let start = if self.version == 2 { 72 } else { 104 };
        let name = self.backing.as_ref().map_or("", |(name, _)| name);
        header.extend(MAGIC);
        header.extend(self.version.to_be_bytes());
        let offset = if name.is_empty() { 0 } else { start + extensions + 8 };
        header.extend((offset as u64).to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.extend(self.cluster_bits.to_be_bytes());
        header.extend(self.size.to_be_bytes());
        header.extend(self.encryption.to_be_bytes());
        header.extend(l1_entries.to_be_bytes());
        header.extend(((2 + blocks) as u64 * cluster as u64).to_be_bytes());
        header.extend((cluster as u64).to_be_bytes());
        header.extend(1_u32.to_be_bytes());
        header.extend(self.snapshots.to_be_bytes());
        header.extend(0_u64.to_be_bytes());
        if self.version > 2 {
            header.extend(self.incompatible.to_be_bytes());
            header.extend([0; 16]);
            header.extend(self.refcount_order.to_be_bytes());
            header.extend(104_u32.to_be_bytes());
        }
        for (kind, data) in self.extensions() {
            header.extend(kind.to_be_bytes());
            header.extend((data.len() as u32).to_be_bytes());
            header.extend(&data);
            header.resize(header.len().next_multiple_of(8), 0);
        }
        header.extend([0; 8]);
        header.extend(name.as_bytes());
        header
    }

    fn extensions(&self) -> Vec<(u32, Vec<u8>)> {
        let format = self.backing.as_ref().and_then(|(_, format)| format.clone());
        let format = format.map(|format| (0xe279_2aca, format.into_bytes()));
        self.extensions.iter().cloned().chain(format).collect()
    }

    /// The disk without what is below.
    fn disk(&self) -> Vec<u8> {
        let mut disk = vec![0; self.size as usize];
        for (index, content) in &self.clusters {
            let at = *index as usize * self.cluster();
            let end = (at + self.cluster()).min(disk.len());
            if let Content::Data(data) | Content::Compressed(data) = content {
                disk[at..end].copy_from_slice(&data[..end - at]);
            }
        }
        disk
    }

    fn write(&self, path: &Path) {
        fs::write(path, self.build()).unwrap();
    }
}

fn set_refcount(blocks: &mut [u8], index: usize, bits: usize) {
    match bits {
        8.. => blocks[(index + 1) * bits / 8 - 1] = 1,
        _ => blocks[index * bits / 8] |= 1 << (index * bits % 8),
    }
}

/// A bit of everything.
fn mixed(version: u32, cluster_bits: u32) -> Builder {
    let size = 20 << cluster_bits;
    let builder = Builder::new(version, cluster_bits, size - 512);
    let (a, b, c) = (builder.filled(1), builder.filled(2), builder.filled(3));
    let builder = builder
        .with(0, Content::Data(a.clone()))
        .with(1, Content::Data(b))
        .with(3, Content::Compressed(c))
        .with(4, Content::Compressed(a.clone()))
        .with(19, Content::Data(a));
    if version == 2 { builder } else { builder.with(6, Content::Zero) }
}

/// An image in which nothing was written.
pub(in super::super) fn empty(size: u64) -> Vec<u8> {
    Builder::new(3, 12, size).build()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

fn iov(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn try_read(image: &Qcow2, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let bytes = vec![0xee; len];
    // Buffers that end where no cluster does.
    let (a, b) = bytes.split_at(len / 3);
    let mut done = 0;
    while done < len as u64 {
        let list = [iov(a), iov(b)];
        done += u64::from(image.read(&part(&list, done, len as u64 - done), offset + done)?);
    }
    Ok(bytes)
}

fn read(image: &Qcow2, offset: u64, len: usize) -> Vec<u8> {
    try_read(image, offset, len).unwrap()
}

fn try_write(image: &Qcow2, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let (a, b) = bytes.split_at(bytes.len() / 3);
    let (list, len) = ([iov(a), iov(b)], bytes.len() as u64);
    let mut done = 0;
    while done < len {
        let rest = part(&list, done, len - done);
        done += u64::from(image.write(&rest, offset + done, false)?);
    }
    Ok(())
}

fn whole(image: &Qcow2) -> Vec<u8> {
    read(image, 0, image.len() as usize)
}

fn refused(path: &Path, access: Access) -> String {
    Qcow2::try_open(path, access).expect_err("it opens").to_string()
}

fn is_dirty(path: &Path) -> bool {
    describe(path).unwrap().header.is_dirty()
}

#[test]
fn what_was_built_is_read_and_written() {
    let folder = Folder::new();
    let path = folder.path("image");
    for (version, bits) in [(2, 9), (2, 16), (3, 9), (3, 12), (3, 16), (3, 21)] {
        let builder = mixed(version, bits);
        builder.write(&path);
        let mut model = builder.disk();
        for access in
            [READ, WRITE, Access { direct: true, ..READ }, Access { direct: true, ..WRITE }]
        {
            let image = Qcow2::open(&path, access).unwrap();
            assert_eq!(image.len(), builder.size);
            assert!(whole(&image) == model, "version {version}, 2^{bits}, {access:?}");
            if access.read_only {
                continue;
            }
            assert!(!is_dirty(&path), "nothing was written");
            // Over data, compressed data, nothing and the last cluster, which is cut short.
            let len = model.len();
            for (at, count) in [
                (512, 1024),
                (3 * builder.cluster() + 512, 512),
                (8 << bits, 2 << bits),
                (len - 512, 512),
            ] {
                let bytes: Vec<u8> = (0..count).map(|at| (at / 5) as u8).collect();
                try_write(&image, at as u64, &bytes).unwrap();
                model[at..at + count].copy_from_slice(&bytes);
            }
            assert!(whole(&image) == model, "version {version}, 2^{bits}, {access:?}");
            assert_eq!(is_dirty(&path), version == 3);
            image.save().unwrap();
            drop(image);
            assert!(!is_dirty(&path), "it was closed");
            let found = describe(&path).unwrap().found.unwrap();
            assert_eq!(found.raised, 0);
            assert!(whole(&Qcow2::open(&path, READ).unwrap()) == model);
        }
    }
}

#[test]
fn refcounts_of_every_width() {
    let folder = Folder::new();
    let path = folder.path("image");
    for order in 0..=6 {
        let mut builder = Builder::new(3, 12, 64 << 12);
        builder.refcount_order = order;
        builder.clusters.insert(3, Content::Data(builder.filled(9)));
        builder.write(&path);
        let mut model = builder.disk();
        let image = Qcow2::open(&path, WRITE).unwrap();
        try_write(&image, 20 << 12, &[5; 9 << 12]).unwrap();
        model[20 << 12..29 << 12].fill(5);
        image
            .range(ByteRange { offset: 3 << 12, len: 2 << 12, zero: true, unmap: true }, true)
            .unwrap();
        model[3 << 12..5 << 12].fill(0);
        drop(image);
        let image = Qcow2::open(&path, WRITE).unwrap();
        assert!(whole(&image) == model, "2^{order} bits");
    }
}

#[test]
fn a_discard_gives_space_back() {
    use std::os::unix::fs::MetadataExt;
    let folder = Folder::new();
    let path = folder.path("image");
    Builder::new(3, 16, 64 << 16).write(&path);
    let image = Qcow2::open(&path, WRITE).unwrap();
    try_write(&image, 0, &[1; 64 << 16]).unwrap();
    image.save().unwrap();
    let full = fs::metadata(&path).unwrap().blocks();
    let range = ByteRange { offset: 512, len: (60 << 16) - 512, zero: false, unmap: true };
    image.range(range, false).unwrap();
    image.save().unwrap();
    let now = fs::metadata(&path).unwrap().blocks();
    assert!(now + (58 << 7) <= full, "{now} blocks of {full}");
    let disk = whole(&image);
    assert!(disk[512..1 << 16].iter().all(|byte| *byte == 1), "a part of a cluster stays");
    assert!(disk[1 << 16..60 << 16].iter().all(|byte| *byte == 0));
    assert!(disk[60 << 16..].iter().all(|byte| *byte == 1));
    // And is used again.
    try_write(&image, 0, &[2; 60 << 16]).unwrap();
    image.save().unwrap();
    let again = fs::metadata(&path).unwrap();
    assert!(again.len() <= 90 << 16, "{} bytes", again.len());
}

#[test]
fn what_an_image_names_is_opened_only_if_asked_for() {
    let folder = Folder::new();
    let (top, middle, raw) = (folder.path("top"), folder.path("middle"), folder.path("raw"));
    let below: Vec<u8> = (0..8_usize << 16).map(|at| (at >> 9) as u8 | 1).collect();
    fs::write(&raw, &below).unwrap();
    let named = |name: &str, format: Option<&str>| {
        let mut builder = Builder::new(3, 16, 10 << 16);
        builder.backing = Some((name.to_owned(), format.map(str::to_owned)));
        builder
    };
    let builder = named(raw.to_str().unwrap(), Some("raw"));
    let data = builder.filled(7);
    builder.with(1, Content::Data(data.clone())).write(&middle);
    named("middle", Some("qcow2")).with(2, Content::Zero).write(&top);
    let mut model = below.clone();
    model.resize(10 << 16, 0);
    model[1 << 16..2 << 16].copy_from_slice(&data);
    model[2 << 16..3 << 16].fill(0);

    for access in [READ, WRITE] {
        assert!(refused(&top, access).contains("\"middle\""));
        let access = Access { backing: true, ..access };
        let image = Qcow2::open(&top, access).unwrap();
        assert!(whole(&image) == model);
        // Below, all are readers.
        assert!(refused(&middle, Access { backing: true, ..WRITE }).contains("in use"));
        drop(Qcow2::open(&middle, Access { backing: true, ..READ }).unwrap());
    }
    let (middle_before, raw_before) = (fs::read(&middle).unwrap(), fs::read(&raw).unwrap());
    let image = Qcow2::open(&top, Access { backing: true, ..WRITE }).unwrap();
    for at in [0, 1 << 16, 2 << 16, 9 << 16] {
        try_write(&image, at + 512, &[9; 512]).unwrap();
        model[at as usize + 512..at as usize + 1024].fill(9);
    }
    // What is below does not come back.
    image
        .range(ByteRange { offset: 1 << 16, len: 3 << 16, zero: false, unmap: true }, false)
        .unwrap();
    model[1 << 16..4 << 16].fill(0);
    assert!(whole(&image) == model);
    drop(image);
    assert!(fs::read(&middle).unwrap() == middle_before && fs::read(&raw).unwrap() == raw_before);

    let ask = Access { backing: true, ..WRITE };
    for (name, format, words) in [
        ("raw", None, "qemu-img rebase"),
        ("raw", Some("vmdk"), "\"vmdk\""),
        ("json:{}", Some("raw"), "not the name of a file"),
        ("nbd://host/x", Some("raw"), "not the name of a file"),
        ("missing", Some("raw"), "cannot open"),
        ("top", Some("qcow2"), "in use"),
        ("raw", Some("qcow2"), "magic"),
    ] {
        named(name, format).write(&top);
        let err = refused(&top, ask);
        assert!(err.contains(words), "{name} {format:?}: {err}");
    }
    // One that stands on itself ends.
    named("top", Some("qcow2")).write(&top);
    assert!(refused(&top, Access { backing: true, ..READ }).contains("others up"));
}

#[test]
fn images_that_are_not_supported_say_what_to_do() {
    let folder = Folder::new();
    let path = folder.path("image");
    let plain = || Builder::new(3, 16, 1 << 20);
    let cases: [(&str, Builder); 8] = [
        ("encrypted", Builder { encryption: 2, ..plain() }),
        ("snapshots inside", Builder { snapshots: 1, ..plain() }),
        ("marked as corrupt", Builder { incompatible: 2, ..plain() }),
        ("external data file", Builder { incompatible: 4, ..plain() }),
        (
            "external data file, \"x\"",
            Builder { extensions: vec![(0x4441_5441, b"x".into())], ..plain() },
        ),
        ("compression_type=zlib", Builder { incompatible: 8, ..plain() }),
        ("extended_l2=off", Builder { incompatible: 16, ..plain() }),
        ("not known, 0x40", Builder { incompatible: 64, ..plain() }),
    ];
    for (words, builder) in cases {
        builder.write(&path);
        let err = refused(&path, WRITE);
        assert!(err.contains(words), "{err}");
        assert_eq!(Qcow2::open(&path, READ).is_ok(), builder.snapshots > 0, "{words}");
    }
    for (words, bytes) in
        [("magic", vec![0; 1 << 20]), ("magic", Vec::new()), ("magic", MAGIC[..3].into())]
    {
        fs::write(&path, bytes).unwrap();
        assert!(refused(&path, READ).contains(words));
        assert!(!looks_like_qcow2(&path).unwrap());
    }
    plain().write(&path);
    assert!(looks_like_qcow2(&path).unwrap());
    // A table of feature names of one byte, which imago 0.2.6 does not survive.
    Builder { extensions: vec![(0x6803_f857, vec![0])], ..plain() }.write(&path);
    assert!(refused(&path, READ).contains("feature names"));
}

#[test]
fn sizes_that_nobody_has_memory_for_are_refused() {
    let folder = Folder::new();
    let path = folder.path("image");
    let image = Builder::new(3, 16, 1 << 20).build();
    for (at, bytes, words) in [
        (4, 4_u32.to_be_bytes().to_vec(), "version 4"),
        (8, (1_u64 << 40).to_be_bytes().to_vec(), "backing file has 0 bytes"),
        (20, 63_u32.to_be_bytes().to_vec(), "2^63"),
        (24, 0_u64.to_be_bytes().to_vec(), "0 bytes"),
        (24, 513_u64.to_be_bytes().to_vec(), "513 bytes"),
        (24, (u64::MAX - 511).to_be_bytes().to_vec(), "L1 table has 1 entries"),
        (36, u32::MAX.to_be_bytes().to_vec(), "L1 table"),
        (36, 0_u32.to_be_bytes().to_vec(), "L1 table"),
        (40, 3_u64.to_be_bytes().to_vec(), "L1 table"),
        (40, (u64::MAX << 16).to_be_bytes().to_vec(), "L1 table"),
        (48, 0_u64.to_be_bytes().to_vec(), "refcount table"),
        (48, (1_u64 << 40).to_be_bytes().to_vec(), "refcount table"),
        (56, u32::MAX.to_be_bytes().to_vec(), "refcount table"),
        (96, 7_u32.to_be_bytes().to_vec(), "2^7 bits"),
        (100, 96_u32.to_be_bytes().to_vec(), "96 bytes"),
        (100, (1_u32 << 30).to_be_bytes().to_vec(), "bytes"),
        (104, [0xff; 8].to_vec(), "extension"),
    ] {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(&bytes);
        fs::write(&path, image).unwrap();
        for access in [READ, WRITE] {
            let err = refused(&path, access);
            assert!(err.contains(words), "{at}: {err}");
        }
    }
}

#[test]
fn two_owners_of_a_cluster_are_refused() {
    let folder = Folder::new();
    let path = folder.path("image");
    let builder = mixed(3, 16);
    let good = builder.build();
    let cluster = builder.cluster();
    let l2 = be(&good, 10 * cluster) as usize & !(1 << 63);
    // The first entry of the L2 table leads to the header's end, the L1 table, itself, a refcount block, another's.
    for target in [0x1_0000, 10 << 16, l2 as u64, 2 << 16, be(&good, l2 + 8) & !(1 << 63)] {
        let mut image = good.clone();
        image[l2..l2 + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        fs::write(&path, &image).unwrap();
        let err = Qcow2::open(&path, WRITE).unwrap_err().to_string();
        assert!(err.contains("something else is, too"), "{target:#x}: {err}");
        assert!(describe(&path).unwrap().found.is_err() || target == 2 << 16 || target == 0x1_0000);
        assert!(fs::read(&path).unwrap() == image, "it was not touched");
        // Who only reads harms nobody.
        whole(&Qcow2::open(&path, READ).unwrap());
    }
    for entry in
        [1_u64 << 62 | 1 << 63, 1 << 57 | 1 << 16, 0x1_0200, 1 << 55, 0x00ff_ffff_ffff_0000]
    {
        let mut image = good.clone();
        image[l2..l2 + 8].copy_from_slice(&entry.to_be_bytes());
        fs::write(&path, image).unwrap();
        Qcow2::open(&path, WRITE).unwrap_err();
        let _ = try_read(&Qcow2::open(&path, READ).unwrap(), 0, 512);
    }
}

fn be(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// imago 0.2.6 notes a new L2 table in the L1 table before its refcount is in the file. Whoever opens the image after
/// that, and believes the refcounts, gives the table's cluster away.
#[test]
fn refcounts_that_a_killed_machine_left_are_raised() {
    let folder = Folder::new();
    let (path, copy) = (folder.path("image"), folder.path("copy"));
    Builder::new(3, 9, 1 << 20).write(&path);
    let image = Qcow2::open(&path, WRITE).unwrap();
    for at in 0..32 {
        try_write(&image, at << 15, &[at as u8 + 1; 512]).unwrap();
    }
    fs::copy(&path, &copy).unwrap();
    assert!(is_dirty(&copy));
    let described = describe(&copy).unwrap();
    let file = ImageFile::new(super::super::DiskFile::open_image(&copy, false, false).unwrap());
    file.set_limit(1 << 30);
    let found = check::repair(&file, &described.header).unwrap();
    assert!(found.raised > 0, "there is nothing to be shown any more");
    drop(file);
    let after = Qcow2::open(&copy, WRITE).unwrap();
    let before = whole(&after);
    try_write(&after, 777 << 9, &[0x77; 64 << 9]).unwrap();
    let mut model = before;
    model[777 << 9..(777 + 64) << 9].fill(0x77);
    assert!(whole(&after) == model);
    drop(after);
    assert!(whole(&Qcow2::open(&copy, WRITE).unwrap()) == model);
    drop(image);
}

#[test]
fn threads_read_write_and_discard_at_once() {
    let folder = Folder::new();
    let path = folder.path("image");
    for bits in [9, 12] {
        let mut builder = Builder::new(3, bits, 256 << 12);
        // Clusters that are compressed are replaced meanwhile.
        for index in (0..builder.size >> bits).step_by(7) {
            builder.clusters.insert(index, Content::Compressed(builder.filled(index as u8)));
            if builder.clusters.len() == 100 {
                break;
            }
        }
        builder.write(&path);
        let image = Qcow2::open(&path, WRITE).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let image = &image;
                scope.spawn(move || {
                    // Sectors of a thread lie between those of the others.
                    let mut last = vec![None; 512];
                    for round in 0..3000_u64 {
                        let pick = (round * 7919 + thread * 13) % 512;
                        let sector = pick * 4 + thread;
                        match round % 16 {
                            0 => image.save().unwrap(),
                            1 => {
                                let offset = sector * 512;
                                let range = ByteRange {
                                    offset,
                                    len: 512,
                                    zero: true,
                                    unmap: round % 32 == 1,
                                };
                                image.range(range, false).unwrap();
                                last[pick as usize] = Some(0);
                            }
                            2..9 => {
                                let byte = round as u8;
                                try_write(image, sector * 512, &[byte; 512]).unwrap();
                                last[pick as usize] = Some(byte);
                            }
                            _ => {
                                let bytes = read(image, sector * 512, 512);
                                if let Some(byte) = last[pick as usize] {
                                    assert!(bytes.iter().all(|found| *found == byte));
                                }
                            }
                        }
                    }
                });
            }
        });
        drop(image);
        let found = describe(&path).unwrap().found.unwrap();
        assert!(found.data > 0);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write { sector: u64, sectors: u64, byte: u8 },
    Read { sector: u64, sectors: u64 },
    Range { sector: u64, sectors: u64, zero: bool, unmap: bool },
    Flush,
    Close,
    Reopen,
    Kill,
}

const SECTORS: u64 = 1024;

fn op() -> impl Strategy<Value = Op> {
    let span =
        || (0..SECTORS, 1..=64_u64).prop_map(|(sector, len)| (sector, len.min(SECTORS - sector)));
    prop_oneof![
        8 => (span(), 1..=255_u8).prop_map(|((sector, sectors), byte)| Op::Write { sector, sectors, byte }),
        4 => span().prop_map(|(sector, sectors)| Op::Read { sector, sectors }),
        3 => (span(), any::<bool>(), any::<bool>()).prop_map(|((sector, sectors), zero, unmap)| {
            Op::Range { sector, sectors, zero, unmap: unmap || !zero }
        }),
        2 => Just(Op::Flush),
        1 => Just(Op::Close),
        1 => Just(Op::Reopen),
        1 => Just(Op::Kill),
    ]
}

/// A disk as it may be: of each sector, the byte that it is filled with, or one of several after it was written and
/// not flushed.
struct Model {
    now: Vec<u8>,
    may: Vec<Vec<u8>>,
}

impl Model {
    fn set(&mut self, sector: u64, byte: u8) {
        let (now, may) = (&mut self.now[sector as usize], &mut self.may[sector as usize]);
        may.push(*now);
        *now = byte;
    }

    fn saved(&mut self) {
        self.may.iter_mut().for_each(Vec::clear);
    }
}

fn sectors(bytes: &[u8]) -> Vec<u8> {
    let sector = |bytes: &[u8]| {
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a sector is mixed");
        bytes[0]
    };
    bytes.chunks(512).map(sector).collect()
}

fn follows_the_model(version: u32, bits: u32, direct: bool, backing: bool, ops: &[Op]) {
    let folder = Folder::new();
    let mut path = folder.path("0");
    let access = Access { direct, backing, ..WRITE };
    let mut builder = Builder::new(version, bits, SECTORS * 512);
    let mut model =
        Model { now: vec![0; SECTORS as usize], may: vec![Vec::new(); SECTORS as usize] };
    if backing {
        // Shorter than the disk.
        fs::write(folder.path("base"), vec![0xb5; 700 * 512]).unwrap();
        builder.backing = Some(("base".into(), Some("raw".into())));
        model.now[..700].fill(0xb5);
    }
    for index in (1..builder.size >> bits).step_by(5).take(40) {
        builder.clusters.insert(index, Content::Compressed(vec![0xc3; builder.cluster()]));
        let per_cluster = builder.cluster() / 512;
        model.now[index as usize * per_cluster..][..per_cluster].fill(0xc3);
    }
    builder.write(&path);
    let mut image = Qcow2::open(&path, access).unwrap();
    for (n, op) in ops.iter().enumerate() {
        match *op {
            Op::Write { sector, sectors, byte } => {
                try_write(&image, sector * 512, &vec![byte; sectors as usize * 512]).unwrap();
                (sector..sector + sectors).for_each(|sector| model.set(sector, byte));
            }
            Op::Read { sector, sectors: count } => {
                let found = sectors(&read(&image, sector * 512, count as usize * 512));
                assert_eq!(found, model.now[sector as usize..][..count as usize], "{n}: {op:?}");
            }
            Op::Range { sector, sectors: count, zero, unmap } => {
                let range = ByteRange { offset: sector * 512, len: count * 512, zero, unmap };
                image.range(range, false).unwrap();
                let found = sectors(&read(&image, range.offset, range.len as usize));
                for (sector, byte) in (sector..).zip(found) {
                    let stays = !zero && byte == model.now[sector as usize];
                    assert!(byte == 0 || stays, "{n}: {op:?} {sector}");
                    model.set(sector, byte);
                }
            }
            Op::Flush => {
                image.save().unwrap();
                model.saved();
            }
            Op::Close => {
                image.close().unwrap();
                assert!(!is_dirty(&path));
                model.saved();
            }
            Op::Reopen => {
                drop(image);
                model.saved();
                assert!(!is_dirty(&path));
                image = Qcow2::open(&path, access).unwrap();
            }
            Op::Kill => {
                let next = folder.path(&format!("{}", n + 1));
                fs::copy(&path, &next).unwrap();
                drop(image);
                path = next;
                image = Qcow2::open(&path, access).unwrap();
                let found = sectors(&whole(&image));
                for (sector, byte) in found.into_iter().enumerate() {
                    let may = byte == model.now[sector] || model.may[sector].contains(&byte);
                    assert!(may, "{n}: sector {sector} has {byte:#x}");
                    model.now[sector] = byte;
                }
                model.saved();
            }
        }
    }
    assert!(sectors(&whole(&image)) == model.now);
    drop(image);
    let again = Qcow2::open(&path, access).unwrap();
    assert!(sectors(&whole(&again)) == model.now);
    describe(&path).unwrap().found.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_disk_follows_its_model(
        version in 2..=3_u32,
        bits in prop_oneof![Just(9_u32), Just(10), Just(12), Just(16)],
        direct in prop::bool::weighted(0.2),
        backing in any::<bool>(),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        follows_the_model(version, bits, direct, backing, &ops);
    }
}

#[path = "tests/forks.rs"]
mod forks;

/// Uses an image as a hostile guest would, whatever it is.
fn abuse(path: &Path) {
    for access in [READ, WRITE] {
        let Ok(image) = Qcow2::open(path, access) else { continue };
        let len = image.len().min(1 << 20);
        for at in (0..len).step_by(16 << 10) {
            let _ = try_read(&image, at, 4096.min((len - at) as usize));
            if !access.read_only {
                let count = 1024.min((len - at) as usize);
                let _ = try_write(&image, at, &vec![7; count]);
                let range = ByteRange {
                    offset: at,
                    len: count as u64,
                    zero: at % 3 == 0,
                    unmap: at % 2 == 0,
                };
                let _ = image.range(range, false);
            }
        }
        let _ = image.save();
    }
    let _ = describe(path);
}

fn corrupted(bits: u32, flips: &[(u32, u8)]) {
    let folder = Folder::new();
    let path = folder.path("image");
    let builder = mixed(3, bits);
    let mut image = builder.build();
    let l2 = be(&image, 10 << bits) as usize & !(1 << 63);
    // Header, first entries of each table, and the start of what is compressed.
    let areas = [
        0..112,
        1 << bits..(1 << bits) + 80,
        2 << bits..(2 << bits) + 64,
        10 << bits..(10 << bits) + 16,
        l2..l2 + 64,
    ];
    for (place, bit) in flips {
        let area = &areas[*place as usize % areas.len()];
        let at = area.start + (*place as usize / areas.len()) % area.len();
        image[at] ^= 1 << (bit % 8);
    }
    fs::write(&path, image).unwrap();
    let start = Instant::now();
    abuse(&path);
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    let len = fs::metadata(&path).unwrap().len();
    assert!(len < 1 << 40, "the file has {len} bytes");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_corrupt_image_is_an_error_at_worst(
        bits in prop_oneof![Just(9_u32), Just(12), Just(16)],
        flips in prop::collection::vec((any::<u32>(), any::<u8>()), 1..6),
    ) {
        corrupted(bits, &flips);
    }

    #[test]
    fn any_header_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 100..1200), len in any::<u32>()) {
        let mut bytes = bytes;
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&9_u32.to_be_bytes());
        let _ = Header::parse(&bytes, len.into());
    }
}
