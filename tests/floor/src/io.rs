//! What one system call per request costs: the floor of a disk and of a network interface.

use crate::Result;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const TAP_DEVICE: &str = "/dev/net/tun";
/// The header that a TAP with IFF_VNET_HDR expects before each frame, in virtio 1.x's length.
const NET_HEADER: usize = 12;
/// `_IOW('T', 202, int)` and its neighbours, linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The next of a sequence of numbers that no cache guesses (xorshift64).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Page-aligned memory of `length` bytes, as O_DIRECT wants it; never given back.
fn aligned(length: usize) -> Result<&'static mut [u8]> {
    let layout = std::alloc::Layout::from_size_align(length.max(1), 4096)?;
    // SAFETY: the layout's size is not 0.
    let memory = unsafe { std::alloc::alloc_zeroed(layout) };
    if memory.is_null() {
        return Err("out of memory".into());
    }
    // SAFETY: freshly allocated with that size, and leaked.
    Ok(unsafe { std::slice::from_raw_parts_mut(memory, length) })
}

fn open(path: &str, size: usize, write: bool, direct: bool) -> Result<(File, u64)> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(path)
        .map_err(|error| format!("{path}: {error}"))?;
    let blocks = file.metadata()?.len() / size.max(1) as u64;
    if size == 0 || blocks == 0 {
        return Err("the file holds no block of that size".into());
    }
    Ok((file, blocks))
}

/// Prints ticks per `pread` of `size` bytes at random multiples of `size`. One buffer stays in the
/// processor's first cache, which those of a guest with many requests do not.
pub fn read_at_random(
    path: &str,
    size: &str,
    count: &str,
    buffers: &str,
    direct: bool,
) -> Result<()> {
    let (size, count): (usize, u64) = (size.parse()?, count.parse()?);
    let (file, blocks) = open(path, size, false, direct)?;
    let buffers: usize = buffers.parse()?;
    let memory = aligned(size * buffers.max(1))?;
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let start = ticks();
    let mut at = 0;
    for _ in 0..count {
        let buffer = &mut memory[at..at + size];
        file.read_exact_at(buffer, next(&mut state) % blocks * size as u64)?;
        at = if at + 2 * size > memory.len() { 0 } else { at + size };
    }
    println!("result pread size={size} count={count} ticks={}", (ticks() - start) / count.max(1));
    Ok(())
}

/// Prints ticks per `pwrite`, with an `fdatasync` after every `flush` of them (0: none).
pub fn write_at_random(
    path: &str,
    size: &str,
    count: &str,
    flush: &str,
    direct: bool,
) -> Result<()> {
    let (size, count, flush): (usize, u64, u64) = (size.parse()?, count.parse()?, flush.parse()?);
    let (file, blocks) = open(path, size, true, direct)?;
    let buffer = aligned(size)?;
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let start = ticks();
    for index in 1..=count {
        file.write_all_at(buffer, next(&mut state) % blocks * size as u64)?;
        if flush != 0 && index % flush == 0 {
            file.sync_data()?;
        }
    }
    println!("result pwrite size={size} count={count} ticks={}", (ticks() - start) / count.max(1));
    Ok(())
}

/// Prints ticks per `write` of a frame of `size` bytes to a TAP with virtio headers.
pub fn send_frames(name: &str, size: &str, count: &str) -> Result<()> {
    let (size, count): (usize, u64) = (size.parse()?, count.parse()?);
    let mut tap = OpenOptions::new().read(true).write(true).open(TAP_DEVICE)?;
    // SAFETY: all zeroes is a value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(format!("{name} is too long for an interface").into());
    }
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    let header = NET_HEADER as libc::c_int;
    // SAFETY: both ioctls read the structure they are given, which outlives the call.
    let failed = unsafe {
        libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw const request) < 0
            || libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) < 0
    };
    if failed {
        return Err(format!("{name}: {}", std::io::Error::last_os_error()).into());
    }
    let mut frame = vec![0; NET_HEADER + size.max(14)];
    // To a made-up address, with the ethertype for local experiments: the host drops it.
    frame[NET_HEADER..NET_HEADER + 14]
        .copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    let start = ticks();
    for _ in 0..count {
        tap.write_all(&frame)?;
    }
    println!(
        "result tapwrite size={size} count={count} ticks={}",
        (ticks() - start) / count.max(1)
    );
    Ok(())
}
