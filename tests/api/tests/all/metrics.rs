//! `/metrics`: as JSON, as text, in a file.

use std::fs;
use std::time::{Duration, Instant};

use api_tests::Server;
use serde_json::{Value, json};

fn number(metrics: &Value, group: &str, metric: &str) -> u64 {
    metrics[group][metric].as_u64().unwrap_or_else(|| panic!("no {group}.{metric}: {metrics}"))
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_a_machine_does_is_counted() {
    let server = Server::hull();
    let disk = server.folder.path().join("disk");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    server
        .put(
            "/drives/data",
            json!({ "drive_id": "data", "path_on_host": disk,
        "is_root_device": false }),
        )
        .done();
    server.put("/entropy", "{}").done();
    let before = server.get("/metrics").json();
    assert_eq!(number(&before, "put_api_requests", "drive_count"), 1);
    assert!(before.get("block_data").is_none());
    server.boot("blk op=read end=halt");
    server.process.wait_for("halting");
    let metrics = server.get("/metrics").json();
    let reads = number(&metrics, "block_data", "read_count");
    assert!(reads > 0, "{metrics}");
    assert_eq!(number(&metrics, "block", "read_count"), reads);
    assert!(number(&metrics, "block_data", "read_bytes") >= reads * 512);
    let took = &metrics["block_data"]["read_agg"];
    assert!(took["max_us"].as_u64() >= took["min_us"].as_u64(), "{took}");
    assert!(number(&metrics, "vcpu", "exit_mmio_write") > 0);
    assert!(number(&metrics, "uart", "write_count") > 0);
    assert_eq!(number(&metrics, "put_api_requests", "actions_count"), 1);
    // What was refused is a failure as well.
    server.put("/drives/data", "{}").refused(400, &[]);
    let metrics = server.get("/metrics").json();
    assert_eq!(number(&metrics, "put_api_requests", "drive_count"), 2);
    assert_eq!(number(&metrics, "put_api_requests", "drive_fails"), 1);
    server.patch("/vm", json!({ "state": "Paused" })).done();
    let metrics = server.get("/metrics").json();
    assert!(number(&metrics, "latencies_us", "pause_vm") > 0);

    let answer = server.get("/metrics/prometheus");
    assert!(answer.head.contains("application/openmetrics-text"), "{}", answer.head);
    let line = format!("hull_block_read_total{{device=\"data\"}} {reads}");
    assert!(answer.body.lines().any(|other| other == line), "no {line}: {}", answer.body);
    assert!(answer.body.ends_with("# EOF\n"));
}

#[test]
fn metrics_are_written_when_asked_and_at_the_end() {
    let server = Server::firecracker();
    let path = server.folder.path().join("metrics");
    let wanted = json!({ "metrics_path": path, "emit_id": true, "properties": { "team": "a" } });
    server.put("/metrics", json!({ "metrics_path": "/nowhere/file" })).refused(400, &["/nowhere"]);
    server.put("/metrics", &wanted).done();
    server.put("/metrics", &wanted).refused(400, &["metrics_path", "already"]);
    assert_eq!(server.get("/vm/config").json()["metrics"]["metrics_path"], json!(path));
    let flush = r#"{ "action_type": "FlushMetrics" }"#;
    server.put("/actions", flush).refused(400, &["not supported before starting"]);
    server.boot("halt");
    server.process.wait_for("halting");
    server.put("/metrics", &wanted).refused(400, &["not supported after starting"]);
    server.put("/actions", flush).done();
    server.put("/actions", flush).done();
    let written = lines(&path);
    assert_eq!(written.len(), 2);
    assert_eq!(written[0]["id"], "anonymous-instance");
    assert_eq!(written[0]["properties"], json!({ "team": "a" }));
    // What came since the last line, not all of it again.
    assert!(number(&written[0], "uart", "write_count") > 0);
    assert_eq!(number(&written[1], "uart", "write_count"), 0);
    assert_eq!(number(&written[1], "put_api_requests", "actions_count"), 1);
    server.process.signal(libc::SIGTERM);
    server.process.finish();
    assert_eq!(lines(&path).len(), 3);
}

#[test]
fn a_reader_that_does_not_read_holds_nobody_up() {
    let server = Server::hull();
    let pipe = server.folder.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: the path is a valid C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    server.put("/metrics", json!({ "metrics_path": pipe })).done();
    server.boot("halt");
    server.process.wait_for("halting");
    let flush = r#"{ "action_type": "FlushMetrics" }"#;
    let begin = Instant::now();
    let refused = (0..100).find_map(|_| {
        let answer = server.put("/actions", flush);
        (answer.status != 204).then_some(answer)
    });
    refused.unwrap().refused(400, &["nobody reads"]);
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert_eq!(server.get("/").json()["state"], "Running");
    // A reader that comes late finds whole lines.
    let mut file = fs::File::options().read(true).write(true).open(&pipe).unwrap();
    let mut bytes = vec![0; 256 << 10];
    let len = std::io::Read::read(&mut file, &mut bytes).unwrap();
    let text = String::from_utf8_lossy(&bytes[..len]);
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert!(first["vcpu"].is_object());
}
