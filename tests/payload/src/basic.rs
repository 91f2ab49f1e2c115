//! Scenarios without devices: console, memory, CPU, endings, exit costs.

use crate::boot::Boot;
use crate::machine::{self, in8, in32, out8, out32, read, ticks, write};
use crate::{print, println, serial, work};

/// Where a guest tells Firecracker, and Hull, that it has booted.
const BOOT_TIMER: u64 = 0xd000_0000;
const BOOT_TIMER_VALUE: u8 = 123;
/// Pages in which Hull keeps VM generation id and VM clock.
const GENERATION_ID: u64 = 0xcfff_e000;
const VM_CLOCK: u64 = 0xcfff_f000;
/// Linux's choice for a port that nobody answers.
const UNUSED_PORT: u16 = 0x80;
/// Port of the paravirtual panic device.
const PANIC_PORT: u16 = 0x505;

/// Says hello.
///
/// With `bare=1` it is a line end alone: a guest that does as little as the floor does, one port
/// write and the end.
pub fn hello(boot: &Boot) {
    serial::put_all(if boot.number("bare", 0) == 1 { b"\n" } else { b"hello\n" });
}

/// Says hello, dirties `dirty=` bytes of memory from 16 MiB on, and loops for ever; with `say=1`
/// prints a dot, or the character of number `byte=`, each `every=` ticks.
pub fn spin(boot: &Boot) {
    if !work::dirty(boot, work::FIRST, boot.number("dirty", 0)) {
        return;
    }
    serial::put_all(b"hello\n");
    let (say, every) = (boot.flag("say"), boot.number("every", 1 << 30));
    let byte = boot.number("byte", u64::from(b'.')) as u8;
    let mut next = ticks() + every;
    loop {
        if ticks() > next {
            if say {
                serial::put(byte);
            }
            next = ticks() + every;
        }
    }
}

/// Sends back what is typed, until a `q`.
pub fn echo(_: &Boot) {
    println!("ready");
    loop {
        match serial::get() {
            Some(b'q') => break,
            Some(byte) => serial::put(byte),
            None => core::hint::spin_loop(),
        }
    }
    println!("bye");
}

/// Halts with nothing to wake it up.
pub fn halt(_: &Boot) {
    println!("halting");
    loop {
        machine::halt();
    }
}

/// Triple-faults.
pub fn triple(_: &Boot) {
    println!("faulting");
    machine::triple_fault();
}

/// Executes an undefined instruction, to show that exceptions are reported.
pub fn fault(_: &Boot) {
    // SAFETY: raises an exception, whose handler does not come back here.
    unsafe { core::arch::asm!("ud2") };
}

/// Writes the boot timer's value.
pub fn boot_timer(_: &Boot) {
    write(BOOT_TIMER, BOOT_TIMER_VALUE);
    println!("booted");
}

/// Says `times=` times that it panicked, if there is a device to be told.
pub fn panic_device(boot: &Boot) {
    let events = in8(PANIC_PORT);
    println!("pvpanic events={events:#x}");
    for _ in 0..boot.number("times", 1) {
        out8(PANIC_PORT, events & 1);
    }
}

/// Prints the CPUID leaves, a line each: leaf, subleaf, eax, ebx, ecx, edx in hexadecimal.
pub fn cpuid(_: &Boot) {
    for base in [0, 0x4000_0000, 0x8000_0000u32] {
        let [last, ..] = machine::cpuid(base, 0);
        if last < base || last - base > 0x100 {
            continue;
        }
        for leaf in base..=last {
            let subleaves = match leaf {
                4 | 7 | 0xb | 0xd | 0x1f | 0x8000_001d => 8,
                _ => 1,
            };
            for subleaf in 0..subleaves {
                let [eax, ebx, ecx, edx] = machine::cpuid(leaf, subleaf);
                if subleaf > 0 && eax == 0 && ebx == 0 && edx == 0 {
                    continue;
                }
                println!("cpuid {leaf:08x} {subleaf} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}");
            }
        }
    }
}

/// Sends `size=` bytes to the UART, then `done`.
pub fn serial_flood(boot: &Boot) {
    let count = boot.number("size", 1 << 20);
    for index in 0..count {
        serial::put(if index % 64 == 63 { b'\n' } else { b'0' + (index % 64) as u8 });
    }
    println!("done");
}

/// Prints protocol and command line.
pub fn command_line(boot: &Boot) {
    println!("protocol {}", boot.protocol);
    println!("cmdline {}", boot.command_line);
}

/// Prints the memory map and writes and reads back the first and last page of each RAM range.
pub fn memory(boot: &Boot) {
    let mut total = 0;
    for range in boot.ranges() {
        println!("range {:#x} {:#x} {}", range.start, range.length, range.kind);
    }
    let mut bad = 0;
    for range in boot.ram() {
        total += range.length;
        let first = range.start.next_multiple_of(4096);
        let last = ((range.start + range.length) & !4095).saturating_sub(4096);
        for page in [first, last] {
            // What lies low is in use: tables of the monitor, and this program.
            if page < machine::end_of_image() || page < first {
                continue;
            }
            if !machine::map(page, || boot.allocate(4096)) {
                return;
            }
            let before: u64 = read(page);
            write(page, !before);
            if read::<u64>(page) != !before {
                println!("bad {page:#x}");
                bad += 1;
            }
            write(page, before);
        }
    }
    println!("result ram={total} bad={bad}");
}

/// Prints the first bytes of the identity pages.
pub fn ids(_: &Boot) {
    for (name, address) in [("vmgenid", GENERATION_ID), ("vmclock", VM_CLOCK)] {
        print!("{name} ");
        for index in 0..64u64 {
            print!("{:02x}", read::<u8>(address + index));
        }
        println!("");
    }
}

/// Measures `n=` exits of `kind=out|in|mmio`, in ticks per exit.
pub fn exits(boot: &Boot) {
    let count = boot.number("n", 1000).max(1);
    let kind = boot.argument("kind").unwrap_or("out");
    // Both widths, so that a monitor that tells them apart is exercised on both.
    out32(UNUSED_PORT, 0);
    in32(UNUSED_PORT);
    let start = ticks();
    for _ in 0..count {
        match kind {
            "in" => drop(in8(UNUSED_PORT)),
            "mmio" => drop(read::<u32>(BOOT_TIMER + 0xff8)),
            _ => out8(UNUSED_PORT, 0),
        }
    }
    println!("result exits kind={kind} n={count} ticks={}", (ticks() - start) / count);
}

/// Prints model specific register `n=`.
pub fn msr(boot: &Boot) {
    let number = boot.number("n", 0x10) as u32;
    println!("result msr n={number:#x} value={:#x}", machine::rdmsr(number));
}
