//! Balloon (virtio 1.3 § 5.5). A test steps through it by typing: each line of output waits for a
//! key, so that the host's memory can be looked at in between.

use super::mmio::{Transport, register};
use super::queue::Queue;
use super::{BALLOON, NEXT, WRITE, find, start};
use crate::boot::Boot;
use crate::machine::{fill, read, ticks, write};
use crate::{println, serial};

const F_STATS: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const PAGE: u64 = 4096;
/// Pages in one request, as Linux has it.
const LIST: u64 = 256;
/// Ticks to wait for an answer.
const PATIENCE: u64 = 1 << 34;

/// Prints what is offered; `op=` then chooses what is done.
pub fn scenario(boot: &Boot) {
    let Some(device) = find(boot, BALLOON) else { return };
    match boot.argument("op").unwrap_or("info") {
        "info" => info(boot, &device),
        "pages" => pages(boot, &device),
        "stats" => statistics(boot, &device),
        "hostile" => hostile(boot, &device),
        other => println!("balloon: no op {other}"),
    }
}

/// Says where it stands and waits for a key.
fn step(name: &str) {
    println!("{name}");
    while serial::get().is_none() {
        core::hint::spin_loop();
    }
}

fn target(device: &Transport) -> u32 {
    device.get(register::CONFIG)
}

fn info(boot: &Boot, device: &Transport) {
    let wanted = F_STATS | F_DEFLATE_ON_OOM | F_REPORTING;
    let Some((features, [_, _])) = start::<2>(boot, device, wanted, 64) else { return };
    println!("result balloon target={} features={features:#x}", target(device));
    // `wait=1`: until the target is another one.
    let before = target(device);
    if boot.flag("wait") {
        println!("waiting");
        while target(device) == before {
            core::hint::spin_loop();
        }
        println!("result balloon target={}", target(device));
    }
}

/// One request of `length` bytes at `list`; true if it was answered.
fn ask(queue: &mut Queue, device: &Transport, list: u64, length: u64) -> bool {
    queue.describe(0, list, length as u32, 0, 0);
    queue.offer(0);
    queue.publish(device);
    queue.wait(PATIENCE) == Some((0, 0))
}

/// Names the pages of `size` bytes at `memory` in requests.
fn name(queue: &mut Queue, device: &Transport, list: u64, memory: u64, size: u64) -> bool {
    let (first, count) = (memory / PAGE, size / PAGE);
    (0..count).step_by(LIST as usize).all(|done| {
        let some = LIST.min(count - done);
        for n in 0..some {
            // Backwards, as an allocator may hand them out.
            write(list + 4 * n, (first + done + some - 1 - n) as u32);
        }
        ask(queue, device, list, 4 * some)
    })
}

/// Touches `size=` bytes, gives them away (by a report with `report=1`), takes them back.
fn pages(boot: &Boot, device: &Transport) {
    let size = boot.number("size", 16 << 20);
    let report = boot.flag("report");
    let wanted = if report { F_REPORTING } else { 0 };
    // Without statistics, reports are the third queue.
    let Some((_, [mut inflate, mut deflate, mut reports])) =
        (if report { start::<3>(boot, device, wanted, 64) } else { two(boot, device) })
    else {
        return;
    };
    let Some(list) = boot.allocate(PAGE) else { return };
    let Some(memory) = boot.allocate(size) else { return };
    fill(memory, size as usize, 7);
    step("touched");
    let began = ticks();
    let given = if report {
        reports.describe(0, memory, size as u32, WRITE, 0);
        reports.offer(0);
        reports.publish(device);
        reports.wait(PATIENCE) == Some((0, 0))
    } else {
        name(&mut inflate, device, list, memory, size)
    };
    let took = ticks() - began;
    device.set(register::CONFIG + 4, (size / PAGE) as u32);
    step("given");
    let taken = report || name(&mut deflate, device, list, memory, size);
    device.set(register::CONFIG + 4, 0);
    let zero = (0..size / PAGE).filter(|page| read::<u8>(memory + page * PAGE) == 0).count();
    fill(memory, size as usize, 9);
    step("taken");
    println!(
        "result balloon given={} taken={} zero={zero} ticks={took}",
        u8::from(given),
        u8::from(taken)
    );
}

/// As `start::<3>`, with a third queue that does not exist.
fn two(boot: &Boot, device: &Transport) -> Option<(u64, [Queue; 3])> {
    let (features, [inflate, deflate]) = start::<2>(boot, device, 0, 64)?;
    Some((features, [inflate, deflate, Queue::absent()]))
}

/// Answers `count=` questions for statistics, and prints the ticks between the last two.
fn statistics(boot: &Boot, device: &Transport) {
    let Some((_, [_, _, mut queue])) = start::<3>(boot, device, F_STATS, 64) else { return };
    let Some(buffer) = boot.allocate(PAGE) else { return };
    let count = boot.number("count", 3);
    let (mut asked, mut last, mut between) = (0, ticks(), 0);
    while asked < count {
        for tag in 0..16u64 {
            write(buffer + 10 * tag, tag as u16);
            write(buffer + 10 * tag + 2, tag << 20 | asked);
        }
        queue.describe(0, buffer, 160, 0, 0);
        queue.offer(0);
        queue.publish(device);
        if queue.wait(PATIENCE) != Some((0, 0)) {
            println!("balloon: nobody asks");
            return;
        }
        asked += 1;
        (between, last) = (ticks() - last, ticks());
    }
    println!("result balloon asked={asked} ticks={between}");
}

/// Names pages that nobody may give away, in all ways; what is not named stays as it was.
fn hostile(boot: &Boot, device: &Transport) {
    const ID_PAGES: u64 = 0xcfff_e000;
    let wanted = F_REPORTING;
    let Some((_, [mut inflate, _, mut reports])) = start::<3>(boot, device, wanted, 64) else {
        return;
    };
    let Some(list) = boot.allocate(1 << 20) else { return };
    let Some(memory) = boot.allocate(16 * PAGE) else { return };
    fill(memory, 16 * PAGE as usize, 7);
    let identity: [u64; 2] = read(ID_PAGES);
    let mut answered = 0;
    for first in [ID_PAGES / PAGE, 0xd_0000, 0xc_0000, 0x10_0000, 0x800_0000, 0xffff_ff00] {
        for n in 0..LIST {
            write(list + 4 * n, (first + n) as u32);
        }
        answered += u8::from(ask(&mut inflate, device, list, 4 * LIST));
    }
    // One page again and again, in a request of a megabyte, in buffers of all lengths.
    for n in 0..1 << 18 {
        write(list + 4 * n, (memory / PAGE + 3) as u32);
    }
    answered += u8::from(ask(&mut inflate, device, list, 1 << 20));
    for (n, length) in (0u16..8).zip([1, 2, 3, 4, 5, 6, 7, 4096]) {
        let last = n == 7;
        inflate.describe(n, list, length, if last { 0 } else { NEXT }, n + 1);
    }
    inflate.offer(0);
    inflate.publish(device);
    answered += u8::from(inflate.wait(PATIENCE) == Some((0, 0)));
    // Reports of parts of pages.
    for (at, length) in [(memory + 5 * PAGE + 1, 2 * PAGE - 1), (memory + 1, PAGE - 2)] {
        reports.describe(0, at, length as u32, WRITE, 0);
        reports.offer(0);
        reports.publish(device);
        answered += u8::from(reports.wait(PATIENCE) == Some((0, 0)));
    }
    let kept = (0..16).filter(|page| read::<u8>(memory + page * PAGE) == 7).count();
    let same = read::<[u64; 2]>(ID_PAGES) == identity && identity != [0, 0];
    println!("result balloon answered={answered} kept={kept} identity={}", u8::from(same));
}
