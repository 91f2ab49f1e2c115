//! Copies of a machine that runs, and what their guests know of it. What the guest is at is in [`crate::warm`].

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::snapshot::healthy;
use super::{Case, check, vsock};
use crate::guest::{Failure, Guest, Machine, STEP};
use crate::pattern::Pattern;
use crate::site::{Network, Site};
use crate::warm::{FILE, PORT};

pub const CASES: &[(&str, Case)] = &[("fork::copies_know_who_they_are", copies_know_who_they_are)];

const COPIES: usize = 20;
/// Two more, whose guests draw random numbers without a pause.
const DRAWING: usize = 2;
/// How far a copy's time of day may be off when it is asked, in seconds.
const SLOW: u64 = 60;

/// In a network namespace with an interface for the machine and each of its copies.
fn copies_know_who_they_are(site: &Site) -> Result<(), Failure> {
    let network = site.network();
    let body = || {
        let mut taps = vec![(testnet::NAME.to_owned(), network.host())];
        for number in 1..=COPIES + DRAWING {
            testnet::make_tap(&tap(number), false)?;
            taps.push((tap(number), format!("172.31.{number}.1")));
        }
        for (tap, address) in taps {
            run(Command::new("ip").args(["addr", "add", &format!("{address}/30"), "dev", &tap]))
                .map_err(|failure| failure.to_string())?;
        }
        forked(site, network).map_err(|failure| failure.to_string().into())
    };
    testnet::in_namespace(false, body).map_err(|error| error.to_string().into())
}

fn tap(number: usize) -> String {
    format!("tap{number}")
}

fn run(command: &mut Command) -> Result<Vec<u8>, Failure> {
    let output = command.output()?;
    check(output.status.success(), || format!("{command:?}: {output:?}"))?;
    Ok(output.stdout)
}

fn forked(site: &Site, network: Network) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("v");
    let image = folder.path().join("data");
    fs::copy(site.file("root.ext4"), &image)?;
    let mut guest = Machine::with_kernel(site, "generic.vmlinuz", "hooked.initramfs")?
        .memory("192M")
        .option("--name", "warm")
        .disk(&vsock::program(folder.path())?, ",ro")
        .disk(&image, "")
        .option("--net", format!("tap={},mac=06:00:00:00:ff:ff", testnet::NAME))
        .option("--vsock", format!("path={},cid=42", socket.display()))
        .cmdline(network.cmdline())
        .boot()?;
    vsock::prepare(&mut guest, "vda")?;
    guest.run("mount -t ext4 /dev/vdb /mnt")?;
    guest.run("/tmp/peer warm >/dev/null & /bin/guest-hook >/tmp/hook 2>&1 & :")?;
    guest.run("while ! busybox grep -q listening /tmp/hook; do sleep 0.1; done")?;
    // Of a time that no copy may have, and its log empty but for what comes.
    guest.run("busybox date -s @1000000000 >/dev/null; dmesg -c >/dev/null")?;
    let parent = over_network(&network.guest(), "who")?;

    let mut disks = Disks::of("hull", &socket)?;

    ask_vsock(&socket, "draw")?;
    let drawing = Copies::fork(site, &guest, COPIES, DRAWING)?;
    let window = Window::of(&drawing, &socket)?;
    eprintln!("two copies that draw: {window}");
    drop(drawing);
    let mut resume = Command::new(&site.hull);
    run(resume.args(["resume", "warm"]).env("XDG_RUNTIME_DIR", guest.runtime()))?;
    guest.run("busybox hostname stop && sleep 1 && busybox hostname hull")?;

    let copies = Copies::fork(site, &guest, 0, COPIES)?;
    eprintln!("{COPIES} copies: {copies}");
    let (mut all, mut random) =
        (BTreeSet::new(), BTreeSet::from([value(&fields(&parent), "random")?]));
    for copy in &copies.0 {
        let number = copy.number;
        let ways =
            [ask_vsock(&copy.socket(&socket), "who")?, over_network(&copy.address(), "who")?];
        for who in ways {
            let fields = fields(&who);
            let has = |name: &str, wanted: &str| {
                let found = value(&fields, name)?;
                check(found == wanted, || format!("{}: {name} is {found}, not {wanted}", copy.name))
            };
            has("hostname", &format!("host-{number}"))?;
            has("mac", &format!("06:00:00:00:00:{number:02x}"))?;
            has("intact", "true")?;
            has("times", "1")?;
            let seconds: u64 = value(&fields, "seconds")?.parse()?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
            check(now.abs_diff(seconds) <= SLOW, || format!("{seconds} there, {now} here"))?;
            random.insert(value(&fields, "random")?);
            all.insert(value(&fields, "hostname")?);
        }
    }
    check(all.len() == COPIES, || format!("{} names", all.len()))?;
    check(random.len() == 2 * COPIES + 1, || format!("{} random numbers", random.len()))?;
    disks.diverge(&copies, &socket)?;
    let files: Vec<_> = copies.0.iter().map(|copy| (copy.number, copy.disk.clone())).collect();
    drop(copies);
    for (number, file) in files {
        disks.are_apart(site, &format!("host-{number}"), &file)?;
    }
    check(disks.has(&socket, "hull")?, || "the parent's file changed".into())?;

    // The machine itself is none.
    let log = healthy(&mut guest)?;
    check(!log.contains(crate::warm::RESEEDED), || {
        format!("the parent takes itself for a copy: {log}")
    })?;
    let who = over_network(&network.guest(), "who")?;
    check(who.contains("hostname=hull ") && who.contains("intact=true"), || who.clone())?;
    guest.power_off()
}

/// Files that guests wrote to their disks, by the names of both.
struct Disks(BTreeMap<String, u64>);

impl Disks {
    /// With that of one guest, from before there are others.
    fn of(name: &str, socket: &Path) -> Result<Disks, Failure> {
        let mut disks = Disks(BTreeMap::new());
        disks.write(name, socket)?;
        Ok(disks)
    }

    fn write(&mut self, name: &str, socket: &Path) -> Result<(), Failure> {
        let answer = ask_vsock(socket, "write")?;
        let seed = value(&fields(&answer), "seed")?.parse()?;
        self.0.insert(name.to_owned(), seed);
        check(self.has(socket, name)?, || format!("{name} does not read what it wrote"))
    }

    /// The guest has that file, as it was written.
    fn has(&self, socket: &Path, name: &str) -> Result<bool, Failure> {
        let answer = ask_vsock(socket, &format!("read {name} {}", self.0[name]))?;
        Ok(answer.trim() == "intact=true")
    }

    /// Each copy writes one, which no other has, and lets its disk go.
    fn diverge(&mut self, copies: &Copies, socket: &Path) -> Result<(), Failure> {
        for copy in &copies.0 {
            self.write(&format!("host-{}", copy.number), &copy.socket(socket))?;
        }
        for copy in &copies.0 {
            let (own, socket) = (format!("host-{}", copy.number), copy.socket(socket));
            for name in [&own, "hull"] {
                check(self.has(&socket, name)?, || format!("{own}: {name} changed"))?;
            }
            for name in self.0.keys().filter(|name| **name != own && *name != "hull") {
                // It cannot open it.
                let answer = ask_vsock(&socket, &format!("read {name} 0"))?;
                check(answer.is_empty(), || format!("{own} has {name}: {answer}"))?;
            }
            let answer = ask_vsock(&socket, "part")?;
            check(answer.trim() == "parted", || format!("{own} keeps its disk: {answer}"))?;
        }
        Ok(())
    }

    /// The disk of the guest called `name`, which is gone, is whole, and has its own file and the one from before
    /// and none of any other.
    fn are_apart(&self, site: &Site, name: &str, disk: &Path) -> Result<(), Failure> {
        const BLOCK: usize = 1024;
        let raw = disk.with_extension("raw");
        let deadline = Instant::now() + STEP;
        // It is in use until the last thread of its machine is gone.
        loop {
            let mut command = Command::new(&site.hull);
            let output =
                command.args(["disk", "commit"]).arg(disk).arg("--output").arg(&raw).output()?;
            if output.status.success() {
                break;
            }
            check(Instant::now() < deadline, || format!("{command:?}: {output:?}"))?;
        }
        run(Command::new(site.file("e2fsck")).args(["-f", "-n"]).arg(&raw))?;
        let bytes = fs::read(&raw)?;
        let blocks: HashSet<&[u8]> = bytes.chunks(BLOCK).collect();
        for (of, seed) in &self.0 {
            let file = Pattern::bytes(*seed, FILE);
            let found = file.chunks(BLOCK).filter(|block| blocks.contains(block)).count();
            let wanted = if of == name || of == "hull" { FILE / BLOCK } else { 0 };
            check(found == wanted, || format!("{found} of {wanted} blocks of {of} in {name}"))?;
        }
        fs::remove_file(raw)?;
        Ok(())
    }
}

/// A copy.
struct Copy {
    number: usize,
    name: String,
    pid: i32,
    ready_us: u64,
    disk: PathBuf,
}

impl Copy {
    fn socket(&self, parent: &Path) -> PathBuf {
        format!("{}.{}", parent.display(), self.name).into()
    }

    fn address(&self) -> String {
        format!("172.31.{}.2", self.number)
    }
}

/// Copies, which end with this.
struct Copies(Vec<Copy>);

impl Copies {
    /// Makes `count` of them, with the interfaces behind the first `skip`.
    fn fork(site: &Site, guest: &Guest, skip: usize, count: usize) -> Result<Copies, Failure> {
        let mut command = Command::new(&site.hull);
        command.args(["fork", "warm", "--json", "--hook", "--hook-timeout", "180", "-n"]);
        command.arg(count.to_string()).env("XDG_RUNTIME_DIR", guest.runtime());
        if skip == 0 {
            command.args(["--name", "copy-{n}", "--net", "net0=tap{n}", "--hostname", "host-{n}"]);
            command.args(["--ip", "net0=172.31.{n}.2/30", "--mac", "net0=06:00:00:00:00:01"]);
        } else {
            let base = skip / 10;
            check(skip.is_multiple_of(10) && count < 10, || "numbers are made of digits".into())?;
            // The machine itself stays halted: its draws would take the processor from theirs.
            command.args(["--template", "--name", "drawing-{n}", "--hostname", "other-{n}"]);
            command.args(["--net", &format!("net0=tap{base}{{n}}")]);
            command.args(["--ip", &format!("net0=172.31.{base}{{n}}.2/30")]);
        }
        let start = Instant::now();
        let output = command.output()?;
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let mut copies = Copies(Vec::new());
        let children = answer["children"].as_array().cloned().unwrap_or_default();
        for (number, child) in (skip + 1..).zip(&children) {
            let name = child["name"].as_str().unwrap_or_default().to_owned();
            let (pid, ready_us) = (child["pid"].as_i64(), child["ready_us"].as_u64());
            let (Some(pid), Some(ready_us)) = (pid, ready_us) else { continue };
            let disk = child["drives"][0]["path_on_host"].as_str().unwrap_or_default().into();
            copies.0.push(Copy { number, name, pid: pid as i32, ready_us, disk });
        }
        check(output.status.success() && copies.0.len() == count, || {
            guest
                .failure(&format!("{command:?} after {:?}: {output:?}", start.elapsed()))
                .to_string()
        })?;
        eprintln!(
            "{count} copies in {:?}, the machine halted {} us",
            start.elapsed(),
            answer["pause_us"]
        );
        Ok(copies)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in &self.0 {
            // SAFETY: the call has no memory arguments. They are nobody's children: none has another's number.
            unsafe { libc::kill(copy.pid, libc::SIGKILL) };
        }
    }
}

impl std::fmt::Display for Copies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut times: Vec<u64> = self.0.iter().map(|copy| copy.ready_us).collect();
        times.sort_unstable();
        let at = |place: usize| times.get(place).copied().unwrap_or_default() as f64 / 1e3;
        let (middle, last) = (times.len() / 2, times.len().saturating_sub(1));
        write!(
            f,
            "ready after {:.1}, {:.1}, {:.1} ms (least, median, most)",
            at(0),
            at(middle),
            at(last)
        )
    }
}

/// What happened in two copies between the machine's last draw and the end of their common fate.
struct Window([Passed; DRAWING]);

/// In milliseconds of the guest's, from its last draw before it was copied.
struct Passed {
    reseeded: f64,
    renamed: f64,
    ready_us: u64,
    /// Draws that gave the same number in both copies, and the time of the first that did not.
    same: usize,
    differs: f64,
}

impl Window {
    fn of(copies: &Copies, socket: &Path) -> Result<Window, Failure> {
        let [first, second] = copies.0.as_slice() else { return Err("not two copies".into()) };
        // What they go on drawing ends by itself.
        let drawn = |copy: &Copy| -> Result<_, Failure> {
            let deadline = Instant::now() + STEP;
            let mut text = ask_vsock(&copy.socket(socket), "drawn")?;
            while !text.contains("renamed ") {
                check(Instant::now() < deadline, || "it was not renamed".into())?;
                text = ask_vsock(&copy.socket(socket), "drawn")?;
            }
            let who = ask_vsock(&copy.socket(socket), "who")?;
            let reseeded: u64 = value(&fields(&who), "reseeded")?.parse()?;
            check(reseeded > 0, || format!("{} does not know that it is a copy", copy.name))?;
            Ok((Drawn::read(&text)?, reseeded))
        };
        let (one, other) = (drawn(first)?, drawn(second)?);
        let before: BTreeSet<u64> = one.0.numbers.iter().map(|(time, _)| *time).collect();
        let last =
            other.0.numbers.iter().map(|(time, _)| *time).filter(|time| before.contains(time));
        let last = last.max().ok_or("they have nothing in common")?;
        let after = |drawn: &Drawn| -> Vec<(u64, u64)> {
            drawn.numbers.iter().copied().filter(|(time, _)| *time > last).collect()
        };
        let (own, others) = (after(&one.0), after(&other.0));
        let same = own.iter().zip(&others).take_while(|((_, a), (_, b))| a == b).count();
        let ms = |time: u64| time.saturating_sub(last) as f64 / 1e6;
        let passed =
            |(drawn, reseeded): &(Drawn, u64), numbers: &[(u64, u64)], copy: &Copy| Passed {
                reseeded: ms(*reseeded),
                renamed: ms(drawn.renamed),
                ready_us: copy.ready_us,
                same,
                differs: numbers.get(same).map_or(f64::NAN, |(time, _)| ms(*time)),
            };
        let window = Window([passed(&one, &own, first), passed(&other, &others, second)]);
        let known: BTreeSet<u64> = own.iter().skip(same).map(|(_, number)| *number).collect();
        let again = others.iter().skip(same).filter(|(_, number)| known.contains(number)).count();
        check(again == 0, || format!("{again} numbers came again: {window}"))?;
        Ok(window)
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for Passed { reseeded, renamed, ready_us, same, differs } in &self.0 {
            let ready = *ready_us as f64 / 1e3;
            write!(
                f,
                "log line after {reseeded:.1} ms, host name after {renamed:.1} ms, ready after {ready:.1} ms \
                 (the host's), {same} draws the same, the first other one after {differs:.1} ms; "
            )?;
        }
        Ok(())
    }
}

/// What a guest drew, and when, and when it was renamed.
struct Drawn {
    numbers: Vec<(u64, u64)>,
    renamed: u64,
}

impl Drawn {
    fn read(text: &str) -> Result<Drawn, Failure> {
        let mut drawn = Drawn { numbers: Vec::new(), renamed: 0 };
        for line in text.lines() {
            let (first, second) = line.split_once(' ').ok_or("not a draw")?;
            match first {
                "renamed" => drawn.renamed = second.parse()?,
                time => drawn.numbers.push((time.parse()?, u64::from_str_radix(second, 16)?)),
            }
        }
        Ok(drawn)
    }
}

fn ask_vsock(socket: &Path, what: &str) -> Result<String, Failure> {
    let mut stream = vsock::connect(socket, PORT.into())?;
    stream.write_all(format!("{what}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn over_network(address: &str, what: &str) -> Result<String, Failure> {
    let address: SocketAddr = format!("{address}:{PORT}").parse()?;
    let deadline = Instant::now() + STEP;
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(30)) {
            Ok(stream) => break stream,
            Err(error) => check(Instant::now() < deadline, || format!("{address}: {error}"))?,
        }
    };
    stream.set_read_timeout(Some(STEP))?;
    stream.write_all(format!("{what}\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn fields(line: &str) -> BTreeMap<&str, &str> {
    line.split_whitespace().filter_map(|word| word.split_once('=')).collect()
}

fn value(fields: &BTreeMap<&str, &str>, name: &str) -> Result<String, Failure> {
    let value = fields.get(name).ok_or_else(|| format!("no {name} in {fields:?}"))?;
    Ok((*value).to_owned())
}
