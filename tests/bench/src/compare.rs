//! Two runs side by side. Absolute numbers of different runs say little, so what is compared is
//! each bench's ratio of Hull to the floor, or to the best peer where there is no floor.

use crate::Result;
use crate::report::{Report, number, print_table};
use std::path::Path;

fn load(path: &Path) -> Result<Report> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()).into())
}

/// What Hull's median is divided by.
fn base<'a>(report: &'a Report, bench: &str) -> Option<(&'a str, f64)> {
    let others = || report.rows.iter().filter(|row| row.bench == bench && row.system != "hull");
    others()
        .find(|row| row.system == "floor")
        .or_else(|| others().min_by(|a, b| a.median.total_cmp(&b.median)))
        .map(|row| (row.system.as_str(), row.median))
}

/// Prints the comparison.
pub fn print(before: &Path, after: &Path) -> Result<()> {
    let (old, new) = (load(before)?, load(after)?);
    if old.host.processor != new.host.processor || old.host.kvm != new.host.kvm {
        println!("note: the runs are from different machines");
    }
    let mut table =
        vec![["bench", "before", "after", "change", "held against"].map(str::to_owned).to_vec()];
    for row in new.rows.iter().filter(|row| row.system == "hull") {
        let Some((name, divisor)) = base(&new, &row.bench) else { continue };
        let ratio = row.median / divisor;
        let earlier = old.median(&row.bench, "hull").zip(old.median(&row.bench, name));
        let (earlier, change) = match earlier {
            Some((hull, other)) if other > 0.0 && hull > 0.0 => {
                let earlier = hull / other;
                (number(earlier), format!("{:+.1} %", (ratio / earlier - 1.0) * 100.0))
            }
            _ => (String::new(), "new".to_owned()),
        };
        table.push(vec![row.bench.clone(), earlier, number(ratio), change, name.to_owned()]);
    }
    print_table(&table);
    Ok(())
}
