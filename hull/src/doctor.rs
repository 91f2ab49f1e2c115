//! `hull doctor`: can this host run machines, and if not, what mends it?

use crate::cli::{DoctorArgs, Result};
use crate::exit::Code;

/// Checks the host.
pub fn doctor(_args: &DoctorArgs) -> Result {
    Ok(Code::SUCCESS)
}
