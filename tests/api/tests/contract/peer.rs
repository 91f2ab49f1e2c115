//! A process that serves Firecracker's API, and what it is asked.

use api_tests::{Answer, Connection};
use serde_json::Value;
use std::fs;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};
use tempfile::TempDir;

use crate::table::State;

/// Firecracker 1.12.1, fetched if it is not there.
pub static FIRECRACKER: LazyLock<PathBuf> = LazyLock::new(|| {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../resources/peer");
    let output = Command::new(script).arg("firecracker").output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "no Firecracker to compare with: {error}");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
});

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is configured in all states but `fresh`.
const CONFIGURATION: [(&str, &str); 9] = [
    ("/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 128}"#),
    (
        "/boot-source",
        r#"{"kernel_image_path": "$KERNEL", "boot_args": "payload=spin", "initrd_path": null}"#,
    ),
    (
        "/drives/root",
        r#"{"drive_id": "root", "path_on_host": "$DIR/disk", "is_root_device": true, "is_read_only": false}"#,
    ),
    (
        "/drives/data",
        r#"{"drive_id": "data", "path_on_host": "$DIR/data", "is_root_device": false, "is_read_only": true, "rate_limiter": {"ops": {"size": 1000, "refill_time": 100}}}"#,
    ),
    (
        "/network-interfaces/eth0",
        r#"{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"}"#,
    ),
    ("/vsock", r#"{"guest_cid": 3, "uds_path": "$DIR/vsock"}"#),
    ("/balloon", r#"{"amount_mib": 8, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#),
    ("/mmds/config", r#"{"network_interfaces": ["eth0"], "version": "V2"}"#),
    ("/mmds", r#"{"latest": {"meta-data": {"id": "i-1"}}}"#),
];

/// What is asked after each request.
pub const VIEWS: [&str; 6] =
    ["/", "/vm/config", "/machine-config", "/balloon", "/mmds", "/balloon/statistics"];

pub struct Peer {
    process: Child,
    folder: TempDir,
}

impl Peer {
    /// Starts it in the calling thread's network namespace, and brings the machine into a state.
    pub fn start(mut command: Command, state: State) -> Peer {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| fs::File::create(folder.path().join(name)).unwrap();
        for name in ["disk", "data", "disk2"] {
            file(name).set_len(1 << 20).unwrap();
        }
        file("initrd").set_len(4096).unwrap();
        file("log");
        file("metrics");
        file("log2");
        file("metrics2");
        fs::write(folder.path().join("text"), "This is no kernel.\n").unwrap();
        let log = file("console");
        command.arg("--api-sock").arg(folder.path().join("api.sock"));
        command.env("XDG_RUNTIME_DIR", folder.path()).current_dir(folder.path());
        command.stdin(Stdio::piped()).stdout(log.try_clone().unwrap()).stderr(log);
        let peer = Peer { process: command.spawn().unwrap(), folder };
        // Somebody listens.
        drop(Connection::to(&peer.folder.path().join("api.sock")));
        peer.bring_to(state);
        peer
    }

    fn bring_to(&self, state: State) {
        if state == State::Fresh {
            self.expect(200, "GET", "/", "");
            return;
        }
        for (path, body) in CONFIGURATION {
            self.expect(204, "PUT", path, body);
        }
        let start = r#"{"action_type": "InstanceStart"}"#;
        match state {
            State::Fresh | State::Configured => {}
            State::Running | State::Paused => self.expect(204, "PUT", "/actions", start),
            State::Failed => {
                let text = r#"{"kernel_image_path": "$DIR/text"}"#;
                self.expect(204, "PUT", "/boot-source", text);
                self.expect(400, "PUT", "/actions", start);
            }
        }
        if state == State::Paused {
            self.expect(204, "PATCH", "/vm", r#"{"state": "Paused"}"#);
        }
    }

    fn expect(&self, status: u16, method: &str, path: &str, body: &str) {
        let answer = self.ask(method, path, body);
        let got = answer.as_ref().map(|answer| answer.status);
        let console = self.console();
        assert_eq!(got, Some(status), "{method} {path} {body}\n{answer:?}\n{console}");
    }

    /// What it has written.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.folder.path().join("console")).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A request on a connection of its own; `None` if nothing came back, or nobody listens.
    pub fn ask(&self, method: &str, path: &str, body: &str) -> Option<Answer> {
        let (path, body) = (self.fill_in(path), self.fill_in(body));
        let stream = UnixStream::connect(self.folder.path().join("api.sock")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Connection(stream).ask(method, &path, &body).answer()?;
        let kernel = machine_tests::PAYLOAD.display().to_string();
        answer.body = answer.body.replace(&self.path(), "$DIR").replace(&kernel, "$KERNEL");
        Some(answer)
    }

    fn path(&self) -> String {
        self.folder.path().display().to_string()
    }

    fn fill_in(&self, text: &str) -> String {
        text.replace("$DIR", &self.path())
            .replace("$KERNEL", &machine_tests::PAYLOAD.display().to_string())
            .replace("$30K", &"x".repeat(30_000))
            .replace("$51K", &"x".repeat(51_000))
            .replace("$60K", &"x".repeat(60_000))
    }

    /// How it ended: its exit code, or 128 and the signal; `None` while it runs.
    pub fn ended(&mut self) -> Option<i32> {
        let status = self.process.try_wait().unwrap()?;
        status.code().or_else(|| status.signal().map(|signal| 128 + signal))
    }

    /// As [`Peer::ended`], after at most that time.
    pub fn ends_within(&mut self, patience: Duration) -> Option<i32> {
        let deadline = Instant::now() + patience;
        loop {
            match self.ended() {
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
                ended => return ended,
            }
        }
    }

    /// What it says of the machine, without what is its own: name and version.
    pub fn views(&self) -> Vec<(&'static str, Option<(u16, Value)>)> {
        VIEWS
            .into_iter()
            .map(|view| {
                let answer = self.ask("GET", view, "").map(|answer| {
                    let mut body = if answer.status == 200 { answer.json() } else { Value::Null };
                    if view == "/" {
                        body["app_name"].take();
                        body["vmm_version"].take();
                    }
                    (answer.status, body)
                });
                (view, answer)
            })
            .collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
