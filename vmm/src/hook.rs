//! What a copy of a machine is told over its socket device, and what its guest answers.
//!
//! ```text
//!   this process                               guest: a hook listens on a port
//!     connects ─────────────────────────────────> takes it
//!     {"hull": 1, "resumed": {…}} ──────────────> new seed, time, names
//!     <─────────── {"hull": 1, "ready": {}} or {"hull": 1, "error": "…"}
//! ```
//!
//! Each is one line of JSON; docs/fork.md says what is in it. The answer is a guest's: it may be anything, of
//! any length, or never come.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::virtio::device::Call;
use serde::{Deserialize, Serialize};

use crate::config::{ConfigError, HostAddress, MacAddress, VmConfig};
use crate::random;

/// Version of the messages.
pub const VERSION: u32 = 1;
/// The port on which a hook listens, unless it was told otherwise.
pub const PORT: u32 = 1024;
/// How long a hook may take, unless somebody said otherwise.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Longest time that a hook may be given.
pub const LONGEST_PATIENCE: Duration = Duration::from_secs(600);
/// Longest line that a guest may answer with, in bytes.
const LONGEST_ANSWER: usize = 4096;
/// Longest piece of a guest's words that is shown to anybody, in characters.
const LONGEST_WORDS: usize = 200;
/// Longest host name that Linux takes, in bytes (`__NEW_UTS_LEN`).
const LONGEST_NAME: usize = 64;
/// Bytes of randomness that a guest gets.
const SEED: usize = 64;

/// What the hook of a guest is to be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// The port on which it listens.
    pub port: u32,
    /// How long it may take from its first instruction on, in milliseconds.
    pub timeout_ms: u64,
    /// What the guest calls itself from then on.
    pub hostname: Option<String>,
    /// Other addresses for its network cards.
    pub nets: Vec<Addresses>,
}

impl Default for Hook {
    fn default() -> Hook {
        let timeout_ms = PATIENCE.as_millis() as u64;
        Hook { port: PORT, timeout_ms, hostname: None, nets: Vec::new() }
    }
}

/// Other addresses for a network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Addresses {
    /// The card's name.
    pub card: String,
    /// Its MAC address.
    pub mac: Option<MacAddress>,
    /// Its address and how long the network's part of it is.
    pub ip: Option<HostAddress>,
    /// Where everything else is reached.
    pub gateway: Option<Ipv4Addr>,
}

impl Hook {
    /// How long it may take.
    pub fn patience(&self) -> Duration {
        Duration::from_millis(self.timeout_ms)
    }

    /// Checks it against the machine whose guest is to be told.
    ///
    /// # Errors
    /// There is no socket device or no card of that name; a port, a time or a name cannot be.
    pub fn validate(&self, config: &VmConfig) -> Result<(), ConfigError> {
        let wrong = |field: &str, problem: String| {
            Err(ConfigError { field: format!("hook.{field}"), problem })
        };
        if config.vsock.is_none() {
            return wrong("port", "the machine has no vsock device to reach its guest by".into());
        }
        if self.port == u32::MAX {
            return wrong("port", format!("{} is no port", self.port));
        }
        if self.timeout_ms == 0 || self.patience() > LONGEST_PATIENCE {
            let most = LONGEST_PATIENCE.as_millis();
            return wrong("timeout_ms", format!("{} is not between 1 and {most}", self.timeout_ms));
        }
        if let Some(name) = &self.hostname {
            let sensible = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if name.is_empty() || name.len() > LONGEST_NAME || !name.bytes().all(sensible) {
                let problem = format!(
                    "{name:?} is no host name: 1 to {LONGEST_NAME} letters, digits, '-', '.' and '_'"
                );
                return wrong("hostname", problem);
            }
        }
        for net in &self.nets {
            place(net, config).map_or_else(
                || wrong("nets", format!("the machine has no network card {}", net.card)),
                |_| Ok(()),
            )?;
        }
        Ok(())
    }
}

fn place(net: &Addresses, config: &VmConfig) -> Option<usize> {
    (0..config.net.len()).find(|&n| config.net_name(n) == net.card)
}

/// Who a guest is from now on.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// Which copy it is, from 1.
    pub number: u32,
    /// Of how many that were made together.
    pub of: u32,
    /// The machine's name.
    pub name: String,
    /// Its VM generation id.
    pub generation: [u8; 16],
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// From before the first instruction to the answer, or until nobody waited any more, in microseconds.
    pub us: u64,
    /// Why the guest is not ready, if it is not.
    pub fault: Option<String>,
}

/// Why a guest is not ready.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The connection ended before the guest took it.
    #[error("nobody in the guest listens on port {0}")]
    Refused(u32),
    /// The connection ended before there was an answer.
    #[error("the guest's hook closed the connection without an answer")]
    Closed,
    /// It took too long.
    #[error("the guest's hook did not answer within {} ms", .0.as_millis())]
    Late(Duration),
    /// The answer is none.
    #[error("the guest's hook answered what makes no sense: {0}")]
    Nonsense(String),
    /// The hook could not do it.
    #[error("the guest's hook failed: {0}")]
    Failed(String),
    /// The message cannot be made or passed on.
    #[error("the guest's hook cannot be told")]
    Io(#[from] io::Error),
}

#[derive(Serialize)]
struct Message<'a> {
    hull: u32,
    resumed: Resumed<'a>,
}

#[derive(Serialize)]
struct Resumed<'a> {
    clone: u32,
    of: u32,
    name: &'a str,
    generation: String,
    time_ns: u64,
    seed: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hostname: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Net<'a>>,
}

#[derive(Serialize)]
struct Net<'a> {
    id: &'a str,
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<HostAddress>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<Ipv4Addr>,
}

#[derive(Deserialize)]
struct Answer {
    hull: u32,
    ready: Option<Ready>,
    error: Option<String>,
}

/// Later versions may say something here.
#[derive(Deserialize)]
struct Ready {}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What the guest is told, with the time of now and a seed that nobody else has.
fn message(hook: &Hook, identity: &Identity, config: &VmConfig) -> io::Result<Vec<u8>> {
    let mut seed = [0; SEED];
    random::fill(&mut seed)?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let nets = hook.nets.iter().filter_map(|net| {
        let Addresses { card: id, mac, ip, gateway } = net;
        Some(Net { id, index: place(net, config)?, mac: *mac, ip: *ip, gateway: *gateway })
    });
    let resumed = Resumed {
        clone: identity.number,
        of: identity.of,
        name: &identity.name,
        generation: hex(&identity.generation),
        time_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
        seed: hex(&seed),
        hostname: hook.hostname.as_deref(),
        net: nets.collect(),
    };
    let mut line = serde_json::to_vec(&Message { hull: VERSION, resumed })?;
    line.push(b'\n');
    Ok(line)
}

/// What a guest said, fit to be shown.
fn words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let shown = text.chars().take(LONGEST_WORDS);
    shown.map(|char| if char.is_control() { '\u{fffd}' } else { char }).collect()
}

/// Reads a guest's answer.
fn read(line: &[u8]) -> Result<(), HookError> {
    let nonsense = || HookError::Nonsense(words(line));
    let answer: Answer = serde_json::from_slice(line).map_err(|_| nonsense())?;
    match answer {
        Answer { error: Some(why), .. } => Err(HookError::Failed(words(why.as_bytes()))),
        Answer { hull: VERSION, ready: Some(Ready {}), error: None } => Ok(()),
        _ => Err(nonsense()),
    }
}

/// A conversation with a hook. Nothing here waits.
#[derive(Debug)]
pub struct Conversation {
    socket: File,
    hook: Hook,
    identity: Identity,
    config: VmConfig,
    heard: Vec<u8>,
    /// The guest took the connection, and was told.
    told: bool,
}

impl Conversation {
    /// One that begins with the call, which is for the socket device.
    ///
    /// # Errors
    /// There are no sockets to be had.
    pub fn new(
        hook: Hook,
        identity: Identity,
        config: VmConfig,
    ) -> io::Result<(Conversation, Call)> {
        let (own, device) = UnixStream::pair()?;
        own.set_nonblocking(true)?;
        device.set_nonblocking(true)?;
        let socket = Arc::new(OwnedFd::from(device));
        let call = Call { port: hook.port, socket, patience: hook.patience() };
        // Not as a socket: those are read by calls that main may not make.
        let socket = File::from(OwnedFd::from(own));
        let heard = Vec::new();
        Ok((Conversation { socket, hook, identity, config, heard, told: false }, call))
    }

    /// Goes on as far as it can: to be called when its descriptor can be read. `None` if there is more to wait
    /// for.
    pub fn advance(&mut self) -> Option<Result<(), HookError>> {
        loop {
            let mut bytes = [0; 512];
            let room = (LONGEST_ANSWER + 1 - self.heard.len()).min(bytes.len());
            let len = match self.socket.read(bytes.get_mut(..room).unwrap_or_default()) {
                Ok(0) if self.told => return Some(Err(HookError::Closed)),
                Ok(0) => return Some(Err(HookError::Refused(self.hook.port))),
                Ok(len) => len,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return None,
                Err(err) if err.kind() == io::ErrorKind::ConnectionReset => {
                    return Some(Err(HookError::Closed));
                }
                Err(err) => return Some(Err(err.into())),
            };
            self.heard.extend(bytes.get(..len).unwrap_or_default());
            if let Some(end) = self.take() {
                return Some(end);
            }
        }
    }

    /// Takes the lines that are there.
    fn take(&mut self) -> Option<Result<(), HookError>> {
        while let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
            let rest = self.heard.split_off(end + 1);
            let line = std::mem::replace(&mut self.heard, rest);
            let line = line.get(..end).unwrap_or_default();
            if self.told {
                return Some(read(line));
            }
            // The device's own line: the guest took the connection.
            if let Err(err) = self.tell() {
                return Some(Err(err.into()));
            }
            self.told = true;
        }
        let long = self.heard.len() > LONGEST_ANSWER;
        long.then(|| Err(HookError::Nonsense(words(&self.heard))))
    }

    /// Nothing was written before, so that there is room for a few KiB.
    fn tell(&mut self) -> io::Result<()> {
        let line = message(&self.hook, &self.identity, &self.config)?;
        self.socket.write_all(&line)
    }
}

impl AsFd for Conversation {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::config::{NetConfig, VsockConfig};

    fn config() -> VmConfig {
        VmConfig {
            vsock: Some(VsockConfig { path: "v".into(), cid: 3, keep: false }),
            net: vec![NetConfig::default(), NetConfig::default()],
            ..VmConfig::default()
        }
    }

    fn hook() -> Hook {
        let net = Addresses {
            card: config().net_name(1),
            mac: Some("06:00:ac:1e:00:02".parse().unwrap()),
            ip: Some("10.0.0.2/24".parse().unwrap()),
            gateway: None,
        };
        Hook { hostname: Some("copy-2".to_owned()), nets: vec![net], ..Hook::default() }
    }

    fn conversation() -> (Conversation, UnixStream) {
        let identity =
            Identity { number: 2, of: 3, name: "web-2".to_owned(), generation: [0xab; 16] };
        let (conversation, call) = Conversation::new(hook(), identity, config()).unwrap();
        assert_eq!((call.port, call.patience), (PORT, PATIENCE));
        let guest = UnixStream::from(call.socket.try_clone().unwrap());
        (conversation, guest)
    }

    #[test]
    fn a_guest_is_told_and_answers() {
        let (mut own, mut guest) = conversation();
        assert!(own.advance().is_none());
        guest.write_all(b"OK 107").unwrap();
        assert!(own.advance().is_none());
        guest.write_all(b"3\n").unwrap();
        assert!(own.advance().is_none());
        let mut line = String::new();
        BufReader::new(&guest).read_line(&mut line).unwrap();
        let message: Value = serde_json::from_str(&line).unwrap();
        let resumed = &message["resumed"];
        assert_eq!(
            (&message["hull"], &resumed["clone"], &resumed["of"]),
            (&1.into(), &2.into(), &3.into())
        );
        assert_eq!(resumed["name"], "web-2");
        assert_eq!(resumed["generation"], "ab".repeat(16));
        assert_eq!(resumed["hostname"], "copy-2");
        assert_eq!(resumed["seed"].as_str().unwrap().len(), 2 * SEED);
        assert!(resumed["time_ns"].as_u64().unwrap() > 1_600_000_000_000_000_000);
        let net = &resumed["net"][0];
        assert_eq!((&net["id"], &net["index"]), (&"net1".into(), &1.into()));
        assert_eq!((&net["mac"], &net["ip"]), (&"06:00:ac:1e:00:02".into(), &"10.0.0.2/24".into()));
        assert!(net.get("gateway").is_none());
        guest.write_all(b"{\"hull\":1,\"ready\":{\"more\":[]}}\n").unwrap();
        assert!(matches!(own.advance(), Some(Ok(()))));
    }

    #[test]
    fn no_two_are_told_the_same_seed() {
        let seeds: Vec<Value> = (0..2)
            .map(|_| {
                let line = message(&hook(), &Identity::default(), &config()).unwrap();
                serde_json::from_slice::<Value>(&line).unwrap()["resumed"]["seed"].clone()
            })
            .collect();
        assert_ne!(seeds[0], seeds[1]);
    }

    #[test]
    fn who_does_not_answer_is_told_apart() {
        let (mut own, guest) = conversation();
        drop(guest);
        assert!(matches!(own.advance(), Some(Err(HookError::Refused(PORT)))));
        let (mut own, mut guest) = conversation();
        guest.write_all(b"OK 1073\n").unwrap();
        assert!(own.advance().is_none());
        drop(guest);
        assert!(matches!(own.advance(), Some(Err(HookError::Closed))));
    }

    #[test]
    fn answers_that_are_none() {
        let refused = |line: &str| read(line.as_bytes()).unwrap_err().to_string();
        assert_eq!(
            refused(r#"{"hull":1,"error":"hostname: \u001b[2Jno"}"#),
            "the guest's hook failed: hostname: \u{fffd}[2Jno"
        );
        // Who knows another version only says so in the words of that.
        assert_eq!(refused(r#"{"hull":2,"error":"old"}"#), "the guest's hook failed: old");
        for line in [r#"{"hull":2,"ready":{}}"#, r#"{"hull":1}"#, r#"{"ready":{}}"#, "", "[[["] {
            assert!(refused(line).contains("makes no sense"), "{line}");
        }
    }

    #[test]
    fn a_line_without_an_end_is_not_kept() {
        let (mut own, mut guest) = conversation();
        guest.write_all(b"OK 1073\n").unwrap();
        assert!(own.advance().is_none());
        guest.write_all(&vec![b'x'; 3 * LONGEST_ANSWER]).unwrap();
        let Some(Err(HookError::Nonsense(shown))) = own.advance() else { panic!() };
        assert_eq!(shown.len(), LONGEST_WORDS);
        assert!(own.heard.len() <= LONGEST_ANSWER + 1);
    }

    #[test]
    fn what_cannot_be_told_is_named() {
        let problem = |change: fn(&mut Hook)| {
            let mut hook = hook();
            change(&mut hook);
            hook.validate(&config()).unwrap_err().field
        };
        assert_eq!(hook().validate(&config()), Ok(()));
        assert_eq!(problem(|hook| hook.port = u32::MAX), "hook.port");
        assert_eq!(problem(|hook| hook.timeout_ms = 0), "hook.timeout_ms");
        assert_eq!(problem(|hook| hook.timeout_ms = u64::MAX), "hook.timeout_ms");
        assert_eq!(problem(|hook| hook.hostname = Some(String::new())), "hook.hostname");
        assert_eq!(problem(|hook| hook.hostname = Some("a b".into())), "hook.hostname");
        assert_eq!(problem(|hook| hook.hostname = Some("a".repeat(65))), "hook.hostname");
        assert_eq!(problem(|hook| hook.nets[0].card = "net7".into()), "hook.nets");
        assert_eq!(hook().validate(&VmConfig::default()).unwrap_err().field, "hook.port");
    }

    proptest! {
        #[test]
        fn nothing_that_a_guest_says_panics(
            first in prop_oneof![Just(b"OK 5\n".to_vec()), any::<Vec<u8>>()],
            rest in proptest::collection::vec(any::<Vec<u8>>(), 0..8),
        ) {
            let (mut own, mut guest) = conversation();
            for piece in std::iter::once(first).chain(rest) {
                guest.write_all(&piece).unwrap();
                if own.advance().is_some() {
                    break;
                }
                prop_assert!(own.heard.len() <= LONGEST_ANSWER);
            }
        }

        #[test]
        fn what_is_like_an_answer_is_read_or_refused(
            hull in any::<u8>(), ready in "[{}\\[\\]a\":,1]{0,12}", error in "\\PC{0,300}",
        ) {
            let error = serde_json::to_string(&error).unwrap();
            let _ = read(format!("{{\"hull\":{hull},\"ready\":{ready}}}").as_bytes());
            let why = read(format!("{{\"hull\":{hull},\"error\":{error}}}").as_bytes()).unwrap_err();
            prop_assert!(why.to_string().chars().count() < LONGEST_WORDS + 40);
        }
    }
}
