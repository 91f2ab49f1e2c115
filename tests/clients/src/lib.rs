//! What a client of Firecracker finds on its machine: a program of that name, a kernel, a disk.

use std::fs::File;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use tempfile::TempDir;

/// A folder with all of it; gone when dropped.
#[derive(Debug)]
pub struct Site {
    folder: TempDir,
}

impl Site {
    /// Makes it. `CLIENTS_FIRECRACKER` names another program than Hull, such as Firecracker itself.
    pub fn new() -> Site {
        let folder = match TempDir::new() {
            Ok(folder) => folder,
            Err(error) => panic!("no temporary directory: {error}"),
        };
        let site = Site { folder };
        let other = std::env::var_os("CLIENTS_FIRECRACKER").map(PathBuf::from);
        let program = other.unwrap_or_else(|| machine_tests::HULL.clone());
        let ready = symlink(program, site.firecracker())
            .and_then(|()| File::create(site.disk())?.set_len(1 << 20));
        assert!(ready.is_ok(), "{ready:?}");
        site
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program.
    pub fn firecracker(&self) -> PathBuf {
        self.path("firecracker")
    }

    /// A disk image.
    pub fn disk(&self) -> PathBuf {
        self.path("disk")
    }

    /// A kernel.
    pub fn kernel(&self) -> PathBuf {
        machine_tests::PAYLOAD.clone()
    }
}

impl Default for Site {
    fn default() -> Site {
        Site::new()
    }
}
