//! Where the peers are. They are measured, never shipped.

use crate::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?} failed: {reason}").into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Firecracker, fetched into the tree's cache if it is not there, checked each time.
pub fn firecracker(root: &Path) -> Result<PathBuf> {
    let path = run(Command::new(root.join("resources/peer")).arg("firecracker"))?;
    Ok(PathBuf::from(path.trim_end()))
}

/// QEMU, wherever the system keeps it.
pub fn qemu() -> PathBuf {
    let name = "qemu-system-x86_64";
    std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}
