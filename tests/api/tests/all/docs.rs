//! The documents: the examples of docs/api.md do what they say, and nothing is missing there.

use api_tests::{Connection, Server};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::io::Read;

const API: &str = include_str!("../../../../docs/api.md");
const METRICS: &str = include_str!("../../../../docs/metrics.md");
const OPENAPI: &str = include_str!("../../../../docs/openapi.json");
const REASONS: &str = include_str!("../../contract/reasons");

/// A request that docs/api.md shows, and the status that it says is the answer's.
struct Example {
    line: &'static str,
    method: &'static str,
    path: &'static str,
    body: &'static str,
    status: &'static str,
}

fn examples() -> Vec<Example> {
    let mut examples = Vec::new();
    let mut lines = API.lines().map(str::trim);
    while let Some(line) = lines.next() {
        let Some((before, command)) = line.split_once("--unix-socket $SOCK ") else { continue };
        assert!(before.starts_with("curl "), "{line}");
        let method =
            command.strip_prefix("-X ").map_or("GET", |rest| rest.split(' ').next().unwrap());
        let path = command.split("http://localhost").nth(1).unwrap();
        let path = path.split(' ').next().unwrap();
        let body = command.split_once(" -d '").map_or("", |(_, body)| body.trim_end_matches('\''));
        let status = lines.next().unwrap().strip_prefix("→ ").unwrap();
        examples.push(Example { line, method, path, body, status });
    }
    examples
}

#[test]
fn every_example_does_what_it_says() {
    // Where there is a TAP to be named.
    testnet::in_namespace(false, || {
        run();
        Ok(())
    })
    .unwrap();
}

fn run() {
    let mut server = Server::hull();
    let family = machine_tests::Family::default();
    let pool = family.at("pool").display().to_string();
    let _pool = family.hull("pool").option("--socket", &pool).start();
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display().to_string();
    let disk = format!("{folder}/disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let kernel = machine_tests::PAYLOAD.display().to_string();
    let mut ended = false;
    for Example { line, method, path, body, status } in examples() {
        // What comes behind the end is of another process.
        if ended {
            let before = std::mem::replace(&mut server, Server::hull());
            assert_eq!(before.process.finish().code(), 0);
        }
        let body = body
            .replace("$KERNEL", &kernel)
            .replace("$DISK", &disk)
            .replace("$POOL", &pool)
            .replace("$DIR", &folder)
            .replace("$TAP", testnet::NAME);
        ended = body.contains("\"Quit\"");
        if path == "/events" {
            // The answer has no end yet: its first line has to do.
            let mut connection = Connection::to(&server.socket);
            connection.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
            let expected = format!("HTTP/1.1 {status} ");
            let mut start = vec![0; expected.len()];
            connection.0.read_exact(&mut start).unwrap();
            assert_eq!(String::from_utf8_lossy(&start), expected);
            continue;
        }
        let answer = server.ask(method, path, &body);
        assert_eq!(answer.status.to_string(), status, "{line}\n{answer:?}");
    }
    assert!(ended);
    assert_eq!(server.process.finish().code(), 0);
}

#[test]
fn every_endpoint_has_an_example() {
    let examples = examples();
    let shown = |method: &str, path: &str| {
        let pattern: Vec<&str> = path.split('/').collect();
        let fits = |part: &str, pattern: &&str| pattern.starts_with('{') || part == *pattern;
        examples.iter().any(|example| {
            let parts: Vec<&str> = example.path.split('/').collect();
            example.method == method
                && parts.len() == pattern.len()
                && parts.iter().zip(&pattern).all(|(part, pattern)| fits(part, pattern))
        })
    };
    let described: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut endpoints = 0;
    for (path, methods) in described["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let method = method.to_uppercase();
            assert!(shown(&method, path), "no example of {method} {path}");
            endpoints += 1;
        }
    }
    assert!(endpoints > 30, "{endpoints}");
}

#[test]
fn every_difference_is_told() {
    let reasons: BTreeSet<&str> = REASONS
        .lines()
        .filter(|line| !line.starts_with(['#', ' ']))
        .filter_map(|line| line.split_once(": "))
        .map(|(name, _)| name)
        .collect();
    let (_, differences) = API.split_once("## Where Hull differs").unwrap();
    let rows = differences.lines().filter_map(|line| line.strip_suffix("` |"));
    let cells = rows.filter_map(|row| row.rsplit(" | `").next());
    let told: BTreeSet<&str> = cells.flat_map(|names| names.split("`, `")).collect();
    assert_eq!(told, reasons);
}

/// The metrics that docs/metrics.md has rows for, as `group.metric`.
fn documented() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut group = None;
    for line in METRICS.lines() {
        if line.starts_with('#') {
            let name = line.strip_prefix("### `").and_then(|rest| rest.split('`').next());
            group = name.map(str::to_owned);
        } else if let (Some(group), Some(row)) = (&group, line.strip_prefix("| `")) {
            let names = row.split('|').next().unwrap().split('`');
            for name in names.filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase())) {
                assert!(found.insert(format!("{group}.{name}")), "{group}.{name} is there twice");
            }
        }
    }
    found
}

#[test]
fn every_metric_is_in_the_document_and_no_other() {
    testnet::in_namespace(false, || {
        // Every device that counts; a keyboard controller there is in Firecracker's place alone.
        let server = Server::firecracker();
        let disk = server.folder.path().join("disk");
        fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
        let drive = json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false });
        server.put("/drives/d", drive).done();
        let card = json!({ "iface_id": "e", "host_dev_name": testnet::NAME });
        server.put("/network-interfaces/e", card).done();
        server.put("/mmds/config", json!({ "network_interfaces": ["e"] })).done();
        let socket = server.folder.path().join("v.sock");
        server.put("/vsock", json!({ "guest_cid": 3, "uds_path": socket })).done();
        server.put("/entropy", "{}").done();
        server.put("/balloon", r#"{ "amount_mib": 0, "deflate_on_oom": false }"#).done();
        server.boot("halt");
        let metrics = server.get("/metrics").json();
        let mut counted = BTreeSet::new();
        for (group, metrics) in metrics.as_object().unwrap() {
            // A device's own group has the metrics of its kind's.
            if ["block_d", "net_e", "utc_timestamp_ms"].contains(&group.as_str()) {
                continue;
            }
            for metric in metrics.as_object().unwrap().keys() {
                counted.insert(format!("{group}.{metric}"));
            }
        }
        let documented = documented();
        let missing: Vec<_> = counted.difference(&documented).collect();
        assert!(missing.is_empty(), "not in docs/metrics.md: {missing:?}");
        let more: Vec<_> = documented.difference(&counted).collect();
        assert!(more.is_empty(), "in docs/metrics.md alone: {more:?}");
        Ok(())
    })
    .unwrap();
}
