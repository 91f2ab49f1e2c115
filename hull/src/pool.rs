//! `hull pool`: keeps processes ready for machines that are forked.

use std::os::fd::{AsFd, AsRawFd};
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

/// Processes of one shape.
struct Shelf {
    shape: Shape,
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
    fn fill(&mut self, filter: Seccomp, now: Instant) {
        if self.coming.is_some() || self.ready.len() >= self.number || now < self.not_before {
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
    let now = Instant::now();
    let shelf = |keep: &Keep| Shelf {
        shape: keep.shape(),
        number: keep.number as usize,
        ready: Vec::new(),
        coming: None,
        not_before: now,
        trouble: None,
    };
    serve(&listener, keep.iter().map(shelf).collect(), args.seccomp)
}

fn serve(listener: &UnixListener, mut shelves: Vec<Shelf>, filter: Seccomp) -> Result {
    let signals = Signals::block()?.with_hooks(Hooks::default());
    // Who connected, and until when they may say what they want.
    let mut asking: Vec<(UnixStream, Instant)> = Vec::new();
    // Nobody is let in before.
    let mut deaf = Instant::now();
    // With as many as there may be nobody else is let in, or given one: they wait.
    let mut asked = Asked::default();
    loop {
        let now = Instant::now();
        asked.look();
        let has_room = !asked.is_full();
        // Who has just begun to speak is heard.
        asking.retain(|(stream, until)| *until > now || fork::has_begun(stream));
        for shelf in &mut shelves {
            shelf.fill(filter, now);
        }
        let listens = if deaf > now || !has_room { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(listener, listens)];
        // SAFETY: it lives as long as `signals`, which outlives the loop.
        let signal = unsafe { std::os::fd::BorrowedFd::borrow_raw(signals.fd()) };
        fds.push(PollFd::from_borrowed_fd(signal, PollFlags::IN));
        let speaks = if has_room { PollFlags::IN } else { PollFlags::empty() };
        fds.extend(asking.iter().map(|(stream, _)| PollFd::new(stream, speaks)));
        fds.extend(asked.fds());
        let coming = shelves.iter().filter_map(|shelf| shelf.coming.as_ref());
        fds.extend(coming.map(|zygote| PollFd::from_borrowed_fd(zygote.as_fd(), PollFlags::IN)));
        let waits = shelves
            .iter()
            .filter(|shelf| shelf.ready.len() < shelf.number && shelf.coming.is_none());
        let next = waits
            .map(|shelf| shelf.not_before)
            .chain(asking.iter().map(|(_, until)| *until).filter(|_| has_room))
            .chain((deaf > now).then_some(deaf))
            .min();
        let left = next.map(|next| next.saturating_duration_since(now));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        let is_ready = |fd: std::os::fd::RawFd| {
            fds.iter().any(|one| one.as_fd().as_raw_fd() == fd && !one.revents().is_empty())
        };
        let ended = is_ready(signals.fd());
        let connecting = is_ready(listener.as_raw_fd());
        let arrived: Vec<bool> = shelves
            .iter()
            .map(|shelf| shelf.coming.as_ref().is_some_and(|z| is_ready(z.as_fd().as_raw_fd())))
            .collect();
        let speaking: Vec<bool> =
            asking.iter().map(|(stream, _)| is_ready(stream.as_raw_fd())).collect();
        drop(fds);
        if ended && matches!(signals.take(), Some(Meaning::End(_))) {
            return Ok(Code::SUCCESS);
        }
        let now = Instant::now();
        for (shelf, arrived) in shelves.iter_mut().zip(arrived) {
            if arrived {
                shelf.arrived(now);
            }
        }
        let mut speaking = speaking.into_iter();
        let speaks = |_: &mut (UnixStream, Instant)| speaking.next().unwrap_or_default();
        let spoke: Vec<_> = asking.extract_if(.., speaks).collect();
        for (n, (stream, until)) in spoke.into_iter().enumerate() {
            if !asked.is_full() {
                asked.extend(hand_over(stream, &mut shelves, filter, now));
            } else if !fork::is_over(&stream) {
                asking.insert(n.min(asking.len()), (stream, until));
            }
        }
        // No more than can wait at the listener: who waits for a process has one soon, however many come.
        for _ in 0..if connecting { MOST_ASKING } else { 0 } {
            if asked.is_full() {
                break;
            }
            match listener.accept() {
                Ok((stream, _)) if !nursery::admits(&stream) => {}
                // Who hands a machine over speaks at once.
                Ok((stream, _)) if fork::peek(&stream).is_some() => {
                    asked.extend(hand_over(stream, &mut shelves, filter, now));
                }
                Ok((stream, _)) => {
                    if asking.len() >= MOST_ASKING {
                        asking.remove(0);
                    }
                    asking.push((stream, now + fork::PAUSE));
                }
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // There may be descriptors when some of those that wait are gone.
                    tracing::warn!(%error, "nobody is let in");
                    deaf = now + REST;
                    break;
                }
            }
        }
    }
}

/// Gives who connected a process that is ready for it, or else a new one, which is closed when it has a machine.
fn hand_over(
    stream: UnixStream,
    shelves: &mut [Shelf],
    filter: Seccomp,
    now: Instant,
) -> Option<UnixStream> {
    if fork::is_over(&stream) {
        // Somebody looked whether there is a pool, or has not waited for it.
        return None;
    }
    let shape = fork::peek(&stream);
    let shelf = shelves.iter_mut().find(|shelf| Some(shelf.shape) == shape);
    if let Some(shelf) = shelf {
        shelf.not_before = now + REST;
        while let Some(zygote) = shelf.ready.pop() {
            if let Ok(asked) = zygote.give(&stream) {
                return Some(asked);
            }
        }
    }
    let spawned = nursery::spawn(&stream, filter);
    spawned.inspect_err(|error| tracing::warn!(%error, "no process can be made")).ok()
}
