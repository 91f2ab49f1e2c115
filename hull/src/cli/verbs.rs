//! Options of the commands that speak of machines which run already.

use clap::Args;

/// Options of `hull ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `hull stop`.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Name of the machine, as `hull ps` shows it
    pub name: String,
    /// Seconds that the guest gets to power off before the machine is ended
    #[arg(short, long, value_name = "SECONDS", default_value_t = 10)]
    pub timeout: u64,
    /// End the machine at once, as if its power was cut
    #[arg(long)]
    pub now: bool,
}
