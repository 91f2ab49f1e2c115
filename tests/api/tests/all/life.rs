//! From the first request to the end of the machine.

use api_tests::{Connection, Server};
use serde_json::json;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

#[test]
fn a_machine_is_configured_started_paused_and_ended() {
    let server = Server::hull();
    let info = server.get("/").json();
    assert_eq!(info["state"], "Not started");
    assert_eq!(info["app_name"], "Hull");
    let mode = fs::metadata(&server.socket).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    server.patch("/vm", r#"{ "state": "Paused" }"#).refused(400, &["before starting"]);
    server.put("/machine-config", r#"{ "vcpu_count": 2, "mem_size_mib": 96 }"#).done();
    server.boot("spin say=1");
    server.process.wait_for("hello");
    assert_eq!(server.get("/").json()["state"], "Running");
    server
        .put("/actions", r#"{ "action_type": "InstanceStart" }"#)
        .refused(400, &["after starting"]);
    server
        .put("/machine-config", r#"{ "vcpu_count": 1, "mem_size_mib": 96 }"#)
        .refused(400, &["after"]);
    assert_eq!(server.get("/machine-config").json()["vcpu_count"], 2);
    for (wanted, state) in [("Paused", "Paused"), ("Paused", "Paused"), ("Resumed", "Running")] {
        server.patch("/vm", json!({ "state": wanted })).done();
        assert_eq!(server.get("/").json()["state"], state);
    }
    server.process.wait_for(".");
    server.process.signal(libc::SIGTERM);
    let Server { process, socket, folder } = server;
    let outcome = process.finish();
    assert_eq!(outcome.code(), 143, "{}", outcome.stderr);
    assert!(outcome.left.is_empty(), "{:?}", outcome.left);
    assert!(!socket.exists(), "the socket goes with the process");
    drop(folder);
}

#[test]
fn a_machine_that_cannot_start_can_be_configured_otherwise() {
    let server = Server::hull();
    server.put("/actions", r#"{ "action_type": "InstanceStart" }"#).refused(400, &["kernel"]);
    let text = server.folder.path().join("text");
    fs::write(&text, "no kernel").unwrap();
    server.put("/boot-source", json!({ "kernel_image_path": text })).done();
    let refused = server.put("/actions", r#"{ "action_type": "InstanceStart" }"#);
    refused.refused(400, &["Start microvm error", "not a kernel image"]);
    assert_eq!(server.get("/").json()["state"], "Not started");
    server.boot("hello");
    let outcome = server.process.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("hello"), "{}", outcome.stdout);
}

#[test]
fn what_is_refused_changes_nothing() {
    let server = Server::hull();
    let before = server.get("/vm/config").body;
    let file = server.folder.path().join("disk");
    fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let drive = |id: &str, root: bool| json!({ "drive_id": id, "path_on_host": file, "is_root_device": root, "is_read_only": true });
    let cases = [
        ("/machine-config", json!({ "vcpu_count": 0, "mem_size_mib": 128 }), "vcpu_count: 0"),
        ("/machine-config", json!({ "vcpu_count": 65, "mem_size_mib": 128 }), "vcpu_count: 65"),
        ("/machine-config", json!({ "vcpu_count": 3, "mem_size_mib": 128, "smt": true }), "odd"),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 0 }), "mem_size_mib"),
        ("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": u64::MAX }), "mem_size_mib"),
        ("/machine-config", json!({ "vcpu_count": "1", "mem_size_mib": 1 }), "vcpu_count"),
        (
            "/machine-config",
            json!({ "vcpu_count": 1, "mem_size_mib": 9, "x": 1 }),
            "unknown field `x`",
        ),
        ("/boot-source", json!({ "kernel_image_path": "/nowhere" }), "/nowhere"),
        ("/boot-source", json!({ "initrd_path": "/nowhere" }), "kernel_image_path"),
        ("/drives/a", drive("b", false), "does not match"),
        ("/drives/a-b", drive("a-b", false), "alphanumeric"),
        ("/drives", drive("a", false), "cannot be empty"),
        ("/drives/a", json!({ "drive_id": "a", "is_root_device": false }), "path_on_host"),
        (
            "/drives/a",
            json!({ "drive_id": "a", "is_root_device": false, "path_on_host": "/" }),
            "/",
        ),
        (
            "/network-interfaces/a",
            json!({ "iface_id": "a", "host_dev_name": "a name that is too long" }),
            "host_dev_name",
        ),
        (
            "/network-interfaces/a",
            json!({ "iface_id": "a", "host_dev_name": "t", "guest_mac": "01:00:00:00:00:00" }),
            "multicast",
        ),
        ("/vsock", json!({ "guest_cid": 2, "uds_path": "/tmp/v" }), "cid"),
        ("/actions", json!({ "action_type": "Dance" }), "Dance"),
        ("/pmem/p", json!({}), "not supported yet"),
        ("/snapshot/create", json!({}), "mem_file_path"),
    ];
    for (path, body, word) in cases {
        server.put(path, &body).refused(400, &[word]);
        assert_eq!(server.get("/vm/config").body, before, "{path} {body}");
    }
    server.put("/drives/a", drive("a", true)).done();
    server.put("/drives/b", drive("b", true)).refused(400, &["root"]);
    assert_eq!(server.get("/drives").json().as_array().unwrap().len(), 1);
    // The same id again replaces it.
    server.put("/drives/a", drive("a", false)).done();
    assert_eq!(server.get("/drives/a").json()["is_root_device"], false);
}

#[test]
fn everything_that_is_put_can_be_got() {
    let server = Server::hull();
    let file = server.folder.path().join("disk");
    fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let limiter = json!({
        "bandwidth": { "size": 1_048_576, "one_time_burst": 5, "refill_time": 250 },
        "ops": { "size": 100, "one_time_burst": null, "refill_time": 1000 },
    });
    let resources = [
        (
            "/machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 256, "smt": true,
                    "track_dirty_pages": true, "huge_pages": "2M" }),
        ),
        (
            "/boot-source",
            json!({ "kernel_image_path": &*machine_tests::PAYLOAD, "initrd_path": file,
                    "boot_args": "a b" }),
        ),
        (
            "/drives/data",
            json!({ "drive_id": "data", "path_on_host": file, "is_root_device": true,
                    "partuuid": "0eaa91a0-01", "is_read_only": true, "cache_type": "Writeback",
                    "io_engine": "Sync", "rate_limiter": limiter, "socket": null }),
        ),
        (
            "/network-interfaces/e0",
            json!({ "iface_id": "e0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01",
                    "mtu": 1400, "rx_rate_limiter": limiter, "tx_rate_limiter": null }),
        ),
        ("/vsock", json!({ "guest_cid": 7, "uds_path": "/tmp/v.sock" })),
        ("/entropy", json!({ "rate_limiter": limiter })),
    ];
    for (path, body) in &resources {
        server.put(path, body).done();
    }
    let all = server.get("/vm/config").json();
    for (path, body) in &resources {
        assert_eq!(&server.get(path).json(), body, "{path}");
    }
    assert_eq!(all["drives"][0], resources[2].1);
    assert_eq!(all["vsock"], resources[4].1);
    server.patch("/machine-config", r#"{ "smt": false, "mem_size_mib": 64 }"#).done();
    let machine = server.get("/machine-config").json();
    assert_eq!((&machine["smt"], &machine["mem_size_mib"]), (&json!(false), &json!(64)));
    assert_eq!(machine["vcpu_count"], 2);
}

#[test]
fn a_drive_may_have_an_overlay() {
    let server = Server::hull();
    let path = |name: &str| server.folder.path().join(name);
    fs::write(path("base"), vec![7; 1 << 20]).unwrap();
    let drive = json!({ "drive_id": "d", "path_on_host": path("base"), "is_root_device": false,
                        "overlay": path("top") });
    server.put("/drives/d", &drive).done();
    assert!(!path("top").exists(), "it is made with the machine");
    assert_eq!(server.get("/vm/config").json()["drives"][0]["overlay"], json!(path("top")));
    server.boot("spin");
    assert!(path("top").exists());
    let other = json!({ "drive_id": "d", "path_on_host": path("base") });
    server.patch("/drives/d", other).refused(400, &["has the overlay"]);
    assert!(fs::read(path("base")).unwrap().iter().all(|byte| *byte == 7));
}

#[test]
fn a_disk_of_a_running_machine_grows_and_is_exchanged() {
    let server = Server::hull();
    let path = |name: &str| server.folder.path().join(name);
    for name in ["one", "two"] {
        fs::File::create(path(name)).unwrap().set_len(1 << 20).unwrap();
    }
    let drive = json!({ "drive_id": "d", "path_on_host": path("one"), "is_root_device": false });
    server.put("/drives/d", drive).done();
    server.boot("spin");
    server.process.wait_for("hello");
    fs::File::options().write(true).open(path("one")).unwrap().set_len(4 << 20).unwrap();
    for name in ["one", "two", "one"] {
        server.patch("/drives/d", json!({ "drive_id": "d", "path_on_host": path(name) })).done();
        assert_eq!(server.get("/drives/d").json()["path_on_host"], json!(path(name)));
    }
    let limiter = json!({ "bandwidth": { "size": 1000, "refill_time": 100 } });
    server.patch("/drives/d", json!({ "drive_id": "d", "rate_limiter": limiter })).done();
    let seen = server.get("/drives/d").json();
    assert_eq!(seen["rate_limiter"]["bandwidth"]["size"], 1000);
    // A part that is not named stays as it was.
    let limiter = json!({ "ops": { "size": 7, "refill_time": 100 } });
    server.patch("/drives/d", json!({ "drive_id": "d", "rate_limiter": limiter })).done();
    let seen = server.get("/drives/d").json();
    assert_eq!(seen["rate_limiter"]["bandwidth"]["size"], 1000);
    assert_eq!(seen["rate_limiter"]["ops"]["size"], 7);
    let wrong = [
        (json!({ "drive_id": "d" }), "path_on_host"),
        (json!({ "drive_id": "d", "path_on_host": "/nowhere" }), "/nowhere"),
        (json!({ "drive_id": "d", "path_on_host": "/" }), "/"),
    ];
    for (body, word) in wrong {
        server.patch("/drives/d", body).refused(400, &[word]);
    }
    server.patch("/drives/e", json!({ "drive_id": "e" })).refused(400, &["no drive"]);
    server.process.signal(libc::SIGTERM);
    assert_eq!(server.process.finish().code(), 143);
}

#[test]
fn a_drive_may_be_a_qcow2_image() {
    use machine_tests::qcow2::image;
    let server = Server::hull();
    let path = |name: &str| server.folder.path().join(name);
    fs::write(path("one"), image(1 << 20, None)).unwrap();
    // Another one, which somebody left: it is marked, and has a refcount that is too low.
    let mut left = image(2 << 20, None);
    left[79] = 1;
    left[(2 << 16) + 7] = 0;
    fs::write(path("two"), &left).unwrap();
    fs::write(path("three"), image(1 << 20, Some(("one", "qcow2")))).unwrap();
    let drive = |name: &str| json!({ "drive_id": "d", "path_on_host": path(name), "is_root_device": false });
    server.put("/drives/d", drive("one")).refused(400, &["format=qcow2", "format=raw"]);
    let with = |mut drive: serde_json::Value, key: &str, value: serde_json::Value| {
        drive[key] = value;
        drive
    };
    let image = |name: &str| with(drive(name), "format", json!("qcow2"));
    server.put("/drives/d", image("three")).refused(400, &["stands on \"one\""]);
    server.put("/drives/d", with(image("three"), "backing", json!(true))).done();
    server.put("/drives/d", with(drive("one"), "format", json!("vmdk"))).refused(400, &["vmdk"]);
    server.put("/drives/d", image("one")).done();
    assert_eq!(server.get("/vm/config").json()["drives"][0]["format"], "qcow2");
    server.boot("spin");
    server.process.wait_for("hello");
    let patch = |name: &str| {
        server.patch("/drives/d", json!({ "drive_id": "d", "path_on_host": path(name) }))
    };
    // It is locked by the machine itself.
    patch("one").refused(400, &["in use"]);
    patch("three").refused(400, &["stands on"]);
    patch("missing").refused(400, &["cannot open"]);
    patch("two").done();
    assert_eq!(server.get("/drives/d").json()["path_on_host"], json!(path("two")));
    patch("one").done();
    let mended = fs::read(path("two")).unwrap();
    assert_eq!((mended[79], mended[(2 << 16) + 7]), (0, 1), "it was closed");
    server.process.signal(libc::SIGTERM);
    assert_eq!(server.process.finish().code(), 143);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let server = Server::hull();
    server.get("/");
    let again =
        |socket: &std::path::Path| machine_tests::Guest::hull("api").option("--sock", socket).run();
    let refused = again(&server.socket);
    assert_eq!(refused.code(), 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("another process listens"), "{}", refused.stderr);
    server.get("/");
    let stale = server.folder.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let socket = stale.clone();
    let other = Server::start(|_| machine_tests::Guest::hull("api").option("--sock", socket));
    Connection::to(&stale).ask("GET", "/", "").answer().unwrap();
    assert!(fs::metadata(&stale).unwrap().file_type().is_socket());
    let file = server.folder.path().join("file");
    fs::write(&file, "precious").unwrap();
    let refused = again(&file);
    assert!(refused.stderr.contains("not a socket"), "{}", refused.stderr);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    other.process.signal(libc::SIGKILL);
    assert!(server.get("/").status == 200);
}

#[test]
fn log_lines_go_where_clients_want_them() {
    let server = Server::firecracker();
    let log = server.folder.path().join("log");
    let wanted = json!({ "log_path": log, "level": "Info", "show_level": true });
    server.put("/logger", wanted).done();
    assert_eq!(server.get("/logger").json()["level"], "Info");
    server.put("/logger", r#"{ "level": "Loud" }"#).refused(400, &["level", "Loud"]);
    server.put("/logger", r#"{ "log_path": "/nowhere/log" }"#).refused(400, &["log_path"]);
    server.put("/machine-config", "{}").refused(400, &["vcpu_count"]);
    server.boot("boottimer");
    let folder = server.folder;
    assert_eq!(server.process.finish().code(), 0);
    let text = fs::read_to_string(&log).unwrap();
    let line = text.lines().find(|line| line.contains("vcpu_count")).unwrap();
    // 2026-11-22T09:39:19.756675303 [anonymous-instance:api:INFO] …
    let (time, rest) = line.split_once(' ').unwrap();
    assert!(time.len() == 29 && time.contains('T'), "{line}");
    assert!(rest.starts_with("[anonymous-instance:api:INFO] "), "{line}");
    let boot = text.lines().find(|line| line.contains("Guest-boot-time = ")).unwrap();
    assert!(boot.contains(" CPU us "), "{boot}");
    drop(folder);
}

#[test]
fn a_balloon_is_configured_and_changed() {
    let server = Server::hull();
    server.get("/balloon").refused(400, &["No balloon"]);
    let balloon =
        json!({ "amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    server.put("/machine-config", r#"{ "vcpu_count": 1, "mem_size_mib": 128 }"#).done();
    server
        .put("/balloon", r#"{ "amount_mib": 129, "deflate_on_oom": true }"#)
        .refused(400, &["129M"]);
    server.put("/balloon", &balloon).done();
    assert_eq!(server.get("/balloon").json(), balloon);
    server.patch("/balloon", r#"{ "amount_mib": 1 }"#).refused(400, &["before starting"]);
    server.get("/balloon/statistics").refused(400, &["before starting"]);
    server.boot("spin");
    server.process.wait_for("hello");
    server.patch("/balloon", r#"{ "amount_mib": 200 }"#).refused(400, &["200M"]);
    server.patch("/balloon", r#"{ "amount_mib": 32 }"#).done();
    assert_eq!(server.get("/balloon").json()["amount_mib"], 32);
    let statistics = server.get("/balloon/statistics").json();
    assert_eq!((&statistics["target_mib"], &statistics["actual_mib"]), (&json!(32), &json!(0)));
    assert_eq!(statistics["target_pages"], 8192);
    server.patch("/balloon/statistics", r#"{ "stats_polling_interval_s": 5 }"#).done();
    let off = server.patch("/balloon/statistics", r#"{ "stats_polling_interval_s": 0 }"#);
    off.refused(400, &["cannot be enabled/disabled"]);
    server.patch("/balloon/hinting/start", "{}").refused(400, &["not supported yet"]);
}

#[test]
fn the_serial_port_writes_where_it_is_told_and_drops_what_is_too_much() {
    let server = Server::hull();
    let path = server.folder.path().join("serial");
    let bucket = json!({ "size": 2000, "refill_time": 60_000 });
    let serial = json!({ "serial_out_path": path, "rate_limiter": bucket });
    server.put("/serial", &serial).done();
    let found = server.get("/serial").json();
    assert_eq!(found["serial_out_path"], json!(path));
    assert_eq!(found["rate_limiter"]["size"], 2000);
    assert_eq!(server.get("/vm/config").json()["serial"], found);
    server.put("/serial", json!({ "baud": 9600 })).refused(400, &["baud", "serial_out_path"]);
    // Far more than the bucket has, and the guest comes to its end all the same.
    server.boot("serialflood size=20000 end=halt");
    let deadline = Instant::now() + Duration::from_secs(20);
    let dropped = |server: &Server| server.get("/metrics").json()["uart"].clone();
    let count = loop {
        let uart = dropped(&server);
        if uart["write_count"].as_u64() > Some(20_000) || Instant::now() > deadline {
            break uart["rate_limiter_dropped_bytes"].as_u64().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // What came meanwhile is no more than 33 bytes a second.
    assert!((16_000..18_100).contains(&count), "{count}");
    let written = fs::metadata(&path).unwrap().len();
    assert!((1..4_000).contains(&written), "{written}");
    server.put("/serial", "{}").refused(400, &["not supported after starting"]);
}

#[test]
fn a_console_that_cannot_be_had_is_told_at_the_start() {
    let server = Server::hull();
    let disk = server.folder.path().join("disk");
    fs::write(&disk, vec![0; 4096]).unwrap();
    server
        .put(
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk,
        "is_root_device": false }),
        )
        .done();
    server
        .put(
            "/boot-source",
            json!({ "kernel_image_path": &*machine_tests::PAYLOAD,
        "boot_args": "payload=halt" }),
        )
        .done();
    let start = || server.put("/actions", r#"{ "action_type": "InstanceStart" }"#);
    for path in ["/nowhere/serial", "/tmp", disk.to_str().unwrap()] {
        server.put("/serial", json!({ "serial_out_path": path })).done();
        start().refused(400, &[path]);
        assert_eq!(server.get("/").json()["state"], "Not started");
    }
    assert_eq!(fs::read(&disk).unwrap(), vec![0; 4096]);
    server.put("/serial", "{}").done();
    start().done();
    server.process.wait_for("halting");
}

#[test]
fn an_id_that_is_no_text_is_refused_in_json() {
    let server = Server::hull();
    for path in ["/drives/%ff", "/network-interfaces/%c0%af"] {
        server.put(path, "{}").refused(400, &["UTF-8"]);
    }
}

#[test]
fn two_clients_may_want_the_same() {
    let server = Server::hull();
    server.boot("spin");
    server.process.wait_for("hello");
    for state in ["Paused", "Resumed", "Paused"] {
        let body = json!({ "state": state }).to_string();
        let mut clients: Vec<_> = (0..8).map(|_| Connection::to(&server.socket)).collect();
        for client in &mut clients {
            client.ask("PATCH", "/vm", &body);
        }
        for mut client in clients {
            client.answer().unwrap().done();
        }
    }
}

#[test]
fn who_listens_hears_of_an_end_before_the_start() {
    let server = Server::hull();
    let mut listener = Connection::to(&server.socket);
    listener.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n");
    server.put("/actions", r#"{ "action_type": "Quit" }"#).done();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut listener.0, &mut text).unwrap();
    assert!(text.contains("event: created") && text.contains("\"reason\":\"quit\""), "{text}");
}
