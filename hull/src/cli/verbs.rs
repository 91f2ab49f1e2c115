//! Options of the commands that speak of machines which run already.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args};
use vmm::config::{ByteSize, RateLimit, TokenBucket};

// Which machine a command speaks of.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Name of the machine, as `hull ps` shows it; or the socket of an API, with a slash in its path
    #[arg(value_name = "NAME|SOCKET")]
    pub machine: OsString,
}

// Options of `hull ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

// Options of `hull stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Seconds that the guest gets to power off before the machine is ended
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// End the machine at once, as if its power was cut
    #[arg(long, visible_alias = "force")]
    pub now: bool,
}

// Options of commands that print what a machine says of itself.
#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

// Options of `hull metrics`.
#[derive(Debug, Args)]
pub struct MetricsArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the text that Prometheus reads
    #[arg(long, conflicts_with = "json")]
    pub prometheus: bool,
}

/// What can happen to a machine.
const EVENTS: [&str; 8] =
    ["created", "started", "ready", "paused", "resumed", "panicked", "stopped", "device-error"];

// Options of `hull events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Print an object of JSON per line
    #[arg(long)]
    pub json: bool,
    /// End with this event, which may have been already; it is an error if the machine stops first
    #[arg(long, value_name = "EVENT", value_parser = PossibleValuesParser::new(EVENTS))]
    pub until: Option<String>,
}

const SET_DISK_HELP: &str = "\
Without options, the machine looks at the size of the disk's file again, after it grew.

Examples:
  hull set-disk web data --path /srv/other.img
  hull set-disk web data --rate 10M:1000ops
  truncate -s +1G data.img && hull set-disk web data";

// Options of `hull set-disk`.
#[derive(Debug, Args)]
#[command(after_help = SET_DISK_HELP)]
pub struct SetDiskArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Id of the disk, as `hull config` shows it
    pub disk: String,
    /// Give the disk this file instead of its own
    #[arg(long, value_name = "FILE")]
    pub path: Option<PathBuf>,
    /// Limit: 10M (bytes per second), 1000ops, both (10M:1000ops), or none
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub rate: Option<RateLimit>,
}

// Options of `hull set-net`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("rates").args(["rx_rate", "tx_rate"]).required(true).multiple(true))]
pub struct SetNetArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Id of the network card, as `hull config` shows it
    pub card: String,
    /// Limit for what the guest receives: 10M (bytes per second), 1000ops (packets), both, or none
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub rx_rate: Option<RateLimit>,
    /// Limit for what the guest sends
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub tx_rate: Option<RateLimit>,
}

// Options of `hull balloon`.
#[derive(Debug, Args)]
pub struct BalloonArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Memory that the guest is to do without, in whole MiB: 64M, 1G. Without it, and without an
    /// interval, the balloon is shown
    #[arg(value_name = "SIZE", value_parser = mebibytes)]
    pub size: Option<u32>,
    /// Ask the guest about its memory every so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub stats_interval: Option<u16>,
    /// Print JSON
    #[arg(long, conflicts_with_all = ["size", "stats_interval"])]
    pub json: bool,
}

/// A limit, or `none`: of the API, a bucket without tokens takes one away.
fn rate(text: &str) -> std::result::Result<RateLimit, String> {
    if text == "none" {
        let none = Some(TokenBucket { size: 0, one_time_burst: 0, refill_time: 0 });
        return Ok(RateLimit { bandwidth: none, ops: none });
    }
    text.parse().map_err(|error: String| format!("{error}; none takes a limit away"))
}

/// A size as the API has it.
fn mebibytes(text: &str) -> std::result::Result<u32, String> {
    let ByteSize(bytes) = text.parse()?;
    if bytes % (1 << 20) != 0 {
        return Err(format!("{text} is not a whole number of MiB; write 64M or 1G"));
    }
    u32::try_from(bytes >> 20).map_err(|_| format!("{text} is more than any machine has"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_set_and_taken_away() {
        assert_eq!(rate("10M").unwrap().to_string(), "10M/s");
        assert_eq!(rate("none").unwrap().to_string(), "0/0ms:0ops/0ms");
        assert!(rate("none").unwrap().limiter().is_none());
        let error = rate("fast").unwrap_err();
        assert!(error.contains("1000ops") && error.ends_with("none takes a limit away"), "{error}");
    }

    #[test]
    fn balloons_have_whole_mebibytes() {
        assert_eq!((mebibytes("64M"), mebibytes("2G")), (Ok(64), Ok(2048)));
        assert!(mebibytes("64").unwrap_err().contains("whole number of MiB"));
        assert!(mebibytes("99999999T").unwrap_err().contains("size"));
        assert!(mebibytes("8192T").unwrap_err().contains("more than"));
    }
}
