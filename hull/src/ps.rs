//! `hull ps`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmm::config::ByteSize;

use crate::cli::{PsArgs, Result};
use crate::exit::Code;
use crate::runtime::{self, Record};
use crate::streams;

/// Lists the machines that run.
pub fn ps(args: &PsArgs) -> Result {
    let records = runtime::list(&runtime::directory())?;
    let text = if args.json { serde_json::to_string(&records)? + "\n" } else { table(&records) };
    streams::print(&text)?;
    Ok(Code::SUCCESS)
}

fn table(records: &[Record]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut rows = vec![["NAME", "PID", "CPUS", "MEMORY", "UP", "KERNEL"].map(String::from)];
    rows.extend(records.iter().map(|record| {
        let mut kernel = String::new();
        streams::push_printable(&mut kernel, &record.kernel, false);
        [
            record.name.clone(),
            record.pid.to_string(),
            record.cpus.to_string(),
            ByteSize(record.memory).to_string(),
            age(now.saturating_sub(Duration::from_secs(record.started))),
            kernel,
        ]
    }));
    let widths: Vec<usize> = (0..6)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
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
