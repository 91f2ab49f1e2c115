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
    let missing = at.join("missing");
    kernel(&missing).run().refused(&["missing", "hint:"]);
    kernel(at).run().refused(&["not a regular file"]);
    let empty = spoiled(at, "empty", |bytes| bytes.clear());
    kernel(&empty).run().refused(&["empty"]);
    let text = spoiled(at, "text", |bytes| *bytes = b"#!/bin/sh\necho hello\n".to_vec());
    kernel(&text).run().refused(&["text"]);
    let zeroes = spoiled(at, "zeroes", |bytes| bytes.fill(0));
    kernel(&zeroes).run().refused(&["zeroes"]);
}

#[test]
fn kernels_cut_short() {
    let folder = tempfile::tempdir().unwrap();
    let length = fs::metadata(&*PAYLOAD).unwrap().len() as usize;
    for keep in [1, 4, 16, 63, 64, 65, 100, 231, 4096, length / 2] {
        let path = spoiled(folder.path(), "short", |bytes| bytes.truncate(keep));
        kernel(&path).run().refused(&["short"]);
    }
}

#[test]
fn kernels_for_other_machines() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, usize, &[u8]); 5] = [
        ("aarch64", 18, &[183, 0]),
        ("i386", 4, &[1]),
        ("big-endian", 5, &[2]),
        ("relocatable", 16, &[1, 0]),
        ("no-program-headers", 56, &[0, 0]),
    ];
    for (name, at, value) in cases {
        let path = spoiled(folder.path(), name, |bytes| {
            bytes[at..at + value.len()].copy_from_slice(value);
        });
        kernel(&path).run().refused(&[name]);
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
        kernel(&path).run().refused(words);
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
        ("", &["--memory"]),
        ("18446744073709551615", &["memory.size", "not a multiple of 4K"]),
        ("17179869184G", &["17179869184G", "is not a size"]),
        ("100T", &["memory.size", "more than the 8T"]),
    ] {
        let guest = Guest::bare().option("--kernel", &*PAYLOAD);
        guest.flag(&format!("--memory={size}")).run().refused(words);
    }
    // Too little for the tables.
    for size in ["4K", "64K", "1M"] {
        let guest = Guest::bare().option("--kernel", &*PAYLOAD).option("--memory", size);
        guest.run().refused(&["memory.size", "less than 2M"]);
    }
}

#[test]
fn processor_counts() {
    for count in ["0", "65", "-1", "many", "4294967296"] {
        Guest::new("hello").flag(&format!("--cpus={count}")).run().refused(&["cpus"]);
    }
}

#[test]
fn command_lines() {
    Guest::new(&format!("hello x={}", "y".repeat(5000))).run().refused(&["command line"]);
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
    run(&large).refused(&["the initrd of 268435456 bytes", "hint: give the guest more --memory"]);
    run(&folder.path().join("none")).refused(&["cannot open the initrd", "none"]);
    run(folder.path()).refused(&["the initrd", "not a regular file"]);
    run(&empty).refused(&["the initrd", "the file is empty"]);
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
        .refused(&["is disk0 of this machine"]);
    Guest::new("hello").disk(&disk, ",ro").disk(&disk, ",ro").run().ok();
    // A console writes over what is there.
    let console = format!("file={}", disk.display());
    let outcome = Guest::new("hello").console(console).disk(&disk, "").run();
    outcome.refused(&["disk", "the machine uses it for something else"]);
    assert_eq!(fs::read(&disk).unwrap(), [7; 4096]);
    let guest = Guest::new("hello").disk(&disk, ",id=disk1").disk(&folder.path().join("other"), "");
    guest.run().refused(&["two disks are called disk1"]);
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
    disks(18).run().refused(&["disk17", "one device too many", "at most 17"]);
    disks(17).flag("--rng").run().refused(&["rng", "one device too many"]);
}

#[test]
fn options_that_nobody_knows() {
    Guest::new("hello").flag("--memroy=1G").run().refused(&["--memory"]);
    Guest::new("hello").option("--disk", "path=x,reed-only").run().refused(&["reed-only"]);
    Guest::new("hello").option("--disk", "path=x,cash=unsafe").run().refused(&["`cache`"]);
    Guest::new("hello").option("--net", "tap=x,mak=1").run().refused(&["`mac`"]);
    Guest::new("hello").option("--disk", "ro").run().refused(&["path"]);
    Guest::new("hello").option("--boot", "grub").run().refused(&["pvh"]);
    Guest::new("hello").console("teletype").run().refused(&["teletype"]);
    Guest::hull("fly").run().refused(&["fly"]);
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
        ("\u{0}", &[]),
    ] {
        fs::write(&file, text).unwrap();
        Guest::hull("run").option("--config", &file).run().refused(words);
    }
    Guest::hull("run").option("--config", folder.path().join("none")).run().refused(&["none"]);
}

#[test]
fn places_that_cannot_be_written() {
    let nowhere = "/proc/nowhere/file";
    Guest::new("hello").option("--pidfile", nowhere).run().refused(&[nowhere]);
    Guest::bare().option("--kernel", &*PAYLOAD).option("--name", "../up").run().refused(&["name"]);
    Guest::new("hello").console(format!("file={nowhere}")).run().refused(&[nowhere]);
}
