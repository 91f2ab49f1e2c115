//! Stock Linux guests under Hull.
//!
//! A program rather than a `cargo test` target: it runs where KVM has hardware behind it, which is
//! mostly inside the lab and without Cargo. `tests/run` builds it, gathers what it needs and starts
//! it. It takes the options of `cargo test`: a filter, `--list`, `--exact`, `--test-threads`.
//!
//! The environment says where things are: `HULL` is the binary under test, `GUESTS` a directory with
//! the kernels and images named in [`site::Site`].

mod cases;
mod guest;
mod site;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

/// Runs a case; in the lab once more if its guest crashed by a triple fault.
///
/// Seen twice in some 250 boots, by a rough count. The suspicion, not proven, is that QEMU's emulation runs a
/// stale translation of code that a guest's other vCPU has just patched, as Linux does while it
/// boots. Where KVM has hardware nothing is forgiven, and neither is a second crash.
fn run(name: &str, case: cases::Case, site: &site::Site) -> Result<(), guest::Failure> {
    match case(site) {
        Err(error) if site.emulated && error.to_string().contains("triple fault") => {
            eprintln!("linux-tests: {name}: a guest crashed, once more: {error}");
            case(site)
        }
        outcome => outcome,
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let site = match site::Site::from_environment() {
        Ok(site) => Arc::new(site),
        Err(error) => {
            eprintln!("linux-tests: error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let trials = cases::all()
        .into_iter()
        .map(|(name, case)| {
            let site = Arc::clone(&site);
            Trial::test(name, move || run(name, case, &site).map_err(Into::into))
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
