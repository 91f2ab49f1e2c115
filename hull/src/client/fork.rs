//! `hull fork NAME`: has copies of a machine made, and says what they are called.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api_server::SocketFile;
use serde_json::{Value, json};
use vmm::config::{MacAddress, MmdsConfig};
use vmm::machine::initial_metadata;

use super::{Api, Machine, block_on, is_socket};
use crate::cli::{ForkArgs, Result, Seccomp, millis};
use crate::exit::Code;
use crate::nursery::{self, Asked, ListenError, Zygote};
use crate::runtime;
use crate::saved::Saved;
use crate::streams;
use crate::table::Table;

/// How long nobody is let in when that failed.
const BREATH: Duration = Duration::from_millis(20);
/// Processes that are made before the machine asks for them: as many as it asks for at a time.
const BEFOREHAND: u32 = 4;
/// How long all of them may take.
const LONG: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
enum ForkError {
    #[error("the machine cannot hand over its copies")]
    Listen(#[from] ListenError),
    #[error("cannot listen for the machine to hand over its copies")]
    Thread(#[source] std::io::Error),
    #[error("all copies would be called {0}; write {{n}} where their numbers are to be")]
    Names(String),
    #[error("{0}: write the device's id, =, and what it gets")]
    Pair(&'static str),
    #[error("--mac: {0}")]
    Mac(String),
    #[error("{0}: all copies would make {1}; write {{n}} where their numbers are to be")]
    Same(&'static str, String),
    #[error("no machine named {0:?} runs; `hull fork ./{0}` copies what is saved in that folder")]
    Folder(String),
    #[error("--base is for the folder of a snapshot")]
    Base,
    #[error("--template: a saved machine is one, and stays as it is")]
    Template,
    #[error("--metadata: {0}")]
    Metadata(Box<dyn std::error::Error + Send + Sync>),
    #[error("{0}: {1} is no time")]
    Timeout(&'static str, f64),
}

/// Makes processes for who comes to a socket, which is gone with it.
struct Maker(SocketFile);

/// What the name of its socket begins with; no machine has such a name.
const SOCKET: &str = ".fork-";

impl Maker {
    /// Makes them, the first few of so many before anybody comes.
    fn start(filter: Seccomp, count: u32) -> std::result::Result<Maker, ForkError> {
        let directory = runtime::directory();
        sweep(&directory);
        let path = directory.join(format!("{SOCKET}{}", std::process::id()));
        let (listener, socket) = nursery::listen(&path)?;
        listener.set_nonblocking(false).map_err(ForkError::Thread)?;
        let serve = move || {
            let mut asked = Asked::default();
            // If there are none to be had, who asks is told.
            let made = (0..count.min(BEFOREHAND)).map_while(|_| Zygote::start(None, filter).ok());
            let mut blanks: Vec<Zygote> = made.collect();
            loop {
                asked.wait_for_room();
                match listener.accept() {
                    Ok((stream, _)) if nursery::admits(&stream) => {
                        let given = blanks.pop().and_then(|blank| blank.give(&stream).ok());
                        let given = given.or_else(|| nursery::spawn(&stream, filter).ok());
                        asked.extend(given);
                    }
                    Ok(_) => {}
                    // Descriptors come back when processes were made.
                    Err(_) => std::thread::sleep(BREATH),
                }
            }
        };
        std::thread::Builder::new().spawn(serve).map_err(ForkError::Thread)?;
        Ok(Maker(socket))
    }
}

/// Removes what those left who were killed.
fn sweep(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(SOCKET)?.parse::<u32>().ok());
        let is_dead = |id: u32| !Path::new("/proc").join(id.to_string()).exists();
        // One of another process namespace is served.
        if id.is_some_and(is_dead) && !is_served(&entry.path()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Whose copies are made.
enum Parent {
    Running(Machine),
    Saved(Box<Saved>),
}

impl Parent {
    fn find(args: &ForkArgs) -> Result<Parent> {
        let folder = Path::new(&args.machine);
        if !is_socket(&args.machine) || !folder.is_dir() {
            let machine = running(&args.machine)?;
            return match args.base {
                None => Ok(Parent::Running(machine)),
                Some(_) => Err(ForkError::Base.into()),
            };
        }
        if args.template {
            return Err(ForkError::Template.into());
        }
        Ok(Parent::Saved(Saved::find(folder, args.base.as_deref())?.into()))
    }
}

/// Has copies made, of a machine that runs or of one that was saved.
pub fn fork(args: &ForkArgs) -> Result {
    let parent = Parent::find(args)?;
    if let Some(name) = args.name.as_ref().filter(|name| args.count > 1 && !name.contains("{n}")) {
        return Err(ForkError::Names(name.clone()).into());
    }
    if args.count > 1 {
        apart(args)?;
    }
    let overrides = overrides(args)?;
    let default = nursery::default_socket();
    let is_served = || args.seccomp.is_none() && is_served(&default);
    let there = args.pool.clone().or_else(|| is_served().then(|| default.clone()));
    let filter = args.seccomp.unwrap_or_default();
    let own = there.is_none().then(|| Maker::start(filter, args.count)).transpose()?;
    let pool = there.or_else(|| own.as_ref().map(|maker| maker.0.path().to_owned()));
    let folder =
        args.disks_in.as_ref().map(|path| std::path::absolute(path).unwrap_or(path.clone()));
    let mut body = json!({
        "count": args.count, "template": args.template, "paused": args.paused, "pool": pool,
        "drives_dir": folder, "temporary_drives": args.rm,
        "overrides": overrides,
    });
    if let Some(seconds) = args.timeout {
        body["timeout_ms"] = time("--timeout", seconds)?.into();
    }
    let forked = match parent {
        Parent::Saved(saved) => saved.fork(body)?,
        Parent::Running(machine) => block_on(async {
            let mut api = Api::connect(&machine, LONG).await?;
            api.post("/fork", &body).await
        })?,
    };
    drop(own);
    let children = forked.get("children").and_then(Value::as_array).cloned().unwrap_or_default();
    let is_failed =
        |child: &&Value| child.get("fault_message").is_some() || child.get("not_ready").is_some();
    let failed = children.iter().filter(is_failed).count();
    if args.json {
        streams::print(&(serde_json::to_string_pretty(&forked)? + "\n"))?;
    } else {
        tell_drives(&forked, &args.machine.to_string_lossy());
        print(&children)?;
    }
    Ok(if failed == 0 { Code::SUCCESS } else { Code::FAILURE })
}

/// The machine that is meant. A folder that is named without a slash is none.
fn running(text: &OsStr) -> Result<Machine> {
    Machine::find(text).map_err(|err| {
        let is_folder = !is_socket(text) && Path::new(text).join("state").is_file();
        if is_folder { ForkError::Folder(text.to_string_lossy().into_owned()).into() } else { err }
    })
}

/// Refuses one file for all copies, where each makes it.
fn apart(args: &ForkArgs) -> std::result::Result<(), ForkError> {
    let is_new = |path: &str| Path::new(path).symlink_metadata().is_err();
    let is_file = |path: &str| is_new(path) || Path::new(path).is_file();
    let disks = args.disk.iter().filter_map(|text| text.split_once('='));
    let disks = disks.map(|(_, path)| ("--disk", path)).filter(|(_, path)| is_new(path));
    let sockets = args.vsock.iter().map(|path| ("--vsock", path.as_str()));
    let consoles = args.console_file.iter().map(|path| ("--console-file", path.as_str()));
    let mut all = disks.chain(sockets).chain(consoles.filter(|(_, path)| is_file(path)));
    match all.find(|(_, path)| !path.contains("{n}")) {
        Some((option, path)) => Err(ForkError::Same(option, path.to_owned())),
        None => Ok(()),
    }
}

fn is_served(path: &Path) -> bool {
    vmm::files::SocketPath::of(path)
        .and_then(|short| std::os::unix::net::UnixStream::connect(short.as_path()))
        .is_ok()
}

fn time(option: &'static str, seconds: f64) -> std::result::Result<u64, ForkError> {
    millis(seconds).ok_or(ForkError::Timeout(option, seconds))
}

type Pairs = std::result::Result<Vec<Value>, ForkError>;

/// What each copy has otherwise.
fn overrides(args: &ForkArgs) -> std::result::Result<Vec<Value>, ForkError> {
    let absolute = |path: String| std::path::absolute(&path).unwrap_or_else(|_| path.into());
    let one = |n: u32| {
        let numbered = |text: &String| text.replace("{n}", &n.to_string());
        let pair = |option, text: &String| match text.split_once('=') {
            Some((id, value)) if !id.is_empty() && !value.is_empty() => {
                Ok((id.to_owned(), numbered(&value.to_owned())))
            }
            _ => Err(ForkError::Pair(option)),
        };
        let net = |text| {
            let (id, tap) = pair("--net", text)?;
            Ok(json!({ "iface_id": id, "host_dev_name": tap }))
        };
        let disk = |text| {
            let (id, path) = pair("--disk", text)?;
            Ok(json!({ "drive_id": id, "path_on_host": absolute(path) }))
        };
        let mac = |text| {
            let (id, mac) = pair("--mac", text)?;
            Ok(json!({ "iface_id": id, "guest_mac": nth(&mac, n - 1)? }))
        };
        let cards = args.net.iter().map(net).chain(args.mac.iter().map(mac));
        let mut wish = json!({
            "network_overrides": cards.collect::<Pairs>()?,
            "drive_overrides": args.disk.iter().map(disk).collect::<Pairs>()?,
        });
        if let Some(name) = &args.name {
            wish["name"] = numbered(name).into();
        }
        if let Some(path) = &args.netns {
            wish["netns"] = json!(absolute(numbered(path)));
        }
        if let Some(path) = &args.vsock {
            wish["vsock_override"] = json!({ "uds_path": absolute(numbered(path)) });
        }
        if let Some(path) = &args.console_file {
            wish["serial_out_path"] = json!(absolute(numbered(path)));
        }
        if let Some(path) = &args.metadata {
            wish["metadata"] = metadata(absolute(numbered(path)))?;
        }
        if let Some(port) = args.hook {
            let mut hook = json!({ "port": port });
            if let Some(name) = &args.hostname {
                hook["hostname"] = numbered(name).into();
            }
            if let Some(seconds) = args.hook_timeout {
                hook["timeout_ms"] = time("--hook-timeout", seconds)?.into();
            }
            let ip = |text| {
                let (id, ip) = pair("--ip", text)?;
                let (ip, gateway) = ip.split_once(',').map_or((&*ip, None), |(a, b)| (a, Some(b)));
                Ok(json!({ "iface_id": id, "ip": ip, "gateway": gateway }))
            };
            hook["addresses"] = args.ip.iter().map(ip).collect::<Pairs>()?.into();
            wish["hook"] = hook;
        }
        Ok(wish)
    };
    (1..=args.count).map(one).collect()
}

/// What is in a file for a copy's metadata service.
fn metadata(path: PathBuf) -> std::result::Result<Value, ForkError> {
    let file = MmdsConfig { path: Some(path), ..MmdsConfig::default() };
    let contents = initial_metadata(&file).map_err(ForkError::Metadata)?;
    let path = file.path.unwrap_or_default();
    let reason = || format!("{}: it has no JSON object", path.display());
    if contents.is_object() { Ok(contents) } else { Err(ForkError::Metadata(reason().into())) }
}

/// The `n`th address behind this one.
fn nth(mac: &str, n: u32) -> std::result::Result<String, ForkError> {
    let MacAddress(first) = mac.parse().map_err(ForkError::Mac)?;
    let number = first.iter().fold(0, |all, &byte| all << 8 | u64::from(byte)) + u64::from(n);
    let [_, _, bytes @ ..] = number.to_be_bytes();
    // Behind the last one is a multicast address, or none.
    let next: std::result::Result<MacAddress, _> = MacAddress(bytes).to_string().parse();
    next.map(|mac| mac.to_string()).map_err(ForkError::Mac)
}

/// Says where the machine's own writes go from now on, where that is not where they went.
fn tell_drives(forked: &Value, machine: &str) {
    for drive in forked.get("drives").and_then(Value::as_array).into_iter().flatten() {
        let text = |key| drive.get(key).and_then(Value::as_str).unwrap_or("-");
        let (id, path) = (streams::printable(&text("drive_id")), text("path_on_host"));
        let path = streams::printable(&path);
        streams::say(&format!(
            "hull: {id} of {machine} is shared now; its own writes go to {path}\n"
        ));
    }
}

fn print(children: &[Value]) -> std::io::Result<()> {
    let text = |child: &Value, key: &str| -> String {
        match child.get(key) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => "-".to_owned(),
        }
    };
    let mut born = Vec::new();
    for (n, child) in children.iter().enumerate() {
        if let Some(why) = child.get("fault_message").and_then(Value::as_str) {
            let (n, of) = (n + 1, children.len());
            streams::say(&format!("hull: copy {n} of {of}: {}\n", streams::printable(&why)));
            continue;
        }
        if let Some(why) = child.get("not_ready").and_then(Value::as_str) {
            let name = text(child, "name");
            let (name, why) = (streams::printable(&name), streams::printable(&why));
            streams::say(&format!("hull: {name} runs, but {why}\n"));
        }
        born.push(child);
    }
    if !children.iter().any(|child| child.get("ready").is_some()) {
        let mut table = Table::new(["NAME", "PID", "API"]);
        for child in born {
            table.push(["name", "pid", "api_sock"].map(|key| text(child, key)));
        }
        return streams::print(&table.to_string());
    }
    let mut table = Table::new(["NAME", "PID", "READY", "API"]);
    for child in born {
        let [name, pid, api] = ["name", "pid", "api_sock"].map(|key| text(child, key));
        let us = child.get("ready_us").and_then(Value::as_f64).unwrap_or_default();
        let is_ready = child.get("ready").and_then(Value::as_bool).unwrap_or_default();
        let ready = if is_ready { format!("{:.1} ms", us / 1e3) } else { "no".to_owned() };
        table.push([name, pid, ready, api]);
    }
    streams::print(&table.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_copy_has_the_next_address() {
        assert_eq!(nth("06:00:ac:1e:00:fe", 3).unwrap(), "06:00:ac:1e:01:01");
        assert!(nth("06:00:ac:1e:00", 0).is_err());
        assert!(nth("06:ff:ff:ff:ff:ff", 1).is_err(), "the next one is a multicast address");
    }
}
