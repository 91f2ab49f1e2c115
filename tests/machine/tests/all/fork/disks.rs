//! Disks of machines that are forked: each copy has one of its own, and what was flushed is there whoever dies.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use machine_tests::{Family, Outcome, Running, eventually, qcow2};
use serde_json::Value;

use super::{children, fork, fork_at_work, goes_on, is_intact, kill, names, verb};

/// Bytes of the disk, its blocks that a guest knows, and bytes of one.
const SIZE: u64 = 8 << 20;
const BLOCKS: u64 = 16;
const LENGTH: u64 = 64 << 10;

/// A machine that has a disk it knows by heart and writes and flushes all the time.
pub(super) fn parent(family: &Family, name: &str, disk: &Path) -> Running {
    if !disk.exists() {
        fs::File::create_new(disk).unwrap().set_len(SIZE).unwrap();
    }
    at_work(family, name, disk, "")
}

fn at_work(family: &Family, name: &str, disk: &Path, more: &str) -> Running {
    let scenario = format!("work dirty=2M size={LENGTH} every=100M disk={BLOCKS}");
    Family::at_work(family.guest(name, &scenario).disk(disk, more).start())
}

/// A machine whose disk is an image.
pub(super) fn parent_of_image(family: &Family, name: &str, more: &str) -> Running {
    let disk = family.at("d.qcow2");
    if !disk.exists() {
        fs::write(&disk, qcow2::image(SIZE, None)).unwrap();
    }
    at_work(family, name, &disk, &format!(",format=qcow2{more}"))
}

/// As [`has_what_was_flushed`], of an image and what it stands on.
pub(super) fn image_has_what_was_flushed(family: &Family, path: &Path, text: &str) {
    let raw = family.at("raw");
    fs::write(&raw, qcow2::disk(path).unwrap()).unwrap();
    raw_has_what_was_flushed(&raw, text);
}

/// The file of a child's only disk.
pub(super) fn disk(child: &Value) -> PathBuf {
    let drives = child["drives"].as_array().unwrap_or_else(|| panic!("{child}"));
    assert_eq!(drives.len(), 1, "{child}");
    drives[0]["path_on_host"].as_str().unwrap().into()
}

/// With what a guest wrote and flushed its blocks last, as far as it could say so.
fn last_stamp(text: &str) -> u64 {
    let (text, _) = text.rsplit_once('\n').unwrap();
    let of = |line: &str| Some(line.split("disk stamp=0x").nth(1)?.split(' ').next()?.to_owned());
    let stamp = text.lines().rev().find_map(of).unwrap_or_else(|| panic!("no disk: {text}"));
    u64::from_str_radix(&stamp, 16).unwrap()
}

/// The disk at `path` has each block as the guest of `text` flushed it last, or as it wrote it since, as a whole
/// file; so many are as they were flushed.
pub(super) fn has_what_was_flushed(family: &Family, path: &Path, text: &str) {
    let raw = family.at("raw");
    let _ = fs::remove_file(&raw);
    let (path, output) = (path.to_str().unwrap(), raw.to_str().unwrap());
    assert_eq!(verb(family, &["disk", "commit", path, "--output", output]).code(), 0);
    raw_has_what_was_flushed(&raw, text);
}

/// The same of a raw disk.
fn raw_has_what_was_flushed(path: &Path, text: &str) {
    assert!(!text.contains("lost"), "{text}");
    let raw = fs::File::open(path).unwrap();
    assert_eq!(raw.metadata().unwrap().len(), SIZE);
    let path = path.display();
    let stamp = last_stamp(text);
    let mut newer = None;
    for block in 0..BLOCKS {
        let mut bytes = vec![0; LENGTH as usize];
        raw.read_exact_at(&mut bytes, SIZE / BLOCKS * block).unwrap();
        let pages = bytes.chunks_exact(4096).map(|page| {
            let (words, _) = page.as_chunks::<8>();
            let first = u64::from_le_bytes(words[0]);
            assert!(words.iter().all(|word| u64::from_le_bytes(*word) == first), "block {block}");
            first ^ block
        });
        for found in pages.filter(|found| *found != stamp) {
            assert_eq!(*newer.get_or_insert(found), found, "block {block} of {path}");
            assert!(found > stamp, "block {block} of {path} is older than what was flushed");
        }
    }
}

pub(super) fn text(family: &Family, name: &str) -> String {
    fs::read_to_string(super::log(family, name)).unwrap()
}

/// Files beside the disk that were made for machines.
fn copies(family: &Family) -> Vec<String> {
    let all = fs::read_dir(family.at("")).unwrap().flatten();
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let is_copy = |name: &String| {
        ["d.img.", ".d.img", "d.qcow2.", ".d.qcow2"].iter().any(|start| name.starts_with(start))
    };
    let mut copies: Vec<_> = all.map(name).filter(is_copy).collect();
    copies.sort();
    copies
}

/// Forks `parent`, whose name is `web`, and one of its copies, and kills all of these: whoever dies harms no other, and
/// loses nothing that it flushed, as `check` says of a disk and a guest's words. Returns the parent's own disk, of
/// which a copy was made and killed at last.
fn forks_keep_what_they_flushed(
    family: &Family,
    mut parent: Running,
    extension: &str,
    check: impl Fn(&Path, &str),
) -> PathBuf {
    let first = fork_at_work(family, "web", 3, &[]);
    let second = fork_at_work(family, "web-2", 2, &[]);
    goes_on(&parent);
    let all: Vec<_> = first.iter().chain(&second).collect();
    let mut files: Vec<_> = all.iter().map(|child| disk(child)).collect();
    files.sort();
    files.dedup();
    assert_eq!(files.len(), 5);
    assert!(files.iter().all(|file| file.extension().unwrap() == extension), "{files:?}");
    for (n, child) in all.iter().enumerate() {
        kill(child);
        let name = child["name"].as_str().unwrap();
        // That of one that was forked since is another.
        if n != 1 {
            check(&disk(child), &text(family, name));
        }
        for other in &all[n + 1..] {
            is_intact(family, other["name"].as_str().unwrap());
        }
        goes_on(&parent);
    }
    let forked = fork(family, &["web", "--json", "--rm"]);
    let forked: Value = serde_json::from_str(forked.ok()).unwrap();
    let own: PathBuf = forked["drives"][0]["path_on_host"].as_str().unwrap().into();
    assert_eq!(forked["drives"][0]["drive_id"], "disk0");
    goes_on(&parent);
    parent.write("q");
    let outcome = parent.finish();
    check(&own, outcome.ok());
    kill(&forked["children"][0]);
    own
}

#[test]
fn each_has_a_disk_of_its_own_and_keeps_what_it_flushed() {
    let family = Family::default();
    let parent = parent(&family, "web", &family.at("d.img"));
    let check = |disk: &Path, text: &str| has_what_was_flushed(&family, disk, text);
    forks_keep_what_they_flushed(&family, parent, "ovl", check);
}

#[test]
fn nobody_else_writes_to_what_copies_stand_on() {
    let family = Family::default();
    let base = family.at("d.img");
    let parent = parent(&family, "web", &base);
    let first = fork_at_work(&family, "web", 1, &[]);
    parent.signal(libc::SIGKILL);
    drop(parent);
    is_intact(&family, "web-1");
    let again = || {
        let guest = family.guest("again", "blk op=info").disk(&base, "");
        guest.run()
    };
    again().refused(&["d.img", "in use"]);
    kill(&first[0]);
    assert_eq!(again().code(), 0);
}

#[test]
fn copies_are_made_where_they_are_wanted_and_removed_if_that_is_wanted() {
    let family = Family::default();
    let base = family.at("d.img");
    let parent = parent(&family, "web", &base);
    let folder = family.at("copies");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    let named = family.at("own-{n}");
    let option = format!("disk0={}", named.display());
    let mine = fork_at_work(&family, "web", 2, &["--disk", &option, "--disks-in", folder]);
    assert_eq!(mine.iter().map(disk).collect::<Vec<_>>(), [family.at("own-1"), family.at("own-2")]);
    // Its own is there as well; a second fork has the next.
    let all = || fs::read_dir(folder).unwrap().count();
    assert_eq!((all(), copies(&family).len()), (1, 0));
    mine.iter().for_each(kill);
    let rest = fork(&family, &["web", "--json", "-n", "2", "--disks-in", folder, "--rm"]);
    let rest = children(&rest);
    assert_eq!(all(), 4);
    for child in names(&rest) {
        assert_eq!(verb(&family, &["stop", "--now", child]).code(), 0);
    }
    eventually(
        || all() == 2,
        || format!("{:?}", fs::read_dir(folder).unwrap().collect::<Vec<_>>()),
    );
    goes_on(&parent);
    drop(parent);
}

#[test]
fn a_file_that_is_there_is_used_as_it_is() {
    let family = Family::default();
    let parent = parent(&family, "web", &family.at("d.img"));
    let known = family.at("known.img");
    fs::write(&known, vec![7; SIZE as usize]).unwrap();
    let option = format!("disk0={}", known.display());
    let console = family.at("web-1.log").display().to_string();
    let words = ["web", "--json", "--disk", &option, "--console-file", &console];
    let child = &children(&fork(&family, &words))[0];
    assert!(child["drives"].is_null(), "{child}");
    // Whether the guest sees that it is another depends on where it was forked; it writes to it from then on.
    let written = || fs::read(&known).unwrap().iter().any(|byte| *byte != 7);
    eventually(written, || text(&family, "web-1"));
    // Nobody stands on the machine's.
    assert_eq!(copies(&family), [""; 0]);
    goes_on(&parent);
    kill(child);
}

#[test]
fn a_fork_that_cannot_be_leaves_the_disk_as_it_is() {
    let family = Family::default();
    let base = family.at("d.img");
    let parent = parent(&family, "web", &base);
    let refused = |outcome: &Outcome, words: &[&str]| {
        outcome.failed(words);
        goes_on(&parent);
        assert_eq!(copies(&family), [""; 0]);
    };
    let nowhere = family.at("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    refused(&fork(&family, &["web", "--disks-in", nowhere]), &["disk0", "nowhere", "No such file"]);
    let outcome = fork(&family, &["web", "--template", "--disk", "other=/x"]);
    refused(&outcome, &["overrides[0].disk", "none with the id other", "disk0"]);
    let option = ["--disk", "disk0=/x", "--disk", "disk0=/y"];
    refused(&fork(&family, &[&["web"], &option[..]].concat()), &["disk0 is named twice"]);
    // It is still its machine's alone.
    let reader = family.guest("reader", "blk op=info").disk(&base, ",ro").run();
    reader.refused(&["d.img", "in use"]);
    // What only one of them cannot have, the others have.
    let option = "disk0=/nowhere-{n}/copy";
    let outcome = fork(&family, &["web", "--json", "-n", "2", "--disk", option]);
    let all = children(&outcome);
    assert!(all.iter().all(|child| child["fault_message"].as_str().unwrap().contains("/nowhere-")));
    goes_on(&parent);
    // A template of nobody is none.
    assert_eq!(fork(&family, &["web", "--template", "--disk", option]).code(), 1);
    goes_on(&parent);
    // Whatever was made for those is gone; the machine's own is not.
    let mut left = copies(&family).into_iter();
    assert!(left.all(|name| name.starts_with("d.img.web.")), "{:?}", copies(&family));
}

#[test]
fn a_machine_with_overlays_is_saved_and_goes_on() {
    let family = Family::default();
    let parent = parent(&family, "web", &family.at("d.img"));
    let all = fork_at_work(&family, "web", 1, &["--rm"]);
    goes_on(&parent);
    let folder = family.at("saved");
    let folder = folder.to_str().unwrap();
    assert_eq!(verb(&family, &["snapshot", "web-1", folder, "--stop"]).code(), 0);
    // One that was saved still needs its disk.
    assert!(disk(&all[0]).exists(), "{:?}", copies(&family));
}

#[test]
fn where_files_share_data_each_has_a_raw_disk() {
    let family = Family::default();
    let shared = family.at("shared");
    machine_tests::where_files_share_data(&shared, || {
        let base = shared.join("d.img");
        let mut parent = parent(&family, "web", &base);
        let first = fork_at_work(&family, "web", 3, &[]);
        let second = fork_at_work(&family, "web-2", 2, &[]);
        goes_on(&parent);
        let all: Vec<_> = first.iter().chain(&second).collect();
        let mut files: Vec<_> = all.iter().map(|child| disk(child)).collect();
        files.push(base.clone());
        files.sort();
        files.dedup();
        assert_eq!(files.len(), 6);
        assert!(files.iter().all(|file| file.extension().unwrap() == "img"), "{files:?}");
        // And there is no other: no overlay, and nothing that was made on the way.
        let mut found: Vec<_> =
            fs::read_dir(&shared).unwrap().map(|entry| entry.unwrap().path()).collect();
        found.sort();
        assert_eq!(found, files);
        for (n, child) in all.iter().enumerate() {
            kill(child);
            let name = child["name"].as_str().unwrap();
            raw_has_what_was_flushed(&disk(child), &text(&family, name));
            for other in &all[n + 1..] {
                is_intact(&family, other["name"].as_str().unwrap());
            }
            goes_on(&parent);
        }
        parent.write("q");
        let outcome = parent.finish();
        raw_has_what_was_flushed(&base, outcome.ok());
    });
}

#[test]
fn a_template_has_disks_for_all_that_stand_on_them() {
    let family = Family::default();
    let base = family.at("d.img");
    let parent = parent(&family, "t", &base);
    let first = fork_at_work(&family, "t", 2, &["--template"]);
    let before = fs::read(&base).unwrap();
    // One brings its own, and is nothing to those that come after it.
    let brought = family.at("brought.img");
    fs::copy(&base, &brought).unwrap();
    let option = format!("disk0={}", brought.display());
    let own = fork(&family, &["t", "--paused", "--json", "--name", "own", "--disk", &option]);
    let own = children(&own);
    assert!(own[0].get("drives").is_none(), "{own:?}");
    let second: Vec<Value> = (0..2)
        .flat_map(|n| {
            let name = format!("t{n}-{{n}}");
            let log = family.at(&format!("t{n}-1.log"));
            let words = ["t", "--json", "--name", &name, "--console-file", log.to_str().unwrap()];
            children(&fork(&family, &words))
        })
        .collect();
    for child in first.iter().chain(&second) {
        is_intact(&family, child["name"].as_str().unwrap());
        kill(child);
        let name = child["name"].as_str().unwrap();
        has_what_was_flushed(&family, &disk(child), &text(&family, name));
    }
    assert!(fs::read(&base).unwrap() == before, "the base was written");
    // What copies were made of is not kept when it goes on.
    let files = || fs::read_dir(format!("/proc/{}/fd", parent.id())).unwrap().count();
    let kept = files();
    assert_eq!(verb(&family, &["resume", "t"]).code(), 0);
    eventually(|| files() < kept, || format!("{kept} files are open, and still are"));
    goes_on(&parent);
    super::fork_to_work(&family, "t", "late", 1, &[]);
}

#[test]
fn each_has_an_image_of_its_own() {
    let family = Family::default();
    for more in ["", ",direct", ",queues=2"] {
        let parent = parent_of_image(&family, "web", more);
        let check = |disk: &Path, text: &str| image_has_what_was_flushed(&family, disk, text);
        let own = forks_keep_what_they_flushed(&family, parent, "qcow2", check);
        assert_eq!(qcow2::chain(&own).unwrap().len(), 3);
        for file in copies(&family).into_iter().chain(["d.qcow2".to_owned()]) {
            fs::remove_file(family.at(&file)).unwrap();
        }
    }
}

#[test]
fn images_are_made_where_they_are_wanted_and_removed_if_that_is_wanted() {
    let family = Family::default();
    let parent = parent_of_image(&family, "web", "");
    let image = family.at("d.qcow2");
    let in_use = || {
        let reader = family.guest("reader", "blk op=info").disk(&image, ",format=qcow2,ro").run();
        reader.refused(&["d.qcow2", "in use"]);
    };
    // What cannot be leaves it as it is.
    let nowhere = family.at("nowhere").display().to_string();
    let outcome = fork(&family, &["web", "--disks-in", &nowhere]);
    outcome.failed(&["disk0", "nowhere", "No such file"]);
    goes_on(&parent);
    assert_eq!(copies(&family), [""; 0]);
    in_use();
    // One that is there is used as it is, and what it names is not opened.
    let known = family.at("known.qcow2");
    fs::write(&known, qcow2::image(SIZE, None)).unwrap();
    let over = family.at("over.qcow2");
    fs::write(&over, qcow2::image(SIZE, Some(("known.qcow2", "qcow2")))).unwrap();
    let using = |file: &Path| {
        let option = format!("disk0={}", file.display());
        let outcome = fork(&family, &["web", "--json", "--disk", &option]);
        children(&outcome).remove(0)
    };
    let child = using(&known);
    assert!(child["drives"].is_null(), "{child}");
    let written = || qcow2::disk(&known).unwrap().iter().any(|byte| *byte != 0);
    eventually(written, || "it does not write to its disk".to_owned());
    kill(&child);
    assert_eq!(copies(&family), [""; 0]);
    in_use();
    let refused = |child: &Value| child["fault_message"].as_str().unwrap().contains("stands on");
    assert!(refused(&using(&over)));
    let folder = family.at("copies");
    fs::create_dir(&folder).unwrap();
    let folder = folder.to_str().unwrap();
    let option = format!("disk0={}", family.at("own-{n}").display());
    let mine = fork_at_work(&family, "web", 2, &["--disk", &option, "--disks-in", folder]);
    assert_eq!(mine.iter().map(disk).collect::<Vec<_>>(), [family.at("own-1"), family.at("own-2")]);
    let all = || fs::read_dir(folder).unwrap().count();
    assert_eq!((all(), copies(&family).len()), (1, 0));
    assert_eq!(qcow2::chain(&family.at("own-1")).unwrap()[1..], [image]);
    mine.iter().for_each(kill);
    // Nor is it after a fork, of whose images names are followed.
    assert!(refused(&using(&over)));
    let before = all();
    let rest = fork(&family, &["web", "--json", "-n", "2", "--disks-in", folder, "--rm"]);
    let rest = children(&rest);
    assert_eq!(all(), before + 3);
    for child in names(&rest) {
        assert_eq!(verb(&family, &["stop", "--now", child]).code(), 0);
    }
    eventually(
        || all() == before + 1,
        || format!("{:?}", fs::read_dir(folder).unwrap().collect::<Vec<_>>()),
    );
    goes_on(&parent);
    drop(parent);
}

#[test]
fn a_machine_with_images_of_forks_is_saved_and_forked_again() {
    let family = Family::default();
    let parent = parent_of_image(&family, "web", "");
    let first = fork_at_work(&family, "web", 1, &["--rm"]);
    goes_on(&parent);
    let folder = family.at("saved");
    let folder = folder.to_str().unwrap();
    assert_eq!(verb(&family, &["snapshot", "web-1", folder, "--stop"]).code(), 0);
    // One that was saved still needs its disk.
    let file = disk(&first[0]);
    let chain = qcow2::chain(&file).unwrap();
    assert_eq!(chain[1..], [family.at("d.qcow2")]);
    // It opens what its own fork put below, and nobody else does without being told.
    let run = |more: &str| {
        let more = format!(",format=qcow2{more}");
        family.guest("again", "blk op=info").disk(&file, &more).run()
    };
    eventually(|| !run("").stderr.contains("in use"), || "it is still there".to_owned());
    run("").failed(&["stands on", ",backing"]);
    assert_eq!(run(",backing").code(), 0);
    parent.signal(libc::SIGKILL);
    drop(parent);
    let restored = family.hull("restore").flag(folder).option("--name", "b").start();
    goes_on(&restored);
    let again = fork_at_work(&family, "b", 2, &[]);
    restored.signal(libc::SIGKILL);
    let outcome = restored.finish();
    assert!(!outcome.stderr.contains("changed"), "{}", outcome.stderr);
    for child in &again {
        let chain = qcow2::chain(&disk(child)).unwrap();
        assert_eq!(chain[1..], [file.clone(), family.at("d.qcow2")]);
        is_intact(&family, child["name"].as_str().unwrap());
        kill(child);
        let name = child["name"].as_str().unwrap();
        image_has_what_was_flushed(&family, &disk(child), &text(&family, name));
    }
}

#[test]
fn a_machine_with_an_image_is_forked_as_often_as_it_wants() {
    let family = Family::default();
    let mut parent = parent_of_image(&family, "web", "");
    let mut own = PathBuf::new();
    for round in 0..40 {
        let forked = fork(&family, &["web", "--json", "--rm"]);
        let forked: Value = serde_json::from_str(forked.ok()).unwrap();
        let child = &forked["children"][0];
        assert!(child["pid"].is_u64(), "round {round}: {child}");
        if let Some(path) = forked["drives"][0]["path_on_host"].as_str() {
            own = path.into();
        }
        let chain = qcow2::chain(&own).unwrap();
        assert!(chain.len() <= 16, "round {round}: {chain:?}");
        kill(child);
        let laps = parent.printed().matches("lap=").count();
        eventually(
            || parent.printed().matches("lap=").count() > laps,
            || format!("it does not go on: {}", parent.printed()),
        );
    }
    goes_on(&parent);
    parent.write("q");
    let outcome = parent.finish();
    image_has_what_was_flushed(&family, &own, outcome.ok());
}
