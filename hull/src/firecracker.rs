//! `hull firecracker`, and what the binary is when it is called `firecracker`: Firecracker's command
//! line and exit codes, so that what starts `firecracker` today starts Hull by changing a path.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use api_server::types::metrics::Metrics;
use api_server::types::small::Logger;
use api_server::{Instance, Limits, LogSettings, Program, Wish};
use clap::Parser;
use vmm::config::{ByteSize, VmConfig};
use vmm::machine::Ready;
use vmm::seccomp;
use vmm::snapshot;
use vmm::timings::Timings;

use crate::api::{self, FIRECRACKER, Log, fulfil};
use crate::cli::Result;
use crate::exit::Code;
use crate::last_words;
use crate::logging::{self, Level};
use crate::report;
use crate::session::{ApiSocket, Session, Wanted};
use crate::streams;

/// Version of the snapshot format that Firecracker 1.12.1 names.
const SNAPSHOT_VERSION: &str = "v6.0.0";

/// Where the API is if nothing else is said.
const DEFAULT_SOCKET: &str = "/run/firecracker.socket";

/// Memory of a machine of which nothing else is said.
const DEFAULT_MEMORY: u64 = 128 << 20;

/// Firecracker's options.
#[derive(Debug, PartialEq, Parser)]
#[command(name = "firecracker", disable_version_flag = true, args_override_self = false)]
struct Options {
    /// Path to the Unix socket of the API
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    api_sock: PathBuf,
    /// Name of the machine
    #[arg(long, value_name = "ID", default_value = DEFAULT_ID)]
    id: String,
    /// A machine's configuration (JSON); the machine is started at once
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// No API; needs --config-file
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Contents of the metadata service (JSON)
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// File or named pipe for log lines
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// What is logged: Off, Error, Warn, Info, Debug, Trace
    #[arg(long, value_name = "LEVEL")]
    level: Option<String>,
    /// Show the level in log lines
    #[arg(long)]
    show_level: bool,
    /// Show file and line in log lines
    #[arg(long)]
    show_log_origin: bool,
    /// Log lines of this module only
    #[arg(long, value_name = "MODULE")]
    module: Option<String>,
    /// File or named pipe for metrics
    #[arg(long, value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// Log how long the guest took to boot
    #[arg(long)]
    boot_timer: bool,
    /// A filter program of one's own; not supported, Hull has its own filters
    #[arg(long, value_name = "FILE", conflicts_with = "no_seccomp")]
    seccomp_filter: Option<PathBuf>,
    /// No system call filters
    #[arg(long)]
    no_seccomp: bool,
    /// When this process was started, µs of the monotonic clock
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,
    /// Processor time of this process at its start, µs
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,
    /// Processor time of the process that started this one, µs
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,
    /// Most bytes of a request's body
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_BODY)]
    http_api_max_payload_size: usize,
    /// Most bytes of the metadata
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Devices on a PCI bus; accepted, they are on MMIO all the same
    #[arg(long)]
    enable_pci: bool,
    /// Print the version
    #[arg(long)]
    version: bool,
    /// Print the version of the snapshot format
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of a snapshot's state file
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
}

/// The name of a machine that got none.
const DEFAULT_ID: &str = "anonymous-instance";
/// Most bytes of a request's body, unless somebody says otherwise.
const DEFAULT_BODY: usize = 51_200;

impl Options {
    /// The options that orchestrators give, without clap, whose set-up takes half of the time until the
    /// socket is there. Nothing for all that is not as plain as that: it is clap's.
    fn plain(arguments: &[OsString]) -> Option<Options> {
        let mut options = Options {
            api_sock: PathBuf::new(),
            id: String::new(),
            config_file: None,
            no_api: false,
            metadata: None,
            log_path: None,
            level: None,
            show_level: false,
            show_log_origin: false,
            module: None,
            metrics_path: None,
            boot_timer: false,
            seccomp_filter: None,
            no_seccomp: false,
            start_time_us: None,
            start_time_cpu_us: None,
            parent_cpu_time_us: None,
            http_api_max_payload_size: DEFAULT_BODY,
            mmds_size_limit: None,
            enable_pci: false,
            version: false,
            snapshot_version: false,
            describe_snapshot: None,
        };
        let mut arguments = arguments.iter().skip(1);
        let mut seen = Vec::new();
        while let Some(name) = arguments.next() {
            let name = name.to_str()?;
            // What is given twice is refused, in clap's words.
            if seen.contains(&name) {
                return None;
            }
            seen.push(name);
            let mut value = || {
                let plain = |value: &&OsString| {
                    !value.is_empty() && !value.as_encoded_bytes().starts_with(b"-")
                };
                arguments.next().filter(plain)
            };
            match name {
                "--api-sock" => options.api_sock = value()?.into(),
                "--id" => options.id = value()?.to_str()?.to_owned(),
                "--config-file" => options.config_file = Some(value()?.into()),
                "--log-path" => options.log_path = Some(value()?.into()),
                "--level" => options.level = Some(value()?.to_str()?.to_owned()),
                "--metrics-path" => options.metrics_path = Some(value()?.into()),
                "--show-level" => options.show_level = true,
                "--boot-timer" => options.boot_timer = true,
                "--no-seccomp" => options.no_seccomp = true,
                _ => return None,
            }
        }
        if options.api_sock.as_os_str().is_empty() {
            options.api_sock = DEFAULT_SOCKET.into();
        }
        if options.id.is_empty() {
            DEFAULT_ID.clone_into(&mut options.id);
        }
        Some(options)
    }
}

/// The configuration file is not one of a machine.
#[derive(Debug, thiserror::Error)]
#[error("cannot configure the machine from {}", path.display())]
pub struct BadConfiguration {
    path: PathBuf,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// The file of one's own filters is not to be had.
#[derive(Debug, thiserror::Error)]
#[error("--seccomp-filter: cannot open {}", path.display())]
struct NoFilter {
    path: PathBuf,
    source: std::io::Error,
}

/// The level of the log is none.
#[derive(Debug, thiserror::Error)]
#[error("--level: {0:?} is not Off, Error, Warn, Info, Debug or Trace")]
struct BadLevel(String);

/// An option whose value is not one of it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadOption(String);

/// True if the binary was called as `firecracker`.
pub fn is_meant(argv0: Option<OsString>) -> bool {
    argv0.is_some_and(|name| Path::new(&name).file_name().is_some_and(|n| n == "firecracker"))
}

/// Runs as Firecracker would with these arguments, of which the first is a name.
pub fn firecracker(arguments: impl IntoIterator<Item = OsString>, start: Instant) -> Code {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let plain = Options::plain(&arguments);
    let options = match plain.map_or_else(|| Options::try_parse_from(&arguments), Ok) {
        Ok(options) => options,
        Err(error) => {
            // To a closed stream there is nothing to be said.
            let _ = error.print();
            return if error.use_stderr() { Code::ARGUMENTS } else { Code::SUCCESS };
        }
    };
    run(&options, start).unwrap_or_else(|error| {
        report::print(error.as_ref());
        if error.is::<BadConfiguration>() || error.is::<BadLevel>() {
            Code::CONFIGURATION
        } else if error.is::<BadOption>() {
            Code::ARGUMENTS
        } else {
            Code::FAILURE
        }
    })
}

fn run(options: &Options, begun: Instant) -> Result {
    if options.version {
        let hull = env!("CARGO_PKG_VERSION");
        streams::print(&format!("Firecracker v{FIRECRACKER}\nHull v{hull}\n"))?;
        return Ok(Code::SUCCESS);
    }
    if options.snapshot_version {
        streams::print(&format!("{SNAPSHOT_VERSION}\n"))?;
        return Ok(Code::SUCCESS);
    }
    if let Some(path) = &options.describe_snapshot {
        snapshot::read(path).map_err(|error| BadOption(format!("{}: {error}", path.display())))?;
        streams::print(&format!("v{}.0.0\n", snapshot::FORMAT))?;
        return Ok(Code::SUCCESS);
    }
    check_instance_id(&options.id)?;
    Code::speak_firecracker();
    last_words::install_firecracker_handlers();
    level(options.level.as_deref())?;
    logging::serve();
    let log = Log { id: options.id.clone() };
    let wanted = Logger {
        log_path: options.log_path.clone(),
        // Of a file, Firecracker's clients expect to read what happens.
        level: options.level.clone().or_else(|| {
            Some(if options.log_path.is_some() { "Info" } else { "Warning" }.to_owned())
        }),
        show_level: Some(options.show_level),
        show_log_origin: Some(options.show_log_origin),
        module: options.module.clone(),
    };
    log.change(&wanted).map_err(BadOption)?;
    if options.enable_pci {
        tracing::warn!("--enable-pci: devices are on MMIO, there is no PCI bus yet");
    }
    if let Some(path) = &options.seccomp_filter {
        fs::File::open(path).map_err(|source| NoFilter { path: path.clone(), source })?;
        tracing::warn!("--seccomp-filter: Hull's own filters are used");
    }
    let mut config = VmConfig::default();
    config.memory.size = ByteSize(DEFAULT_MEMORY);
    config.i8042 = true;
    if options.no_seccomp {
        config.seccomp = seccomp::Mode::Off;
    }
    let api = match options.no_api {
        true => ApiSocket::Nowhere,
        false => ApiSocket::At(&options.api_sock),
    };
    let wanted = Wanted { api, config: options.config_file.as_deref(), ..Wanted::default() };
    let mut session = Session::prepare(&mut config, wanted)?;
    let (sender, wishes) = mpsc::channel();
    let filter = config.seccomp;
    let program = Program { name: "Firecracker", version: FIRECRACKER, api_version: FIRECRACKER };
    let body = options.http_api_max_payload_size;
    let limits = Limits { body, metadata: options.mmds_size_limit.unwrap_or(body) };
    let instance = Instance::new(program, limits, config, session.observed().clone(), sender)
        .with_id(&options.id)
        .with_log(Box::new(log));
    if let Some(path) = &options.metrics_path {
        let metrics = Metrics { metrics_path: path.clone(), ..Metrics::default() };
        instance
            .put_metrics(metrics)
            .map_err(|fault| BadOption(format!("--metrics-path: {fault}")))?;
    }
    if let Some(path) = &options.metadata {
        read(path, |text| {
            let contents = serde_json::from_slice(text)?;
            instance.preset_metadata(contents).map(drop).map_err(|fault| fault.to_string().into())
        })?;
    }
    if let Some(path) = &options.config_file {
        // The configuration of the machine, and the wish for its start.
        read(path, |text| instance.configure_from(text).map_err(|fault| fault.to_string().into()))?;
    }
    let Some(path) = &options.config_file else {
        session.serve(instance, filter)?;
        return fulfil(&session, &wishes, Ready::default(), || Ok(Ready::default()));
    };
    // Whoever comes is answered when the machine runs, and never told that it does not.
    session.offer(instance, filter);
    // The wish that the file made. There is no other way to a machine than this file.
    session.interruptible()?;
    let start = match wishes.recv()? {
        Wish::Start(start) => start,
        Wish::Quit => return Ok(Code::SUCCESS),
    };
    let timings = Arc::new(Timings::new(begun));
    let machine = session
        .build(&start.config, start.origin.as_ref(), &timings, Ready::default())
        .and_then(|machine| Ok((machine, session.console(&start.config)?)))
        .map_err(|source| BadConfiguration { path: path.clone(), source });
    let (machine, console) = machine?;
    api::run(&session, *start, machine, console, Vec::new())
}

/// Has `take` take what is in a file.
fn read(
    path: &Path,
    take: impl FnOnce(&[u8]) -> Result<()>,
) -> std::result::Result<(), BadConfiguration> {
    let taken = fs::read(path).map_err(Into::into).and_then(|text| take(&text));
    taken.map_err(|source| BadConfiguration { path: path.to_owned(), source })
}

/// An instance's id: letters, digits and `-`, at most 64.
fn check_instance_id(id: &str) -> std::result::Result<(), BadOption> {
    let valid = (1..=64).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    match valid {
        true => Ok(()),
        false => Err(BadOption(format!("--id: {id:?} is not 1 to 64 letters, digits and '-'"))),
    }
}

fn level(name: Option<&str>) -> std::result::Result<Option<Level>, BadLevel> {
    let named = |name: &str| Level::named(name).ok_or_else(|| BadLevel(name.to_owned()));
    name.map(named).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What both parsers make of it; nothing is what is left to clap.
    fn both(line: &str) -> (Option<Options>, Option<Options>) {
        let arguments: Vec<OsString> =
            std::iter::once("firecracker").chain(line.split(' ')).map(OsString::from).collect();
        let arguments: Vec<OsString> =
            arguments.into_iter().filter(|argument| !argument.is_empty()).collect();
        (Options::plain(&arguments), Options::try_parse_from(&arguments).ok())
    }

    #[test]
    fn plain_options_are_what_clap_makes_of_them() {
        for line in [
            "",
            "--api-sock /tmp/a --id x",
            "--config-file f --no-seccomp --boot-timer",
            "--log-path l --level Info --show-level --metrics-path m",
        ] {
            let (plain, clap) = both(line);
            assert!(plain.is_some() && plain == clap, "{line}: {plain:?} {clap:?}");
        }
    }

    #[test]
    fn what_is_not_plain_is_left_to_clap() {
        for line in [
            "--api-sock",
            "--api-sock=/tmp/a",
            "--api-sock --id",
            "--id a --id b",
            "--help",
            "--no-api",
            "--bogus",
            "extra",
            "--mmds-size-limit 5",
        ] {
            assert_eq!(both(line).0, None, "{line}");
        }
    }
}
