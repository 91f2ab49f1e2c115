//! The metadata service, read by a guest that speaks TCP by hand.

use machine_tests::{Guest, Outcome};
use std::fs;
use testnet::{NAME, in_namespace};

const CONTENTS: &str = r#"{"latest": {"meta-data": {"id": "i-1", "tags": ["a"]}}, "n": 3}"#;

/// A request as the payload takes it.
fn request(method: &str, path: &str, headers: &[&str]) -> String {
    let lines: String = headers.iter().map(|line| format!("{line}%0d%0a")).collect();
    format!("{method}%20{path}%20HTTP/1.1%0d%0a{lines}%0d%0a")
}

fn get(path: &str) -> String {
    request("GET", path, &[])
}

/// Runs `body` where there is a TAP, with a file of metadata.
fn isolated(contents: &str, body: impl FnOnce(&str) + Send) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), contents).unwrap();
    let path = file.path().to_str().unwrap();
    let outcome = in_namespace(false, || {
        body(path);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

fn guest(net: &str, mmds: &str, scenario: &str) -> Guest {
    Guest::new(&format!("mmds {scenario}"))
        .option("--net", format!("tap={NAME},mac=02:00:00:00:00:01{net}"))
        .option("--mmds", mmds)
}

/// Status and body of each answer. All frames have to be right.
fn answers(outcome: &Outcome) -> Vec<(u16, String)> {
    let text = outcome.ok().replace('\r', "");
    assert_eq!(outcome.number("bad"), 0, "{text}");
    let answers = text.split("answer: ").skip(1).map(|answer| {
        let answer = answer.split("\nend of answer").next().unwrap();
        let (head, body) = answer.split_once("\n\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    });
    answers.collect()
}

fn ask(net: &str, mmds: &str, more: &str, requests: &[String]) -> Vec<(u16, String)> {
    answers(&guest(net, mmds, &format!("{more} request={}", requests.join("|"))).run())
}

#[test]
fn contents_are_listed_and_read() {
    isolated(CONTENTS, |path| {
        let json = request("GET", "/latest", &["Accept:application/json"]);
        let requests =
            [get("/"), get("/latest/meta-data/"), get("/latest/meta-data/id"), json, get("/x")];
        for more in ["", "noevent=1", "indirect=1"] {
            let answers = ask("", path, more, &requests);
            let expected = [
                (200, "latest/\nn"),
                (200, "id\ntags"),
                (200, "i-1"),
                (200, r#"{"meta-data":{"id":"i-1","tags":["a"]}}"#),
                (404, "Resource not found: /x."),
            ];
            assert_eq!(answers, expected.map(|(status, body)| (status, body.to_owned())), "{more}");
        }
    });
}

#[test]
fn a_token_opens_version_2() {
    isolated(CONTENTS, |path| {
        let token = request("PUT", "/latest/api/token", &["X-metadata-token-ttl-seconds:60"]);
        let with_token = request("GET", "/latest/meta-data/id", &["X-metadata-token:$T"]);
        let mmds = format!("{path},version=V2,address=169.254.7.9");
        let answers = ask("", &mmds, "address=169.254.7.9", &[get("/"), token, with_token]);
        let statuses: Vec<_> = answers.iter().map(|(status, _)| *status).collect();
        assert_eq!(statuses, [401, 200, 200], "{answers:?}");
        assert_eq!(answers[2].1, "i-1");
        // Each machine has its own: what another gave is not a token here.
        let stolen = request("GET", "/n", &[&format!("X-metadata-token:{}", answers[1].1)]);
        let refused = ask("", &mmds, "address=169.254.7.9", &[stolen]);
        assert_eq!(refused, [(401, "MMDS token not valid.".to_owned())]);
    });
}

#[test]
fn long_answers_arrive_whole_through_any_window() {
    let long: String = (0..50_000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    isolated(&format!("{{\"long\": \"{long}\"}}"), |path| {
        // A limit of the card is one of the service as well.
        for (net, window) in [("", 100), ("", 65535), (",rx-rate=1M", 8192), (",mtu=600", 8192)] {
            let answers = ask(net, path, &format!("window={window}"), &[get("/long")]);
            assert!(answers == [(200, long.clone())], "{net} {window}");
        }
    });
}

#[test]
fn a_hostile_guest_keeps_itself_out_for_a_while_at_most() {
    isolated(CONTENTS, |path| {
        let mut running = guest("", path, "flood=20000 junk=20000 request=GET%20/n%20HTTP/1.0%0d%0aAccept:application/json%0d%0a%0d%0a").start();
        running.wait_for("end of answer");
        let memory = running.peak_kilobytes("VmHWM");
        assert!(memory < 60_000, "{memory} KiB");
        assert_eq!(answers(&running.finish()), [(200, "3".to_owned())]);
    });
}

#[test]
fn nothing_of_it_reaches_the_host() {
    isolated(CONTENTS, |path| {
        // Without the service the request for its address goes out, and nobody answers.
        let guest = |mmds: bool| {
            let guest = Guest::new("mmds").option("--net", format!("tap={NAME}"));
            if mmds { guest.option("--mmds", path) } else { guest }
        };
        let sent = || {
            let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let line = text.lines().find(|line| line.trim_start().starts_with(NAME)).unwrap();
            // What the host received from the interface: packets.
            line.split_whitespace().nth(2).unwrap().parse::<u64>().unwrap()
        };
        let before = sent();
        answers(&guest(true).run());
        assert_eq!(sent(), before);
        let outcome = guest(false).run();
        assert!(outcome.ok().contains("nobody answers"), "{outcome:?}");
        assert_eq!(sent(), before + 1);
    });
}

#[test]
fn what_cannot_be_served_is_refused() {
    isolated("{", |path| {
        guest("", path, "").run().failed(&["cannot set up mmds", path, "EOF while parsing"]);
        guest("", "/nowhere.json", "").run().failed(&["/nowhere.json", "No such file"]);
        guest("", &format!("{path},net=other"), "")
            .run()
            .misused(&["mmds.net: there is no network card other"]);
        guest(",queues=2", path, "").run().misused(&["mmds.net: net0 has several queue pairs"]);
    });
}
