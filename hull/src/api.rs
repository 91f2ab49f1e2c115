//! `hull api`: a machine that clients configure and start over its socket.

use std::mem::take;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use api_server::types::small::Logger;
use api_server::{Instance, Limits, LogSettings, Program, Start, Wish};
use vmm::config::{ConfigError, VmConfig};
use vmm::hypervisor::kvm::{DEVICE, Kvm};
use vmm::machine::{Hollow, Machine, Ready, Service, Shape};
use vmm::seccomp;
use vmm::timings::Timings;

use crate::cli::{ApiArgs, Result, ShapeOption, UsageError, read_option};
use crate::entry;
use crate::exit::Code;
use crate::hook::Asking;
use crate::keyvalue;
use crate::logging::{self, Level, Lines};
use crate::run;
use crate::session::{ApiSocket, Attached, Session, Wanted};

/// The version of Firecracker whose API is served.
pub const FIRECRACKER: &str = "1.12.1";

/// What clients are told of Hull.
pub const HULL: Program =
    Program { name: "Hull", version: env!("CARGO_PKG_VERSION"), api_version: FIRECRACKER };

#[derive(Debug, thiserror::Error)]
#[error("--ready")]
struct NoShape(#[source] ConfigError);

/// Serves the API until the machine that is started there ends.
pub fn api(args: &ApiArgs) -> Result {
    logging::serve();
    logging::change(Some(args.process.log), None, None);
    let mut config = VmConfig { name: args.name.clone(), ..VmConfig::default() };
    config.seccomp = args.process.seccomp.map_or(config.seccomp, Into::into);
    config.validate_without_kernel()?;
    let wanted = Wanted {
        pidfile: args.process.pidfile.as_deref(),
        api: ApiSocket::At(&args.sock),
        ..Wanted::default()
    };
    let mut session = Session::prepare(&mut config, wanted)?;
    let (sender, wishes) = mpsc::channel();
    let filter = config.seccomp;
    let limits =
        Limits { body: args.max_body, metadata: args.mmds_size_limit.unwrap_or(args.max_body) };
    let log = Log { id: config.name.clone().unwrap_or_default() };
    let instance = Instance::new(HULL, limits, config, session.observed().clone(), sender)
        .with_log(Box::new(log));
    let shape = args.ready.as_ref().map(|text| {
        let shape: ShapeOption = read_option("ready", text, keyvalue::split(text))?;
        Ok::<Shape, UsageError>(shape.into())
    });
    let shape = shape.transpose()?;
    if let Some(shape) = shape {
        shape.validate().map_err(NoShape)?;
        entry::populate_code();
    }
    let prepare = || prepared(shape, filter);
    let ready = prepare()?;
    session.serve(instance, filter)?;
    fulfil(&session, &wishes, ready, prepare)
}

/// A VM of this shape, if there is to be one.
fn prepared(shape: Option<Shape>, filter: seccomp::Mode) -> Result<Ready> {
    let Some(shape) = shape else { return Ok(Ready::default()) };
    let hollow = Hollow::new(&Kvm::open(Path::new(DEVICE))?, shape, filter)?;
    Ok(Ready { hollow: Some(hollow), ..Ready::default() })
}

/// Starts the machine that a client wishes for, of what is `ready` if it fits, and stays with it until it ends. What a
/// failed start leaves to be wished for again has what `prepare` makes.
pub fn fulfil(
    session: &Session,
    wishes: &mpsc::Receiver<Wish>,
    mut ready: Ready,
    prepare: impl Fn() -> Result<Ready>,
) -> Result {
    loop {
        session.interruptible()?;
        // The sender lives in the API's thread, which lives as long as the process.
        let start = match wishes.recv()? {
            Wish::Start(start) => start.read(),
            Wish::Quit => {
                session.tell_quit();
                return Ok(Code::SUCCESS);
            }
        };
        // The client was told what is wrong.
        let Some(mut start) = start else { continue };
        // Clients count from their wish, not from the process.
        let timings = Arc::new(Timings::new(Instant::now()));
        let machine =
            session.build(&start.config, start.origin.as_ref(), &timings, take(&mut ready));
        // Before the client is told that the machine runs.
        let built = machine.and_then(|machine| {
            let asking = asking(&mut start, &machine)?;
            Ok((machine, session.console(&start.config)?, asking))
        });
        match built {
            Err(error) => {
                start.failed(error.as_ref());
                // Whatever fits is made then, if there is none.
                ready = prepare().unwrap_or_default();
            }
            Ok((machine, console, asking)) => {
                return run(session, start, machine, console, asking);
            }
        }
    }
}

/// What tells the guest of a machine that it is a copy, if the client wants that.
fn asking(start: &mut Start, machine: &Machine) -> Result<Vec<Box<dyn Service>>> {
    let Some((hook, done)) = start.hook() else { return Ok(Vec::new()) };
    let asking = Asking::start_restored(hook, &start.config, machine, done)?;
    Ok(vec![Box::new(asking)])
}

/// Runs the machine that was wished for until it ends, and serves these beside.
pub fn run(
    session: &Session,
    start: Start,
    machine: Machine,
    console: Attached,
    services: Vec<Box<dyn Service>>,
) -> Result {
    let config = start.config.clone();
    session.describe(&config)?;
    start.started(machine.handle());
    tracing::info!(name = config.name, cpus = config.cpus, "the machine starts");
    let ending = session.run_beside(machine, &config, console, services)?;
    Ok(run::end(&ending))
}

/// The log of the process, for `PUT /logger`.
pub struct Log {
    /// What lines call the machine.
    pub id: String,
}

impl LogSettings for Log {
    fn change(&self, wanted: &Logger) -> std::result::Result<(), String> {
        let level = match wanted.level.as_deref() {
            Some(name) => Some(Level::named(name).ok_or_else(|| {
                format!("level: {name:?} is not Off, Error, Warning, Info, Debug or Trace")
            })?),
            None => None,
        };
        let opened = wanted.log_path.as_deref().map(logging::open).transpose();
        let file = opened.map_err(|error| format!("log_path: {error}"))?;
        let lines = Lines {
            id: self.id.clone(),
            level: wanted.show_level.unwrap_or(false),
            origin: wanted.show_log_origin.unwrap_or(false),
            module: wanted.module.clone(),
        };
        logging::change(level, file, Some(lines));
        Ok(())
    }
}
