//! A driver of a socket device, while programs of the host connect to it, listen for it, and say
//! something. The first byte chooses who is there, and whether the driver does anything in any order
//! or knows rings and packets and breaks the rules of connections.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use devices::virtio::conformance::{Harness, fuzz};
use devices::virtio::device::Message;
use devices::virtio::vsock::{Listener, Vsock};
use libfuzzer_sys::fuzz_target;

const CID: u64 = 3;
const HEADER: u32 = 44;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let path = PathBuf::from(format!("/dev/shm/hull-fuzz-vsock-{}", std::process::id()));
    let device = Vsock::new(Listener::open(&path).unwrap(), CID, false);
    // Ports that a small number in the input names.
    let listeners: Vec<(UnixListener, PathBuf)> = (0..u32::from(choice & 3))
        .map(|port| {
            let path = PathBuf::from(format!("{}_{port}", path.display()));
            // Of a run that ended early.
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(&path).unwrap();
            listener.set_nonblocking(true).unwrap();
            (listener, path)
        })
        .collect();
    let lines: [&[u8]; 4] =
        [b"CONNECT 0\n", b"CONNECT 1\nand more behind it", b"CONNECT", b"nonsense\n"];
    let programs: Vec<UnixStream> = (0..usize::from(choice >> 2 & 7))
        .map(|index| {
            let mut program = UnixStream::connect(&path).unwrap();
            program.set_nonblocking(true).unwrap();
            program.write_all(lines[index % 4]).unwrap();
            program
        })
        .collect();
    if choice & 0x20 == 0 {
        fuzz((device, programs), data);
    } else {
        packets(device, programs, &listeners, data);
    }
    for (listener, path) in listeners {
        drop(listener);
        let _ = std::fs::remove_file(path);
    }
});

/// Eight bytes of input make a step.
fn packets(
    device: Vsock,
    mut programs: Vec<UnixStream>,
    listeners: &[(UnixListener, PathBuf)],
    data: &[u8],
) {
    let mut harness = Harness::new(device);
    harness.activate();
    let mut heard = Vec::new();
    for step in data.chunks_exact(8).take(200) {
        let &[what, op, guest, host, length, flags, buffer, forwarded] = step else { return };
        let program = usize::from(host) % programs.len().max(1);
        match what % 16 {
            0..8 => {
                if harness.free_descriptors(1) == 0 {
                    continue;
                }
                // The host's ports begin at 0 where the guest connects, and far up the other way.
                let host = u32::from(host & 7) | u32::from(host >> 7) << 30;
                let said = u32::from(length) << (flags >> 5);
                let sent = if what & 16 == 0 { said } else { u32::from(flags) };
                let mut bytes = [CID.to_le_bytes(), 2u64.to_le_bytes()].concat();
                for word in [u32::from(guest & 3), host, said] {
                    bytes.extend(word.to_le_bytes());
                }
                bytes.extend([1 + (op >> 7), 0, op & 15, 0]);
                for word in [u32::from(flags & 3), u32::from(buffer) << 9, u32::from(forwarded)] {
                    bytes.extend(word.to_le_bytes());
                }
                bytes.resize(bytes.len() + sent as usize, length);
                let (gpa, len) = harness.readable(&bytes);
                harness.offer(1, &[(gpa, len, false)]);
                harness.notify(1);
            }
            8 | 9 => {
                for _ in 0..=op % 8 {
                    if harness.free_descriptors(0) > 0 {
                        let (gpa, len) =
                            harness.writable(HEADER + 1 + (u32::from(length) << (flags & 7)));
                        harness.offer(0, &[(gpa, len, true)]);
                    }
                }
                harness.notify(0);
            }
            10 => {
                if let Some(program) = programs.get_mut(program) {
                    // A full socket takes no more, which is fine.
                    let _ = program.write(&vec![op; usize::from(length) << 8]);
                }
            }
            11 => {
                if let Some(program) = programs.get_mut(program) {
                    let _ = program.read(&mut [0; 4096]);
                }
            }
            12 => {
                if program < programs.len() {
                    if op & 1 == 0 {
                        programs.remove(program);
                    } else {
                        let how = [std::net::Shutdown::Read, std::net::Shutdown::Write];
                        let _ = programs[program].shutdown(how[usize::from(op >> 1 & 1)]);
                    }
                }
            }
            13 => {
                for _ in 0..=op {
                    harness.expire_timers();
                }
            }
            14 => match op % 4 {
                0 => {
                    harness.pause();
                    harness.resume();
                }
                1 => {
                    harness.reset();
                    harness.activate();
                }
                2 => harness.message(&Message::TransportReset),
                _ => {
                    if harness.free_descriptors(2) > 0 {
                        let (gpa, len) = harness.writable(u32::from(length) + 1);
                        harness.offer(2, &[(gpa, len, true)]);
                        harness.notify(2);
                    }
                }
            },
            _ => {
                for (listener, _) in listeners {
                    while let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(true).unwrap();
                        programs.push(stream);
                    }
                }
            }
        }
        harness.run();
        for queue in 0..3 {
            while let Some((_, written)) = harness.used(queue) {
                if queue == 0 {
                    heard.push(written);
                    assert!(written >= HEADER, "a packet is shorter than its header");
                }
            }
        }
    }
}
