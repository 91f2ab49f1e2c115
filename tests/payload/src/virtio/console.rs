//! Console device (virtio 1.3 § 5.3): echo, and the size of the terminal.

use core::fmt::{self, Write};

use super::mmio::Transport;
use super::queue::Queue;
use super::{CONSOLE, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{bytes, ticks, write};
use crate::println;

const F_SIZE: u64 = 1 << 0;
const F_EMERGENCY_WRITE: u64 = 1 << 2;
/// All that this driver knows.
pub const FEATURES: u64 = F_SIZE | F_EMERGENCY_WRITE;
const PATIENCE: u64 = 1 << 34;
const BUFFER: u32 = 1024;

fn size(device: &Transport) -> (u16, u16) {
    (device.config(0), device.config(2))
}

/// Says `ready` on the device, sends back what it receives until a `q`; reports the size of the
/// terminal, and each new one, on the device as well. `idle=` ticks without input end it too.
pub fn scenario(boot: &Boot) {
    let Some(device) = find(boot, CONSOLE) else { return };
    let Some((features, [mut rx, mut tx])) = start::<2>(boot, &device, FEATURES, 64) else {
        return;
    };
    let Some(input) = boot.allocate(u64::from(BUFFER) * 4) else { return };
    let Some(output) = boot.allocate(u64::from(BUFFER)) else { return };
    if boot.flag("emergency") {
        device_emergency(&device, features);
    }
    for slot in 0..4u16 {
        rx.describe(slot, input + u64::from(BUFFER) * u64::from(slot), BUFFER, WRITE, 0);
        rx.offer(slot);
    }
    rx.publish(&device);
    let mut known = size(&device);
    if features & F_SIZE != 0 {
        send_size(&device, &mut tx, output, known);
    }
    send(&device, &mut tx, output, b"ready\n");
    let idle = boot.number("idle", 1 << 38);
    let (mut octets, mut last) = (0u64, ticks());
    let mut looks = 0u64;
    'input: while ticks() - last < idle {
        if let Some((slot, length)) = rx.poll() {
            last = ticks();
            let at = input + u64::from(BUFFER) * u64::from(slot);
            let text = bytes(at, length.min(BUFFER) as usize);
            octets += text.len() as u64;
            send(&device, &mut tx, output, text);
            if text.contains(&b'q') {
                break 'input;
            }
            rx.offer(slot);
            rx.publish(&device);
        }
        // Looking costs an exit, so not at every turn.
        looks += 1;
        if looks.is_multiple_of(1_000_000) && features & F_SIZE != 0 && size(&device) != known {
            known = size(&device);
            send_size(&device, &mut tx, output, known);
        }
    }
    println!("result console features={features:#x} bytes={octets}");
}

fn device_emergency(device: &Transport, features: u64) {
    if features & F_EMERGENCY_WRITE != 0 {
        for byte in b"emergency\n" {
            write(device.base + super::mmio::register::CONFIG + 8, u32::from(*byte));
        }
    }
}

/// A line of text, as long as `size` makes it at most.
#[derive(Default)]
struct Line {
    text: [u8; 32],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = self.text.get_mut(self.length..).and_then(|rest| rest.get_mut(..text.len()));
        rest.ok_or(fmt::Error)?.copy_from_slice(text.as_bytes());
        self.length += text.len();
        Ok(())
    }
}

fn send_size(device: &Transport, tx: &mut Queue, at: u64, (columns, rows): (u16, u16)) {
    let mut line = Line::default();
    // Two numbers of five digits fit.
    let _ = writeln!(line, "size {columns} {rows}");
    send(device, tx, at, &line.text[..line.length]);
}

fn send(device: &Transport, tx: &mut Queue, at: u64, text: &[u8]) {
    for (index, byte) in text.iter().enumerate() {
        write(at + index as u64, *byte);
    }
    tx.describe(0, at, text.len() as u32, 0, 0);
    tx.offer(0);
    tx.publish(device);
    if tx.wait(PATIENCE).is_none() {
        println!("console: output is stuck");
    }
}
