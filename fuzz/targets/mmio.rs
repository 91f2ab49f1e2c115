//! The registers of the virtio-mmio transport by themselves: any access in any order, answered as a
//! machine answers, and what the registers say of themselves is always sound.
#![no_main]

use devices::virtio::features;
use devices::virtio::mmio::{Effect, Registers, reg, status};
use libfuzzer_sys::fuzz_target;

const QUEUES: [u16; 3] = [256, 64, 1];
const OWN: u64 = 0x1235;

fuzz_target!(|data: &[u8]| {
    let mut registers = Registers::new(2, OWN, &QUEUES, vec![0; 60]);
    let mut active = false;
    for step in data.chunks_exact(12) {
        let offset = u64::from(u16::from_le_bytes([step[0], step[1]]));
        // Mostly a register, now and then anything.
        let offset = if step[2] < 200 { offset % 64 * 4 } else { offset * 0x10_0001 };
        let len = if step[3] < 200 { 4 } else { 1 + usize::from(step[3]) % 8 };
        let mut bytes = [0xaa; 8];
        registers.read(offset, &mut bytes[..len]);
        match registers.write(offset, &step[4..4 + len]) {
            Effect::Activate => {
                assert!(!active, "activated twice");
                active = true;
            }
            Effect::Reset => {
                registers.finish_reset();
                active = false;
                assert_eq!(registers.status(), 0);
            }
            Effect::Notify(queue) => assert!(usize::from(queue) < QUEUES.len()),
            Effect::Config { offset, data } => {
                assert!((1..=8).contains(&data.len()), "{} bytes at {offset}", data.len());
                registers.publish_config(data);
            }
            Effect::None | Effect::Ignored(_) => {}
        }
        if step[3] == 255 && registers.needs_reset() {
            assert!(registers.is_broken());
        }
        if active {
            let offered = OWN | features::TRANSPORT;
            assert_eq!(registers.negotiated() & !offered, 0, "features that were not offered");
            assert!(registers.negotiated() & features::VERSION_1 != 0);
            assert!(registers.status() & status::FEATURES_OK != 0);
        }
        for (index, state) in registers.ready_queues() {
            assert_eq!(state.max_size, QUEUES[usize::from(index)]);
            assert!(state.ready);
        }
        let mut magic = [0; 4];
        registers.read(reg::MAGIC, &mut magic);
        assert_eq!(&magic, b"virt");
    }
});
