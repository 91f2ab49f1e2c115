//! Entropy device (virtio 1.3 § 5.4).

use super::{ENTROPY, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{bytes, ticks};
use crate::{print, println};

/// Ticks to wait for a device that should answer at once.
const PATIENCE: u64 = 1 << 34;

/// Reads `size=` bytes `count=` times, prints the last ones in hexadecimal and ticks per read.
pub fn scenario(boot: &Boot) {
    let Some(device) = find(boot, ENTROPY) else { return };
    let Some((features, [mut queue])) = start::<1>(boot, &device, 0, 64) else { return };
    let size = boot.number("size", 16).clamp(1, 65536);
    let count = boot.number("count", 1).max(1);
    let Some(buffer) = boot.allocate(size) else { return };
    let begin = ticks();
    let mut length = 0;
    for _ in 0..count {
        queue.describe(0, buffer, size as u32, WRITE, 0);
        queue.offer(0);
        queue.publish(&device);
        match queue.wait(PATIENCE) {
            Some((0, written)) if u64::from(written) <= size => length = written,
            other => {
                println!("rng: unexpected completion {other:?}");
                return;
            }
        }
    }
    let each = (ticks() - begin) / count;
    print!("bytes ");
    bytes(buffer, length as usize).iter().take(64).for_each(|byte| print!("{byte:02x}"));
    println!("");
    println!("result rng features={features:#x} size={length} count={count} ticks={each}");
}
