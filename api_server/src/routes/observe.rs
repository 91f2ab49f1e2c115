//! What can be seen of a machine: `/metrics` and `/events`.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde_json::{Map, Value, json};
use vmm::journal::{Entry, Reader};
use vmm::metrics::Shape;

use crate::body::{Json, Nothing};
use crate::fault::{Done, Fault, Found};
use crate::instance::{Shared, elsewhere};
use crate::prometheus;
use crate::types::metrics::{EventData, Metrics};

/// What is counted, in Firecracker's form: everything since the start.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = Value)))]
pub async fn metrics(State(shared): State<Shared>, _: Nothing) -> Found<Map<String, Value>> {
    let mut all = Shape::of(&shared.observed().metrics.groups());
    all.insert("utc_timestamp_ms".into(), json!(unix_millis(SystemTime::now())));
    Ok(axum::Json(all))
}

/// Says where metrics are written: a line each minute, at the end, and at `FlushMetrics`. Before the
/// start only, and once.
#[utoipa::path(put, path = "/metrics", request_body = Metrics, responses((status = 204)))]
pub async fn put_metrics(State(shared): State<Shared>, Json(metrics): Json<Metrics>) -> Done {
    elsewhere(move || shared.put_metrics(metrics)).await?
}

/// What is counted, as text for Prometheus (OpenMetrics 1.0).
#[utoipa::path(get, path = "/metrics/prometheus",
    responses((status = 200, content_type = "application/openmetrics-text", body = String)))]
pub async fn prometheus(State(shared): State<Shared>, _: Nothing) -> Result<Response, Fault> {
    let text = prometheus::text(shared.observed().metrics.groups());
    let text = text.map_err(|error| Fault::bad(format!("There is no text of it: {error}.")))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// What happens, from the beginning as far as it is remembered (256 events) or behind the one that the
/// header Last-Event-ID names, and then as it happens: server-sent events, each with a number (`id`), a
/// name (`event`) and an object (`data`). Ends behind the machine's end.
#[utoipa::path(get, path = "/events",
    responses((status = 200, content_type = "text/event-stream", body = EventData)))]
pub async fn events(
    State(shared): State<Shared>,
    headers: HeaderMap,
    _: Nothing,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let reader = shared.observed().journal.read(last.unwrap_or(0));
    // Of a client that is gone, the next line tells.
    Sse::new(Feed(reader)).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)))
}

/// The journal as a stream of events.
struct Feed(Reader);

impl Stream for Feed {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = ready!(self.0.poll_next(context));
        Poll::Ready(next.map(|entry| Ok(event(&entry))))
    }
}

fn event(entry: &Entry) -> Event {
    let data = EventData::of(entry);
    // Numbers and strings, which have a JSON of one line.
    let text = serde_json::to_string(&data).unwrap_or_default();
    Event::default().id(entry.sequence.to_string()).event(data.event).data(text)
}

/// Milliseconds since 1970.
pub fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
