//! What `GET /vm/config` says of a machine, it says of the one that goes on from its snapshot.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use api_tests::Server;
use machine_tests::{HugePages, PAYLOAD};
use serde_json::{Value, json};

use super::snapshot::load;

const OPENAPI: &str = include_str!("../../../../docs/openapi.json");

/// Settings that this test leaves out, with all below them, and why.
const LEFT_OUT: &[(&str, &str)] = &[
    ("logger", "the process's, not the machine's"),
    ("metrics", "the process's, not the machine's"),
    ("drives.socket", "refused: there is no vhost-user"),
    ("drives.io_engine", "read and forgotten; always the same is said"),
    ("machine-config.cpu_template", "takes the place of cpu-config; see the other test"),
    ("machine-config.huge_pages", "see the other test"),
];

fn left_out(setting: &str) -> bool {
    LEFT_OUT.iter().any(|(name, _)| {
        setting.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// Adds all that `node` of the description says can be set, and whether it has to be.
fn settings(node: &Value, name: String, needed: bool, found: &mut BTreeMap<String, bool>) {
    let description: Value = serde_json::from_str(OPENAPI).unwrap();
    let resolved = |node: &Value| match node["$ref"].as_str() {
        Some(path) => description.pointer(&path[1..]).unwrap().clone(),
        None => node.clone(),
    };
    let mut node = resolved(node);
    if let Some(choices) = node["oneOf"].as_array() {
        node = resolved(choices.iter().find(|choice| choice["type"] != "null").unwrap());
    }
    if !node["items"].is_null() {
        let item = resolved(&node["items"]);
        if !item["properties"].is_null() {
            node = item;
        }
    }
    let Some(properties) = node["properties"].as_object() else {
        found.insert(name, needed);
        return;
    };
    for (key, property) in properties {
        let needed = node["required"].as_array().is_some_and(|all| all.contains(&json!(key)));
        let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
        settings(property, name, needed, found);
    }
}

/// What is said of each setting; of those of lists, what is said of all in them.
fn said(value: &Value, name: String, found: &mut BTreeMap<String, Vec<Value>>) {
    match value {
        Value::Object(all) => {
            for (key, value) in all {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                said(value, name, found);
            }
        }
        Value::Array(all) if all.iter().any(Value::is_object) => {
            all.iter().for_each(|one| said(one, name.clone(), found));
        }
        Value::Null => {}
        value => found.entry(name).or_default().push(value.clone()),
    }
}

fn config(server: &Server) -> Value {
    server.get("/vm/config").json()
}

fn put(server: &Server, all: Value) {
    for (path, body) in all.as_object().unwrap() {
        server.put(path, body).done();
    }
}

/// Saves a machine, which ends, since a socket and its path are one machine's.
fn saved(mut server: Server, room: &Path) {
    let body = json!({ "stop": true, "snapshot_path": room.join("state"),
        "mem_file_path": room.join("memory") });
    server.put("/snapshot/create", body).done();
    while !server.process.has_ended() {
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn wait_for(file: &Path, text: &str) {
    let deadline = Instant::now() + machine_tests::PATIENCE;
    while !fs::read_to_string(file).is_ok_and(|found| found.contains(text)) {
        assert!(Instant::now() < deadline, "{text:?} does not come");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn each_setting_is_said_again_after_a_restore() {
    testnet::in_namespace(false, || {
        each_setting();
        Ok(())
    })
    .unwrap();
}

fn each_setting() {
    let room = tempfile::tempdir().unwrap();
    let at = |name: &str| room.path().join(name);
    for name in ["disk", "other", "initrd"] {
        fs::write(at(name), vec![7; 1 << 20]).unwrap();
    }
    fs::write(at("image"), machine_tests::qcow2::image(1 << 20, None)).unwrap();
    // A machine for which only that is said that has to be.
    let plain = Server::hull();
    put(
        &plain,
        json!({
            "/boot-source": { "kernel_image_path": &*PAYLOAD },
            "/machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
            "/drives/d": { "drive_id": "d", "is_root_device": false, "path_on_host": at("other") },
            "/network-interfaces/e": { "iface_id": "e", "host_dev_name": testnet::NAME },
            "/vsock": { "guest_cid": 3, "uds_path": at("u") },
            "/entropy": {},
            "/balloon": { "amount_mib": 0, "deflate_on_oom": false },
        }),
    );
    plain.put("/mmds/config", json!({ "network_interfaces": ["e"] })).done();
    let bucket = json!({ "size": 65536, "one_time_burst": 10, "refill_time": 100 });
    let ops = json!({ "size": 99, "one_time_burst": 7, "refill_time": 1000 });
    let limiter = json!({ "bandwidth": bucket, "ops": ops });
    let serial = json!({ "serial_out_path": at("out"), "rate_limiter": bucket });
    let first = Server::hull();
    put(
        &first,
        json!({
            "/boot-source": { "kernel_image_path": &*PAYLOAD, "initrd_path": at("initrd"),
                "boot_args": "payload=spin say=1" },
            "/machine-config": { "vcpu_count": 2, "smt": true, "mem_size_mib": 96,
                "track_dirty_pages": true, "forkable": true },
            "/cpu-config": {
                "kvm_capabilities": ["3"],
                "cpuid_modifiers": [{ "leaf": "0x1", "subleaf": "0x0", "flags": 0,
                    "modifiers": [{ "register": "ecx", "bitmap": "0b0".to_owned() + &"x".repeat(31) }] }],
                "msr_modifiers": [{ "addr": "0x176", "bitmap": "0b1" }] },
            "/drives/d": { "drive_id": "d", "is_root_device": true, "path_on_host": at("disk"),
                "partuuid": "0eaa91a0-01", "is_read_only": true, "cache_type": "Writeback",
                "rate_limiter": limiter },
            "/drives/o": { "drive_id": "o", "is_root_device": false, "path_on_host": at("other"),
                "overlay": at("overlay") },
            "/drives/q": { "drive_id": "q", "is_root_device": false, "path_on_host": at("image"),
                "format": "qcow2", "backing": true },
            "/network-interfaces/e": { "iface_id": "e", "host_dev_name": testnet::NAME,
                "guest_mac": "06:00:00:00:00:0a", "mtu": 1400,
                "rx_rate_limiter": limiter, "tx_rate_limiter": limiter },
            "/vsock": { "guest_cid": 7, "uds_path": at("v") },
            "/entropy": { "rate_limiter": limiter },
            "/balloon": { "amount_mib": 5, "deflate_on_oom": true, "free_page_reporting": true,
                "stats_polling_interval_s": 3 },
            "/serial": serial,
        }),
    );
    first
        .put(
            "/mmds/config",
            json!({ "network_interfaces": ["e"], "version": "V2",
                "ipv4_address": "169.254.9.9", "imds_compat": true }),
        )
        .done();
    first.put("/actions", r#"{ "action_type": "InstanceStart" }"#).done();
    wait_for(&at("out"), "hello");
    let (plain, before) = (config(&plain), config(&first));
    saved(first, room.path());
    fs::remove_file(at("out")).unwrap();
    let second = Server::hull();
    // Where the console of another process goes is its own matter.
    let more = json!({ "resume_vm": true, "serial_override": serial });
    second.put("/snapshot/load", load(room.path(), &more)).done();
    wait_for(&at("out"), ".");
    assert_eq!(config(&second), before);
    for path in [
        "/boot-source",
        "/machine-config",
        "/cpu-config",
        "/drives/d",
        "/network-interfaces/e",
        "/vsock",
        "/entropy",
        "/balloon",
        "/serial",
        "/mmds/config",
    ] {
        assert_eq!(second.get(path).status, 200, "{path}");
    }

    // Nothing that can be set was left as it is by itself.
    let mut all = BTreeMap::new();
    let whole = json!({ "$ref": "#/components/schemas/FullVmConfiguration" });
    settings(&whole, String::new(), false, &mut all);
    let (mut set, mut unset) = (BTreeMap::new(), BTreeMap::new());
    said(&before, String::new(), &mut set);
    said(&plain, String::new(), &mut unset);
    for (setting, needed) in &all {
        let differs = set.get(setting) != unset.get(setting);
        let is_set = set.contains_key(setting) && (*needed || differs);
        assert!(
            is_set || left_out(setting),
            "{setting} is not set here, nor left out for a reason"
        );
    }
    for (name, _) in LEFT_OUT {
        assert!(all.keys().any(|setting| setting.starts_with(name)), "there is no {name}");
    }
    for setting in set.keys() {
        assert!(all.contains_key(setting), "{setting} is said, and not described");
    }
}

#[test]
fn huge_pages_and_a_template_are_said_again_after_a_restore() {
    let _pool = HugePages::for_guests(32);
    let room = tempfile::tempdir().unwrap();
    let first = Server::hull();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "2M" });
    put(
        &first,
        json!({ "/machine-config": machine,
        "/boot-source": { "kernel_image_path": &*PAYLOAD, "boot_args": "payload=spin say=1" } }),
    );
    // Each of them is for a few processors, and there may be none for this one.
    let fits = ["T2A", "T2", "T2S", "T2CL", "C3", "None"].into_iter().find(|template| {
        first.patch("/machine-config", json!({ "cpu_template": template })).done();
        first.put("/actions", r#"{ "action_type": "InstanceStart" }"#).status == 204
    });
    assert!(fits.is_some(), "the machine does not start");
    first.process.wait_for("hello");
    let before = config(&first);
    assert_eq!(before["machine-config"]["huge_pages"], "2M");
    let template = before["machine-config"]["cpu_template"].as_str();
    assert_eq!(template.unwrap_or("None"), fits.unwrap());
    saved(first, room.path());
    let second = Server::hull();
    second.put("/snapshot/load", load(room.path(), &json!({ "resume_vm": true }))).done();
    second.process.wait_for(".");
    assert_eq!(config(&second), before);
}
