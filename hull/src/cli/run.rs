//! Options of `hull run`, and how they become a [`VmConfig`].

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::de::DeserializeOwned;
use vmm::config::{
    BootMode, ByteSize, ConfigError, ConsoleConfig, ConsoleMode, DiskConfig, MAX_CPUS, NetConfig,
    OnReboot, RateLimit, VmConfig, VsockConfig,
};
use vmm::seccomp;

use super::{ProcessArgs, ReachArgs};
use crate::keyvalue;

const RUN_EXAMPLES: &str = "\
Examples:
  hull run --kernel vmlinuz --initrd initrd.img
  hull run --kernel vmlinux --disk path=root.ext4,root --net tap --cpus 2 --memory 1G
  hull run --config machine.toml --print-config

A RATE is 10M (bytes per second), 1000ops (requests per second), both (10M:1000ops), or a bucket,
the time in which it refills, and a burst for once: 10M/100ms+50M.

In a terminal, Ctrl-A x ends the machine and Ctrl-A ? helps.";

// Options of `hull run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// Kernel to boot: an ELF vmlinux or a bzImage (vmlinuz)
    #[arg(short, long, value_name = "FILE", required_unless_present = "config")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(short, long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel arguments, added to the default ones
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Use --cmdline alone, without the default arguments
    #[arg(long)]
    pub replace_cmdline: bool,
    /// Entry of the kernel
    #[arg(long, value_name = "HOW")]
    pub boot: Option<Boot>,
    /// Start a kernel even if it is known not to come up on this host
    #[arg(long)]
    pub force: bool,
    /// Number of vCPUs, 1 to 64 [default: 1]
    #[arg(short, long, value_name = "N", value_parser = cpus, allow_negative_numbers = true)]
    pub cpus: Option<u32>,
    /// What the guest sees of the host's CPU: [smt][,template=C3|T2|T2S|T2CL|T2A][,config=FILE]
    #[arg(long, value_name = "OPTIONS")]
    pub cpu: Option<String>,
    /// Size of the guest's memory: 128M, 2G [default: 512M]
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Take the guest's memory from the host's pool of 2 MiB pages
    #[arg(long)]
    pub huge_pages: bool,
    /// Keep the guest's memory where copies of the machine can have it: it is halted for shorter when it is
    /// forked first
    #[arg(long)]
    pub forkable: bool,
    /// A disk: path=FILE[,format=raw|qcow2[,backing]][,overlay=FILE][,ro][,id=NAME][,root][,cache=writeback|writethrough|unsafe][,direct][,queues=N][,rate=RATE]
    #[arg(short, long, value_name = "OPTIONS")]
    pub disk: Vec<String>,
    /// A network card: tap[=NAME][,mac=ADDR][,host=ADDR/PREFIX][,mtu=N][,queues=N][,rx-rate=RATE][,tx-rate=RATE], or fd=N
    #[arg(short, long, value_name = "OPTIONS")]
    pub net: Vec<String>,
    /// Streams between the guest and programs of the host: path=SOCKET[,cid=N][,keep]
    #[arg(long, value_name = "OPTIONS")]
    pub vsock: Option<String>,
    /// Memory that the guest lends to the host: size=SIZE[,deflate-on-oom][,stats-interval=SECONDS][,reporting]
    #[arg(long, value_name = "OPTIONS")]
    pub balloon: Option<String>,
    /// Metadata that the guest reads over its network card, at http://169.254.169.254:
    /// path=FILE[,net=CARD][,version=V1|V2][,address=ADDR][,imds-compat]
    #[arg(long, value_name = "OPTIONS")]
    pub mmds: Option<String>,
    /// Give the guest a source of entropy [=rate=RATE]
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, require_equals = true,
          default_missing_value = "")]
    pub rng: Option<String>,
    /// The guest's console: tty, stdio, file=PATH or off [,device=serial|virtio][,rate=RATE][,drop]
    #[arg(long, value_name = "OPTIONS")]
    pub console: Option<String>,
    /// Name of the machine [default: vm-PID]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    #[command(flatten)]
    pub reach: ReachArgs,
    /// What a guest reboot does [default: exit]
    #[arg(long, value_name = "WHAT")]
    pub on_reboot: Option<Reboot>,
    /// Declare a keyboard controller to the guest
    #[arg(long)]
    pub i8042: bool,
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Print when the machine reached which point, from process start, at the end. A guest says
    /// that it reached userspace by writing the byte 123 to address 0xd0000000
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "table")]
    pub timings: Option<Format>,
    /// Print the configuration that the options amount to, and do nothing
    #[arg(long)]
    pub print_config: bool,
    /// Configuration file (TOML or JSON); options are added to it or take precedence
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `--boot`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Boot {
    /// The 64-bit Linux entry; a bzImage is unpacked on the host
    Auto,
    /// The PVH entry
    Pvh,
    /// The bzImage unpacks itself in the guest (keeps kernel address randomisation)
    Bzimage,
}

/// `--on-reboot`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Reboot {
    /// The machine ends
    Exit,
    /// The machine starts over
    Restart,
}

/// What may follow `--rng=`.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RngOptions {
    rate: Option<RateLimit>,
}

/// A command line or configuration file that says nothing sensible.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// A `key=value` option.
    #[error("--{option} {text:?}: {reason}")]
    Option {
        /// Name of the option without dashes.
        option: &'static str,
        /// Its value.
        text: String,
        /// What is wrong.
        reason: String,
    },
    /// The configuration file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The configuration file is not valid.
    #[error("{}: {reason}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Position and reason.
        reason: String,
    },
    /// `--print-config` has no way to write a value, such as a path that is not UTF-8.
    #[error("this configuration cannot be written as a file")]
    Print(#[from] toml::ser::Error),
    /// The values do not make a machine.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl RunArgs {
    /// The machine that file and options together describe, checked.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn config(&self) -> std::result::Result<VmConfig, UsageError> {
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => VmConfig::default(),
        };
        let kernel = &mut config.kernel;
        set(&mut kernel.path, self.kernel.clone());
        set(&mut kernel.initrd, self.initrd.clone().map(Some));
        set(&mut kernel.cmdline, self.cmdline.clone().map(Some));
        kernel.replace_cmdline |= self.replace_cmdline;
        kernel.force |= self.force;
        set(
            &mut kernel.boot,
            self.boot.map(|boot| match boot {
                Boot::Auto => BootMode::Auto,
                Boot::Pvh => BootMode::Pvh,
                Boot::Bzimage => BootMode::Bzimage,
            }),
        );
        set(&mut config.cpus, self.cpus);
        if let Some(text) = &self.cpu {
            config.cpu = read_option("cpu", text, keyvalue::split(text))?;
        }
        set(&mut config.memory.size, self.memory);
        config.memory.huge_pages |= self.huge_pages;
        config.memory.forkable |= self.forkable;
        if let Some(text) = &self.rng {
            let options: RngOptions = read_option("rng", text, keyvalue::split(text))?;
            config.rng = true;
            set(&mut config.rng_rate, options.rate.map(Some));
        }
        config.i8042 |= self.i8042;
        set(&mut config.name, self.name.clone().map(Some));
        set(
            &mut config.on_reboot,
            self.on_reboot.map(|what| match what {
                Reboot::Exit => OnReboot::Exit,
                Reboot::Restart => OnReboot::Restart,
            }),
        );
        set(&mut config.seccomp, self.process.seccomp.map(seccomp::Mode::from));
        for text in &self.disk {
            config.disk.push(disk(text)?);
        }
        for text in &self.net {
            config.net.push(net(text)?);
        }
        if let Some(text) = &self.vsock {
            config.vsock = Some(vsock(text)?);
        }
        if let Some(text) = &self.balloon {
            config.balloon = Some(read_option("balloon", text, keyvalue::split(text))?);
        }
        if let Some(text) = &self.mmds {
            config.mmds = Some(read_option("mmds", text, leading_path(text))?);
        }
        if let Some(text) = &self.console {
            config.console = console(text)?;
        }
        config.validate()?;
        Ok(config)
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

pub fn read_option<T: DeserializeOwned>(
    option: &'static str,
    text: &str,
    pairs: Vec<keyvalue::Pair>,
) -> std::result::Result<T, UsageError> {
    keyvalue::read(&pairs).map_err(|err| UsageError::Option {
        option,
        text: text.to_owned(),
        reason: err.to_string(),
    })
}

/// A file's name alone is its path.
fn disk(text: &str) -> std::result::Result<DiskConfig, UsageError> {
    const FLAGS: [&str; 3] = ["ro", "root", "direct"];
    let mut pairs = keyvalue::split(text);
    if let Some(first) = pairs.first_mut()
        && first.value.is_none()
        && !FLAGS.contains(&first.key.as_str())
    {
        let path = std::mem::replace(&mut first.key, "path".to_owned());
        first.value = Some(path);
    }
    let disk: DiskConfig = read_option("disk", text, pairs)?;
    if disk.forked > 0 {
        let reason = "forked is only for files that Hull made; backing follows what an image names";
        let reason = reason.to_owned();
        return Err(UsageError::Option { option: "disk", text: text.to_owned(), reason });
    }
    Ok(disk)
}

/// `tap` without a name asks for a TAP to be made, which is what no name at all means as well.
fn net(text: &str) -> std::result::Result<NetConfig, UsageError> {
    let mut pairs = keyvalue::split(text);
    if pairs.is_empty() {
        let reason = "write tap, tap=NAME or fd=N".to_owned();
        return Err(UsageError::Option { option: "net", text: text.to_owned(), reason });
    }
    pairs.retain(|pair| pair.key != "tap" || pair.value.is_some());
    read_option("net", text, pairs)
}

/// A socket's path alone is enough.
fn vsock(text: &str) -> std::result::Result<VsockConfig, UsageError> {
    read_option("vsock", text, leading_path(text))
}

/// Options of which the first is a path if it has no key.
pub fn leading_path(text: &str) -> Vec<keyvalue::Pair> {
    let mut pairs = keyvalue::split(text);
    if let Some(first) = pairs.first_mut().filter(|first| first.value.is_none()) {
        let path = std::mem::replace(&mut first.key, "path".to_owned());
        first.value = Some(path);
    }
    pairs
}

/// `MODE[,device=…]`, with `file=PATH` as a mode.
pub fn console(text: &str) -> std::result::Result<ConsoleConfig, UsageError> {
    let mut pairs = keyvalue::split(text);
    if let Some(first) = pairs.first_mut().filter(|first| first.key != "mode") {
        match (first.key.as_str(), first.value.take()) {
            ("file", Some(path)) => {
                *first = keyvalue::Pair { key: "mode".into(), value: Some("file".into()) };
                pairs.push(keyvalue::Pair { key: "path".into(), value: Some(path) });
            }
            (mode, None) => {
                *first = keyvalue::Pair { key: "mode".into(), value: Some(mode.to_owned()) };
            }
            (_, value) => first.value = value,
        }
    }
    let config: ConsoleConfig = read_option("console", text, pairs)?;
    if config.mode == ConsoleMode::File && config.path.is_none() {
        return Err(UsageError::Option {
            option: "console",
            text: text.to_owned(),
            reason: "write file=PATH".into(),
        });
    }
    Ok(config)
}

/// Most bytes of a configuration file.
const LONGEST_CONFIG: u64 = 1 << 20;

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(LONGEST_CONFIG + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LONGEST_CONFIG {
        return Err(io::Error::other("it is longer than 1 MiB"));
    }
    Ok(text)
}

/// A number of vCPUs, as far as it is a number: how many there may be is the machine's to say.
fn cpus(text: &str) -> std::result::Result<u32, String> {
    text.parse().map_err(|_| format!("{text} is not a number between 1 and {MAX_CPUS}"))
}

/// Reads a configuration file: JSON if it starts with a brace, else TOML.
fn read_config(path: &Path) -> std::result::Result<VmConfig, UsageError> {
    let text =
        read_text(path).map_err(|source| UsageError::Read { path: path.to_owned(), source })?;
    // Some editors put a byte order mark in front.
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let parsed = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|err| err.to_string())
    } else {
        toml::from_str(text).map_err(|err| err.to_string().trim_end().to_owned())
    };
    parsed.map_err(|mut reason| {
        if let Some(nearest) = keyvalue::suggestion(&reason) {
            reason.push_str(&format!("; did you mean `{nearest}`?"));
        }
        UsageError::Parse { path: path.to_owned(), reason }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn config(args: &[&str]) -> std::result::Result<VmConfig, UsageError> {
        let args = ["hull", "run", "--kernel", "k"].iter().chain(args);
        match Cli::try_parse_from(args).unwrap().command {
            Command::Run(args) => args.config(),
            _ => unreachable!(),
        }
    }

    #[test]
    fn options_become_a_configuration() {
        let config = config(&[
            "--cpus",
            "2",
            "--memory",
            "128M",
            "--disk",
            "path=a,root",
            "--disk",
            "path=b,ro",
            "--net",
            "tap",
            "--net",
            "tap=t0,queues=2",
            "--console",
            "file=/x,device=virtio",
            "--on-reboot",
            "restart",
            "--rng",
            "--vsock",
            "path=v.sock,cid=7",
        ])
        .unwrap();
        assert_eq!((config.cpus, config.memory.size), (2, ByteSize(128 << 20)));
        assert!(config.disk[0].root && config.disk[1].ro && config.rng);
        assert_eq!(config.net[0].tap, None);
        assert_eq!(config.net[1].tap.as_deref(), Some("t0"));
        assert_eq!(config.console.path.as_deref(), Some(Path::new("/x")));
        assert_eq!(config.on_reboot, OnReboot::Restart);
        assert_eq!(config.vsock, Some(VsockConfig { path: "v.sock".into(), cid: 7, keep: false }));
    }

    #[test]
    fn a_socket_device_in_few_words() {
        let config = config(&["--vsock", "/run/v"]).unwrap();
        assert_eq!(config.vsock, Some(VsockConfig { path: "/run/v".into(), cid: 3, keep: false }));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config, "{text}");
        for (text, reason) in [
            ("", "--vsock \"\": missing field `path`"),
            ("cid=5", "missing field `path`"),
            ("path=v,cid=2", "vsock.cid: 2 is not between 3 and 4294967294"),
            ("path=v,port=3", "unknown field `port`"),
        ] {
            let err = self::config(&["--vsock", text]).unwrap_err().to_string();
            assert!(err.contains(reason), "{text}: {err}");
        }
    }

    #[test]
    fn rates_are_read_from_options_and_files() {
        let config = config(&[
            "--disk",
            "a,rate=10M/100ms+50M:7ops",
            "--net",
            "tap,rx-rate=1M,tx-rate=9ops",
            "--rng=rate=1K",
            "--console",
            "stdio,rate=2K",
        ])
        .unwrap();
        let text = toml::to_string(&config).unwrap();
        for line in [
            "rate = \"10M/100ms+50M:7ops/s\"",
            "rx-rate = \"1M/s\"",
            "tx-rate = \"9ops/s\"",
            "rng-rate = \"1K/s\"",
            "rate = \"2K/s\"",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config);
        let table =
            "kernel.path = \"k\"\n[[disk]]\npath = \"a\"\nrate = { bandwidth = \"1K\", ops = 3 }";
        let read: VmConfig = toml::from_str(table).unwrap();
        assert_eq!(read.disk[0].rate.unwrap().to_string(), "1K/s:3ops/s");
    }

    #[test]
    fn a_balloon_is_read() {
        let config =
            config(&["--balloon", "size=64M,deflate-on-oom,stats-interval=1,reporting"]).unwrap();
        let balloon = config.balloon.as_ref().unwrap();
        assert_eq!((balloon.size, balloon.stats_interval), (ByteSize(64 << 20), 1));
        assert!(balloon.deflate_on_oom && balloon.reporting);
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config, "{text}");
        let refused = |text| self::config(&["--balloon", text]).unwrap_err().to_string();
        assert!(refused("size=1G").contains("more than the guest's memory of 512M"));
        assert!(refused("stats-interval=-1").contains("stats-interval"));
        assert!(refused("sise=1M").contains("did you mean `size`?"));
    }

    #[test]
    fn metadata_is_read() {
        let config = config(&[
            "--net",
            "tap,id=a",
            "--mmds",
            "m.json,net=a,version=V2,address=169.254.1.2,imds-compat",
        ])
        .unwrap();
        let mmds = config.mmds.as_ref().unwrap();
        assert_eq!(mmds.path.as_deref(), Some(Path::new("m.json")));
        assert_eq!((mmds.net.as_slice(), mmds.imds_compat), (&["a".to_owned()][..], true));
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config, "{text}");
        let refused =
            |text| self::config(&["--net", "tap", "--mmds", text]).unwrap_err().to_string();
        assert!(refused("m,net=b").contains("mmds.net: there is no network card b"));
        assert!(refused("m,address=10.0.0.1").contains("mmds.address: 10.0.0.1 is not between"));
        assert!(refused("m,version=V3").contains("V3"));
        assert!(self::config(&["--mmds", "m"]).is_err());
    }

    #[test]
    fn the_source_of_entropy_is_a_flag_that_takes_options() {
        assert!(config(&["--rng"]).unwrap().rng);
        assert!(config(&[]).is_ok_and(|config| !config.rng));
        let err = config(&["--rng=rat=1K"]).unwrap_err().to_string();
        assert!(err.contains("did you mean `rate`?"), "{err}");
        let err = config(&["--disk", "a,rate=fast"]).unwrap_err().to_string();
        assert!(err.contains("rate: ") && err.contains("10M/100ms+50M"), "{err}");
    }

    #[test]
    fn what_is_printed_can_be_read_back() {
        let config = config(&["--disk", "path=a,root,cache=unsafe", "--net", "tap=t0"]).unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(toml::from_str::<VmConfig>(&text).unwrap(), config, "{text}");
    }

    #[test]
    fn file_errors_have_a_position_and_a_suggestion() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let fails = |text: &str| {
            fs::write(file.path(), text).unwrap();
            read_config(file.path()).unwrap_err().to_string()
        };
        let err = fails("cpus = 2\ncpuss = 3\n");
        assert!(err.contains("line 2") && err.contains("did you mean `cpus`?"), "{err}");
        let err = fails("cpus = \"two\"\n");
        assert!(err.contains("line 1, column 8"), "{err}");
        let err = fails("{\"memory\": {\"sise\": 3}}");
        assert!(err.contains("line 1 column") && err.contains("`size`"), "{err}");
    }

    #[test]
    fn console_modes() {
        let mode = |text| console(text).map(|console| console.mode);
        assert_eq!(mode("off").unwrap(), ConsoleMode::Off);
        assert_eq!(mode("stdio,device=virtio").unwrap(), ConsoleMode::Stdio);
        assert!(mode("file").unwrap_err().to_string().ends_with("write file=PATH"));
        let err = mode("pty").unwrap_err().to_string();
        assert!(err.contains("unknown variant `pty`"), "{err}");
        assert!(err.ends_with("did you mean `tty`?"), "{err}");
    }
}
