//! `hull VERB NAME|SOCKET`: the client in the binary, against machines, a real Firecracker, and
//! servers that are neither.

mod fake;
mod watching;

use api_tests::{Connection, Server};
use machine_tests::{Guest, HULL, NOBODY, Outcome, PAYLOAD, Surroundings};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use fake::Fake;

/// `hull VERB SOCKET …`.
fn verb(socket: &Path, verb: &str, more: &[&str]) -> Guest {
    let guest = Guest::hull(verb).flag(socket.to_str().unwrap());
    more.iter().fold(guest, |guest, more| guest.flag(more))
}

fn run(server: &Server, name: &str, more: &[&str]) -> Outcome {
    verb(&server.socket, name, more).run()
}

/// Asserts that it went well and said nothing.
fn done(outcome: &Outcome) {
    let said = (outcome.code(), outcome.stdout.as_str(), outcome.stderr.as_str());
    assert_eq!(said, (0, "", ""));
}

/// The cells of a table's rows; two spaces or more lie between them.
fn rows(table: &str) -> Vec<Vec<&str>> {
    let cells = |line| str::split(line, "  ").map(str::trim).filter(|cell| !cell.is_empty());
    table.lines().map(|line| cells(line).collect()).collect()
}

/// Asserts that a table has a row that ends with these cells.
fn has_row(table: &str, cells: &[&str]) {
    assert!(rows(table).iter().any(|row| row.ends_with(cells)), "no {cells:?} in:\n{table}");
}

fn state(server: &Server) -> Value {
    server.get("/").json()["state"].clone()
}

/// A machine with a disk and a balloon, not started yet.
fn machine() -> Server {
    let server =
        Server::start(|socket| Guest::hull("api").option("--sock", socket).option("--name", "web"));
    let disk = server.folder.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let drive = json!({ "drive_id": "data", "path_on_host": disk, "is_root_device": false });
    server.put("/machine-config", r#"{ "vcpu_count": 1, "mem_size_mib": 96 }"#).done();
    server.put("/drives/data", drive).done();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1 });
    server.put("/balloon", balloon).done();
    server
}

fn running() -> Server {
    let server = machine();
    server.boot("spin");
    server.process.wait_for("hello");
    server
}

#[test]
fn a_machine_is_paused_and_resumed_by_name_and_by_socket() {
    let server = machine();
    run(&server, "pause", &[]).failed(&["refused: ", "not supported before starting"]);
    server.boot("spin");
    server.process.wait_for("hello");
    let by_name = |verb: &str, name: &str| {
        Guest::hull(verb).flag(name).variable("XDG_RUNTIME_DIR", server.process.runtime()).run()
    };
    let listed = || {
        let list = Guest::hull("ps").variable("XDG_RUNTIME_DIR", server.process.runtime()).run();
        let json = Guest::hull("ps").flag("--json");
        let json = json.variable("XDG_RUNTIME_DIR", server.process.runtime()).run();
        let machines: Value = serde_json::from_str(json.ok()).unwrap();
        let rows = rows(list.ok());
        assert_eq!((rows[0][2], rows[1][0]), ("STATE", "web"), "{}", list.stdout);
        assert_eq!(machines[0]["state"], rows[1][2]);
        assert_eq!(machines[0]["api"], json!(server.socket));
        rows[1][2].to_owned()
    };
    done(&by_name("pause", "web"));
    assert_eq!((state(&server), listed()), (json!("Paused"), "paused".into()));
    // What it does already is done.
    done(&run(&server, "pause", &[]));
    done(&run(&server, "resume", &[]));
    assert_eq!((state(&server), listed()), (json!("Running"), "running".into()));
    by_name("pause", "wbe").failed(&["no machine named \"wbe\" runs; there are: web"]);
    Guest::hull("pause").run().misused(&["<NAME|SOCKET>"]);
}

#[test]
fn the_configuration_is_shown() {
    let server = machine();
    let limiter = json!({ "bandwidth": { "size": 1 << 20, "refill_time": 100 } });
    server.put("/entropy", json!({ "rate_limiter": limiter })).done();
    let shown = run(&server, "config", &[]);
    assert_eq!(rows(shown.ok())[0], ["RESOURCE", "KEY", "VALUE"]);
    has_row(&shown.stdout, &["vcpu_count", "1"]);
    has_row(&shown.stdout, &["path_on_host", server.folder.path().join("disk").to_str().unwrap()]);
    has_row(&shown.stdout, &["entropy", "rate_limiter", "1M/100ms"]);
    assert!(rows(&shown.stdout).iter().any(|row| row[0] == "drives/data"), "{}", shown.stdout);
    let json: Value = serde_json::from_str(run(&server, "config", &["--json"]).ok()).unwrap();
    assert_eq!(json, server.get("/vm/config").json());
    // On a terminal, lines end as a terminal wants it.
    let seen = verb(&server.socket, "config", &[]).on_terminal(80, 24).run();
    assert_eq!(seen.code(), 0, "{}", seen.stderr);
    assert_eq!(seen.stdout.replace("\r\n", "\n"), shown.stdout);
}

#[test]
fn a_disk_gets_another_file_and_another_limit() {
    let server = running();
    let drive = || server.get("/drives/data").json();
    let other = server.folder.path().join("other");
    File::create(&other).unwrap().set_len(2 << 20).unwrap();
    done(&run(&server, "set-disk", &["data", "--path", other.to_str().unwrap()]));
    assert_eq!(drive()["path_on_host"], json!(other));
    done(&run(&server, "set-disk", &["data", "--rate", "10M/100ms+1M:5ops"]));
    let limit = json!({ "size": 10 << 20, "one_time_burst": 1 << 20, "refill_time": 100 });
    assert_eq!(drive()["rate_limiter"]["bandwidth"], limit);
    assert_eq!(drive()["rate_limiter"]["ops"]["size"], 5);
    // What is not named stays.
    done(&run(&server, "set-disk", &["data", "--rate", "1M"]));
    assert_eq!(drive()["rate_limiter"]["bandwidth"]["size"], 1 << 20);
    assert_eq!(drive()["rate_limiter"]["ops"]["size"], 5);
    done(&run(&server, "set-disk", &["data", "--rate", "none"]));
    assert_eq!(drive()["rate_limiter"], Value::Null);
    assert_eq!(drive()["path_on_host"], json!(other));
    // Its file is looked at again, which is seen by that it has to be there.
    done(&run(&server, "set-disk", &["data"]));
    fs::remove_file(&other).unwrap();
    run(&server, "set-disk", &["data"]).failed(&["refused: ", other.to_str().unwrap()]);
    run(&server, "set-disk", &["date"]).failed(&["has no disk \"date\"; there are: data"]);
    run(&server, "set-disk", &["../vm", "--rate", "1M"]).failed(&["refused: "]);
    run(&server, "set-disk", &["data", "--rate", "fast"]).misused(&["10M:1000ops", "none"]);
}

#[test]
fn a_relative_path_is_one_from_here() {
    let server = running();
    let there = server.folder.path().join("there");
    fs::create_dir(&there).unwrap();
    File::create(there.join("file")).unwrap().set_len(1 << 20).unwrap();
    let status = Command::new(&*HULL)
        .args(["set-disk", server.socket.to_str().unwrap(), "data", "--path", "file"])
        .current_dir(&there)
        .status();
    assert!(status.unwrap().success());
    assert_eq!(server.get("/drives/data").json()["path_on_host"], json!(there.join("file")));
}

#[test]
fn a_card_is_limited() {
    testnet::in_namespace(false, || {
        let server = machine();
        let card = json!({ "iface_id": "eth0", "host_dev_name": testnet::NAME });
        server.put("/network-interfaces/eth0", card).done();
        server.boot("spin");
        let card = || server.get("/network-interfaces/eth0").json();
        done(&run(&server, "set-net", &["eth0", "--rx-rate", "1M", "--tx-rate", "7ops"]));
        assert_eq!(card()["rx_rate_limiter"]["bandwidth"]["size"], 1 << 20);
        assert_eq!(card()["tx_rate_limiter"]["ops"]["size"], 7);
        done(&run(&server, "set-net", &["eth0", "--tx-rate", "none"]));
        assert_eq!(card()["rx_rate_limiter"]["bandwidth"]["size"], 1 << 20);
        assert_eq!(card()["tx_rate_limiter"], Value::Null);
        run(&server, "set-net", &["eth1", "--rx-rate", "1M"]).failed(&["refused: ", "eth1"]);
        run(&server, "set-net", &["eth0"]).misused(&["--rx-rate", "--tx-rate"]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_balloon_is_shown_and_changed() {
    let server = machine();
    // Before the start there are no statistics.
    let shown = run(&server, "balloon", &["--json"]);
    let json: Value = serde_json::from_str(shown.ok()).unwrap();
    assert_eq!((&json["balloon"]["amount_mib"], &json["statistics"]), (&json!(0), &Value::Null));
    server.boot("spin");
    server.process.wait_for("hello");
    done(&run(&server, "balloon", &["32M", "--stats-interval", "5"]));
    let shown = run(&server, "balloon", &[]);
    has_row(shown.ok(), &["amount_mib", "32"]);
    has_row(&shown.stdout, &["stats_polling_interval_s", "5"]);
    has_row(&shown.stdout, &["target_mib", "32"]);
    run(&server, "balloon", &["1G"]).failed(&["refused: ", "96M"]);
    run(&server, "balloon", &["1000"]).misused(&["not a whole number of MiB"]);
    run(&server, "balloon", &["1M", "--json"]).misused(&["--json"]);
    assert_eq!(server.get("/balloon").json()["amount_mib"], 32);
}

#[test]
fn a_machine_is_stopped_by_its_socket() {
    let server = running();
    let begin = Instant::now();
    let stop = run(&server, "stop", &["--timeout", "1"]);
    assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
    let said =
        format!("hull: {} did not power off within 1 s; ending it\n", server.socket.display());
    assert_eq!((stop.code(), stop.stderr), (0, said));
    let Server { process, folder, .. } = server;
    assert_eq!(process.finish().code(), 0);
    drop(folder);

    let server = machine();
    let stop = run(&server, "stop", &["--force"]);
    assert_eq!((stop.code(), stop.stderr.as_str()), (0, ""));
    let Server { process, folder, .. } = server;
    assert_eq!(process.finish().code(), 0);
    drop(folder);
}

#[test]
fn who_waits_at_a_terminal_sees_what_for() {
    let server = running();
    let (mut person, mut program) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: openpty fills the two numbers; the descriptors are then ours.
    let (mut person, program) = unsafe {
        let made = libc::openpty(&raw mut person, &raw mut program, none, none.cast(), none.cast());
        assert_eq!(made, 0);
        (File::from_raw_fd(person), File::from_raw_fd(program))
    };
    // The command goes at once, and its end of the terminal with it.
    let mut stop = Command::new(&*HULL)
        .args(["stop", server.socket.to_str().unwrap(), "--timeout", "1"])
        .stderr(Stdio::from(program))
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    // Ends with an error once nobody has the terminal any more.
    let _ = person.read_to_end(&mut seen);
    assert!(stop.wait().unwrap().success());
    let seen = String::from_utf8(seen).unwrap();
    let line = seen.find(" to power off, 1 s left").unwrap_or_else(|| panic!("{seen:?}"));
    let taken_back = seen.find("\r\x1b[Khull: ").unwrap_or_else(|| panic!("{seen:?}"));
    assert!(line < taken_back, "{seen:?}");
    // A turn each tenth of a second.
    assert!(seen.matches("left").count() <= 20, "{seen:?}");
}

#[test]
fn what_cannot_be_reached_is_told_with_a_cure() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    verb(&place("none"), "pause", &[]).run().failed(&["there is no socket ", "hint: "]);
    fs::write(place("file"), "").unwrap();
    verb(&place("file"), "pause", &[]).run().failed(&["is not a socket", "hint: give the name"]);
    drop(UnixListener::bind(place("stale")).unwrap());
    verb(&place("stale"), "pause", &[]).run().failed(&["nobody listens on ", "hint: ", "rm "]);
    for name in ["stop", "events", "metrics", "config", "balloon"] {
        verb(&place("none"), name, &[]).run().failed(&["there is no socket ", "hint: "]);
    }

    // Longer than the address of a socket can be.
    let long = place(&"d".repeat(150));
    fs::create_dir(&long).unwrap();
    let guest = Guest::hull("pause").flag(long.join("none").to_str().unwrap());
    guest.run().failed(&["there is no socket "]);

    let server = machine();
    let mode = |mode| fs::set_permissions(server.folder.path(), fs::Permissions::from_mode(mode));
    mode(0o755).unwrap();
    let other = |name| verb(&server.socket, name, &[]).on(Surroundings::new().user(NOBODY)).run();
    other("pause").failed(&["this user may not use ", "hint: ", "user 0"]);
    mode(0o700).unwrap();
    other("stop").failed(&["this user may not use ", "become that user, or root"]);
    server.get("/");
}

#[test]
fn answers_of_others_than_machines_do_no_harm() {
    let asks = |fake: Fake| verb(&fake.socket, "config", &[]).run();
    asks(Fake::saying("SSH-2.0-OpenSSH\r\n")).failed(&[
        "did not answer properly",
        "  1: ",
        "hint: ",
    ]);
    asks(Fake::saying("")).failed(&["did not answer properly"]);
    asks(Fake::saying("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{")).failed(&["properly"]);
    asks(Fake::with("200 OK", "no JSON")).failed(&["something else than JSON"]);
    asks(Fake::with("500 Oh", "no JSON")).failed(&["refused: HTTP status 500"]);
    asks(Fake::with("404 Not Found", "{}")).failed(&["has no GET /vm/config", "hint: "]);
    let fault = r#"{"fault_message": "a\u001b[2Jb"}"#;
    asks(Fake::with("400 Bad Request", fault)).failed(&[r"refused: a\u{1b}[2Jb"]);
    let shown = asks(Fake::with("200 OK", "{\"a\": {\"b\": \"\\u001b[2J\\n\"}}"));
    has_row(shown.ok(), &["a", "b", r"\u{1b}[2J\n"]);
    has_row(asks(Fake::with("200 OK", "[[[]]]")).ok(), &["RESOURCE", "KEY", "VALUE"]);
    // More than anybody wants to keep.
    let endless = Fake::new(|mut stream| {
        use std::io::Write;
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        let piece = fake::chunk(&" ".repeat(1 << 20)).into_bytes();
        let pieces = std::iter::once(&head).chain(std::iter::repeat(&piece));
        assert!(pieces.take(100).any(|bytes| stream.write_all(bytes).is_err()), "it took it all");
    });
    asks(endless).failed(&["did not answer properly", "length limit"]);
}

#[test]
fn a_machine_that_does_not_answer_is_not_waited_for_without_end() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let _listener = UnixListener::bind(&socket).unwrap();
    let begin = Instant::now();
    let outcome = verb(&socket, "pause", &[]).run();
    outcome.failed(&["did not answer within 10 s", "hint: its process hangs"]);
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn a_real_firecracker_is_driven_as_well() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/peer");
    let peer = Command::new(script).arg("firecracker").output().unwrap();
    assert!(peer.status.success(), "{}", String::from_utf8_lossy(&peer.stderr));
    let folder = tempfile::tempdir().unwrap();
    let (socket, disk) = (folder.path().join("fc.sock"), folder.path().join("disk"));
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut firecracker = Command::new(String::from_utf8(peer.stdout).unwrap().trim())
        .arg("--api-sock")
        .arg(&socket)
        .stdout(Stdio::null())
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let put = |path: &str, body: Value| {
        Connection::to(&socket).ask("PUT", path, &body.to_string()).answer().unwrap().done();
    };
    put("/drives/d", json!({ "drive_id": "d", "path_on_host": disk, "is_root_device": false }));
    let args = "payload=spin";
    put("/boot-source", json!({ "kernel_image_path": &*PAYLOAD, "boot_args": args }));
    put("/actions", json!({ "action_type": "InstanceStart" }));
    let run = |name: &str, more: &[&str]| verb(&socket, name, more).run();
    done(&run("pause", &[]));
    done(&run("resume", &[]));
    done(&run("set-disk", &["d"]));
    done(&run("set-disk", &["d", "--rate", "1M:10ops"]));
    done(&run("set-disk", &["d", "--rate", "none"]));
    has_row(run("config", &[]).ok(), &["path_on_host", disk.to_str().unwrap()]);
    run("balloon", &[]).failed(&["refused: "]);
    run("metrics", &[]).failed(&["has no GET /metrics", "hint: Firecracker writes"]);
    run("events", &[]).failed(&["has no GET /events", "hint: Firecracker"]);
    let stop = run("stop", &["--timeout", "1"]);
    assert_eq!(stop.code(), 0, "{}", stop.stderr);
    assert!(stop.stderr.contains("by SIGTERM: its API cannot"), "{}", stop.stderr);
    assert!(!firecracker.wait().unwrap().success());
}

#[test]
fn whoever_is_no_monitor_is_not_killed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.sock");
    // This process, which listens and never answers.
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let outcome = Guest::hull("stop").flag("--now").flag(path.to_str().unwrap()).run();
    outcome.failed(&["other.sock", "is no monitor of a machine"]);
}
