//! A guest "kernel" of a few dozen KiB that tests and benches boot in place of Linux.
//!
//! The command line chooses what it does: `payload=NAME key=value …`. Words it does not know are
//! ignored, except `virtio_mmio.device=SIZE@ADDRESS:IRQ`, by which devices are found. It talks on
//! COM1 and ends by a reset through port 0x64, by ACPI poweroff with `end=poweroff`, or not at all with
//! `end=halt`. README.md lists the scenarios and what each prints.

#![no_std]
#![no_main]

mod basic;
mod boot;
mod hostile;
mod interrupts;
mod machine;
mod serial;
mod virtio;
mod work;

use boot::Boot;

core::arch::global_asm!(include_str!("start.s"));

type Scenario = fn(&Boot);

const SCENARIOS: &[(&str, Scenario)] = &[
    ("hello", basic::hello),
    ("spin", basic::spin),
    ("echo", basic::echo),
    ("halt", basic::halt),
    ("triple", basic::triple),
    ("fault", basic::fault),
    ("boottimer", basic::boot_timer),
    ("pvpanic", basic::panic_device),
    ("cpuid", basic::cpuid),
    ("serialflood", basic::serial_flood),
    ("cmdline", basic::command_line),
    ("mem", basic::memory),
    ("ids", basic::ids),
    ("exits", basic::exits),
    ("msr", basic::msr),
    ("work", work::scenario),
    ("hostile", hostile::scenario),
    ("irq", interrupts::interrupts),
    ("timer", interrupts::timer),
    ("smp", interrupts::processors),
    ("cpus", interrupts::identities),
    ("balloon", virtio::balloon::scenario),
    ("rng", virtio::rng::scenario),
    ("blk", virtio::blk::scenario),
    ("net", virtio::net::scenario),
    ("mmds", virtio::mmds::scenario),
    ("console", virtio::console::scenario),
    ("vsock", virtio::vsock::scenario),
];

/// Called by start.s at privilege level 3.
#[unsafe(no_mangle)]
extern "C" fn payload_main(info: u64, protocol: u64) -> ! {
    let boot = Boot::new(info, protocol);
    let name = boot.argument("payload").unwrap_or("hello");
    match SCENARIOS.iter().find(|(known, _)| *known == name) {
        Some((_, scenario)) => {
            if name != "hello" {
                machine::set_up_exceptions();
            }
            scenario(&boot);
        }
        None => println!("payload: no scenario {name}"),
    }
    match boot.argument("end") {
        Some("poweroff") => machine::power_off(),
        Some("halt") => basic::halt(&boot),
        _ => {}
    }
    machine::reset()
}

/// Called by start.s at privilege level 3 after an exception.
#[unsafe(no_mangle)]
extern "C" fn payload_fault() -> ! {
    let [vector, error, rip, address] = machine::fault();
    println!("payload: exception {vector} error {error:#x} at {rip:#x}, address {address:#x}");
    machine::reset()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    println!("payload: {info}");
    machine::reset()
}
