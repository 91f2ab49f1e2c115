//! What a copy of a machine is told over its socket device, and guests that do not answer it. Those that do are
//! among the Linux tests, but for one that says what is expected of it.

use api_tests::{Answer, Connection, Server};
use machine_tests::{Guest, PAYLOAD};
use serde_json::{Value, json};

use super::snapshot::{create, load, state};

/// A guest that sends back what it is told on port 7 is no hook, and nobody is one on another port. Both
/// copies live, and say what was wrong.
#[test]
fn copies_whose_guests_do_not_answer_live() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| folder.path().join(name);
    let pool =
        Guest::hull("pool").option("--socket", path("pool")).option("--keep", "number=1").start();
    let vm = Server::hull();
    let boot = json!({
        "kernel_image_path": &*PAYLOAD,
        "boot_args": "payload=vsock op=listen port=7 mode=echo conns=9",
    });
    vm.put("/boot-source", boot.to_string()).done();
    let fork = |hook: Value, name: &str| {
        // The payload does not read its address again.
        let vsock = json!({ "uds_path": path(name), "guest_cid": 3 });
        json!({ "vsock_override": vsock, "hook": hook })
    };
    let ask = |overrides: &[Value]| {
        let body = json!({
            "count": overrides.len(), "pool": path("pool"), "overrides": overrides,
        });
        vm.ask("POST", "/fork", &body.to_string())
    };
    vm.put("/vsock", json!({ "guest_cid": 3, "uds_path": path("v") }).to_string()).done();
    vm.put("/actions", r#"{ "action_type": "InstanceStart" }"#).done();
    vm.process.wait_for("ready");
    Connection::to(&path("pool"));

    let none = ask(&[fork(json!({ "addresses": [{ "iface_id": "eth7" }] }), "a")]);
    none.refused(400, &["overrides[0].hook.nets", "no network card eth7"]);
    ask(&[fork(json!({ "hostname": "no name" }), "a")]).refused(400, &["hook.hostname"]);
    let forked = ask(&[
        fork(json!({ "port": 7 }), "a"),
        fork(json!({ "port": 8, "hostname": "b" }), "b"),
        fork(Value::Null, "c"),
    ]);
    assert_eq!(forked.status, 200, "{forked:?}");
    let children = forked.json()["children"].clone();
    let what = |n: usize| children[n]["not_ready"].as_str().unwrap_or_default().to_owned();
    assert!(
        what(0).contains("makes no sense: {\"hull\":1,\"resumed\":{\"clone\":1,\"of\":3"),
        "{children}"
    );
    assert_eq!(what(1), "nobody in the guest listens on port 8");
    assert_eq!((&children[0]["ready"], &children[1]["ready"]), (&false.into(), &false.into()));
    assert!(children[2].get("ready").is_none());
    for child in children.as_array().unwrap() {
        let socket = child["api_sock"].as_str().unwrap().as_ref();
        let answer = Connection::to(socket).ask("GET", "/", "").answer().unwrap();
        assert_eq!(answer.json()["state"], "Running");
        let mut end = Connection::to(socket);
        end.ask("PUT", "/actions", r#"{ "action_type": "Quit" }"#).answer();
    }
    drop(pool);
}

/// A guest that is told that it goes on from a snapshot, and says what it is told.
#[test]
fn a_restored_guest_is_told_who_it_is() {
    testnet::in_namespace(false, || {
        testnet::make_tap("tap1", false)?;
        restored();
        Ok(())
    })
    .unwrap();
}

fn restored() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| folder.path().join(name);
    let first = Server::hull();
    first
        .put(
            "/network-interfaces/eth0",
            json!({ "iface_id": "eth0", "host_dev_name": testnet::NAME,
                "guest_mac": "06:00:00:00:00:01" }),
        )
        .done();
    first.put("/vsock", json!({ "guest_cid": 3, "uds_path": at("v") })).done();
    first.boot("vsock op=listen port=1024 mode=hook conns=9");
    first.process.wait_for("ready");
    create(&first, folder.path()).done();

    let ask = |server: &Server, name: &str, more: Value| -> Answer {
        let mut params = json!({ "resume_vm": true,
            "network_overrides": [{ "iface_id": "eth0", "host_dev_name": "tap1" }],
            "vsock_override": { "uds_path": at(name) } });
        for (key, value) in more.as_object().unwrap() {
            params[key] = value.clone();
        }
        server.put("/snapshot/load", load(folder.path(), &params))
    };
    let second = Server::hull();
    let card = |mac: &str| json!([{ "iface_id": "eth0", "guest_mac": mac }]);
    let both = json!({ "network_overrides": card("06:00:00:00:00:02"),
        "hook": { "addresses": card("06:00:00:00:00:03") } });
    for (wish, words) in [
        (json!({ "hook": {}, "resume_vm": false }), ["hook", "set resume_vm"]),
        (json!({ "hook": { "hostname": "no name" } }), ["hook.hostname", "no host name"]),
        (json!({ "hook": { "timeout_ms": 0 } }), ["hook.timeout_ms", "not between"]),
        (json!({ "hook": { "addresses": [{ "iface_id": "q" }] } }), ["hook.nets", "card q"]),
        (json!({ "hook": { "ports": 1 } }), ["hook", "unknown field"]),
        (both, ["mac", "eth0 cannot have both"]),
        (json!({ "network_overrides": [{ "iface_id": "eth0" }] }), ["network_overrides", "eth0"]),
        (json!({ "network_overrides": card("01:00:00:00:00:02") }), ["guest_mac", "multicast"]),
    ] {
        ask(&second, "b", wish).refused(400, &words);
        assert_eq!(state(&second), "Not started");
    }
    // An address that only the card is given is the guest's matter as well.
    let mac = "06:00:00:00:00:02";
    let cards = json!([{ "iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": mac }]);
    let address = json!([{ "iface_id": "eth0", "ip": "10.0.0.2/24", "gateway": "10.0.0.1" }]);
    let hook = json!({ "hostname": "b", "addresses": address });
    let answer = ask(&second, "b", json!({ "network_overrides": cards, "hook": hook }));
    assert_eq!(answer.status, 200, "{answer:?}");
    let told = answer.json();
    assert_eq!(told["ready"], true, "{told}");
    assert!(told["ready_us"].as_u64().unwrap() > 0 && told.get("not_ready").is_none(), "{told}");
    assert_eq!(state(&second), "Running");
    assert_eq!(second.get("/network-interfaces/eth0").json()["guest_mac"], mac);
    let printed = second.process.printed();
    let line = printed.lines().find(|line| line.starts_with("{\"hull\"")).unwrap();
    let told: Value = serde_json::from_str(line).unwrap();
    let told = &told["resumed"];
    assert_eq!(
        (&told["clone"], &told["of"], &told["hostname"]),
        (&1.into(), &1.into(), &"b".into())
    );
    let net = json!([
        { "id": "eth0", "index": 0, "ip": "10.0.0.2/24", "gateway": "10.0.0.1" },
        { "id": "eth0", "index": 0, "mac": mac },
    ]);
    assert_eq!(told["net"], net);
    drop(second);

    // Who is told through nobody lives, and who is not to be told is answered as ever.
    let third = Server::hull();
    let told = ask(&third, "c", json!({ "hook": { "port": 8 } })).json();
    assert_eq!(told["ready"], false);
    assert_eq!(told["not_ready"], "nobody in the guest listens on port 8");
    assert_eq!(state(&third), "Running");
    drop(third);
    let fourth = Server::firecracker();
    ask(&fourth, "d", json!({})).done();
    assert!(!fourth.process.printed().contains("resumed"));
    drop(fourth);
    // An address that is told to the hook is the card's as well.
    let fifth = Server::hull();
    let told = ask(&fifth, "e", json!({ "hook": { "addresses": card(mac) } })).json();
    assert_eq!(told["ready"], true, "{told}");
    assert_eq!(fifth.get("/network-interfaces/eth0").json()["guest_mac"], mac);
}

#[test]
fn a_machine_without_a_vsock_device_has_no_hook() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let first = Server::hull();
    first.boot("spin say=1");
    first.process.wait_for("hello");
    create(&first, folder.path()).done();
    let second = Server::hull();
    let wish = json!({ "resume_vm": true, "hook": {} });
    let answer = second.put("/snapshot/load", load(folder.path(), &wish));
    answer.refused(400, &["hook.port", "no vsock device"]);
    second.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
}
