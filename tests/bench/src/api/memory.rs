//! What an API that is in use costs in memory.

use super::http::Client;
use crate::Result;
use crate::host::sync;
use crate::memory::private_dirty_of;
use crate::report::{Bound, Report};
use crate::sample::Running;
use crate::system::{Disk, Engine, Guest, Programs, System};
use serde_json::json;
use std::fs::File;
use std::time::Duration;

const WITH: &str = "private dirty memory, API in use";
const WITHOUT: &str = "private dirty memory, no API";
const DIFFERENCE: &str = "private dirty memory of the API";
/// Clients at a time, each of which asks everything.
const CLIENTS: usize = 4;

/// What is asked, and the status of the answer: Hull's, and Firecracker's where it has the request.
/// The guest drives none of its devices, which Firecracker's balloon minds.
type Question = (&'static str, &'static str, &'static str, u16, Option<u16>);
const QUESTIONS: [Question; 29] = [
    ("GET", "/", "", 200, Some(200)),
    ("GET", "/version", "", 200, Some(200)),
    ("GET", "/vm/config", "", 200, Some(200)),
    ("GET", "/machine-config", "", 200, Some(200)),
    ("GET", "/balloon", "", 200, Some(200)),
    ("GET", "/drives", "", 200, None),
    ("GET", "/drives/disk", "", 200, None),
    ("GET", "/boot-source", "", 200, None),
    ("GET", "/entropy", "", 200, None),
    ("GET", "/logger", "", 200, None),
    ("GET", "/serial", "", 200, None),
    ("GET", "/metrics", "", 200, None),
    ("GET", "/metrics/prometheus", "", 200, None),
    ("GET", "/openapi.json", "", 200, None),
    ("PATCH", "/balloon", r#"{ "amount_mib": 8 }"#, 204, Some(400)),
    ("PATCH", "/balloon", r#"{ "amount_mib": 0 }"#, 204, Some(400)),
    (
        "PATCH",
        "/drives/disk",
        r#"{ "drive_id": "disk", "rate_limiter": { "ops": { "size": 1000, "refill_time": 100 } } }"#,
        204,
        Some(204),
    ),
    ("PATCH", "/drives/disk", r#"{ "drive_id": "other" }"#, 400, Some(400)),
    ("PATCH", "/drives/disk", r#"{ "drive_id": "disk", "nonsense": 1 }"#, 400, Some(400)),
    ("PATCH", "/vm", r#"{ "state": "Paused" }"#, 204, Some(204)),
    ("PATCH", "/vm", r#"{ "state": "Resumed" }"#, 204, Some(204)),
    ("PATCH", "/vm", "{", 400, Some(400)),
    ("PUT", "/actions", r#"{ "action_type": "InstanceStart" }"#, 400, Some(400)),
    ("PUT", "/boot-source", r#"{ "kernel_image_path": "/nowhere" }"#, 400, Some(400)),
    ("PUT", "/machine-config", r#"{ "vcpu_count": 1, "mem_size_mib": 64 }"#, 400, Some(400)),
    ("PUT", "/snapshot/create", "{}", 400, Some(400)),
    ("GET", "/nowhere", "", 404, Some(400)),
    ("GET", "/drives/nowhere", "", 400, None),
    ("PUT", "/drives/disk", "[]", 400, Some(400)),
];

/// Private dirty memory of a machine whose API is in use, and of one that has none.
pub fn run(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    report: &mut Report,
) -> Result<()> {
    eprintln!("API memory: {runs} runs each");
    let image = programs.scratch.join("api.img");
    File::create(&image)?.set_len(1 << 20)?;
    let outcome = measure(programs, systems, runs, &image, report);
    std::fs::remove_file(&image)?;
    outcome?;
    let hull = report.median(DIFFERENCE, "hull");
    report.target(DIFFERENCE, "hull, kB", hull, Bound::AtMost(1024.0));
    Ok(())
}

fn measure(
    programs: &Programs,
    systems: &[System],
    runs: usize,
    image: &std::path::Path,
    report: &mut Report,
) -> Result<()> {
    let disk =
        Disk { path: image.to_owned(), engine: Engine::Default, direct: false, overlay: None };
    let guest = Guest { disk: Some(disk), ..Guest::new("payload=spin") };
    let mut seen = vec![[const { Vec::new() }; 3]; systems.len()];
    for run_number in 0..=runs {
        for (place, system) in systems.iter().enumerate() {
            let context = |error| format!("API memory, {}: {error}", system.name());
            let with = one(programs, *system, &guest, true).map_err(context)?;
            let without = one(programs, *system, &guest, false).map_err(context)?;
            // Pages of a file that was just written are dirty in the first run: see `crate::memory`.
            if run_number > 0 {
                let values = [with, without, with - without];
                seen[place].iter_mut().zip(values).for_each(|(all, value)| all.push(value));
            } else {
                sync();
            }
        }
    }
    for (index, bench) in [WITH, WITHOUT, DIFFERENCE].into_iter().enumerate() {
        for (system, values) in systems.iter().zip(&mut seen) {
            report.add(bench, system.name(), "kB", std::mem::take(&mut values[index]));
        }
    }
    Ok(())
}

fn one(programs: &Programs, system: System, guest: &Guest, api: bool) -> Result<f64> {
    let folder = super::folder()?;
    let socket = folder.path().join("api.sock");
    let file = folder.path().join("machine.json");
    let mut config = guest.description(&programs.payload);
    config["balloon"] = json!({ "amount_mib": 0, "deflate_on_oom": true });
    config["entropy"] = json!({});
    serde_json::to_writer(File::create(&file)?, &config)?;
    let mut command = super::command(programs, system, &socket);
    command.args(["--level", "Error", "--config-file"]).arg(&file);
    if !api {
        command.arg("--no-api");
    }
    let mut running = Running::spawn(command, folder)?;
    running.wait_for("hello")?;
    // Open until the end: what connections cost belongs to it.
    let mut clients = Vec::new();
    if api {
        for _ in 0..CLIENTS {
            let mut client = Client::to(&socket)?;
            for (method, path, body, hull, firecracker) in QUESTIONS {
                let status = if system == System::Hull { Some(hull) } else { firecracker };
                if let Some(status) = status {
                    client.expect(status, method, path, body)?;
                }
            }
            clients.push(client);
        }
        if system == System::Hull {
            let mut listener = Client::to(&socket)?;
            listener.listen("/events")?;
            clients.push(listener);
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    private_dirty_of(running.id())
}
