//! `hull pool`: keeps processes ready for machines that are forked.
//!
//! There is a shelf for each shape of machine, which is filled one process at a time. Whoever connects says
//! which shape it wants, and gets a process from that shelf, or a new one where none is ready. How many may be
//! about to speak, and how many processes may have no machine yet, is limited: others wait at the socket.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use vmm::config::{ByteSize, ConfigError};
use vmm::fork;
use vmm::machine::Shape;
use vmm::signals::{Hooks, Meaning, Signals};

use crate::cli::{PoolArgs, Result, Seccomp, read_option};
use crate::exit::Code;
use crate::keyvalue;
use crate::logging;
use crate::nursery::{self, Asked, Zygote};

/// Most processes of one shape.
const MOST: u32 = 4096;
/// So long after somebody took one no other is made: who takes many in a row gets the processor.
const REST: Duration = Duration::from_millis(20);
/// After a process could not be made, it is not tried again for so long.
const SULK: Duration = Duration::from_secs(1);
/// Most that may be about to say what they want; with more, who has been silent longest has to go.
const MOST_ASKING: usize = 64;

#[derive(Debug, thiserror::Error)]
enum PoolError {
    #[error("--keep: number can be 1 to {MOST}")]
    Number,
    #[error("--keep")]
    Shape(#[source] ConfigError),
}

/// `--keep`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct Keep {
    number: u32,
    cpus: u32,
    memory: ByteSize,
    huge_pages: bool,
}

impl Default for Keep {
    fn default() -> Keep {
        Keep { number: 8, cpus: 1, memory: ByteSize(128 << 20), huge_pages: false }
    }
}

impl Keep {
    fn shape(&self) -> Shape {
        Shape { cpus: self.cpus, memory: self.memory.0, huge_pages: self.huge_pages }
    }
}

/// Processes of one shape, or without a VM.
struct Shelf {
    shape: Option<Shape>,
    number: usize,
    ready: Vec<Zygote>,
    /// The one that is being made.
    coming: Option<Zygote>,
    /// No other is made before.
    not_before: Instant,
    /// Why the last one was not to be had.
    trouble: Option<String>,
}

impl Shelf {
    fn new(shape: Option<Shape>, number: u32, now: Instant) -> Shelf {
        Shelf {
            shape,
            number: number as usize,
            ready: Vec::new(),
            coming: None,
            not_before: now,
            trouble: None,
        }
    }

    /// When the next one is made, unless all are there or one is being made.
    fn next(&self) -> Option<Instant> {
        (self.coming.is_none() && self.ready.len() < self.number).then_some(self.not_before)
    }

    fn fill(&mut self, filter: Seccomp, now: Instant) {
        if self.next().is_none_or(|time| now < time) {
            return;
        }
        match Zygote::start(self.shape, filter) {
            Ok(zygote) => self.coming = Some(zygote),
            Err(error) => self.sulk(error.to_string(), now),
        }
    }

    /// The one that was being made is ready, or gone.
    fn arrived(&mut self, now: Instant) {
        let Some(mut zygote) = self.coming.take() else { return };
        match zygote.readiness() {
            Ok(()) => {
                self.ready.push(zygote);
                self.trouble = None;
            }
            Err(why) => self.sulk(why, now),
        }
    }

    /// Has one that is ready serve whoever is at the other end of `stream`, if there is one.
    fn give(&mut self, stream: &UnixStream, now: Instant) -> Option<UnixStream> {
        self.not_before = now + REST;
        // One that is gone is none.
        while let Some(zygote) = self.ready.pop() {
            if let Ok(asked) = zygote.give(stream) {
                return Some(asked);
            }
        }
        None
    }

    /// There is none for now.
    fn sulk(&mut self, why: String, now: Instant) {
        // It is tried again and again; once is enough to be told of it.
        if self.trouble.as_ref() != Some(&why) {
            tracing::warn!(shape = ?self.shape, why, "no process is ready");
            self.trouble = Some(why);
        }
        self.not_before = now + SULK;
    }
}

/// Keeps processes ready until it is told to end.
pub fn pool(args: &PoolArgs) -> Result {
    logging::start(args.log);
    let keep = match args.keep.as_slice() {
        [] => vec![Keep::default()],
        some => {
            let keep = |text: &String| read_option("keep", text, keyvalue::split(text));
            some.iter().map(keep).collect::<std::result::Result<Vec<Keep>, _>>()?
        }
    };
    if keep.iter().any(|keep| !(1..=MOST).contains(&keep.number)) {
        return Err(PoolError::Number.into());
    }
    keep.iter().try_for_each(|keep| keep.shape().validate()).map_err(PoolError::Shape)?;
    let path = args.socket.clone().unwrap_or_else(nursery::default_socket);
    let (listener, _socket) = nursery::listen(&path)?;
    let signals = Signals::block()?.with_hooks(Hooks::default());
    let now = Instant::now();
    let shelves = keep.iter().map(|keep| Shelf::new(Some(keep.shape()), keep.number, now));
    let shelves = shelves.chain([Shelf::new(None, args.blank, now)]);
    let pool = Pool {
        listener: &listener,
        filter: args.seccomp,
        shelves: shelves.collect(),
        asking: Vec::new(),
        asked: Asked::default(),
        deaf: now,
    };
    pool.serve(&signals)
}

struct Pool<'a> {
    listener: &'a UnixListener,
    filter: Seccomp,
    /// Those for a shape come first.
    shelves: Vec<Shelf>,
    /// Who connected, and until when they may say what they want.
    asking: Vec<(UnixStream, Instant)>,
    /// With as many as there may be nobody else is let in, or given one: they wait.
    asked: Asked,
    /// Nobody is let in before.
    deaf: Instant,
}

/// What happened.
#[derive(Default)]
struct Ready {
    signal: bool,
    connecting: bool,
    /// Of each shelf, whether the process that is being made has something to say.
    arrived: Vec<bool>,
    /// Of each who is asking, whether they said something.
    speaking: Vec<bool>,
}

impl Pool<'_> {
    fn serve(mut self, signals: &Signals) -> Result {
        loop {
            let now = Instant::now();
            self.forget(now);
            self.fill(now);
            let ready = self.wait(signals, now)?;
            if ready.signal && matches!(signals.take(), Some(Meaning::End(_))) {
                return Ok(Code::SUCCESS);
            }
            let now = Instant::now();
            self.stock(&ready.arrived, now);
            self.hear(&ready.speaking, now);
            if ready.connecting {
                self.let_in(now);
            }
        }
    }

    /// Forgets who has a machine, and who did not say in time what they want.
    fn forget(&mut self, now: Instant) {
        self.asked.look();
        // Who has just begun to speak is heard.
        self.asking.retain(|(stream, until)| *until > now || fork::has_begun(stream));
    }

    fn fill(&mut self, now: Instant) {
        for shelf in &mut self.shelves {
            shelf.fill(self.filter, now);
        }
    }

    /// Waits until something happens, or there is something to do.
    fn wait(&self, signals: &Signals, now: Instant) -> rustix::io::Result<Ready> {
        let when = |wanted| if wanted { PollFlags::IN } else { PollFlags::empty() };
        let has_room = !self.asked.is_full();
        let mut fds = vec![PollFd::new(self.listener, when(has_room && self.deaf <= now))];
        // SAFETY: it lives as long as `signals`, which outlives the call.
        let signal = unsafe { BorrowedFd::borrow_raw(signals.fd()) };
        fds.push(PollFd::from_borrowed_fd(signal, PollFlags::IN));
        fds.extend(self.asking.iter().map(|(stream, _)| PollFd::new(stream, when(has_room))));
        fds.extend(self.asked.fds());
        let coming = self.shelves.iter().filter_map(|shelf| shelf.coming.as_ref());
        fds.extend(coming.map(|zygote| PollFd::from_borrowed_fd(zygote.as_fd(), PollFlags::IN)));
        let left = self.next(now).map(|next| next.saturating_duration_since(now));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            polled => polled?,
        };
        let is_ready = |fd: RawFd| {
            fds.iter().any(|one| one.as_fd().as_raw_fd() == fd && !one.revents().is_empty())
        };
        let has_arrived = |shelf: &Shelf| {
            shelf.coming.as_ref().is_some_and(|zygote| is_ready(zygote.as_fd().as_raw_fd()))
        };
        Ok(Ready {
            signal: is_ready(signals.fd()),
            connecting: is_ready(self.listener.as_raw_fd()),
            arrived: self.shelves.iter().map(has_arrived).collect(),
            speaking: self.asking.iter().map(|(stream, _)| is_ready(stream.as_raw_fd())).collect(),
        })
    }

    /// When there is something to do though nothing happens.
    fn next(&self, now: Instant) -> Option<Instant> {
        // Without room nobody is served, also who has spoken and is past their time.
        let asking = self.asking.iter().filter(|_| !self.asked.is_full());
        let shelves = self.shelves.iter().filter_map(Shelf::next);
        let deaf = (self.deaf > now).then_some(self.deaf);
        shelves.chain(asking.map(|(_, until)| *until)).chain(deaf).min()
    }

    /// Puts processes that are ready on their shelves.
    fn stock(&mut self, arrived: &[bool], now: Instant) {
        for (shelf, _) in self.shelves.iter_mut().zip(arrived).filter(|(_, arrived)| **arrived) {
            shelf.arrived(now);
        }
    }

    /// Serves those who said what they want. Who finds no room keeps their place.
    fn hear(&mut self, speaking: &[bool], now: Instant) {
        let mut speaking = speaking.iter().copied();
        let speaks = |_: &mut (UnixStream, Instant)| speaking.next().unwrap_or_default();
        let spoke: Vec<_> = self.asking.extract_if(.., speaks).collect();
        for (n, (stream, until)) in spoke.into_iter().enumerate() {
            if !self.asked.is_full() {
                self.hand_over(stream, now);
            } else if !fork::is_over(&stream) {
                self.asking.insert(n.min(self.asking.len()), (stream, until));
            }
        }
    }

    /// Lets in who waits at the listener, but no more than can wait there: who waits for a process has one soon,
    /// however many come.
    fn let_in(&mut self, now: Instant) {
        for _ in 0..MOST_ASKING {
            if self.asked.is_full() {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) if !nursery::admits(&stream) => {}
                // Who hands a machine over speaks at once.
                Ok((stream, _)) if fork::peek(&stream).is_some() => self.hand_over(stream, now),
                Ok((stream, _)) => self.listen_to(stream, now),
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // There may be descriptors when some of those that wait are gone.
                    tracing::warn!(%error, "nobody is let in");
                    self.deaf = now + REST;
                    return;
                }
            }
        }
    }

    /// Waits for who connected to say what they want.
    fn listen_to(&mut self, stream: UnixStream, now: Instant) {
        if self.asking.len() >= MOST_ASKING {
            self.asking.remove(0);
        }
        self.asking.push((stream, now + fork::PAUSE));
    }

    /// Gives who connected a process that is ready for it, or else a new one, which is closed when it has a machine.
    fn hand_over(&mut self, stream: UnixStream, now: Instant) {
        if fork::is_over(&stream) {
            // Somebody looked whether there is a pool, or has not waited for it.
            return;
        }
        let shape = fork::peek(&stream);
        // One without a VM is of use to each, if there is no better one.
        let mut given = None;
        for shelf in
            self.shelves.iter_mut().filter(|shelf| shelf.shape.is_none_or(|own| Some(own) == shape))
        {
            given = given.or_else(|| shelf.give(&stream, now));
        }
        let asked = given.map_or_else(|| nursery::spawn(&stream, self.filter), Ok);
        match asked {
            Ok(asked) => self.asked.extend([asked]),
            Err(error) => tracing::warn!(%error, "no process can be made"),
        }
    }
}
