//! A machine handed over to other processes, which go on as copies of it.
//!
//! ```text
//!   parent                        child
//!     shape, notice ─────────────> what it is to be: a name, devices, threads
//!     halt, freeze, seal
//!     go on
//!     descriptors ───────────────> state; layers of RAM; what disks stand on
//!                                  map, set state, run
//!     <──────────────────────────  what it is called, or why there is none
//! ```
//!
//! Both talk on a stream socket: `HUL` and the version of what follows, four bytes of length, little-endian, and
//! JSON. With the parent's message come
//! the descriptor of the state, which is that of a snapshot ([`crate::snapshot::parse`]), those of
//! the layers, the lowest first, and those of the files that disks stand on. Which pages a layer has is in the state
//! (owner `memory`, kind `layers`), and so is which files are whose (owner `disks`, kind `bases`).

mod birth;
pub mod disks;

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::virtio::device::Payload;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

pub use self::birth::Birth;
use self::disks::Disks;
use crate::config::{ConfigError, LONGEST_NAME, MmdsConfig, VmConfig};
use crate::hook::{self, Hook};
use crate::machine::{LONGEST_METADATA, Origin, Shape, Source};
use crate::memory::{Layer, sealed_copy};
use crate::snapshot::{LAYERS, MEMORY, Overrides, Part, State, StateError, parse, write};

/// What each message begins with; the last byte is the version of all that is said here.
const MAGIC: [u8; 4] = *b"HUL\x03";
/// Bytes in front of a message's text.
const HEAD: usize = 8;
/// How long who speaks may pause.
pub const PAUSE: Duration = Duration::from_secs(5);
/// How long freezing a machine may take: what a pager still has is fetched before.
const FREEZING: Duration = Duration::from_secs(3600);
/// Longest message, in bytes: what a child finds in its metadata service, and 1 MiB of everything else.
const LONGEST: usize = LONGEST_METADATA + (1 << 20);
/// Longest state, in bytes: 64 vCPUs have some 700 KiB, and each of the layers some KiB.
const LONGEST_STATE: u64 = 64 << 20;
/// Most files beside the state: as many descriptors as one message may have (Linux, SCM_MAX_FD), without one.
const MOST_FILES: usize = 252;
/// Whose what disks stand on is, and of which kind.
const DISKS: &str = "disks";
const BASES: &str = "bases";

/// What a child is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Child {
    /// Its name; made up if there is none.
    pub name: Option<String>,
    /// The name is only a proposal: another will do if somebody has it.
    pub named_by_number: bool,
    /// What it has otherwise than its parent.
    pub overrides: Overrides,
    /// Disks, and where their copies are to be; the others' are in `folder`.
    pub copies: Vec<(String, PathBuf)>,
    /// Where copies of disks are; beside the parent's if nobody says.
    pub folder: Option<PathBuf>,
    /// Copies of disks are removed when it ends.
    pub temporary: bool,
    /// A file for what its guest writes to the serial port; else that goes nowhere.
    pub console: Option<PathBuf>,
    /// The network namespace in which it opens its TAP interfaces.
    pub netns: Option<PathBuf>,
    /// It goes on at once.
    pub resume: bool,
    /// What its metadata service has to say at first; nothing if nobody says.
    pub metadata: Option<Map<String, Value>>,
    /// What the hook of its guest is told, before whoever asked hears of it.
    pub hook: Option<Hook>,
    /// Which one it is, from 1.
    pub number: u32,
    /// Of how many.
    pub of: u32,
}

impl Child {
    /// Gives those of `children` that have no name the one of `machine` and a number, from behind `last` on, which is
    /// the last one that was given then.
    pub fn name(children: &mut [Child], machine: &str, last: &mut u64) {
        for child in children.iter_mut().filter(|child| child.name.is_none()) {
            *last += 1;
            let number = format!("-{last}");
            let most = LONGEST_NAME.saturating_sub(number.len());
            child.name = Some(machine.chars().take(most).collect::<String>() + &number);
            child.named_by_number = true;
        }
    }

    /// True if it has a disk of its own in the place of the one called `disk`.
    pub(crate) fn brings(&self, disk: &str) -> bool {
        self.overrides.disks.iter().any(|(name, _)| name == disk)
    }

    /// That it can be had, as far as that can be said of a machine of `config` without any effect.
    ///
    /// # Errors
    /// What of it cannot be.
    pub fn validate(&self, config: &VmConfig) -> Result<(), ConfigError> {
        let mut config = VmConfig { name: self.name.clone(), ..config.clone() };
        let disks = self.copies.iter().chain(&self.overrides.disks);
        for (n, (disk, _)) in disks.clone().enumerate() {
            if disks.clone().take(n).any(|(other, _)| other == disk) {
                let problem = format!("{disk} is named twice");
                return Err(ConfigError { field: "disk".to_owned(), problem });
            }
        }
        // A file for a copy is a disk's as well.
        let all = Overrides { disks: disks.cloned().collect(), ..self.overrides.clone() };
        all.apply(&mut config)?;
        config.validate_without_kernel()?;
        if self.metadata.is_some() {
            MmdsConfig::of(&mut config)?;
        }
        self.hook.iter().try_for_each(|hook| hook.validate(&config))
    }
}

/// What is said of a machine before it is handed over: all that its copy needs to be a machine with nothing in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// What the copy is to be.
    pub child: Child,
    /// The machine as it is configured.
    pub config: VmConfig,
    /// Where it is: which start of which host.
    pub host: Option<String>,
    /// Files that disks of the copy need may come with it.
    pub disks: bool,
}

/// Says what is about to be handed over.
///
/// # Errors
/// The other process does not listen, or has not until `deadline`.
pub fn announce(
    stream: &UnixStream,
    notice: &Notice,
    deadline: Instant,
) -> Result<(), HandOverError> {
    let messages = [message(&Shape::of(&notice.config))?, message(notice)?].concat();
    send_all(stream, &messages, &[], deadline)
}

/// Waits for what is about to be handed over.
///
/// # Errors
/// Not all of it comes within some seconds, or what comes makes no sense.
pub fn hear(stream: &UnixStream) -> Result<Notice, HandOverError> {
    let deadline = Instant::now() + PAUSE;
    let mut until = Until { stream, deadline, is_late: false, closes: false };
    let _: Shape = read_message(Vec::new(), &mut until)?;
    read_message(Vec::new(), &mut until)
}

/// What a child says when it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Born {
    /// Its name.
    pub name: String,
    /// Its process.
    pub pid: u32,
    /// Where its API is.
    pub api: PathBuf,
    /// Names of disks that it has copies of, and their files.
    pub disks: Vec<(String, PathBuf)>,
    /// How it went with the hook of its guest, if that was to be told.
    pub hook: Option<hook::Outcome>,
}

/// What became of a child.
pub type Outcome = Result<Born, String>;

/// Why a machine is not handed over.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// The state cannot be written or read.
    #[error("the machine's state")]
    State(#[from] StateError),
    /// There are too many files.
    #[error(
        "its memory lies in {layers} layers, and its disks in {files} files; {MOST_FILES} can be handed over. \
         `hull disk commit` makes fewer of those"
    )]
    Files {
        /// Layers of memory.
        layers: usize,
        /// Files of disks.
        files: usize,
    },
    /// Nobody makes processes.
    #[error("nobody makes processes at {}; start `hull pool` there, or name no pool to `hull fork`", path.display())]
    Pool {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A child took too long.
    #[error("it did not run in time")]
    Late,
    /// None of those before it ran in time, nor was there a word of any.
    #[error(
        "it was not asked for: nothing was heard from {} for {} s. Whoever makes processes there stands still",
        path.display(), patience.as_secs_f64()
    )]
    Stalled {
        /// The socket.
        path: PathBuf,
        /// How long.
        patience: Duration,
    },
    /// A child's process is gone.
    #[error("its process ended without a word")]
    Silent,
    /// A message cannot be sent or received.
    #[error("cannot {verb} the other process")]
    Talk {
        /// `send to`, `receive from` or `connect to`.
        verb: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// Parent and child are of two versions.
    #[error(
        "this was made by another version of Hull, which speaks version {0} and not {ours}; start the pool \
         with the `hull` that the machine has",
        ours = MAGIC[3]
    )]
    Version(u8),
    /// A message makes no sense.
    #[error("the other process says what makes no sense: {0}")]
    Invalid(String),
}

impl HandOverError {
    /// The other process does not listen any more.
    pub fn is_over(&self) -> bool {
        let over = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        matches!(self, HandOverError::Talk { source, .. } if over.contains(&source.kind()))
    }
}

fn talk(verb: &'static str) -> impl FnOnce(io::Error) -> HandOverError {
    move |source| HandOverError::Talk { verb, source }
}

/// A machine at one moment, to be handed over any number of times.
#[derive(Debug)]
pub struct Seed {
    state: File,
    layers: Vec<Layer>,
    disks: Disks,
}

impl Seed {
    /// `state` with memory in `layers` and `disks`, which nobody changes.
    ///
    /// # Errors
    /// There are too many files; the state cannot be written.
    pub fn new(mut state: State, layers: Vec<Layer>, disks: Disks) -> Result<Seed, HandOverError> {
        let files = disks.files().count();
        if layers.len() + files > MOST_FILES {
            return Err(HandOverError::Files { layers: layers.len(), files });
        }
        let mut bytes = Vec::new();
        for layer in &layers {
            let pages = layer.to_bytes();
            bytes.extend((pages.len() as u32).to_le_bytes());
            bytes.extend(pages);
        }
        let payload = Payload { kind: LAYERS, version: 2, bytes };
        state.parts.push(Part { owner: MEMORY.to_owned(), payload });
        let bytes = disks.to_bytes().map_err(|err| HandOverError::Invalid(err.to_string()))?;
        let payload = Payload { kind: BASES, version: 1, bytes };
        state.parts.push(Part { owner: DISKS.to_owned(), payload });
        let bytes = write(&state)?;
        let state =
            sealed_copy(&bytes).map_err(|source| StateError::Io { verb: "copy", source })?;
        Ok(Seed { state, layers, disks })
    }

    /// True if copies find disks of these names in it, and no other.
    pub fn has_disks(&self, names: &[String]) -> bool {
        self.disks.names().eq(names)
    }

    /// Hands it over, after [`announce`].
    ///
    /// # Errors
    /// The other process does not take it, or has not until `deadline`.
    pub fn send(&self, stream: &UnixStream, deadline: Instant) -> Result<(), HandOverError> {
        let message = message(&())?;
        let fds: Vec<RawFd> = std::iter::once(self.state.as_raw_fd())
            .chain(self.layers.iter().map(|layer| layer.file().as_raw_fd()))
            .chain(self.disks.files().map(|file| file.as_raw_fd()))
            .collect();
        send_all(stream, &message, &fds, deadline)
    }
}

/// Looks at what was sent, which stays there. Nothing if there is nothing yet.
fn look<'a>(stream: &UnixStream, bytes: &'a mut [u8]) -> Option<&'a [u8]> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is as long as is said.
    let len =
        unsafe { libc::recv(stream.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), flags) };
    bytes.get(..usize::try_from(len).ok()?)
}

/// True if nothing was sent and nothing will be, or nobody waits for an answer any more.
pub fn is_over(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one structure, as is said.
    let hung_up =
        unsafe { libc::poll(&raw mut poll, 1, 0) } == 1 && poll.revents & libc::POLLHUP != 0;
    hung_up || look(stream, &mut [0]).is_some_and(<[u8]>::is_empty)
}

/// True if something was said that nobody has taken.
pub fn has_begun(stream: &UnixStream) -> bool {
    look(stream, &mut [0]).is_some_and(|there| !there.is_empty())
}

/// The shape of what will be handed over, if that was said: nothing is taken.
pub fn peek(stream: &UnixStream) -> Option<Shape> {
    let mut bytes = [0; 256];
    let there = look(stream, &mut bytes)?;
    let (head, rest) = there.split_first_chunk()?;
    serde_json::from_slice(rest.get(..length(head).ok()?)?).ok()
}

/// Waits for a machine that was announced, for as long as it takes its parent to freeze it.
///
/// # Errors
/// It does not come, or what comes is none.
pub fn receive(stream: &UnixStream) -> Result<(Origin, Disks), HandOverError> {
    stream.set_read_timeout(Some(FREEZING)).map_err(talk("receive from"))?;
    let invalid = |what: &str| HandOverError::Invalid(what.to_owned());
    let mut fds = [-1; MOST_FILES + 1];
    let mut start = vec![0; 4096];
    let (len, number) = {
        let mut parts = [libc::iovec { iov_base: start.as_mut_ptr().cast(), iov_len: start.len() }];
        // SAFETY: the buffer lives as long as the call and is as long as is said.
        let received = unsafe { stream.recv_with_fds(&mut parts, &mut fds) };
        received.map_err(|err| talk("receive from")(err.into()))?
    };
    let mut fds = fds.iter().take(number).map(|&fd| {
        // SAFETY: the descriptors are fresh, and each is taken once.
        File::from(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) })
    });
    stream.set_read_timeout(Some(PAUSE)).map_err(talk("receive from"))?;
    let state = fds.next();
    let mut files: Vec<File> = fds.collect();
    start.truncate(len);
    let () = read_message(start, stream)?;
    let lost = "is the limit of open files (`ulimit -n`) too low?";
    let state = state.ok_or_else(|| invalid(&format!("there is no state; {lost}")))?;
    let len = state.metadata().map_err(talk("receive from"))?.len();
    if len > LONGEST_STATE {
        return Err(invalid("its state is too long"));
    }
    let mut bytes = vec![0; len as usize];
    state.read_exact_at(&mut bytes, 0).map_err(talk("receive from"))?;
    let mut state = parse(&bytes)?;
    let mut list = |kind: &'static str, version| {
        let place = state.parts.iter().position(|part| part.payload.kind == kind);
        let place = place.ok_or_else(|| invalid("what its memory or its disks are is missing"))?;
        let list = state.parts.swap_remove(place).payload;
        list.expect(kind, version)
            .map(<[u8]>::to_vec)
            .map_err(|err| HandOverError::Invalid(err.to_string()))
    };
    let (list, disks) = (list(LAYERS, 2)?, list(BASES, 1)?);
    let mut rest: &[u8] = &list;
    let number = layers_in(rest);
    if files.len() < number {
        return Err(invalid(&format!("{} of its {number} layers came; {lost}", files.len())));
    }
    let files_of_disks = files.split_off(number.min(files.len()));
    let disks = Disks::from_bytes(&disks, files_of_disks);
    let disks = disks.ok_or_else(|| invalid("its disks are not those of its state"))?;
    let layer = |file: File| {
        let (len, after) = rest.split_first_chunk()?;
        let (pages, after) = after.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        rest = after;
        Layer::from_bytes(Arc::new(file), pages)
    };
    let layers: Option<Vec<Layer>> = files.into_iter().map(layer).collect();
    let layers = layers.filter(|_| rest.is_empty());
    let layers = layers.ok_or_else(|| invalid("its layers are not those of its state"))?;
    Ok((Origin::new(state, Source::Layers(layers), None), disks))
}

/// How many layers a list has, as far as it is one.
fn layers_in(mut list: &[u8]) -> usize {
    let mut number = 0;
    while let Some((_, after)) = list
        .split_first_chunk()
        .and_then(|(len, after)| after.split_at_checked(u32::from_le_bytes(*len) as usize))
    {
        number += 1;
        list = after;
    }
    number
}

/// Says what became of a child.
///
/// # Errors
/// Nobody listens.
pub fn answer(stream: &UnixStream, outcome: &Outcome) -> Result<(), HandOverError> {
    let message = message(outcome)?;
    let mut stream = stream;
    stream.write_all(&message).map_err(talk("send to"))
}

/// Waits for what became of a child. One of which nothing was heard cannot say any more that it lives: it ends
/// itself.
///
/// # Errors
/// It ended without a word, or has none until `deadline`.
pub fn outcome(stream: &UnixStream, deadline: Instant) -> Result<Outcome, HandOverError> {
    let mut until = Until { stream, deadline, is_late: false, closes: true };
    let outcome = read_message(Vec::new(), &mut until);
    outcome.map_err(|err| if until.is_late { HandOverError::Late } else { err })
}

/// A stream of which nothing is read when it is too late. (A machine's filters let it poll, and not set options of
/// sockets.)
struct Until<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
    is_late: bool,
    /// The other end cannot say any more that it was in time.
    closes: bool,
}

impl Read for &mut Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if !self.is_late {
            match wait(self.stream, libc::POLLIN, self.deadline) {
                Ok(true) => {}
                // The caller tries again.
                Err(err) if err.kind() == io::ErrorKind::Interrupted => return Err(err),
                Ok(false) if !self.closes => return Err(io::ErrorKind::TimedOut.into()),
                // What was said before counts. Behind it there is an end, for both.
                over => {
                    self.is_late = over.is_ok();
                    self.stream.shutdown(Shutdown::Both)?;
                }
            }
        }
        self.stream.read(bytes)
    }
}

/// Waits until something can be done with a stream. False if that is not before `deadline`.
fn wait(stream: &UnixStream, events: libc::c_short, deadline: Instant) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 };
    let left = deadline.saturating_duration_since(Instant::now()).as_millis();
    let left = i32::try_from(left).unwrap_or(i32::MAX);
    // SAFETY: one structure, as is said.
    match unsafe { libc::poll(&raw mut poll, 1, left) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends all of it, descriptors with the first byte. If that takes too long the stream is closed.
fn send_all(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut fds: &[RawFd],
    deadline: Instant,
) -> Result<(), HandOverError> {
    while !bytes.is_empty() {
        let sent = match wait(stream, libc::POLLOUT, deadline) {
            Ok(true) => send(stream, bytes, fds),
            Ok(false) => {
                stream.shutdown(Shutdown::Both).map_err(talk("send to"))?;
                return Err(HandOverError::Late);
            }
            Err(err) => Err(err),
        };
        match sent {
            Ok(len) => (bytes, fds) = (bytes.get(len..).unwrap_or_default(), &[]),
            // There was no room for it after all.
            Err(err)
                if matches!(err.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
            }
            Err(err) => return Err(talk("send to")(err)),
        }
    }
    Ok(())
}

/// Sends what there is room for, without waiting. (A short message with descriptors has room if anything has.)
fn send(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    if !fds.is_empty() {
        return Ok(stream.send_with_fds(&[bytes], fds)?);
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the buffer is as long as is said.
    let len = unsafe { libc::send(stream.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}

fn message(what: &impl Serialize) -> Result<Vec<u8>, HandOverError> {
    let invalid = |err: serde_json::Error| HandOverError::Invalid(err.to_string());
    let text = serde_json::to_vec(what).map_err(invalid)?;
    if text.len() > LONGEST {
        return Err(HandOverError::Invalid("a message is too long".to_owned()));
    }
    Ok([&MAGIC[..], &(text.len() as u32).to_le_bytes(), &text].concat())
}

/// How long the message is that this is in front of.
fn length([h, u, l, version, len @ ..]: &[u8; HEAD]) -> Result<usize, HandOverError> {
    if [*h, *u, *l] != MAGIC[..3] {
        return Err(HandOverError::Invalid("it does not begin as a message".to_owned()));
    }
    if *version != MAGIC[3] {
        return Err(HandOverError::Version(*version));
    }
    match u32::from_le_bytes(*len) as usize {
        len if len > LONGEST => Err(HandOverError::Invalid("a message is too long".to_owned())),
        len => Ok(len),
    }
}

/// Reads a message of which `start` is there already.
fn read_message<T: DeserializeOwned>(
    mut start: Vec<u8>,
    mut stream: impl Read,
) -> Result<T, HandOverError> {
    let mut more = |start: &mut Vec<u8>, len: usize| {
        let there = start.len();
        start.resize(len.max(there), 0);
        stream.read_exact(start.get_mut(there..).unwrap_or_default()).map_err(talk("receive from"))
    };
    let begun = !start.is_empty();
    more(&mut start, HEAD).map_err(|err| match err {
        // A process that is killed leaves what was sent to it unread, which resets the connection.
        HandOverError::Talk { source, .. }
            if !begun
                && matches!(
                    source.kind(),
                    io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                ) =>
        {
            HandOverError::Silent
        }
        err => err,
    })?;
    let (head, _) = start.split_first_chunk().unwrap_or((&[0; HEAD], &[]));
    let len = length(head)?;
    more(&mut start, HEAD + len)?;
    serde_json::from_slice(start.get(HEAD..).unwrap_or_default())
        .map_err(|err| HandOverError::Invalid(err.to_string()))
}

#[cfg(test)]
mod tests;
