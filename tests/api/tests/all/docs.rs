//! The examples of docs/api.md.

use api_tests::Server;
use std::fs;

const TEXT: &str = include_str!("../../../../docs/api.md");

#[test]
fn every_example_does_what_it_says() {
    // Where there is a TAP to be named.
    testnet::in_namespace(false, || {
        run();
        Ok(())
    })
    .unwrap();
}

fn run() {
    let server = Server::hull();
    let folder = server.folder.path().display().to_string();
    let disk = format!("{folder}/disk");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let kernel = machine_tests::PAYLOAD.display().to_string();
    let mut examples = 0;
    let mut lines = TEXT.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        let Some(command) = line.strip_prefix("curl --unix-socket $SOCK ") else { continue };
        let method = match command.strip_prefix("-X ") {
            Some(rest) => rest.split(' ').next().unwrap(),
            None => "GET",
        };
        let path = command.split("http://localhost").nth(1).unwrap();
        let path = path.split(' ').next().unwrap();
        let body = command.split_once(" -d '").map_or("", |(_, body)| body.trim_end_matches('\''));
        let body = body
            .replace("$KERNEL", &kernel)
            .replace("$DISK", &disk)
            .replace("$DIR", &folder)
            .replace("$TAP", testnet::NAME);
        let answer = server.ask(method, path, &body);
        let expected = lines.next().unwrap().strip_prefix("→ ").unwrap();
        assert_eq!(answer.status.to_string(), expected, "{line}\n{answer:?}");
        examples += 1;
    }
    assert!(examples > 30, "{examples}");
}
