//! Where the process begins: pages that each start writes are asked for at once.
//!
//! A position-independent program relocates itself: it writes nearly every page of its data, and each
//! first write is a page fault, of which one costs as much as copying several pages. Start, heap and stack
//! come to more than 50 of the 150 faults of a restore (perf record -e page-faults -d).

use std::hint::black_box;

/// Pages of heap that a machine has touched when it runs.
const HEAP_PAGES: usize = 16;
const PAGE: usize = 4096;

// From the first of the sections that are written to the end of bss, and some pages of stack below what the
// kernel has put there; then on to the C library's entry, with registers as the kernel left them (System V
// ABI for x86-64, section 3.4.1: rdx is 0 without a dynamic loader). A kernel that does not know
// MADV_POPULATE_WRITE (23; before Linux 5.14) refuses, and nothing is lost. Calls are madvise (28). Unit tests
// are linked with this entry as well.
std::arch::global_asm!(
    ".globl hull_start",
    ".hidden hull_start",
    ".type hull_start, @function",
    "hull_start:",
    "lea rdi, [rip + __init_array_start]",
    "and rdi, -4096",
    "lea rsi, [rip + _end]",
    "sub rsi, rdi",
    "mov edx, 23",
    "mov eax, 28",
    "syscall",
    "lea rdi, [rsp - 5 * 4096]",
    "and rdi, -4096",
    "mov esi, 5 * 4096",
    "mov eax, 28",
    "syscall",
    "xor edx, edx",
    "jmp _start",
    ".size hull_start, . - hull_start",
);

/// Has the heap's first pages there. To be called before there is a second arena.
pub fn populate_heap() {
    let first = black_box(Box::new(0u8));
    let start = std::ptr::from_ref(&*first).addr() & !(PAGE - 1);
    // SAFETY: no page changes that is there, and none is mapped that was not. What the heap has not grown to
    // yet is refused.
    unsafe {
        let start = std::ptr::without_provenance_mut(start);
        libc::madvise(start, HEAP_PAGES * PAGE, libc::MADV_POPULATE_WRITE);
    }
}

/// Pages of stack that a copy needs below where it waits for its machine.
const STACK_PAGES: usize = 8;

/// Has some pages of stack there, below what is in use.
pub fn populate_stack() {
    let here = black_box(0u8);
    let start = (std::ptr::from_ref(&here).addr() & !(PAGE - 1)) - STACK_PAGES * PAGE;
    // SAFETY: pages below what the stack has in use mean nothing. What it has not grown to yet is refused.
    unsafe {
        let start = std::ptr::without_provenance_mut(start);
        libc::madvise(start, STACK_PAGES * PAGE, libc::MADV_POPULATE_WRITE);
    }
}

// Where the program and its code lie; the linker says, and only the addresses mean something.
unsafe extern "C" {
    static __executable_start: u8;
    static etext: u8;
}

/// Has all of the program there, for a process that waits and is to be quick afterwards.
pub fn populate_code() {
    let start = (&raw const __executable_start).addr() & !(PAGE - 1);
    let len = (&raw const etext).addr() - start;
    // SAFETY: pages of the program's own file are read.
    unsafe {
        let start = std::ptr::without_provenance_mut(start);
        libc::madvise(start, len, libc::MADV_POPULATE_READ);
    }
}
