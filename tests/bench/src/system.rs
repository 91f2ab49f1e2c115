//! The systems that are measured, and how each is told to run a guest.

use crate::Result;
use serde_json::{Value, json};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A system under measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    Hull,
    Firecracker,
    Qemu,
    /// tests/floor, which only boots.
    Floor,
}

impl System {
    /// The system of a name on the command line.
    pub fn parse(name: &str) -> Option<System> {
        [System::Hull, System::Firecracker, System::Qemu, System::Floor]
            .into_iter()
            .find(|system| system.name() == name)
    }

    /// Those of `systems` that have Firecracker's API, and its devices without help of the host's kernel.
    pub fn like_firecracker(systems: &[System]) -> Vec<System> {
        let like = |system: &System| matches!(system, System::Hull | System::Firecracker);
        systems.iter().copied().filter(like).collect()
    }

    /// Its name in tables and files.
    pub fn name(self) -> &'static str {
        match self {
            System::Hull => "hull",
            System::Firecracker => "firecracker",
            System::Qemu => "qemu",
            System::Floor => "floor",
        }
    }
}

/// Where the programs are.
pub struct Programs {
    pub hull: PathBuf,
    pub firecracker: PathBuf,
    pub qemu: PathBuf,
    pub floor: PathBuf,
    /// The payload guest.
    pub payload: PathBuf,
    /// A folder for disk images and snapshots.
    pub scratch: PathBuf,
}

impl Programs {
    /// The program of a system.
    pub fn program(&self, system: System) -> &Path {
        match system {
            System::Hull => &self.hull,
            System::Firecracker => &self.firecracker,
            System::Qemu => &self.qemu,
            System::Floor => &self.floor,
        }
    }

    /// The system's program, if it is not there.
    pub fn missing(&self, system: System) -> Option<&Path> {
        let program = self.program(system);
        (!program.is_file()).then_some(program)
    }
}

/// How a system does disk I/O, where it has a choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Engine {
    /// Firecracker's Sync, QEMU's threads, Hull's only one.
    Default,
    /// Firecracker's Async, QEMU's io_uring.
    Ring,
}

/// A disk of a guest.
#[derive(Clone)]
pub struct Disk {
    pub path: PathBuf,
    pub engine: Engine,
    /// Passes O_DIRECT, where the system can.
    pub direct: bool,
    /// What is written goes here, where the system is Hull.
    pub overlay: Option<PathBuf>,
}

/// One guest to run.
#[derive(Clone, Default)]
pub struct Guest {
    /// In place of the ordinary payload.
    pub kernel: Option<PathBuf>,
    /// RAM in MiB, in place of [`MEMORY_MIB`].
    pub mib: Option<u32>,
    /// Its RAM is where copies can have it. Hull alone knows that.
    pub forkable: bool,
    pub command_line: String,
    pub disk: Option<Disk>,
    /// Name of an existing TAP.
    pub tap: Option<String>,
    /// Where the Unix socket of a socket device goes.
    pub vsock: Option<PathBuf>,
}

/// RAM of a guest of which nothing else is said.
const MEMORY_MIB: u32 = 128;
const MAC: &str = "02:00:00:00:00:01";

impl Guest {
    /// A guest that runs a scenario of the payload.
    pub fn new(command_line: &str) -> Self {
        Guest { command_line: command_line.to_owned(), ..Guest::default() }
    }

    /// Its RAM in MiB.
    pub fn mib(&self) -> u32 {
        self.mib.unwrap_or(MEMORY_MIB)
    }

    /// The command that runs this guest on a system. `folder` is for files that it needs, and has
    /// to outlive it.
    pub fn command(&self, programs: &Programs, system: System, folder: &Path) -> Result<Command> {
        let mut command = Command::new(programs.program(system));
        let kernel = self.kernel.as_ref().unwrap_or(&programs.payload);
        match system {
            System::Hull => self.hull(&mut command, kernel),
            System::Firecracker => {
                let path = folder.join("firecracker.json");
                serde_json::to_writer(File::create(&path)?, &self.description(&programs.payload))?;
                command.args(["--no-api", "--level", "Error", "--config-file"]).arg(path);
            }
            System::Qemu => self.qemu(&mut command, kernel),
            System::Floor => {
                command.arg("boot").arg(kernel);
                command.arg(self.mib().to_string()).arg(&self.command_line);
            }
        }
        Ok(command)
    }

    fn hull(&self, command: &mut Command, kernel: &Path) {
        // In memory, as /run is on any host with systemd; a test machine may have it on a disk.
        command.env("XDG_RUNTIME_DIR", "/dev/shm");
        command.args(["run", "--cpus", "1", "--console", "stdio"]);
        command.arg("--memory").arg(format!("{}M", self.mib()));
        command.arg("--kernel").arg(kernel).arg("--cmdline").arg(&self.command_line);
        if let Some(disk) = &self.disk {
            let direct = if disk.direct { ",direct" } else { "" };
            let mut option = format!("path={}{direct}", disk.path.display());
            if let Some(overlay) = &disk.overlay {
                option.push_str(&format!(",overlay={}", overlay.display()));
            }
            command.arg("--disk").arg(option);
        }
        if let Some(tap) = &self.tap {
            command.arg("--net").arg(format!("tap={tap},mac={MAC}"));
        }
        if let Some(path) = &self.vsock {
            command.arg("--vsock").arg(format!("path={}", path.display()));
        }
    }

    /// This guest in the form of Firecracker's configuration file, which Hull takes as well.
    /// `payload` is its kernel if it has no other.
    pub fn description(&self, payload: &Path) -> Value {
        let kernel = self.kernel.as_deref().unwrap_or(payload);
        let drives: Vec<Value> = self
            .disk
            .iter()
            .map(|disk| {
                json!({
                    "drive_id": "disk",
                    "path_on_host": disk.path,
                    "is_root_device": false,
                    "is_read_only": false,
                    "cache_type": "Writeback",
                    "io_engine": if disk.engine == Engine::Ring { "Async" } else { "Sync" },
                })
            })
            .collect();
        let interfaces: Vec<Value> = self
            .tap
            .iter()
            .map(|tap| json!({ "iface_id": "net", "host_dev_name": tap, "guest_mac": MAC }))
            .collect();
        let mut config = json!({
            "boot-source": { "kernel_image_path": kernel, "boot_args": self.command_line },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": self.mib() },
            "drives": drives,
            "network-interfaces": interfaces,
        });
        if self.forkable {
            config["machine-config"]["forkable"] = true.into();
        }
        if let Some(path) = &self.vsock {
            config["vsock"] = json!({ "guest_cid": 3, "uds_path": path });
        }
        config
    }

    fn qemu(&self, command: &mut Command, kernel: &Path) {
        // Without ACPI it names its devices on the command line. PVM has no MSR for the architecture capabilities that `-cpu host` would pass on. An i8042
        // is where the payload resets the machine.
        command.args([
            "-M",
            "microvm,acpi=off,rtc=off",
            "-enable-kvm",
            "-cpu",
            "host,-arch-capabilities",
        ]);
        command.args(["-smp", "1", "-m", &self.mib().to_string(), "-device", "i8042"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-nographic"]);
        command.args(["-serial", "stdio", "-global", "virtio-mmio.force-legacy=false"]);
        command.arg("-kernel").arg(kernel).arg("-append").arg(&self.command_line);
        if let Some(disk) = &self.disk {
            let engine = if disk.engine == Engine::Ring { "io_uring" } else { "threads" };
            let cache = if disk.direct { "none" } else { "writeback" };
            let path = disk.path.display();
            command
                .arg("-drive")
                .arg(format!("if=none,id=disk,format=raw,file={path},aio={engine},cache={cache}"));
            command.args(["-device", "virtio-blk-device,drive=disk"]);
        }
        if let Some(tap) = &self.tap {
            command.arg("-netdev");
            command.arg(format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off"));
            command.args(["-device", &format!("virtio-net-device,netdev=net,mac={MAC}")]);
        }
    }
}
