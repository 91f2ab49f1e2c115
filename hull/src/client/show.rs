//! `hull config` and `hull metrics`: what a machine says of itself, as a table.

use api_server::types::rate::RateLimiter;
use serde_json::Value;
use vmm::config::RateLimit;

use super::http::{Api, PATIENCE};
use super::machine::Machine;
use crate::cli::{MetricsArgs, Result, ShowArgs};
use crate::exit::Code;
use crate::streams;
use crate::table::Table;

/// Prints how a machine is configured.
pub fn config(args: &ShowArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    let config =
        super::block_on(async { Api::connect(&machine, PATIENCE).await?.get("/vm/config").await })?;
    let text = match args.json {
        true => json(&config)?,
        false => table(["RESOURCE", "KEY", "VALUE"], resources(&config)),
    };
    streams::print(&text)?;
    Ok(Code::SUCCESS)
}

/// Prints what a machine counted.
pub fn metrics(args: &MetricsArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    let text = super::block_on(async {
        let mut api = Api::connect(&machine, PATIENCE).await?;
        match args.prometheus {
            true => api.get_text("/metrics/prometheus").await.map(Ok),
            false => api.get("/metrics").await.map(Err),
        }
    })?;
    let text = match text {
        Ok(text) => text,
        Err(metrics) if args.json => json(&metrics)?,
        Err(metrics) => table(["GROUP", "METRIC", "VALUE"], groups(&metrics)),
    };
    streams::print(&text)?;
    Ok(Code::SUCCESS)
}

/// JSON for programs which a person can read as well.
pub fn json(value: &Value) -> std::result::Result<String, serde_json::Error> {
    serde_json::to_string_pretty(value).map(|text| text + "\n")
}

/// A resource's or group's name, and what it says.
type Group<'a> = (String, &'a Value);

/// What is configured, by the path of its resource without the slash in front.
fn resources(config: &Value) -> Vec<Group<'_>> {
    let mut resources = Vec::new();
    for (name, value) in config.as_object().into_iter().flatten() {
        match value {
            Value::Array(items) => resources.extend(items.iter().map(|item| {
                let id = ["drive_id", "iface_id", "id"].iter().find_map(|key| item.get(key));
                let id = id.and_then(Value::as_str).unwrap_or_default();
                (format!("{name}/{id}"), item)
            })),
            value => resources.push((name.clone(), value)),
        }
    }
    resources
}

fn groups(metrics: &Value) -> Vec<Group<'_>> {
    metrics.as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value)).collect()
}

/// Groups under each other, the name of each in front of its first row.
fn table(head: [&str; 3], groups: Vec<Group<'_>>) -> String {
    let mut table = Table::new(head);
    for (name, value) in groups {
        let mut name = Some(name);
        for (key, value) in flat(value) {
            table.push([name.take().unwrap_or_default(), key, value]);
        }
    }
    table.to_string()
}

/// The values in `value` that are not null, with dots in the keys of those that lie deeper. A rate
/// limit is one value, as people write it.
pub fn flat(value: &Value) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    flatten(String::new(), value, &mut rows);
    rows
}

fn flatten(key: String, value: &Value, rows: &mut Vec<(String, String)>) {
    let text = match value {
        Value::Null => return,
        Value::Object(fields) => match rate(value) {
            Some(rate) => rate.to_string(),
            None => {
                for (name, value) in fields {
                    let dot = if key.is_empty() { "" } else { "." };
                    flatten(format!("{key}{dot}{name}"), value, rows);
                }
                return;
            }
        },
        Value::Array(items) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
        }
        Value::Array(items) => {
            for (n, value) in items.iter().enumerate() {
                flatten(format!("{key}[{n}]"), value, rows);
            }
            return;
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    rows.push((key, text));
}

/// The rate limit that `value` is, if it is one with a bucket.
fn rate(value: &Value) -> Option<RateLimit> {
    use serde::Deserialize;
    let limit = RateLimit::from(RateLimiter::deserialize(value).ok()?);
    (limit != RateLimit::default()).then_some(limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_configuration_becomes_rows_by_resource() {
        let bucket = json!({ "size": 1 << 20, "one_time_burst": null, "refill_time": 100 });
        let config = json!({
            "balloon": null,
            "drives": [
                { "drive_id": "a", "path_on_host": "/a", "socket": null,
                  "rate_limiter": { "bandwidth": bucket, "ops": null } },
                { "drive_id": "b", "is_read_only": true },
            ],
            "mmds-config": { "network_interfaces": ["eth0", "eth1"] },
        });
        let text = table(["RESOURCE", "KEY", "VALUE"], resources(&config));
        let rows: Vec<Vec<&str>> =
            text.lines().map(|line| line.split("  ").map(str::trim).collect()).collect();
        let rows: Vec<String> = rows
            .into_iter()
            .map(|row| row.into_iter().filter(|cell| !cell.is_empty()).collect())
            .map(|row: Vec<&str>| row.join("|"))
            .collect();
        assert_eq!(
            rows,
            [
                "RESOURCE|KEY|VALUE",
                "drives/a|drive_id|a",
                "path_on_host|/a",
                "rate_limiter|1M/100ms",
                "drives/b|drive_id|b",
                "is_read_only|true",
                "mmds-config|network_interfaces|eth0, eth1",
            ],
            "{text}"
        );
    }

    #[test]
    fn metrics_may_lie_deep_or_be_odd() {
        let metrics =
            json!({ "vcpu": { "exits": 3, "read": { "min_us": 1 } }, "x": [1, {}], "y": 7 });
        let rows: Vec<_> =
            groups(&metrics).into_iter().flat_map(|(_, value)| flat(value)).collect();
        let row = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            rows,
            [row("exits", "3"), row("read.min_us", "1"), row("[0]", "1"), row("", "7")]
        );
        assert!(groups(&json!([1])).is_empty() && resources(&json!("text")).is_empty());
    }
}
