//! The other end of a guest's transfers, with everything on this side in large pieces: a guest whose
//! tools write a kilobyte at a time would measure Nagle's algorithm.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::thread;

use crate::Result;

/// Port whose connections are each given bytes and then the end.
const GIVES: u16 = 7001;
/// Port where a connection has the guest's `/z` fetched from its web server, and ends after that.
const FETCHES: u16 = 7002;
const WEB: u16 = 80;

/// Serves connections until it is killed, one at a time on each port. `bytes` go to each that is given any.
pub fn serve(address: IpAddr, bytes: usize) -> Result<()> {
    let giver = TcpListener::bind((address, GIVES))?;
    let fetcher = TcpListener::bind((address, FETCHES))?;
    let content = vec![0x5a; bytes];
    thread::spawn(move || each(&fetcher, fetch));
    Ok(each(&giver, |stream| give(stream, &content))?)
}

/// A transfer that breaks off is the measuring side's to notice.
fn each(listener: &TcpListener, serve: impl Fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    loop {
        if let Err(error) = serve(listener.accept()?.0) {
            eprintln!("bench peer: {error}");
        }
    }
}

fn give(mut stream: TcpStream, content: &[u8]) -> io::Result<()> {
    stream.write_all(content)?;
    stream.shutdown(Shutdown::Write)?;
    drain(&mut stream).map(drop)
}

fn fetch(mut asked: TcpStream) -> io::Result<()> {
    let mut stream = TcpStream::connect((asked.peer_addr()?.ip(), WEB))?;
    stream.write_all(b"GET /z HTTP/1.0\r\n\r\n")?;
    let bytes = drain(&mut stream)?;
    asked.write_all(format!("{bytes}\n").as_bytes())
}

fn drain(stream: &mut TcpStream) -> io::Result<usize> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(total),
            read => total += read,
        }
    }
}
