//! A file system whose files can share data until one of them is written. Takes root.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::{io, panic, thread};

/// Bytes of the file system. `mkfs.xfs` makes none that is smaller than 300 MiB; the file is sparse.
const SIZE: u64 = 320 << 20;

/// Runs `body`, and all that it starts, where there is an empty file system of XFS at `folder`. Nobody else sees it, and it
/// is gone with the last of them.
///
/// # Panics
/// It cannot be made.
pub fn where_files_share_data(folder: &Path, body: impl FnOnce() + Send) {
    let image = folder.with_extension("xfs");
    let made = fs::create_dir(folder).and_then(|()| File::create_new(&image)?.set_len(SIZE));
    assert!(made.is_ok(), "{}: {made:?}", image.display());
    run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image));
    let done = thread::scope(|scope| {
        let there = || {
            // SAFETY: the call has no memory arguments; it changes what this thread sees and no other.
            let own = unsafe { libc::unshare(libc::CLONE_NEWNS) };
            assert!(own == 0, "no mount namespace: {}", io::Error::last_os_error());
            run(Command::new("mount").args(["--make-rprivate", "/"]));
            run(Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(&image).arg(folder));
            body();
        };
        scope.spawn(there).join()
    });
    if let Err(failure) = done {
        panic::resume_unwind(failure);
    }
}

fn run(command: &mut Command) {
    match command.output() {
        Ok(output) if output.status.success() => {}
        other => panic!("{command:?}: {other:?}; `resources/setup test` installs what is missing"),
    }
}
