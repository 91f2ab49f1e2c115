//! `hull events`: follows what happens to a machine, as server-sent events tell it.

mod stream;

use std::collections::VecDeque;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::timeout;

pub use self::stream::local_time;
use self::stream::{Event, Parser};
use super::error::ClientError;
use super::http::{Api, PATIENCE};
use super::machine::Machine;
use crate::cli::{EventsArgs, Result};
use crate::exit::Code;
use crate::streams;

/// How long a machine may say nothing: a server keeps the connection alive every 15 s.
const SILENCE: Duration = Duration::from_secs(60);

/// Prints events as they come, those of before first, until the machine stops, the awaited one came,
/// or nobody reads any more.
pub fn events(args: &EventsArgs) -> Result {
    let machine = Machine::find(&args.machine.machine)?;
    super::block_on(follow(&machine, args))
}

async fn follow(machine: &Machine, args: &EventsArgs) -> Result {
    let who = || machine.name.clone();
    let mut follower = Follower::new(Api::connect(machine, PATIENCE).await?).await?;
    loop {
        // Without the event that says that the machine stopped, or its process died.
        if !follower.wait().await? {
            return Err(ClientError::Gone { who: who() }.into());
        }
        while let Some(event) = follower.take() {
            if !streams::print_to_reader(&line(&event, args.json))? {
                return Ok(Code::SUCCESS);
            }
            match &args.until {
                Some(until) if *until == event.name => return Ok(Code::SUCCESS),
                Some(until) if is_end(&event) => {
                    let (event, how) = (until.clone(), how(&event.data));
                    return Err(ClientError::Stopped { who: who(), event, how }.into());
                }
                None if is_end(&event) => return Ok(Code::SUCCESS),
                _ => {}
            }
        }
        // Who waits for the next event would not notice.
        if !streams::has_reader() {
            return Ok(Code::SUCCESS);
        }
    }
}

/// Follows the events of a machine.
pub struct Follower {
    who: String,
    body: Incoming,
    parser: Parser,
    /// Events that came and were not taken yet.
    came: VecDeque<Event>,
}

impl Follower {
    /// From the first event that is remembered.
    ///
    /// # Errors
    /// Those of [`Api::stream`].
    pub async fn new(api: Api) -> std::result::Result<Follower, ClientError> {
        let who = api.who().to_owned();
        let body = api.stream("/events").await?;
        Ok(Follower { who, body, parser: Parser::default(), came: VecDeque::new() })
    }

    /// Waits until something comes, which need not be an event. False if the machine is gone. Who stops
    /// waiting misses nothing.
    ///
    /// # Errors
    /// Nothing comes, or no events.
    pub async fn wait(&mut self) -> std::result::Result<bool, ClientError> {
        let broken = |who: &String, source| ClientError::Broken { who: who.clone(), source };
        let Ok(frame) = timeout(SILENCE, self.body.frame()).await else {
            let (who, seconds) = (self.who.clone(), SILENCE.as_secs_f32());
            return Err(ClientError::Silent { who, seconds });
        };
        let data = match frame {
            None => return Ok(false),
            Some(Err(_)) if self.parser.is_between() => return Ok(false),
            Some(frame) => frame.map_err(|error| broken(&self.who, error.into()))?.into_data(),
        };
        let events = self.parser.read(&data.unwrap_or_default());
        self.came.extend(events.map_err(|error| broken(&self.who, error.into()))?);
        Ok(true)
    }

    /// The next event of those that came.
    pub fn take(&mut self) -> Option<Event> {
        self.came.pop_front()
    }
}

/// True if nothing comes behind `event`: the machine stopped, and does not start again.
fn is_end(event: &Event) -> bool {
    event.name == "stopped" && event.data.get("again") != Some(&Value::Bool(true))
}

/// The reason of a `stopped`, in parentheses.
fn how(data: &Value) -> String {
    let text = |key| data.get(key).and_then(Value::as_str);
    match (text("reason"), text("message")) {
        (Some(reason), Some(message)) => format!(" ({reason}: {message})"),
        (Some(reason), None) => format!(" ({reason})"),
        _ => String::new(),
    }
}

/// An event as it is printed: its data, or time, name and what else it says.
fn line(event: &Event, json: bool) -> String {
    if json {
        return format!("{}\n", event.data);
    }
    let time = event.data.get("time_ms").and_then(Value::as_u64).map(stream::local_time);
    let mut line = format!("{:23}  {}", time.unwrap_or_default(), event.name);
    for (key, value) in event.data.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("sequence" | "time_ms" | "event", _) | (_, Value::Null) => {}
            (key, Value::String(text)) if is_word(text) => {
                line.push_str(&format!("  {key}={text}"));
            }
            (key, value) => line.push_str(&format!("  {key}={value}")),
        }
    }
    let mut clean = String::with_capacity(line.len() + 1);
    streams::push_printable(&mut clean, &line, false);
    clean.push('\n');
    clean
}

/// True if nobody could take `text` for something else when it stands behind a `=`.
fn is_word(text: &str) -> bool {
    let ends = |char: char| char.is_whitespace() || char.is_control() || char == '"';
    !text.is_empty() && !text.contains(ends)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_say_when_what_and_how() {
        let data = json!({
            "sequence": 3, "time_ms": 0, "event": "stopped", "reason": "error",
            "message": "no\nroom", "code": 1,
        });
        let event = Event { name: "stopped".into(), data };
        let text = line(&event, false);
        let (time, rest) = text.split_at(23);
        assert!(time.ends_with(".000"), "{text}");
        assert_eq!(rest, "  stopped  code=1  message=\"no\\nroom\"  reason=error\n");
        let json: Value = serde_json::from_str(&line(&event, true)).unwrap();
        assert_eq!((&json, line(&event, true).matches('\n').count()), (&event.data, 1));
        assert_eq!(how(&event.data), " (error: no\nroom)");
        assert_eq!(how(&json!({ "reason": "reset" })), " (reset)");
        assert_eq!(how(&json!(3)), "");
    }
}
