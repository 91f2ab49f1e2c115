//! A server that says what a test wants it to.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use tempfile::TempDir;

pub struct Fake {
    pub socket: PathBuf,
    thread: Option<JoinHandle<()>>,
    _folder: TempDir,
}

impl Fake {
    /// Takes one connection and one request, and leaves the rest to `answer`.
    pub fn new(answer: impl FnOnce(UnixStream) + Send + 'static) -> Fake {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("fake.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut head, mut byte) = (Vec::new(), [0]);
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                head.push(byte[0]);
            }
            answer(stream);
        });
        Fake { socket, thread: Some(thread), _folder: folder }
    }

    /// Answers with these bytes, and closes.
    pub fn saying(answer: impl Into<Vec<u8>>) -> Fake {
        let answer = answer.into();
        Fake::new(move |mut stream| {
            // The other side may have heard enough.
            let _ = stream.write_all(&answer);
        })
    }

    /// Answers with a status and a body.
    pub fn with(status: &str, body: &str) -> Fake {
        let length = body.len();
        Fake::saying(format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{body}"))
    }

    /// Answers with events, in pieces that begin and end anywhere, and closes in order.
    pub fn telling(text: &str) -> Fake {
        let mut answer = EVENTS.to_owned();
        for piece in text.as_bytes().chunks(7) {
            answer.push_str(&chunk(std::str::from_utf8(piece).unwrap()));
        }
        answer.push_str("0\r\n\r\n");
        Fake::saying(answer)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // In case that nobody came.
        let _ = UnixStream::connect(&self.socket);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the fake server failed");
    }
}

/// Head of an answer of events.
pub const EVENTS: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

/// A piece of an answer of events.
pub fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}
