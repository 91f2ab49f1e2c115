//! A client of the API, as plain as can be: a socket, a request, an answer. It shares no code with
//! the server, and sends what no library would.

use machine_tests::{Guest, Running};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// What came behind the head.
    pub body: String,
    /// The head, with its lines.
    pub head: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        match serde_json::from_str(&self.body) {
            Ok(value) => value,
            Err(error) => panic!("{error}: {self:?}"),
        }
    }

    /// Asserts that it was refused with this status, and that the message has these words.
    pub fn refused(&self, status: u16, words: &[&str]) {
        assert_eq!(self.status, status, "{self:?}");
        let message = self.json()["fault_message"].as_str().unwrap_or_default().to_owned();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }
    }

    /// Asserts that it was done: 204 without a body.
    pub fn done(&self) {
        assert_eq!((self.status, self.body.as_str()), (204, ""), "{self:?}");
    }
}

/// A connection.
#[derive(Debug)]
pub struct Connection(pub UnixStream);

impl Connection {
    /// Connects, as soon as somebody listens.
    pub fn to(socket: &Path) -> Connection {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    let limit = stream.set_read_timeout(Some(PATIENCE));
                    assert!(limit.is_ok(), "{limit:?}");
                    return Connection(stream);
                }
                Err(error) if Instant::now() > deadline => panic!("{}: {error}", socket.display()),
                Err(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> &mut Connection {
        // The other side may have closed: what it said before counts.
        let _ = self.0.write_all(bytes);
        self
    }

    /// Sends a request.
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> &mut Connection {
        let length = match body.is_empty() {
            true => String::new(),
            false => format!("Content-Length: {}\r\n", body.len()),
        };
        self.send(
            format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}").as_bytes(),
        )
    }

    /// The next answer; `None` if the other side closed instead.
    pub fn answer(&mut self) -> Option<Answer> {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            match self.0.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                _ => return None,
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok())?;
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
        });
        let mut body = vec![0; length.unwrap_or(0)];
        self.0.read_exact(&mut body).ok()?;
        Some(Answer { status, body: String::from_utf8_lossy(&body).into_owned(), head })
    }
}

/// A process that serves the API.
pub struct Server {
    /// The process.
    pub process: Running,
    /// Its socket.
    pub socket: PathBuf,
    /// Room for files of a test.
    pub folder: TempDir,
}

impl Server {
    /// `hull api`.
    pub fn hull() -> Server {
        Server::start(|socket| Guest::hull("api").option("--sock", socket))
    }

    /// `hull firecracker`.
    pub fn firecracker() -> Server {
        Server::start(|socket| Guest::hull("firecracker").option("--api-sock", socket))
    }

    /// Another command that serves the socket it is given.
    pub fn start(command: impl FnOnce(&Path) -> Guest) -> Server {
        let folder = match TempDir::new() {
            Ok(folder) => folder,
            Err(error) => panic!("no temporary directory: {error}"),
        };
        let socket = folder.path().join("api.sock");
        let process = command(&socket).start();
        Server { process, socket, folder }
    }

    /// A request on a connection of its own.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        match Connection::to(&self.socket).ask(method, path, body).answer() {
            Some(answer) => answer,
            None => panic!("{method} {path}: no answer"),
        }
    }

    /// GET.
    pub fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "")
    }

    /// PUT.
    pub fn put(&self, path: &str, body: impl std::fmt::Display) -> Answer {
        self.ask("PUT", path, &body.to_string())
    }

    /// PATCH.
    pub fn patch(&self, path: &str, body: impl std::fmt::Display) -> Answer {
        self.ask("PATCH", path, &body.to_string())
    }

    /// Boots the payload with a scenario.
    pub fn boot(&self, scenario: &str) {
        let kernel = machine_tests::PAYLOAD.display().to_string();
        let args = format!("payload={scenario}");
        self.put(
            "/boot-source",
            serde_json::json!({ "kernel_image_path": kernel, "boot_args": args }),
        )
        .done();
        self.put("/actions", r#"{ "action_type": "InstanceStart" }"#).done();
    }
}
