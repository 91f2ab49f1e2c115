//! Having copies made by whoever listens at a pool's socket.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use devices::virtio::vsock;

use super::{Child, HandOverError, Notice, Outcome, Seed, announce, outcome};
use crate::config::VmConfig;
use crate::files::SocketPath;
use crate::hook::Hook;

/// Children that are waited for at a time.
const AT_ONCE: usize = 4;
/// After so long who has no place for another connection is asked again.
const BREATH: Duration = Duration::from_millis(5);

fn no_pool(path: &Path) -> impl FnOnce(io::Error) -> HandOverError {
    let path = path.to_owned();
    move |source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            HandOverError::Pool { path, source }
        }
        _ => HandOverError::Talk { verb: "connect to", source },
    }
}

/// Connects to who makes processes, before `deadline`.
fn connect(pool: &Path, deadline: Instant) -> Result<UnixStream, HandOverError> {
    loop {
        match connect_at_once(pool)? {
            Some(stream) => return Ok(stream),
            None if Instant::now() >= deadline => return Err(HandOverError::Late),
            None => std::thread::sleep(BREATH),
        }
    }
}

/// The same, and nothing if it would have to be waited for.
fn connect_at_once(pool: &Path) -> Result<Option<UnixStream>, HandOverError> {
    let connected = SocketPath::of(pool).and_then(|short| vsock::connect(short.as_path()));
    match connected {
        Ok(socket) => Ok(Some(socket.into())),
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(err) => Err(no_pool(pool)(err)),
    }
}

/// Children that are to be made.
#[derive(Debug)]
pub struct Birth {
    children: Vec<Child>,
    /// The machine, as they are told before they have it.
    config: VmConfig,
    /// Which start of which host its state is from.
    host: Option<String>,
    pool: PathBuf,
    /// How long one may take to run.
    patience: Duration,
    /// Who serves the first of them, and was told so: it makes what it can before there is a seed.
    first: Option<UnixStream>,
    /// Of how many there was a word, or an end.
    heard: AtomicUsize,
    /// No others are asked for: of those that were there was not a word.
    is_stalled: AtomicBool,
}

impl Birth {
    /// Has the first child of the machine of `config`, whose state is from `host`, made at `pool` as far as that can
    /// be done without the machine. Each may take as long as `patience` to run.
    ///
    /// # Errors
    /// Nobody makes processes.
    pub fn begin(
        children: Vec<Child>,
        config: VmConfig,
        host: Option<String>,
        pool: PathBuf,
        patience: Duration,
    ) -> Result<Birth, HandOverError> {
        let first = connect_at_once(&pool)?;
        let (heard, is_stalled) = Default::default();
        let mut birth = Birth { children, config, host, pool, patience, first, heard, is_stalled };
        birth.announce_first();
        Ok(birth)
    }

    /// The children.
    pub fn children(&self) -> &[Child] {
        &self.children
    }

    /// The machine, as they are told.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Tells them another configuration, if it is another by now.
    pub fn reconfigure(&mut self, config: VmConfig) {
        if config != self.config {
            (self.first, self.config) = (None, config);
        }
    }

    /// Who makes the only child, if there is no other and it was told, and how long that may take.
    pub fn only_one(&self) -> Option<(&UnixStream, Duration)> {
        match (&self.first, self.children.as_slice()) {
            (Some(stream), [child]) => Some((stream, self.patience_with(child))),
            _ => None,
        }
    }

    fn patience_with(&self, child: &Child) -> Duration {
        self.patience + child.hook.as_ref().map_or(Duration::ZERO, Hook::patience)
    }

    fn notice(&self, child: &Child) -> Notice {
        let config = self.config.clone();
        let disks = config.disk.iter().any(|disk| !disk.ro);
        Notice { child: child.clone(), config, host: self.host.clone(), disks }
    }

    fn announce_first(&mut self) {
        let Some((stream, child)) = self.first.take().zip(self.children.first()) else { return };
        // If it is gone, another is asked for.
        let told = announce(&stream, &self.notice(child), Instant::now());
        self.first = told.is_ok().then_some(stream);
    }

    /// Has one child made.
    fn one(&self, n: usize, child: &Child, seed: &Seed) -> Result<Outcome, HandOverError> {
        let deadline = Instant::now() + self.patience_with(child);
        let give = |stream: &UnixStream| {
            let sent = seed.send(stream, deadline);
            if sent.is_err() {
                // Who still waits for it need not any more; who had reason not to take it has said so.
                let _ = stream.shutdown(Shutdown::Write);
            }
            let outcome = outcome(stream, deadline);
            match (sent, outcome) {
                (Err(error), Ok(Err(_)) | Err(_)) if !error.is_over() => Err(error),
                (_, outcome) => outcome,
            }
        };
        if let Some(stream) = self.first.as_ref().filter(|_| n == 0) {
            match give(stream) {
                // Its process ended before it was needed.
                Err(HandOverError::Silent) => {}
                outcome => return outcome,
            }
        }
        let stream = connect(&self.pool, deadline)?;
        announce(&stream, &self.notice(child), deadline)?;
        give(&stream)
    }

    /// Has one child made, unless nobody makes any. Who stands still keeps nobody waiting for each of ten thousand.
    fn one_more(&self, n: usize, child: &Child, seed: &Seed) -> Result<Outcome, HandOverError> {
        if self.is_stalled.load(Ordering::Relaxed) {
            let (path, patience) = (self.pool.clone(), self.patience);
            return Err(HandOverError::Stalled { path, patience });
        }
        let before = self.heard.load(Ordering::Relaxed);
        let outcome = self.one(n, child, seed);
        if !matches!(outcome, Err(HandOverError::Late)) {
            self.heard.fetch_add(1, Ordering::Relaxed);
        } else if self.heard.load(Ordering::Relaxed) == before {
            self.is_stalled.store(true, Ordering::Relaxed);
        }
        outcome
    }

    /// Has each child made, some at a time, and says what became of them, in order.
    pub fn deliver(&self, seed: &Seed) -> Vec<Result<Outcome, HandOverError>> {
        let next = AtomicUsize::new(0);
        let some = || {
            let mut done = Vec::new();
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(child) = self.children.get(n) else { return done };
                done.push((n, self.one_more(n, child, seed)));
            }
        };
        let mut all = std::thread::scope(|scope| {
            let threads = AT_ONCE.min(self.children.len()).saturating_sub(1);
            // Fewer will do, where there are none to be had.
            let others: Vec<_> = (0..threads)
                .filter_map(|_| std::thread::Builder::new().spawn_scoped(scope, some).ok())
                .collect();
            let mut all = some();
            for other in others {
                all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            all
        });
        all.sort_unstable_by_key(|(n, _)| *n);
        all.into_iter().map(|(_, outcome)| outcome).collect()
    }
}
