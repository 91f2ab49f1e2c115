//! What happens to the bits of a register, and the texts that say so.

use std::fmt;
use std::ops::{BitAnd, BitOr, Not, Shl};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A register's width: `u32` for CPUID, `u64` for MSRs.
pub trait Word:
    Copy
    + Eq
    + From<bool>
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + Not<Output = Self>
    + Shl<usize, Output = Self>
{
    /// Number of bits.
    const BITS: usize;
}

impl Word for u32 {
    const BITS: usize = 32;
}

impl Word for u64 {
    const BITS: usize = 64;
}

/// Which bits of a register are set or cleared.
///
/// As text it is `0b` and a character for each bit, the highest first: `0`, `1`, or `x` for a bit that
/// is kept. Bits in front of those that are written are kept, the `0b` may be left out, and `_` may
/// stand anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmap<T> {
    mask: T,
    value: T,
}

impl<T: Word> Bitmap<T> {
    /// The bits of `mask` become those of `value`; the others are kept.
    pub fn new(mask: T, value: T) -> Bitmap<T> {
        Bitmap { mask, value: value & mask }
    }

    /// A register's value after the change.
    pub fn apply(self, register: T) -> T {
        register & !self.mask | self.value
    }
}

/// A text that is no bitmap.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// It has something else than bits in it.
    #[error("{text:?} has {character:?}; a bitmap is 0b and up to {bits} of 0, 1 and x")]
    Character {
        /// The text.
        text: String,
        /// What is in it.
        character: char,
        /// The register's width.
        bits: usize,
    },
    /// It has too many bits, or none.
    #[error("{text:?} has {count} bits; a bitmap is 0b and 1 to {bits} of 0, 1 and x")]
    Length {
        /// The text.
        text: String,
        /// Its bits.
        count: usize,
        /// The register's width.
        bits: usize,
    },
}

impl<T: Word> FromStr for Bitmap<T> {
    type Err = BitmapError;

    fn from_str(text: &str) -> Result<Bitmap<T>, BitmapError> {
        let (mut mask, mut value) = (T::from(false), T::from(false));
        let digits = text.strip_prefix("0b").unwrap_or(text);
        let mut count = 0;
        for character in digits.chars().rev().filter(|&character| character != '_') {
            let (named, set) = match character {
                '0' => (true, false),
                '1' => (true, true),
                'x' => (false, false),
                _ => {
                    let (text, bits) = (text.to_owned(), T::BITS);
                    return Err(BitmapError::Character { text, character, bits });
                }
            };
            if count < T::BITS {
                mask = mask | T::from(named) << count;
                value = value | T::from(set) << count;
            }
            count += 1;
        }
        if !(1..=T::BITS).contains(&count) {
            return Err(BitmapError::Length { text: text.to_owned(), count, bits: T::BITS });
        }
        Ok(Bitmap { mask, value })
    }
}

impl<T: Word> fmt::Display for Bitmap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zero = T::from(false);
        f.write_str("0b")?;
        (0..T::BITS).rev().map(|n| T::from(true) << n).try_for_each(|bit| {
            f.write_str(match (self.mask & bit == zero, self.value & bit == zero) {
                (true, _) => "x",
                (false, true) => "0",
                (false, false) => "1",
            })
        })
    }
}

impl<T: Word> Serialize for Bitmap<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, T: Word> Deserialize<'de> for Bitmap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bitmap<T>, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Numbers that are written as texts: `0x10a`, `0b100001010` or `266`.
pub(super) mod number {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(
        number: &u32,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(&text).ok_or_else(|| {
            serde::de::Error::custom(format_args!(
                "{text:?} is not a number of 32 bits, such as 0x10a, 0b100001010 or 266"
            ))
        })
    }

    fn parse(text: &str) -> Option<u32> {
        let (digits, radix) = match text.get(..2) {
            Some("0x") => (&text[2..], 16),
            Some("0b") => (&text[2..], 2),
            _ => (text, 10),
        };
        // The standard library would take a sign.
        if digits.starts_with('+') {
            return None;
        }
        u32::from_str_radix(digits, radix).ok()
    }
}
