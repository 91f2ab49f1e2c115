//! Images that are wrong: refused, or used without harm.

use std::time::{Duration, Instant};

use super::*;

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
