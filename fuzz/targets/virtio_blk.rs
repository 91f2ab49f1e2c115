//! A driver of a disk that does anything in any order. The first byte chooses the disk: raw, an overlay,
//! or a qcow2 image.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::sync::OnceLock;

use devices::virtio::blk::overlay::Overlay;
use devices::virtio::blk::qcow2::{Access, Qcow2};
use devices::virtio::blk::{Backing, Block, Cache, DiskFile, Options};
use devices::virtio::conformance::fuzz;
use libfuzzer_sys::fuzz_target;

/// A file of 1 MiB in memory, the same for all inputs.
fn image() -> PathBuf {
    static IMAGE: OnceLock<File> = OnceLock::new();
    let file = IMAGE.get_or_init(|| {
        // SAFETY: the name is a C string; the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), 0)) };
        file.set_len(1 << 20).unwrap();
        file
    });
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// An overlay of 1 MiB of its own for each input, over one base.
fn overlay(read_only: bool) -> Backing {
    let name = |what| std::env::temp_dir().join(format!("fuzz-{}.{what}", std::process::id()));
    let (base, top) = (name("base"), name("overlay"));
    if !base.exists() {
        File::create(&base).unwrap().set_len(1 << 20).unwrap();
    }
    let _ = std::fs::remove_file(&top);
    drop(Overlay::open_or_create(&top, &base, false, false).unwrap());
    Overlay::open(&top, read_only, false).unwrap().into()
}

/// An empty image with a disk of 1 MiB and clusters of 4 KiB: header, refcount table, refcount block, L1 table.
fn qcow2(read_only: bool) -> Backing {
    let mut image = vec![0; 4 << 12];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &12_u32.to_be_bytes());
    put(24, &(1_u64 << 20).to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3_u64 << 12).to_be_bytes());
    put(48, &(1_u64 << 12).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(1 << 12, &(2_u64 << 12).to_be_bytes());
    put(2 << 12, &[0, 1, 0, 1, 0, 1, 0, 1]);
    let path = std::env::temp_dir().join(format!("fuzz-{}.qcow2", std::process::id()));
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, image).unwrap();
    Qcow2::open(&path, Access { read_only, ..Access::default() }).unwrap().into()
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let read_only = choice & 8 != 0;
    let disk = match choice & 48 {
        16 | 48 => overlay(read_only),
        32 => qcow2(read_only),
        _ => DiskFile::open(&image(), read_only, false).unwrap().into(),
    };
    let cache = [Cache::Writeback, Cache::Writethrough, Cache::Unsafe][usize::from(choice) % 3];
    let queues = u16::from(choice >> 6) + 1;
    fuzz(Block::new(Options { disk, cache, id: "fuzz".into(), queues }), data);
});
