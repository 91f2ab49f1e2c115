//! What the monitor hands over: command line and memory map, by the Linux boot protocol
//! (boot_params, `Documentation/arch/x86/zero-page.rst`) or by PVH (`hvm_start_info`, Xen's
//! `public/arch-x86/hvm/start_info.h`).

use crate::machine::{bytes, end_of_image, fill, read};
use core::cell::Cell;

const MAXIMUM_RANGES: usize = 32;
const USABLE: u32 = 1;
/// Scratch memory starts here, out of the way of the image and of what lies in low memory.
const SCRATCH: u64 = 4 << 20;

/// One entry of the memory map, in bytes.
#[derive(Clone, Copy, Default)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length.
    pub length: u64,
    /// E820 type: 1 is RAM.
    pub kind: u32,
}

/// The machine as it was handed over.
pub struct Boot {
    /// `linux` or `pvh`.
    pub protocol: &'static str,
    /// The kernel command line.
    pub command_line: &'static str,
    ranges: [Range; MAXIMUM_RANGES],
    count: usize,
    next: Cell<u64>,
}

fn string_at(address: u64) -> &'static str {
    if address == 0 {
        return "";
    }
    let mut length = 0;
    while length < 65536 && read::<u8>(address + length) != 0 {
        length += 1;
    }
    core::str::from_utf8(bytes(address, length as usize)).unwrap_or("")
}

impl Boot {
    /// Reads the structure at `info`: `boot_params` for protocol 0, `hvm_start_info` for 1.
    pub fn new(info: u64, protocol: u64) -> Self {
        let mut boot = Boot {
            protocol: if protocol == 0 { "linux" } else { "pvh" },
            command_line: "",
            ranges: [Range::default(); MAXIMUM_RANGES],
            count: 0,
            next: Cell::new(SCRATCH.max(end_of_image())),
        };
        if protocol == 0 {
            let high = u64::from(read::<u32>(info + 0xc8)) << 32;
            boot.command_line = string_at(high | u64::from(read::<u32>(info + 0x228)));
            for entry in 0..u64::from(read::<u8>(info + 0x1e8)) {
                let at = info + 0x2d0 + entry * 20;
                boot.add(read_u64(at), read_u64(at + 8), read_u32(at + 16));
            }
        } else {
            boot.command_line = string_at(read::<u64>(info + 24));
            // The memory map came with version 1 of the structure.
            if read::<u32>(info + 4) >= 1 {
                let table = read::<u64>(info + 40);
                for entry in 0..u64::from(read::<u32>(info + 48)) {
                    let at = table + entry * 24;
                    boot.add(read_u64(at), read_u64(at + 8), read_u32(at + 16));
                }
            }
        }
        boot
    }

    fn add(&mut self, start: u64, length: u64, kind: u32) {
        if let Some(range) = self.ranges.get_mut(self.count) {
            *range = Range { start, length, kind };
            self.count += 1;
        }
    }

    /// The memory map.
    pub fn ranges(&self) -> &[Range] {
        self.ranges.get(..self.count).unwrap_or(&[])
    }

    /// The RAM ranges of the memory map.
    pub fn ram(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges().iter().copied().filter(|range| range.kind == USABLE)
    }

    /// The value of `name=` on the command line, without its name.
    pub fn argument(&self, name: &str) -> Option<&'static str> {
        self.command_line
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .find_map(|(key, value)| (key == name).then_some(value))
    }

    /// The number after `name=`, with an optional K, M or G for powers of 1024.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        self.argument(name).and_then(number).unwrap_or(default)
    }

    /// Whether `name=1` (or any other number than 0) is on the command line.
    pub fn flag(&self, name: &str) -> bool {
        self.number(name, 0) != 0
    }

    /// Takes zeroed scratch memory, page-aligned, for the rest of the run. `None` if the RAM range
    /// of the image has no such space left.
    pub fn allocate(&self, length: u64) -> Option<u64> {
        let start = self.next.get();
        let end = start.checked_add(length)?.checked_next_multiple_of(4096)?;
        self.ram().find(|range| range.start <= start && end <= range.start + range.length)?;
        self.next.set(end);
        fill(start, length as usize, 0);
        Some(start)
    }
}

/// Parses decimal or 0x-prefixed hexadecimal digits with an optional K, M or G.
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16).ok()?,
        None => digits.parse().ok()?,
    };
    value.checked_shl(shift)
}

// E820 entries are packed: 20 bytes each, so every other one is unaligned.
fn read_u32(address: u64) -> u32 {
    u32::from_le_bytes(read::<[u8; 4]>(address))
}

fn read_u64(address: u64) -> u64 {
    u64::from_le_bytes(read::<[u8; 8]>(address))
}
