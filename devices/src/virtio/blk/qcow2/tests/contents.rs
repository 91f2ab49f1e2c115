//! Images that are read, written and discarded, by several threads and after a kill.

use super::*;
use crate::virtio::blk::DiskFile;

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
    let file = ImageFile::new(DiskFile::open_image(&copy, false, false).unwrap());
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
