//! `hull run`.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use api_server::{Instance, Limits, Link};
use vmm::config::{OnReboot, VmConfig};
use vmm::machine::{Ending, LONGEST_METADATA, Ready};
use vmm::timings::{Milestone, Timings};

use crate::api::HULL;
use crate::cli::{Format, Result, RunArgs, UsageError};
use crate::exit::Code;
use crate::logging;
use crate::session::{Session, Wanted};
use crate::streams;

/// Runs a machine until it ends.
pub fn run(args: RunArgs, start: Instant) -> Result {
    let mut config = args.config()?;
    if args.print_config {
        streams::print(&toml::to_string(&config).map_err(UsageError::from)?)?;
        return Ok(Code::SUCCESS);
    }
    logging::start(args.process.log);
    let wanted = Wanted {
        pidfile: args.process.pidfile.as_deref(),
        config: args.config.as_deref(),
        api: args.reach.socket(),
    };
    let mut session = Session::prepare(&mut config, wanted)?;
    let limits = Limits { metadata: LONGEST_METADATA, ..Limits::default() };
    let (instance, link) = Instance::configured(HULL, limits, config, session.observed().clone());
    instance.initialise_metadata()?;
    session.offer(instance, link.config().seccomp);
    loop {
        // With what clients changed meanwhile.
        let config = link.config();
        let timings = Arc::new(Timings::new(start));
        let result = match config.on_reboot {
            OnReboot::Exit => run_once(&session, &link, &config, &timings),
            OnReboot::Restart => run_in_thread(&session, &link, &config, &timings),
        };
        if let Some(format) = args.timings {
            streams::say(&timings_text(&timings, format));
        }
        match result? {
            Ending::Reset if config.on_reboot == OnReboot::Restart => {
                tracing::info!("the guest reboots");
            }
            ending => return Ok(end(&ending)),
        }
    }
}

/// Says how a machine ended, where that needs to be said.
pub fn end(ending: &Ending) -> Code {
    if *ending == Ending::TripleFault {
        streams::say("hull: the guest crashed (triple fault)\n");
    }
    Code::from(ending)
}

fn run_once(
    session: &Session,
    link: &Link,
    config: &VmConfig,
    timings: &Arc<Timings>,
) -> Result<Ending> {
    let machine = session.build(config, None, timings, Ready::default())?;
    link.started(machine.handle(), None);
    session.run(machine, config)
}

/// Runs the machine on a thread of its own. A thread that controlled a machine is filtered for good
/// and could not assemble the next one; this one only waits, and no guest reaches it.
fn run_in_thread(
    session: &Session,
    link: &Link,
    config: &VmConfig,
    timings: &Arc<Timings>,
) -> Result<Ending> {
    std::thread::scope(|scope| {
        let control = std::thread::Builder::new()
            .name("main".into())
            .spawn_scoped(scope, || run_once(session, link, config, timings))?;
        control.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The milestones as people or programs read them.
fn timings_text(timings: &Timings, format: Format) -> String {
    let reached = Milestone::ALL.map(|milestone| (milestone, timings.get(milestone)));
    if format == Format::Json {
        let map: serde_json::Map<String, serde_json::Value> = reached
            .iter()
            .map(|(milestone, nanos)| (milestone.key().to_owned(), (*nanos).into()))
            .collect();
        return format!("{}\n", serde_json::Value::Object(map));
    }
    let mut text = String::from("hull: timings from process start\n");
    for (milestone, nanos) in reached {
        let time = match nanos {
            Some(nanos) => format!("{:>12.3} ms", nanos as f64 / 1e6),
            None => format!("{:>15}", "-"),
        };
        let note = match milestone {
            Milestone::Userspace => {
                format!("  (the guest writes 123 to {:#x})", arch::layout::BOOT_TIMER)
            }
            _ => String::new(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:<20}{time}{note}", milestone.name());
    }
    text
}
