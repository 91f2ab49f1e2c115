//! CPU templates and threads over the API.

use api_tests::Server;
use serde_json::{Value, json};
use std::fs;

/// A template that sets or clears a bit of the brand string, which any host has.
fn brand(bitmap: &str) -> Value {
    json!({ "cpuid_modifiers": [{ "leaf": "0x80000002", "subleaf": "0x0", "flags": 0,
        "modifiers": [{ "register": "edx", "bitmap": bitmap }] }] })
}

fn start(server: &Server) -> api_tests::Answer {
    server.put("/actions", r#"{ "action_type": "InstanceStart" }"#)
}

#[test]
fn a_template_is_put_got_and_seen_by_the_guest() {
    let server = Server::hull();
    let empty = json!({ "kvm_capabilities": [], "cpuid_modifiers": [], "msr_modifiers": [] });
    assert_eq!(server.get("/cpu-config").json(), empty);
    let ones = "1".repeat(32);
    server.put("/cpu-config", brand(&ones)).done();
    let found = server.get("/cpu-config").json();
    assert_eq!(found["cpuid_modifiers"], brand(&format!("0b{ones}"))["cpuid_modifiers"]);
    // What was got can be put.
    server.put("/cpu-config", &found).done();
    server.put("/machine-config", r#"{ "vcpu_count": 2, "mem_size_mib": 64, "smt": true }"#).done();
    server.boot("cpus cpus=2 leaf=0x80000002");
    server.process.wait_for("cpu 0 cpuid 80000002 0 ");
    let text = server.process.finish().ok().to_owned();
    for id in 0..2 {
        let start = format!("cpu {id} cpuid 80000002 0 ");
        let line = text.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.ends_with(" ffffffff"), "{line}");
        let threads = format!("cpu {id} cpuid 0000000b 0 00000001 00000002 ");
        assert!(text.contains(&threads), "{text}");
    }
}

#[test]
fn the_last_template_counts() {
    let server = Server::firecracker();
    let machine = |more: &str| format!(r#"{{ "vcpu_count": 1, "mem_size_mib": 64 {more} }}"#);
    let named = || server.get("/machine-config").json()["cpu_template"].clone();
    let own = || server.get("/cpu-config").json()["cpuid_modifiers"].as_array().unwrap().len();
    assert_eq!((named(), own()), (Value::Null, 0));
    server.put("/machine-config", machine(r#", "cpu_template": "T2""#)).done();
    assert_eq!((named(), own()), (json!("T2"), 0));
    // Who says nothing of it leaves it.
    server.put("/machine-config", machine("")).done();
    server.patch("/machine-config", r#"{ "vcpu_count": 2 }"#).done();
    assert_eq!(named(), "T2");
    server.put("/cpu-config", brand("0b1")).done();
    assert_eq!((named(), own()), (Value::Null, 1));
    server.put("/machine-config", machine("")).done();
    assert_eq!((named(), own()), (Value::Null, 1));
    server.patch("/machine-config", r#"{ "cpu_template": "T2A" }"#).done();
    assert_eq!((named(), own()), (json!("T2A"), 0));
    server.put("/cpu-config", brand("0b1")).done();
    server.patch("/machine-config", r#"{ "cpu_template": "None" }"#).done();
    assert_eq!((named(), own()), (Value::Null, 0));
    server.put("/cpu-config", brand("0b1")).done();
    server.put("/cpu-config", "{}").done();
    assert_eq!((named(), own()), (Value::Null, 0));
    server.put("/machine-config", machine(r#", "cpu_template": "V1N1""#)).refused(400, &["V1N1"]);
    server
        .put("/machine-config", machine(r#", "cpu_template": "T3""#))
        .refused(400, &["T3", "T2CL"]);
}

#[test]
fn what_is_no_template_is_refused_by_its_field() {
    let server = Server::hull();
    server.put("/cpu-config", brand("0b1")).done();
    let before = server.get("/cpu-config").body;
    let leaf = |key: &str, value: Value| {
        let mut template = brand("0b1");
        template["cpuid_modifiers"][0][key] = value;
        template
    };
    let msr =
        |addr: &str, bitmap: &str| json!({ "msr_modifiers": [{ "addr": addr, "bitmap": bitmap }] });
    for (body, words) in [
        (json!({ "more": 1 }), ["more", "kvm_capabilities", "cpuid_modifiers"]),
        (json!({ "kvm_capabilities": ["x"] }), ["kvm_capabilities[0]", "\"x\"", "number"]),
        (json!({ "kvm_capabilities": [121] }), ["kvm_capabilities[0]", "121", "string"]),
        (leaf("leaf", json!("leaf")), ["cpuid_modifiers[0].leaf", "\"leaf\"", "0x10a"]),
        (leaf("leaf", json!(1)), ["cpuid_modifiers[0].leaf", "1", "string"]),
        (leaf("subleaf", json!("0x100000000")), ["[0].subleaf", "0x100000000", "32 bits"]),
        (leaf("flags", json!(-1)), ["cpuid_modifiers[0].flags", "-1", "u32"]),
        (leaf("more", json!(1)), ["cpuid_modifiers[0].more", "unknown field", "modifiers"]),
        (brand("0b2"), ["modifiers[0].bitmap", "has '2'", "0, 1 and x"]),
        (brand(""), ["modifiers[0].bitmap", "has 0 bits", "1 to 32"]),
        (brand(&"x".repeat(33)), ["modifiers[0].bitmap", "has 33 bits", "1 to 32"]),
        (msr("0x10a", &"0".repeat(65)), ["msr_modifiers[0].bitmap", "has 65 bits", "1 to 64"]),
        (msr("-1", "0b1"), ["msr_modifiers[0].addr", "\"-1\"", "32 bits"]),
        (json!({ "reg_modifiers": [{}] }), ["reg_modifiers", "1 of them", "aarch64"]),
        (json!({ "vcpu_features": null }), ["vcpu_features", "null", "sequence"]),
    ] {
        server.put("/cpu-config", &body).refused(400, &words);
        assert_eq!(server.get("/cpu-config").body, before, "{body}");
    }
    server.put("/cpu-config", "").refused(400, &["Empty PUT"]);
    server.put("/cpu-config", json!({ "reg_modifiers": [], "vcpu_features": [] })).done();
    server.put("/cpu-config/behind/it", "{}").done();
    server.patch("/cpu-config", "{}").refused(405, &["PATCH"]);
}

#[test]
fn what_the_host_cannot_have_is_refused_at_the_start_and_can_be_put_right() {
    let server = Server::firecracker();
    let kernel = machine_tests::PAYLOAD.display().to_string();
    let source = json!({ "kernel_image_path": kernel, "boot_args": "payload=hello" });
    server.put("/boot-source", source).done();
    for (template, words) in [
        (
            json!({ "cpuid_modifiers": [
                { "leaf": "0x77", "subleaf": "0x0", "flags": 0, "modifiers": [] }] }),
            ["Start microvm error", "CPU template", "leaf 0x77"],
        ),
        (
            json!({ "msr_modifiers": [{ "addr": "0x12345", "bitmap": "0b1" }] }),
            ["Start microvm error", "CPU template", "0x12345"],
        ),
        (json!({ "kvm_capabilities": ["999999"] }), ["Start microvm error", "KVM", "999999"]),
    ] {
        server.put("/cpu-config", &template).done();
        start(&server).refused(400, &words);
        assert_eq!(server.get("/").json()["state"], "Not started");
    }
    // One of the two is for the other vendor's CPUs, whatever this host's is.
    let fits = |name: &str| {
        server.patch("/machine-config", json!({ "cpu_template": name })).done();
        let info = fs::read_to_string("/proc/cpuinfo").unwrap();
        info.contains(if name == "T2A" { "AuthenticAMD" } else { "GenuineIntel" })
    };
    let wrong = if fits("T2A") { "T2" } else { "T2A" };
    assert!(!fits(wrong));
    start(&server).refused(400, &["Start microvm error", "CPU template", wrong]);
    server.patch("/machine-config", r#"{ "cpu_template": "None" }"#).done();
    start(&server).done();
    assert!(server.process.finish().ok().contains("hello"));
}

#[test]
fn a_machine_that_runs_keeps_its_cpus() {
    let server = Server::hull();
    server.put("/cpu-config", brand("0b1")).done();
    server.boot("spin say=1");
    server.process.wait_for("hello");
    server.put("/cpu-config", brand("0b0")).refused(400, &["after starting"]);
    assert!(server.get("/cpu-config").body.contains(&format!("{}1", "x".repeat(31))));
    server.process.signal(libc::SIGTERM);
    assert_eq!(server.process.finish().code(), 143);
}
