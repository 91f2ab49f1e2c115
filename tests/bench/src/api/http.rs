//! A client of the API: one connection that is kept, one request at a time.

use crate::Result;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer is waited for. Who takes longer has not answered.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// How long a process may take until it listens.
const START: Duration = Duration::from_secs(10);
/// Most bytes of an answer: a server that goes wrong shall not take the bench with it.
const LONGEST: usize = 4 << 20;

/// A connection.
pub struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

/// An answer: its status, and how long head and body are together.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    pub status: u16,
    pub bytes: usize,
}

/// Between two tries to connect, beside the 50 µs that the kernel adds. Without a pause the client takes
/// from the server what it waits for: starts of all servers take some milliseconds longer then.
const AGAIN: Duration = Duration::from_micros(1);

/// Connects as soon as a server listens.
pub fn connected(socket: &Path) -> Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if begun.elapsed() > START => return Err(error.into()),
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

/// The bytes of a request.
pub fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = match body.is_empty() {
        true => String::new(),
        false => {
            format!("Content-Length: {}\r\nContent-Type: application/json\r\n", body.len())
        }
    };
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}").into_bytes()
}

impl Client {
    /// Connects, which takes a server that listens.
    pub fn to(socket: &Path) -> Result<Client> {
        Client::of(UnixStream::connect(socket)?)
    }

    /// On a connection that there is.
    pub fn of(stream: UnixStream) -> Result<Client> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client { stream, buffer: vec![0; 64 << 10] })
    }

    /// The same client, which waits longer than [`PATIENCE`] for an answer.
    pub fn patient(self, patience: Duration) -> Result<Client> {
        self.stream.set_read_timeout(Some(patience))?;
        Ok(self)
    }

    /// Sends a request and waits for its answer; `None` if there is none in [`PATIENCE`].
    pub fn ask(&mut self, request: &[u8]) -> Result<Option<Answer>> {
        self.send(request)?;
        self.answer()
    }

    /// Sends a request.
    pub fn send(&mut self, request: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(request)?)
    }

    /// Waits for the answer to the request that was sent; `None` if there is none in [`PATIENCE`].
    pub fn answer(&mut self) -> Result<Option<Answer>> {
        let mut filled = 0;
        loop {
            if let Some(answer) = parse(&self.buffer[..filled])?
                && filled >= answer.bytes
            {
                return Ok(Some(answer));
            }
            if filled == self.buffer.len() {
                if filled >= LONGEST {
                    return Err("an answer has no end".into());
                }
                self.buffer.resize(filled * 2, 0);
            }
            match self.stream.read(&mut self.buffer[filled..]) {
                Ok(0) => return Err("the server closed the connection".into()),
                Ok(length) => filled += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a request whose answer has to have this status.
    pub fn expect(&mut self, status: u16, method: &str, path: &str, body: &str) -> Result<()> {
        self.send(&request(method, path, body))?;
        self.expected(status).map_err(|error| format!("{method} {path}: {error}").into())
    }

    /// Waits for the answer to the request that was sent, which has to have this status.
    pub fn expected(&mut self, status: u16) -> Result<()> {
        match self.answer()? {
            Some(answer) if answer.status == status => Ok(()),
            Some(answer) => {
                let text = String::from_utf8_lossy(&self.buffer[..answer.bytes]);
                Err(format!("not {status} but {text}").into())
            }
            None => Err("no answer".into()),
        }
    }

    /// Sends a request whose answer has to have this status. Returns its body.
    pub fn told(&mut self, status: u16, method: &str, path: &str, body: &str) -> Result<Vec<u8>> {
        self.send(&request(method, path, body))?;
        let answer = self.answer()?.ok_or("no answer")?;
        let whole = &self.buffer[..answer.bytes];
        match (answer.status == status, whole.windows(4).position(|end| end == b"\r\n\r\n")) {
            (true, Some(head)) => Ok(whole[head + 4..].to_vec()),
            _ => Err(format!("{method} {path}: {}", String::from_utf8_lossy(whole)).into()),
        }
    }

    /// Sends a request that is answered bit by bit, and leaves the answer to whoever keeps this.
    pub fn listen(&mut self, path: &str) -> Result<()> {
        self.stream.write_all(&request("GET", path, ""))?;
        let read = self.stream.read(&mut self.buffer)?;
        let head = String::from_utf8_lossy(&self.buffer[..read]).into_owned();
        match head.starts_with("HTTP/1.1 200") {
            true => Ok(()),
            false => Err(format!("GET {path}: {head}").into()),
        }
    }
}

/// The answer whose head is at the beginning of `text`, once all of it is there.
fn parse(text: &[u8]) -> Result<Option<Answer>> {
    let Some(end) = text.windows(4).position(|window| window == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&text[..end])?;
    let mut lines = head.lines();
    let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Ok(0), |(_, value)| value.trim().parse::<usize>())?;
    let status = status.ok_or_else(|| format!("no status in {head}"))?;
    Ok(Some(Answer { status, bytes: end + 4 + length.min(LONGEST) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_with_and_without_a_body() {
        let text = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc";
        let answer = parse(text).unwrap().unwrap();
        assert_eq!((answer.status, answer.bytes), (200, text.len()));
        let text = b"HTTP/1.1 204 \r\nServer: x\r\n\r\n";
        let answer = parse(text).unwrap().unwrap();
        assert_eq!((answer.status, answer.bytes), (204, text.len()));
        assert!(parse(&text[..10]).unwrap().is_none());
        assert!(parse(b"nonsense\r\n\r\n").is_err());
    }
}
