//! A disk that stands on another against a raw one: Hull with itself, in pairs.
//!
//! Both are as long, of random bytes, and in the page cache. A sample of one comes right after a sample of the other, whoever is
//! first changes, and what counts is the median of the ratios of the pairs.

use crate::Result;
use crate::host::{sync, undisturbed};
use crate::report::{Bound, Report};
use crate::sample::{self, median};
use crate::system::{Disk, Engine, Guest, Programs, System};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the overlay has when a load starts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Has {
    /// Every block.
    All,
    /// Blocks at random places, about every second one.
    Half,
    /// None: all is the base's.
    Nothing,
}

/// One kind of load.
struct Load {
    name: &'static str,
    /// For the payload.
    scenario: &'static str,
    has: Has,
    /// Raw divided by overlay, at least.
    target: Option<f64>,
}

const READ: f64 = 0.95;
const WRITE: f64 = 0.8;

const LOADS: &[Load] = &[
    Load {
        name: "overlay read own 4 KiB, depth 1",
        scenario: "op=read depth=1 count=20000",
        has: Has::All,
        target: Some(READ),
    },
    Load {
        name: "overlay read own 4 KiB, depth 32",
        scenario: "op=read depth=32 count=200000",
        has: Has::All,
        target: Some(READ),
    },
    Load {
        name: "overlay read own 1 MiB in sequence, depth 4",
        scenario: "op=read pattern=seq size=1M depth=4 count=2000",
        has: Has::All,
        target: Some(READ),
    },
    Load {
        name: "overlay read base's 4 KiB, depth 32",
        scenario: "op=read depth=32 count=200000",
        has: Has::Nothing,
        target: None,
    },
    Load {
        name: "overlay read base's 1 MiB in sequence, depth 4",
        scenario: "op=read pattern=seq size=1M depth=4 count=2000",
        has: Has::Nothing,
        target: None,
    },
    Load {
        name: "overlay read of both 64 KiB, depth 8",
        scenario: "op=read size=64K depth=8 count=20000",
        has: Has::Half,
        target: None,
    },
    Load {
        name: "overlay write own 4 KiB, depth 32",
        scenario: "op=write depth=32 count=20000",
        has: Has::All,
        target: Some(WRITE),
    },
    Load {
        name: "overlay write own 1 MiB in sequence, depth 4",
        scenario: "op=write pattern=seq size=1M depth=4 count=200",
        has: Has::All,
        target: Some(WRITE),
    },
    Load {
        name: "overlay write base's 4 KiB, depth 32",
        scenario: "op=write depth=32 count=20000",
        has: Has::Nothing,
        target: None,
    },
    Load {
        name: "overlay write base's 2 KiB, depth 32",
        scenario: "op=write size=2K depth=32 count=20000",
        has: Has::Nothing,
        target: None,
    },
    Load {
        name: "overlay write base's 1 MiB in sequence, depth 4",
        scenario: "op=write pattern=seq size=1M depth=4 count=100",
        has: Has::Nothing,
        target: None,
    },
    Load {
        name: "overlay write own 4 KiB, flush each 32",
        scenario: "op=write depth=32 flush=32 count=2000",
        has: Has::All,
        target: Some(WRITE),
    },
    Load {
        name: "overlay write base's 4 KiB, flush each 32",
        scenario: "op=write depth=32 flush=32 count=2000",
        has: Has::Nothing,
        target: None,
    },
];

/// Fills an overlay.
const FILL: &str = "op=write pattern=seq size=1M depth=4 count=128";
/// Writes as many blocks at random places as leave about half of the disk's unwritten.
const FILL_HALF: &str = "op=write depth=32 count=22700";

/// Which disk the guest has, as the table names it: the overlay first, a raw one, and one of the same length that is a
/// hole, since a first write has to find room on the host's disk as well.
const OVERLAY: &str = "hull";
const RAW: &str = "raw";
const HOLE: &str = "raw, a hole";

/// Runs all loads.
pub fn run(programs: &Programs, runs: usize, report: &mut Report) -> Result<()> {
    // An odd number has a pair in its middle.
    let runs = runs.max(5) | 1;
    let files = Files::make(programs)?;
    for load in LOADS {
        eprintln!("{}: {runs} runs each", load.name);
        measure(programs, runs, &files, load, report)?;
    }
    Ok(())
}

fn measure(
    programs: &Programs,
    runs: usize,
    files: &Files,
    load: &Load,
    report: &mut Report,
) -> Result<()> {
    let first_writes = load.has == Has::Nothing && load.scenario.starts_with("op=write");
    let variants = if first_writes { vec![OVERLAY, RAW, HOLE] } else { vec![OVERLAY, RAW] };
    let mut seen = vec![Vec::new(); variants.len()];
    for run in 0..=runs {
        let mut places: Vec<usize> = (0..variants.len()).collect();
        if run % 2 == 1 {
            places.reverse();
        }
        for place in places {
            let value = undisturbed(|| {
                let disk = files.disk(programs, variants[place], load.has)?;
                sync();
                ticks(programs, disk, load.scenario)
            })?;
            // The first round warms caches.
            if run > 0 {
                seen[place].push(value);
            }
        }
    }
    for (place, variant) in variants.iter().enumerate().skip(1) {
        let ratios: Vec<f64> =
            seen[place].iter().zip(&seen[0]).map(|(raw, overlay)| raw / overlay).collect();
        let mut sorted = ratios.clone();
        sorted.sort_by(f64::total_cmp);
        let quartile = |part: usize| sorted[(sorted.len() - 1) * part / 4];
        let what = format!("{variant} ÷ overlay");
        eprintln!("  {what}: {:.2} to {:.2}, half of the pairs", quartile(1), quartile(3));
        if *variant == RAW
            && let Some(target) = load.target
        {
            report.target(load.name, &what, median(&ratios), Bound::AtLeast(target));
        }
        report.add(&format!("{}, {what}", load.name), OVERLAY, "×", ratios);
    }
    for (variant, values) in variants.iter().zip(seen) {
        report.add(load.name, variant, "ticks", values);
    }
    Ok(())
}

fn raw(path: &Path) -> Disk {
    Disk { path: path.to_owned(), engine: Engine::Default, direct: false, overlay: None }
}

fn over(path: &Path, base: &Path) -> Disk {
    Disk { overlay: Some(path.to_owned()), ..raw(base) }
}

/// Ticks per request of a guest with this disk.
fn ticks(programs: &Programs, disk: Disk, scenario: &str) -> Result<f64> {
    let line = format!("payload=blk {scenario}");
    let guest = Guest { disk: Some(disk), ..Guest::new(&line) };
    let sample = sample::run(programs, System::Hull, &guest, "result")?;
    if sample.result("failed")? != 0.0 {
        return Err(format!("requests failed: {scenario}").into());
    }
    sample.result("ticks")
}

/// The files.
struct Files {
    raw: PathBuf,
    hole: PathBuf,
    base: PathBuf,
    /// Overlays of the base.
    all: PathBuf,
    half: PathBuf,
    new: PathBuf,
}

impl Files {
    fn make(programs: &Programs) -> Result<Files> {
        let at = |name: &str| programs.scratch.join(name);
        let files = Files {
            raw: at("raw.img"),
            hole: at("hole.img"),
            base: at("base.img"),
            all: at("all.ovl"),
            half: at("half.ovl"),
            new: at("new.ovl"),
        };
        files.remove();
        // Not copied: the cache would have other pages of one than of the other.
        crate::block::write_image(&files.raw)?;
        crate::block::write_image(&files.base)?;
        for (path, scenario) in [(&files.all, FILL), (&files.half, FILL_HALF)] {
            files.create(programs, path)?;
            ticks(programs, over(path, &files.base), scenario)?;
        }
        sync();
        Ok(files)
    }

    fn create(&self, programs: &Programs, path: &Path) -> Result<()> {
        let mut command = Command::new(programs.program(System::Hull));
        command.args(["disk", "create"]).arg(path).arg("--base").arg(&self.base);
        let output = command.output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("an overlay cannot be made: {said}").into());
        }
        Ok(())
    }

    /// The disk for a sample, as the sample has to find it.
    fn disk(&self, programs: &Programs, variant: &str, has: Has) -> Result<Disk> {
        match (variant, has) {
            (RAW, _) => Ok(raw(&self.raw)),
            (HOLE, _) => {
                let file = std::fs::File::create(&self.hole)?;
                file.set_len(self.raw.metadata()?.len())?;
                Ok(raw(&self.hole))
            }
            (_, Has::All) => Ok(over(&self.all, &self.base)),
            (_, Has::Half) => Ok(over(&self.half, &self.base)),
            (_, Has::Nothing) => {
                let _ = std::fs::remove_file(&self.new);
                self.create(programs, &self.new)?;
                Ok(over(&self.new, &self.base))
            }
        }
    }

    fn remove(&self) {
        for path in [&self.raw, &self.hole, &self.base, &self.all, &self.half, &self.new] {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.remove();
    }
}
