//! Start, first output, end: what it costs to have a machine at all.

use crate::Result;
use crate::report::{Bound, Report};
use crate::sample::run;
use crate::system::{Guest, Programs, System};
use std::fs::File;
use std::io::Write;
use std::path::Path;

const HELLO: &str = "hello";

/// CPU time from exec to the end of a guest that says hello.
pub fn cpu_time(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    eprintln!("boot: {runs} runs each");
    // The floor ends at the guest's first port write, so the guest makes no other.
    let guest = Guest::new("payload=hello bare=1");
    let mut cpu = vec![Vec::new(); systems.len()];
    let mut first = vec![Vec::new(); systems.len()];
    for run_number in 0..=runs {
        for (place, system) in systems.iter().enumerate() {
            let sample = run(programs, *system, &guest, "\n")?;
            // The first run warms the caches.
            if run_number > 0 {
                cpu[place].push(sample.cpu.as_secs_f64() * 1e3);
                first[place].push(sample.first_output.as_secs_f64() * 1e3);
            }
        }
    }
    for (place, system) in systems.iter().enumerate() {
        report.add("boot cpu", system.name(), "ms", std::mem::take(&mut cpu[place]));
    }
    for (place, system) in systems.iter().enumerate() {
        report.add("boot to output", system.name(), "ms", std::mem::take(&mut first[place]));
    }
    for (other, limit) in [("floor", 1.5), ("firecracker", 1.0)] {
        let ratio = report.ratio("boot cpu", "hull", other);
        report.target("boot cpu", &format!("hull ÷ {other}"), ratio, Bound::AtMost(limit));
    }
    Ok(())
}

/// Time to the first output with 50 MiB of kernel file in the cache, against the payload alone.
pub fn large_kernel(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    eprintln!("kernel50: {runs} runs each");
    let large = programs.scratch.join("payload-50m.elf");
    write_large_kernel(&programs.payload, &large)?;
    let small = Guest::new("payload=hello");
    let guest = Guest { kernel: Some(large), ..small.clone() };
    for system in systems.iter().filter(|system| **system != System::Floor) {
        let (mut with, mut without, mut more) = (Vec::new(), Vec::new(), Vec::new());
        for run_number in 0..=runs {
            let without_it =
                run(programs, *system, &small, HELLO)?.first_output.as_secs_f64() * 1e3;
            let with_it = run(programs, *system, &guest, HELLO)?.first_output.as_secs_f64() * 1e3;
            if run_number > 0 {
                with.push(with_it);
                without.push(without_it);
                more.push(with_it - without_it);
            }
        }
        report.add("50 MiB kernel to output", system.name(), "ms", with);
        report.add("small kernel to output", system.name(), "ms", without);
        report.add("50 MiB kernel, difference", system.name(), "ms", more);
    }
    let hull = report.median("50 MiB kernel, difference", "hull");
    report.target("50 MiB kernel, difference", "hull, ms", hull, Bound::AtMost(1.0));
    Ok(())
}

/// The payload with one more segment: 50 MiB that nobody touches, loaded at 16 MiB.
fn write_large_kernel(payload: &Path, target: &Path) -> Result<()> {
    const PT_LOAD: u32 = 1;
    const READABLE: u32 = 4;
    const ADDRESS: u64 = 16 << 20;
    const LENGTH: usize = 50 << 20;
    let mut elf = std::fs::read(payload)?;
    let headers = elf.get(32..40).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let count = elf.get(56..58).and_then(|bytes| bytes.try_into().ok()).map(u16::from_le_bytes);
    let (Some(headers), Some(count)) = (headers, count) else {
        return Err("the payload is no ELF file".into());
    };
    elf.resize(elf.len().next_multiple_of(4096), 0);
    let offset = elf.len() as u64;
    let at = headers as usize + usize::from(count) * 56;
    let entry = elf.get_mut(at..at + 56).ok_or("the payload is too short")?;
    if entry.iter().any(|byte| *byte != 0) {
        return Err("the payload has no space for another program header".into());
    }
    entry[0..4].copy_from_slice(&PT_LOAD.to_le_bytes());
    entry[4..8].copy_from_slice(&READABLE.to_le_bytes());
    let fields = [offset, ADDRESS, ADDRESS, LENGTH as u64, LENGTH as u64, 4096];
    for (field, value) in entry[8..].chunks_exact_mut(8).zip(fields) {
        field.copy_from_slice(&value.to_le_bytes());
    }
    elf[56..58].copy_from_slice(&(count + 1).to_le_bytes());
    // Not zeroes: nobody shall take it for a hole.
    elf.extend((0..LENGTH as u32).map(|index| (index.wrapping_mul(2654435761) >> 24) as u8 | 1));
    File::create(target)?.write_all(&elf)?;
    Ok(())
}
