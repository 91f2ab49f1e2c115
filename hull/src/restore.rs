//! `hull restore`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use api_server::{Instance, Limits};
use vmm::config::{MmdsConfig, VmConfig};
use vmm::hook::Outcome;
use vmm::machine::{Command, LONGEST_METADATA, Ready, Service};
use vmm::snapshot::{self, Overrides};
use vmm::timings::Timings;

use crate::api::HULL;
use crate::cli::{RestoreArgs, Result, UsageError, console, leading_path, read_option};
use crate::hook::{self, Asking};
use crate::logging;
use crate::run;
use crate::session::{Session, Wanted};
use crate::snapshots::files;

/// Lets a saved machine go on, and stays with it until it ends.
pub fn restore(args: &RestoreArgs, start: Instant) -> Result {
    logging::start(args.process.log);
    let mut overrides = overrides(args)?;
    let base = args.base.as_deref().map(files).transpose()?;
    let from = files(&args.folder)?;
    let mut origin = match &args.pager {
        Some(socket) => snapshot::load_paged(&from.state, socket.clone())?,
        None => snapshot::load(&from, base.as_ref())?,
    };
    origin.clock = args.clock.into();
    let record = args.record.as_deref();
    origin.record =
        record.map(|text| read_option("record", text, leading_path(text))).transpose()?;
    let prefetch = args.prefetch.as_deref();
    origin.prefetch =
        prefetch.map(|text| read_option("prefetch", text, leading_path(text))).transpose()?;
    let mut config = VmConfig {
        name: args.name.clone(),
        seccomp: args.process.seccomp.map(Into::into).unwrap_or_default(),
        ..origin.state.header.config.clone()
    };
    let mut hook = hook::of_restored(args)?;
    overrides.agree(hook.as_mut())?;
    overrides.apply(&mut config)?;
    config.console = config.console.elsewhere(args.console.as_deref().map(console).transpose()?)?;
    config.validate_without_kernel()?;
    if let Some(path) = &args.metadata {
        MmdsConfig::of(&mut config)?.path = Some(path.clone());
    }
    hook.as_ref().map_or(Ok(()), |hook| hook.validate(&config))?;
    let pidfile = args.process.pidfile.as_deref();
    let wanted = Wanted { pidfile, config: None, api: args.reach.socket() };
    let mut session = Session::prepare(&mut config, wanted)?;
    let limits = Limits { metadata: LONGEST_METADATA, ..Limits::default() };
    let observed = session.observed().clone();
    let (instance, link) = Instance::configured(HULL, limits, config, observed);
    instance.initialise_metadata()?;
    session.offer(instance, link.config().seccomp);
    let config = link.config();
    let timings = Arc::new(Timings::new(start));
    let machine = session.build(&config, Some(&origin), &timings, Ready::default())?;
    let base = origin.base;
    let handle = machine.handle();
    link.started(handle.clone(), base);
    let mut services: Vec<Box<dyn Service>> = Vec::new();
    if let Some(hook) = hook {
        let done = Box::new(|outcome: Outcome| match outcome {
            Outcome { us, fault: None } => tracing::info!(us, "the guest's hook is ready"),
            Outcome { fault: Some(why), .. } => {
                tracing::warn!("the guest does not know that it is a copy: {why}");
            }
        });
        services.push(Box::new(Asking::start_restored(hook, &config, &machine, done)?));
    }
    if !args.paused {
        handle.send(Command::Resume, Box::new(drop));
    }
    let console = session.console(&config)?;
    Ok(run::end(&session.run_beside(machine, &config, console, services)?))
}

fn overrides(args: &RestoreArgs) -> std::result::Result<Overrides, UsageError> {
    let pair = |option, text: &str| match text.split_once('=') {
        Some((id, value)) if !id.is_empty() && !value.is_empty() => {
            Ok((id.to_owned(), value.to_owned()))
        }
        _ => Err(UsageError::Option {
            option,
            text: text.to_owned(),
            reason: "write the device's id, =, and what it gets".to_owned(),
        }),
    };
    let nets = args.net.iter().map(|text| pair("net", text)).collect::<std::result::Result<_, _>>();
    let macs = args.mac.iter().map(|text| {
        let (id, mac) = pair("mac", text)?;
        let wrong = |reason| UsageError::Option { option: "mac", text: text.clone(), reason };
        Ok((id, mac.parse().map_err(wrong)?))
    });
    let macs = macs.collect::<std::result::Result<_, UsageError>>()?;
    let disks = args.disk.iter().map(|text| {
        let (id, path) = pair("disk", text)?;
        Ok((id, PathBuf::from(path)))
    });
    let disks = disks.collect::<std::result::Result<_, UsageError>>()?;
    Ok(Overrides { nets: nets?, macs, disks, vsock: args.vsock.clone(), cid: args.cid })
}
