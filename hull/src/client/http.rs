//! HTTP to a machine's API: one connection, requests one after the other, each with a time limit.
//!
//! The other side may hang, be something else altogether, or answer without end: what it says is
//! waited for and kept within bounds.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use vmm::files::SocketPath;

use super::error::ClientError;
use super::machine::Machine;

/// How long a machine gets to answer what a person asks for.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of an answer.
const LONGEST_ANSWER: usize = 16 << 20;

/// Between two tries to connect to who has too many connections waiting.
const CONNECT_AGAIN: Duration = Duration::from_millis(5);

/// Words by which Firecracker says that it does not know a resource; its status is that of any
/// other refusal.
const UNKNOWN: &str = "Invalid request method and/or path";

/// A connection to a machine's API.
#[derive(Debug)]
pub struct Api {
    who: String,
    sender: SendRequest<Full<Bytes>>,
    patience: Duration,
}

impl Api {
    /// Connects to the API of `machine`, which gets as long as `patience` for this, and again for each
    /// answer.
    ///
    /// # Errors
    /// Nobody listens there who would answer, or this user may not ask.
    pub async fn connect(machine: &Machine, patience: Duration) -> Result<Api, ClientError> {
        let (who, stream) = (machine.name.clone(), open(machine, patience).await?);
        let shaken = http1::handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|error| broken(&who, error))?;
        // Its errors are those of the requests on it.
        tokio::spawn(async move { connection.await.ok() });
        Ok(Api { who, sender, patience })
    }

    /// The machine, as the user named it.
    pub fn who(&self) -> &str {
        &self.who
    }

    /// What `path` says.
    ///
    /// # Errors
    /// The API does not know it, refuses, or does not answer with JSON.
    pub async fn get(&mut self, path: &str) -> Result<Value, ClientError> {
        let bytes = self.ask(Method::GET, path, None).await?;
        self.json(&bytes)
    }

    /// Has something done that has an answer.
    ///
    /// # Errors
    /// As those of [`Api::get`].
    pub async fn post(&mut self, path: &str, body: &Value) -> Result<Value, ClientError> {
        let bytes = self.ask(Method::POST, path, Some(body)).await?;
        self.json(&bytes)
    }

    fn json(&self, bytes: &[u8]) -> Result<Value, ClientError> {
        serde_json::from_slice(bytes)
            .map_err(|_| ClientError::Odd { who: self.who.clone(), expected: "JSON" })
    }

    /// The text at `path`.
    ///
    /// # Errors
    /// As those of [`Api::get`].
    pub async fn get_text(&mut self, path: &str) -> Result<String, ClientError> {
        let bytes = self.ask(Method::GET, path, None).await?;
        String::from_utf8(bytes.into())
            .map_err(|_| ClientError::Odd { who: self.who.clone(), expected: "text" })
    }

    /// Sends `body` to `path`.
    ///
    /// # Errors
    /// The API does not know it, or refuses.
    pub async fn send(
        &mut self,
        method: Method,
        path: &str,
        body: &Value,
    ) -> Result<(), ClientError> {
        self.ask(method, path, Some(body)).await.map(drop)
    }

    /// The beginning of an answer that does not end by itself. There is no other request on this
    /// connection then.
    ///
    /// # Errors
    /// The API does not know it, or refuses.
    pub async fn stream(mut self, path: &str) -> Result<Incoming, ClientError> {
        let response = self.exchange(Method::GET, path, None).await?;
        if response.status() == StatusCode::OK {
            return Ok(response.into_body());
        }
        Err(self.refusal(Method::GET, path, response).await)
    }

    async fn ask(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Bytes, ClientError> {
        let response = self.exchange(method.clone(), path, body).await?;
        if response.status().is_success() {
            return self.read(response).await;
        }
        Err(self.refusal(method, path, response).await)
    }

    async fn exchange(
        &mut self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Response<Incoming>, ClientError> {
        let bytes = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::ACCEPT, "*/*");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(Full::new(bytes)).map_err(|error| self.broken(error))?;
        let answer = async {
            self.sender.ready().await?;
            self.sender.send_request(request).await
        };
        match timeout(self.patience, answer).await {
            Ok(answer) => answer.map_err(|error| self.broken(error)),
            Err(_) => Err(silent(&self.who, self.patience)),
        }
    }

    async fn read(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect();
        match timeout(self.patience, body).await {
            Ok(Ok(body)) => Ok(body.to_bytes()),
            Ok(Err(source)) => Err(ClientError::Broken { who: self.who.clone(), source }),
            Err(_) => Err(silent(&self.who, self.patience)),
        }
    }

    /// The error that an answer tells of.
    async fn refusal(
        &self,
        method: Method,
        path: &str,
        response: Response<Incoming>,
    ) -> ClientError {
        let status = response.status();
        let body = match self.read(response).await {
            Ok(body) => body,
            Err(error) => return error,
        };
        let fault = serde_json::from_slice::<Value>(&body).ok();
        let said = fault.as_ref().and_then(|fault| fault.get("fault_message")?.as_str());
        let unknown = match status {
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => true,
            _ => said.is_some_and(|said| said.starts_with(UNKNOWN)),
        };
        let who = self.who.clone();
        if unknown {
            return ClientError::Lacking { who, method: method.to_string(), path: path.to_owned() };
        }
        let message = said.map_or_else(|| format!("HTTP status {status}"), str::to_owned);
        ClientError::Refused { who, message }
    }

    fn broken(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
        broken(&self.who, error)
    }
}

fn broken(who: &str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ClientError {
    ClientError::Broken { who: who.to_owned(), source: error.into() }
}

fn silent(who: &str, patience: Duration) -> ClientError {
    ClientError::Silent { who: who.to_owned(), seconds: patience.as_secs_f32() }
}

/// The process that listens behind the socket of `machine`; nothing if it is out of sight.
///
/// # Errors
/// Nobody listens there, or this user may not ask.
pub async fn peer(machine: &Machine, patience: Duration) -> Result<Option<i32>, ClientError> {
    let credentials = open(machine, patience).await?.peer_cred();
    Ok(credentials.ok().and_then(|credentials| credentials.pid()).filter(|&pid| pid > 0))
}

async fn open(machine: &Machine, patience: Duration) -> Result<UnixStream, ClientError> {
    if machine.socket.as_os_str().is_empty() {
        return Err(ClientError::NoApi(machine.name.clone()));
    }
    match timeout(patience, reach(&machine.socket)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(unreachable(&machine.socket, error)),
        Err(_) => Err(silent(&machine.name, patience)),
    }
}

/// Connects, as soon as who listens has room for one more.
async fn reach(path: &Path) -> io::Result<UnixStream> {
    let path = SocketPath::of(path)?;
    loop {
        match UnixStream::connect(path.as_path()).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock => sleep(CONNECT_AGAIN).await,
            connected => return connected,
        }
    }
}

/// Why nobody could be reached at `path`, as a person sees it.
fn unreachable(path: &Path, error: io::Error) -> ClientError {
    let metadata = fs::metadata(path);
    let is_socket = metadata.as_ref().map(|metadata| metadata.file_type().is_socket());
    let path = path.to_owned();
    match error.kind() {
        ErrorKind::NotFound => ClientError::NoSocket(path),
        ErrorKind::ConnectionRefused if is_socket.as_ref().is_ok_and(|is| !is) => {
            ClientError::NotASocket(path)
        }
        ErrorKind::ConnectionRefused => ClientError::Stale(path),
        ErrorKind::PermissionDenied => {
            ClientError::Permission { path, owner: metadata.ok().map(|metadata| metadata.uid()) }
        }
        _ => ClientError::Connect { path, source: error },
    }
}

/// `id` as a part of a path. The API takes letters, digits and `_`; what else somebody writes reaches
/// it as it is, for it to say so.
pub fn segment(id: &str) -> String {
    let mut text = String::with_capacity(id.len());
    for byte in id.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => text.push(char::from(byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_become_other_paths() {
        assert_eq!(segment("root_1"), "root_1");
        assert_eq!(segment("../vm?a#ä"), "%2E%2E%2Fvm%3Fa%23%C3%A4");
    }
}
