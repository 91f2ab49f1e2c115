//! Connections of HTTP/1.0 that last, as Firecracker's do whatever a client says: there are clients
//! that send one request of that version behind the other. hyper closes after the first. So what
//! begins as HTTP/1.0 is read as HTTP/1.1, which is the same but for that; other connections are left
//! alone.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

/// What is before the last digit of a request's first line. A space is nowhere in it but in front.
const VERSION: &[u8] = b" HTTP/1.";
/// Bytes of a header that are looked at: more than the length of a body takes.
const KEPT: usize = 64;

/// Where in a request the next byte is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    /// In its first line.
    #[default]
    First,
    /// In its headers.
    Headers,
    /// That many bytes before its end.
    Body(u64),
    /// In a connection that is left alone.
    Elsewhere,
}

/// Finds versions in what a client sends, however it is cut into pieces.
#[derive(Debug)]
struct Reader {
    place: Place,
    /// How much of [`VERSION`] the last bytes are.
    matched: usize,
    /// The beginning of the line, and how long the line is without its end.
    line: [u8; KEPT],
    length: usize,
    /// Length of the body that the headers announce.
    body: u64,
}

impl Default for Reader {
    fn default() -> Reader {
        Reader { place: Place::First, matched: 0, line: [0; KEPT], length: 0, body: 0 }
    }
}

impl Reader {
    /// Takes the next bytes, and makes a version of 1.0 in them one of 1.1.
    fn read(&mut self, mut bytes: &mut [u8]) {
        while let [first, rest @ ..] = bytes {
            match self.place {
                Place::First => self.first_line(first),
                Place::Headers => self.header(*first),
                Place::Body(left) => {
                    let more = usize::try_from(left - 1).unwrap_or(usize::MAX).min(rest.len());
                    self.ahead(left - 1 - more as u64);
                    bytes = rest.get_mut(more..).unwrap_or_default();
                    continue;
                }
                Place::Elsewhere => return,
            }
            bytes = rest;
        }
    }

    /// In front of a body, or of the next request if there is none.
    fn ahead(&mut self, body: u64) {
        *self = Reader::default();
        if body > 0 {
            self.place = Place::Body(body);
        }
    }

    fn first_line(&mut self, byte: &mut u8) {
        if self.matched == VERSION.len() {
            // A client that knows HTTP/1.1 says itself whether its connection lasts.
            if *byte != b'0' {
                self.place = Place::Elsewhere;
                return;
            }
            *byte = b'1';
            self.place = Place::Headers;
        } else if *byte == b'\n' && self.length > 0 {
            self.place = Place::Elsewhere;
            return;
        } else if VERSION.get(self.matched) == Some(byte) {
            self.matched += 1;
        } else {
            self.matched = usize::from(*byte == b' ');
        }
        // Lines without anything may be before the first one.
        if !matches!(byte, b'\r' | b'\n') {
            self.length = 1;
        }
    }

    fn header(&mut self, byte: u8) {
        if byte == b'\n' {
            return self.line_end();
        }
        if byte != b'\r' {
            if let Some(place) = self.line.get_mut(self.length) {
                *place = byte;
            }
            self.length = self.length.saturating_add(1);
        }
    }

    fn line_end(&mut self) {
        if self.length == 0 {
            return self.ahead(self.body);
        }
        let line = self.line.get(..self.length.min(KEPT)).unwrap_or_default();
        let mut parts = line.splitn(2, |byte| *byte == b':');
        let name = parts.next().unwrap_or_default();
        if name.eq_ignore_ascii_case(b"content-length") {
            let value = parts.next().and_then(|value| str::from_utf8(value).ok());
            match value.and_then(|value| value.trim().parse().ok()) {
                Some(body) if self.length <= KEPT => self.body = body,
                _ => self.place = Place::Elsewhere,
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.place = Place::Elsewhere;
        }
        self.length = 0;
    }
}

/// The side of the stream that is read.
pub struct Lasting<S> {
    stream: S,
    reader: Option<Reader>,
}

impl<S> Lasting<S> {
    /// `stream`, which lasts as Firecracker's do if `as_firecracker`.
    pub fn new(stream: S, as_firecracker: bool) -> Lasting<S> {
        Lasting { stream, reader: as_firecracker.then(Reader::default) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lasting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(context, buffer);
        if let Some(reader) = &mut this.reader {
            reader.read(buffer.filled_mut().get_mut(before..).unwrap_or_default());
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of bytes, in pieces of each size.
    fn read(text: &str) -> String {
        let whole = pieces(text, text.len());
        for size in 1..text.len() {
            assert_eq!(pieces(text, size), whole, "in pieces of {size}");
        }
        whole
    }

    fn pieces(text: &str, size: usize) -> String {
        let (mut bytes, mut reader) = (text.as_bytes().to_vec(), Reader::default());
        bytes.chunks_mut(size).for_each(|piece| reader.read(piece));
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn each_request_of_a_connection_lasts() {
        // The second one's body has the form of a request, and stays what it is.
        let text = |version: &str| {
            let put = "content-LENGTH:  16\r\nX: y\r\n\r\nGET / HTTP/1.0\r\n";
            let first = format!("GET / {version}\r\n\r\nPUT /a {version}\r\n{put}");
            format!("{first}\r\nGET /b {version}\nHost: h\n\nGET / {version}\r\n\r\n")
        };
        assert_eq!(read(&text("HTTP/1.0")), text("HTTP/1.1"));
    }

    #[test]
    fn other_connections_are_left_alone() {
        for text in [
            "GET / HTTP/1.1\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET /\r\n\r\nGET / HTTP/1.0\r\n\r\n",
            "GET /HTTP/1.0 x\r\n",
        ] {
            assert_eq!(read(text), text);
        }
        let text =
            "PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.0\r\n";
        assert_eq!(read(text), text.replacen("1.0", "1.1", 1));
        for length in ["x", "-1", "18446744073709551616", &" ".repeat(KEPT)] {
            let text =
                format!("PUT / HTTP/1.0\r\nContent-Length: {length}\r\n\r\nGET / HTTP/1.0\r\n");
            assert_eq!(read(&text), text.replacen("1.0", "1.1", 1));
        }
        let text =
            "PUT / HTTP/1.0\r\nContent-Length: 18446744073709551615\r\n\r\nGET / HTTP/1.0\r\n";
        assert_eq!(read(text), text.replacen("1.0", "1.1", 1));
    }
}
