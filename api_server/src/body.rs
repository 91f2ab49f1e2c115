//! Bodies of requests: read up to a limit, then as JSON.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Body as _;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::fault::Fault;
use crate::instance::Shared;

/// How long a client may take to send a body.
const PATIENCE: Duration = Duration::from_secs(30);

/// A body of JSON. Whatever type of content the client claims: Firecracker does not look either.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Json<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, shared: &Shared) -> Result<Json<T>, Fault> {
        object(&something(request, shared.limits().body).await?).map(Json)
    }
}

/// Longest body that says something of each of many machines, in bytes.
const LONG: usize = 8 << 20;

/// Longest body of a request, in bytes.
pub fn limit(path: &str, shared: &Shared) -> usize {
    let limit = shared.limits().body;
    if path == FORK { limit.max(LONG) } else { limit }
}

/// Where [`LongJson`] is taken.
const FORK: &str = "/fork";

/// The same, which may be longer, as it says something of each of many machines.
#[derive(Debug)]
pub struct LongJson<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for LongJson<T> {
    type Rejection = Fault;

    async fn from_request(request: Request, shared: &Shared) -> Result<LongJson<T>, Fault> {
        object(&something(request, limit(FORK, shared)).await?).map(LongJson)
    }
}

fn object<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    // Of a resource whose fields may all be left out, the parser would take an empty list as well.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(Fault::bad(
            "An error occurred when deserializing the json body of a request: it is a list; \
             an object is expected.",
        ));
    }
    parse(bytes)
}

/// A body that is there.
async fn something(request: Request, limit: usize) -> Result<Vec<u8>, Fault> {
    let method = request.method().clone();
    let bytes = read(request.into_body(), limit).await?;
    if bytes.is_empty() {
        return Err(Fault::bad(format!("Empty {method} request.")));
    }
    Ok(bytes)
}

/// A body of any JSON.
#[derive(Debug)]
pub struct AnyJson(pub Value);

impl FromRequest<Shared> for AnyJson {
    type Rejection = Fault;

    async fn from_request(request: Request, shared: &Shared) -> Result<AnyJson, Fault> {
        let bytes = something(request, shared.limits().body).await?;
        parse(&bytes).map(AnyJson)
    }
}

/// The id in a path.
#[derive(Debug)]
pub struct Id(pub String);

impl FromRequestParts<Shared> for Id {
    type Rejection = Fault;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Id, Fault> {
        let id = Path::<String>::from_request_parts(parts, shared).await;
        id.map(|Path(id)| Id(id)).map_err(|error| Fault::bad(format!("{error}")))
    }
}

/// That a request for something has no body.
#[derive(Debug)]
pub struct Nothing;

impl FromRequest<Shared> for Nothing {
    type Rejection = Fault;

    async fn from_request(request: Request, shared: &Shared) -> Result<Nothing, Fault> {
        let method = request.method().clone();
        let bytes = read(request.into_body(), shared.limits().body).await?;
        if bytes.is_empty() || method == Method::PATCH {
            return Ok(Nothing);
        }
        Err(Fault::bad(format!("{method} request cannot have a body.")))
    }
}

/// `request` with all of its body. What was answered before its body had come would be answered on a
/// connection that is closed then, whatever its client does on it next.
///
/// # Errors
/// The body is larger than `limit` bytes, or does not come.
pub async fn whole(request: Request, limit: usize) -> Result<Request, Fault> {
    let (head, body) = request.into_parts();
    let bytes = read(body, limit).await?;
    Ok(Request::from_parts(head, Body::from(bytes)))
}

/// How much of a body that is too large is read all the same, and for how long: a client that still
/// writes would find its connection closed and never read why.
const DRAINED: usize = 1 << 20;
const DRAINING: Duration = Duration::from_secs(2);

async fn read(mut body: Body, limit: usize) -> Result<Vec<u8>, Fault> {
    let too_large = || {
        let message = format!("The body is larger than the limit of {limit} bytes.");
        Fault::with_status(StatusCode::PAYLOAD_TOO_LARGE, message)
    };
    // What is announced as far too large is not waited for.
    if body.size_hint().lower() > (limit + DRAINED) as u64 {
        return Err(too_large());
    }
    let read = async {
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let data = frame?.into_data().unwrap_or_default();
            if bytes.len() + data.len() > limit {
                return Ok(None);
            }
            bytes.extend_from_slice(&data);
        }
        Ok::<_, axum::Error>(Some(bytes))
    };
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => {
            let drain = Limited::new(body, DRAINED).collect();
            // Whether it ended makes no difference.
            let _ = tokio::time::timeout(DRAINING, drain).await;
            Err(too_large())
        }
        Ok(Err(error)) => Err(Fault::bad(format!("The body cannot be read: {error}."))),
        Err(_) => Err(Fault::with_status(
            StatusCode::REQUEST_TIMEOUT,
            format!("The body did not arrive within {} s.", PATIENCE.as_secs()),
        )),
    }
}

/// Reads JSON; a problem is told with the path of its field.
///
/// # Errors
/// The bytes are not JSON, or not of a `T`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let wrong = |path: &str, error: &serde_json::Error| {
        let place =
            if path.is_empty() || path == "." { String::new() } else { format!("{path}: ") };
        Fault::bad(format!(
            "An error occurred when deserializing the json body of a request: {place}{error}."
        ))
    };
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| wrong(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| wrong("", &error))?;
    Ok(value)
}
