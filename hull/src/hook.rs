//! Telling the hook of a guest, beside the machine's own work on the control thread, that it is a copy.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use vmm::config::VmConfig;
use vmm::hook::{Addresses, Conversation, Hook, HookError, Identity, Outcome};
use vmm::machine::{Command, Handle, Machine, Message, Service};
use vmm_sys_util::timerfd::TimerFd;

use crate::cli::{RestoreArgs, UsageError, millis};
use crate::report;

/// What the guest of a machine that is restored is told.
///
/// # Errors
/// An option makes no sense.
pub fn of_restored(args: &RestoreArgs) -> Result<Option<Hook>, UsageError> {
    let Some(port) = args.hook else { return Ok(None) };
    let timeout_ms = match args.hook_timeout {
        Some(seconds) => millis(seconds).ok_or_else(|| UsageError::Option {
            option: "hook-timeout",
            text: seconds.to_string(),
            reason: "it is no time in seconds".to_owned(),
        })?,
        None => Hook::default().timeout_ms,
    };
    let nets = args.ip.iter().map(|text| address(text)).collect::<Result<_, _>>()?;
    Ok(Some(Hook { port, timeout_ms, hostname: args.hostname.clone(), nets }))
}

/// Reads `ID=ADDRESS/PREFIX[,GATEWAY]`.
fn address(text: &str) -> Result<Addresses, UsageError> {
    let wrong = |reason| UsageError::Option { option: "ip", text: text.to_owned(), reason };
    let missing = || wrong("write the device's id, =, and an address".to_owned());
    let (card, rest) = text.split_once('=').ok_or_else(missing)?;
    let (ip, gateway) = rest.split_once(',').map_or((rest, None), |(ip, way)| (ip, Some(way)));
    let gateway = gateway.map(|text| {
        text.parse().map_err(|_| wrong(format!("{text:?} is no address such as 172.30.0.1")))
    });
    let ip = ip.parse().map_err(wrong)?;
    Ok(Addresses { card: card.to_owned(), mac: None, ip: Some(ip), gateway: gateway.transpose()? })
}

/// A hook that was told, or is to be.
pub struct Asking {
    /// Until it is over: then its connection is closed.
    conversation: Option<Conversation>,
    /// Readable when one of the others is: a service has one descriptor.
    both: OwnedFd,
    timer: TimerFd,
    patience: Duration,
    since: Arc<OnceLock<Instant>>,
    done: Option<Box<dyn FnOnce(Outcome)>>,
}

impl Asking {
    /// Asks the machine, which does not run yet, for a connection. What comes of it is said to `done`, once.
    ///
    /// # Errors
    /// The system refused a descriptor.
    pub fn start(
        hook: Hook,
        identity: Identity,
        config: VmConfig,
        machine: &Handle,
        done: Box<dyn FnOnce(Outcome)>,
    ) -> io::Result<Asking> {
        let patience = hook.patience();
        let (conversation, call) = Conversation::new(hook, identity, config)?;
        let mut timer = TimerFd::new()?;
        timer.reset(patience, None)?;
        let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let readable = epoll::EventData::new_u64(0);
        epoll::add(&both, conversation.as_fd(), readable, epoll::EventFlags::IN)?;
        // SAFETY: the timer lives as long as the call.
        let fd = unsafe { BorrowedFd::borrow_raw(timer.as_raw_fd()) };
        epoll::add(&both, fd, readable, epoll::EventFlags::IN)?;
        let since = Arc::<OnceLock<Instant>>::default();
        let begins = Arc::clone(&since);
        let message = Message::Call(call);
        // Answered right before the machine is told to go on. If it has no such device, the connection ends.
        let reply = Box::new(move |_| {
            let _ = begins.set(Instant::now());
        });
        machine.send(Command::Update { device: "vsock".to_owned(), message }, reply);
        let conversation = Some(conversation);
        Ok(Asking { conversation, both, timer, patience, since, done: Some(done) })
    }

    /// The same of a machine that goes on from a snapshot: it is told that it is the only copy that was made.
    ///
    /// # Errors
    /// See [`Asking::start`].
    pub fn start_restored(
        hook: Hook,
        config: &VmConfig,
        machine: &Machine,
        done: Box<dyn FnOnce(Outcome)>,
    ) -> io::Result<Asking> {
        let name = config.name.clone().unwrap_or_default();
        let identity = Identity { number: 1, of: 1, name, generation: machine.generation() };
        Asking::start(hook, identity, config.clone(), &machine.handle(), done)
    }
}

impl Service for Asking {
    fn fd(&self) -> RawFd {
        self.both.as_raw_fd()
    }

    fn on_ready(&mut self, _machine: &Handle) -> bool {
        let Some(conversation) = &mut self.conversation else { return false };
        let passed = self.since.get().map_or(Duration::ZERO, Instant::elapsed);
        let result = match conversation.advance() {
            Some(result) => result,
            None if passed >= self.patience => Err(HookError::Late(self.patience)),
            // The timer was set before the machine began, or it was not that.
            None => {
                let left = (self.patience - passed).max(Duration::from_millis(1));
                return self.timer.reset(left, None).is_ok();
            }
        };
        self.conversation = None;
        let us = u64::try_from(passed.as_micros()).unwrap_or(u64::MAX);
        let fault = result.err().map(|error| report::line(&error));
        if let Some(done) = self.done.take() {
            done(Outcome { us, fault });
        }
        false
    }
}
