//! virtio-vsock under a stock driver. The guest's programs are this one, which it finds on a disk.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{Case, check};
use crate::guest::{Failure, Guest, Machine, STEP};
use crate::peer::sample;
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("vsock::both_directions", both_directions),
    ("vsock::many_connections", many_connections),
    ("vsock::the_last_bytes_arrive", the_last_bytes_arrive),
];

const CID: u32 = 42;
/// More than every buffer on the way holds.
const TRANSFER: usize = 4 << 20;

/// A guest with a socket device, its driver, and `/tmp/peer`.
struct Wired {
    guest: Guest,
    path: PathBuf,
    _folder: TempDir,
}

fn boot(site: &Site) -> Result<Wired, Failure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("v.sock");
    let options = format!("path={},cid={CID}", path.display());
    let image = program(folder.path())?;
    let machine = Machine::new(site)?.disk(&image, ",ro").option("--vsock", options);
    let mut guest = machine.boot()?;
    prepare(&mut guest, "vda")?;
    Ok(Wired { guest, path, _folder: folder })
}

/// This program, as a disk in `folder`.
pub fn program(folder: &Path) -> Result<PathBuf, Failure> {
    let mut program = std::fs::read(std::env::current_exe()?)?;
    program.resize(program.len().next_multiple_of(4096), 0);
    let image = folder.join("peer");
    std::fs::write(&image, program)?;
    Ok(image)
}

/// Gives a guest the driver, and `/tmp/peer` from the disk that [`program`] made.
pub fn prepare(guest: &mut Guest, disk: &str) -> Result<(), Failure> {
    // Some of these are there already; the last one is the driver.
    guest.run("while read -r m; do insmod /modules/$m 2>/dev/null; done </modules/vsock.order")?;
    guest.run(&format!("cat /dev/{disk} >/tmp/peer && busybox chmod 755 /tmp/peer"))?;
    Ok(())
}

/// Connects to the guest's `port`, as soon as somebody listens there.
pub fn connect(path: &Path, port: u32) -> Result<UnixStream, Failure> {
    let deadline = Instant::now() + STEP;
    loop {
        let mut stream = patient(UnixStream::connect(path)?)?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
            answer.push(byte[0]);
        }
        if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
            return Ok(stream);
        }
        check(answer.is_empty(), || format!("the answer is {answer:?}"))?;
        check(Instant::now() < deadline, || format!("nobody listens on port {port}"))?;
        thread::sleep(Duration::from_millis(100));
    }
}

fn patient(stream: UnixStream) -> Result<UnixStream, Failure> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.set_write_timeout(Some(STEP))?;
    Ok(stream)
}

/// Listens on the host's `port`.
pub fn listen(path: &Path, port: u32) -> Result<UnixListener, Failure> {
    let listener = UnixListener::bind(format!("{}_{port}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Accepts one connection within [`STEP`].
pub fn accept(listener: &UnixListener) -> Result<UnixStream, Failure> {
    let deadline = Instant::now() + STEP;
    loop {
        match listener.accept() {
            Ok((stream, _)) => return patient(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                check(Instant::now() < deadline, || "the guest did not connect".into())?;
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Says `bytes` and closes that direction; they have to come back, and then the end.
fn echoes(stream: &UnixStream, bytes: &[u8]) -> Result<(), Failure> {
    let back = thread::scope(|scope| -> Result<Vec<u8>, Failure> {
        let said = scope.spawn(|| -> std::io::Result<()> {
            (&*stream).write_all(bytes)?;
            stream.shutdown(Shutdown::Write)
        });
        let mut back = Vec::new();
        (&*stream).read_to_end(&mut back)?;
        said.join().map_err(|_| "the writer panicked")??;
        Ok(back)
    })?;
    check(back == bytes, || format!("{} bytes came back of {}, or others", back.len(), bytes.len()))
}

fn both_directions(site: &Site) -> Result<(), Failure> {
    let Wired { mut guest, path, _folder } = boot(site)?;
    guest.expect("/tmp/peer vsock-cid", &CID.to_string())?;
    guest.run("/tmp/peer vsock-listen 52 1 & true")?;
    echoes(&connect(&path, 52)?, &sample(TRANSFER))?;
    guest.run("wait $!")?;
    let listener = listen(&path, 9000)?;
    guest.run("/tmp/peer vsock-connect 9000 1 & true")?;
    echoes(&accept(&listener)?, &sample(TRANSFER))?;
    guest.run("wait $!")?;
    // Where nobody listens, neither side waits for the other.
    let (status, said) = guest.attempt("/tmp/peer vsock-connect 9001 1 2>&1")?;
    check(status == 1 && said.contains("reset"), || format!("status {status}: {said}"))?;
    guest.power_off()?;
    check(!path.exists(), || "the socket is left behind".into())
}

fn many_connections(site: &Site) -> Result<(), Failure> {
    const MANY: usize = 100;
    let Wired { mut guest, path, _folder } = boot(site)?;
    guest.run(&format!("/tmp/peer vsock-listen 52 {MANY} & true"))?;
    let listener = listen(&path, 9000)?;
    let mut streams = Vec::new();
    for _ in 0..MANY {
        streams.push(connect(&path, 52)?);
    }
    guest.run(&format!("/tmp/peer vsock-connect 9000 {MANY} & true"))?;
    for _ in 0..MANY {
        streams.push(accept(&listener)?);
    }
    // Each says something of its own, before any is heard.
    let mut expected = Vec::new();
    for (number, mut stream) in (0..).zip(&streams) {
        let text = format!("{number}/").repeat(500 + number);
        stream.write_all(text.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        expected.push(text);
    }
    for (mut stream, text) in streams.iter().zip(expected) {
        let mut back = String::new();
        stream.read_to_string(&mut back)?;
        check(back == text, || format!("{} bytes instead of {}", back.len(), text.len()))?;
    }
    drop(streams);
    guest.run("wait")?;
    guest.power_off()
}

/// A guest's program writes and is gone; the host's reads late and slowly, and misses nothing.
fn the_last_bytes_arrive(site: &Site) -> Result<(), Failure> {
    let Wired { mut guest, path, _folder } = boot(site)?;
    let listener = listen(&path, 9000)?;
    for bytes in [10, 300_000, 1_000_000] {
        guest.run(&format!("/tmp/peer vsock-send 9000 {bytes} & true"))?;
        let mut stream = accept(&listener)?;
        thread::sleep(Duration::from_secs(1));
        let mut came = vec![0; 5];
        stream.read_exact(&mut came)?;
        thread::sleep(Duration::from_secs(1));
        stream.read_to_end(&mut came)?;
        check(came == sample(bytes), || format!("{} bytes came of {bytes}", came.len()))?;
        guest.run("wait $!")?;
    }
    guest.power_off()
}
