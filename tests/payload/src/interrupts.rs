//! Interrupts from devices and from the timer, and other processors: what local APIC and I/O APIC
//! are for. Their registers lie in the MMIO window, so level 3 gets at them.

use crate::boot::Boot;
use crate::machine::{self, out8, read, ticks, write};
use crate::virtio::{ENTROPY, WRITE, find, start};
use crate::{print, println};

/// Local APIC registers (Intel SDM vol. 3 § 11.4).
const LOCAL_APIC: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const TASK_PRIORITY: u64 = 0x80;
const SPURIOUS: u64 = 0xf0;
const COMMAND: u64 = 0x300;
const TIMER: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_DIVIDER: u64 = 0x3e0;
/// I/O APIC: index and data windows (82093AA datasheet § 3.0).
const IO_APIC: u64 = 0xfec0_0000;

/// Line of the machine's own events, as its ACPI tables have it.
const EVENTS: u32 = 5;
const DEVICE_VECTOR: u8 = 0x40;
const TIMER_VECTOR: u8 = 0x41;
/// Ticks to wait for an interrupt.
const PATIENCE: u64 = 1 << 33;
/// Where other processors start; the SIPI's vector is its page number.
const TRAMPOLINE: u64 = 0x6_0000;

fn apic(register: u64, value: u32) {
    write(LOCAL_APIC + register, value);
}

fn set_up_local_apic() {
    // The two 8259s stay out of it.
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    apic(TASK_PRIORITY, 0);
    apic(SPURIOUS, 0x1ff);
}

/// Sends a line of the I/O APIC to this processor, edge triggered.
fn route(line: u32, vector: u8) {
    let id: u32 = read(LOCAL_APIC + ID);
    let entry = 0x10 + line * 2;
    for (index, value) in [(entry + 1, id & 0xff00_0000), (entry, u32::from(vector))] {
        write(IO_APIC, index);
        write(IO_APIC + 0x10, value);
    }
}

/// Waits until `count` interrupts have been taken, spinning or, with `halt`, halted.
fn wait_for(count: u64, halt: bool) -> bool {
    let start = ticks();
    if !halt {
        machine::interrupts_on();
    }
    while machine::interrupts() < count && ticks() - start < PATIENCE {
        if halt {
            machine::halt();
        } else {
            core::hint::spin_loop();
        }
    }
    machine::interrupts_off();
    machine::interrupts() >= count
}

/// Asks an entropy device for `count=` reads and waits for the interrupt of each, with `halt=1` in
/// the halted state; prints how many came, what the device said they were for, and ticks.
pub fn interrupts(boot: &Boot) {
    let Some(device) = find(boot, ENTROPY) else { return };
    let Some((_, [mut queue])) = start::<1>(boot, &device, 0, 64) else { return };
    let Some(buffer) = boot.allocate(4096) else { return };
    let count = boot.number("count", 10);
    let halt = boot.flag("halt");
    machine::set_interrupt_gate(DEVICE_VECTOR);
    set_up_local_apic();
    route(device.line, DEVICE_VECTOR);
    let (mut reasons, mut completed) = (0, 0u64);
    let begin = ticks();
    for round in 1..=count {
        queue.want_interrupts(true);
        queue.describe(0, buffer, 64, WRITE, 0);
        queue.offer(0);
        queue.publish(&device);
        if !wait_for(round, halt) {
            break;
        }
        reasons |= device.acknowledge_interrupt();
        while queue.poll().is_some() {
            completed += 1;
        }
    }
    let each = (ticks() - begin) / count.max(1);
    println!(
        "result irq line={} interrupts={} completed={completed} status={reasons:#x} ticks={each}",
        device.line,
        machine::interrupts(),
    );
}

/// Takes `count=` interrupts of the local APIC's timer, `period=` bus cycles apart.
pub fn timer(boot: &Boot) {
    let count = boot.number("count", 10);
    let period = boot.number("period", 1_000_000) as u32;
    machine::set_interrupt_gate(TIMER_VECTOR);
    set_up_local_apic();
    apic(TIMER_DIVIDER, 0b1011);
    let begin = ticks();
    for round in 1..=count {
        apic(TIMER, u32::from(TIMER_VECTOR));
        apic(TIMER_COUNT, period);
        if !wait_for(round, boot.flag("halt")) {
            break;
        }
    }
    let each = (ticks() - begin) / count.max(1);
    println!("result timer interrupts={} ticks={each}", machine::interrupts());
}

/// Halts until the machine's events (GED) say that something happened: that this is a copy by now.
pub fn halt_until_told() {
    machine::set_interrupt_gate(DEVICE_VECTOR);
    set_up_local_apic();
    route(EVENTS, DEVICE_VECTOR);
    let before = machine::interrupts();
    while machine::interrupts() == before {
        machine::halt();
    }
}

/// Starts all other processors and waits until there are as many as expected, this one included.
/// Returns this one's APIC id.
fn start_others(expected: usize) -> u32 {
    const INIT_OTHERS: u32 = 0x000c_4500;
    const START_OTHERS: u32 = 0x000c_4600;
    let this = read::<u32>(LOCAL_APIC + ID) >> 24;
    machine::write_trampoline(TRAMPOLINE);
    set_up_local_apic();
    apic(COMMAND, INIT_OTHERS);
    let start = ticks();
    // The 10 ms that the specification asks for between INIT and SIPI, and more.
    while ticks() - start < 1 << 25 {}
    apic(COMMAND, START_OTHERS | (TRAMPOLINE >> 12) as u32);
    let start = ticks();
    while machine::processors().len() + 1 < expected && ticks() - start < PATIENCE {
        core::hint::spin_loop();
    }
    // A little longer, for those that nobody expects.
    let start = ticks();
    while ticks() - start < 1 << 26 {}
    this
}

/// Starts all other processors and waits until `cpus=`, this one included, are there.
pub fn processors(boot: &Boot) {
    let this = start_others(boot.number("cpus", 1) as usize);
    print!("result smp cpus={} first={this} others=", machine::processors().len() + 1);
    let mut first = true;
    for id in (0..=255).filter(|id| machine::processors().contains(id)) {
        print!("{}{id}", if first { "" } else { "," });
        first = false;
    }
    println!("");
}

/// Prints what each of `cpus=` processors, up to 64, sees of itself: the leaves of CPUID that speak of features
/// and topology, the one of `leaf=` and `sub=`, and the model-specific register `msr=`.
pub fn identities(boot: &Boot) {
    let leaves = [
        [0x1, 0],
        [0x4, 0],
        [0x4, 3],
        [0x7, 0],
        [0xb, 0],
        [0xb, 1],
        [0x1f, 1],
        [0x8000_0001, 0],
        [0x8000_0008, 0],
        [0x8000_001d, 0],
        [0x8000_001d, 3],
        [0x8000_001e, 0],
        [boot.number("leaf", 0) as u32, boot.number("sub", 0) as u32],
    ];
    let register = boot.number("msr", 0) as u32;
    machine::ask_processors(&leaves, register);
    let this = start_others(boot.number("cpus", 1) as usize);
    let line = |id: u32, [leaf, subleaf]: [u32; 2], [eax, ebx, ecx, edx]: [u32; 4]| {
        println!("cpu {id} cpuid {leaf:08x} {subleaf} {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}");
    };
    for leaf in leaves {
        line(this, leaf, machine::cpuid(leaf[0], leaf[1]));
    }
    if register != 0 {
        println!("cpu {this} msr {register:#x} {:#x}", machine::rdmsr(register));
    }
    for (nth, &id) in machine::processors().iter().take(64).enumerate() {
        for (question, leaf) in leaves.into_iter().enumerate() {
            line(u32::from(id), leaf, machine::leaf_of_processor(nth, question));
        }
        if register != 0 {
            println!("cpu {id} msr {register:#x} {:#x}", machine::register_of_processor(nth));
        }
    }
    println!("result cpus n={}", machine::processors().len() + 1);
}
