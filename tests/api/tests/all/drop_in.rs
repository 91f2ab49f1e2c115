//! Hull in the place of `firecracker`.

use api_tests::{Connection, Server};
use machine_tests::{Guest, HULL, PAYLOAD};
use serde_json::json;
use std::fs;
use std::process::Command;

fn config_file(folder: &tempfile::TempDir, config: &serde_json::Value) -> std::path::PathBuf {
    let path = folder.path().join("config.json");
    fs::write(&path, config.to_string()).unwrap();
    path
}

fn hello() -> serde_json::Value {
    json!({
        "boot-source": { "kernel_image_path": &*PAYLOAD, "boot_args": "payload=hello" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    })
}

#[test]
fn the_version_is_what_others_parse() {
    let version = Guest::hull("firecracker").flag("--version").run();
    assert_eq!(version.code(), 0, "{}", version.stderr);
    let lines: Vec<_> = version.stdout.lines().collect();
    assert_eq!(lines[0], "Firecracker v1.12.1");
    assert!(lines[1].starts_with("Hull v"), "{lines:?}");
    // Called by that name it is Firecracker as well.
    let folder = tempfile::tempdir().unwrap();
    let link = folder.path().join("firecracker");
    std::os::unix::fs::symlink(&*HULL, &link).unwrap();
    let output = Command::new(&link).arg("--version").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), version.stdout);
}

#[test]
fn a_machine_is_started_from_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = config_file(&folder, &hello());
    let outcome = Guest::hull("firecracker").option("--config-file", &file).flag("--no-api").run();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("hello"), "{}", outcome.stdout);
    // With an API beside it, whose GET says the same.
    let mut spin = hello();
    spin["boot-source"]["boot_args"] = json!("payload=spin");
    let file = config_file(&folder, &spin);
    let server = Server::start(|socket| {
        Guest::hull("firecracker").option("--api-sock", socket).option("--config-file", &file)
    });
    server.process.wait_for("hello");
    assert_eq!(server.get("/").json()["state"], "Running");
    assert_eq!(server.get("/").json()["id"], "anonymous-instance");
    assert_eq!(server.get("/vm/config").json()["boot-source"]["boot_args"], "payload=spin");
    server.put("/actions", r#"{ "action_type": "SendCtrlAltDel" }"#).done();
    server.process.signal(libc::SIGTERM);
    assert_eq!(server.process.finish().code(), 143);
}

#[test]
fn exit_codes_are_firecrackers() {
    let folder = tempfile::tempdir().unwrap();
    let run = |options: &[&str]| {
        let guest = Guest::hull("firecracker");
        options.iter().fold(guest, |guest, option| guest.flag(option)).run()
    };
    for wrong in [&["--bogus"][..], &["--id", "a b", "--no-api"], &["--no-api"]] {
        let outcome = run(wrong);
        assert_eq!(outcome.code(), 153, "{wrong:?}: {}", outcome.stderr);
    }
    let outcome = run(&["--level", "loud"]);
    assert_eq!(outcome.code(), 152, "{}", outcome.stderr);
    let outcome = run(&["--seccomp-filter", "/nowhere"]);
    assert_eq!(outcome.code(), 1, "{}", outcome.stderr);
    let mut unknown = hello();
    unknown["drive"] = json!([]);
    let mut missing = hello();
    missing["boot-source"]["kernel_image_path"] = json!("/nowhere");
    let mut no_kernel = hello();
    no_kernel["boot-source"]["kernel_image_path"] = json!("/etc/passwd");
    for (config, word) in [
        (json!("x"), "invalid type"),
        (unknown, "unknown field `drive`"),
        (missing, "/nowhere"),
        (no_kernel, "not a kernel image"),
        (json!({}), "boot-source"),
    ] {
        let file = config_file(&folder, &config);
        let outcome = run(&["--no-api", "--config-file", file.to_str().unwrap()]);
        assert_eq!(outcome.code(), 152, "{config}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    let outcome = run(&["--no-api", "--config-file", "/nowhere"]);
    assert_eq!(outcome.code(), 152, "{}", outcome.stderr);
}

#[test]
fn old_connections_last_as_long_as_firecrackers() {
    let body = r#"{ "vcpu_count": 2, "mem_size_mib": 96 }"#;
    let length = body.len();
    let put = format!("PUT /machine-config HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    let get = "GET /machine-config HTTP/1.0\r\n\r\n";
    let server = Server::firecracker();
    let mut connection = Connection::to(&server.socket);
    for _ in 0..3 {
        connection.send(put.as_bytes()).answer().unwrap().done();
        assert_eq!(connection.send(get.as_bytes()).answer().unwrap().json()["vcpu_count"], 2);
    }
    // In pieces, and one behind the other.
    for byte in [get, &put, get].concat().bytes() {
        connection.send(&[byte]);
    }
    let statuses = [(); 3].map(|()| connection.answer().unwrap().status);
    assert_eq!(statuses, [200, 204, 200]);
    // Hull's own form does as HTTP says.
    let server = Server::hull();
    let mut connection = Connection::to(&server.socket);
    assert_eq!(connection.send(get.as_bytes()).answer().unwrap().status, 200);
    assert_eq!(connection.send(get.as_bytes()).answer(), None);
}

#[test]
fn signals_end_it_with_firecrackers_codes() {
    for (signal, code) in [
        (libc::SIGBUS, 149),
        (libc::SIGSEGV, 150),
        (libc::SIGXCPU, 154),
        (libc::SIGHUP, 156),
        (libc::SIGILL, 157),
        (libc::SIGTERM, 143),
    ] {
        for started in [false, true] {
            let server = Server::firecracker();
            server.get("/");
            // While a thread is made, its maker has signals blocked, and the new one gets them, which may
            // not remove files.
            std::thread::sleep(std::time::Duration::from_millis(50));
            if started {
                server.boot("halt");
                server.process.wait_for("halting");
            }
            server.process.signal(signal);
            let outcome = server.process.finish();
            assert_eq!(outcome.code(), code, "{signal} {started}: {}", outcome.stderr);
            assert!(!server.socket.exists(), "{signal} {started}");
        }
    }
}

#[test]
fn what_is_configured_is_a_configuration_file() {
    let first = Server::firecracker();
    let disk = first.folder.path().join("disk");
    std::fs::write(&disk, vec![0; 4096]).unwrap();
    let socket = first.folder.path().join("vsock");
    let serial = first.folder.path().join("serial");
    let metrics = first.folder.path().join("metrics");
    let bits = json!([{ "leaf": "0x1", "subleaf": "0x0", "flags": 0,
        "modifiers": [{ "register": "ecx", "bitmap": "0b1" }] }]);
    for (path, body) in [
        ("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 200, "smt": true })),
        ("/cpu-config", json!({ "cpuid_modifiers": bits })),
        (
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false,
            "rate_limiter": { "ops": { "size": 100, "refill_time": 1000 } } }),
        ),
        ("/network-interfaces/n", json!({ "iface_id": "n", "host_dev_name": "nowhere0" })),
        ("/vsock", json!({ "guest_cid": 7, "uds_path": socket })),
        ("/entropy", json!({})),
        ("/balloon", json!({ "amount_mib": 1, "deflate_on_oom": true })),
        ("/serial", json!({ "serial_out_path": serial })),
        ("/metrics", json!({ "metrics_path": metrics })),
        ("/mmds/config", json!({ "network_interfaces": ["n"], "version": "V2" })),
        ("/boot-source", json!({ "kernel_image_path": disk, "boot_args": "x" })),
    ] {
        let answer = first.put(path, body);
        assert_eq!(answer.status, 204, "{path}: {answer:?}");
    }
    let config = first.get("/vm/config").body;
    let file = first.folder.path().join("config.json");
    std::fs::write(&file, &config).unwrap();
    // The kernel is none: everything else was understood by then.
    let mut again = Guest::hull("firecracker").flag("--no-api").option("--config-file", &file);
    again = again.variable("XDG_RUNTIME_DIR", first.folder.path());
    let outcome = again.run();
    assert_eq!(outcome.code(), 152, "{}", outcome.stderr);
    let said = ["nowhere0", "kernel", "TAP"];
    assert!(said.iter().any(|word| outcome.stderr.contains(word)), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("unknown field"), "{}", outcome.stderr);
}

#[test]
fn a_guest_that_is_logged_about_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    for boot in ["payload=boottimer", "payload=hostile dev=rng case=all"] {
        let config = json!({
            "boot-source": { "kernel_image_path": &*PAYLOAD, "boot_args": boot },
            "logger": { "log_path": log, "level": "Info", "show_level": true },
            "entropy": {},
        });
        let file = config_file(&folder, &config);
        let outcome =
            Guest::hull("firecracker").flag("--no-api").option("--config-file", &file).run();
        assert_eq!(outcome.code(), 0, "{boot}: {}", outcome.stderr);
    }
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("Guest-boot-time"), "{text}");
}

#[test]
fn the_socket_of_a_vsock_stays_as_firecrackers_does() {
    for (server, stays) in [(Server::firecracker(), true), (Server::hull(), false)] {
        let path = server.folder.path().join("vsock");
        server.put("/vsock", json!({ "guest_cid": 3, "uds_path": path })).done();
        // Clients remove it themselves, and do not find it otherwise.
        server.boot("hello");
        assert_eq!(server.process.finish().code(), 0);
        assert_eq!(path.exists(), stays);
    }
}
