//! All that the command line can say of a machine is in what `--print-config` prints, and comes
//! back from there.

use machine_tests::Guest;
use std::collections::BTreeSet;
use std::path::Path;
use tempfile::TempDir;

/// An option that goes without its value, too.
const BARE: &str = "no value";

/// Options that describe a machine, each with values that are not the default ones. Together they
/// have every key that the help names.
const OPTIONS: [(&str, &[&str]); 22] = [
    ("--kernel", &["/boot/vmlinuz"]),
    ("--initrd", &["/boot/initrd.img"]),
    ("--cmdline", &["quiet \"a\\b\" -- 'x' ü", ""]),
    ("--replace-cmdline", &[]),
    ("--boot", &["pvh", "bzimage"]),
    ("--force", &[]),
    ("--cpus", &["64", "3"]),
    ("--cpu", &["template=T2A,smt", "config=/a,,b.json", "template=T2S,smt=off"]),
    ("--memory", &["2M", "1073745920", "8T"]),
    ("--huge-pages", &[]),
    ("--forkable", &[]),
    (
        "--disk",
        &[
            "path=/a,,b \"c\".img,ro,id=first,root,cache=unsafe,direct,queues=3,rate=10M:1000ops",
            "plain.img,overlay=own.ovl",
            "image.qcow2,format=qcow2,backing",
            "path=x,cache=writethrough",
        ],
    ),
    (
        "--net",
        &[
            "tap",
            "tap=tap7,mac=02:00:00:00:00:0f,mtu=9000,rx-rate=5M,tx-rate=300ops/1s+20",
            "host=172.30.0.1/30",
            "fd=7",
            "queues=16",
        ],
    ),
    ("--vsock", &["path=/run/v.sock,cid=4294967294,keep", "v.sock"]),
    ("--balloon", &["size=1M,deflate-on-oom,stats-interval=7,reporting"]),
    ("--mmds", &["path=m,,d.json,net=net0,version=V2,address=169.254.1.2,imds-compat", "m.json"]),
    ("--rng", &[BARE, "rate=1M/100ms+5M"]),
    ("--console", &["tty", "stdio", "off", "file=/tmp/a b,device=virtio,rate=64K,drop"]),
    ("--name", &["the-one_1.2"]),
    ("--on-reboot", &["restart"]),
    ("--seccomp", &["log", "off"]),
    ("--i8042", &[]),
];

/// Options that say what is done with a machine.
const OTHERS: [&str; 9] = [
    "--api-sock",
    "--no-api",
    "--log",
    "--pidfile",
    "--timings",
    "--print-config",
    "--config",
    "--help",
    "--version",
];

/// Adds options with one value each: the `index`th, or the last.
fn with(guest: Guest, options: &[(&str, &[&str])], index: usize) -> Guest {
    options.iter().fold(guest, |guest, (name, values)| {
        match values.get(index.min(values.len().saturating_sub(1))) {
            Some(value) if *value != BARE => guest.flag(&format!("{name}={value}")),
            _ => guest.flag(name),
        }
    })
}

fn print(guest: Guest) -> String {
    let outcome = guest.flag("--print-config").run();
    assert_eq!(outcome.stderr, "");
    outcome.ok().to_owned()
}

/// What Hull makes of its own words.
fn again(folder: &TempDir, text: &str) -> String {
    let file = folder.path().join("machine.toml");
    std::fs::write(&file, text).unwrap();
    print(Guest::hull("run").option("--config", file))
}

#[test]
fn every_option_of_the_help_is_here() {
    let outcome = Guest::hull("run").flag("--help").run();
    let help = outcome.ok();
    let named: BTreeSet<&str> = help
        .lines()
        .filter(|line| line.starts_with("  ") && line.trim_start().starts_with('-'))
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("--")))
        .map(|word| word.split(['=', '[']).next().unwrap())
        .collect();
    let here: BTreeSet<&str> = OPTIONS.iter().map(|option| option.0).chain(OTHERS).collect();
    assert_eq!(named, here);
    // And every key of those that have keys.
    let mut keys = 0;
    for (option, values) in OPTIONS {
        let start = [" <OPTIONS>", "[=<OPTIONS>]"].iter().find_map(|with| {
            Some(help.find(&format!(" {option}{with}"))? + option.len() + with.len())
        });
        let Some(text) = start.map(|start| &help[start + 1..]) else { continue };
        // Up to the next option.
        let text = text.split("\n\n").next().unwrap();
        for key in text.split([' ', '[', ',']).filter_map(|part| {
            let key = part.split(['=', ']']).next().unwrap();
            let is_key = part.contains('=') || part.ends_with(']');
            (is_key && !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '-'))
                .then_some(key)
        }) {
            let used = values
                .iter()
                .any(|value| value.split(',').any(|pair| pair.split('=').next() == Some(key)));
            assert!(used, "no value for {option} has {key}=");
            keys += 1;
        }
    }
    assert!(keys > 10, "{keys} keys");
}

#[test]
fn every_option_is_printed_and_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let base = print(Guest::hull("run").option("--kernel", "k"));
    assert_eq!(again(&folder, &base), base);
    for (name, values) in OPTIONS {
        for index in 0..values.len().max(1) {
            let guest = match name {
                "--kernel" => Guest::hull("run"),
                "--mmds" => Guest::hull("run").option("--kernel", "k").option("--net", "tap"),
                _ => Guest::hull("run").option("--kernel", "k"),
            };
            let printed = print(with(guest, &[(name, values)], index));
            assert_ne!(printed, base, "{name} {values:?}");
            assert_eq!(again(&folder, &printed), printed, "{name} {values:?}");
        }
    }
}

#[test]
fn all_options_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for index in 0..4 {
        // 1 and 2 MiB of pages do not make 1073745920 bytes; huge ones are copied at a fork.
        let left_out = |name| name == if index == 0 { "--forkable" } else { "--huge-pages" };
        let options: Vec<_> = OPTIONS.into_iter().filter(|(name, _)| !left_out(*name)).collect();
        let printed = print(with(Guest::hull("run"), &options, index));
        assert_eq!(again(&folder, &printed), printed);
    }
    // Several of a kind, in their order.
    let all =
        OPTIONS.iter().fold(
            Guest::hull("run").option("--kernel", "k"),
            |guest, option| match option.0 {
                "--disk" | "--net" => {
                    option.1.iter().fold(guest, |guest, value| guest.option(option.0, value))
                }
                _ => guest,
            },
        );
    let printed = print(all);
    assert_eq!(printed.matches("[[disk]]").count(), 4);
    assert_eq!(printed.matches("[[net]]").count(), 5);
    assert!(printed.find("first").unwrap() < printed.find("plain.img").unwrap());
    assert_eq!(again(&folder, &printed), printed);
}

#[test]
fn values_are_printed_as_they_were_given() {
    let options = [
        "--kernel=k",
        "--cmdline=quiet \"a\" 'b'",
        "--boot=pvh",
        "--cpus=64",
        "--cpu=template=T2CL,smt",
        "--memory=1073745920",
        "--name=the-one_1.2",
        "--on-reboot=restart",
        "--seccomp=log",
        "--i8042",
        "--rng=rate=1M/100ms+5M",
        "--console=file=/tmp/a b,device=virtio,rate=64K,drop",
        "--disk=path=/i.qcow2,format=qcow2,backing",
        "--disk=path=/a,,b.img,overlay=/c d.ovl,ro,id=first,root,cache=unsafe,direct,queues=3,rate=10M:1000ops",
        "--net=tap=tap7,mac=02:00:00:00:00:0f,mtu=9000,queues=16,rx-rate=5M,tx-rate=300ops",
        "--net=host=172.30.0.1/30",
        "--net=fd=7",
        "--vsock=path=/run/v.sock,cid=4294967294,keep",
        "--balloon=size=1M,deflate-on-oom,stats-interval=7,reporting",
        "--mmds=m.json,net=net1,version=V2,address=169.254.1.2,imds-compat",
    ];
    let printed = print(options.iter().fold(Guest::hull("run"), |guest, text| guest.flag(text)));
    // In this order; other keys may stand between.
    let mut lines = printed.lines();
    for expected in [
        r#"name = "the-one_1.2""#,
        "cpus = 64",
        r#"on-reboot = "restart""#,
        r#"seccomp = "log""#,
        "i8042 = true",
        "rng = true",
        r#"rng-rate = "1M/100ms+5M""#,
        "[kernel]",
        r#"path = "k""#,
        r#"boot = "pvh""#,
        "[cpu]",
        "smt = true",
        r#"template = "T2CL""#,
        "[memory]",
        "[console]",
        r#"mode = "file""#,
        r#"path = "/tmp/a b""#,
        r#"device = "virtio""#,
        r#"rate = "64K/s""#,
        "drop = true",
        "[[disk]]",
        r#"path = "/i.qcow2""#,
        r#"format = "qcow2""#,
        "backing = true",
        "[[disk]]",
        r#"path = "/a,b.img""#,
        r#"overlay = "/c d.ovl""#,
        "ro = true",
        r#"id = "first""#,
        "root = true",
        r#"cache = "unsafe""#,
        "direct = true",
        "queues = 3",
        r#"rate = "10M/s:1000ops/s""#,
        "[[net]]",
        r#"tap = "tap7""#,
        r#"mac = "02:00:00:00:00:0f""#,
        "mtu = 9000",
        "queues = 16",
        r#"rx-rate = "5M/s""#,
        r#"tx-rate = "300ops/s""#,
        "[[net]]",
        r#"host = "172.30.0.1/30""#,
        "[[net]]",
        "fd = 7",
        "[vsock]",
        r#"path = "/run/v.sock""#,
        "cid = 4294967294",
        "keep = true",
        "[balloon]",
        r#"size = "1M""#,
        "deflate-on-oom = true",
        "stats-interval = 7",
        "reporting = true",
        "[mmds]",
        r#"path = "m.json""#,
        r#"net = ["net1"]"#,
        r#"version = "V2""#,
        r#"address = "169.254.1.2""#,
        "imds-compat = true",
    ] {
        assert!(lines.any(|line| line == expected), "no {expected} at its place in {printed}");
    }
    // Those that can be written in more than one way.
    assert!(
        printed.contains("quiet \"a\" 'b'") || printed.contains("quiet \\\"a\\\" 'b'"),
        "{printed}"
    );
    assert!(
        printed.contains("size = 1073745920") || printed.contains("size = \"1048580K\""),
        "{printed}"
    );
}

#[test]
fn keys_that_only_files_have() {
    let folder = tempfile::tempdir().unwrap();
    let text = "cpus = 2\n[kernel]\npath = \"k\"\n[memory]\ntrack-dirty-pages = true\n\
                [[cpu.modifiers.cpuid_modifiers]]\nleaf = \"0x7\"\nsubleaf = \"0\"\nflags = 1\n\
                modifiers = [{ register = \"ebx\", bitmap = \"0b10x\" }]\n\
                [[disk]]\npath = \"d\"\npartuuid = \"0a-1b\"\n\
                format = \"qcow2\"\nforked = 2\n[[net]]\nid = \"card\"\n";
    let printed = again(&folder, text);
    for key in [
        "leaf = \"0x7\"",
        "bitmap = \"0bxxxxxxxxxxxxxxxxxxxxxxxxxxxxx10x\"",
        "track-dirty-pages = true",
        "partuuid = \"0a-1b\"",
        "forked = 2",
        "id = \"card\"",
        "cpus = 2",
    ] {
        assert!(printed.contains(key), "no {key} in {printed}");
    }
    assert_eq!(again(&folder, &printed), printed);
}

#[test]
fn options_take_precedence_over_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.toml");
    std::fs::write(&file, "cpus = 2\n[kernel]\npath = \"k\"\n[[disk]]\npath = \"a\"\n").unwrap();
    let guest = |path: &Path| Guest::hull("run").option("--config", path);
    let printed = print(guest(&file).option("--cpus", "3").option("--disk", "b"));
    assert!(printed.contains("cpus = 3") && printed.contains("path = \"k\""), "{printed}");
    assert!(printed.find("path = \"a\"").unwrap() < printed.find("path = \"b\"").unwrap());
}
