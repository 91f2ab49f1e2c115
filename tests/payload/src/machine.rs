//! The bare machine as the payload sees it: ports, the identity map, CPU instructions, exceptions,
//! interrupts and the two ways to end. Everything here works at privilege level 3.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Keyboard controller command port; `RESET_COMMAND` written to it resets the machine.
const I8042_COMMAND: u16 = 0x64;
const RESET_COMMAND: u8 = 0xfe;
/// ACPI sleep control register of Hull's FADT: sleep type 5, sleep enable.
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_S5: u8 = (5 << 2) | 0x20;

unsafe extern "C" {
    static exception_stubs: u8;
    static interrupt_stub: u8;
    static gate_stub: u8;
    fn gate(function: u64, argument: u64) -> u64;
    static image_end: u8;
    static fault_info: [u64; 4];
    static interrupt_count: AtomicU64;
    static cpuid_result: [u32; 4];
    static idt: u8;
    static pdpt: u8;
    static trampoline: u8;
    static trampoline_end: u8;
    static processors_up: AtomicU32;
    static processor_ids: [u8; 256];
    static question_count: u32;
    static question_msr: u32;
    static questions: [[u32; 2]; QUESTIONS];
    static processor_answers: [[[u32; 4]; QUESTIONS]; 64];
    static processor_msrs: [u64; 64];
}

/// Reads one byte from an I/O port.
#[inline(always)]
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: port input does not touch this program's memory.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// Writes one byte to an I/O port.
#[inline(always)]
pub fn out8(port: u16, value: u8) {
    // SAFETY: the ports written here have no way to reach this program's memory.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nomem, nostack)) };
}

/// Writes four bytes to an I/O port.
#[inline(always)]
pub fn out32(port: u16, value: u32) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, eax", in("eax") value, in("dx") port, options(nomem, nostack)) };
}

/// Reads four bytes from an I/O port.
#[inline(always)]
pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `in8`.
    unsafe { asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack)) };
    value
}

/// The time stamp counter, in its ticks, not before earlier loads are done.
#[inline(always)]
pub fn ticks() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    (u64::from(high) << 32) | u64::from(low)
}

/// A full memory barrier: stores before it are visible before loads after it.
#[inline(always)]
pub fn fence() {
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// Reads physical memory or a device register, in one access of `T`'s size.
///
/// Safe although it takes any address: all of the identity map belongs to this one-threaded
/// program, which keeps no reference into the memory that it reaches by address.
#[inline(always)]
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: see above; `T` is an integer or an array of them.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes physical memory or a device register, in one access of `T`'s size. As safe as `read`.
#[inline(always)]
pub fn write<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `read`.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Fills `length` bytes of physical memory.
pub fn fill(address: u64, length: usize, byte: u8) {
    // SAFETY: as in `read`.
    unsafe { core::ptr::write_bytes(address as *mut u8, byte, length) }
}

/// The bytes at a physical address, which nothing may change while they are looked at.
pub fn bytes(address: u64, length: usize) -> &'static [u8] {
    // SAFETY: as in `read`; callers look at what a device or the monitor has finished writing.
    unsafe { core::slice::from_raw_parts(address as *const u8, length) }
}

/// Maps the GiB around an address below 512 GiB, one to one, unless it is mapped; `table` gives a
/// zeroed page for it. False if it has none.
pub fn map(address: u64, table: impl FnOnce() -> Option<u64>) -> bool {
    const LARGE_USER_WRITABLE_PRESENT: u64 = 0x87;
    let entry = &raw const pdpt as u64 + (address >> 30) % 512 * 8;
    if read::<u64>(entry) != 0 {
        return true;
    }
    let Some(table) = table() else { return false };
    for index in 0..512 {
        let page = (address >> 30 << 30) + (index << 21);
        write(table + index * 8, page | LARGE_USER_WRITABLE_PRESENT);
    }
    write(entry, table | 7);
    true
}

/// Puts the code that other processors start with at `target`, below 1 MiB.
pub fn write_trampoline(target: u64) {
    let length = &raw const trampoline_end as u64 - &raw const trampoline as u64;
    for (index, byte) in bytes(&raw const trampoline as u64, length as usize).iter().enumerate() {
        write(target + index as u64, *byte);
    }
}

/// The APIC ids of the processors that have come up, in the order in which they came.
pub fn processors() -> &'static [u8] {
    // SAFETY: an aligned counter that only those processors change, after their ids are written.
    let count = unsafe { processors_up.load(Ordering::SeqCst) };
    bytes(&raw const processor_ids as u64, (count as usize).min(256))
}

/// Most leaves that [`ask_processors`] asks for.
pub const QUESTIONS: usize = 16;

/// Has processors that are started from now on look at leaves and subleaves of CPUID, as many as
/// [`QUESTIONS`], and at a model-specific register unless its number is 0.
pub fn ask_processors(leaves: &[[u32; 2]], register: u32) {
    let places = &raw const questions as u64;
    for (index, question) in leaves.iter().take(QUESTIONS).enumerate() {
        write(places + index as u64 * 8, *question);
    }
    write(&raw const question_count as u64, leaves.len().min(QUESTIONS) as u32);
    write(&raw const question_msr as u64, register);
}

/// What the `nth` processor that came up, of the first 64, saw of the `question`th leaf.
pub fn leaf_of_processor(nth: usize, question: usize) -> [u32; 4] {
    let offset = (nth % 64) * QUESTIONS * 16 + (question % QUESTIONS) * 16;
    read(&raw const processor_answers as u64 + offset as u64)
}

/// What the `nth` processor that came up, of the first 64, saw in the register.
pub fn register_of_processor(nth: usize) -> u64 {
    read(&raw const processor_msrs as u64 + (nth % 64) as u64 * 8)
}

/// The first address after the payload's own image.
pub fn end_of_image() -> u64 {
    &raw const image_end as u64
}

fn call_gate(function: u64, argument: u64) -> u64 {
    // SAFETY: the gate's functions (start.s) keep what the C calling convention wants kept.
    unsafe { gate(function, argument) }
}

/// Shuts the processor down by a fault without an interrupt table.
pub fn triple_fault() {
    call_gate(0, 0);
}

/// Halts until the next interrupt.
pub fn halt() {
    call_gate(1, 0);
}

/// Reads a model specific register.
pub fn rdmsr(register: u32) -> u64 {
    call_gate(2, u64::from(register))
}

/// CPUID as eax, ebx, ecx, edx, asked at level 0: at level 3, PVM lets the host's answer through.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    call_gate(5, u64::from(leaf) | u64::from(subleaf) << 32);
    // SAFETY: written by the gate before it returns.
    unsafe { (&raw const cpuid_result).read_volatile() }
}

/// Turns interrupts on.
pub fn interrupts_on() {
    call_gate(3, 0);
}

/// Turns interrupts off.
pub fn interrupts_off() {
    call_gate(4, 0);
}

/// Interrupts taken on the vectors of `set_interrupt_gate`.
pub fn interrupts() -> u64 {
    // SAFETY: an aligned counter that only the interrupt handler writes.
    unsafe { interrupt_count.load(Ordering::SeqCst) }
}

fn set_gate(vector: u8, handler: u64) {
    let entry = &raw const idt as u64 + u64::from(vector) * 16;
    let low = (handler & 0xffff) | (0x08 << 16) | (0x8e00 << 32) | ((handler >> 16 & 0xffff) << 48);
    write(entry, low);
    write(entry + 8, handler >> 32);
}

/// Sends an interrupt vector to the handler that counts.
pub fn set_interrupt_gate(vector: u8) {
    set_gate(vector, &raw const interrupt_stub as u64);
}

/// Fills the interrupt table: exceptions, and the gate behind one of them. Done here, at level 3,
/// because it takes more instructions than anyone should have to interpret.
pub fn set_up_exceptions() {
    for vector in 0..32u8 {
        set_gate(vector, &raw const exception_stubs as u64 + u64::from(vector) * 16);
    }
    set_gate(6, &raw const gate_stub as u64);
}

/// What the last exception left: vector, error code, instruction pointer, fault address.
pub fn fault() -> [u64; 4] {
    // SAFETY: written by the exception stub before it gets here.
    unsafe { (&raw const fault_info).read_volatile() }
}

/// Resets the machine, which ends the run.
pub fn reset() -> ! {
    loop {
        out8(I8042_COMMAND, RESET_COMMAND);
    }
}

/// Turns the machine off through ACPI's sleep control register. Resets a machine without one.
pub fn power_off() -> ! {
    out8(SLEEP_CONTROL, SLEEP_S5);
    let start = ticks();
    while ticks() - start < 1 << 30 {}
    crate::println!("power off did nothing");
    reset()
}
