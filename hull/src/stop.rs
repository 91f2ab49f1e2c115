//! `hull stop`: the power button first, then harder means, each of them announced.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api_server::Fault;
use hyper::Method;
use serde_json::json;

use crate::cli::{Result, StopArgs};
use crate::client::{self, Api, ClientError, Machine, PATIENCE, is_socket};
use crate::exit::Code;
use crate::runtime::{self, RuntimeError};
use crate::spinner::Spinner;
use crate::streams::{self, printable};

/// How long a monitor gets to end its machine by each means.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a monitor gets to take a request.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a process that does not answer any more may take to be gone.
const GOING: Duration = Duration::from_millis(20);

/// Between two looks of who waits and has a person to tell of it.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, thiserror::Error)]
#[error("{name} still runs: its monitor, process {pid}, is stuck in the kernel")]
struct Stuck {
    name: String,
    pid: i32,
}

#[derive(Debug, thiserror::Error)]
#[error("the process that listens on {0} is in another container: it cannot be seen from here")]
struct OutOfSight(String);

#[derive(Debug, thiserror::Error)]
#[error("the process that listens on {socket}, {pid}, is no monitor of a machine")]
struct NoMonitor {
    socket: String,
    pid: i32,
}

/// True if `pid`, which listens for `machine`, says what a monitor says, or is called so if it does not
/// answer: whoever else listens on a socket is not to be killed.
fn is_monitor(machine: &Machine, pid: i32) -> bool {
    let says = client::block_on(async {
        let mut api = Api::connect(machine, ASK_TIMEOUT).await?;
        api.get("/").await
    });
    let named = |name: &str| {
        let name = name.trim_end();
        name.starts_with("hull") || name.starts_with("firecracker")
    };
    match says {
        Ok(info) => info.get("vmm_version").is_some() && info.get("app_name").is_some(),
        Err(_) => {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| named(&name))
        }
    }
}

/// Stops a machine and waits until it is gone.
pub fn stop(args: &StopArgs) -> Result {
    let Some(target) = Target::find(&args.machine.machine)? else { return Ok(Code::SUCCESS) };
    if target.stop(args)? {
        return Ok(Code::SUCCESS);
    }
    Err(Stuck { name: target.machine.name, pid: target.pid }.into())
}

struct Target {
    machine: Machine,
    pid: i32,
    process: Process,
    /// The runtime directory, if the machine was found there.
    directory: Option<PathBuf>,
}

impl Target {
    /// The machine that `text` means; nothing if it ended between our look and our grip.
    fn find(text: &OsStr) -> Result<Option<Target>> {
        if is_socket(text) { Target::behind(text) } else { Target::named(&text.to_string_lossy()) }
    }

    fn named(name: &str) -> Result<Option<Target>> {
        let directory = runtime::directory();
        let record = runtime::find(&directory, name)?;
        let Some(process) = Process::open(record.pid)? else { return Ok(None) };
        // As long as the entry is there, so is its process: what we hold is no later one of that
        // number.
        match runtime::find(&directory, name) {
            Ok(again) if again.pid == record.pid => {}
            Ok(_) | Err(RuntimeError::NoSuchMachine { .. }) => return Ok(None),
            Err(err) => return Err(err.into()),
        }
        let machine = Machine { name: record.name, socket: record.api };
        Ok(Some(Target { machine, pid: record.pid, process, directory: Some(directory) }))
    }

    fn behind(socket: &OsStr) -> Result<Option<Target>> {
        let machine = Machine::find(socket)?;
        let pid = peer(&machine)?;
        let Some(process) = Process::open(pid)? else { return Ok(None) };
        if !is_monitor(&machine, pid) {
            return Err(NoMonitor { socket: machine.name, pid }.into());
        }
        // It still listens: what we hold is no later one of that number.
        if peer(&machine)? != pid {
            return Ok(None);
        }
        Ok(Some(Target { machine, pid, process, directory: None }))
    }

    /// Tries one means after the other. Returns false if none helped.
    fn stop(&self, args: &StopArgs) -> Result<bool> {
        let (name, timeout) = (&self.machine.name, args.timeout);
        let has_api = !self.machine.socket.as_os_str().is_empty();
        if !args.now && has_api {
            match self.press_power_button()? {
                Ok(()) if self.wait(Duration::from_secs(timeout), "power off")? => return Ok(true),
                Ok(()) => streams::say(&format!(
                    "hull: {name} did not power off within {timeout} s; ending it\n"
                )),
                Err(err) => streams::say(&format!(
                    "hull: {name} cannot be asked to power off ({}); ending it\n",
                    why(&err)
                )),
            }
        }
        match self.ask("Quit")? {
            Ok(()) if self.wait(QUIT_TIMEOUT, "end")? => return Ok(true),
            Ok(()) => streams::say(&format!(
                "hull: the monitor of {name} does not react; sending it SIGTERM\n"
            )),
            Err(ClientError::NoApi(_)) => {
                streams::say(&format!("hull: ending {name} by SIGTERM: it has no API\n"));
            }
            Err(err) if is_unknown(&err) => {
                streams::say(&format!("hull: ending {name} by SIGTERM: its API cannot\n"));
            }
            Err(err) => {
                streams::say(&format!(
                    "hull: the monitor of {name} cannot be asked ({}); sending it SIGTERM\n",
                    why(&err)
                ));
            }
        }
        self.process.signal(libc::SIGTERM)?;
        if self.wait(QUIT_TIMEOUT, "end")? {
            return Ok(true);
        }
        streams::say(&format!("hull: the monitor of {name} does not end; killing it\n"));
        self.process.signal(libc::SIGKILL)?;
        let gone = self.wait(QUIT_TIMEOUT, "end")?;
        if let Some(directory) = &self.directory {
            // Removes what it could not remove itself.
            runtime::list(directory)?;
        }
        Ok(gone)
    }

    /// Firecracker has no power button, and Ctrl-Alt-Del instead.
    fn press_power_button(&self) -> Result<std::result::Result<(), ClientError>> {
        match self.ask("PowerButton")? {
            Err(err) if is_unknown(&err) => self.ask("SendCtrlAltDel"),
            pressed => Ok(pressed),
        }
    }

    /// Asks the monitor for an action, for a while again and again: between a guest's reset and its
    /// next start there is no machine that could do it. That the monitor ends meanwhile is as good.
    fn ask(&self, action: &str) -> Result<std::result::Result<(), ClientError>> {
        let between = Fault::gone().to_string();
        let patience = Instant::now() + ASK_TIMEOUT;
        loop {
            match self.ask_once(action)? {
                // Its socket goes shortly before it does.
                Err(_) if self.process.wait(GOING)? => return Ok(Ok(())),
                Err(ClientError::Refused { message, .. })
                    if message == between && Instant::now() < patience => {}
                asked => return Ok(asked),
            }
        }
    }

    fn ask_once(&self, action: &str) -> Result<std::result::Result<(), ClientError>> {
        client::block_on(async {
            let asked = async {
                let mut api = Api::connect(&self.machine, ASK_TIMEOUT).await?;
                api.send(Method::PUT, "/actions", &json!({ "action_type": action })).await
            };
            Ok::<_, ClientError>(asked.await)
        })
    }

    /// Waits for the end of the process, and tells a person at a terminal what for. Returns false if
    /// it takes longer than `timeout`.
    fn wait(&self, timeout: Duration, what: &str) -> io::Result<bool> {
        let Some(mut spinner) = Spinner::new() else { return self.process.wait(timeout) };
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            if self.process.wait(left.min(LOOK))? {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            let (name, seconds) = (&self.machine.name, left.as_secs_f32().ceil());
            spinner.turn(&format!("waiting for {name} to {what}, {seconds} s left"));
        }
    }
}

/// True if the API does not know the action that it was asked for.
fn is_unknown(err: &ClientError) -> bool {
    matches!(err, ClientError::Refused { message, .. } if message.contains("unknown variant"))
}

/// What is wrong, for who was told already of which machine.
fn why(err: &ClientError) -> String {
    match err {
        ClientError::Refused { message, .. } => printable(&message.trim_end_matches('.')),
        err => printable(err),
    }
}

/// The process that listens behind a socket.
fn peer(machine: &Machine) -> Result<i32> {
    let pid = client::block_on(client::http::peer(machine, PATIENCE))?;
    pid.ok_or_else(|| OutOfSight(machine.name.clone()).into())
}

/// A process that cannot be mistaken for another that gets its id later.
pub struct Process(OwnedFd);

impl Process {
    /// The process of this number, if there is one.
    fn open(pid: i32) -> io::Result<Option<Process>> {
        // SAFETY: pidfd_open has no memory arguments and returns a new descriptor.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            match i32::try_from(fd) {
                Ok(fd) if fd >= 0 => return Ok(Some(Process(OwnedFd::from_raw_fd(fd)))),
                _ => {}
            }
        }
        match io::Error::last_os_error() {
            err if err.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            err => Err(err),
        }
    }

    /// The one that serves the API of `machine`, if it can be seen.
    pub fn behind(machine: &Machine) -> Option<Process> {
        Process::open(peer(machine).ok()?).ok()?
    }

    /// Waits for its end. Returns false if it takes longer than `timeout`.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            // Rounded up: who waits for less than a millisecond is not to try without rest.
            let millis = left.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(i32::MAX);
            let mut poll =
                libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            match unsafe { libc::poll(&mut poll, 1, millis) } {
                0 => return Ok(false),
                n if n > 0 => return Ok(true),
                _ => {}
            }
            match io::Error::last_os_error() {
                err if err.kind() == io::ErrorKind::Interrupted => {}
                err => return Err(err),
            }
        }
    }

    /// Sends a signal; one that has just ended does not need it any more.
    fn signal(&self, number: i32) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), number, none, 0)
        };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            err if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            err => Err(err),
        }
    }
}
