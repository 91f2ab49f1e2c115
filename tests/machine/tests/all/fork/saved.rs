//! Copies of machines that were saved: `hull fork DIR`.

use std::fs;
use std::path::{Path, PathBuf};

use machine_tests::{Family, Running, eventually};

use super::disks::{self, disk, has_what_was_flushed, text};
use super::{children, fork, fork_at_work, fork_to_work, is_intact, kill, names, pool, verb};

/// Saves the machine called `web`, which is gone then. Returns the folder.
fn saved(family: &Family, machine: Running) -> PathBuf {
    let folder = family.at("warm");
    verb(family, &["snapshot", "--stop", "web", folder.to_str().unwrap()]).ok();
    assert!(!family.entries().contains(&"web.json".to_owned()), "it is still there");
    assert_eq!(machine.finish().code(), 0);
    folder
}

#[test]
fn a_snapshot_is_copied_as_often_as_somebody_wants() {
    let family = Family::default();
    let folder = saved(&family, family.parent("web"));
    let warm = folder.to_str().unwrap();
    let first = fork(&family, &[warm, "-n", "2", "--paused", "--json"]);
    assert_eq!(names(&children(&first)), ["web-1", "web-2"], "{}", first.stderr);
    // They are called like those of the machine; who has a name already keeps it.
    let again = children(&fork(&family, &[warm, "--paused", "--json"]));
    let [name] = names(&again)[..] else { panic!("{again:?}") };
    assert!(name.starts_with("web-1-"), "{name}");
    for child in children(&first).iter().chain(&again) {
        kill(child);
    }
    let copies = fork_to_work(&family, warm, "job", 3, &[]);
    // Nobody needs the files any more.
    fs::remove_dir_all(&folder).unwrap();
    for child in names(&copies) {
        is_intact(&family, child);
    }
    // A copy is a machine like any other.
    let third = fork_at_work(&family, "job-2", 1, &[]);
    verb(&family, &["snapshot", "--diff", "job-1", warm]).ok();
    let fourth = fork_to_work(&family, warm, "late", 1, &[]);
    for child in copies.iter().chain(&third).chain(&fourth) {
        assert_eq!(verb(&family, &["stop", "--now", child["name"].as_str().unwrap()]).code(), 0);
    }
    family.settles(0, &[]);
}

#[test]
fn a_diff_is_copied_as_well() {
    let family = Family::default();
    let _parent = family.parent("web");
    let (base, diff) = (family.at("base"), family.at("diff"));
    verb(&family, &["snapshot", "web", base.to_str().unwrap()]).ok();
    verb(&family, &["snapshot", "--diff", "--stop", "web", diff.to_str().unwrap()]).ok();
    for child in fork_to_work(&family, diff.to_str().unwrap(), "job", 2, &[]) {
        kill(&child);
    }
    let moved = family.at("moved");
    fs::rename(&base, &moved).unwrap();
    fork(&family, &[diff.to_str().unwrap()]).failed(&["what it is a diff to", "moved"]);
    let more = ["--base", moved.to_str().unwrap()];
    kill(&fork_to_work(&family, diff.to_str().unwrap(), "late", 1, &more)[0]);
}

#[test]
fn a_pool_has_processes_for_what_was_saved() {
    let family = Family::default();
    let folder = saved(&family, family.parent("web"));
    let warm = folder.to_str().unwrap();
    let _pool = pool(&family, &["--keep", "number=2,memory=64M"], 2);
    let before = family.processes();
    let copies = fork_to_work(&family, warm, "job", 1, &[]);
    // It is one of those that were there.
    let id = u32::try_from(super::pid(&copies[0])).unwrap();
    assert!(before.contains(&id), "{id}: {before:?}");
    kill(&copies[0]);
}

#[test]
fn disks_of_a_snapshot_are_what_copies_stand_on() {
    let family = Family::default();
    let base = family.at("d.img");
    let parent = disks::parent(&family, "web", &base);
    let folder = family.at("warm");
    let warm = folder.to_str().unwrap();
    verb(&family, &["snapshot", "web", warm]).ok();
    // As long as the machine itself goes on, its disk is another's.
    let refused = fork(&family, &[warm]);
    refused.failed(&["disk0", "in use", "--disk disk0=FILE"]);
    assert_eq!(verb(&family, &["stop", "--now", "web"]).code(), 0);
    assert_eq!(parent.finish().code(), 0);
    // It was written since.
    let folder = family.at("again");
    let again = folder.to_str().unwrap();
    let parent = disks::parent(&family, "web", &base);
    verb(&family, &["snapshot", "--stop", "web", again]).ok();
    assert_eq!(parent.finish().code(), 0);
    let before = fs::read(&base).unwrap();
    let first = fork_to_work(&family, again, "job", 2, &["--rm"]);
    let second = fork_to_work(&family, again, "kept", 2, &[]);
    for child in first.iter().chain(&second) {
        is_intact(&family, child["name"].as_str().unwrap());
    }
    assert!(fs::read(&base).unwrap() == before, "the base was written");
    for child in &second {
        kill(child);
        let name = child["name"].as_str().unwrap();
        has_what_was_flushed(&family, &disk(child), &text(&family, name));
    }
    for child in &first {
        assert_eq!(verb(&family, &["stop", "--now", child["name"].as_str().unwrap()]).code(), 0);
        eventually(|| !disk(child).exists(), || format!("{child} leaves its disk"));
    }
}

#[test]
fn a_disk_that_is_another_now_is_said_or_refused() {
    let family = Family::default();
    let base = family.at("d.img");
    let folder = saved(&family, disks::parent(&family, "web", &base));
    let warm = folder.to_str().unwrap();
    let file = fs::File::options().write(true).open(&base).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 0).unwrap();
    let outcome = fork(&family, &[warm, "--json", "--paused"]);
    kill(&children(&outcome)[0]);
    assert!(outcome.stderr.contains("was changed since the snapshot"), "{}", outcome.stderr);
    let len = file.metadata().unwrap().len();
    file.set_len(len / 2).unwrap();
    fork(&family, &[warm]).failed(&[
        "disk0",
        "d.img",
        &format!("had {len} bytes"),
        "--disk disk0=FILE",
    ]);
    // One that brings another is nothing to it.
    let other = family.at("other.img");
    fs::File::create_new(&other).unwrap().set_len(len).unwrap();
    let option = format!("disk0={}", other.display());
    let outcome = fork(&family, &[warm, "--json", "--paused", "--disk", &option]);
    assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
    kill(&children(&outcome)[0]);
}

#[test]
fn an_image_of_a_snapshot_is_what_copies_stand_on() {
    let family = Family::default();
    let parent = disks::parent_of_image(&family, "web", "");
    // What is saved stands on an image that a fork left behind.
    let other = fork_at_work(&family, "web", 1, &[]);
    let folder = saved(&family, parent);
    let warm = folder.to_str().unwrap();
    let copies = fork_to_work(&family, warm, "job", 2, &[]);
    for child in copies.iter().chain(&other) {
        is_intact(&family, child["name"].as_str().unwrap());
        kill(child);
        let text = text(&family, child["name"].as_str().unwrap());
        disks::image_has_what_was_flushed(&family, &disk(child), &text);
    }
}

#[test]
fn what_is_no_snapshot_is_named() {
    let family = Family::default();
    let folder = family.at("empty");
    fs::create_dir(&folder).unwrap();
    let empty = folder.to_str().unwrap();
    fork(&family, &[empty]).failed(&["empty/state", "No such file"]);
    fs::write(folder.join("state"), "x").unwrap();
    fork(&family, &[empty]).failed(&["not a snapshot"]);
    fork(&family, &["/nowhere/at/all"]).failed(&["/nowhere/at/all"]);
    let parent = family.parent("web");
    fs::remove_file(folder.join("state")).unwrap();
    verb(&family, &["snapshot", "--stop", "web", empty]).ok();
    assert_eq!(parent.finish().code(), 0);
    fork(&family, &[empty, "--template"]).failed(&["--template", "stays as it is"]);
    fork(&family, &[empty, "--net", "net7=tap0"]).failed(&["net7", "known are"]);
    fork(&family, &[empty, "--disk", "disk7=x"]).failed(&["disk7"]);
    fork(&family, &[empty, "-n", "2", "--name", "x"]).failed(&["{n}"]);
    for option in ["--vsock", "--console-file"] {
        fork(&family, &[empty, "-n", "2", option, "/x/y"]).failed(&[option, "/x/y", "{n}"]);
    }
    fork(&family, &[empty, "-n", "2", "--disk", "d=/x/y"]).failed(&["--disk", "/x/y", "{n}"]);
    fork(&family, &["web", "--base", empty]).failed(&["no machine named"]);
    let list = family.at("list.json");
    fs::write(&list, "[1]").unwrap();
    fork(&family, &[empty, "--metadata", list.to_str().unwrap()]).failed(&[
        "--metadata",
        "list.json",
        "object",
    ]);
    let nobody = family.at("nobody");
    let nobody = nobody.to_str().unwrap();
    fork(&family, &[empty, "--pool", nobody]).failed(&["nobody makes processes", "hull pool"]);
    // One that cannot be is nothing to the others.
    let copies = fork(&family, &[empty, "-n", "3", "--netns", "/proc/self/ns/{n}", "--json"]);
    assert_eq!(copies.code(), 1);
    for child in children(&copies) {
        assert!(child["fault_message"].as_str().unwrap().contains("/proc/self/ns/"), "{child}");
    }
    assert!(Path::new(empty).join("memory").exists());
    family.settles(0, &[]);
}
