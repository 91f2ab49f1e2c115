//! Payloads byte by byte, as they are in snapshots on somebody's disk.

use crate::virtio::device::{Payload, RestoreError};

/// The bytes that `text` says in hexadecimal digits, with space wherever that helps a reader.
fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    assert!(digits.len().is_multiple_of(2));
    let pairs = (0..digits.len()).step_by(2).map(|at| &digits[at..at + 2]);
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
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
