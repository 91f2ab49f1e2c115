//! Log lines on standard error, `hull: LEVEL message key=value …`, or in a file in Firecracker's form.
//! They wait for nobody.
//!
//! A subscriber of our own instead of a crate's: it needs no registry of spans (32 KiB of private
//! memory in each machine), and Hull has none.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

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

impl Level {
    /// The level of this name, in Firecracker's words and whatever case.
    pub fn named(name: &str) -> Option<Level> {
        Some(match name.to_ascii_lowercase().as_str() {
            "off" => Level::Off,
            "error" => Level::Error,
            "warn" | "warning" => Level::Warn,
            "info" => Level::Info,
            "debug" => Level::Debug,
            "trace" => Level::Trace,
            _ => return None,
        })
    }

    fn filter(self) -> LevelFilter {
        match self {
            Level::Off => LevelFilter::OFF,
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
            Level::Trace => LevelFilter::TRACE,
        }
    }
}

/// How lines are written to a file: as Firecracker's clients expect them.
#[derive(Clone, Debug, Default)]
pub struct Lines {
    /// Name of the machine.
    pub id: String,
    /// With the level.
    pub level: bool,
    /// With file and line of the source.
    pub origin: bool,
    /// Only those whose module's path begins with this.
    pub module: Option<String>,
}

/// What is logged, where, and how. One for the process.
struct Settings {
    max: LevelFilter,
    file: Option<Arc<File>>,
    lines: Lines,
}

static SETTINGS: RwLock<Settings> = RwLock::new(Settings {
    max: LevelFilter::OFF,
    file: None,
    lines: Lines { id: String::new(), level: false, origin: false, module: None },
});

/// Changes what is logged, where, or how; what is `None` stays.
pub fn change(level: Option<Level>, file: Option<File>, lines: Option<Lines>) {
    {
        // Each field is whole after its assignment, so a panic elsewhere changes nothing.
        let mut settings = SETTINGS.write().unwrap_or_else(PoisonError::into_inner);
        if file.is_some() {
            // The C library reads the host's time zone when it is first asked for a time, even for UTC:
            // now, since threads that log later may open no file.
            let _ = now();
        }
        if let Some(level) = level {
            settings.max = level.filter();
        }
        if let Some(file) = file {
            settings.file = Some(Arc::new(file));
        }
        if let Some(lines) = lines {
            settings.lines = lines;
        }
    }
    // Each place that logs remembers whether it is wanted.
    tracing::callsite::rebuild_interest_cache();
}

/// Starts logging.
pub fn start(level: Level) {
    change(Some(level), None, None);
    if level != Level::Off {
        serve();
    }
}

/// Has log lines come here, now or after a [`change`].
pub fn serve() {
    // Fails only if logging was started before.
    let _ = tracing::subscriber::set_global_default(Log);
}

/// Opens a file or named pipe for log lines.
///
/// # Errors
/// The system's.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().append(true).create(true).custom_flags(flags).open(path);
    match file {
        // A pipe that nobody reads yet: both ends are ours then, and lines wait in it.
        Err(err) if err.raw_os_error() == Some(libc::ENXIO) => {
            File::options().read(true).write(true).custom_flags(flags).open(path)
        }
        file => file,
    }
}

struct Log;

impl Log {
    fn settings() -> RwLockReadGuard<'static, Settings> {
        SETTINGS.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let settings = Log::settings();
        let module = settings.lines.module.as_deref().unwrap_or_default();
        metadata.is_event()
            && *metadata.level() <= settings.max
            && metadata.module_path().is_none_or(|path| path.starts_with(module))
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(Log::settings().max)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let metadata = event.metadata();
        let (file, lines) = {
            let settings = Log::settings();
            (settings.file.clone(), settings.file.as_ref().map(|_| settings.lines.clone()))
        };
        let mut text = match &lines {
            Some(lines) => lines.start(metadata),
            None => format!("hull: {} ", metadata.level()),
        };
        for part in [&line.message, &line.fields] {
            streams::push_printable(&mut text, part, false);
        }
        match file {
            Some(file) => {
                text.push('\n');
                // One call, so that lines stay whole. What finds no room is dropped: a guest could
                // hold Hull up otherwise.
                let _ = (&*file).write(text.as_bytes());
            }
            None => streams::log(&text),
        }
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

impl Lines {
    /// What stands before a message: time, machine and thread, and what else is wanted.
    fn start(&self, metadata: &Metadata<'_>) -> String {
        let thread = std::thread::current();
        let mut text = format!("{} [{}:{}", now(), self.id, thread.name().unwrap_or("main"));
        // Writing to a String cannot fail.
        if self.level {
            let _ = write!(text, ":{}", metadata.level());
        }
        if self.origin {
            let (file, line) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
            let _ = write!(text, ":{file}:{line}");
        }
        text.push_str("] ");
        text
    }
}

/// The time in UTC, as 2026-11-22T09:39:19.756675303.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(0);
    // SAFETY: gmtime_r reads one number and fills one tm, and takes no lock.
    let time = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        libc::gmtime_r(&seconds, &mut time);
        time
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}",
        time.tm_year + 1900,
        time.tm_mon + 1,
        time.tm_mday,
        time.tm_hour,
        time.tm_min,
        time.tm_sec,
        since.subsec_nanos()
    )
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
