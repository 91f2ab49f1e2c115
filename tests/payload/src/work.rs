//! Memory at work: what is dirtied, written over and over, and how long the machine stood still
//! meanwhile. A key on COM1 starts each part, so that what is measured lies between two of them.

use crate::boot::Boot;
use crate::machine::{self, read, ticks, write};
use crate::{basic, interrupts, println, serial, virtio};

/// What is dirtied and written to starts here, behind the image and the scratch memory.
pub const FIRST: u64 = 16 << 20;
/// Bytes that a page has, and a line of the cache.
const PAGE: u64 = 4096;
const LINE: u64 = 64;
/// Looks at the clock from one look at the keyboard, which is an exit, to the next.
const LOOKS: u32 = 10_000;

/// Makes `length` bytes from `start` on dirty, a word in each page. Nothing in them is zero
/// afterwards, so that each page has to be kept. False if they cannot be reached.
pub fn dirty(boot: &Boot, start: u64, length: u64) -> bool {
    stamp(boot, start, length, 0)
}

/// What a page has after so many laps.
fn word(page: u64, lap: u64) -> u64 {
    lap << 48 | page | 1
}

fn stamp(boot: &Boot, start: u64, length: u64, lap: u64) -> bool {
    (start..start + length).step_by(PAGE as usize).all(|page| {
        let there = machine::map(page, || boot.allocate(PAGE));
        if there {
            write(page, word(page, lap));
        }
        there
    })
}

/// Does what is typed:
///
/// - `d` dirties `dirty=` bytes that were not touched before;
/// - `s` writes a word to each line of a working set of `size=` bytes, `rounds=` times over, and
///   prints the ticks of a round;
/// - `c` looks whether all that was dirtied so is as it was;
/// - `i` prints the first bytes of the identity pages;
/// - `h` halts until the machine is told of something, which a copy is at once; says `woken`, and halts
///   again;
/// - `p` prints the ticks of the longest pause between two looks at the clock since the last key;
/// - `q` ends it.
///
/// With `every=` it does laps, so many ticks apart, which nobody has to ask for: it looks whether what was
/// dirtied is as it was and writes something else there, so that copies of one machine that have a page in
/// common find out. `ids=1` prints the identity pages in each, `net=1` what the first card says of itself. `disk=` does the same with so many blocks of the
/// first disk, and flushes them.
pub fn scenario(boot: &Boot) {
    let (size, rounds) = (boot.number("size", 1 << 20), boot.number("rounds", 1).max(1));
    let length = boot.number("dirty", 0);
    // Behind the working set, which has to be reachable from the beginning.
    let first = FIRST + size.next_multiple_of(PAGE);
    let mut next = first;
    if !dirty(boot, FIRST, size) {
        return;
    }
    let mut disk = match boot.number("disk", 0) {
        0 => None,
        blocks => virtio::blk::Known::new(boot, blocks),
    };
    let card = if boot.flag("net") { virtio::net::Watched::new(boot) } else { None };
    println!("ready");
    let (every, mut lap) = (boot.number("every", 0), 0);
    let mut due = ticks() + every;
    let mut longest = 0;
    let mut last = ticks();
    loop {
        for _ in 0..LOOKS {
            let now = ticks();
            longest = longest.max(now - last);
            last = now;
        }
        if every > 0 && last > due && next > first {
            match lost(first, next, lap) {
                None => println!("result work lap={lap} pages={}", (next - first) / PAGE),
                Some(page) => println!("result work lap={lap} lost={page:#x}"),
            }
            if boot.flag("ids") {
                basic::ids(boot);
            }
            if let Some(card) = &card {
                card.lap();
            }
            if let Some(disk) = &mut disk {
                disk.lap();
            }
            lap += 1;
            stamp(boot, first, next - first, lap);
            due = ticks() + every;
        }
        match serial::get() {
            Some(b'd') if stamp(boot, next, length, lap) => {
                next += length;
                println!("dirty");
            }
            Some(b's') => println!("result work ticks={}", sweep(size, rounds)),
            Some(b'c') => match lost(first, next, lap) {
                None => println!("result work pages={}", (next - first) / PAGE),
                Some(page) => println!("result work lost={page:#x}"),
            },
            Some(b'i') => basic::ids(boot),
            Some(b'h') => {
                println!("halted");
                loop {
                    interrupts::halt_until_told();
                    println!("woken");
                }
            }
            Some(b'p') => println!("result work pause={longest}"),
            Some(b'd' | b'q') => return,
            _ => continue,
        }
        longest = 0;
        last = ticks();
    }
}

/// A page from `start` to `end` that is not as it was left in this lap.
fn lost(start: u64, end: u64, lap: u64) -> Option<u64> {
    (start..end).step_by(PAGE as usize).find(|&page| read::<u64>(page) != word(page, lap))
}

/// Ticks of a round over the working set.
fn sweep(size: u64, rounds: u64) -> u64 {
    let start = ticks();
    for round in 0..rounds {
        for line in (FIRST..FIRST + size).step_by(LINE as usize) {
            write(line, round | 1);
        }
    }
    (ticks() - start) / rounds
}
