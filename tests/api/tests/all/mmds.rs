//! Metadata, put by clients and read by guests.

use api_tests::Server;
use machine_tests::{Guest, PAYLOAD};
use serde_json::json;
use std::fs;
use testnet::{NAME, in_namespace};

fn isolated(body: impl FnOnce() + Send) {
    in_namespace(false, || {
        body();
        Ok(())
    })
    .unwrap();
}

fn card(server: &Server) {
    server
        .put("/network-interfaces/eth0", json!({ "iface_id": "eth0", "host_dev_name": NAME }))
        .done();
}

const ASK: &str = "GET%20/who%20HTTP/1.0%0d%0a%0d%0a";

#[test]
fn contents_are_put_patched_and_got() {
    let server = Server::firecracker();
    assert_eq!(server.get("/mmds").json(), json!({}));
    server.patch("/mmds", r#"{"a": 1}"#).refused(400, &["not initialized"]);
    assert_eq!(server.get("/mmds").json(), json!({}));
    server.put("/mmds", r#"{"a": {"b": "c", "d": [1]}, "e": null}"#).done();
    server.patch("/mmds", r#"{"a": {"b": null, "f": "g"}}"#).done();
    assert_eq!(server.get("/mmds").json(), json!({ "a": { "d": [1], "f": "g" }, "e": null }));
    for wrong in ["", "{", "{} x"] {
        server.put("/mmds", wrong).refused(400, &[]);
    }
    assert_eq!(server.get("/mmds").json()["a"]["f"], "g");
    // Any JSON will do.
    server.put("/mmds", r#"["x"]"#).done();
    server.put("/mmds", r#""x""#).done();
    assert_eq!(server.get("/mmds").json(), "x");
}

#[test]
fn contents_have_a_limit() {
    let long = |len: usize| json!({ "a": "x".repeat(len - 8) });
    let server = Server::firecracker();
    server.put("/mmds", long(51_200)).done();
    server.put("/mmds", long(51_201)).refused(413, &["limit"]);
    server.patch("/mmds", json!({ "b": 1 })).refused(413, &["doesn't fit", "51206", "51200"]);
    assert_eq!(server.get("/mmds").json(), long(51_200));
    let server = Server::start(|socket| {
        Guest::hull("firecracker").option("--api-sock", socket).option("--mmds-size-limit", "100")
    });
    server.put("/mmds", long(100)).done();
    server.put("/mmds", long(101)).refused(413, &["limit of 100"]);
}

#[test]
fn contents_of_copies_have_a_limit() {
    isolated(|| {
        let server = Server::hull();
        card(&server);
        server.put("/mmds/config", r#"{"network_interfaces": ["eth0"]}"#).done();
        server.boot("spin say=1");
        let ask = |metadata: serde_json::Value| {
            let wishes = json!([{}, { "metadata": metadata }]);
            let body = json!({ "count": 2, "pool": "/nowhere", "overrides": wishes });
            server.ask("POST", "/fork", &body.to_string())
        };
        let long = |len: usize| json!({ "a": "x".repeat(len - 8) });
        ask(long(51_201)).refused(413, &["overrides[1].metadata", "51201", "limit of 51200"]);
        ask(json!("x")).refused(400, &["overrides[1].metadata", "expected a map"]);
        // Nothing else was wrong.
        ask(long(51_200)).refused(400, &["nobody makes processes at /nowhere"]);
    });
}

#[test]
fn the_service_is_configured_before_the_start() {
    isolated(|| {
        let server = Server::firecracker();
        let config = |text: &str| server.put("/mmds/config", text);
        server.get("/mmds/config").refused(400, &["There is no metadata service"]);
        config(r#"{"network_interfaces": []}"#).refused(400, &["is empty"]);
        config(r#"{"network_interfaces": ["eth0"]}"#).refused(400, &["not correspond", "eth0"]);
        card(&server);
        for address in ["10.0.0.1", "169.254.0.1", "169.254.255.1", "x"] {
            let body = json!({ "network_interfaces": ["eth0"], "ipv4_address": address });
            server.put("/mmds/config", body).refused(400, &["address"]);
        }
        config(r#"{"network_interfaces": ["eth0"], "version": "V3"}"#).refused(400, &["V3"]);
        config("{}").refused(400, &["network_interfaces"]);
        assert_eq!(server.get("/vm/config").json()["mmds-config"], json!(null));
        config(r#"{"network_interfaces": ["eth0"], "version": "V2"}"#).done();
        let expected = json!({
            "network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.169.254",
        });
        assert_eq!(server.get("/mmds/config").json(), expected);
        assert_eq!(server.get("/vm/config").json()["mmds-config"], expected);
        server.boot("spin say=1");
        server.process.wait_for("hello");
        config(r#"{"network_interfaces": ["eth0"]}"#).refused(400, &["after starting"]);
        assert_eq!(server.get("/mmds/config").json(), expected);
    });
}

#[test]
fn a_guest_reads_what_was_put_last() {
    isolated(|| {
        let server = Server::firecracker();
        card(&server);
        server.put("/mmds/config", r#"{"network_interfaces": ["eth0"]}"#).done();
        server.put("/mmds", r#"{"who": "first"}"#).done();
        // What is asked for after each answer is a connection of its own.
        server.boot(&format!("mmds wait=1 request={}", [ASK; 3].join("|")));
        server.process.wait_for("first\nend of answer");
        server.patch("/mmds", r#"{"who": "second"}"#).done();
        server.process.wait_for("second\nend of answer");
        // A pause takes nothing away.
        server.patch("/vm", r#"{ "state": "Paused" }"#).done();
        server.put("/mmds", r#"{"who": "third"}"#).done();
        assert_eq!(server.get("/mmds").json()["who"], "third");
        server.patch("/vm", r#"{ "state": "Resumed" }"#).done();
        server.process.wait_for("third\nend of answer");
    });
}

#[test]
fn a_file_has_it_all() {
    isolated(|| {
        let folder = tempfile::tempdir().unwrap();
        let config = |mmds: serde_json::Value| {
            let args = format!("payload=mmds request={ASK}");
            let config = json!({
                "boot-source": { "kernel_image_path": &*PAYLOAD, "boot_args": args },
                "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": NAME }],
                "mmds-config": mmds,
            });
            let path = folder.path().join("config.json");
            fs::write(&path, config.to_string()).unwrap();
            path
        };
        let metadata = folder.path().join("metadata.json");
        let run = |config: &std::path::Path, contents: &str| {
            fs::write(&metadata, contents).unwrap();
            let guest = Guest::hull("firecracker").flag("--no-api");
            guest.option("--config-file", config).option("--metadata", &metadata).run()
        };
        let file = config(json!({ "network_interfaces": ["eth0"] }));
        let outcome = run(&file, r#"{"who": "me"}"#);
        assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
        assert!(outcome.stdout.contains("me\nend of answer"), "{}", outcome.stdout);
        let long = json!("x".repeat(51_200)).to_string();
        for (contents, word) in [("{", "EOF"), (&*long, "limit")] {
            let outcome = run(&file, contents);
            assert_eq!(outcome.code(), 152, "{}", outcome.stderr);
            assert!(outcome.stderr.contains(word), "{}", outcome.stderr);
        }
        let file = config(json!({ "network_interfaces": ["eth1"] }));
        let outcome = run(&file, "{}");
        assert_eq!(outcome.code(), 152, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("eth1"), "{}", outcome.stderr);
    });
}
