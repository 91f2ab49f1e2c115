//! Machines that are forked, from the command line.

mod disks;
mod door;
mod hostile;
mod identity;
mod limits;
mod saved;
mod steps;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use machine_tests::{Family, HugePages, Outcome, Running, eventually, wait_in_file};
use serde_json::Value;

/// `hull fork` with these words.
fn fork(family: &Family, words: &[&str]) -> Outcome {
    words.iter().fold(family.hull("fork"), |fork, word| fork.flag(word)).run()
}

fn verb(family: &Family, words: &[&str]) -> Outcome {
    let (subcommand, words) = words.split_first().unwrap();
    words.iter().fold(family.hull(subcommand), |hull, word| hull.flag(word)).run()
}

/// What became of each child.
fn children(outcome: &Outcome) -> Vec<Value> {
    let forked: Value = serde_json::from_str(&outcome.stdout)
        .unwrap_or_else(|_| panic!("{}\n{}", outcome.stdout, outcome.stderr));
    forked["children"].as_array().unwrap().clone()
}

fn names(children: &[Value]) -> Vec<&str> {
    children.iter().map(|child| child["name"].as_str().unwrap()).collect()
}

fn pid(child: &Value) -> i32 {
    i32::try_from(child["pid"].as_u64().unwrap()).unwrap()
}

/// Kills a child, unless it is dead, and waits until nothing of it is there.
fn kill(child: &Value) {
    // SAFETY: kill has no memory arguments; the child is one of this test.
    unsafe { libc::kill(pid(child), libc::SIGKILL) };
    let process = format!("/proc/{}", pid(child));
    let gone = || {
        // Its files are closed by the last of its threads.
        let threads = fs::read_dir(format!("{process}/task")).map_or(0, Iterator::count);
        let state = fs::read_to_string(format!("{process}/stat")).unwrap_or_default();
        threads == 0 || (threads == 1 && state.contains(") Z "))
    };
    eventually(gone, || format!("{child} does not die"));
}

/// Forks `name` into `count` children that write what they say to `NAME.log`, and waits until each found its
/// memory as it was, twice.
fn fork_at_work(family: &Family, name: &str, count: u32, more: &[&str]) -> Vec<Value> {
    fork_to_work(family, name, name, count, more)
}

/// The same of `parent`, with copies that are called `name` and numbers.
fn fork_to_work(
    family: &Family,
    parent: &str,
    name: &str,
    count: u32,
    more: &[&str],
) -> Vec<Value> {
    let number = count.to_string();
    let console = family.at(&format!("{name}-{{n}}.log"));
    let console = console.to_str().unwrap();
    let named = format!("{name}-{{n}}");
    let words = [parent, "--json", "-n", &number, "--console-file", console, "--name", &named];
    let outcome = fork(family, &[&words[..], more].concat());
    assert_eq!(outcome.code(), 0, "{}\n{}", outcome.stdout, outcome.stderr);
    let children = children(&outcome);
    assert_eq!(children.len(), count as usize);
    for child in names(&children) {
        is_intact(family, child);
    }
    children
}

fn log(family: &Family, name: &str) -> std::path::PathBuf {
    family.at(&format!("{name}.log"))
}

/// A child that writes to its file finds its memory as it left it, from now on.
fn is_intact(family: &Family, name: &str) {
    let path = log(family, name);
    for _ in 0..2 {
        let from = fs::read(&path).map_or(0, |bytes| bytes.len());
        let text = wait_in_file(&path, from, " pages=512\n");
        assert!(!text.contains("lost"), "{name}: {text}");
    }
}

/// The same of one whose console a test has.
fn goes_on(guest: &Running) {
    for _ in 0..2 {
        let before = guest.printed().matches("lap=").count();
        eventually(
            || guest.printed().matches("lap=").count() > before + 1,
            || format!("it does not go on: {}", guest.printed()),
        );
    }
    assert!(!guest.printed().contains("lost"), "{}", guest.printed());
}

/// What a machine's API answers on its socket.
fn get(socket: &Path, path: &str) -> Option<Value> {
    let mut stream = UnixStream::connect(socket).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then(|| serde_json::from_str(body).ok())?
}

fn answers(socket: &Path) -> bool {
    get(socket, "/").is_some()
}

#[test]
fn children_have_names_an_api_and_memory_of_their_own() {
    let family = Family::default();
    let parent = family.parent("web");
    let children = fork_at_work(&family, "web", 3, &[]);
    assert_eq!(names(&children), ["web-1", "web-2", "web-3"]);
    let list: Value = serde_json::from_str(verb(&family, &["ps", "--json"]).ok()).unwrap();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 4, "{list:?}");
    for child in &children {
        let entry = list.iter().find(|entry| entry["name"] == child["name"]).unwrap();
        assert_eq!(entry["pid"], child["pid"]);
        let socket = child["api_sock"].as_str().unwrap();
        assert!(answers(Path::new(socket)), "{socket}");
    }
    goes_on(&parent);
    // They are called by numbers that go on, if nobody says how, and a person can read it.
    let outcome = fork(&family, &["web", "-n", "2"]);
    for word in ["NAME", "web-1-", "web-2-", ".sock"] {
        assert!(outcome.ok().contains(word), "{}", outcome.stdout);
    }
    let third = fork(&family, &["web", "--json"]);
    assert!(names(&self::children(&third))[0].starts_with("web-3-"), "{}", third.stdout);
    for child in names(&children) {
        is_intact(&family, child);
        assert_eq!(verb(&family, &["stop", "--now", child]).code(), 0);
    }
    goes_on(&parent);
}

#[test]
fn each_is_told_that_it_is_another() {
    let family = Family::default();
    let parent = family.parent("m");
    goes_on(&parent);
    let word = |text: &str, name: &str| -> String {
        // The last line may still be under way.
        let (text, _) = text.rsplit_once('\n').unwrap();
        let line = text.lines().rev().find_map(|line| line.trim().strip_prefix(name)).unwrap();
        line.trim().to_owned()
    };
    let before = (word(&parent.printed(), "vmgenid"), word(&parent.printed(), "vmclock"));
    fork_at_work(&family, "m", 3, &[]);
    fork_at_work(&family, "m-1", 2, &[]);
    goes_on(&parent);
    let texts = ["m-1", "m-2", "m-3", "m-1-1", "m-1-2"]
        .map(|name| fs::read_to_string(log(&family, name)).unwrap());
    let texts = [&texts[..], &[parent.printed()]].concat();
    // Nobody goes on as the parent but itself.
    assert_eq!(word(&texts[5], "vmgenid"), before.0);
    assert_eq!(word(&texts[5], "vmclock")[24..48], before.1[24..48]);
    let mut seen: Vec<_> =
        texts.iter().map(|text| word(text, "vmgenid")[..32].to_owned()).collect();
    seen.extend(texts.iter().map(|text| word(text, "vmclock")[24..48].to_owned()));
    let all = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), all, "{seen:?}");
}

#[test]
fn a_template_stays_as_it_is_however_often_it_is_forked() {
    let family = Family::default();
    let parent = family.parent("t");
    let first = fork_at_work(&family, "t", 2, &["--template"]);
    let laps = || parent.printed().matches("lap=").count();
    let before = laps();
    for child in &first {
        kill(child);
    }
    for _ in 0..3 {
        let _ = fs::remove_file(log(&family, "t-1"));
        let _ = fs::remove_file(log(&family, "t-2"));
        let again = fork_at_work(&family, "t", 2, &[]);
        let lap = |name: &str| {
            let text = fs::read_to_string(log(&family, name)).unwrap();
            text.split("lap=").nth(1).unwrap().split(' ').next().unwrap().parse::<usize>().unwrap()
        };
        // Each starts where the first did.
        assert_eq!([lap("t-1"), lap("t-2")], [before, before]);
        again.iter().for_each(kill);
        // It is not even looked at again.
        let forked = fork(&family, &["t", "--json", "--paused"]);
        let forked: Value = serde_json::from_str(forked.ok()).unwrap();
        assert_eq!(forked["pause_us"], 0, "{forked}");
        kill(&forked["children"][0]);
    }
    assert_eq!(laps(), before);
    assert_eq!(verb(&family, &["resume", "t"]).code(), 0);
    goes_on(&parent);
    // One that was halted has children that run, unless they are not to.
    assert_eq!(verb(&family, &["pause", "t"]).code(), 0);
    let _ = fs::remove_file(log(&family, "t-1"));
    fork_at_work(&family, "t", 1, &[]).iter().for_each(kill);
    let text = fs::read_to_string(log(&family, "t-1")).unwrap();
    assert!(!text.contains(&format!("lap={before} ")), "it is as it was before it went on: {text}");
    let console = log(&family, "still");
    let still = ["t", "--paused", "--name", "still", "--console-file", console.to_str().unwrap()];
    assert_eq!(fork(&family, &still).code(), 0);
    assert_eq!(fs::read_to_string(&console).unwrap(), "");
    assert_eq!(verb(&family, &["resume", "still"]).code(), 0);
    is_intact(&family, "still");
}

#[test]
fn those_that_were_restored_and_forks_of_forks_have_children() {
    let family = Family::default();
    let saved = family.at("saved").display().to_string();
    let parent = family.parent("a");
    assert_eq!(verb(&family, &["snapshot", "a", &saved]).code(), 0);
    let restored = family.hull("restore").flag(&saved).option("--name", "b").start();
    goes_on(&restored);
    fork_at_work(&family, "b", 2, &[]);
    let mut name = "b-1".to_owned();
    for _ in 0..3 {
        fork_at_work(&family, &name, 1, &[]);
        name += "-1";
    }
    // Those in the middle can go.
    for middle in ["b-1", "b-1-1"] {
        assert_eq!(verb(&family, &["stop", "--now", middle]).code(), 0);
    }
    restored.signal(libc::SIGKILL);
    restored.finish();
    for name in [&name, "b-1-1-1", "b-2"] {
        is_intact(&family, name);
    }
    fork_at_work(&family, &name, 2, &[]);
    goes_on(&parent);
}

#[test]
fn huge_pages_are_copied() {
    let family = Family::default();
    let _pool = HugePages::for_guests(3 * 32);
    let scenario = "work dirty=2M size=64K every=100M ids=1";
    let parent = Family::at_work(family.guest("h", scenario).flag("--huge-pages").start());
    for _ in 0..2 {
        let children = fork_at_work(&family, "h", 2, &[]);
        for child in &children {
            let status = fs::read_to_string(format!("/proc/{}/status", pid(child))).unwrap();
            let huge = status.lines().find_map(|line| line.strip_prefix("HugetlbPages:")).unwrap();
            assert!(!huge.trim().starts_with("0 "), "{huge}");
        }
        goes_on(&parent);
        children.iter().for_each(kill);
        family.settles(1, &["h-1.json", "h-1.sock", "h-2.json", "h-2.sock", "h.json", "h.sock"]);
        let _ = fs::remove_file(log(&family, "h-1"));
        let _ = fs::remove_file(log(&family, "h-2"));
    }
}

#[test]
fn whoever_dies_the_others_go_on() {
    let family = Family::default();
    let parent = family.parent("p");
    let pool = pool(&family, &["--keep", "number=3,memory=64M"], 3);
    let children = fork_at_work(&family, "p", 3, &[]);
    kill(&children[0]);
    pool.signal(libc::SIGKILL);
    assert_eq!(pool.finish().code(), 128 + libc::SIGKILL);
    goes_on(&parent);
    is_intact(&family, "p-2");
    parent.signal(libc::SIGKILL);
    parent.finish();
    is_intact(&family, "p-2");
    is_intact(&family, "p-3");
    // What waited in the pool is gone with it.
    eventually(|| family.processes().len() == 2, || format!("{:?}", family.processes()));
    let list = verb(&family, &["ps"]);
    assert!(!list.ok().contains("p-1"), "{}", list.stdout);
    // Nobody listens at the pool's socket, which is no obstacle.
    fork_at_work(&family, "p-2", 1, &[]);
}

/// A pool with so many processes that are ready.
fn pool(family: &Family, words: &[&str], ready: usize) -> Running {
    let before = family.processes().len();
    let pool = family.hull("pool");
    let pool = if words.contains(&"--blank") { pool } else { pool.option("--blank", "0") };
    let pool = words.iter().fold(pool, |pool, word| pool.flag(word)).start();
    let socket = family.at("hull/.pool");
    eventually(
        || socket.exists() && family.processes().len() > before + ready,
        || format!("the pool is not ready: {:?}", family.processes()),
    );
    pool
}

#[test]
fn a_pool_has_them_ready_and_fills_up_again() {
    let family = Family::default();
    let parent = family.parent("p");
    let pool = pool(&family, &["--keep", "number=2,memory=64M", "--keep", "number=1,cpus=2"], 3);
    let waiting = family.processes();
    let children = fork_at_work(&family, "p", 4, &[]);
    let taken = children.iter().filter(|child| waiting.contains(&(pid(child) as u32))).count();
    assert!((2..=3).contains(&taken), "{taken} of {children:?} were ready");
    eventually(|| family.processes().len() == 9, || format!("{:?}", family.processes()));
    goes_on(&parent);
    assert_eq!(verb(&family, &["pool"]).code(), 1);
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
    eventually(|| family.processes().len() == 5, || format!("{:?}", family.processes()));
    assert!(!family.at("hull/.pool").exists());
    for child in names(&children) {
        is_intact(&family, child);
    }
}

#[test]
fn a_machine_of_another_shape_has_a_process_without_a_vm() {
    let family = Family::default();
    let parent = family.parent("p");
    let pool = pool(&family, &["--keep", "number=1,memory=32M", "--blank", "2"], 3);
    let waiting = family.processes();
    let children = fork_at_work(&family, "p", 4, &[]);
    let taken = children.iter().filter(|child| waiting.contains(&(pid(child) as u32))).count();
    assert_eq!(taken, 2, "{children:?}");
    // It fills up again, also where one of them ended.
    eventually(|| family.processes().len() == 9, || format!("{:?}", family.processes()));
    let blank = |id: &&u32| {
        let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains("--asked") && !waiting.contains(id)
    };
    let others: Vec<_> = family.processes();
    let known: Vec<u32> = children.iter().map(|child| pid(child) as u32).collect();
    for id in others.iter().filter(blank).filter(|id| !known.contains(id)) {
        // SAFETY: a process of this test.
        unsafe { libc::kill(*id as i32, libc::SIGKILL) };
    }
    fork_to_work(&family, "p", "late", 2, &[]);
    goes_on(&parent);
    pool.signal(libc::SIGTERM);
    pool.finish().ok();
}

#[test]
fn a_copy_that_nobody_waits_for_does_not_run() {
    let family = Family::default();
    let pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let parent = family.parent("m");
    let connected = || {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let path = family.at("hull/.pool");
        sockets.lines().filter(|line| line.ends_with(path.to_str().unwrap())).count()
    };
    let before = connected();
    pool.signal(libc::SIGSTOP);
    std::thread::scope(|scope| {
        let outcome = scope
            .spawn(|| fork(&family, &["m", "--pool", family.at("hull/.pool").to_str().unwrap()]));
        eventually(|| connected() > before, || "nobody asks for a process".to_owned());
        // It is handed over as soon as the machine goes on.
        goes_on(&parent);
        parent.signal(libc::SIGKILL);
        assert_eq!(outcome.join().unwrap().code(), 1);
    });
    parent.finish();
    pool.signal(libc::SIGCONT);
    // One that is asked for now comes behind the other.
    let other = family.parent("other");
    kill(&children(&fork(&family, &["other", "--json"]))[0]);
    // Removes what those left who were killed.
    verb(&family, &["ps"]).ok();
    family.settles(4, &[".pool", "other.json", "other.sock"]);
    goes_on(&other);
}

#[test]
fn a_name_that_is_taken_is_the_matter_of_one_child() {
    let family = Family::default();
    let parent = family.parent("x");
    let other = family.parent("x-2");
    let outcome = fork(&family, &["x", "-n", "3", "--name", "x-{n}", "--json"]);
    assert_eq!(outcome.code(), 1);
    let children = children(&outcome);
    let why = children[1]["fault_message"].as_str().unwrap();
    assert!(why.contains("\"x-2\" runs already"), "{why}");
    for n in [0, 2] {
        assert!(Path::new(children[n]["api_sock"].as_str().unwrap()).exists());
    }
    let outcome = fork(&family, &["x", "--name", "x-2"]);
    assert_eq!(outcome.code(), 1);
    assert!(outcome.stderr.contains("copy 1 of 1: a machine named"), "{}", outcome.stderr);
    fork(&family, &["x", "-n", "2", "--name", "y"]).failed(&["all copies would be called y"]);
    for name in ["a/b", "", "..", &"long".repeat(99)] {
        let outcome = fork(&family, &["x", "--name", name]);
        assert_eq!(outcome.code(), 1, "{name}: {}", outcome.stdout);
        assert!(outcome.stderr.contains("name"), "{name}: {}", outcome.stderr);
    }
    goes_on(&parent);
    goes_on(&other);
    assert_eq!(family.processes().len(), 4);
}

#[test]
fn each_has_a_vsock_of_its_own() {
    let family = Family::default();
    let socket = family.at("v").display().to_string();
    let guest = family.guest("v", "vsock op=listen port=77");
    let parent = guest.option("--vsock", format!("path={socket},cid=9")).start();
    parent.wait_for("ready\n");
    let forked = children(&fork(&family, &["v", "-n", "2", "--json"]));
    let own = family.at("mine-{n}").display().to_string();
    let named = children(&fork(&family, &["v", "-n", "2", "--json", "--vsock", &own]));
    let at = |name: &str| family.at(name).display().to_string();
    let sockets = [format!("{socket}.v-1"), format!("{socket}.v-2"), at("mine-1"), at("mine-2")];
    for (child, path) in forked.iter().chain(&named).zip(&sockets) {
        let config = get(child["api_sock"].as_str().unwrap().as_ref(), "/vm/config").unwrap();
        assert_eq!(config["vsock"]["uds_path"], path.as_str());
        assert_eq!(config["vsock"]["guest_cid"], child["pid"]);
    }
    for path in sockets.iter().chain([&socket]) {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(b"CONNECT 77\n").unwrap();
        let mut line = [0; 3];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"OK ");
        stream.write_all(path.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut back = String::new();
        stream.read_to_string(&mut back).unwrap();
        assert!(back.ends_with(path.as_str()), "{back:?}");
    }
    // They end with their connection, and take their sockets with them.
    parent.finish().ok();
    family.settles(0, &[]);
    assert!(sockets.iter().all(|path| !Path::new(path).exists()));
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    assert!(output.status.success(), "ip {words:?}: {output:?}");
}

/// A network namespace with a name, which it has as long as this lives.
struct Namespace(String);

impl Namespace {
    fn new(n: u32) -> Namespace {
        let name = format!("hull-test-{}-{n}", std::process::id());
        ip(&["netns", "add", &name]);
        let this = Namespace(name);
        ip(&["-n", &this.0, "tuntap", "add", "name", testnet::NAME, "mode", "tap", "vnet_hdr"]);
        this
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).output();
    }
}

#[test]
fn interfaces_are_opened_in_the_namespace_that_is_named() {
    let namespaces = [1, 2].map(Namespace::new);
    testnet::in_namespace(false, || {
        let family = Family::default();
        let card = format!("tap={},id=e", testnet::NAME);
        let scenario = "work dirty=2M size=64K every=100M";
        let parent = Family::at_work(family.guest("n", scenario).option("--net", card).start());
        let outcome = fork(&family, &["n", "-n", "2"]);
        assert_eq!(outcome.code(), 1, "{}", outcome.stdout);
        for words in ["copy 2 of 2", testnet::NAME, "in use by another"] {
            assert!(outcome.stderr.contains(words), "{words}: {}", outcome.stderr);
        }
        family.settles(1, &["n.json", "n.sock"]);
        let pattern = namespaces[0].0.strip_suffix('1').unwrap();
        let netns = format!("/run/netns/{pattern}{{n}}");
        for pooled in [false, true] {
            let _pool = pooled.then(|| pool(&family, &["--keep", "number=2,memory=64M"], 2));
            for name in ["n-1", "n-2"] {
                let _ = fs::remove_file(log(&family, name));
            }
            let children = fork_at_work(&family, "n", 2, &["--netns", &netns]);
            for (child, namespace) in children.iter().zip(&namespaces) {
                let theirs = fs::metadata(format!("/proc/{}/ns/net", pid(child))).unwrap();
                let named = fs::metadata(format!("/run/netns/{}", namespace.0)).unwrap();
                let inode = std::os::unix::fs::MetadataExt::ino;
                assert_eq!(inode(&theirs), inode(&named));
            }
            let outcome = fork(&family, &["n", "-n", "2", "--netns", &netns]);
            assert!(
                outcome.code() == 1 && outcome.stderr.contains("in use by another"),
                "{}",
                outcome.stderr
            );
            children.iter().for_each(kill);
            eventually(
                || {
                    children
                        .iter()
                        .all(|child| !answers(Path::new(child["api_sock"].as_str().unwrap())))
                },
                String::new,
            );
        }
        let outcome = fork(&family, &["n", "--netns", "/nowhere"]);
        assert!(outcome.stderr.contains("network namespace /nowhere"), "{}", outcome.stderr);
        let outcome = fork(&family, &["n", "--net", "q=t"]);
        assert!(outcome.stderr.contains("the id q"), "{}", outcome.stderr);
        goes_on(&parent);
        Ok(())
    })
    .unwrap();
}

#[test]
fn parents_and_children_are_saved() {
    let family = Family::default();
    let at = |name: &str| family.at(name).display().to_string();
    let parent = family.parent("s");
    let save = |words: &[&str]| {
        let words = [&["snapshot"], words].concat();
        assert_eq!(verb(&family, &words).ok(), "");
    };
    save(&["s", &at("base")]);
    fork_at_work(&family, "s", 2, &[]);
    save(&["--diff", "s", &at("one")]);
    fork_at_work(&family, "s-1", 1, &[]);
    save(&["s-1", &at("whole")]);
    assert_eq!(fork(&family, &["s-1"]).code(), 0);
    save(&["--diff", "s-1", &at("more")]);
    save(&["--diff", "s-2", &at("first")]);
    goes_on(&parent);
    save(&["--diff", "s", &at("two")]);
    let folders = ["base", "one", "two", "whole", "more", "first"].map(at);
    let folders: Vec<&str> = folders.iter().map(String::as_str).collect();
    verb(&family, &[&["snapshot", "verify"], &folders[..]].concat()).ok();
    for folder in folders {
        let copy = family.hull("restore").flag(folder).option("--name", "copy").start();
        goes_on(&copy);
        assert_eq!(verb(&family, &["stop", "--now", "copy"]).code(), 0);
        assert_eq!(copy.finish().code(), 0);
    }
}

#[test]
fn memory_in_more_layers_than_are_kept_is_handed_over() {
    let family = Family::default();
    let parent = family.parent("deep");
    for round in 0..40 {
        let child = &children(&fork(&family, &["deep", "--json"]))[0];
        assert!(child["pid"].is_u64(), "round {round}: {child}");
        kill(child);
    }
    fork_at_work(&family, "deep", 1, &[]);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", parent.id())).unwrap().count();
    assert!(descriptors < 80, "{descriptors}");
    goes_on(&parent);
}

#[test]
fn nothing_is_copied_of_a_machine_that_is_to_be_forked() {
    let family = Family::default();
    let scenario = "work dirty=2M size=64K every=100M";
    let parent = Family::at_work(family.guest("f", scenario).flag("--forkable").start());
    let copied = |outcome: &Outcome| {
        let forked: Value = serde_json::from_str(outcome.ok()).unwrap();
        forked["children"].as_array().unwrap().iter().for_each(kill);
        forked["copied_bytes"].as_u64().unwrap()
    };
    assert_eq!(copied(&fork(&family, &["f", "--json"])), 0);
    goes_on(&parent);
    // From then on it is as any other.
    assert!(copied(&fork(&family, &["f", "--json"])) >= 2 << 20);
    fork_at_work(&family, "f", 2, &[]);
    fork_at_work(&family, "f-1", 1, &[]);
    goes_on(&parent);
    let folder = family.at("saved");
    assert_eq!(verb(&family, &["snapshot", "f", folder.to_str().unwrap()]).code(), 0);
    goes_on(&parent);
    family
        .guest("g", scenario)
        .flag("--forkable")
        .flag("--huge-pages")
        .run()
        .misused(&["forkable"]);
}
