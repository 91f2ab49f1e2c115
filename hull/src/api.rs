//! `hull api`: a machine that clients configure and start over its socket.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use api_server::types::small::Logger;
use api_server::{Instance, Limits, LogSettings, Program, Socket, Start};
use vmm::config::VmConfig;
use vmm::machine::Machine;
use vmm::timings::Timings;

use crate::cli::{ApiArgs, Result};
use crate::logging::{self, Level, Lines};
use crate::run;
use crate::session::{Session, Wanted};

/// The version of Firecracker whose API is served.
pub const FIRECRACKER: &str = "1.12.1";

/// Serves the API until the machine that is started there ends.
pub fn api(args: &ApiArgs) -> Result {
    logging::serve();
    logging::change(Some(args.log), None, None);
    let mut config = VmConfig { name: args.name.clone(), ..VmConfig::default() };
    config.seccomp = args.seccomp.map_or(config.seccomp, Into::into);
    config.validate_without_kernel()?;
    let program =
        Program { name: "Hull", version: env!("CARGO_PKG_VERSION"), api_version: FIRECRACKER };
    let socket = Socket::bind(&args.sock)?;
    let wanted = Wanted {
        pidfile: args.pidfile.as_deref(),
        socket: Some(socket.file()),
        ..Wanted::default()
    };
    let session = Session::prepare(&mut config, wanted)?;
    let (starts, wishes) = mpsc::channel();
    let filter = config.seccomp;
    let limits =
        Limits { body: args.max_body, metadata: args.mmds_size_limit.unwrap_or(args.max_body) };
    let log = Log { id: config.name.clone().unwrap_or_default() };
    let instance = Instance::new(program, limits, config, starts).with_log(Box::new(log));
    let _file = api_server::serve(socket, instance, filter)?;
    start_wished(&session, &wishes)
}

/// Starts the machine that a client wishes for, and stays with it until it ends.
pub fn start_wished(session: &Session, wishes: &mpsc::Receiver<Start>) -> Result {
    loop {
        session.interruptible()?;
        // The sender lives in the API's thread, which lives as long as the process.
        let wish: Start = wishes.recv()?;
        // Clients count from their wish, not from the process.
        let timings = Arc::new(Timings::new(Instant::now()));
        match session.build(&wish.config, &timings) {
            Err(error) => wish.failed(error.as_ref()),
            Ok(machine) => return run(session, wish, machine),
        }
    }
}

/// Runs the machine that was wished for until it ends.
pub fn run(session: &Session, wish: Start, machine: Machine) -> Result {
    let config = wish.config.clone();
    session.describe(&config)?;
    wish.started(machine.handle());
    let ending = session.run(machine, &config)?;
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
