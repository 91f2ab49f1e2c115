//! virtio-vsock: a stream between the payload and the bench, through the device's Unix socket.

use crate::Result;
use crate::host::undisturbed;
use crate::report::{Bound, Report};
use crate::sample::{Running, Sample};
use crate::system::{Guest, Programs, System};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of one run.
const BYTES: u64 = 512 << 20;
/// Bytes that the bench writes or reads at once.
const PIECE: usize = 256 << 10;
/// The guest's port.
const PORT: u32 = 9000;
/// Bytes of the guest's receive buffers, or of what it sends in a packet: what Linux 6.1 offers, and its
/// largest packet.
const SIZES: [u32; 2] = [4096, 65536];

/// Which way the bytes go.
#[derive(Clone, Copy)]
enum Way {
    ToGuest,
    ToHost,
}

/// Throughput both ways, on the systems that have the device without vhost.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    let systems = System::like_firecracker(systems);
    // A socket's path is short, and not every temporary folder's is.
    let folder = tempfile::tempdir_in("/dev/shm")?;
    for (way, name) in [(Way::ToGuest, "to guest"), (Way::ToHost, "to host")] {
        for size in SIZES {
            eprintln!("vsock {name}, {size}: {runs} runs each");
            let bench = format!("vsock {name}, {} KiB a packet", size / 1024);
            let mut seen = vec![Vec::new(); systems.len()];
            for _ in 0..runs {
                for (place, system) in systems.iter().enumerate() {
                    let value = undisturbed(|| one(programs, *system, folder.path(), way, size))
                        .map_err(|error| format!("{bench}, {}: {error}", system.name()))?;
                    seen[place].push(value);
                }
            }
            for (system, values) in systems.iter().zip(seen) {
                report.add(&bench, system.name(), "ticks/KiB", values);
            }
            let ratio = report.ratio(&bench, "firecracker", "hull");
            report.target(&bench, "firecracker ÷ hull", ratio, Bound::AtLeast(1.2));
        }
    }
    Ok(())
}

/// The guest's ticks per KiB, from the first byte to the last one.
fn one(programs: &Programs, system: System, folder: &Path, way: Way, size: u32) -> Result<f64> {
    let path = folder.join("v.sock");
    // Firecracker leaves it behind, and does not replace it.
    let _ = std::fs::remove_file(&path);
    let what = match way {
        Way::ToGuest => format!("mode=sink buffer={size}"),
        Way::ToHost => format!("mode=source size={size} count={BYTES}"),
    };
    let line = format!("payload=vsock op=listen port={PORT} {what}");
    let guest = Guest { vsock: Some(path.clone()), ..Guest::new(&line) };
    let mut running = Running::start(programs, system, &guest)?;
    let first = running.wait_for("ready")?;
    transfer(&path, way)?;
    let sample: Sample = running.finish(first)?;
    let bytes = sample.result("bytes")?;
    if bytes != BYTES as f64 {
        return Err(format!("{bytes} bytes arrived of {BYTES}").into());
    }
    Ok(sample.result("ticks")? / (BYTES / 1024) as f64)
}

fn transfer(path: &PathBuf, way: Way) -> Result<()> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_write_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    // A byte at a time: what follows is data.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    let mut piece = vec![0; PIECE];
    let mut left = BYTES;
    while left > 0 {
        left -= match way {
            Way::ToGuest => {
                stream.write_all(&piece)?;
                PIECE as u64
            }
            Way::ToHost => match stream.read(&mut piece)? {
                0 => return Err("the guest closed early".into()),
                len => len as u64,
            },
        };
    }
    Ok(())
}
