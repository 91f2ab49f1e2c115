//! What keeps a guest busy while it is saved and goes on: this program once more, as the guest runs
//! it, and the host's end of its transfers.
//!
//!     linux-tests load ADDRESS:PORT DISK FOLDER STATUS
//!
//! All at once, until there is a file `STATUS.stop`:
//!
//! - pieces of DISK are written past the page cache, flushed now and then, read back and compared;
//! - a file in FOLDER is written, synced, renamed and read back from its disk;
//! - a TCP connection to ADDRESS:PORT gets back what it says, and lives from first to last;
//! - so does a vsock connection to the host's port [`BUSY`], made anew when the transport was reset;
//! - a vsock connection to [`IDLE`] says nothing: only a reset of the transport can end it;
//! - two clocks are read by each of these, and on every CPU, and never go back.
//!
//! STATUS is one line that says what was done so far, `NAME=COUNT…`, or `failed: …`. It ends in
//! `over=1` when all has come to its end; `STATUS.pieces` then says how often each piece of DISK was
//! written.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::net::{Shutdown, shutdown};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::pattern::Pattern;
use crate::peer;

/// The host's vsock port where all is sent back.
pub const BUSY: u32 = 9000;
/// The host's vsock port where nothing is said.
pub const IDLE: u32 = 9001;
/// Bytes of a piece of the disk.
pub const PIECE: usize = 64 << 10;
/// Pieces of the disk.
pub const PIECES: usize = 64;

/// How many threads write to the disk, each to pieces of its own.
const WRITERS: usize = 2;
/// Bytes of the file.
const FILE: usize = 256 << 10;
/// Bytes of one read or write of a connection.
const CHUNK: usize = 32 << 10;
/// How long it may take until there is another connection after a reset, in the guest's time.
const RECONNECT: Duration = Duration::from_secs(60);
/// How often STATUS is written.
pub const REPORT: Duration = Duration::from_millis(100);

/// What the piece `index` of the disk holds after it was written `count` times.
pub fn piece(index: usize, count: u64) -> Vec<u8> {
    match count {
        0 => vec![0; PIECE],
        _ => Pattern::bytes((index as u64) << 32 | count, PIECE),
    }
}

/// The host's end of a connection: compares what comes, and sends it back, until the guest has said
/// all.
pub fn echo(stream: &File) -> io::Result<()> {
    let mut stream = stream;
    let mut seed = [0; 8];
    stream.read_exact(&mut seed)?;
    let mut pattern = Pattern::new(u64::from_le_bytes(seed));
    let mut chunk = vec![0; CHUNK];
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(()),
            length => {
                let chunk = &chunk[..length];
                wanted(pattern.continues_with(chunk), || "the guest's bytes came changed".into())?;
                stream.write_all(chunk)?;
            }
        }
    }
}

/// The guest's part.
pub fn run(address: &str, disk: &str, folder: &str, status: &str) -> io::Result<()> {
    // Behind the shell, which is asked meanwhile how things are.
    rustix::process::nice(10)?;
    let load = Arc::<Load>::default();
    let mut workers = vec![load.start("clock", clocks)];
    for writer in 0..WRITERS {
        let disk = PathBuf::from(disk);
        workers.push(load.start("disk", move |load| write_pieces(load, &disk, writer)));
    }
    let folder = PathBuf::from(folder);
    workers.push(load.start("file", move |load| write_file(load, &folder)));
    let address = address.to_owned();
    workers.push(load.start("net", move |load| transfer(load, &address)));
    workers.push(load.start("vsock", reconnecting));
    // Not waited for: what ends it is a reset, or the end of this process.
    drop(load.start("idle vsock", idle));

    let report = |more: &str| {
        let line = match &*load.failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => format!("failed: {failure}\n"),
            None => format!("{}{more}\n", load.counts()),
        };
        // Renamed into place, so that it is never read in part.
        let draft = format!("{status}.draft");
        fs::write(&draft, line)?;
        fs::rename(&draft, status)
    };
    let stop = PathBuf::from(format!("{status}.stop"));
    while workers.iter().any(|worker| !worker.is_finished()) {
        report("")?;
        thread::sleep(REPORT);
        if stop.exists() {
            load.stop.store(true, Ordering::SeqCst);
        }
    }
    let pieces = load.pieces.each_ref().map(|count| count.load(Ordering::SeqCst).to_string());
    fs::write(format!("{status}.pieces"), pieces.join("\n"))?;
    report(" over=1")
}

/// What the workers share.
struct Load {
    stop: AtomicBool,
    /// What went wrong first.
    failed: Mutex<Option<String>>,
    clocks: [Clock; 2],
    /// How often each piece of the disk was written.
    pieces: [AtomicU64; PIECES],
    readings: AtomicU64,
    /// Pieces written and read back.
    disk: AtomicU64,
    files: AtomicU64,
    /// Bytes that came back.
    net: AtomicU64,
    /// Bytes that came back.
    vsock: AtomicU64,
    resets: AtomicU64,
    idle_resets: AtomicU64,
}

impl Default for Load {
    fn default() -> Load {
        let clock = |id| Clock { id, last: AtomicU64::new(0) };
        Load {
            stop: AtomicBool::new(false),
            failed: Mutex::default(),
            clocks: [clock(ClockId::Monotonic), clock(ClockId::Realtime)],
            pieces: [const { AtomicU64::new(0) }; PIECES],
            readings: AtomicU64::new(0),
            disk: AtomicU64::new(0),
            files: AtomicU64::new(0),
            net: AtomicU64::new(0),
            vsock: AtomicU64::new(0),
            resets: AtomicU64::new(0),
            idle_resets: AtomicU64::new(0),
        }
    }
}

impl Load {
    /// Starts a worker, whose failure is the end of all.
    fn start(
        self: &Arc<Load>,
        name: &'static str,
        work: impl FnOnce(&Load) -> io::Result<()> + Send + 'static,
    ) -> thread::JoinHandle<()> {
        let load = Arc::clone(self);
        thread::spawn(move || {
            if let Err(error) = work(&load) {
                let mut failed = load.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert_with(|| format!("{name}: {error}"));
                load.stop.store(true, Ordering::SeqCst);
            }
        })
    }

    /// Whether to go on, which every worker asks between two things that it does.
    fn goes_on(&self) -> io::Result<bool> {
        for clock in &self.clocks {
            clock.read()?;
        }
        count(&self.readings, 1);
        Ok(!self.stop.load(Ordering::SeqCst))
    }

    fn counts(&self) -> String {
        let counts = [
            ("readings", &self.readings),
            ("disk", &self.disk),
            ("files", &self.files),
            ("net", &self.net),
            ("vsock", &self.vsock),
            ("resets", &self.resets),
            ("idle-resets", &self.idle_resets),
        ];
        let words = counts.map(|(name, count)| format!("{name}={}", count.load(Ordering::SeqCst)));
        words.join(" ")
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::SeqCst);
}

/// Fails with `what` unless `held`.
fn wanted(held: bool, what: impl FnOnce() -> String) -> io::Result<()> {
    if held { Ok(()) } else { Err(io::Error::new(ErrorKind::InvalidData, what())) }
}

/// A clock, and the latest time that anybody read from it, in nanoseconds.
struct Clock {
    id: ClockId,
    last: AtomicU64,
}

impl Clock {
    fn read(&self) -> io::Result<()> {
        // In this order: what is known here was read before, on whatever CPU.
        let before = self.last.load(Ordering::SeqCst);
        let time = clock_gettime(self.id);
        let now = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
        self.last.fetch_max(now, Ordering::SeqCst);
        wanted(now >= before, || format!("{:?} went back from {before} to {now} ns", self.id))
    }
}

/// Reads the clocks on one CPU after the other.
fn clocks(load: &Load) -> io::Result<()> {
    let all = sched_getaffinity(None)?;
    let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu)).collect();
    for &cpu in cpus.iter().cycle() {
        let mut only = CpuSet::new();
        only.set(cpu);
        sched_setaffinity(None, &only)?;
        for _ in 0..20 {
            if !load.goes_on()? {
                return Ok(());
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Memory as O_DIRECT takes it.
#[repr(align(4096))]
struct Aligned([u8; PIECE]);

/// Writes every [`WRITERS`]th piece of the disk again and again, from the `first` on.
fn write_pieces(load: &Load, disk: &Path, first: usize) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let disk = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let mut buffer = Box::new(Aligned([0; PIECE]));
    let at = |index: usize| (index * PIECE) as u64;
    let mine = || (first..PIECES).step_by(WRITERS);
    let mut holds = |index: usize| {
        disk.read_exact_at(&mut buffer.0, at(index))?;
        let count = load.pieces[index].load(Ordering::SeqCst);
        let right = buffer.0[..] == piece(index, count);
        wanted(right, || format!("piece {index} is not as it was written the {count}th time"))
    };
    let mut content = Box::new(Aligned([0; PIECE]));
    for (turn, index) in mine().cycle().enumerate() {
        if !load.goes_on()? {
            break;
        }
        let times = load.pieces[index].load(Ordering::SeqCst) + 1;
        content.0.copy_from_slice(&piece(index, times));
        disk.write_all_at(&content.0, at(index))?;
        load.pieces[index].store(times, Ordering::SeqCst);
        if turn % 8 == 7 {
            disk.sync_data()?;
        }
        // One that was written some turns ago, in another order.
        holds(first + turn * 7 % (PIECES / WRITERS) * WRITERS)?;
        count(&load.disk, 1);
    }
    mine().try_for_each(holds)?;
    disk.sync_all()
}

/// Replaces a file in `folder` again and again.
fn write_file(load: &Load, folder: &Path) -> io::Result<()> {
    let (draft, place) = (folder.join("copy.new"), folder.join("copy"));
    for seed in 1.. {
        if !load.goes_on()? {
            break;
        }
        let content = Pattern::bytes(seed, FILE);
        let mut file = File::create(&draft)?;
        file.write_all(&content)?;
        file.sync_all()?;
        fs::rename(&draft, &place)?;
        // What is read comes from the disk then, not from memory.
        fadvise(&file, 0, None, Advice::DontNeed)?;
        wanted(fs::read(&place)? == content, || format!("file {seed} is not as it was written"))?;
        count(&load.files, 1);
    }
    Ok(())
}

/// Over one TCP connection.
fn transfer(load: &Load, address: &str) -> io::Result<()> {
    let stream = TcpStream::connect(address)?;
    talk(load, &File::from(OwnedFd::from(stream)), 0, &load.net)
}

/// Over one vsock connection after the other.
fn reconnecting(load: &Load) -> io::Result<()> {
    for seed in 1.. {
        match talk(load, &connect(BUSY)?, seed, &load.vsock) {
            Err(error) if was_reset(&error) => count(&load.resets, 1),
            result => return result,
        }
    }
    Ok(())
}

/// What a program is told of a connection that a reset of the transport ended: only if it waited at
/// that moment, that it was reset.
fn was_reset(error: &io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}

/// Waits on a connection where neither side says anything.
fn idle(load: &Load) -> io::Result<()> {
    loop {
        match connect(IDLE)?.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                count(&load.idle_resets, 1);
            }
            Ok(length) => wanted(false, || format!("{length} bytes where nobody says any"))?,
            Err(error) => return Err(error),
        }
    }
}

/// Connects to the host's `port`, after a reset perhaps.
fn connect(port: u32) -> io::Result<File> {
    let deadline = Instant::now() + RECONNECT;
    loop {
        match peer::connect(port) {
            Err(error) if Instant::now() > deadline => return Err(error),
            // A request, or the answer to it, was on its way when the transport was reset.
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut) || was_reset(&error) => {
                thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Says the sequence of `seed`, in front of which it says the seed, and compares what comes back. Ends
/// when it is to stop, and all is back.
fn talk(load: &Load, stream: &File, seed: u64, back: &AtomicU64) -> io::Result<()> {
    let say = || -> io::Result<u64> {
        let (mut stream, mut said) = (stream, 0);
        stream.write_all(&seed.to_le_bytes())?;
        let mut pattern = Pattern::new(seed);
        let mut chunk = vec![0; CHUNK];
        while load.goes_on()? {
            pattern.fill(&mut chunk);
            stream.write_all(&chunk)?;
            said += chunk.len() as u64;
        }
        shutdown(stream, Shutdown::Write)?;
        Ok(said)
    };
    let hear = || -> io::Result<u64> {
        let (mut stream, mut heard) = (stream, 0);
        let mut pattern = Pattern::new(seed);
        let mut chunk = vec![0; CHUNK];
        loop {
            load.goes_on()?;
            let length = stream.read(&mut chunk)?;
            if length == 0 {
                return Ok(heard);
            }
            let right = pattern.continues_with(&chunk[..length]);
            wanted(right, || format!("other bytes came back, after {heard}"))?;
            heard += length as u64;
            count(back, length as u64);
        }
    };
    thread::scope(|scope| {
        let sayer = scope.spawn(say);
        let heard = hear();
        if heard.is_err() {
            // Whoever waits for room would do so for ever; fails if there is no connection any more.
            let _ = shutdown(stream, Shutdown::Both);
        }
        let said = sayer.join().map_err(|_| io::Error::other("the speaker panicked"))?;
        let (heard, said) = (heard?, said?);
        wanted(heard == said, || format!("{heard} bytes came back of {said}"))
    })
}
