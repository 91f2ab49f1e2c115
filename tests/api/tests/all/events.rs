//! `/events`: what happens to a machine, as it happens.

use std::io::{BufRead, BufReader};

use api_tests::{Connection, Server};
use serde_json::{Value, json};

/// Events as they come.
struct Feed(BufReader<std::os::unix::net::UnixStream>);

impl Feed {
    fn of(server: &Server) -> Feed {
        Feed::with(server, "")
    }

    fn with(server: &Server, header: &str) -> Feed {
        let mut connection = Connection::to(&server.socket);
        let head = format!("GET /events HTTP/1.1\r\nHost: localhost\r\n{header}\r\n");
        connection.send(head.as_bytes());
        let mut feed = Feed(BufReader::new(connection.0));
        let status = feed.line().unwrap();
        assert_eq!(status, "HTTP/1.1 200 OK");
        let head: Vec<String> =
            std::iter::from_fn(|| feed.line().filter(|line| !line.is_empty())).collect();
        let is_stream = |line: &String| line.to_ascii_lowercase().contains("text/event-stream");
        assert!(head.iter().any(is_stream), "{head:?}");
        feed
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let len = self.0.read_line(&mut line).unwrap();
        (len > 0).then(|| line.trim_end().to_owned())
    }

    /// The data of the next event; nothing behind the last.
    fn next(&mut self) -> Option<Value> {
        loop {
            let line = self.line()?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).unwrap());
            }
        }
    }

    fn names(&mut self, count: usize) -> Vec<String> {
        let name = |event: Value| event["event"].as_str().unwrap().to_owned();
        (0..count).map(|_| name(self.next().unwrap())).collect()
    }
}

#[test]
fn a_life_is_told_to_those_who_listen_and_to_those_who_come_late() {
    let server = Server::hull();
    let mut early = Feed::of(&server);
    assert_eq!(early.names(1), ["created"]);
    server.boot("boottimer end=halt");
    assert_eq!(early.names(2), ["started", "ready"]);
    server.patch("/vm", json!({ "state": "Paused" })).done();
    server.patch("/vm", json!({ "state": "Resumed" })).done();
    assert_eq!(early.names(2), ["paused", "resumed"]);
    let mut late = Feed::of(&server);
    assert_eq!(late.names(5), ["created", "started", "ready", "paused", "resumed"]);
    let mut rest = Feed::with(&server, "Last-Event-ID: 3\r\n");
    assert_eq!(rest.names(2), ["paused", "resumed"]);
    server.put("/actions", r#"{ "action_type": "Quit" }"#).done();
    for mut feed in [early, late, rest] {
        let end = feed.next().unwrap();
        assert_eq!((&end["event"], &end["reason"]), (&json!("stopped"), &json!("quit")));
        assert_eq!(end["sequence"], 6);
        assert!(feed.next().is_none());
    }
    assert_eq!(server.process.finish().code(), 0);
}

#[test]
fn a_panic_is_told_once() {
    let server = Server::hull();
    let mut feed = Feed::of(&server);
    server.boot("pvpanic times=1000");
    assert_eq!(feed.names(4), ["created", "started", "panicked", "stopped"]);
    server.process.finish();
}

#[test]
fn a_broken_device_is_named() {
    let server = Server::hull();
    server.put("/entropy", "{}").done();
    let mut feed = Feed::of(&server);
    server.boot("hostile dev=rng case=all end=halt");
    assert_eq!(feed.names(2), ["created", "started"]);
    let event = feed.next().unwrap();
    assert_eq!((&event["event"], &event["device"]), (&json!("device-error"), &json!("rng")));
    assert!(event["message"].as_str().unwrap().contains("queue 0"), "{event}");
    server.put("/actions", r#"{ "action_type": "Quit" }"#).done();
}

#[test]
fn listeners_that_do_not_read_hold_nobody_up() {
    let server = Server::hull();
    let deaf: Vec<Feed> = (0..50).map(|_| Feed::of(&server)).collect();
    server.boot("spin");
    for _ in 0..200 {
        server.patch("/vm", json!({ "state": "Paused" })).done();
        server.patch("/vm", json!({ "state": "Resumed" })).done();
    }
    server.put("/actions", r#"{ "action_type": "Quit" }"#).done();
    let outcome = server.process.finish();
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    drop(deaf);
}
