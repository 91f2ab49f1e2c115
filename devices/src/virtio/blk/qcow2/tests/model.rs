//! A disk against a model of it, through flushes, reopenings and kills.

use super::*;

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
