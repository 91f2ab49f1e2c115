//! `hull events` and `hull metrics`.

use super::fake::{self, Fake};
use super::{done, has_row, machine, rows, run, verb};
use machine_tests::{Guest, HULL};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;

const CREATED: &str = "id: 1\nevent: created\ndata: {\"sequence\":1,\"time_ms\":1700000000123,\"event\":\"created\"}\n\n";
const RESET: &str = "id: 2\nevent: stopped\ndata: {\"sequence\":2,\"time_ms\":1700000000124,\
                     \"event\":\"stopped\",\"reason\":\"reset\",\"again\":true}\n\n";
const READY: &str =
    "id: 3\nevent: ready\ndata: {\"sequence\":3,\"time_ms\":1700000000125,\"event\":\"ready\"}\n\n";
const STOPPED: &str = "id: 4\nevent: stopped\ndata: {\"sequence\":4,\"time_ms\":1700000000126,\
                       \"event\":\"stopped\",\"reason\":\"error\",\"message\":\"no room\"}\n\n";

fn events(fake: &Fake, more: &[&str]) -> Guest {
    verb(&fake.socket, "events", more)
}

#[test]
fn events_are_printed_until_the_machine_stops() {
    let all = format!(": hello\n\n{CREATED}: \n\n{RESET}{READY}{STOPPED}{READY}");
    let seen = events(&Fake::telling(&all), &[]).run();
    let rows = rows(seen.ok());
    let names: Vec<&str> = rows.iter().map(|row| row[1]).collect();
    assert_eq!(names, ["created", "stopped", "ready", "stopped"], "{}", seen.stdout);
    assert_eq!(rows[3][2..], ["message=\"no room\"", "reason=error"]);
    assert!(rows[0][0].starts_with("2023-11-") && rows[0][0].ends_with(".123"), "{}", seen.stdout);
    let seen = events(&Fake::telling(&all), &["--json"]).run();
    let lines: Vec<Value> =
        seen.ok().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4);
    assert_eq!((&lines[3]["sequence"], &lines[3]["message"]), (&4.into(), &"no room".into()));
    let seen = events(&Fake::telling(&all), &[]).on_terminal(80, 24).run();
    assert_eq!((seen.code(), seen.stdout.lines().count()), (0, 4), "{}", seen.stdout);
}

#[test]
fn an_event_is_waited_for() {
    let until = |text: &str| events(&Fake::telling(text), &["--until", "ready"]).run();
    let seen = until(&format!("{CREATED}{RESET}{READY}{CREATED}"));
    assert_eq!(rows(seen.ok()).last().unwrap()[1], "ready");
    until(&format!("{CREATED}{STOPPED}"))
        .failed(&["stopped (error: no room) before there was an event `ready`"]);
    until(CREATED).failed(&["is gone"]);
    let seen = events(&Fake::telling(STOPPED), &["--until", "stopped"]).run();
    assert_eq!(rows(seen.ok()).len(), 1);
    let wrong = events(&Fake::telling(READY), &["--until", "rady"]).run();
    assert_eq!(wrong.code(), 2, "{}", wrong.stderr);
    assert!(wrong.stderr.contains("similar value exists: 'ready'"), "{}", wrong.stderr);
}

#[test]
fn a_stream_that_is_none_is_refused() {
    let seen = |text: &str| events(&Fake::telling(text), &[]).run();
    seen("data: {\n\n").failed(&["did not answer properly", "not JSON"]);
    seen(&"x".repeat(100_000)).failed(&["longer than 64 KiB"]);
    // The process of the machine was killed, between two events or within one.
    events(&Fake::saying(fake::EVENTS), &[]).run().failed(&["is gone"]);
    let part = format!("{}{}", fake::EVENTS, fake::chunk("event: re"));
    events(&Fake::saying(part), &[]).run().failed(&["did not answer properly"]);
}

#[test]
fn who_follows_ends_quietly() {
    let (end, ended) = mpsc::channel::<()>();
    let fake = Fake::new(move |mut stream| {
        write!(stream, "{}{}", fake::EVENTS, fake::chunk(CREATED)).unwrap();
        ended.recv().unwrap();
    });
    let follower = events(&fake, &[]).start();
    follower.wait_for("created");
    follower.signal(libc::SIGINT);
    let outcome = follower.finish();
    end.send(()).unwrap();
    assert_eq!((outcome.code(), outcome.stderr.as_str()), (130, ""));
}

#[test]
fn nobody_follows_for_a_reader_that_is_gone() {
    let (go_on, gone) = mpsc::channel::<()>();
    let fake = Fake::new(move |mut stream| {
        write!(stream, "{}{}", fake::EVENTS, fake::chunk(CREATED)).unwrap();
        gone.recv().unwrap();
        // Nothing happens, but that the connection is kept alive, if it was not given up already.
        let _ = write!(stream, "{}", fake::chunk(": \n\n"));
        // Until it is closed, in whatever way.
        let _ = std::io::Read::read_to_end(&mut stream, &mut Vec::new());
    });
    let mut follower = Command::new(&*HULL);
    follower.arg("events").arg(&fake.socket).stdout(Stdio::piped());
    let mut follower = follower.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(follower.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("created"), "{line}");
    go_on.send(()).unwrap();
    assert!(follower.wait().unwrap().success());
}

#[test]
fn a_machine_tells_what_happens_to_it() {
    let server = machine();
    let follower = verb(&server.socket, "events", &["--json"]).start();
    follower.wait_for("created");
    let waits = verb(&server.socket, "events", &["--until", "started"]).start();
    server.boot("spin");
    server.process.wait_for("hello");
    assert_eq!(waits.finish().code(), 0);
    done(&run(&server, "pause", &[]));
    follower.wait_for("paused");
    done(&run(&server, "resume", &[]));
    follower.wait_for("resumed");
    let waits = verb(&server.socket, "events", &["--until", "device-error"]).start();
    waits.wait_for("resumed");
    assert_eq!(run(&server, "stop", &["--force"]).code(), 0);
    let seen = follower.finish();
    let names: Vec<String> = seen
        .ok()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].as_str().unwrap().into())
        .collect();
    assert_eq!(names, ["created", "started", "paused", "resumed", "stopped"]);
    waits.finish().failed(&["stopped (quit", "before there was an event `device-error`"]);
}

#[test]
fn what_is_counted_is_shown() {
    let server = machine();
    server.boot("spin");
    server.process.wait_for("hello");
    let shown = run(&server, "metrics", &[]);
    assert_eq!(rows(shown.ok())[0], ["GROUP", "METRIC", "VALUE"]);
    assert!(rows(&shown.stdout).iter().any(|row| row[0] == "vcpu"), "{}", shown.stdout);
    let json: Value = serde_json::from_str(run(&server, "metrics", &["--json"]).ok()).unwrap();
    assert!(json["vcpu"].is_object(), "{json}");
    let text = run(&server, "metrics", &["--prometheus"]);
    assert!(text.ok().lines().any(|line| line.starts_with("# TYPE ")), "{}", text.stdout);
    run(&server, "metrics", &["--prometheus", "--json"]).misused(&["--prometheus"]);
    let fake = Fake::with("200 OK", r#"{"block": {"read": {"min_us": 3}}, "utc_timestamp_ms": 7}"#);
    let shown = verb(&fake.socket, "metrics", &[]).run();
    has_row(shown.ok(), &["block", "read.min_us", "3"]);
    has_row(&shown.stdout, &["utc_timestamp_ms", "7"]);
}
