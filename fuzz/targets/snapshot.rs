//! Any state file of a snapshot, and any state in it. The checksum is made right, which is not to be found
//! by chance.
#![no_main]

use devices::acpi::AcpiRegisters;
use devices::i8042::I8042;
use devices::serial::Serial;
use devices::virtio::mmio::Registers;
use libfuzzer_sys::fuzz_target;
use vmm::hypervisor::state::{VcpuState, VmState};
use vmm::memory::Runs;
use vmm::snapshot;

/// A header that is always the same.
const HEADER: &str = r#"{ "hull": "0", "created-ms": 1, "config": {}, "disks": [],
    "memory": { "id": "a1", "aside": "a1", "size": 4096, "data": 0, "samples": [] } }"#;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let file = match choice & 3 {
        0 => data.to_vec(),
        1 => {
            let (header, payloads) = data.split_at(data.len().min(usize::from(choice)));
            snapshot::sealed(header, payloads)
        }
        _ => snapshot::sealed(HEADER.as_bytes(), data),
    };
    let Ok(state) = snapshot::parse(&file) else { return };
    // What was read is what would be written.
    let again = snapshot::write(&state).map(|file| snapshot::parse(&file));
    assert!(again.is_ok_and(|again| again.is_ok_and(|again| again == state)));
    for part in &state.parts {
        let payload = &part.payload;
        // Each takes what is its own, whole, or leaves things as they are.
        let (mut serial, mut keyboard) = (Serial::new(), I8042::new(true));
        let (mut acpi, mut registers) =
            (AcpiRegisters::default(), Registers::new(2, 0, &[256], vec![0; 8]));
        if serial.restore(payload).is_ok() {
            serial.write(0, b"x");
            serial.input(b"y");
        }
        if keyboard.restore(payload).is_ok() {
            assert_eq!(keyboard.save(), *payload);
            let _ = keyboard.ctrl_alt_del();
        }
        if acpi.restore(payload).is_ok() {
            assert_eq!(acpi.save(), *payload);
        }
        if let Ok(interrupt) = registers.restore(payload, vec![0; 8]) {
            let saved = registers.save(interrupt);
            let mut again = Registers::new(2, 0, &[256], Vec::new());
            assert_eq!(again.restore(&saved, vec![0; 8]), Ok(interrupt));
            assert_eq!(again, registers);
        }
        if let Some(pages) = Runs::from_bytes(&payload.bytes) {
            assert_eq!(Runs::from_bytes(&pages.to_bytes()), Some(pages));
        }
        let _ = VcpuState::restore(payload).map(|state| assert_eq!(state.save(), *payload));
        let _ = VmState::restore(payload).map(|state| assert_eq!(state.save(), *payload));
    }
});
