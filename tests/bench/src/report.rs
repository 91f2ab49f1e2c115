//! Numbers, what they are held against, and how both are shown.

use crate::host::Host;
use crate::sample::median;
use serde::{Deserialize, Serialize};

/// All of one run.
#[derive(Serialize, Deserialize)]
pub struct Report {
    pub host: Host,
    pub rows: Vec<Row>,
    pub targets: Vec<Target>,
}

/// One bench of one system.
#[derive(Serialize, Deserialize, Clone)]
pub struct Row {
    pub bench: String,
    /// The system, with its variant: `firecracker`, `firecracker-async`.
    pub system: String,
    pub unit: String,
    pub median: f64,
    pub runs: Vec<f64>,
}

/// Something Hull has to reach.
#[derive(Serialize, Deserialize, Clone)]
pub struct Target {
    pub bench: String,
    /// In words.
    pub target: String,
    /// What was seen, in the target's terms.
    pub seen: f64,
    pub reached: bool,
}

/// Whether a target is an upper or a lower bound.
#[derive(Clone, Copy)]
pub enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Report {
    /// An empty report.
    pub fn new(host: Host) -> Self {
        Report { host, rows: Vec::new(), targets: Vec::new() }
    }

    /// Adds one bench of one system.
    pub fn add(&mut self, bench: &str, system: &str, unit: &str, runs: Vec<f64>) {
        let Some(median) = median(&runs) else { return };
        let (bench, system, unit) = (bench.to_owned(), system.to_owned(), unit.to_owned());
        self.rows.push(Row { bench, system, unit, median, runs });
    }

    /// The median of a bench of a system.
    pub fn median(&self, bench: &str, system: &str) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.bench == bench && row.system == system)?;
        Some(row.median)
    }

    /// The median of one system divided by that of another.
    pub fn ratio(&self, bench: &str, system: &str, by: &str) -> Option<f64> {
        self.median(bench, system).zip(self.median(bench, by)).map(|(one, other)| one / other)
    }

    /// The least of the medians of some systems.
    pub fn best(&self, bench: &str, systems: &[&str]) -> Option<f64> {
        systems.iter().filter_map(|system| self.median(bench, system)).min_by(f64::total_cmp)
    }

    /// Holds a value against a bound. Nothing is said where there is no value.
    pub fn target(&mut self, bench: &str, what: &str, seen: Option<f64>, bound: Bound) {
        let Some(seen) = seen else { return };
        let (target, reached) = match bound {
            Bound::AtMost(limit) => (format!("{what} ≤ {limit}"), seen <= limit),
            Bound::AtLeast(limit) => (format!("{what} ≥ {limit}"), seen >= limit),
        };
        self.targets.push(Target { bench: bench.to_owned(), target, seen, reached });
    }

    /// Prints host, numbers and targets.
    pub fn print(&self) {
        let host = &self.host;
        println!("kernel {}, {} × {}", host.kernel, host.processors, host.processor);
        print!("KVM: {}, THP: {}, load: {}", host.kvm, host.transparent_hugepages, host.load);
        println!(", stolen: {:.1} %", host.stolen * 100.0);
        // A guest that polls, its monitor and the bench are three.
        if host.load > 0.5 {
            println!("note: the machine was busy before the run; ticks and times include waiting");
        }
        host.versions.iter().for_each(|version| println!("{version}"));
        println!();
        let mut table = vec![
            ["bench", "system", "median", "unit", "÷ hull", "÷ floor"].map(str::to_owned).to_vec(),
        ];
        for row in &self.rows {
            let ratio = |system: &str| {
                self.median(&row.bench, system)
                    .filter(|base| *base > 0.0)
                    .map_or(String::new(), |base| format!("{:.2}", row.median / base))
            };
            table.push(vec![
                row.bench.clone(),
                row.system.clone(),
                number(row.median),
                row.unit.clone(),
                ratio("hull"),
                ratio("floor"),
            ]);
        }
        print_table(&table);
        if self.targets.is_empty() {
            return;
        }
        println!();
        let mut table = vec![["bench", "target", "seen", "reached"].map(str::to_owned).to_vec()];
        for target in &self.targets {
            table.push(vec![
                target.bench.clone(),
                target.target.clone(),
                format!("{:.2}", target.seen),
                if target.reached { "yes" } else { "NO" }.to_owned(),
            ]);
        }
        print_table(&table);
    }
}

/// Digits enough to see a difference of a percent.
pub fn number(value: f64) -> String {
    if value.abs() < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// Prints rows of equal length in columns, numbers to the right.
pub fn print_table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let numeric = column > 0 && cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
            let cell = if numeric { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line.push_str(&cell);
            line.push_str("  ");
        }
        println!("{}", line.trim_end());
    }
}
