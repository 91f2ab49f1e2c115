//! `/snapshot`: a machine as two files, and back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use api_tests::{Answer, Connection, Server};
use machine_tests::{Guest, Surroundings};
use serde_json::{Value, json};

pub fn create(server: &Server, folder: &Path) -> Answer {
    let files = json!({ "snapshot_path": folder.join("state"),
        "mem_file_path": folder.join("memory") });
    server.put("/snapshot/create", files)
}

pub fn load(folder: &Path, more: &Value) -> Value {
    let mut params = json!({ "snapshot_path": folder.join("state"),
        "mem_backend": { "backend_type": "File", "backend_path": folder.join("memory") } });
    for (key, value) in more.as_object().unwrap() {
        params[key] = value.clone();
    }
    params
}

pub fn state(server: &Server) -> Value {
    server.get("/").json()["state"].clone()
}

#[test]
fn a_machine_is_saved_and_goes_on_elsewhere_as_it_was_configured() {
    let first = Server::hull();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    first.put("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 128 })).done();
    first
        .put(
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk, "is_read_only": true,
        "is_root_device": false, "rate_limiter": { "ops": { "size": 9, "refill_time": 100 } } }),
        )
        .done();
    first.put("/entropy", json!({})).done();
    first.put("/balloon", json!({ "amount_mib": 3, "deflate_on_oom": true })).done();
    let files = json!({ "snapshot_path": "/x", "mem_file_path": "/y" });
    first.put("/snapshot/create", &files).refused(400, &["before starting"]);
    first.boot("spin say=1 dirty=10485760");
    first.process.wait_for("hello");
    // One that runs goes on afterwards, one that is paused does not.
    create(&first, folder.path()).done();
    assert_eq!(state(&first), "Running");
    first.patch("/vm", json!({ "state": "Paused" })).done();
    create(&first, folder.path()).done();
    assert_eq!(state(&first), "Paused");
    let memory = fs::metadata(folder.path().join("memory")).unwrap();
    assert_eq!(memory.len(), 128 << 20);
    assert!(memory.blocks() * 512 < 12 << 20, "{} KiB", memory.blocks() / 2);
    // By ways that lead there as well.
    fs::create_dir(folder.path().join("x")).unwrap();
    let odd = json!({ "snapshot_path": folder.path().join("x/../state"),
        "mem_file_path": format!("{}/memory/", folder.path().display()) });
    first.put("/snapshot/create", odd).done();
    fs::remove_dir_all(folder.path().join("x")).unwrap();
    // Nothing but the two files is left.
    let mut names: Vec<_> =
        fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["disk", "memory", "state"]);

    let second = Server::firecracker();
    second.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
    assert_eq!(state(&second), "Running");
    second.process.wait_for("...");
    assert_eq!(second.get("/vm/config").json(), first.get("/vm/config").json());
    second.put("/snapshot/load", load(folder.path(), &json!({}))).refused(400, &["after starting"]);
    // Copies of a copy, while it runs.
    let again = tempfile::tempdir().unwrap();
    create(&second, again.path()).done();
    let third = Server::hull();
    third.put("/snapshot/load", load(again.path(), &json!({}))).done();
    assert_eq!(state(&third), "Paused");
    third.patch("/vm", json!({ "state": "Resumed" })).done();
    third.process.wait_for(".");
}

#[test]
fn what_cannot_be_gone_on_from_is_refused_and_leaves_a_machine_to_be_configured() {
    let first = Server::hull();
    let folder = tempfile::tempdir().unwrap();
    first.boot("spin say=1");
    first.process.wait_for("hello");
    create(&first, folder.path()).done();
    let good = load(folder.path(), &json!({}));
    let (state_path, memory_path) = (folder.path().join("state"), folder.path().join("memory"));
    let (whole, memory) = (fs::read(&state_path).unwrap(), fs::read(&memory_path).unwrap());
    let second = Server::hull();
    let refused = |words: &[&str]| {
        second.put("/snapshot/load", &good).refused(400, words);
        assert_eq!(state(&second), "Not started");
        fs::write(&state_path, &whole).unwrap();
        fs::write(&memory_path, &memory).unwrap();
    };
    fs::write(&state_path, &whole[..whole.len() - 1]).unwrap();
    refused(&["state", "bytes long"]);
    let mut flipped = whole.clone();
    flipped[1000] ^= 1;
    fs::write(&state_path, &flipped).unwrap();
    refused(&["state", "checksum"]);
    fs::write(&state_path, b"hello").unwrap();
    refused(&["not a snapshot"]);
    let mut later = whole.clone();
    later[8] += 1;
    fs::write(&state_path, &later).unwrap();
    refused(&["format 2", "reads 1"]);
    fs::write(&memory_path, &memory[..memory.len() - 4096]).unwrap();
    refused(&["memory file", "bytes long"]);
    let mut other = memory.clone();
    let place = other.iter().position(|byte| *byte != 0).unwrap();
    other[place] ^= 1;
    fs::write(&memory_path, &other).unwrap();
    refused(&["memory file", "others"]);
    fs::remove_file(&memory_path).unwrap();
    refused(&["memory", "No such file"]);
    for (more, words) in [
        (json!({ "mem_backend": { "backend_type": "Uffd", "backend_path": "/x" } }), "pager at /x"),
        (json!({ "mem_file_path": "/x" }), "both"),
        (json!({ "network_overrides": [{ "iface_id": "e", "host_dev_name": "t" }] }), "the id e"),
        (json!({ "vsock_override": { "uds_path": "/x" } }), "no vsock"),
        (json!({ "drive_overrides": [{ "drive_id": "q", "path_on_host": "/x" }] }), "the id q"),
    ] {
        let params = load(folder.path(), &more);
        second.put("/snapshot/load", params).refused(400, &[words]);
    }
    second.put("/snapshot/load", &good).done();
    let third = Server::hull();
    third.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })).done();
    third.put("/snapshot/load", &good).refused(400, &["after the machine was configured"]);
    // The first one is as it was all the time.
    assert_eq!(state(&first), "Running");
}

#[test]
fn a_snapshot_that_cannot_be_written_leaves_nothing_and_a_machine_that_runs() {
    let server = Server::hull();
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    server
        .put(
            "/drives/d",
            json!({ "drive_id": "d", "path_on_host": disk,
        "is_root_device": false }),
        )
        .done();
    server.boot("spin say=1");
    server.process.wait_for("hello");
    let put = |state: &Path, memory: &Path| {
        server.put("/snapshot/create", json!({ "snapshot_path": state, "mem_file_path": memory }))
    };
    let here = |name: &str| folder.path().join(name);
    put(Path::new("/nowhere/s"), &here("m")).refused(400, &["/nowhere", "No such file"]);
    put(&here("s"), Path::new("/proc/m")).refused(400, &["/proc"]);
    put(&here("s"), &here("s")).refused(400, &["one file"]);
    put(&here("s"), &disk).refused(400, &["disk", "in use"]);
    // The disk is full.
    put(&here("s"), Path::new("/dev/full/x")).refused(400, &["/dev/full"]);
    assert_eq!(state(&server), "Running");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(fs::read(&disk).unwrap(), vec![7; 1 << 20]);
}

#[test]
fn a_disk_that_is_full_is_named_and_keeps_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let small = Surroundings::new().small(folder.path());
    let server = Server::start(|socket| Guest::hull("api").option("--sock", socket).on(small));
    let pid = server.process.id();
    server.boot("spin say=1 dirty=10485760");
    server.process.wait_for("hello");
    let files = |pid: u32| {
        let seen = format!("/proc/{pid}/fd");
        fs::read_dir(seen).unwrap().count()
    };
    create(&server, folder.path()).refused(400, &["memory", "No space left"]);
    // What was frozen is in memory now, and nothing else of it is anywhere.
    let before = files(pid);
    for _ in 0..3 {
        create(&server, folder.path()).refused(400, &["memory", "No space left"]);
        assert_eq!(state(&server), "Running");
    }
    // Connections may still be on their way out.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while files(pid) > before {
        assert!(std::time::Instant::now() < deadline, "descriptors are left");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let inside = format!("/proc/{pid}/root{}", folder.path().display());
    assert_eq!(fs::read_dir(inside).unwrap().count(), 0);
    // All of it is in the next one, elsewhere.
    let whole = server.folder.path();
    let diff = json!({ "snapshot_type": "Diff", "snapshot_path": whole.join("state"),
        "mem_file_path": whole.join("memory") });
    server.put("/snapshot/create", diff).done();
    let copy = Server::hull();
    copy.put("/snapshot/load", load(whole, &json!({ "resume_vm": true }))).done();
    copy.process.wait_for("..");
}

#[test]
fn a_client_that_goes_away_leaves_a_machine_that_goes_on() {
    let server = Server::hull();
    server.boot("spin say=1 dirty=67108864");
    server.process.wait_for("hello");
    let folder = tempfile::tempdir().unwrap();
    for n in 0..6 {
        let body = json!({ "snapshot_path": folder.path().join("gone"),
            "mem_file_path": folder.path().join("gone.memory") });
        let mut connection = Connection::to(&server.socket);
        connection.ask("PUT", "/snapshot/create", &body.to_string());
        // Before it is read, while the machine stands, while it is written.
        std::thread::sleep(std::time::Duration::from_millis(n * 15));
    }
    // The last of them may still be at it.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        let answer = create(&server, folder.path());
        if answer.status == 204 {
            break;
        }
        answer.refused(400, &["being saved or forked; try again"]);
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(state(&server), "Running");
}

#[test]
fn what_is_the_hosts_can_be_another_elsewhere() {
    let first = Server::hull();
    let folder = first.folder.path();
    let at = |name: &str| folder.join(name);
    fs::write(at("disk"), vec![7; 1 << 20]).unwrap();
    fs::write(at("copy"), vec![7; 1 << 20]).unwrap();
    let drive = json!({ "drive_id": "d", "path_on_host": at("disk"), "is_root_device": false });
    first.put("/drives/d", drive).done();
    first.put("/vsock", json!({ "guest_cid": 3, "uds_path": at("v") })).done();
    first.boot("spin say=1");
    first.process.wait_for("hello");
    create(&first, folder).done();
    let params = load(
        folder,
        &json!({ "resume_vm": true, "clock_realtime": true,
            "drive_overrides": [{ "drive_id": "d", "path_on_host": at("copy") }],
            "vsock_override": { "uds_path": at("w"), "guest_cid": 9 },
            "serial_override": { "serial_out_path": at("out") } }),
    );
    let second = Server::firecracker();
    second.put("/snapshot/load", params).done();
    // Beside the first one, whose disk and socket are its own.
    let config = second.get("/vm/config").json();
    assert_eq!(config["drives"][0]["path_on_host"], at("copy").display().to_string());
    assert_eq!(config["vsock"], json!({ "guest_cid": 9, "uds_path": at("w") }));
    assert!(at("v").exists() && at("w").exists());
    while !fs::read_to_string(at("out")).is_ok_and(|text| text.contains('.')) {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

#[test]
fn a_machine_can_end_where_it_is_saved() {
    let mut server = Server::hull();
    server.boot("spin say=1");
    server.process.wait_for("hello");
    let folder = tempfile::tempdir().unwrap();
    let stop = |folder: &Path| {
        json!({ "stop": true, "snapshot_path": folder.join("state"),
            "mem_file_path": folder.join("memory") })
    };
    // One that cannot be saved goes on.
    server.put("/snapshot/create", stop(Path::new("/nowhere"))).refused(400, &["/nowhere"]);
    assert_eq!(state(&server), "Running");
    server.put("/snapshot/create", stop(folder.path())).done();
    while !server.process.has_ended() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(server.process.finish().code(), 0);
    let copy = Server::hull();
    copy.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
    copy.process.wait_for(".");
    // Files of two snapshots are no pair.
    let other = tempfile::tempdir().unwrap();
    create(&copy, other.path()).done();
    let pair = json!({ "snapshot_path": folder.path().join("state"),
        "mem_backend": { "backend_type": "File", "backend_path": other.path().join("memory") } });
    Server::hull().put("/snapshot/load", pair).refused(400, &["another snapshot's"]);
}

/// VMs that a process has.
fn machines(server: &Server) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", server.process.id())).unwrap().flatten();
    let is_one = |path: &std::path::PathBuf| path.as_os_str() == "anon_inode:kvm-vm";
    files.filter_map(|file| fs::read_link(file.path()).ok()).filter(is_one).count()
}

#[test]
fn a_vm_that_is_ready_takes_what_fits_and_is_no_obstacle_to_what_does_not() {
    let ready = |option: &str| {
        let server = Server::start(|socket| {
            Guest::hull("api").option("--sock", socket).flag(option).flag("--log=info")
        });
        assert_eq!(server.get("/").status, 200);
        assert_eq!(machines(&server), 1, "{option}");
        server
    };
    let folder = tempfile::tempdir().unwrap();
    for option in ["--ready", "--ready=cpus=2,memory=64M"] {
        let server = ready(option);
        server.boot("spin say=1");
        server.process.wait_for("hello");
        assert_eq!(machines(&server), 1, "{option}");
        create(&server, folder.path()).done();
        let copy = ready(option);
        copy.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
        copy.process.wait_for("..");
        assert_eq!(machines(&copy), 1, "{option}");
    }
    let server = ready("--ready");
    // What is not to be had leaves room for another try.
    server
        .put("/snapshot/load", load(Path::new("/nowhere"), &json!({})))
        .refused(400, &["/nowhere"]);
    assert_eq!(machines(&server), 1);
    server.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
    server.process.wait_for("..");
    assert_eq!(machines(&server), 1);
    for (option, words) in [
        ("--ready=cpus=0", ["--ready", "cpus"]),
        ("--ready=memory=1", ["--ready", "memory"]),
        ("--ready=number=1", ["number", "cpus"]),
    ] {
        let socket = folder.path().join("none");
        let outcome = Guest::hull("api").option("--sock", &socket).flag(option).run();
        assert_ne!(outcome.code(), 0);
        for word in words {
            assert!(outcome.stderr.contains(word), "{option}: {}", outcome.stderr);
        }
        assert!(!socket.exists());
    }
}
