//! Requests of guests and answers to them: Firecracker's contract (`docs/mmds/mmds-user-guide.md` of
//! 1.12).
//!
//! A path is a JSON pointer (RFC 6901) into the contents. What it points to is answered as JSON to
//! `Accept: application/json`, else as EC2's service would: a string as it is, an object as the list
//! of its keys. Version 2 wants a token with each request, which it hands out.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::token::TTL;
use super::{Options, Version};

/// Longest request in bytes, with its body.
pub(super) const LONGEST: usize = 4096;
/// Most lines of a head.
const HEADERS: usize = 64;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] =
    ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    /// Bytes of the request that it is to.
    pub(super) consumed: usize,
    /// Head and body.
    pub(super) bytes: Vec<u8>,
    /// The connection ends with it.
    pub(super) close: bool,
}

/// Answers the request that `received` begins with; `None` if there is more of it to come. `serial`
/// is of no other call.
pub(super) fn answer(
    options: &Options,
    contents: &Value,
    now: Instant,
    serial: u64,
    received: &[u8],
) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(received) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) if received.len() < LONGEST => return None,
        Ok(httparse::Status::Partial) => {
            return Some(refused(TOO_LARGE, "The request is too long."));
        }
        Err(error) => return Some(refused(BAD_REQUEST, &format!("Invalid request: {error}."))),
    };
    let request = Request { parsed: &parsed };
    if request.header(&["transfer-encoding"]).is_some() {
        return Some(refused(BAD_REQUEST, "Transfer-Encoding is not supported."));
    }
    let body = match request.header(&["content-length"]) {
        None => 0,
        Some(text) => match number(text) {
            Some(body) => body,
            None => return Some(refused(BAD_REQUEST, "Invalid Content-Length.")),
        },
    };
    let Some(consumed) = head.checked_add(body).filter(|&len| len <= LONGEST) else {
        return Some(refused(TOO_LARGE, "The request is too long."));
    };
    if received.len() < consumed {
        return None;
    }
    let close = request.closes();
    let reply = respond(options, contents, now, serial, &request);
    let bytes = reply.into_bytes(parsed.version.unwrap_or(1), close);
    Some(Answer { consumed, bytes, close })
}

/// A request that cannot be told from what follows it.
fn refused(status: Status, why: &str) -> Answer {
    Answer { consumed: 0, bytes: Reply::text(status, why).into_bytes(1, true), close: true }
}

/// Digits, and nothing else.
fn number<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

type Status = (u16, &'static str);

const OK: Status = (200, "OK");
const BAD_REQUEST: Status = (400, "Bad Request");
const UNAUTHORIZED: Status = (401, "Unauthorized");
const NOT_FOUND: Status = (404, "Not Found");
const METHOD_NOT_ALLOWED: Status = (405, "Method Not Allowed");
const TOO_LARGE: Status = (413, "Payload Too Large");
const NOT_IMPLEMENTED: Status = (501, "Not Implemented");

/// An answer to be written down.
struct Reply {
    status: Status,
    json: bool,
    header: Option<(&'static str, String)>,
    body: String,
}

impl Reply {
    fn text(status: Status, body: impl Into<String>) -> Reply {
        Reply { status, json: false, header: None, body: body.into() }
    }

    fn with(self, name: &'static str, value: impl Into<String>) -> Reply {
        Reply { header: Some((name, value.into())), ..self }
    }

    fn into_bytes(self, version: u8, close: bool) -> Vec<u8> {
        let (code, reason) = self.status;
        let kind = if self.json { "application/json" } else { "text/plain" };
        let connection = if close { "close" } else { "keep-alive" };
        let mut text = format!(
            "HTTP/1.{version} {code} {reason}\r\nServer: Hull MMDS\r\nConnection: {connection}\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n",
            self.body.len()
        );
        if let Some((name, value)) = self.header {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        text.push_str(&self.body);
        text.into_bytes()
    }
}

struct Request<'a, 'b> {
    parsed: &'a httparse::Request<'a, 'b>,
}

impl Request<'_, '_> {
    /// Value of the first header with one of these names.
    fn header(&self, names: &[&str]) -> Option<&[u8]> {
        let known = |name: &str| names.iter().any(|wanted| name.eq_ignore_ascii_case(wanted));
        let header = self.parsed.headers.iter().find(|header| known(header.name))?;
        Some(header.value.trim_ascii())
    }

    fn closes(&self) -> bool {
        let connection = self.header(&["connection"]).unwrap_or_default();
        match self.parsed.version {
            // The answer to it has a body, which its sender does not expect (RFC 9110 § 9.3.2).
            _ if self.parsed.method == Some("HEAD") => true,
            Some(0) => !connection.eq_ignore_ascii_case(b"keep-alive"),
            _ => connection.eq_ignore_ascii_case(b"close"),
        }
    }

    /// The path, without what an absolute URI has in front of it (RFC 9112 § 3.2.2). A query is part of
    /// it, since it may be one of a key. `None` if nothing is left.
    fn path(&self) -> Option<&str> {
        let target = self.parsed.path?;
        let path = match target.strip_prefix("http://") {
            Some(rest) => &rest[rest.find('/')?..],
            None => target,
        };
        Some(path).filter(|path| path.starts_with('/'))
    }

    /// True if JSON is asked for; the first type that is known decides.
    fn wants_json(&self) -> bool {
        let accept = self.header(&["accept"]).unwrap_or_default();
        let types = accept.split(|&byte| byte == b',');
        let mut known = types.filter_map(|kind| {
            match kind.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii() {
                kind if kind.eq_ignore_ascii_case(b"application/json") => Some(true),
                kind if kind.eq_ignore_ascii_case(b"text/plain") || kind == b"*/*" => Some(false),
                _ => None,
            }
        });
        known.next().unwrap_or(false)
    }
}

fn respond(
    options: &Options,
    contents: &Value,
    now: Instant,
    serial: u64,
    request: &Request,
) -> Reply {
    let Some(path) = request.path() else { return Reply::text(BAD_REQUEST, "Invalid URI.") };
    match request.parsed.method {
        Some("GET") if options.version == Version::V1 => find(options, contents, path, request),
        Some("GET") => match request.header(&TOKEN) {
            None => Reply::text(
                UNAUTHORIZED,
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header \
                 to specify the session token.",
            ),
            Some(token) if options.key.is_valid(now, token) => {
                find(options, contents, path, request)
            }
            Some(_) => Reply::text(UNAUTHORIZED, "MMDS token not valid."),
        },
        Some("PUT") if options.version == Version::V2 => {
            hand_out(options, now, serial, path, request)
        }
        _ => {
            let allowed = if options.version == Version::V1 { "GET" } else { "GET, PUT" };
            Reply::text(METHOD_NOT_ALLOWED, "Not allowed HTTP method.").with("Allow", allowed)
        }
    }
}

/// What is at `path`.
fn find(options: &Options, contents: &Value, path: &str, request: &Request) -> Reply {
    let pointer = pointer(path);
    let Some(value) = contents.pointer(&pointer) else {
        return Reply::text(NOT_FOUND, format!("Resource not found: {path}."));
    };
    if request.wants_json() && !options.imds_compat {
        return Reply { json: true, ..Reply::text(OK, value.to_string()) };
    }
    match value {
        Value::String(text) => Reply::text(OK, text.as_str()),
        Value::Object(map) => {
            let keys = map.iter().map(|(key, value)| match value {
                Value::Object(_) => format!("{key}/"),
                _ => key.clone(),
            });
            Reply::text(OK, keys.collect::<Vec<_>>().join("\n"))
        }
        _ => {
            let text = "Cannot retrieve value. The value has an unsupported type.";
            Reply::text(NOT_IMPLEMENTED, text)
        }
    }
}

/// The path as a JSON pointer: one slash in front of each segment, none at the end.
fn pointer(path: &str) -> String {
    path.split('/')
        .filter(|segment| !segment.is_empty())
        .flat_map(|segment| ["/", segment])
        .collect()
}

/// A new token.
fn hand_out(options: &Options, now: Instant, serial: u64, path: &str, request: &Request) -> Reply {
    if request.header(&["x-forwarded-for"]).is_some() {
        return Reply::text(
            BAD_REQUEST,
            "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
        );
    }
    if pointer(path) != TOKEN_PATH || path.ends_with('/') {
        return Reply::text(NOT_FOUND, format!("Resource not found: {path}."));
    }
    let Some(ttl) = request.header(&TOKEN_TTL) else {
        return Reply::text(
            BAD_REQUEST,
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Some(seconds) = number::<u32>(ttl) else {
        let text = format!(
            "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:{}",
            String::from_utf8_lossy(ttl)
        );
        return Reply::text(BAD_REQUEST, text);
    };
    if !TTL.contains(&seconds) {
        let (least, most) = (TTL.start(), TTL.end());
        let text = format!(
            "Invalid time to live value provided for token: {seconds}. Please provide a value \
             between {least} and {most}."
        );
        return Reply::text(BAD_REQUEST, text);
    }
    let token = options.key.token(now, Duration::from_secs(seconds.into()), serial);
    Reply::text(OK, token).with("X-metadata-token-ttl-seconds", seconds.to_string())
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
