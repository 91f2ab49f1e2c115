//! The format of server-sent events (HTML standard § 9.2.6), as far as a machine's API uses it, and
//! their times as a person reads them.

use serde_json::Value;

/// Most bytes of a line or of an event's data.
const LONGEST: usize = 64 << 10;

/// Something that happened.
#[derive(Debug, PartialEq)]
pub struct Event {
    /// What it is.
    pub name: String,
    /// What it says.
    pub data: Value,
}

/// What comes is no stream of events.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// A line or an event without end.
    #[error("an event is longer than 64 KiB")]
    TooLong,
    /// Data that is no JSON.
    #[error("an event is not JSON")]
    NotJson,
}

/// Takes bytes as they come.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    name: String,
    data: String,
}

impl Parser {
    /// True if no event has begun.
    pub fn is_between(&self) -> bool {
        self.line.is_empty() && self.name.is_empty() && self.data.is_empty()
    }

    /// The events that end with `bytes`.
    ///
    /// # Errors
    /// [`StreamError`]; there is nothing to be had from this stream then.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Vec<Event>, StreamError> {
        let mut events = Vec::new();
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > LONGEST {
                return Err(StreamError::TooLong);
            }
            if part.ends_with(b"\n") {
                events.extend(self.end_line()?);
            }
        }
        Ok(events)
    }

    /// Takes the line that is complete now; an empty one ends an event.
    fn end_line(&mut self) -> Result<Option<Event>, StreamError> {
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches(['\r', '\n']);
        if line.is_empty() {
            let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
            if data.is_empty() {
                return Ok(None);
            }
            let data = serde_json::from_str(&data).map_err(|_| StreamError::NotJson)?;
            return Ok(Some(Event { name, data }));
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.to_owned(),
            "data" if self.data.len() + value.len() > LONGEST => return Err(StreamError::TooLong),
            "data" => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            // Comments have no name; ids are in the data as well.
            _ => {}
        }
        Ok(None)
    }
}

/// Milliseconds since 1970 as a time of this host's zone: 2026-11-22 09:39:19.756.
pub fn local_time(milliseconds: u64) -> String {
    let seconds = i64::try_from(milliseconds / 1000).unwrap_or(i64::MAX);
    // SAFETY: localtime_r reads one number and fills one tm, unless it returns null.
    let time = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&seconds, &mut time).is_null() {
            return format!("{milliseconds} ms");
        }
        time
    };
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03}",
        i64::from(time.tm_year) + 1900,
        time.tm_mon + 1,
        time.tm_mday,
        time.tm_hour,
        time.tm_min,
        time.tm_sec,
        milliseconds % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const STREAM: &str = ": hello\n\nid: 1\nevent: created\ndata: {\"sequence\":1}\n\n: \n\n\
                          event:ready\r\ndata:{\r\ndata: \"a\": \"\u{e4}\"}\r\n\r\nevent: x\n\n";

    fn expected() -> Vec<Event> {
        let event = |name: &str, data| Event { name: name.into(), data };
        vec![event("created", json!({ "sequence": 1 })), event("ready", json!({ "a": "ä" }))]
    }

    #[test]
    fn what_is_no_event_is_refused_and_not_kept() {
        let mut parser = Parser::default();
        assert_eq!(parser.read(&[b'x'; LONGEST + 1]), Err(StreamError::TooLong));
        let line = format!("data: {}\n", "1".repeat(LONGEST / 2));
        let mut parser = Parser::default();
        assert_eq!(parser.read(line.as_bytes()), Ok(Vec::new()));
        assert!(!parser.is_between());
        assert_eq!(parser.read(line.as_bytes()), Ok(Vec::new()));
        assert_eq!(parser.read(line.as_bytes()), Err(StreamError::TooLong));
        assert_eq!(Parser::default().read(b"data: {\n\n"), Err(StreamError::NotJson));
    }

    #[test]
    fn times_have_milliseconds() {
        let text = local_time(1_700_000_000_012);
        assert!(text.len() == 23 && text.ends_with(".012"), "{text}");
        let text = local_time(u64::MAX);
        assert!(text.ends_with("615") || text.ends_with(" ms"), "{text}");
    }

    proptest! {
        /// However the bytes are cut, the same events come.
        #[test]
        fn pieces_make_no_difference(sizes in prop::collection::vec(1usize..9, 1..40)) {
            let (mut parser, mut rest, mut events) =
                (Parser::default(), STREAM.as_bytes(), Vec::new());
            for size in sizes.into_iter().cycle() {
                let (piece, after) = rest.split_at(size.min(rest.len()));
                events.extend(parser.read(piece).unwrap());
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(events, expected());
            prop_assert!(parser.is_between());
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = Parser::default().read(&bytes);
        }
    }
}
