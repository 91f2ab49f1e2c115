//! Stock Linux guests under Hull.
//!
//! A program rather than a `cargo test` target: it runs where KVM has hardware behind it, which is
//! mostly inside the lab and without Cargo. `tests/run` builds it, gathers what it needs and starts
//! it. It takes the options of `cargo test`: a filter, `--list`, `--exact`, `--test-threads`.
//!
//! The environment says where things are: `HULL` is the binary under test, `GUESTS` a directory with
//! the kernels and images named in [`site::Site`]. With `PART=1/3` it knows the first of three parts
//! of the tests only.

mod cases;
mod guest;
mod load;
mod pattern;
mod peer;
mod site;
mod warm;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Some(code) = peer::play() {
        return code;
    }
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
        .enumerate()
        .filter(|(index, _)| index % site.parts == site.part)
        .map(|(_, (name, case))| {
            let site = Arc::clone(&site);
            Trial::test(name, move || case(&site).map_err(Into::into))
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
