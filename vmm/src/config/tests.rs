use proptest::prelude::*;

use super::*;

fn config() -> VmConfig {
    let mut config = VmConfig::default();
    config.kernel.path = "vmlinux".into();
    config
}

fn problem(change: impl FnOnce(&mut VmConfig)) -> String {
    let mut config = config();
    change(&mut config);
    config.validate().unwrap_err().to_string()
}

#[test]
fn sizes_read_and_print() {
    for (text, bytes) in [
        ("128M", 128 << 20),
        ("2G", 2 << 30),
        ("4096", 4096),
        ("1k", 1024),
        ("3MiB", 3 << 20),
        ("5gb", 5 << 30),
    ] {
        assert_eq!(text.parse::<ByteSize>(), Ok(ByteSize(bytes)));
    }
    for text in [
        "",
        "M",
        "-1",
        "1.5G",
        "12X",
        "99999999999T",
        "1 G",
        "+4K",
        "1MBB",
        "1Mii",
        "1Mi",
        "1B",
        "1iB",
    ] {
        assert!(text.parse::<ByteSize>().is_err(), "{text:?}");
    }
    assert_eq!(ByteSize(128 << 20).to_string(), "128M");
    assert_eq!(ByteSize(0).to_string(), "0");
}

proptest! {
    #[test]
    fn sizes_survive_printing(bytes in any::<u64>()) {
        prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
    }

    #[test]
    fn parsers_never_panic(text in ".{0,20}") {
        let _ = text.parse::<ByteSize>();
        let _ = text.parse::<MacAddress>();
        let _ = text.parse::<HostAddress>();
        let _ = validate_name(&text);
    }
}

#[test]
fn addresses_read_and_print() {
    let mac: MacAddress = "06:00:AC:1e:00:02".parse().unwrap();
    assert_eq!(mac.to_string(), "06:00:ac:1e:00:02");
    for text in ["", "06:00:ac:1e:00", "06:00:ac:1e:00:02:03", "6:0:ac:1e:0:2", "01:00:00:00:00:00"]
    {
        assert!(text.parse::<MacAddress>().is_err(), "{text:?}");
    }
    let host: HostAddress = "172.30.0.1/30".parse().unwrap();
    assert_eq!(host.to_string(), "172.30.0.1/30");
    for text in ["172.30.0.1", "172.30.0.1/33", "host/8", "/8"] {
        assert!(text.parse::<HostAddress>().is_err(), "{text:?}");
    }
}

#[test]
fn the_default_machine_is_valid() {
    config().validate().unwrap();
}

#[test]
fn refusals_name_the_field_and_what_is_allowed() {
    assert_eq!(problem(|c| c.cpus = 0), "cpus: 0 is not between 1 and 64");
    assert_eq!(problem(|c| c.cpus = 65), "cpus: 65 is not between 1 and 64");
    assert_eq!(problem(|c| c.memory.size = ByteSize(0)), "memory.size: 0 is less than 2M");
    assert_eq!(
        problem(|c| c.memory.size = ByteSize((4 << 20) + 1)),
        "memory.size: 4194305 is not a multiple of 4K"
    );
    assert!(problem(|c| c.memory.size = ByteSize(1 << 50)).contains("is more than"));
    assert!(problem(|c| c.name = Some("../x".into())).starts_with("name:"));
    assert!(problem(|c| c.kernel.path = PathBuf::new()).starts_with("kernel.path:"));
    assert!(problem(|c| c.console.mode = ConsoleMode::File).starts_with("console.path:"));
    let disk = DiskConfig { path: "d".into(), id: Some("x".into()), ..Default::default() };
    assert!(
        problem(|c| c.disk = vec![disk.clone(), disk.clone()]).contains("two disks are called x")
    );
    let queues = DiskConfig { queues: Some(17), path: "d".into(), ..Default::default() };
    assert_eq!(problem(|c| c.disk = vec![queues]), "disk[0].queues: 17 is not between 1 and 16");
    let tap = NetConfig { tap: Some("a-name-that-is-too-long".into()), ..Default::default() };
    assert!(problem(|c| c.net = vec![tap]).starts_with("net[0].tap:"));
    let host = NetConfig {
        tap: Some("tap0".into()),
        host: Some("10.0.0.1/24".parse().unwrap()),
        ..Default::default()
    };
    assert!(problem(|c| c.net = vec![host]).starts_with("net[0].host:"));
}

#[test]
fn the_18th_device_is_refused_by_name() {
    let disk = DiskConfig { path: "d".into(), ..Default::default() };
    let mut config = config();
    config.disk = vec![disk.clone(); 17];
    config.validate().unwrap();
    config.rng = true;
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "rng: is one device too many: a machine has at most 17"
    );
}

#[test]
fn unknown_keys_are_errors() {
    let err = serde_json::from_str::<VmConfig>(r#"{"cpuz": 2}"#).unwrap_err().to_string();
    assert!(err.contains("unknown field `cpuz`") && err.contains("`cpus`"), "{err}");
}

#[test]
fn a_configuration_survives_json() {
    let mut config = config();
    config.disk = vec![DiskConfig { path: "d".into(), root: true, ..Default::default() }];
    config.net = vec![NetConfig {
        mac: Some("06:00:ac:1e:00:02".parse().unwrap()),
        host: Some("10.0.0.1/24".parse().unwrap()),
        ..Default::default()
    }];
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
}
