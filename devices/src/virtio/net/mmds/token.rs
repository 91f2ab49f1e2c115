//! Session tokens of version 2 of the service.
//!
//! A token says until when it is valid, and carries a keyed hash (BLAKE3) of that. Nothing is
//! remembered of tokens that were given out, so a guest may ask for any number of them.

use std::io;
use std::time::{Duration, Instant};

/// How long a token may be valid, in seconds.
pub(super) const TTL: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Bytes of a token: when it expires, a serial number, and the hash over both.
const LEN: usize = STAMP + blake3::OUT_LEN;
const STAMP: usize = 16;

/// The secret of a machine's tokens. Each machine has its own, for as long as its process lives.
#[derive(Clone)]
pub struct TokenKey {
    key: [u8; blake3::KEY_LEN],
    epoch: Instant,
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl TokenKey {
    /// A key that nobody can guess.
    ///
    /// # Errors
    /// The kernel has no random numbers.
    pub fn random() -> io::Result<TokenKey> {
        let mut key = [0; blake3::KEY_LEN];
        // SAFETY: the buffer is valid for its length. The kernel never cuts so few bytes short.
        let got = unsafe { libc::getrandom(key.as_mut_ptr().cast(), key.len(), 0) };
        match usize::try_from(got) {
            Ok(got) if got == key.len() => Ok(TokenKey { key, epoch: Instant::now() }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Milliseconds of `now` since the key was made.
    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }

    /// A token that is valid for `ttl` from `now` on. `serial` makes it differ from others.
    pub(super) fn token(&self, now: Instant, ttl: Duration, serial: u64) -> String {
        let expiry = self.millis(now).saturating_add(ttl.as_millis() as u64);
        let mut token = [0; LEN];
        let (stamp, hash) = token.split_at_mut(STAMP);
        stamp[..8].copy_from_slice(&expiry.to_le_bytes());
        stamp[8..].copy_from_slice(&serial.to_le_bytes());
        hash.copy_from_slice(blake3::keyed_hash(&self.key, stamp).as_bytes());
        token.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// True if `text` is a token of this key that has not expired. Takes as long for a wrong hash as
    /// for a right one.
    pub(super) fn is_valid(&self, now: Instant, text: &[u8]) -> bool {
        let Some(token) = decode(text) else { return false };
        let (stamp, hash) = token.split_at(STAMP);
        let (Ok(expiry), Ok(hash)) = (<[u8; 8]>::try_from(&stamp[..8]), hash.try_into()) else {
            return false;
        };
        // The comparison of this type is one in constant time.
        let genuine = blake3::keyed_hash(&self.key, stamp) == blake3::Hash::from_bytes(hash);
        genuine && self.millis(now) < u64::from_le_bytes(expiry)
    }
}

/// Reads hexadecimal digits.
fn decode(text: &[u8]) -> Option<[u8; LEN]> {
    if text.len() != 2 * LEN {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let mut token = [0; LEN];
    for (byte, pair) in token.iter_mut().zip(text.chunks_exact(2)) {
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn tokens_expire() {
        let key = TokenKey::random().unwrap();
        let now = Instant::now();
        let token = key.token(now, 10 * SECOND, 0);
        assert!(key.is_valid(now, token.as_bytes()));
        assert!(key.is_valid(now + 9 * SECOND, token.as_bytes()));
        assert!(!key.is_valid(now + 10 * SECOND, token.as_bytes()));
    }

    #[test]
    fn tokens_differ_and_are_one_machines() {
        let (key, other) = (TokenKey::random().unwrap(), TokenKey::random().unwrap());
        let now = Instant::now();
        let token = key.token(now, SECOND, 0);
        assert_ne!(token, key.token(now, SECOND, 1));
        assert!(!other.is_valid(now, token.as_bytes()));
    }

    #[test]
    fn no_bit_of_a_token_can_be_changed() {
        let key = TokenKey::random().unwrap();
        let now = Instant::now();
        let token = key.token(now, SECOND, 7).into_bytes();
        for at in 0..token.len() {
            for bit in 0..8 {
                let mut forged = token.clone();
                forged[at] ^= 1 << bit;
                // Digits may be upper case.
                if !forged.eq_ignore_ascii_case(&token) {
                    assert!(!key.is_valid(now, &forged), "{at}");
                }
            }
        }
        for wrong in [&b""[..], b"0", &[b'0'; 2 * LEN], &[b'0'; 2 * LEN + 1], &[0xff; 2 * LEN]] {
            assert!(!key.is_valid(now, wrong));
        }
        assert!(!key.is_valid(now, &token[..token.len() - 1]));
    }
}
