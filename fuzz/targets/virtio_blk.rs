//! A driver of a disk that does anything in any order. The first byte chooses the disk.
#![no_main]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::sync::OnceLock;

use devices::virtio::blk::{Block, Cache, DiskFile, Options};
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

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let file = DiskFile::open(&image(), choice & 8 != 0, false).unwrap();
    let cache = [Cache::Writeback, Cache::Writethrough, Cache::Unsafe][usize::from(choice) % 3];
    let queues = u16::from(choice >> 6) + 1;
    fuzz(Block::new(Options { disk: file.into(), cache, id: "fuzz".into(), queues }), data);
});
