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
    kernel(at).run().refused(&[]);
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
    let cases: [(&str, usize, u64); 8] = [
        ("outside-memory", ADDRESS, 1 << 40),
        ("wraps", ADDRESS, u64::MAX - 4095),
        ("at-the-end-of-memory", ADDRESS, (128 << 20) - 4096),
        ("on-the-tables", ADDRESS, 0x7000),
        ("in-the-hole", ADDRESS, 0xd000_0000),
        ("longer-than-the-file", FILE_SIZE, 1 << 30),
        ("larger-than-memory", MEMORY_SIZE, 1 << 40),
        ("larger-than-anything", MEMORY_SIZE, u64::MAX),
    ];
    for (name, field, value) in cases {
        let path = spoiled(folder.path(), name, |bytes| {
            let at = program_header(1, field);
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            if field == FILE_SIZE {
                // So that it is the file that is too short, not memory.
                let at = program_header(1, MEMORY_SIZE);
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        });
        let outcome = kernel(&path).run();
        outcome.refused(&["kernel"]);
        eprintln!("{name}: {}", outcome.stderr);
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
        ("0", &["memory"][..]),
        ("1000", &["memory"]),
        ("128Q", &["128Q"]),
        ("-1", &[]),
        ("", &[]),
        ("18446744073709551615", &[]),
        ("17179869184G", &[]),
        ("100T", &["memory"]),
    ] {
        let guest = Guest::bare().option("--kernel", &*PAYLOAD);
        guest.flag(&format!("--memory={size}")).run().refused(words);
    }
    // Too little for the kernel, the tables or anything.
    for size in ["4K", "64K", "1M"] {
        Guest::bare().option("--kernel", &*PAYLOAD).option("--memory", size).run().refused(&[]);
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
    Guest::new("hello").option("--initrd", &large).run().refused(&[]);
    Guest::new("hello").option("--initrd", folder.path().join("none")).run().refused(&["none"]);
    Guest::new("hello").option("--initrd", folder.path()).run().refused(&[]);
    let empty = folder.path().join("empty");
    fs::write(&empty, "").unwrap();
    let outcome = Guest::new("hello").option("--initrd", &empty).run();
    assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
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
