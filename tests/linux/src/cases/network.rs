//! virtio-net under a stock driver, over a TAP of Hull's own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::{Case, check};
use crate::guest::{Failure, Machine, STEP};
use crate::pattern::Pattern;
use crate::site::Site;

pub const CASES: &[(&str, Case)] = &[
    ("network::ping_and_transfer", ping_and_transfer),
    ("network::two_queue_pairs", two_queue_pairs),
    ("network::tap_goes_with_the_guest", tap_goes_with_the_guest),
];

const PORT: u16 = 7700;
/// More than every ring and window on the way holds.
const TRANSFER: usize = 8 << 20;

/// Accepts one connection within [`STEP`].
pub fn accept(listener: &TcpListener) -> Result<TcpStream, Failure> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + STEP;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(STEP))?;
                stream.set_write_timeout(Some(STEP))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                check(Instant::now() < deadline, || "the guest did not connect".into())?;
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Gives a sample to the guest, which connects for it.
fn give(listener: &TcpListener, sample: &[u8]) -> Result<(), Failure> {
    Ok(accept(listener)?.write_all(sample)?)
}

/// Takes a file of `/tmp/web` back from the guest's web server, which sends with sendfile(2): other
/// tools of busybox write a kilobyte at a time, and each of those waits for the last one's
/// acknowledgement.
fn take(guest: &str, port: u16, file: &str) -> Result<Vec<u8>, Failure> {
    let address: SocketAddr = format!("{guest}:{port}").parse()?;
    let mut stream = TcpStream::connect_timeout(&address, STEP)?;
    stream.set_read_timeout(Some(STEP))?;
    stream.write_all(format!("GET /{file} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = Vec::with_capacity(TRANSFER + 1024);
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.ok_or("the guest's web server did not answer with a header")?;
    Ok(answer.split_off(end + 4))
}

/// Both ways: pings from the guest, and a sample there and back, which also covers offloads.
fn ping_and_transfer(site: &Site) -> Result<(), Failure> {
    let network = site.network();
    let mut guest = Machine::new(site)?
        .option("--net", network.option(",mac=02:48:55:4c:4c:01"))
        .cmdline(network.cmdline())
        .boot()?;
    guest.expect("cat /sys/class/net/eth0/address", "02:48:55:4c:4c:01")?;
    let host = network.host();
    guest.run(&format!("ping -c 3 -i 0.2 -w 20 {host} >/dev/null"))?;
    guest.run(&format!("ping -c 2 -i 0.2 -w 20 -s 1400 {host} >/dev/null"))?;

    let listener = TcpListener::bind((host.as_str(), PORT))?;
    let sent = Pattern::bytes(1, TRANSFER);
    let peer = thread::spawn({
        let sent = sent.clone();
        move || give(&listener, &sent)
    });
    guest.run("mkdir /tmp/web && busybox httpd -p 8000 -h /tmp/web")?;
    guest.run(&format!("nc {host} {PORT} </dev/null >/tmp/web/sample"))?;
    peer.join().map_err(|_| "the peer's thread ended badly")??;
    guest.expect("wc -c </tmp/web/sample", &TRANSFER.to_string())?;
    let equal = take(&network.guest(), 8000, "sample")? == sent;
    check(equal, || "what came back is not what was sent".into())?;
    guest.power_off()
}

/// Two vCPUs, two queue pairs, a transfer on each at once.
fn two_queue_pairs(site: &Site) -> Result<(), Failure> {
    let network = site.network();
    let mut guest = Machine::new(site)?
        .option("--cpus", "2")
        .option("--net", network.option(",queues=2"))
        .cmdline(network.cmdline())
        .boot()?;
    // The driver takes as many pairs as it has CPUs, if the device offers them.
    guest.expect("ls -d /sys/class/net/eth0/queues/tx-* | wc -l", "2")?;
    let host = network.host();
    guest.run("mkdir /tmp/web")?;
    let mut peers = Vec::new();
    for index in 0..2u16 {
        let listener = TcpListener::bind((host.as_str(), PORT + index))?;
        let sent = Pattern::bytes(u64::from(index), TRANSFER / 2);
        peers.push(thread::spawn(move || give(&listener, &sent)));
        // A server on each CPU, so that each sends on a queue of its own.
        guest.run(&format!("taskset {} busybox httpd -p 800{index} -h /tmp/web", 1 << index))?;
    }
    let fetch =
        |n: u16| format!("taskset {} nc {host} {} </dev/null >/tmp/web/{n}", 1 << n, PORT + n);
    guest.run(&format!("{} & {} & wait", fetch(0), fetch(1)))?;
    for peer in peers {
        peer.join().map_err(|_| "the peer's thread ended badly")??;
    }
    let takers = [0u16, 1].map(|index| {
        let guest = network.guest();
        thread::spawn(move || take(&guest, 8000 + index, &index.to_string()))
    });
    for (index, taker) in (0..).zip(takers) {
        let back = taker.join().map_err(|_| "the peer's thread ended badly")??;
        let equal = back == Pattern::bytes(index, TRANSFER / 2);
        check(equal, || format!("what came back on {index} is not what was sent"))?;
    }
    guest.power_off()
}

/// The names of the host's network devices.
fn devices() -> Result<Vec<String>, Failure> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("/sys/class/net")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// The TAP is made for the life of the run: nothing of it is left, even after a kill.
fn tap_goes_with_the_guest(site: &Site) -> Result<(), Failure> {
    for killed in [false, true] {
        let network = site.network();
        let before = devices()?;
        let mut guest = Machine::new(site)?
            .option("--net", network.option(""))
            .cmdline(network.cmdline())
            .boot()?;
        let address = TcpListener::bind((network.host().as_str(), 0));
        check(address.is_ok(), || "the host has no address on the TAP".into())?;
        let during = devices()?;
        check(during.iter().any(|name| !before.contains(name)), || "no TAP was made".into())?;
        if killed {
            guest.kill()?
        } else {
            guest.power_off()?
        }
        let deadline = Instant::now() + STEP;
        // Its address goes with it, and other tests make devices of their own meanwhile.
        while TcpListener::bind((network.host().as_str(), 0)).is_ok() {
            check(Instant::now() < deadline, || "the TAP outlived its machine".into())?;
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
