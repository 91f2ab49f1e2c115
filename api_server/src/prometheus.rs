//! Metrics as text for Prometheus.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use vmm::metrics::{Group, Value};

/// What is in front of every name.
const PREFIX: &str = "hull";

/// The text (OpenMetrics 1.0): a family for each metric of each kind, in which a device is a label.
///
/// # Errors
/// There is no memory for it.
pub fn text(groups: Vec<Group>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Snapshot(groups)));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Metrics that have been looked at.
#[derive(Debug)]
struct Snapshot(Vec<Group>);

/// A value and which of its kind it is of.
type Series<'a> = (Option<&'a str>, Value);

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families: BTreeMap<(&str, &str), (&str, Vec<Series<'_>>)> = BTreeMap::new();
        for Group { kind, name, metrics } in &self.0 {
            for &(metric, help, value) in metrics {
                let family = families.entry((kind, metric)).or_insert((help, Vec::new()));
                family.1.push((name.as_deref(), value));
            }
        }
        for ((kind, metric), (help, series)) in families {
            // The encoder says `_total` of what only grows.
            let metric = metric.trim_end_matches("_count").trim_end_matches("_agg");
            let name = format!("{kind}_{metric}");
            let mut family = Family { encoder: &mut encoder, kind, name, help, series };
            match family.series.first() {
                Some((_, Value::Count(_))) => {
                    family.encode("", None, MetricType::Counter, &|value| match value {
                        Value::Count(count) => Number::Whole(count),
                        _ => Number::Whole(0),
                    })?;
                }
                Some((_, Value::Level(_))) => {
                    family.encode("", None, MetricType::Gauge, &|value| match value {
                        Value::Level(level) => Number::Whole(level),
                        _ => Number::Whole(0),
                    })?;
                }
                Some((_, Value::Latency { .. })) => {
                    let seconds = |value, of: fn(u64, u64, u64) -> u64| match value {
                        Value::Latency { min, max, sum, .. } => {
                            Number::Real(of(min, max, sum) as f64 / 1e9)
                        }
                        _ => Number::Real(0.0),
                    };
                    let unit = Some(Unit::Seconds);
                    family.encode("", unit.clone(), MetricType::Counter, &|value| {
                        seconds(value, |_, _, sum| sum)
                    })?;
                    family.encode("_min", unit.clone(), MetricType::Gauge, &|value| {
                        seconds(value, |min, _, _| min)
                    })?;
                    family.encode("_max", unit, MetricType::Gauge, &|value| {
                        seconds(value, |_, max, _| max)
                    })?;
                }
                None => {}
            }
        }
        Ok(())
    }
}

enum Number {
    Whole(u64),
    Real(f64),
}

struct Family<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
    kind: &'a str,
    name: String,
    help: &'a str,
    series: Vec<Series<'a>>,
}

impl Family<'_, '_> {
    fn encode(
        &mut self,
        suffix: &str,
        unit: Option<Unit>,
        kind: MetricType,
        number: &dyn Fn(Value) -> Number,
    ) -> fmt::Result {
        let name = format!("{}{suffix}", self.name);
        let counter = matches!(kind, MetricType::Counter);
        let mut encoder = self.encoder.encode_descriptor(&name, self.help, unit.as_ref(), kind)?;
        let put = |mut encoder: MetricEncoder<'_>, value| match (counter, number(value)) {
            (true, Number::Whole(n)) => encoder.encode_counter::<NoLabelSet, _, u64>(&n, None),
            (true, Number::Real(n)) => encoder.encode_counter::<NoLabelSet, _, u64>(&n, None),
            (false, Number::Whole(n)) => encoder.encode_gauge(&n),
            (false, Number::Real(n)) => encoder.encode_gauge(&n),
        };
        if let [(None, value)] = self.series[..] {
            return put(encoder, value);
        }
        let label = if self.kind == "vcpu" { "vcpu" } else { "device" };
        for (which, value) in &self.series {
            put(encoder.encode_family(&[(label, which.unwrap_or_default())])?, *value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_has_a_line_for_each_device() {
        let disk = |name: &str, count| Group {
            kind: "block",
            name: Some(name.to_owned()),
            metrics: vec![
                ("read_count", "Reads.", Value::Count(count)),
                ("read_agg", "Time.", Value::Latency { min: 1, max: 3, sum: 2_500_000_000, count }),
            ],
        };
        let vmm = Group {
            kind: "vmm",
            name: None,
            metrics: vec![("device_events", "Events.", Value::Count(7))],
        };
        let text = text(vec![disk("a", 1), disk("b", 2), vmm]).unwrap();
        for line in [
            "# HELP hull_block_read Reads.",
            "# TYPE hull_block_read counter",
            "hull_block_read_total{device=\"a\"} 1",
            "hull_block_read_total{device=\"b\"} 2",
            "hull_block_read_seconds_total{device=\"a\"} 2.5",
            "hull_block_read_max_seconds{device=\"a\"} 3e-9",
            "hull_vmm_device_events_total 7",
            "# EOF",
        ] {
            assert!(text.lines().any(|other| other == line), "no {line:?} in\n{text}");
        }
        assert_eq!(text.matches("# TYPE hull_block_read counter").count(), 1);
    }
}
