//! Rate limits as people write them.
//!
//! A limit is a text such as `10M`, `1000ops` or `10M:1000ops`. Each part is a token bucket:
//!
//! ```text
//!   10M                10 MiB per second
//!   10M/100ms          refilled within 100 ms: 100 MiB per second, never more than 10 at once
//!   10M/s+50M          and 50 MiB in addition, once, at the start
//!   1000ops            1000 requests per second; likewise 100ops/100ms+500ops
//! ```
//!
//! That says everything that Firecracker's `RateLimiter` does: `SIZEops/REFILL_TIMEms+ONE_TIME_BURST`.
//! Files may also write a table, `{ bandwidth = "10M/s", ops = "1000" }`.

use std::fmt;
use std::str::FromStr;
use std::time::Instant;

use devices::rate::{Bucket, Limits, RateLimiter};
use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ByteSize;

/// Milliseconds in which a bucket fills if nothing else is said.
const SECOND: u64 = 1000;

/// A limit for a device's requests: bytes, operations or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes.
    pub bandwidth: Option<TokenBucket>,
    /// Requests.
    pub ops: Option<TokenBucket>,
}

/// A token bucket, with the names and meanings of Firecracker's: it holds `size` tokens at first,
/// fills at the rate of `size` per `refill_time`, and has `one_time_burst` tokens in addition that
/// do not come back. It is no limit if `size` or `refill_time` is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    /// Tokens: bytes or operations.
    pub size: u64,
    /// Tokens that are used up first.
    pub one_time_burst: u64,
    /// Milliseconds.
    pub refill_time: u64,
}

impl TokenBucket {
    /// `rate` tokens per second, and no more than that at once.
    pub fn per_second(rate: u64) -> TokenBucket {
        TokenBucket { size: rate, one_time_burst: 0, refill_time: SECOND }
    }

    fn bucket(self) -> Bucket {
        let TokenBucket { size, one_time_burst, refill_time } = self;
        Bucket { size, one_time_burst, refill_ms: refill_time }
    }
}

impl RateLimit {
    /// A limiter with full buckets, or `None` if nothing is limited.
    pub fn limiter(&self) -> Option<RateLimiter> {
        let bucket = |bucket: Option<TokenBucket>| bucket.map(TokenBucket::bucket);
        let limits = Limits { bandwidth: bucket(self.bandwidth), ops: bucket(self.ops) };
        RateLimiter::new(limits, Instant::now())
    }

    /// This limit with the buckets of `update` in place of its own, where `update` has them.
    #[must_use]
    pub fn updated(self, update: RateLimit) -> RateLimit {
        RateLimit { bandwidth: update.bandwidth.or(self.bandwidth), ops: update.ops.or(self.ops) }
    }
}

/// What tokens are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Bytes,
    Ops,
}

const OPS: &str = "ops";

impl Unit {
    fn number(self, text: &str) -> Option<u64> {
        match self {
            Unit::Bytes => text.parse().ok().map(|ByteSize(bytes)| bytes),
            Unit::Ops => {
                let digits = text.strip_suffix(OPS).unwrap_or(text);
                digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
            }
        }
    }

    fn write(self, tokens: u64, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Bytes => write!(f, "{}", ByteSize(tokens)),
            Unit::Ops => write!(f, "{tokens}{OPS}"),
        }
    }

    /// `SIZE[/TIME][+BURST]`.
    fn bucket(self, text: &str) -> Option<TokenBucket> {
        let (steady, burst) = match text.split_once('+') {
            Some((steady, burst)) => (steady, self.number(burst)?),
            None => (text, 0),
        };
        let (size, refill_time) = match steady.split_once('/') {
            Some((size, time)) => (size, milliseconds(time)?),
            None => (steady, SECOND),
        };
        Some(TokenBucket { size: self.number(size)?, one_time_burst: burst, refill_time })
    }
}

/// `s`, `2s`, `100ms`.
fn milliseconds(text: &str) -> Option<u64> {
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s')?, SECOND),
    };
    if number.is_empty() {
        return Some(unit);
    }
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| number.parse::<u64>().ok()?.checked_mul(unit)).flatten()
}

impl FromStr for RateLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<RateLimit, String> {
        let wrong = || {
            format!(
                "{text:?} is not a rate; write 10M (per second), 1000ops, 10M:1000ops, \
                 or 10M/100ms+50M for a bucket, its refill time and a burst"
            )
        };
        let mut limit = RateLimit::default();
        for part in text.split(':') {
            let size = part.split(['/', '+']).next().unwrap_or(part);
            let (unit, place) = if size.ends_with(OPS) {
                (Unit::Ops, &mut limit.ops)
            } else {
                (Unit::Bytes, &mut limit.bandwidth)
            };
            let bucket = unit.bucket(part).ok_or_else(wrong)?;
            if place.replace(bucket).is_some() {
                return Err(wrong());
            }
        }
        Ok(limit)
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.bandwidth, Unit::Bytes), (self.ops, Unit::Ops)];
        let parts = parts.into_iter().filter_map(|(bucket, unit)| Some((bucket?, unit)));
        for (n, (bucket, unit)) in parts.enumerate() {
            if n > 0 {
                f.write_str(":")?;
            }
            unit.write(bucket.size, f)?;
            match bucket.refill_time {
                SECOND => f.write_str("/s")?,
                other => write!(f, "/{other}ms")?,
            }
            if bucket.one_time_burst > 0 {
                f.write_str("+")?;
                unit.write(bucket.one_time_burst, f)?;
            }
        }
        Ok(())
    }
}

impl Serialize for RateLimit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The form with keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    bandwidth: Option<Tokens>,
    ops: Option<Tokens>,
}

/// A number per second, or a bucket as text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    Number(u64),
    Text(String),
}

impl Tokens {
    fn bucket<E: serde::de::Error>(self, unit: Unit) -> Result<TokenBucket, E> {
        match self {
            Tokens::Number(rate) => Ok(TokenBucket::per_second(rate)),
            Tokens::Text(text) => unit.bucket(&text).ok_or_else(|| {
                let example = if unit == Unit::Ops { "1000/s+5000" } else { "10M/s+50M" };
                E::custom(format!("{text:?} is not a rate such as {example}"))
            }),
        }
    }
}

impl<'de> Deserialize<'de> for RateLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RateLimit, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = RateLimit;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rate such as \"10M\", \"1000ops\" or \"10M/100ms+50M:1000ops\"")
            }

            fn visit_u64<E: serde::de::Error>(self, rate: u64) -> Result<RateLimit, E> {
                Ok(RateLimit { bandwidth: Some(TokenBucket::per_second(rate)), ops: None })
            }

            fn visit_i64<E: serde::de::Error>(self, rate: i64) -> Result<RateLimit, E> {
                let rate = u64::try_from(rate).map_err(|_| E::custom("a rate is not negative"))?;
                self.visit_u64(rate)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RateLimit, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(
                self,
                map: M,
            ) -> Result<RateLimit, M::Error> {
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                let bandwidth = table.bandwidth.map(|tokens| tokens.bucket(Unit::Bytes));
                let ops = table.ops.map(|tokens| tokens.bucket(Unit::Ops));
                Ok(RateLimit { bandwidth: bandwidth.transpose()?, ops: ops.transpose()? })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(size: u64, one_time_burst: u64, refill_time: u64) -> Option<TokenBucket> {
        Some(TokenBucket { size, one_time_burst, refill_time })
    }

    #[test]
    fn rates_read_and_print() {
        for (text, bandwidth, ops, printed) in [
            ("10M", bucket(10 << 20, 0, 1000), None, "10M/s"),
            ("10M/s", bucket(10 << 20, 0, 1000), None, "10M/s"),
            ("1000", bucket(1000, 0, 1000), None, "1000/s"),
            ("10M/100ms+50M", bucket(10 << 20, 50 << 20, 100), None, "10M/100ms+50M"),
            ("1K+2K", bucket(1 << 10, 2 << 10, 1000), None, "1K/s+2K"),
            ("1000ops", None, bucket(1000, 0, 1000), "1000ops/s"),
            ("10ops/2s+5", None, bucket(10, 5, 2000), "10ops/2000ms+5ops"),
            ("5ops:1M", bucket(1 << 20, 0, 1000), bucket(5, 0, 1000), "1M/s:5ops/s"),
            ("0/0ms", bucket(0, 0, 0), None, "0/0ms"),
        ] {
            let limit: RateLimit = text.parse().unwrap();
            assert_eq!(limit, RateLimit { bandwidth, ops }, "{text}");
            assert_eq!(limit.to_string(), printed);
        }
        for text in [
            "",
            "fast",
            "10M/",
            "10M/h",
            "10M/-1s",
            "/s",
            "+5",
            "1M+",
            "1M:2M",
            "5ops:6ops",
            "1M:",
            "ops",
            "1Mops",
            "1M/s+5ops",
            "-1",
            "+1ops",
            "1M/99999999999999999999s",
            "1M/+1s",
        ] {
            assert!(text.parse::<RateLimit>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn files_may_write_a_number_a_text_or_a_table() {
        let read = |json: &str| serde_json::from_str::<RateLimit>(json).map_err(|e| e.to_string());
        let limit = RateLimit { bandwidth: bucket(10, 0, 1000), ops: bucket(7, 1, 5) };
        assert_eq!(read(r#""10:7ops/5ms+1""#), Ok(limit));
        assert_eq!(read(r#"{"bandwidth": 10, "ops": "7/5ms+1"}"#), Ok(limit));
        assert_eq!(read("10"), Ok(RateLimit { ops: None, ..limit }));
        assert!(read(r#"{"bandwith": 10}"#).unwrap_err().contains("unknown field `bandwith`"));
        assert!(read(r#"{"ops": "1M"}"#).unwrap_err().contains("1000/s"));
        assert!(read("-1").is_err() && read("true").is_err());
    }

    #[test]
    fn an_update_leaves_what_it_does_not_name() {
        let limit: RateLimit = "10M:7ops".parse().unwrap();
        assert_eq!(limit.updated("1M".parse().unwrap()).to_string(), "1M/s:7ops/s");
        assert_eq!(limit.updated(RateLimit::default()), limit);
        // A bucket of size 0 is how a limit is taken away.
        assert!("0:0ops".parse::<RateLimit>().unwrap().limiter().is_none());
        assert!(limit.limiter().is_some());
    }

    proptest! {
        /// Each limiter that Firecracker can express can be written, and read back.
        #[test]
        fn every_limit_survives_printing(
            bandwidth in any::<Option<(u64, u64, u64)>>(), ops in any::<Option<(u64, u64, u64)>>())
        {
            let bucket = |(size, one_time_burst, refill_time)|
                TokenBucket { size, one_time_burst, refill_time };
            let limit = RateLimit { bandwidth: bandwidth.map(bucket), ops: ops.map(bucket) };
            if limit != RateLimit::default() {
                prop_assert_eq!(limit.to_string().parse(), Ok(limit));
            }
            let _ = limit.limiter();
        }

        #[test]
        fn reading_never_panics(text in "[0-9MKopsm/+:]{0,12}|.{0,12}") {
            let _ = text.parse::<RateLimit>();
        }
    }
}
