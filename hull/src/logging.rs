//! Log lines on standard error: `hull: LEVEL message key=value …`. They wait for nobody.
//!
//! A subscriber of our own instead of a crate's: it needs no registry of spans (32 KiB of private
//! memory in each machine), and Hull has none.

use std::fmt::{self, Write as _};

use clap::ValueEnum;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::streams;

/// What is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Nothing.
    Off,
    /// What ends or breaks something.
    Error,
    /// What may not be what you wanted.
    #[default]
    Warn,
    /// What happens.
    Info,
    /// Details for finding a defect.
    Debug,
    /// Everything.
    Trace,
}

/// Starts logging.
pub fn start(level: Level) {
    let max = match level {
        Level::Off => return,
        Level::Error => LevelFilter::ERROR,
        Level::Warn => LevelFilter::WARN,
        Level::Info => LevelFilter::INFO,
        Level::Debug => LevelFilter::DEBUG,
        Level::Trace => LevelFilter::TRACE,
    };
    // Fails only if logging was started before.
    let _ = tracing::subscriber::set_global_default(Log { max });
}

struct Log {
    max: LevelFilter,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.max
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.max)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let mut text = format!("hull: {} ", event.metadata().level());
        for part in [&line.message, &line.fields] {
            streams::push_printable(&mut text, part, false);
        }
        streams::log(&text);
    }

    // There are no spans.
    fn new_span(&self, _attributes: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
