//! State files.
//!
//! | bytes | |
//! |---|---|
//! | 8 | `HULLSNAP` |
//! | 4 | version of the format, little-endian as all numbers |
//! | 4 | length of the header |
//! | 8 | length of the payloads |
//! | 32 | BLAKE3 of everything above and below |
//! | | the header, JSON |
//! | | the payloads: length and text of the owner, length and text of the kind, version (2 bytes), length (4 bytes) and bytes; lengths of texts are 2 bytes |
//!
//! Nothing is looked at before the checksum was found to be right.

use std::io::{self, Read};
use std::path::Path;

use devices::virtio::device::Payload;

use super::{Header, Part, State};

/// Version of the format that is written, and the only one that is read.
pub const FORMAT: u32 = 1;

const MAGIC: [u8; 8] = *b"HULLSNAP";
/// Bytes in front of the checksum, and with it.
const PREFIX: usize = 24;
const START: usize = PREFIX + blake3::OUT_LEN;

/// Longest state file, in bytes. 64 vCPUs have some 700 KiB.
const LONGEST: u64 = 64 << 20;

/// Why a state file is refused.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read or written.
    #[error("cannot {verb} it")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// It is something else.
    #[error("it is not a snapshot of Hull's")]
    Foreign,
    /// It is a later version's, or an earlier one's.
    #[error("it has the format {found}; this version of Hull reads {FORMAT}")]
    Format {
        /// What it has.
        found: u32,
    },
    /// Its length is not the one that it says.
    #[error(
        "it is {found} bytes long and should be {expected}: it was cut off, or something added"
    )]
    Length {
        /// Bytes that are there.
        found: u64,
        /// Bytes that should be.
        expected: u64,
    },
    /// Its checksum is another.
    #[error("its checksum is wrong: it was changed, or damaged")]
    Checksum,
    /// What it says makes no sense.
    #[error("it is not valid: {0}")]
    Invalid(String),
}

/// `state` as the bytes of a file.
///
/// # Errors
/// Its configuration has no JSON, e.g. for a path that is not UTF-8.
pub fn write(state: &State) -> Result<Vec<u8>, StateError> {
    let header = serde_json::to_vec_pretty(&state.header)
        .map_err(|err| StateError::Invalid(err.to_string()))?;
    let mut payloads = Vec::new();
    for Part { owner, payload } in &state.parts {
        for text in [owner.as_str(), payload.kind] {
            payloads.extend((text.len() as u16).to_le_bytes());
            payloads.extend(text.as_bytes());
        }
        payloads.extend(payload.version.to_le_bytes());
        payloads.extend((payload.bytes.len() as u32).to_le_bytes());
        payloads.extend(&payload.bytes);
    }
    Ok(sealed(&header, &payloads))
}

/// A file with this header and these payloads, whatever they are, and the checksum for them.
pub fn sealed(header: &[u8], payloads: &[u8]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    file.extend(FORMAT.to_le_bytes());
    // A header is some KiB long.
    file.extend((header.len() as u32).to_le_bytes());
    file.extend((payloads.len() as u64).to_le_bytes());
    let checksum = checksum(&file, header, payloads);
    file.extend(checksum.as_bytes());
    file.extend(header);
    file.extend(payloads);
    file
}

fn checksum(prefix: &[u8], header: &[u8], payloads: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(prefix).update(header).update(payloads);
    hasher.finalize()
}

/// Reads the state file at `path`.
///
/// # Errors
/// [`StateError`].
pub fn read(path: &Path) -> Result<State, StateError> {
    let failed = |source| StateError::Io { verb: "read", source };
    let file = super::store::open(path).map_err(failed)?;
    let there = file.metadata().map_err(failed)?;
    if !there.is_file() {
        return Err(StateError::Foreign);
    }
    // In one piece, if it is as long as it says.
    let len = there.len().min(LONGEST);
    let mut bytes = Vec::with_capacity(len as usize + 32);
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    parse(&bytes)
}

/// Reads the bytes of a state file.
///
/// # Errors
/// [`StateError`].
pub fn parse(bytes: &[u8]) -> Result<State, StateError> {
    let Some((start, rest)) = bytes.split_at_checked(START) else {
        return Err(StateError::Foreign);
    };
    let (prefix, found) = start.split_at(PREFIX);
    let mut fields = Fields(prefix);
    if fields.array::<8>()? != MAGIC {
        return Err(StateError::Foreign);
    }
    let format = u32::from_le_bytes(fields.array()?);
    if format != FORMAT {
        return Err(StateError::Format { found: format });
    }
    let header_len = u32::from_le_bytes(fields.array()?);
    let payloads_len = u64::from_le_bytes(fields.array()?);
    let expected = (START as u64 + u64::from(header_len)).saturating_add(payloads_len);
    if bytes.len() as u64 != expected {
        return Err(StateError::Length { found: bytes.len() as u64, expected });
    }
    // It fits, as the sum does.
    let (header, payloads) = rest.split_at(header_len as usize);
    if checksum(prefix, header, payloads).as_bytes() != found {
        return Err(StateError::Checksum);
    }
    let header: Header = serde_json::from_slice(header)
        .map_err(|err| StateError::Invalid(format!("header: {err}")))?;
    let mut fields = Fields(payloads);
    let mut parts = Vec::new();
    while !fields.0.is_empty() {
        parts.push(fields.part()?);
    }
    Ok(State { header, parts })
}

/// Kinds of payloads that there are. One that is not known is refused, not left out.
const KINDS: [&str; 15] = [
    "vm",
    "vcpu",
    "transport",
    "serial",
    "i8042",
    "acpi",
    "virtio-blk",
    "virtio-net",
    "virtio-console",
    "virtio-rng",
    "virtio-balloon",
    "virtio-vsock",
    super::PAGES,
    super::LAYERS,
    "bases",
];

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Result<&'a [u8], StateError> {
        let (bytes, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| StateError::Invalid("a payload is cut off".to_owned()))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn text(&mut self) -> Result<&'a str, StateError> {
        let len = u16::from_le_bytes(self.array()?);
        std::str::from_utf8(self.bytes(len.into())?)
            .map_err(|_| StateError::Invalid("a name is not UTF-8".to_owned()))
    }

    fn part(&mut self) -> Result<Part, StateError> {
        let owner = self.text()?.to_owned();
        let kind = self.text()?;
        let known = KINDS.into_iter().find(|known| *known == kind);
        let kind = known.ok_or_else(|| {
            StateError::Invalid(format!("{owner} has a state of the unknown kind {kind:?}"))
        })?;
        let version = u16::from_le_bytes(self.array()?);
        let len = u32::from_le_bytes(self.array()?);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let bytes = self.bytes(len)?.to_vec();
        Ok(Part { owner, payload: Payload { kind, version, bytes } })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::VmConfig;
    use crate::snapshot::MemoryHeader;

    fn state() -> State {
        let part = |owner: &str, kind, bytes: &[u8]| Part {
            owner: owner.to_owned(),
            payload: Payload { kind, version: 3, bytes: bytes.to_vec() },
        };
        State {
            header: Header {
                hull: "0".to_owned(),
                created_ms: 1,
                host: None,
                config: VmConfig::default(),
                memory: MemoryHeader {
                    size: 4096,
                    data: 0,
                    id: "a1".to_owned(),
                    aside: "a1".to_owned(),
                    sum: None,
                    samples: Vec::new(),
                    base: None,
                },
                disks: Vec::new(),
            },
            parts: vec![part("vm", "vm", b"123"), part("disk0", "virtio-blk", b"")],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(parse(&write(&state()).unwrap()).unwrap(), state());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let whole = write(&state()).unwrap();
        let wrong = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            parse(&bytes).unwrap_err()
        };
        assert!(matches!(wrong(&|bytes| bytes.truncate(10)), StateError::Foreign));
        assert!(matches!(wrong(&|bytes| bytes[0] = b'X'), StateError::Foreign));
        assert!(matches!(wrong(&|bytes| bytes[8] = 2), StateError::Format { found: 2 }));
        assert!(matches!(wrong(&|bytes| bytes.push(0)), StateError::Length { .. }));
        assert!(matches!(
            wrong(&|bytes| bytes.truncate(bytes.len() - 1)),
            StateError::Length { .. }
        ));
        let mut unknown = state();
        unknown.parts[0].payload.kind = "sound";
        let error = parse(&write(&unknown).unwrap()).unwrap_err().to_string();
        assert_eq!(error, "it is not valid: vm has a state of the unknown kind \"sound\"");
    }

    proptest! {
        #[test]
        fn no_bit_can_be_flipped(at in any::<prop::sample::Index>(), bit in 0..8u32) {
            let mut bytes = write(&state()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(parse(&bytes).is_err());
        }

        #[test]
        fn anything_can_be_parsed(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
