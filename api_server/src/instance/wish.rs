//! What clients want of whoever has the process.

use tokio::sync::oneshot;
use vmm::config::VmConfig;
use vmm::hook::{self, Hook};
use vmm::machine::{Command, Handle, Origin};

use super::{Instance, Link, Phase, lock, to_be_built};
use crate::fault::{Fault, chain};

/// What clients want of whoever has the process.
pub enum Wish {
    /// The machine is to be built and run.
    Start(Box<Start>),
    /// The process is to end; there is no machine yet.
    Quit,
}

/// Reads a snapshot: what is to be built of it, and what it goes on from.
pub(super) type Load = Box<dyn FnOnce() -> Result<(VmConfig, Origin), Fault> + Send>;

/// Where a machine that is to start comes from.
pub(super) enum Beginning {
    /// A kernel.
    Kernel(Box<VmConfig>),
    /// A snapshot, whether it goes on at once, and what its guest is told then.
    Snapshot(Load, bool, Option<Hook>),
}

/// The answer to a client who waits, and what comes of the hook of the guest, if that is told.
pub(super) type Outcome = Result<Option<oneshot::Receiver<hook::Outcome>>, Fault>;

/// Who wants to hear what comes of a hook.
type Heard = Box<dyn FnOnce(hook::Outcome)>;

/// Somebody wants the machine to start. Whoever gets this builds it.
pub struct Start {
    /// What is to be built.
    pub config: VmConfig,
    /// Where it goes on from, if it does not boot.
    pub origin: Option<Origin>,
    load: Option<Load>,
    resume: bool,
    hook: Option<Hook>,
    told: Option<oneshot::Receiver<hook::Outcome>>,
    link: Link,
    reply: oneshot::Sender<Outcome>,
}

impl Start {
    /// Reads the snapshot that the machine is to go on from, if it is. Nothing if that cannot be: the
    /// client was told, and may wish for something else.
    pub fn read(mut self) -> Option<Start> {
        match self.load.take().map(|load| load()) {
            None => {}
            Some(Ok((config, origin))) => {
                self.config = config;
                self.origin = Some(origin);
            }
            Some(Err(fault)) => {
                self.refuse(fault);
                return None;
            }
        }
        Some(self)
    }

    /// What the hook of the guest is to be told before its first instruction, and who wants to hear what comes of it;
    /// once.
    pub fn hook(&mut self) -> Option<(Hook, Heard)> {
        let hook = self.hook.take()?;
        let (sender, receiver) = oneshot::channel();
        self.told = Some(receiver);
        // A client that is gone has its machine all the same.
        Some((hook, Box::new(move |outcome| drop(sender.send(outcome)))))
    }

    /// The machine is built and runs from now on.
    pub fn started(self, handle: Handle) {
        let base = self.origin.and_then(|origin| {
            lock(&self.link.0).config = self.config;
            origin.base
        });
        self.link.started(handle.clone(), base);
        // A client that is gone has its machine all the same.
        let (told, reply) = (self.told, self.reply);
        let reply = |outcome: Result<(), Fault>| drop(reply.send(outcome.map(|()| told)));
        if self.resume {
            let done = |resumed: Result<_, _>| {
                reply(resumed.map(drop).map_err(|refusal| Fault::bad(chain(&refusal))));
            };
            handle.send(Command::Resume, Box::new(done));
        } else {
            reply(Ok(()));
        }
    }

    /// It cannot be built; nothing of it is left, and it can be configured otherwise.
    pub fn failed(self, error: &dyn std::error::Error) {
        self.refuse(Fault::bad(format!("Start microvm error: {}", chain(error))));
    }

    fn refuse(self, fault: Fault) {
        lock(&self.link.0).phase = Phase::Configuring;
        let _ = self.reply.send(Err(fault));
    }
}

impl Instance {
    /// Waits for what was wished for.
    pub(super) async fn fulfilled(&self, wish: oneshot::Receiver<Outcome>) -> Outcome {
        wish.await.unwrap_or_else(|_| Err(Fault::gone()))
    }

    /// Has the machine built that was configured.
    pub(super) fn wish(&self) -> Result<oneshot::Receiver<Outcome>, Fault> {
        let inner = self.lock();
        if !matches!(inner.phase, Phase::Configuring) {
            return Err(Fault::after_start());
        }
        if inner.config.kernel.path.as_os_str().is_empty() {
            return Err(Fault::bad(
                "Start microvm error: Cannot start microvm without kernel configuration.",
            ));
        }
        let config = to_be_built(&inner.config);
        drop(inner);
        self.wish_for(Beginning::Kernel(Box::new(config)))
    }

    /// Has a machine built, of which a client has said or saved everything.
    pub(super) fn wish_for(&self, from: Beginning) -> Result<oneshot::Receiver<Outcome>, Fault> {
        let (reply, outcome) = oneshot::channel();
        let (config, load, resume, hook) = match from {
            Beginning::Kernel(config) => (*config, None, false, None),
            Beginning::Snapshot(load, resume, hook) => {
                (VmConfig::default(), Some(load), resume, hook)
            }
        };
        let mut inner = self.lock();
        if !matches!(inner.phase, Phase::Configuring) {
            return Err(Fault::after_start());
        }
        let (link, told) = (self.link(), None);
        let start = Start { config, origin: None, load, resume, hook, told, link, reply };
        self.wishes.send(Wish::Start(Box::new(start))).map_err(|_| Fault::gone())?;
        inner.phase = Phase::Starting;
        Ok(outcome)
    }
}
