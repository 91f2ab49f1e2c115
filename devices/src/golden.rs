//! Payloads byte by byte, as they are in snapshots on somebody's disk.

use crate::virtio::device::{Payload, RestoreError};

/// The bytes that `text` says in hexadecimal digits; other characters are there for the reader.
fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// Checks that `saved` is `kind`'s in `version` with the bytes of `text`, and that `load`, which takes
/// a payload and saves again, finds the same in it.
pub(crate) fn check(
    saved: &Payload,
    kind: &'static str,
    version: u16,
    text: &str,
    load: impl FnOnce(&Payload) -> Result<Payload, RestoreError>,
) {
    const ADVICE: &str = "do not just update the expected value: give the payload a new version";
    let golden = Payload { kind, version, bytes: bytes(text) };
    assert_eq!(*saved, golden, "{ADVICE}");
    assert_eq!(load(&golden).as_ref(), Ok(&golden), "{ADVICE}");
}
