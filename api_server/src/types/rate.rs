//! Rate limiters.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{RateLimit, TokenBucket as Bucket};

/// Tokens that are used up and come back at a constant rate.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Most tokens at a time.
    pub size: u64,
    /// Tokens on top that do not come back.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills.
    pub refill_time: u64,
}

/// Limits of bytes and of operations.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(default)]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations.
    #[serde(default)]
    pub ops: Option<TokenBucket>,
}

impl From<TokenBucket> for Bucket {
    fn from(bucket: TokenBucket) -> Bucket {
        Bucket {
            size: bucket.size,
            one_time_burst: bucket.one_time_burst.unwrap_or(0),
            refill_time: bucket.refill_time,
        }
    }
}

impl From<Bucket> for TokenBucket {
    fn from(bucket: Bucket) -> TokenBucket {
        TokenBucket {
            size: bucket.size,
            one_time_burst: Some(bucket.one_time_burst).filter(|burst| *burst > 0),
            refill_time: bucket.refill_time,
        }
    }
}

impl From<RateLimiter> for RateLimit {
    fn from(limiter: RateLimiter) -> RateLimit {
        RateLimit { bandwidth: limiter.bandwidth.map(Into::into), ops: limiter.ops.map(Into::into) }
    }
}

impl RateLimiter {
    /// What there is of limits: a bucket without a size or a time is none, nor is a limiter without
    /// a bucket.
    pub fn of(limit: Option<RateLimit>) -> Option<RateLimiter> {
        let limits = |bucket: &Bucket| bucket.size > 0 && bucket.refill_time > 0;
        let limiter = RateLimiter {
            bandwidth: limit?.bandwidth.filter(limits).map(Into::into),
            ops: limit?.ops.filter(limits).map(Into::into),
        };
        (limiter.bandwidth.is_some() || limiter.ops.is_some()).then_some(limiter)
    }
}
