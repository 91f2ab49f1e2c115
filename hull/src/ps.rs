//! `hull ps`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmm::config::ByteSize;

use crate::cli::{PsArgs, Result};
use crate::client;
use crate::exit::Code;
use crate::runtime::{self, Record};
use crate::streams;
use crate::table::Table;

/// A machine that runs.
#[derive(Serialize)]
struct Machine {
    #[serde(flatten)]
    record: Record,
    /// `running`, `paused`, `not-started`; nothing if it does not say.
    state: Option<String>,
}

/// Lists the machines that run.
pub fn ps(args: &PsArgs) -> Result {
    let records = runtime::list(&runtime::directory())?;
    let sockets = records.iter().map(|record| record.api.clone()).collect();
    let states = client::block_on(client::states(sockets))?;
    let machines = records.into_iter().zip(states);
    let machines: Vec<Machine> =
        machines.map(|(record, state)| Machine { record, state }).collect();
    let text = if args.json { serde_json::to_string(&machines)? + "\n" } else { table(machines) };
    streams::print(&text)?;
    Ok(Code::SUCCESS)
}

fn table(machines: Vec<Machine>) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut table = Table::new(["NAME", "PID", "STATE", "CPUS", "MEMORY", "UP", "KERNEL"]);
    for Machine { record, state } in machines {
        table.push([
            record.name,
            record.pid.to_string(),
            state.unwrap_or_else(|| "?".to_owned()),
            record.cpus.to_string(),
            ByteSize(record.memory).to_string(),
            age(now.saturating_sub(Duration::from_secs(record.started))),
            record.kernel,
        ]);
    }
    table.to_string()
}

fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}
