//! What a copy of a machine is told over its socket device, and guests that do not answer it. Those that do are
//! among the Linux tests.

use api_tests::{Connection, Server};
use machine_tests::{Guest, PAYLOAD};
use serde_json::{Value, json};

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
