//! What a guest has been at when it is copied: this program once more, as the guest runs it.
//!
//!     linux-tests warm
//!
//! It holds memory that it filled, and answers over TCP and vsock, both on [`PORT`], whoever says one of
//! these lines:
//!
//! - `who`: `NAME=VALUE…`, who the guest is and what it draws from /dev/urandom right then;
//! - `draw`: draws random numbers from then on, again and again, until some time after the host name changed;
//! - `write`: makes a file on the disk at `/mnt` that is called like the guest, of [`FILE`] bytes that are not known before, and
//!   says of what seed;
//! - `read NAME SEED`: whether that file has these bytes, on the disk and not only in memory;
//! - `part`: lets go of that disk;
//! - `drawn`: what was drawn last, a line of `TIME NUMBER` for each, and `renamed TIME`.
//!
//! Times are nanoseconds of `CLOCK_MONOTONIC`.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::pattern::Pattern;
use crate::peer;

/// Where it answers.
pub const PORT: u16 = 7900;
/// What the kernel says when it takes itself for a copy.
pub const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// Bytes that are held.
const HELD: usize = 32 << 20;
const SEED: u64 = 77;
/// Bytes of a file that is written.
pub const FILE: usize = 1 << 20;
/// Time between two draws.
const INTERVAL: u64 = 100_000;
/// Draws that are kept, and those that are made after the host name changed.
const KEPT: usize = 50_000;
const LAST: usize = 1000;

/// What was drawn, and when.
#[derive(Default)]
struct Drawn {
    numbers: VecDeque<(u64, u64)>,
    renamed: Option<u64>,
}

struct Warm {
    held: Vec<u8>,
    drawn: Mutex<Drawn>,
}

/// Serves until the guest ends.
pub fn run() -> io::Result<()> {
    let warm =
        Arc::new(Warm { held: Pattern::bytes(SEED, HELD), drawn: Mutex::new(Drawn::default()) });
    let sockets = peer::listener(PORT.into())?;
    let own = Arc::clone(&warm);
    thread::spawn(move || {
        loop {
            // Of one that is gone before it was taken.
            let Ok(stream) = peer::accept(&sockets) else { continue };
            let _ = own.answer(stream);
        }
    });
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    println!("warm");
    for stream in listener.incoming() {
        let _ = warm.answer(File::from(OwnedFd::from(stream?)));
    }
    Ok(())
}

impl Warm {
    fn answer(self: &Arc<Warm>, stream: File) -> io::Result<()> {
        let mut line = String::new();
        BufReader::new((&stream).take(64)).read_line(&mut line)?;
        let words: Vec<_> = line.split_whitespace().collect();
        let answer = match words.join(" ").as_str() {
            "who" => self.who()?,
            "draw" => {
                let warm = Arc::clone(self);
                let name = name()?;
                thread::spawn(move || warm.draw(&name));
                "drawing\n".to_owned()
            }
            "drawn" => self.drawn(),
            "write" => write()?,
            "part" => part()?,
            other => match words.as_slice() {
                ["read", name, seed] => read(name, seed)?,
                _ => format!("what is {other:?}?\n"),
            },
        };
        (&stream).write_all(answer.as_bytes())
    }

    fn who(&self) -> io::Result<String> {
        let intact = Pattern::new(SEED).continues_with(&self.held);
        let mut random = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let random: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let mac = fs::read_to_string("/sys/class/net/eth0/address")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let (reseeded, times) = reseeded()?;
        Ok(format!(
            "hostname={} mac={} random={random} intact={intact} seconds={} reseeded={reseeded} \
             times={times}\n",
            name()?,
            mac.trim(),
            now.as_secs()
        ))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Drawn> {
        self.drawn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, before: &str) {
        let (mut next, mut left) = (now(), LAST);
        while left > 0 {
            while now() < next {
                std::hint::spin_loop();
            }
            let mut number = [0; 8];
            let _ = rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty());
            let time = now();
            next = time + INTERVAL;
            let renamed = name().is_ok_and(|name| name != before);
            let mut drawn = self.lock();
            if drawn.numbers.len() == KEPT {
                drawn.numbers.pop_front();
            }
            drawn.numbers.push_back((time, u64::from_le_bytes(number)));
            if renamed {
                drawn.renamed.get_or_insert(time);
                left -= 1;
            }
        }
    }

    fn drawn(&self) -> String {
        let drawn = self.lock();
        let lines = drawn.numbers.iter().map(|(time, number)| format!("{time} {number:x}\n"));
        let mut all: String = lines.collect();
        if let Some(time) = drawn.renamed {
            all.push_str(&format!("renamed {time}\n"));
        }
        all
    }
}

fn write() -> io::Result<String> {
    let mut seed = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut seed)?;
    let seed = u64::from_le_bytes(seed);
    let mut file = File::create_new(format!("/mnt/{}", name()?))?;
    file.write_all(&Pattern::bytes(seed, FILE))?;
    file.sync_all()?;
    File::open("/mnt")?.sync_all()?;
    Ok(format!("seed={seed}\n"))
}

fn read(name: &str, seed: &str) -> io::Result<String> {
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    let found = fs::read(format!("/mnt/{name}"))?;
    let mut wanted = Pattern::new(seed.parse().map_err(io::Error::other)?);
    Ok(format!("intact={}\n", found.len() == FILE && wanted.continues_with(&found)))
}

fn part() -> io::Result<String> {
    // SAFETY: a text that ends in NUL.
    match unsafe { libc::umount(c"/mnt".as_ptr()) } {
        0 => Ok("parted\n".to_owned()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn name() -> io::Result<String> {
    Ok(rustix::system::uname().nodename().to_string_lossy().into_owned())
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// When the kernel last said [`RESEEDED`], or 0, and how often it did. Its log has a clock of its own: a line
/// that is put into it tells how far that is off.
fn reseeded() -> io::Result<(u64, usize)> {
    // Without the end of a line nobody would see it before the next one.
    const MARK: &str = "linux-tests: now\n";
    let log = || OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let before = now();
    OpenOptions::new().write(true).open("/dev/kmsg")?.write_all(MARK.as_bytes())?;
    let middle = before + (now() - before) / 2;
    let mut log = log()?;
    let (mut line, mut said, mut times, mut mark) = ([0; 8192], None, 0, 0);
    loop {
        let len = match log.read(&mut line) {
            Ok(len) => len,
            Err(err) if err.kind() == ErrorKind::WouldBlock => break,
            // It was written over meanwhile.
            Err(err) if err.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(err) => return Err(err),
        };
        let text = String::from_utf8_lossy(&line[..len]);
        let Some((head, words)) = text.split_once(';') else { continue };
        let time = head.split(',').nth(2).and_then(|time| time.parse::<u64>().ok());
        let time = time.unwrap_or_default() * 1000;
        if words.contains(RESEEDED) {
            said = Some(time);
            times += 1;
        } else if words.contains(MARK.trim_end()) {
            mark = time;
        }
    }
    Ok((said.map_or(0, |time| (time + middle).saturating_sub(mark)), times))
}
