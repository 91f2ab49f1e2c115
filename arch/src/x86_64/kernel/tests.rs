use std::io::{self, Write};

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

/// An ELF file in the making.
struct ElfFile {
    entry: u64,
    /// Type, flags, physical address, virtual address, file bytes, size in memory.
    headers: Vec<(u32, u32, u64, u64, Vec<u8>, u64)>,
}

impl ElfFile {
    fn new(entry: u64) -> Self {
        Self { entry, headers: Vec::new() }
    }

    fn load(mut self, paddr: u64, vaddr: u64, bytes: &[u8], mem_size: u64) -> Self {
        self.headers.push((1, 7, paddr, vaddr, bytes.to_vec(), mem_size));
        self
    }

    fn note(mut self, name: &[u8], kind: u32, desc: &[u8]) -> Self {
        let mut note = Vec::new();
        for number in [name.len() as u32, desc.len() as u32, kind] {
            note.extend(number.to_le_bytes());
        }
        for part in [name, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        self.headers.push((4, 4, 0, 0, note, 0));
        self
    }

    fn build(&self) -> Vec<u8> {
        let mut file = b"\x7FELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(self.entry.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.resize(52, 0);
        for number in [64, 56, self.headers.len() as u16, 0, 0, 0] {
            file.extend(number.to_le_bytes());
        }
        let mut offset = 64 + 56 * self.headers.len() as u64;
        for (kind, flags, paddr, vaddr, bytes, mem_size) in &self.headers {
            file.extend(kind.to_le_bytes());
            file.extend(flags.to_le_bytes());
            for number in [offset, *vaddr, *paddr, bytes.len() as u64, *mem_size, 4] {
                file.extend(number.to_le_bytes());
            }
            offset += bytes.len() as u64;
        }
        for (.., bytes, _) in &self.headers {
            file.extend(bytes);
        }
        file
    }
}

/// A kernel of two segments, linked as Linux is.
fn vmlinux() -> ElfFile {
    ElfFile::new(0x100_0010).load(0x120_0000, 0xFFFF_FFFF_8120_0000, &[2; 100], 0x3000).load(
        0x100_0000,
        0xFFFF_FFFF_8100_0000,
        &[1; 200],
        200,
    )
}

fn parse_elf(file: &[u8]) -> Result<ElfKernel, KernelError> {
    match KernelImage::parse_bytes(file)? {
        KernelImage::Elf(elf) => Ok(elf),
        KernelImage::BzImage(_) => panic!("an ELF file is no bzImage"),
    }
}

fn error(file: &[u8]) -> String {
    KernelImage::parse_bytes(file).expect_err("this is refused").to_string()
}

/// `file` with `bytes` written over it at `offset`.
fn patched(mut file: Vec<u8>, offset: usize, bytes: &[u8]) -> Vec<u8> {
    file[offset..offset + bytes.len()].copy_from_slice(bytes);
    file
}

#[test]
fn an_elf_kernel_is_read_with_its_segments_in_order() {
    let elf = parse_elf(&vmlinux().build()).unwrap();
    assert_eq!(elf.entry, 0x100_0010);
    assert_eq!(elf.pvh_entry, None);
    assert_eq!((elf.start(), elf.end()), (0x100_0000, 0x120_3000));
    let expected = Segment {
        file_offset: 64 + 2 * 56 + 100,
        file_size: 200,
        mem_size: 200,
        gpa: 0x100_0000,
        writable: true,
    };
    assert_eq!(elf.segments[0], expected);
    assert_eq!(elf.segments[1].gpa, 0x120_0000);
    assert_eq!(elf.segments[1].end(), 0x120_3000);
}

#[test]
fn only_headers_are_read() {
    /// Counts what is read of a file.
    struct Counting(Cursor<Vec<u8>>, usize);
    impl Read for Counting {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read(buffer)?;
            self.1 += count;
            Ok(count)
        }
    }
    impl Seek for Counting {
        fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
            self.0.seek(position)
        }
    }
    let large = vec![0; 5 << 20];
    let file = ElfFile::new(MIB).load(MIB, MIB, &large, 5 << 20).build();
    let mut reader = Counting(Cursor::new(file), 0);
    KernelImage::parse(&mut reader).unwrap();
    assert!(reader.1 < 8192, "{} bytes were read", reader.1);
}

#[test]
fn a_virtual_entry_is_translated_and_a_stray_one_refused() {
    let mut file = vmlinux();
    file.entry = 0xFFFF_FFFF_8100_0020;
    assert_eq!(parse_elf(&file.build()).unwrap().entry, 0x100_0020);
    // Behind the bytes of the file, where memory is zero.
    file.entry = 0x120_1000;
    assert_eq!(
        error(&file.build()),
        "the kernel image is malformed: its entry point 0x1201000 lies in none of its segments"
    );
}

#[test]
fn linux_is_known_by_its_notes() {
    let is_linux = |file: Vec<u8>| parse_elf(&file).unwrap().is_linux;
    assert!(!is_linux(vmlinux().note(b"Xen\0", 6, b"netbsd").build()));
    assert!(is_linux(vmlinux().note(b"Xen\0", 6, b"linux").build()));
    assert!(is_linux(vmlinux().note(b"GNU\0", 3, &[9; 20]).note(b"Linux\0", 0x101, &[0]).build()));
}

#[test]
fn the_pvh_note_is_found_among_others() {
    let entry = 0x100_0040u64;
    for desc in [&entry.to_le_bytes()[..], &entry.to_le_bytes()[..4]] {
        let file = vmlinux().note(b"GNU\0", 3, &[9; 20]).note(b"Xen\0", 18, desc);
        assert_eq!(parse_elf(&file.build()).unwrap().pvh_entry, Some(entry));
    }
    let other = vmlinux().note(b"Xen\0", 17, &entry.to_le_bytes()).build();
    assert_eq!(parse_elf(&other).unwrap().pvh_entry, None);
    let outside = vmlinux().note(b"Xen\0", 18, &0x50_0000u64.to_le_bytes()).build();
    assert!(error(&outside).ends_with("PVH entry point 0x500000 lies in none of its segments"));
}

#[test]
fn inconsistent_elf_files_are_refused_with_the_reason() {
    let segment = |paddr, file_size: usize, mem_size| {
        error(&ElfFile::new(paddr).load(paddr, paddr, &vec![0; file_size], mem_size).build())
    };
    assert!(segment(MIB, 16, 15).ends_with("0x100000 is larger in the file than in memory"));
    assert!(segment(MIB - 1, 16, 16).ends_with("0xfffff lies below 1 MiB"));
    assert!(segment(u64::MAX - 7, 8, 8).ends_with("ends beyond any memory"));
    // A header without memory is passed over, wherever it points.
    let empty = ElfFile::new(u64::MAX).load(MIB, 0, &[0; 8], 8).load(u64::MAX, 0, &[0; 8], 0);
    assert!(error(&empty.build()).contains("its entry point 0xffffffffffffffff lies in none"));
    let empty = ElfFile::new(3).load(MIB, MIB, &[0; 8], 8).load(u64::MAX, 0, &[0; 8], 0);
    assert!(error(&empty.build()).contains("its entry point 0x3 lies in none"));
    assert!(segment(MIB, 8, u64::MAX).ends_with("ends beyond any memory"));
    let overlap = ElfFile::new(MIB).load(MIB, 0, &[0; 8], 0x2000).load(MIB + 0x1000, 0, &[0; 8], 8);
    assert!(error(&overlap.build()).ends_with("0x100000..0x102000 and 0x101000..0x101008 overlap"));
    assert!(error(&ElfFile::new(MIB).note(b"x", 1, b"").build()).ends_with("nothing to load"));
    assert!(error(&ElfFile::new(0).build()).ends_with("it has 0 ELF program headers"));
    assert!(error(&patched(vmlinux().build(), 56, &[0xFF; 2])).contains("65535 ELF program"));
    assert!(error(&patched(vmlinux().build(), 54, &[32, 0])).contains("have 32 bytes, not 56"));
    let beyond = patched(vmlinux().build(), 32, &u64::MAX.to_le_bytes());
    assert!(error(&beyond).starts_with("the kernel image is truncated: the ELF program headers"));
}

#[test]
fn truncation_is_told_wherever_it_happens() {
    let file = vmlinux().build();
    assert!(matches!(KernelImage::parse_bytes(&[]), Err(KernelError::Empty)));
    for length in 4..file.len() {
        let result = KernelImage::parse_bytes(&file[..length]);
        assert!(matches!(result, Err(KernelError::Truncated { .. })), "{length}: {result:?}");
    }
    assert_eq!(
        error(&file[..file.len() - 1]),
        format!(
            "the kernel image is truncated: a segment would end at byte {}, the file has {}",
            file.len(),
            file.len() - 1
        )
    );
}

#[test]
fn other_architectures_are_named() {
    let elf = |class: u8, data: u8, machine: [u8; 2]| {
        let file = patched(vmlinux().build(), 4, &[class, data]);
        match KernelImage::parse_bytes(&patched(file, 18, &machine)) {
            Err(KernelError::WrongArchitecture { arch }) => arch,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(elf(2, 1, [183, 0]), "aarch64");
    assert_eq!(elf(1, 1, [3, 0]), "32-bit x86");
    assert_eq!(elf(1, 1, [62, 0]), "32-bit x86");
    assert_eq!(elf(2, 2, [0, 22]), "s390x");
    assert_eq!(elf(2, 1, [0x34, 0x12]), "ELF machine 4660");

    let mut arm64 = vec![0; 4096];
    arm64[0x38..0x3C].copy_from_slice(b"ARM\x64");
    assert_eq!(error(&arm64), "the kernel image is for aarch64, this machine is 64-bit x86");
    let mut efi = vec![0; 4096];
    efi[..2].copy_from_slice(b"MZ");
    efi[0x3C] = 0x80;
    efi[0x80..0x86].copy_from_slice(b"PE\0\0\x64\xAA");
    assert_eq!(error(&efi), "the kernel image is for aarch64, this machine is 64-bit x86");
}

#[test]
fn what_is_no_kernel_is_called_what_it_is() {
    let mut ext4 = vec![0; 4096];
    ext4[0x438..0x43A].copy_from_slice(&[0x53, 0xEF]);
    let mut program = vmlinux();
    program.headers.push((3, 4, 0, 0, b"/lib/ld.so\0".to_vec(), 11));
    let cases: [(&[u8], &str); 9] = [
        (b"#!/bin/sh\nexit\n", "a script"),
        (b"\x1F\x8B\x08rest", "a gzip file"),
        (b"070701000", "an initramfs (cpio archive)"),
        (b"hello, kernel\n", "text"),
        (&[0; 4096], "nothing but zeroes"),
        (&[0xA5; 4096], "data of no known format"),
        (&ext4, "an ext2/3/4 file system"),
        (&program.build(), "a dynamically linked program"),
        (&patched(vmlinux().build(), 16, &[1]), "an object file or kernel module"),
    ];
    for (file, name) in cases {
        assert_eq!(error(file), format!("the file is not a kernel image: it looks like {name}"));
    }
}

/// A bzImage with `payload`, protected-mode code in front of it and a tail behind.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    const CODE: usize = 0x400;
    let mut file = vec![0; 5 * 512];
    file[0x1F1] = 4;
    file[0x1FE..0x202].copy_from_slice(&[0x55, 0xAA, 0xEB, 0x6A]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    let size = (CODE + payload.len() + 100).next_multiple_of(16);
    let mut set = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    set(0x1F4, &(size as u32 / 16).to_le_bytes());
    set(0x206, &0x20Fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    set(0x230, &0x20_0000u32.to_le_bytes());
    set(0x234, &[1]);
    set(0x236, &0x7Fu16.to_le_bytes());
    set(0x238, &2047u32.to_le_bytes());
    set(0x248, &(CODE as u32).to_le_bytes());
    set(0x24C, &(payload.len() as u32).to_le_bytes());
    set(0x258, &0x100_0000u64.to_le_bytes());
    set(0x260, &0x40_0000u32.to_le_bytes());
    file.resize(5 * 512 + CODE, 0xCC);
    file.extend(payload);
    file.resize(5 * 512 + size, 0xCC);
    file
}

fn parse_bzimage(file: &[u8]) -> Result<BzImage, KernelError> {
    match KernelImage::parse_bytes(file)? {
        KernelImage::BzImage(image) => Ok(image),
        KernelImage::Elf(_) => panic!("a bzImage is no ELF file"),
    }
}

/// An ELF kernel with something in it that compresses, but not to nothing.
fn kernel() -> Vec<u8> {
    let bytes: Vec<u8> = (0..100_000u32).map(|i| ((i % 251) ^ (i >> 9)) as u8).collect();
    ElfFile::new(MIB).load(MIB, MIB, &bytes, 100_000).build()
}

fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend((size as u32).to_le_bytes());
    packed
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zstd(data: &[u8]) -> Vec<u8> {
    with_size(::zstd::encode_all(data, 1).unwrap(), data.len())
}

/// As `xz --x86 --lzma2 --check=crc32` makes it.
fn xz(data: &[u8]) -> Vec<u8> {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    let mut filters = Filters::new();
    filters.x86().lzma2(&LzmaOptions::new_preset(1).unwrap());
    let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new_stream(data, stream).read_to_end(&mut packed).unwrap();
    with_size(packed, data.len())
}

/// As `lz4 -l` makes it, in blocks of `block` bytes.
fn lz4(data: &[u8], block: usize) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4C, 0x18];
    for chunk in data.chunks(block) {
        let chunk = lz4_flex::block::compress(chunk);
        packed.extend((chunk.len() as u32).to_le_bytes());
        packed.extend(chunk);
    }
    with_size(packed, data.len())
}

fn every_format(data: &[u8]) -> [(Compression, Vec<u8>); 4] {
    [
        (Compression::Gzip, gzip(data)),
        (Compression::Zstd, zstd(data)),
        (Compression::Xz, xz(data)),
        (Compression::Lz4, lz4(data, 8 << 20)),
    ]
}

#[test]
fn a_bzimage_says_what_goes_where() {
    let file = bzimage(&gzip(&kernel()));
    let image = parse_bzimage(&file).unwrap();
    assert_eq!(image.code_offset, 5 * 512);
    assert_eq!(image.code_size, file.len() as u64 - 5 * 512);
    assert_eq!(image.payload_offset, 5 * 512 + 0x400);
    assert_eq!((image.load_address, image.entry()), (0x100_0000, 0x100_0200));
    assert_eq!(image.init_size, 0x40_0000);
    assert_eq!((image.cmdline_max, image.initrd_addr_max), (2047, 0x7FFF_FFFF));
    let init_size = image.header.0.init_size;
    assert_eq!(init_size, 0x40_0000);
}

#[test]
fn the_header_ends_where_it_says() {
    // The jump at 0x200 goes 0x56 bytes: pref_address at 0x258 is beyond, and is not believed.
    let file = patched(bzimage(&gzip(&kernel())), 0x201, &[0x56]);
    let image = parse_bzimage(&file).unwrap();
    let preferred = image.header.0.pref_address;
    assert_eq!(preferred, 0);
    assert_eq!(image.load_address, 0x20_0000);
}

#[test]
fn every_compression_of_debian_unpacks() {
    let kernel = kernel();
    for (compression, payload) in every_format(&kernel) {
        assert_eq!(Compression::of(&payload), Some(compression));
        let file = bzimage(&payload);
        let (unpacked, elf) =
            parse_bzimage(&file).unwrap().unpack(&mut Cursor::new(&file)).unwrap();
        assert!(unpacked == kernel, "{compression:?}");
        assert_eq!(elf.entry, MIB);
    }
    assert!(unpack(&lz4(&kernel, 1000), MAX_UNPACKED_SIZE).unwrap() == kernel, "many blocks");
    assert!(unpack(&kernel, MAX_UNPACKED_SIZE).unwrap() == kernel, "no compression");
}

#[test]
fn a_payload_that_grows_beyond_its_bound_is_an_error() {
    let kernel = kernel();
    let limit = kernel.len() as u64 - 1;
    for (compression, payload) in every_format(&kernel) {
        let result = unpack(&payload, limit);
        assert!(
            matches!(result, Err(PayloadError::TooLarge { limit: l }) if l == limit),
            "{compression:?}: {result:?}"
        );
    }
    // In an image, the bound is init_size.
    let file = patched(bzimage(&gzip(&vec![0; 5 << 20])), 0x260, &0x1000u32.to_le_bytes());
    let error = parse_bzimage(&file).unwrap().unpack_payload(&mut Cursor::new(&file)).unwrap_err();
    assert!(matches!(error, KernelError::Payload(PayloadError::TooLarge { .. })), "{error}");
}

#[test]
fn a_payload_of_another_size_than_promised_is_an_error() {
    let kernel = kernel();
    for (compression, payload) in every_format(&kernel) {
        for difference in [-1, 1] {
            let size = kernel.len() as i64 + difference;
            let at = payload.len() - 4;
            let lying = patched(payload.clone(), at, &(size as u32).to_le_bytes());
            let result = unpack(&lying, MAX_UNPACKED_SIZE);
            assert!(
                matches!(
                    result,
                    Err(PayloadError::SizeMismatch { .. } | PayloadError::Corrupt { .. })
                ),
                "{compression:?} {difference}: {result:?}"
            );
        }
    }
}

#[test]
fn a_corrupt_or_cut_payload_is_an_error() {
    let kernel = kernel();
    for (compression, payload) in every_format(&kernel) {
        let half = with_size(payload[..payload.len() / 2].to_vec(), kernel.len());
        let result = unpack(&half, MAX_UNPACKED_SIZE);
        assert!(
            matches!(result, Err(PayloadError::Corrupt { .. } | PayloadError::SizeMismatch { .. })),
            "{compression:?}: {result:?}"
        );
    }
    let checksummed = gzip(&kernel);
    let at = checksummed.len() - 8;
    let result = unpack(&patched(checksummed, at, &[0; 4]), MAX_UNPACKED_SIZE);
    assert!(matches!(result, Err(PayloadError::Corrupt { name: "gzip", .. })), "{result:?}");
}

#[test]
fn payloads_without_a_decoder_are_refused_by_name() {
    let name = |payload: &[u8]| match unpack(payload, MIB) {
        Err(PayloadError::Unsupported { name }) => name,
        other => panic!("{other:?}"),
    };
    assert_eq!(name(b"BZh91AY&SY...."), "bzip2");
    assert_eq!(name(&[0x5D, 0, 0, 0x80, 0, 0xFF, 0xFF, 0xFF]), "LZMA");
    assert_eq!(name(b"\x89LZO\0\r\n\x1A\n..."), "LZO");
    assert!(matches!(unpack(b"what is this", MIB), Err(PayloadError::Unknown { .. })));
    assert!(matches!(unpack(b"", MIB), Err(PayloadError::Unknown { .. })));
    assert!(matches!(unpack(&gzip(b"no ELF file"), MIB), Err(PayloadError::NotElf)));
}

#[test]
fn bzimages_that_cannot_be_booted_are_refused() {
    let file = bzimage(&gzip(&kernel()));
    assert!(error(&patched(file.clone(), 0x206, &[0x0B, 0x02])).contains("protocol is 2.11"));
    let arch = error(&patched(file.clone(), 0x236, &[0x7E]));
    assert_eq!(arch, "the kernel image is for 32-bit x86, this machine is 64-bit x86");
    assert!(error(&patched(file.clone(), 0x211, &[0])).contains("does not load at 1 MiB"));
    assert!(error(&patched(file.clone(), 0x230, &[3, 0, 0, 0])).contains("alignment 0x3"));
    assert!(error(&patched(file.clone(), 0x258, &[0xFF; 8])).contains("prefers address"));
    let low = patched(patched(file.clone(), 0x234, &[0]), 0x258, &[0; 8]);
    assert!(error(&low).contains("prefers address 0x0"));
    assert!(error(&patched(file.clone(), 0x1F4, &[1, 0, 0, 0])).contains("code has 16 bytes"));
    assert!(error(&patched(file.clone(), 0x24C, &[0xFF; 4])).contains("its payload has"));
    for length in 0x206..file.len() - 15 {
        let result = KernelImage::parse_bytes(&file[..length]);
        assert!(matches!(result, Err(KernelError::Truncated { .. })), "{length}: {result:?}");
    }
}

proptest! {
    #[test]
    fn parsing_any_bytes_never_panics(
        magic in prop::sample::select(vec![&b""[..], b"\x7FELF\x02\x01", b"MZ"]),
        bytes in prop::collection::vec(any::<u8>(), 0..2048),
    ) {
        let _ = KernelImage::parse_bytes(&[magic, &bytes].concat());
    }

    #[test]
    fn a_patched_elf_file_keeps_its_promises(
        patches in prop::collection::vec((0usize..232, any::<u8>()), 1..12),
    ) {
        let mut file = vmlinux().note(b"Xen\0", 18, &[0x40, 0, 0, 1]).build();
        for (at, byte) in patches {
            file[at] = byte;
        }
        if let Ok(KernelImage::Elf(elf)) = KernelImage::parse_bytes(&file) {
            prop_assert!(!elf.segments.is_empty());
            for segment in &elf.segments {
                prop_assert!(segment.gpa >= MIB && segment.mem_size > 0);
                prop_assert!(segment.file_size <= segment.mem_size);
                prop_assert!(segment.file_offset + segment.file_size <= file.len() as u64);
            }
            for pair in elf.segments.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].gpa);
            }
            let entries = [Some(elf.entry), elf.pvh_entry];
            for entry in entries.into_iter().flatten() {
                prop_assert!(elf.segments.iter().any(|s| (s.gpa..s.end()).contains(&entry)));
            }
        }
    }

    #[test]
    fn a_patched_bzimage_keeps_its_promises(
        patches in prop::collection::vec((0x1F1usize..0x270, any::<u8>()), 1..12),
    ) {
        let mut file = bzimage(&gzip(b"\x7FELF and so on"));
        for (at, byte) in patches {
            file[at] = byte;
        }
        if let Ok(KernelImage::BzImage(image)) = KernelImage::parse_bytes(&file) {
            let length = file.len() as u64;
            prop_assert!(image.code_offset + image.code_size <= length);
            prop_assert!(image.payload_offset + image.payload_size <= length);
            prop_assert!(image.load_address >= MIB && image.init_size >= image.code_size);
            let _ = image.unpack(&mut Cursor::new(&file));
        }
    }

    #[test]
    fn a_patched_payload_never_panics_nor_exceeds_its_bound(
        format in 0usize..4,
        patches in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let data: Vec<u8> = b"\x7FELF".iter().copied().chain((0..3000).map(|i| (i / 7) as u8)).collect();
        let (_, mut payload) = every_format(&data)[format].clone();
        for (at, byte) in patches {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        if let Ok(unpacked) = unpack(&payload, 4096) {
            prop_assert!(unpacked.len() <= 4096);
        }
    }
}
