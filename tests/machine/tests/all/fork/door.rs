//! Where processes are asked for, and by whom.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use machine_tests::{Family, HULL, NOBODY, eventually};
use serde_json::Value;

use super::{children, fork, kill, pid, pool};

const KEEP: [&str; 2] = ["--keep", "number=1,memory=64M"];

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o777
}

/// What is said to who says nothing.
fn said(mut stream: UnixStream) -> String {
    stream.set_read_timeout(Some(machine_tests::PATIENCE)).unwrap();
    let mut said = Vec::new();
    // What was not read of what it said itself resets the connection behind that.
    let _ = stream.read_to_end(&mut said);
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn what_is_no_socket_stays_as_it_is() {
    let family = Family::default();
    let path = family.at("precious");
    fs::write(&path, "precious").unwrap();
    let words = ["--socket", path.to_str().unwrap()];
    let pool = || words.iter().fold(family.hull("pool"), |pool, word| pool.flag(word));
    pool().run().failed(&["precious", "not a socket"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    // What a dead one left is replaced, and not while another may be doing so.
    fs::remove_file(&path).unwrap();
    drop(UnixListener::bind(&path).unwrap());
    let inode = fs::metadata(&path).unwrap().ino();
    let folder = File::open(family.at("")).unwrap();
    // SAFETY: takes a descriptor that is open.
    assert_eq!(unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX) }, 0);
    pool().run().failed(&["holds a lock"]);
    assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
    drop(folder);
    let running = pool().start();
    eventually(|| UnixStream::connect(&path).is_ok(), || "it does not listen".to_owned());
    pool().run().failed(&["another process listens"]);
    running.signal(libc::SIGTERM);
    running.finish().ok();
    assert!(!path.exists());
}

#[test]
fn nobody_else_may_come_in_whatever_the_mask_is() {
    let family = Family::default();
    let mut pool = Command::new("sh")
        .args(["-c", "umask 0; exec \"$0\" pool --keep number=1,memory=64M"])
        .arg(&*HULL)
        .env("XDG_RUNTIME_DIR", family.at(""))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let socket = family.at("hull/.pool");
    eventually(|| UnixStream::connect(&socket).is_ok(), || "it does not listen".to_owned());
    assert_eq!((mode(&family.at("hull")), mode(&socket)), (0o700, 0o600));
    pool.kill().unwrap();
    pool.wait().unwrap();
}

#[test]
fn another_user_is_told_that_there_is_nothing_to_be_had() {
    let family = Family::default();
    let _pool = pool(&family, &KEEP, 1);
    let before = family.processes();
    let socket = family.at("hull/.pool");
    // Somebody opened it to all.
    for (path, mode) in [("", 0o755), ("hull", 0o755), ("hull/.pool", 0o666)] {
        fs::set_permissions(family.at(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let stranger = std::thread::spawn({
        let socket = socket.clone();
        move || {
            // SAFETY: no memory arguments. The call itself, and not its function, is about this thread alone.
            let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
            assert_eq!(changed, 0, "needs root: {}", std::io::Error::last_os_error());
            UnixStream::connect(&socket).unwrap()
        }
    });
    let mut stranger = stranger.join().unwrap();
    // It may be told before.
    let _ = stranger.write_all(b"x");
    let said = said(stranger);
    assert!(said.contains("alone"), "{said:?}");
    assert_eq!(family.processes(), before);
}

#[test]
fn who_ends_leaves_the_socket_of_another() {
    let family = Family::default();
    let parent = family.parent("m");
    let first = pool(&family, &KEEP, 1);
    let socket = family.at("hull/.pool");
    fs::remove_file(&socket).unwrap();
    let _second = pool(&family, &KEEP, 1);
    first.signal(libc::SIGTERM);
    first.finish().ok();
    assert!(UnixStream::connect(&socket).is_ok());
    assert_eq!(fork(&family, &["m"]).code(), 0);
    super::goes_on(&parent);
}

/// The mode of the filters that a copy has (seccomp(2): 2 is one that has some), by its control thread.
fn filters(child: &Value) -> String {
    // They are there before it lets anybody in.
    assert!(super::answers(child["api_sock"].as_str().unwrap().as_ref()));
    let status = fs::read_to_string(format!("/proc/{}/status", pid(child))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    line.unwrap().trim().to_owned()
}

#[test]
fn who_makes_a_copy_says_how_it_is_filtered() {
    let family = Family::default();
    let scenario = "work dirty=2M size=64K every=100M";
    let parent = |name, filter| {
        Family::at_work(family.guest(name, scenario).option("--seccomp", filter).start())
    };
    let _parents = [parent("on", "on"), parent("off", "off")];
    let forked = |words: &[&str]| {
        let words = [words, &["--json"]].concat();
        let mut modes = ["on", "off"].map(|name| {
            // The pool has one ready, and not two.
            let children = children(&fork(&family, &[&[name, "-n", "2"], &words[..]].concat()));
            let modes = [0, 1].map(|n| filters(&children[n]));
            assert_eq!(modes[0], modes[1], "{children:?}");
            children.iter().for_each(kill);
            modes[0].clone()
        });
        modes.sort();
        modes
    };
    assert_eq!(forked(&[]), ["2", "2"]);
    assert_eq!(forked(&["--seccomp", "off"]), ["0", "0"]);
    let pool = super::pool(&family, &KEEP, 1);
    assert_eq!(forked(&[]), ["2", "2"]);
    assert_eq!(forked(&["--seccomp", "off"]), ["0", "0"], "without the pool");
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
    // The next one is ready when there are more.
    eventually(|| family.processes().len() == 2, || format!("{:?}", family.processes()));
    let _pool = super::pool(&family, &[&KEEP[..], &["--seccomp", "off"]].concat(), 1);
    assert_eq!(forked(&[]), ["0", "0"]);
}
