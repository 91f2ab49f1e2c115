//! virtio-blk, driven by the payload: TSC ticks per completed request.

use crate::Result;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::{self, Running, Sample};
use crate::system::{Disk, Engine, Guest, Programs, System};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

const IMAGE_MIB: usize = 128;
const FIRECRACKER: [&str; 2] = ["firecracker", "firecracker-async"];

/// One kind of load.
struct Load {
    name: &'static str,
    /// For the payload.
    scenario: &'static str,
    /// For tests/floor: arguments before and after the file's name.
    floor: Option<(&'static str, &'static [&'static str])>,
    /// The same with as many buffers as the guest has.
    floor_buffers: Option<&'static [&'static str]>,
    direct: bool,
    /// Firecracker's better engine divided by Hull, at least.
    target: Option<f64>,
    /// Hull divided by the floor, at most.
    floor_target: Option<f64>,
}

const LOADS: &[Load] = &[
    Load {
        name: "blk read 4 KiB, depth 1",
        scenario: "op=read depth=1 count=20000",
        floor: Some(("pread", &["4096", "200000", "1"])),
        floor_buffers: None,
        direct: false,
        target: Some(1.0),
        floor_target: None,
    },
    Load {
        name: "blk read 4 KiB, depth 32",
        scenario: "op=read depth=32 count=100000",
        floor: Some(("pread", &["4096", "200000", "1"])),
        floor_buffers: Some(&["4096", "200000", "32"]),
        direct: false,
        target: Some(1.25),
        floor_target: Some(1.15),
    },
    Load {
        name: "blk read 4 KiB, depth 80",
        scenario: "op=read depth=80 count=100000",
        floor: Some(("pread", &["4096", "200000", "1"])),
        floor_buffers: Some(&["4096", "200000", "80"]),
        direct: false,
        target: Some(1.1),
        floor_target: Some(1.15),
    },
    Load {
        name: "blk read 1 MiB in sequence, depth 4",
        scenario: "op=read pattern=seq size=1M depth=4 count=1000",
        floor: Some(("pread", &["1048576", "1000", "1"])),
        floor_buffers: None,
        direct: false,
        target: Some(1.0),
        floor_target: None,
    },
    Load {
        name: "blk write 4 KiB, depth 32",
        scenario: "op=write depth=32 count=20000",
        floor: Some(("pwrite", &["4096", "20000", "0"])),
        floor_buffers: None,
        direct: false,
        target: Some(1.0),
        floor_target: None,
    },
    Load {
        name: "blk write 4 KiB, flush each 32",
        scenario: "op=write depth=32 flush=32 count=2000",
        floor: Some(("pwrite", &["4096", "2000", "32"])),
        floor_buffers: None,
        direct: false,
        target: Some(1.0),
        floor_target: None,
    },
    Load {
        name: "blk read 4 KiB O_DIRECT, depth 32",
        scenario: "op=read depth=32 count=10000",
        floor: Some(("pread", &["4096", "5000", "1", "direct"])),
        floor_buffers: None,
        direct: true,
        target: None,
        floor_target: None,
    },
];

/// The floor with as many buffers as the guest has.
const MANY_BUFFERS: &str = "floor, many buffers";

/// Runs all loads on all systems.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let runs = runs.max(3);
    let image = programs.scratch.join("disk.img");
    write_image(&image)?;
    for load in LOADS {
        eprintln!("{}: {runs} runs each", load.name);
        measure(programs, systems, runs, &image, load, report)?;
        hold_against_targets(load, report);
    }
    std::fs::remove_file(&image)?;
    Ok(())
}

/// Random bytes, in the page cache when done.
pub fn write_image(path: &Path) -> Result<()> {
    let mut source = File::open("/dev/urandom")?;
    let mut target = File::create(path)?;
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..IMAGE_MIB {
        source.read_exact(&mut buffer)?;
        target.write_all(&buffer)?;
    }
    target.sync_all()?;
    Ok(())
}

fn variants(system: System, load: &Load) -> Vec<(&'static str, Engine)> {
    match system {
        // Firecracker has no O_DIRECT.
        System::Firecracker if load.direct => vec![],
        System::Firecracker => {
            vec![(FIRECRACKER[0], Engine::Default), (FIRECRACKER[1], Engine::Ring)]
        }
        System::Qemu => vec![("qemu", Engine::Ring)],
        System::Hull => vec![("hull", Engine::Default)],
        System::Floor => {
            let buffers = load.floor_buffers.map(|_| (MANY_BUFFERS, Engine::Default));
            std::iter::once(("floor", Engine::Default)).chain(buffers).collect()
        }
    }
}

fn measure(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    image: &Path,
    load: &Load,
    report: &mut Report,
) -> Result<()> {
    let variants: Vec<_> = systems
        .iter()
        .flat_map(|system| variants(*system, load).into_iter().map(|variant| (*system, variant)))
        .collect();
    let mut ticks = vec![Vec::new(); variants.len()];
    for _ in 0..runs {
        for (place, (system, (name, engine))) in variants.iter().enumerate() {
            if *system == System::Floor && load.floor.is_none() {
                continue;
            }
            let seen = undisturbed(|| one(programs, *system, name, *engine, image, load))?;
            ticks[place].push(seen.result("ticks")?);
        }
    }
    for ((_, (name, _)), values) in variants.iter().zip(ticks) {
        report.add(load.name, name, "ticks", values);
    }
    Ok(())
}

/// One sample of one system.
fn one(
    programs: &Programs,
    system: System,
    variant: &str,
    engine: Engine,
    image: &Path,
    load: &Load,
) -> Result<Sample> {
    if let (System::Floor, Some((mode, arguments))) = (system, load.floor) {
        let many = load.floor_buffers.filter(|_| variant == MANY_BUFFERS);
        let mut command = Command::new(&programs.floor);
        command.arg(mode).arg(image).args(many.unwrap_or(arguments));
        let mut running = Running::spawn(command, tempfile::tempdir()?)?;
        let first = running.wait_for("result")?;
        return running.finish(first);
    }
    let disk = Disk { path: image.to_owned(), engine, direct: load.direct, overlay: None };
    let line = format!("payload=blk {}", load.scenario);
    let guest = Guest { disk: Some(disk), ..Guest::new(&line) };
    let sample = sample::run(programs, system, &guest, "result")?;
    if sample.result("failed")? != 0.0 {
        return Err(format!("{}: requests failed", system.name()).into());
    }
    Ok(sample)
}

fn hold_against_targets(load: &Load, report: &mut Report) {
    let Some(hull) = report.median(load.name, "hull") else { return };
    if let Some(target) = load.target {
        let better = report.best(load.name, &FIRECRACKER).map(|ticks| ticks / hull);
        report.target(load.name, "firecracker's better ÷ hull", better, Bound::AtLeast(target));
    }
    if let Some(target) = load.floor_target {
        let ratio = report.median(load.name, "floor").map(|ticks| hull / ticks);
        report.target(load.name, "hull ÷ bare pread", ratio, Bound::AtMost(target));
    }
}
