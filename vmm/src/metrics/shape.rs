//! Firecracker's JSON: an object per kind, one per device beside it, and in them a number or an object
//! per metric.

use std::collections::BTreeMap;

use devices::metrics::Value;
use serde_json::{Map, Value as Json, json};

use super::Group;

/// Kinds of which each one has an object of its own, `block_rootfs`, beside the sum of all.
const BY_NAME: [&str; 2] = ["block", "net"];

/// What Firecracker 1.12 has in every line and nothing in Hull can raise: what it counts does not
/// happen here, or ends the process. Programs that read the lines into structures want to find them.
const NEVER: [(&str, &[&str]); 16] = [
    (
        "api_server",
        &[
            "process_startup_time_us",
            "process_startup_time_cpu_us",
            "sync_response_fails",
            "sync_vmm_send_timeout_count",
        ],
    ),
    ("balloon", &["activate_fails", "stats_update_fails", "event_fails"]),
    (
        "block",
        &[
            "activate_fails",
            "cfg_fails",
            "no_avail_buffer",
            "event_fails",
            "rate_limiter_event_count",
            "io_engine_throttled_events",
            "remaining_reqs_count",
        ],
    ),
    ("deprecated_api", &["deprecated_http_api_calls", "deprecated_cmd_line_api_calls"]),
    ("i8042", &["error_count", "missed_read_count", "missed_write_count"]),
    ("uart", &["error_count", "flush_count", "missed_read_count", "missed_write_count"]),
    ("latencies_us", &["vmm_load_snapshot", "vmm_pause_vm", "vmm_resume_vm"]),
    ("logger", &["missed_metrics_count", "metrics_fails", "missed_log_count", "log_fails"]),
    (
        "mmds",
        &[
            "rx_accepted",
            "rx_accepted_err",
            "rx_accepted_unusual",
            "rx_bad_eth",
            "rx_count",
            "tx_bytes",
            "tx_count",
            "tx_errors",
            "tx_frames",
            "connections_created",
            "connections_destroyed",
        ],
    ),
    (
        "net",
        &[
            "activate_fails",
            "cfg_fails",
            "mac_address_updates",
            "no_tx_avail_buffer",
            "event_fails",
            "rx_event_rate_limiter_count",
            "rx_partial_writes",
            "rx_count",
            "tx_count",
            "tx_partial_reads",
            "tx_rate_limiter_event_count",
            "tx_spoofed_mac_count",
        ],
    ),
    ("seccomp", &["num_faults"]),
    ("vcpu", &["kvmclock_ctrl_fails"]),
    ("vmm", &["panic_count"]),
    ("signals", &["sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill"]),
    (
        "vsock",
        &[
            "activate_fails",
            "cfg_fails",
            "rx_queue_event_fails",
            "tx_queue_event_fails",
            "ev_queue_event_fails",
            "muxer_event_fails",
            "conn_event_fails",
            "killq_resync",
            "tx_flush_fails",
            "tx_write_fails",
        ],
    ),
    ("entropy", &["activate_fails", "entropy_event_fails", "rate_limiter_event_count"]),
];

/// Values by kind (with name) and metric.
type Values = BTreeMap<(String, &'static str), Value>;

/// Makes the JSON, of everything or of what came since the last time.
#[derive(Debug, Default)]
pub struct Shape {
    told: Values,
}

impl Shape {
    /// All that was counted.
    pub fn of(groups: &[Group]) -> Map<String, Json> {
        json_of(&values(groups))
    }

    /// What came since [`Shape::told`] was called last.
    pub fn news(&self, groups: &[Group]) -> Map<String, Json> {
        let mut values = values(groups);
        for (key, value) in &mut values {
            *value = since(*value, self.told.get(key).copied());
        }
        json_of(&values)
    }

    /// Somebody has all this now.
    pub fn told(&mut self, groups: &[Group]) {
        self.told = values(groups);
    }
}

/// What came on top of `before`. A machine that follows another starts at nothing.
fn since(now: Value, before: Option<Value>) -> Value {
    match (now, before) {
        (Value::Count(now), Some(Value::Count(before))) if now >= before => {
            Value::Count(now - before)
        }
        (
            Value::Latency { min, max, sum, count },
            Some(Value::Latency { sum: earlier, count: fewer, .. }),
        ) if count >= fewer => {
            Value::Latency { min, max, sum: sum.wrapping_sub(earlier), count: count - fewer }
        }
        (now, _) => now,
    }
}

/// Both together.
fn plus(one: Value, other: Value) -> Value {
    match (one, other) {
        (Value::Count(one), Value::Count(other)) => Value::Count(one.wrapping_add(other)),
        (
            Value::Latency { min, max, sum, count },
            Value::Latency { min: low, max: high, sum: more, count: others },
        ) => {
            let min = match (count, others) {
                (0, _) => low,
                (_, 0) => min,
                _ => min.min(low),
            };
            let (max, sum) = (max.max(high), sum.wrapping_add(more));
            Value::Latency { min, max, sum, count: count + others }
        }
        (Value::Level(one), Value::Level(other)) => Value::Level(one.max(other)),
        (one, _) => one,
    }
}

fn values(groups: &[Group]) -> Values {
    let mut values = Values::new();
    let mut add = |kind: String, metric, value| {
        values
            .entry((kind, metric))
            .and_modify(|known| *known = plus(*known, value))
            .or_insert(value);
    };
    for Group { kind, name, metrics } in groups {
        for &(metric, _, value) in metrics {
            if let Some(name) = name.as_ref().filter(|_| BY_NAME.contains(kind)) {
                add(format!("{kind}_{name}"), metric, value);
            }
            add((*kind).to_owned(), metric, value);
        }
    }
    values
}

fn json_of(values: &Values) -> Map<String, Json> {
    let mut all = Map::new();
    let mut put = |kind: &str, metric: &str, value: Json| {
        let kind = all.entry(kind).or_insert_with(|| Json::Object(Map::new()));
        if let Json::Object(kind) = kind {
            kind.entry(metric).or_insert(value);
        }
    };
    for ((kind, metric), value) in values {
        let value = match *value {
            Value::Count(n) | Value::Level(n) => json!(n),
            Value::Latency { min, max, sum, .. } => {
                json!({ "min_us": min / 1000, "max_us": max / 1000, "sum_us": sum / 1000 })
            }
        };
        put(kind, metric, value);
    }
    for (kind, metrics) in NEVER {
        for metric in metrics {
            put(kind, metric, json!(0));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(kind: &'static str, name: Option<&str>, count: u64) -> Group {
        let took =
            Value::Latency { min: count * 1000, max: count * 2000, sum: count * 3000, count };
        let metrics = vec![("read_count", "", Value::Count(count)), ("read_agg", "", took)];
        Group { kind, name: name.map(str::to_owned), metrics }
    }

    #[test]
    fn devices_stand_alone_and_together() {
        let json = Shape::of(&[group("block", Some("a"), 2), group("block", Some("b"), 3)]);
        assert_eq!(json["block_a"]["read_count"], 2);
        assert_eq!(json["block_b"]["read_count"], 3);
        assert_eq!(json["block"]["read_count"], 5);
        assert_eq!(json["block"]["read_agg"], json!({ "min_us": 2, "max_us": 6, "sum_us": 15 }));
        assert_eq!(json["signals"]["sigbus"], 0);
    }

    #[test]
    fn a_line_says_what_is_new_and_a_new_machine_starts_at_nothing() {
        let mut shape = Shape::default();
        let groups = [group("block", Some("a"), 5)];
        assert_eq!(shape.news(&groups)["block"]["read_count"], 5);
        // Nobody heard it.
        assert_eq!(shape.news(&groups)["block"]["read_count"], 5);
        shape.told(&groups);
        assert_eq!(shape.news(&groups)["block"]["read_count"], 0);
        assert_eq!(shape.news(&groups)["block"]["read_agg"]["sum_us"], 0);
        assert_eq!(shape.news(&[group("block", Some("a"), 7)])["block_a"]["read_count"], 2);
        assert_eq!(shape.news(&[group("block", Some("a"), 1)])["block_a"]["read_count"], 1);
    }
}
