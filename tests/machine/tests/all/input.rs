//! What bad input gets: a reason on stderr, a code that is not 0, nothing left behind.

use machine_tests::{Guest, PAYLOAD};
use std::fs;
use std::path::{Path, PathBuf};

/// The payload with bytes changed, and its length cut or kept.
fn spoiled(folder: &Path, name: &str, change: impl Fn(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(&*PAYLOAD).unwrap();
    change(&mut bytes);
    let path = folder.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn kernel(path: &Path) -> Guest {
    Guest::bare().option("--kernel", path).option("--memory", "128M")
}

#[test]
fn kernels_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let refused = |path: &Path, words: &[&str]| {
        let outcome = kernel(path).run();
        outcome.failed(words);
        // Once, whatever the chain of reasons.
        let name = path.display().to_string();
        assert_eq!(outcome.stderr.matches(&name).count(), 1, "{}", outcome.stderr);
    };
    refused(
        &at.join("none"),
        &["cannot open the kernel", "No such file", "hint: look for kernels"],
    );
    refused(at, &["hull: the kernel ", " is not a regular file"]);
    let cases: [(&str, &[u8], &str); 5] = [
        ("a", b"", "the kernel image is empty"),
        ("b", b"#!/bin/sh\necho hello\n", "not a kernel image: it looks like a script"),
        ("c", b"Dear kernel,\n", "not a kernel image: it looks like text"),
        ("d", &[0; 70_000], "not a kernel image: it looks like nothing but zeroes"),
        ("e", &[0x91; 70_000], "not a kernel image: it looks like data of no known format"),
    ];
    for (name, content, words) in cases {
        let path = spoiled(at, name, |bytes| *bytes = content.to_vec());
        refused(&path, &["hull: cannot use the kernel ", words]);
    }
}

#[test]
fn kernels_cut_short() {
    let folder = tempfile::tempdir().unwrap();
    let length = fs::metadata(&*PAYLOAD).unwrap().len() as usize;
    for (what, lengths) in [
        ("the ELF header", &[4, 16, 19, 63][..]),
        ("the ELF program headers", &[64, 65, 100, 231]),
        ("a segment", &[232, 4096, length / 2]),
    ] {
        for &keep in lengths {
            let path = spoiled(folder.path(), "cut", |bytes| bytes.truncate(keep));
            kernel(&path).run().failed(&[
                "hull: cannot use the kernel ",
                &format!("the kernel image is truncated: {what} would end at byte "),
                &format!(", the file has {keep}\n"),
            ]);
        }
    }
    // Too short to have a magic number.
    let path = spoiled(folder.path(), "cut", |bytes| bytes.truncate(1));
    kernel(&path).run().failed(&["the file is not a kernel image"]);
}

#[test]
fn kernels_for_other_machines() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(usize, &[u8], &str); 6] = [
        (18, &[183, 0], "is for aarch64, this machine is 64-bit x86"),
        (4, &[1], "is for 32-bit x86, this machine is 64-bit x86"),
        // x86-64's number, read in the other order.
        (5, &[2], "is for ELF machine 15872, this machine is 64-bit x86"),
        (4, &[7], "is malformed: its ELF class is 7"),
        (16, &[1, 0], "it looks like an object file or kernel module"),
        (56, &[0, 0], "is malformed: it has 0 ELF program headers"),
    ];
    for (at, value, words) in cases {
        let path = spoiled(folder.path(), "spoiled", |bytes| {
            bytes[at..at + value.len()].copy_from_slice(value);
        });
        kernel(&path).run().failed(&["hull: cannot use the kernel ", words]);
    }
}

/// Offset of a field of a program header; 64 is where the payload's table begins.
fn program_header(index: usize, field: usize) -> usize {
    64 + index * 56 + field
}

#[test]
fn kernels_whose_segments_go_astray() {
    let folder = tempfile::tempdir().unwrap();
    const ADDRESS: usize = 24;
    const FILE_SIZE: usize = 32;
    const MEMORY_SIZE: usize = 40;
    let cases: [(&str, usize, u64, &[&str]); 8] = [
        ("outside-memory", ADDRESS, 1 << 40, &["outside the guest's memory", "hint:"]),
        ("wraps", ADDRESS, u64::MAX - 4095, &["malformed", "beyond any memory"]),
        ("at-the-end", ADDRESS, (128 << 20) - 4096, &["outside the guest's memory"]),
        ("on-the-tables", ADDRESS, 0x7000, &["malformed", "0x7000", "below 1 MiB"]),
        ("in-the-hole", ADDRESS, 0xd000_0000, &["overlaps the hole for devices"]),
        ("longer-than-the-file", FILE_SIZE, 1 << 30, &["truncated"]),
        ("larger-than-memory", MEMORY_SIZE, 1 << 40, &["overlaps the hole for devices"]),
        ("larger-than-anything", MEMORY_SIZE, u64::MAX, &["malformed", "beyond any memory"]),
    ];
    for (name, field, value, words) in cases {
        let path = spoiled(folder.path(), name, |bytes| {
            let at = program_header(1, field);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            if field == FILE_SIZE {
                // So that it is the file that is too short, not memory.
                let at = program_header(1, MEMORY_SIZE);
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        });
        kernel(&path).run().failed(words);
    }
}

#[test]
fn every_byte_of_the_headers_may_be_wrong() {
    // None of them may end in a panic or a hang; a guest that then runs wild is ended.
    let folder = tempfile::tempdir().unwrap();
    for at in (0..64 + 3 * 56).step_by(5) {
        let path = spoiled(folder.path(), "spoiled", |bytes| bytes[at] ^= 0xff);
        let guest = kernel(&path).option("--cmdline", "payload=hello").start();
        std::thread::sleep(std::time::Duration::from_millis(40));
        guest.signal(libc::SIGTERM);
        let outcome = guest.finish();
        assert!(!outcome.stderr.contains("panicked"), "byte {at}: {}", outcome.stderr);
        assert!([0, 1, 2, 3, 143].contains(&outcome.code()), "byte {at}: {outcome:?}");
    }
}

#[test]
fn memory_sizes() {
    for (size, words) in [
        ("0", &["memory.size: 0 is less than 2M"][..]),
        ("1000", &["memory.size", "less than 2M"]),
        ("4194305", &["memory.size", "not a multiple of 4K"]),
        ("128Q", &["128Q", "is not a size"]),
        ("128MBB", &["128MBB", "is not a size"]),
        ("-1", &["-1", "is not a size"]),
        ("", &["--memory <SIZE>", "\"\" is not a size"]),
        ("18446744073709551615", &["memory.size", "not a multiple of 4K"]),
        ("17179869184G", &["17179869184G", "is not a size"]),
        ("100T", &["memory.size", "more than the 8T"]),
    ] {
        let guest = Guest::bare().option("--kernel", &*PAYLOAD);
        guest.flag(&format!("--memory={size}")).run().misused(words);
    }
    // Too little for the tables.
    for size in ["4K", "64K", "1M"] {
        let guest = Guest::bare().option("--kernel", &*PAYLOAD).option("--memory", size);
        guest.run().misused(&["memory.size", "less than 2M"]);
    }
}

#[test]
fn processor_counts() {
    for (count, words) in [
        ("0", "hull: cpus: 0 is not between 1 and 64\n"),
        ("65", "hull: cpus: 65 is not between 1 and 64\n"),
        ("4294967295", "hull: cpus: 4294967295 is not between 1 and 64\n"),
        ("-1", "invalid value '-1' for '--cpus <N>'"),
        ("many", "invalid value 'many' for '--cpus <N>'"),
        ("", "invalid value '' for '--cpus <N>'"),
        ("4294967296", "invalid value '4294967296' for '--cpus <N>'"),
    ] {
        Guest::new("hello").flag(&format!("--cpus={count}")).run().misused(&[words]);
    }
}

#[test]
fn command_lines() {
    Guest::new(&format!("hello x={}", "y".repeat(5000))).run().misused(&[
        "the kernel command line has 5",
        "bytes, this kernel takes 2047",
        "hint: shorten",
    ]);
    // As long as it may be is fine.
    Guest::new(&format!("hello x={}", "y".repeat(1500))).run().ok();
}

#[test]
fn initial_ram_disks() {
    let folder = tempfile::tempdir().unwrap();
    let large = folder.path().join("large");
    fs::File::create(&large).unwrap().set_len(256 << 20).unwrap();
    let empty = folder.path().join("empty");
    fs::write(&empty, "").unwrap();
    let run = |path: &Path| Guest::new("hello").option("--initrd", path).run();
    run(&large).failed(&["the initrd of 268435456 bytes", "hint: give the guest more --memory"]);
    run(&folder.path().join("none")).failed(&["cannot open the initrd", "none"]);
    run(folder.path()).failed(&["the initrd", "not a regular file"]);
    run(&empty).failed(&["the initrd", "the file is empty"]);
}

#[test]
fn files_used_twice() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::write(&disk, [7; 4096]).unwrap();
    Guest::new("hello")
        .disk(&disk, "")
        .disk(&disk, "")
        .run()
        .failed(&["cannot set up disk1", "is disk0 of this machine"]);
    Guest::new("hello").disk(&disk, ",ro").disk(&disk, ",ro").run().ok();
    // A console writes over what is there.
    let console = format!("file={}", disk.display());
    let outcome = Guest::new("hello").console(console).disk(&disk, "").run();
    outcome.failed(&["cannot write the console to ", "the machine uses it for something else"]);
    assert_eq!(fs::read(&disk).unwrap(), [7; 4096]);
    let guest = Guest::new("hello").disk(&disk, ",id=disk1").disk(&folder.path().join("other"), "");
    guest.run().misused(&["disk[1].id: two disks are called disk1"]);
}

#[test]
fn one_device_too_many() {
    let folder = tempfile::tempdir().unwrap();
    let disks = |count: usize| {
        (0..count).fold(Guest::new("hello"), |guest, n| {
            let path = folder.path().join(n.to_string());
            fs::write(&path, [0; 512]).unwrap();
            guest.disk(&path, ",ro")
        })
    };
    disks(17).run().ok();
    disks(18).run().misused(&["disk17: is one device too many: a machine has at most 17"]);
    disks(17).flag("--rng").run().misused(&["rng: is one device too many"]);
}

#[test]
fn options_that_nobody_knows() {
    let misused = |option: &str, words: &str| {
        Guest::bare().option("--kernel", &*PAYLOAD).flag(option).run().misused(&[words]);
    };
    misused("--memroy=1G", "a similar argument exists: '--memory'");
    misused(
        "--disk=path=x,reed-only",
        "unknown field `reed-only`, expected one of `path`, `format`, `backing`",
    );
    misused("--disk=path=x,cash=unsafe", "did you mean `cache`?");
    misused("--net=tap=x,mak=1", "did you mean `mac`?");
    misused("--disk=ro", "disk[0].path: a disk needs a file or block device");
    misused("--boot=grub", "[possible values: auto, pvh, bzimage]");
    let guest = Guest::hull("run").option("--kernel", &*PAYLOAD);
    guest.console("teletype").run().misused(&["unknown variant `teletype`, expected one of"]);
    Guest::hull("fly").run().misused(&["unrecognized subcommand 'fly'"]);
}

#[test]
fn configuration_files() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.toml");
    for (text, words) in [
        ("cpus = \"two\"\n", &["line 1", "column 8"][..]),
        ("\n\ncpsu = 2\n", &["line 3", "`cpus`"]),
        ("[memory]\nsize = \"x\"\n", &["line 2"]),
        ("cpus = 2\n[[disk]]\npath = 3\n", &["line 3"]),
        ("cpus = \n", &["line 1"]),
        ("{\"cpus\": \"two\"}", &["line 1", "column"]),
        ("{\"cpus\": 2", &["line 1"]),
        ("\u{0}", &["line 1, column 2", "key with no value"]),
        ("", &["kernel.path: a machine needs a kernel"]),
    ] {
        fs::write(&file, text).unwrap();
        Guest::hull("run").option("--config", &file).run().misused(words);
    }
    fs::write(&file, b"cpus = 2 # \xff\n").unwrap();
    let outcome = Guest::hull("run").option("--config", &file).run();
    outcome.misused(&["cannot read the configuration", "UTF-8"]);
    let outcome = Guest::hull("run").option("--config", folder.path().join("none")).run();
    outcome.misused(&["cannot read the configuration", "No such file or directory"]);
}

#[test]
fn places_that_cannot_be_written() {
    let nowhere = "/proc/nowhere/file";
    let outcome = Guest::new("hello").option("--pidfile", nowhere).run();
    outcome.failed(&["cannot write the pid file /proc/nowhere/file", "No such file or directory"]);
    let outcome = Guest::bare().option("--kernel", &*PAYLOAD).option("--name", "../up").run();
    outcome.misused(&["name: \"../up\" is not 1 to 64 letters"]);
    let outcome = Guest::new("hello").console(format!("file={nowhere}")).run();
    outcome
        .failed(&["cannot write the console to /proc/nowhere/file", "No such file or directory"]);
}
