//! What is opened, with what it stands on, and what is not supported.

use super::*;

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
