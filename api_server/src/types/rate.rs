//! Rate limiters.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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
