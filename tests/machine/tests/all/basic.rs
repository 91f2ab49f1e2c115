//! What a guest finds: command line, memory, processors, timers, identity, console.

use machine_tests::{Guest, Running};
use std::time::{Duration, Instant};

#[test]
fn hello() {
    assert_eq!(Guest::new("hello").run().ok(), "hello\n");
}

#[test]
fn both_entries() {
    for (boot, protocol) in [("auto", "linux"), ("pvh", "pvh")] {
        let outcome = Guest::new("cmdline marker=42").option("--boot", boot).run();
        assert!(outcome.ok().contains(&format!("protocol {protocol}\n")), "{}", outcome.stdout);
        assert!(outcome.stdout.contains("marker=42"), "{}", outcome.stdout);
    }
}

#[test]
fn command_line_is_extended_or_replaced() {
    let extended = Guest::new("cmdline").run();
    assert!(extended.ok().contains("console=ttyS0"), "{}", extended.stdout);
    let replaced = Guest::new("cmdline").flag("--replace-cmdline").run();
    assert!(!replaced.ok().contains("console=ttyS0"), "{}", replaced.stdout);
    assert!(replaced.stdout.contains("payload=cmdline"), "{}", replaced.stdout);
}

#[test]
fn memory_is_all_there() {
    // Below, at and across the hole under 4 GiB; and a size that no large page divides.
    for (size, mib) in [("128M", 128), ("132108K", 129), ("3G", 3072), ("5G", 5120)] {
        for boot in ["auto", "pvh"] {
            let guest = Guest::bare()
                .option("--kernel", &*machine_tests::PAYLOAD)
                .option("--memory", size)
                .option("--boot", boot)
                .option("--cmdline", "payload=mem");
            let outcome = guest.run();
            outcome.ok();
            assert_eq!(outcome.number("bad"), 0, "{size}: {}", outcome.stdout);
            // All but what the machine keeps for itself below 1 MiB.
            let missing = (mib << 20) - outcome.number("ram").min(mib << 20);
            assert!(missing < 1 << 20, "{size}: {missing} bytes are missing");
        }
    }
}

#[test]
fn processors_come_up() {
    for count in [1, 2, 8, 64] {
        let outcome =
            Guest::new(&format!("smp cpus={count}")).option("--cpus", count.to_string()).run();
        outcome.ok();
        assert_eq!(outcome.number("cpus"), count, "{}", outcome.stdout);
        let others: Vec<String> = (1..count).map(|id| id.to_string()).collect();
        assert_eq!(outcome.value("others"), others.join(","));
    }
}

/// CPUID as the payload prints it: leaf and subleaf to eax, ebx, ecx, edx.
fn cpuid(outcome: &str, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let start = format!("cpuid {leaf:08x} {subleaf} ");
    let line = outcome.lines().find_map(|line| line.strip_prefix(&start))?;
    let mut values = line.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap());
    Some(std::array::from_fn(|_| values.next().unwrap()))
}

#[test]
fn processor_identity() {
    let outcome = Guest::new("cpuid").option("--cpus", "4").run();
    let text = outcome.ok();
    let [_, ebx, ecx, _] = cpuid(text, 1, 0).unwrap();
    assert_eq!(ebx >> 24, 0, "APIC id of the first processor");
    assert_eq!(ecx >> 31, 1, "hypervisor bit");
    assert_eq!(ecx >> 5 & 1, 0, "VMX is masked");
    if let Some([_, _, ecx, _]) = cpuid(text, 0x8000_0001, 0) {
        assert_eq!(ecx >> 2 & 1, 0, "SVM is masked");
    }
    let [_, ebx, ecx, edx] = cpuid(text, 0x4000_0000, 0).unwrap();
    let name: Vec<u8> = [ebx, ecx, edx].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(&name, b"KVMKVMKVM\0\0\0");
    if let Some([_, ebx, ecx, edx]) = cpuid(text, 0xb, 1) {
        assert_eq!((ebx & 0xffff, ecx >> 8 & 0xff, edx), (4, 2, 0), "four cores in one package");
    }
}

#[test]
fn timer_interrupts() {
    for how in ["", " halt=1"] {
        let outcome = Guest::new(&format!("timer count=20{how}")).run();
        outcome.ok();
        assert_eq!(outcome.number("interrupts"), 20);
    }
}

#[test]
fn every_machine_has_an_identity_of_its_own() {
    let ids: Vec<Vec<String>> =
        (0..2).map(|_| Guest::new("ids").run().ok().lines().map(str::to_owned).collect()).collect();
    let generation = |index: usize| ids[index][0].strip_prefix("vmgenid ").unwrap();
    assert_ne!(generation(0), generation(1));
    assert!(generation(0).bytes().any(|digit| digit != b'0'));
    // "VCLK", little-endian (the VMClock specification's magic).
    assert!(ids[0][1].starts_with("vmclock 56434c4b"), "{}", ids[0][1]);
}

#[test]
fn exits_of_each_kind() {
    for kind in ["out", "in", "mmio"] {
        let outcome = Guest::new(&format!("exits kind={kind} n=2000")).run();
        outcome.ok();
        assert!(outcome.number("ticks") > 0);
    }
}

#[test]
fn an_exception_is_the_guests_business() {
    let outcome = Guest::new("fault").run();
    assert_eq!(outcome.code(), 0);
    assert!(outcome.stdout.contains("payload: exception 6"), "{}", outcome.stdout);
}

#[test]
fn serial_input_comes_back() {
    Guest::new("echo").start().sends_back();
}

#[test]
fn closed_input_is_no_end() {
    let mut guest = Guest::new("echo").start();
    guest.wait_for("ready\n");
    guest.close_stdin();
    // The vCPU polls all the time. Another thread that did so would get as much time as it does.
    let start = cpu_ticks(&guest);
    let deadline = Instant::now() + Duration::from_secs(30);
    let (vcpu, others) = loop {
        std::thread::sleep(Duration::from_millis(50));
        let now = cpu_ticks(&guest);
        let (vcpu, others) = (now.0 - start.0, now.1 - start.1);
        if vcpu >= 50 {
            break (vcpu, others);
        }
        assert!(Instant::now() < deadline, "the vCPU had {vcpu} ticks");
    };
    assert!(others < vcpu / 4, "end of file is an event for ever: {others} of {vcpu} ticks");
    guest.signal(libc::SIGTERM);
    assert_eq!(guest.finish().code(), 143);
}

/// CPU time of the vCPU's thread and of all others, in hundredths of a second.
fn cpu_ticks(guest: &Running) -> (u64, u64) {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", guest.id())).unwrap();
    let times = tasks.flatten().filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let time: u64 =
            fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(if name.starts_with("vcpu") { (time, 0) } else { (0, time) })
    });
    times.fold((0, 0), |sum, time| (sum.0 + time.0, sum.1 + time.1))
}

#[test]
fn a_serial_flood_arrives_whole_and_costs_no_memory() {
    let mut guest = Guest::new("serialflood size=128K").start();
    guest.wait_for("0123");
    let before = guest.kilobytes("RssAnon");
    assert!(before > 0);
    let peak = guest.peak_kilobytes("RssAnon");
    let outcome = guest.finish();
    assert!(outcome.ok().len() == (128 << 10) + "done\n".len(), "{} bytes", outcome.stdout.len());
    // Half of what the guest said, and as a rule nothing.
    assert!(peak < before + 64, "from {before} to {peak} kB");
}

#[test]
fn console_to_a_file_and_to_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("console");
    let guest = |console: &str| Guest::new("hello").console(console).run();
    assert_eq!(guest(&format!("file={}", file.display())).ok(), "");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "hello\n");
    assert_eq!(guest("off").ok(), "");
}

#[test]
fn timings_name_the_boot_timer() {
    let outcome = Guest::new("boottimer").flag("--timings").run();
    outcome.ok();
    let line = |name: &str| {
        outcome
            .stderr
            .lines()
            .find(|line| line.trim_start().starts_with(name))
            .unwrap_or_else(|| panic!("no {name} in {}", outcome.stderr))
    };
    assert!(line("userspace reached").contains("0xd0000000"));
    assert!(line("userspace reached").contains(" ms"), "{}", outcome.stderr);
    for name in ["VM created", "kernel loaded", "first instruction", "first console byte", "end"] {
        assert!(line(name).contains(" ms"), "{}", outcome.stderr);
    }
}

#[test]
fn two_guests_at_once() {
    let first = Guest::new("echo").start();
    let mut second = Guest::new("echo").start();
    first.wait_for("ready");
    second.wait_for("ready");
    second.write("q");
    second.finish().ok();
    let mut first = first;
    first.write("still here q");
    first.wait_for("still here");
    first.finish().ok();
}

#[test]
fn start_is_quick() {
    // Far above what it takes, and far below what a wait somewhere would.
    let start = Instant::now();
    Guest::new("hello").run().ok();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
