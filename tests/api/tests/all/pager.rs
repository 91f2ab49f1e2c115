//! Machines whose memory another process brings.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use api_tests::{Answer, Server};
use machine_tests::{Family, HugePages};
use serde_json::json;
use tempfile::TempDir;

use super::fork::{at_work, forked, server};
use super::snapshot::{create, load, state};

/// A process that brings memory; it ends with the test.
struct Pager {
    process: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Pager {
    fn new(saved: &Path, behaviour: &str) -> Pager {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("pager.sock");
        let mut process = Command::new(env!("CARGO_BIN_EXE_pager"))
            .args([&socket, &saved.join("memory")])
            .arg(behaviour)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "listening\n");
        Pager { process, socket, _folder: folder }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn load(&self, server: &Server, saved: &Path) -> Answer {
        let uffd = json!({ "backend_type": "Uffd", "backend_path": self.socket });
        server
            .put("/snapshot/load", load(saved, &json!({ "mem_backend": uffd, "resume_vm": true })))
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Room for a snapshot of a guest with 2,048 pages that it knows.
fn saved() -> TempDir {
    saved_with("None")
}

fn saved_with(huge_pages: &str) -> TempDir {
    let mut first = Server::hull();
    let folder = tempfile::tempdir().unwrap();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 48, "huge_pages": huge_pages });
    first.put("/machine-config", machine).done();
    first.boot("work dirty=8388608 size=65536");
    first.process.wait_for("ready");
    first.process.write("d");
    first.process.wait_for("dirty");
    create(&first, folder.path()).done();
    folder
}

/// What changed, laid over a memory file, as other tools do it.
fn lay_over(changed: &Path, memory: &Path) {
    let status = Command::new("cp")
        .args(["--sparse=never"])
        .args([changed, &changed.with_extension("plain")])
        .status();
    assert!(status.unwrap().success());
    let changed = fs::read(changed.with_extension("plain")).unwrap();
    let mut bytes = fs::read(memory).unwrap();
    for (page, new) in bytes.chunks_exact_mut(4096).zip(changed.chunks_exact(4096)) {
        if new.iter().any(|byte| *byte != 0) {
            page.copy_from_slice(new);
        }
    }
    fs::write(memory, bytes).unwrap();
}

fn is_intact(server: &mut Server, pages: u32) {
    server.process.write("c");
    server.process.wait_for(&format!("pages={pages}"));
}

#[test]
fn memory_comes_when_it_is_touched() {
    let saved = saved();
    for behaviour in ["good", "closes"] {
        let pager = Pager::new(saved.path(), behaviour);
        let mut machine = Server::firecracker();
        pager.load(&machine, saved.path()).done();
        machine.process.write("p");
        machine.process.wait_for("pause=");
        let little = machine.process.kilobytes("RssAnon");
        is_intact(&mut machine, 2048);
        let all = machine.process.kilobytes("RssAnon");
        assert!(all >= little + 7000, "{little} kB, {all} kB");
    }
}

/// Its children need no pager.
#[test]
fn one_that_lives_on_a_pager_can_be_forked() {
    let family = Family::default();
    let (_pool, first) = at_work(&family);
    let saved = tempfile::tempdir().unwrap();
    create(&first, saved.path()).done();
    let mut pager = Pager::new(saved.path(), "good");
    let machine = server(&family, "firecracker", "--api-sock");
    pager.load(&machine, saved.path()).done();
    forked(&machine, &family, json!({ "count": 2 }), 4096);
    pager.kill();
    assert_eq!(state(&machine), "Running");
    forked(&machine, &family, json!({ "count": 2 }), 4096);
}

#[test]
fn one_that_lives_on_a_pager_can_be_saved() {
    let machine = is_saved_all_the_while(&saved());
    assert_eq!(machine.process.kilobytes("HugetlbPages"), 0);
}

#[test]
fn one_of_huge_pages_that_lives_on_a_pager_can_be_saved() {
    // 48 MiB, twice.
    let _pool = HugePages::for_guests(48);
    let machine = is_saved_all_the_while(&saved_with("2M"));
    assert_eq!(machine.process.kilobytes("HugetlbPages"), 48 << 10);
}

/// The machine that went on from a pager, in the end.
fn is_saved_all_the_while(saved: &TempDir) -> Server {
    let mut pager = Pager::new(saved.path(), "good");
    let mut machine = Server::firecracker();
    pager.load(&machine, saved.path()).done();
    machine.process.write("d");
    machine.process.wait_for("dirty");
    let diff = |folder: &Path| {
        json!({ "snapshot_type": "Diff", "snapshot_path": folder.join("state"),
            "mem_file_path": folder.join("memory") })
    };
    // What changed is a part of something that is not here, until it is laid over that.
    let part = tempfile::tempdir().unwrap();
    machine.put("/snapshot/create", diff(part.path())).done();
    let refused = Server::hull();
    refused
        .put("/snapshot/load", load(part.path(), &json!({})))
        .refused(400, &["went on from a pager"]);
    // Nor does it become whole by more of the kind.
    machine
        .put("/snapshot/create", diff(part.path()))
        .refused(400, &["laid over", "went on from a pager"]);
    let over = tempfile::tempdir().unwrap();
    fs::copy(part.path().join("memory"), over.path().join("changed")).unwrap();
    fs::copy(saved.path().join("memory"), over.path().join("memory")).unwrap();
    lay_over(&over.path().join("changed"), &over.path().join("memory"));
    // With what it was laid over its state is a snapshot.
    let both = json!({ "snapshot_path": part.path().join("state"), "resume_vm": true,
        "mem_backend": { "backend_type": "File", "backend_path": over.path().join("memory") } });
    let mut copy = Server::hull();
    copy.put("/snapshot/load", &both).done();
    is_intact(&mut copy, 4096);
    drop(copy);
    machine.put("/snapshot/create", diff(over.path())).done();
    // All of it is fetched first; then nobody needs the pager any more.
    let whole = tempfile::tempdir().unwrap();
    create(&machine, whole.path()).done();
    pager.kill();
    is_intact(&mut machine, 4096);
    assert_eq!(state(&machine), "Running");
    let later = tempfile::tempdir().unwrap();
    machine.process.write("dc");
    machine.process.wait_for("pages=6144");
    machine.put("/snapshot/create", diff(later.path())).done();
    // The second diff of it was laid over all that the pager has.
    for (folder, pages) in [(&over, 4096), (&whole, 4096), (&later, 6144)] {
        let mut copy = Server::hull();
        copy.put("/snapshot/load", load(folder.path(), &json!({ "resume_vm": true }))).done();
        is_intact(&mut copy, pages);
    }
    machine
}

#[test]
fn huge_pages_come_when_they_are_touched() {
    let _pool = HugePages::for_guests(24);
    let saved = saved_with("2M");
    let pager = Pager::new(saved.path(), "good");
    let mut machine = Server::firecracker();
    pager.load(&machine, saved.path()).done();
    machine.process.write("p");
    machine.process.wait_for("pause=");
    let little = machine.process.kilobytes("HugetlbPages");
    assert!((2 << 10..48 << 10).contains(&little), "{little} kB");
    is_intact(&mut machine, 2048);
    let all = machine.process.kilobytes("HugetlbPages");
    assert!(all > little && all < 48 << 10, "{little} kB, {all} kB");
}

#[test]
fn a_pager_that_does_not_do_its_work_is_refused() {
    let saved = saved();
    let mut machine = Server::firecracker();
    for (behaviour, words) in [
        ("deaf", "brings no pages"),
        ("silent", "brings no pages"),
        ("wrong", "other pages"),
        ("dies=0", "pages"),
    ] {
        let pager = Pager::new(saved.path(), behaviour);
        pager.load(&machine, saved.path()).refused(400, &["pager", words]);
        assert_eq!(state(&machine), "Not started");
    }
    // It goes on from the file instead.
    machine.put("/snapshot/load", load(saved.path(), &json!({ "resume_vm": true }))).done();
    is_intact(&mut machine, 2048);
}

#[test]
fn a_machine_ends_when_its_pager_dies() {
    let saved = saved();
    let mut pager = Pager::new(saved.path(), "good");
    let mut machine = Server::firecracker();
    pager.load(&machine, saved.path()).done();
    pager.kill();
    // Whether the guest waits for a page by now or not.
    machine.process.write("c");
    let outcome = machine.process.finish();
    outcome.failed(&["pager is gone"]);
}

#[test]
fn a_machine_whose_pager_hangs_can_be_ended() {
    let saved = saved();
    let pager = Pager::new(saved.path(), "hangs=60");
    let mut machine = Server::firecracker();
    pager.load(&machine, saved.path()).done();
    machine.process.write("c");
    machine.process.wait_for_message("the pager hangs");
    assert_eq!(state(&machine), "Running");
    machine.put("/actions", json!({ "action_type": "Quit" })).done();
    assert_eq!(machine.process.finish().code(), 0);
}

#[test]
fn a_machine_ends_when_its_pager_hangs_up_and_lives_on() {
    let saved = saved();
    let pager = Pager::new(saved.path(), "leaves=60");
    let mut machine = Server::firecracker();
    pager.load(&machine, saved.path()).done();
    machine.process.write("c");
    machine.process.finish().failed(&["pager is gone"]);
}
