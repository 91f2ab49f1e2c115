//! `/fork`: a machine whose copies are processes of their own.

use std::fs;
use std::path::Path;
use std::time::Duration;

use api_tests::{Answer, Connection, Server};
use machine_tests::{Family, Running, eventually, wait_in_file};
use serde_json::{Value, json};

use super::snapshot::{create, state};

/// A process of this family that serves the API.
pub fn server(family: &Family, subcommand: &str, option: &str) -> Server {
    Server::start(|socket| family.hull(subcommand).option(option, socket))
}

/// One at work, with a pool.
pub fn at_work(family: &Family) -> (Running, Server) {
    let pool = family.hull("pool").option("--keep", "number=2,memory=64M").start();
    let mut server = server(family, "api", "--sock");
    server.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64 })).done();
    server.boot("work dirty=16M size=64K every=100M");
    server.process.wait_for("ready");
    server.process.write("d");
    server.process.wait_for("pages=4096");
    eventually(|| family.at("hull/.pool").exists(), String::new);
    (pool, server)
}

fn post(server: &Server, body: &Value) -> Answer {
    server.ask("POST", "/fork", &body.to_string())
}

/// Forks, and waits until each child found its memory as it was.
pub fn forked(server: &Server, family: &Family, body: Value, pages: u32) -> Vec<Value> {
    let number = body["count"].as_u64().unwrap_or(1);
    let mut body = body;
    let wish = |n| json!({ "serial_out_path": family.at(&format!("log-{n}")) });
    for n in 1..=number {
        let _ = fs::remove_file(family.at(&format!("log-{n}")));
    }
    body["overrides"] = (1..=number).map(wish).collect();
    let answer = post(server, &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let children = answer.json()["children"].as_array().unwrap().clone();
    assert_eq!(children.len() as u64, number);
    for n in 1..=number {
        let text = wait_in_file(&family.at(&format!("log-{n}")), 0, &format!("pages={pages}\n"));
        assert!(!text.contains("lost"), "{text}");
    }
    children
}

/// How many machines and servers of this family there are, beside what nobody has taken out of the pool.
fn machines(family: &Family) -> usize {
    family.entries().iter().filter(|name| name.ends_with(".json")).count()
}

#[test]
fn what_makes_no_sense_is_refused() {
    let family = Family::default();
    let early = server(&family, "api", "--sock");
    let (pool, server) = at_work(&family);
    post(&early, &json!({})).refused(400, &["before starting"]);
    let wishes = |count: usize| vec![json!({}); count];
    for (body, words) in [
        (json!({ "count": 0 }), vec!["count", "10000"]),
        (json!({ "count": 10_001 }), vec!["count", "10000"]),
        (json!({ "count": -1 }), vec!["count"]),
        (json!({ "count": 2, "overrides": wishes(3) }), vec!["overrides", "more"]),
        (json!({ "pool": "/nowhere/pool" }), vec!["/nowhere/pool", "hull pool", "No such file"]),
        (json!({ "pool": family.at("plain") }), vec!["plain", "Connection refused"]),
        (json!({ "counts": 1 }), vec!["counts"]),
        (json!({ "timeout_ms": 0 }), vec!["timeout_ms", "600000"]),
        (json!({ "timeout_ms": 600_001 }), vec!["timeout_ms", "600000"]),
        (json!({ "overrides": [{ "names": "x" }] }), vec!["names"]),
    ] {
        fs::write(family.at("plain"), "").unwrap();
        post(&server, &body).refused(400, &words);
        assert_eq!(state(&server), "Running");
    }
    // What can be known before is said of all, and nothing was done.
    let taps = json!([{ "iface_id": "e", "host_dev_name": "t" }]);
    let mac = |last| json!({ "iface_id": "e", "guest_mac": format!("06:00:00:00:00:0{last}") });
    let macs = json!([mac(1), mac(2)]);
    let disks = json!([{ "drive_id": "q", "path_on_host": "/x" }]);
    for (wish, words) in [
        (json!({ "name": "a/b" }), ["overrides[1].name", "a/b"]),
        (json!({ "network_overrides": taps }), ["overrides[1].net", "the id e"]),
        (
            json!({ "network_overrides": [{ "iface_id": "e" }] }),
            ["overrides[1].network_overrides", "e gets neither"],
        ),
        (json!({ "metadata": { "a": 1 } }), ["overrides[1].metadata", "no metadata service"]),
        (json!({ "network_overrides": macs }), ["overrides[1].mac", "e cannot have both"]),
        (json!({ "drive_overrides": disks }), ["overrides[1].disk", "the id q"]),
        (json!({ "vsock_override": { "uds_path": "/x" } }), ["overrides[1].vsock", "no vsock"]),
    ] {
        let laps = || server.process.printed().matches("pages=4096").count();
        let before = laps();
        // Had anything been done there would be a template, which stands still.
        let wishes = [json!({ "name": "good" }), wish];
        let body = json!({ "count": 3, "template": true, "overrides": wishes });
        post(&server, &body).refused(400, &words);
        assert_eq!(state(&server), "Running");
        eventually(|| laps() > before + 1, || "it does not go on".to_owned());
        assert!(!server.process.printed().contains("lost"));
        assert_eq!(machines(&family), 2, "{:?}", family.entries());
    }
    // What is wrong with one of them is that one's.
    let wishes = [json!({ "netns": "/nowhere" }), json!({ "name": "good" })];
    let odd = json!({ "count": 3, "overrides": wishes });
    let children = post(&server, &odd).json()["children"].clone();
    assert!(children[0]["fault_message"].as_str().unwrap().contains("/nowhere"), "{children}");
    assert_eq!(children[1]["name"], "good");
    assert!(children[2]["pid"].is_u64());
    let none = |body: Value| {
        let answer = post(&server, &body).json()["children"][0]["fault_message"].clone();
        answer.as_str().unwrap_or_default().to_owned()
    };
    for (wish, word) in [
        (json!({ "netns": "/nowhere" }), "/nowhere"),
        (json!({ "netns": "/dev/null" }), "/dev/null"),
        (json!({ "serial_out_path": "/nowhere/x" }), "/nowhere/x"),
    ] {
        let why = none(json!({ "overrides": [wish] }));
        assert!(why.contains(word), "{why}");
    }
    // Both servers, and the two that are good.
    assert_eq!(machines(&family), 4);
    forked(&server, &family, json!({ "count": 2 }), 4096);
    drop(pool);
}

#[test]
fn who_can_be_booted_can_be_forked() {
    let family = Family::default();
    let (_pool, _) = at_work(&family);
    let mut server = server(&family, "firecracker", "--api-sock");
    server.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 64 })).done();
    server.boot("work dirty=2M size=64K every=100M");
    server.process.wait_for("ready");
    server.process.write("d");
    server.process.wait_for("pages=512");
    let answer = post(&server, &json!({ "template": true, "paused": true }));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.json()["copied_bytes"].as_u64().unwrap() >= 2 << 20, "{answer:?}");
    assert_eq!(state(&server), "Paused");
    let child = &answer.json()["children"][0];
    let ask = |method: &str, body: &str| {
        let socket = Path::new(child["api_sock"].as_str().unwrap());
        Connection::to(socket).ask(method, if body.is_empty() { "/" } else { "/vm" }, body).answer()
    };
    assert_eq!(ask("GET", "").unwrap().json()["state"], "Paused");
    ask("PATCH", r#"{ "state": "Resumed" }"#).unwrap().done();
    assert_eq!(ask("GET", "").unwrap().json()["state"], "Running");
    forked(&server, &family, json!({ "count": 2 }), 512);
    assert_eq!(state(&server), "Paused");
    server.patch("/vm", json!({ "state": "Resumed" })).done();
    assert_eq!(post(&server, &json!({})).json()["children"].as_array().unwrap().len(), 1);
    assert_eq!(state(&server), "Running");
}

#[test]
fn a_client_that_goes_away_leaves_all_that_it_asked_for() {
    let family = Family::default();
    let (_pool, server) = at_work(&family);
    for n in 0..6 {
        let before = machines(&family);
        let mut connection = Connection::to(&server.socket);
        connection.ask("POST", "/fork", r#"{ "count": 3 }"#);
        // Before it is read, while the machine stands, while children are made.
        std::thread::sleep(Duration::from_millis(n * 10));
        drop(connection);
        let made = || machines(&family) - before;
        // What was read is done to its end, and the machine is free for the next.
        eventually(
            || post(&server, &json!({ "count": 1 })).status == 200,
            || format!("round {n}: {} were made", made()),
        );
        let settled = || {
            let first = made();
            std::thread::sleep(Duration::from_millis(200));
            [1, 4].contains(&first) && made() == first
        };
        eventually(settled, || format!("round {n}: {} were made", made()));
    }
    assert_eq!(state(&server), "Running");
}

#[test]
fn two_at_once_are_two() {
    let family = Family::default();
    let (_pool, server) = at_work(&family);
    let names = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..4 {
                    let answer = post(&server, &json!({ "count": 3 }));
                    if answer.status != 200 {
                        answer.refused(400, &["being saved or forked; try again"]);
                        continue;
                    }
                    for child in answer.json()["children"].as_array().unwrap() {
                        let name = child["name"].as_str().unwrap_or_else(|| panic!("{child}"));
                        names.lock().unwrap().push(name.to_owned());
                    }
                }
            });
        }
    });
    let mut names = names.into_inner().unwrap();
    let all = names.len();
    names.sort();
    names.dedup();
    assert!(all > 11 && names.len() == all, "{names:?}");
    assert_eq!(machines(&family), all + 1);
    forked(&server, &family, json!({ "count": 1 }), 4096);
}

#[test]
fn one_that_is_being_saved_is_not_forked_and_the_other_way_round() {
    let family = Family::default();
    let (_pool, server) = at_work(&family);
    let folder = tempfile::tempdir().unwrap();
    let (mut refused, mut made) = (0, 0);
    let saves = json!({ "snapshot_path": folder.path().join("state"),
        "mem_file_path": folder.path().join("memory") })
    .to_string();
    for n in 0..12 {
        let asks = [("PUT", "/snapshot/create", &saves), ("POST", "/fork", &"{}".to_owned())];
        let [first, second] = if n % 2 == 0 { asks } else { [asks[1], asks[0]] };
        let (mut one, mut other) = (Connection::to(&server.socket), Connection::to(&server.socket));
        one.ask(first.0, first.1, first.2);
        std::thread::sleep(Duration::from_millis(n / 2 * 5));
        other.ask(second.0, second.1, second.2);
        for answer in [one.answer().unwrap(), other.answer().unwrap()] {
            match answer.status {
                200 | 204 => made += 1,
                _ => {
                    answer.refused(400, &["being saved or forked; try again"]);
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 0 && made >= 12, "{refused} refused, {made} made");
    assert_eq!(state(&server), "Running");
    create(&server, folder.path()).done();
    forked(&server, &family, json!({ "count": 2 }), 4096);
}
