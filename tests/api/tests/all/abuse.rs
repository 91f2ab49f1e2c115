//! What no client should send.

use api_tests::{Connection, Server};
use std::io::Write;
use std::time::{Duration, Instant};

#[test]
fn malformed_requests_are_answered_or_closed_and_others_go_on() {
    let server = Server::hull();
    let long = format!("GET /{} HTTP/1.1\r\nHost: l\r\n\r\n", "a".repeat(100_000));
    let headers = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(5000));
    let cases: [&[u8]; 14] = [
        b"\r\n\r\n",
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"BREW / HTTP/1.1\r\nHost: l\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: l\r\n\r\n",
        b"PUT /vm HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT /vm HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"PUT /vm HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n",
        b"PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PUT /machine-config HTTP/1.1\r\nContent-Length: 2\r\n\r\n\xff\xfe",
        b"PUT /machine-config HTTP/1.1\r\nContent-Length: 4\r\n\r\n[[[[",
        long.as_bytes(),
        headers.as_bytes(),
    ];
    let mut other = Connection::to(&server.socket);
    for case in cases {
        let start = String::from_utf8_lossy(&case[..case.len().min(40)]).into_owned();
        let answer = Connection::to(&server.socket).send(case).answer();
        if let Some(answer) = &answer {
            assert!((400..500).contains(&answer.status), "{start:?}: {answer:?}");
        }
        // The one that was there before is still served.
        assert_eq!(
            other.ask("GET", "/", "").answer().map(|answer| answer.status),
            Some(200),
            "{start:?}"
        );
    }
    server.ask("GET", "/nowhere", "").refused(404, &["/nowhere"]);
    server.ask("DELETE", "/vm", "").refused(405, &["DELETE"]);
    server.ask("GET", "/version", "{}").refused(400, &["cannot have a body"]);
    server.ask("PUT", "/vm", "").refused(405, &["PUT"]);
    server.ask("PUT", "/entropy", "").refused(400, &["Empty PUT"]);
    let twice = r#"{ "vcpu_count": 1, "vcpu_count": 2, "mem_size_mib": 128 }"#;
    server.put("/machine-config", twice).refused(400, &["duplicate field `vcpu_count`"]);
}

#[test]
fn a_body_is_as_long_as_the_limit_and_no_longer() {
    let server = Server::hull();
    let body = |length: usize| {
        let start = r#"{ "vcpu_count": 1, "mem_size_mib": 128 "#;
        format!("{start}{}}}", " ".repeat(length - start.len() - 1))
    };
    server.put("/machine-config", body(51_200)).done();
    server.put("/machine-config", body(51_201)).refused(413, &["51200"]);
    // In pieces, whose sum nobody announced.
    let mut connection = Connection::to(&server.socket);
    connection
        .send(b"PUT /machine-config HTTP/1.1\r\nHost: l\r\nTransfer-Encoding: chunked\r\n\r\n");
    for _ in 0..60 {
        connection.send(format!("400\r\n{}\r\n", " ".repeat(0x400)).as_bytes());
    }
    connection.send(b"0\r\n\r\n");
    assert_eq!(connection.answer().map(|answer| answer.status), Some(413));
    server.get("/");
}

#[test]
fn requests_come_one_behind_the_other_on_one_connection() {
    let server = Server::hull();
    let mut connection = Connection::to(&server.socket);
    let machine = |mib: u32| format!(r#"{{ "vcpu_count": 1, "mem_size_mib": {mib} }}"#);
    // All of them before the first answer is read.
    for mib in 64..84 {
        connection.ask("PUT", "/machine-config", &machine(mib));
        connection.ask("GET", "/machine-config", "");
    }
    for mib in 64..84 {
        connection.answer().unwrap().done();
        assert_eq!(connection.answer().unwrap().json()["mem_size_mib"], mib);
    }
    // A byte at a time.
    for byte in b"GET /version HTTP/1.1\r\nHost: l\r\n\r\n" {
        connection.0.write_all(&[*byte]).unwrap();
    }
    assert_eq!(connection.answer().unwrap().status, 200);
}

#[test]
fn a_thousand_connections_harm_nobody() {
    let server = Server::hull();
    server.boot("spin say=1");
    server.process.wait_for("hello");
    let mut connections: Vec<Connection> = (0..1000)
        .map(|n| {
            let mut connection = Connection::to(&server.socket);
            match n % 3 {
                // Says nothing, begins something, begins a body.
                0 => &mut connection,
                1 => connection.send(b"GET / HT"),
                _ => connection.send(b"PUT /vm HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"),
            };
            connection
        })
        .collect();
    let start = Instant::now();
    assert_eq!(server.get("/").json()["state"], "Running");
    assert!(start.elapsed() < Duration::from_secs(5), "others are served at once");
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.process.id())).unwrap();
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 128 * 1024, "{resident}");
    server.process.wait_for("...");
    let first = connections.swap_remove(0);
    let mut first = first;
    assert_eq!(first.ask("GET", "/version", "").answer().map(|answer| answer.status), Some(200));
    drop(connections);
    server.get("/");
    server.process.signal(libc::SIGTERM);
    assert_eq!(server.process.finish().code(), 143);
}

#[test]
fn a_pipe_that_nobody_writes_holds_up_nobody() {
    let server = Server::hull();
    let pipe = server.folder.path().join("pipe");
    let path = std::ffi::CString::new(pipe.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a valid C string.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    let source = serde_json::json!({ "kernel_image_path": pipe });
    server.put("/boot-source", source).done();
    let start = server.put("/actions", r#"{ "action_type": "InstanceStart" }"#);
    start.refused(400, &["pipe", "not a regular file"]);
    let drive =
        serde_json::json!({ "drive_id": "d", "path_on_host": pipe, "is_root_device": false });
    server.put("/drives/d", drive).refused(400, &["pipe"]);
    assert_eq!(server.get("/").json()["state"], "Not started");
}

#[test]
fn a_body_that_comes_late_leaves_the_connection_as_it_was() {
    let server = Server::hull();
    let mut connection = Connection::to(&server.socket);
    for (request, status) in [
        ("PUT /nowhere", 404),
        ("OPTIONS /machine-config", 405),
        ("PUT /drives", 400),
        ("PUT /snapshot/create", 400),
        ("PATCH /vm", 400),
        ("GET /version", 400),
    ] {
        let head = format!("{request} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n");
        connection.send(head.as_bytes());
        std::thread::sleep(Duration::from_millis(20));
        connection.send(b"{}");
        assert_eq!(connection.answer().unwrap().status, status, "{request}");
        assert_eq!(connection.ask("GET", "/", "").answer().unwrap().status, 200, "{request}");
    }
}
