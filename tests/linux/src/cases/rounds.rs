//! A machine that is saved, ended and goes on, round after round, while its disks, its network and its
//! sockets are under load and its programs look at the clock. What they do is in [`crate::load`]. In turns
//! all of it is saved, and what changed since.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::snapshot::{healthy, save};
use super::{Case, check, disk, network, vsock};
use crate::guest::{Failure, Guest, Machine, STEP};
use crate::load::{self, PIECE, PIECES};
use crate::site::{Network, Site};

pub const CASES: &[(&str, Case)] = &[
    ("rounds::tsc", |site| rounds(site, "tsc")),
    ("rounds::kvm_clock", |site| rounds(site, "kvm-clock")),
];

const ROUNDS: u64 = 20;
/// What has to be done in each of them, as [`crate::load`] counts it. More than what was under way.
const LEAST: &[(&str, u64)] =
    &[("readings", 200), ("disk", 8), ("files", 1), ("net", 256 << 10), ("vsock", 256 << 10)];
/// How long a CPU may be away before the guest's kernel complains; half of what is usual.
const WATCHDOG: Duration = Duration::from_secs(10);
const PORT: u16 = 7800;
const STATUS: &str = "/dev/shm/load";
const CLOCK_SOURCE: &str = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";

/// In a network namespace, whose interface outlives each of the machines: the connection over it has to.
fn rounds(site: &Site, clock_source: &str) -> Result<(), Failure> {
    let network = site.network();
    let body = || {
        let address = format!("{}/30", network.host());
        let mut command = Command::new("ip");
        let output = command.args(["addr", "add", &address, "dev", testnet::NAME]).output()?;
        check(output.status.success(), || format!("{command:?}: {output:?}"))
            .and_then(|()| under_load(site, network, clock_source))
            .map_err(|failure| failure.to_string().into())
    };
    testnet::in_namespace(false, body).map_err(|error| error.to_string().into())
}

fn under_load(site: &Site, network: Network, clock_source: &str) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("v.sock");
    let files = disk::root_disk(site)?;
    let pieces = disk::blank_disk((PIECE * PIECES) as u64 >> 20)?;
    let started = Instant::now();
    let mut guest = Machine::new(site)?
        .memory("128M")
        .option("--name", "saved")
        .option("--cpus", "2")
        .disk(&vsock::program(folder.path())?, ",ro")
        .disk(files.path(), "")
        .disk(pieces.path(), "")
        .option("--net", format!("tap={}", testnet::NAME))
        .option("--vsock", format!("path={},cid=42", socket.display()))
        .cmdline(network.cmdline())
        // Without an invariant TSC, as in the lab, a kernel with two CPUs would not take it.
        .cmdline(format!("clocksource={clock_source} tsc=reliable"))
        .boot()?;
    vsock::prepare(&mut guest, "vda")?;
    guest.run("mount -t ext4 /dev/vdb /mnt")?;
    have_it_complain_early(&mut guest)?;
    guest.expect(CLOCK_SOURCE, clock_source)?;

    let host = Host::start(network, &socket)?;
    let address = format!("{}:{PORT}", network.host());
    guest.run(&format!("/tmp/peer load {address} /dev/vdc /mnt {STATUS} & :"))?;
    works(&mut guest, 0)?;
    let mut times = Times::default();
    for round in 1..=ROUNDS {
        // Once, whoever counts the time in between would find that its CPUs were away.
        let away = (round == ROUNDS / 2).then_some(WATCHDOG + Duration::from_secs(2));
        guest = go_on(site, guest, folder.path(), round, away, &mut times)?;
        let mut watch = Instant::now();
        for name in works(&mut guest, round)? {
            *times.last.entry(name).or_default() += 1;
        }
        times.working.push(lap(&mut watch));
    }
    eprintln!("{ROUNDS} rounds with {clock_source}: {times}");

    guest.run(&format!("touch {STATUS}.stop; wait"))?;
    let counts = counts(&mut guest)?;
    check(counts.contains_key("over"), || format!("the load ended early: {counts:?}"))?;
    for resets in ["resets", "idle-resets"] {
        check(counts[resets] == ROUNDS, || format!("{} {resets}", counts[resets]))?;
    }
    host.join()?;
    healthy(&mut guest)?;
    guest.expect(CLOCK_SOURCE, clock_source)?;
    let uptime: f64 = guest.run("cut -d' ' -f1 /proc/uptime")?.parse()?;
    let passed = started.elapsed().as_secs_f64();
    check(uptime <= passed, || format!("{uptime} s passed in the guest, {passed} s outside"))?;
    let written = guest.run(&format!("cat {STATUS}.pieces"))?;
    guest.run("umount /mnt")?;
    guest.power_off()?;
    compare(pieces.path(), &written)?;
    let mut command = Command::new(site.file("e2fsck"));
    let output = command.args(["-f", "-n"]).arg(files.path()).output()?;
    check(output.status.success(), || format!("{command:?}: {output:?}"))
}

/// Has the guest's kernel complain of a CPU that is away for half of the usual time, and clears its
/// log: what it says of the CPU at boot is another matter, and the lab's is inconsistent in its eyes.
fn have_it_complain_early(guest: &mut Guest) -> Result<(), Failure> {
    // The watchdog barks after twice its threshold.
    let threshold = WATCHDOG.as_secs() / 2;
    guest.run(&format!("echo {threshold} >/proc/sys/kernel/watchdog_thresh"))?;
    let timeout = "/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout";
    guest.run(&format!("echo {} >{timeout}", WATCHDOG.as_secs()))?;
    guest.run("dmesg -c >/dev/null")?;
    Ok(())
}

/// Saves a machine in `folder` and ends it: all of it, and in each second round what changed since the one
/// before. Returns the one that goes on from there, perhaps some time later.
fn go_on(
    site: &Site,
    mut guest: Guest,
    folder: &Path,
    round: u64,
    away: Option<Duration>,
    times: &mut Times,
) -> Result<Guest, Failure> {
    let mut watch = Instant::now();
    let (whole, diff) = (folder.join("whole"), folder.join("diff"));
    let (place, options): (_, &[&str]) = if round.is_multiple_of(2) {
        (&diff, &["--stop", "--diff"])
    } else {
        (&whole, &["--stop"])
    };
    save(site, &guest, options, place)?;
    guest.wait_success()?;
    times.saving.push(lap(&mut watch));
    if let Some(away) = away {
        thread::sleep(away);
        lap(&mut watch);
    }
    let guest = Machine::restored(site, place)?.option("--name", "saved").start_restored()?;
    times.going_on.push(lap(&mut watch));
    // Such as that a disk is not as it was.
    check(guest.stderr().is_empty(), || guest.failure("there are warnings").to_string())?;
    if *place == whole {
        // The next round stands on it.
        return Ok(guest);
    }
    let mut command = Command::new(&site.hull);
    let output = command.args(["snapshot", "show"]).arg(place).output()?;
    let shown = String::from_utf8_lossy(&output.stdout);
    check(shown.contains("../whole"), || format!("all of it was saved, not a diff: {output:?}"))?;
    // What is mapped stays there.
    fs::remove_dir_all(&whole)?;
    fs::remove_dir_all(&diff)?;
    Ok(guest)
}

/// Compares the disk with how often each piece of it was written.
fn compare(disk: &Path, written: &str) -> Result<(), Failure> {
    let content = fs::read(disk)?;
    let counts = written.lines().map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    check(counts.len() == PIECES, || format!("{} pieces", counts.len()))?;
    for (index, (found, count)) in content.chunks(PIECE).zip(counts).enumerate() {
        check(found == load::piece(index, count), || {
            format!("piece {index} of the disk is not as it was written the {count}th time")
        })?;
    }
    Ok(())
}

/// Waits until everything in the guest has got on since now, and each connection that a reset ends was
/// ended once a round. Returns what was waited for last.
fn works(guest: &mut Guest, round: u64) -> Result<Vec<&'static str>, Failure> {
    // What is read then was counted from now on.
    guest.run(&format!(": >{STATUS}"))?;
    let deadline = Instant::now() + STEP;
    let before = counts(guest)?;
    let resets = ["resets", "idle-resets"].map(|name| (name, round));
    let least = LEAST.iter().map(|(name, more)| (*name, before[*name] + more)).chain(resets);
    let mut behind = Vec::new();
    loop {
        let now = counts(guest)?;
        let last = behind;
        behind = least.clone().filter(|(name, least)| now[*name] < *least).collect();
        if behind.is_empty() {
            return Ok(last.into_iter().map(|(name, _)| name).collect());
        }
        check(Instant::now() < deadline, || {
            let log = guest.run("dmesg | tail -n 20").unwrap_or_default();
            format!("round {round}: not there in {STEP:?}: {behind:?}; there are {now:?}\n{log}")
        })?;
    }
}

/// What the guest's load says of itself, as soon as it does.
fn counts(guest: &mut Guest) -> Result<BTreeMap<String, u64>, Failure> {
    let deadline = Instant::now() + STEP;
    loop {
        thread::sleep(load::REPORT);
        // The shell does it by itself: a new process would take longer.
        let (status, line) = guest.attempt(&format!("read -r counts <{STATUS} && echo $counts"))?;
        if status != 0 {
            check(Instant::now() < deadline, || guest.failure("no word of the load").to_string())?;
            continue;
        }
        let counts = line.split_whitespace().map(|word| {
            let (name, count) = word.split_once('=')?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        return counts
            .collect::<Option<_>>()
            .ok_or_else(|| format!("the load {}", line.trim()).into());
    }
}

/// The host's ends of the guest's connections.
struct Host([JoinHandle<Result<(), Failure>>; 3]);

impl Host {
    fn start(network: Network, socket: &Path) -> Result<Host, Failure> {
        let listener = TcpListener::bind((network.host(), PORT))?;
        let net = thread::spawn(move || {
            let stream = network::accept(&listener)?;
            Ok(load::echo(&File::from(OwnedFd::from(stream)))?)
        });
        let listener = vsock::listen(socket, load::BUSY)?;
        let busy = thread::spawn(move || {
            for _ in 0..=ROUNDS {
                let stream = File::from(OwnedFd::from(vsock::accept(&listener)?));
                load::echo(&stream).or_else(ended_with_its_machine)?;
            }
            Ok(())
        });
        let listener = vsock::listen(socket, load::IDLE)?;
        let idle = thread::spawn(move || {
            let mut streams = Vec::new();
            for _ in 0..=ROUNDS {
                streams.push(vsock::accept(&listener)?);
            }
            // Closed by this end, the last one would make the guest's program fail.
            thread::park_timeout(STEP);
            Ok(())
        });
        Ok(Host([net, busy, idle]))
    }

    fn join(self) -> Result<(), Failure> {
        for thread in self.0 {
            thread.thread().unpark();
            thread.join().map_err(|_| "a thread of the host's panicked")??;
        }
        Ok(())
    }
}

fn ended_with_its_machine(error: io::Error) -> io::Result<()> {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionReset | UnexpectedEof => Ok(()),
        _ => Err(error),
    }
}

/// What the rounds took.
#[derive(Default)]
struct Times {
    saving: Vec<Duration>,
    going_on: Vec<Duration>,
    working: Vec<Duration>,
    /// What was waited for last, and how often.
    last: BTreeMap<&'static str, u32>,
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [
            ("saved and ended", &self.saving),
            ("gone on", &self.going_on),
            ("all at work", &self.working),
        ];
        for (name, times) in parts {
            let sum = times.iter().sum::<Duration>().as_secs_f64();
            let most = times.iter().max().map_or(0.0, Duration::as_secs_f64);
            write!(f, "{name} in {sum:.1} s, {most:.1} s at most; ")?;
        }
        write!(f, "waited for last: {:?}", self.last)
    }
}

/// The time since `watch`, which starts anew.
fn lap(watch: &mut Instant) -> Duration {
    let before = std::mem::replace(watch, Instant::now());
    watch.duration_since(before)
}
