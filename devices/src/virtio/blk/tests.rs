use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use tempfile::NamedTempFile;

mod cache;
mod contract;
mod limits;
mod opening;
mod operations;
#[path = "overlay/tests.rs"]
mod overlay;
mod ranges;
mod requests;

use super::*;
use crate::virtio::conformance::{Buffer, Harness, Probe, conformance};
use crate::virtio::device::Action;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// What a status byte holds that nobody wrote.
const UNTOUCHED: u8 = 0xee;

const SECTORS: u64 = 64;

/// A disk of [`SECTORS`] sectors and the file behind it.
type Subject = (Block, NamedTempFile);

/// The byte that fills sector `sector` of a new disk: never 0.
fn fill(sector: u64) -> u8 {
    sector as u8 + 1
}

fn image() -> NamedTempFile {
    let image = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|sector| [fill(sector); SECTOR as usize]).collect();
    image.as_file().write_all_at(&bytes, 0).unwrap();
    image
}

fn disk_with(cache: Cache, read_only: bool, queues: u16) -> Subject {
    let image = image();
    let file = DiskFile::open(image.path(), read_only, false).unwrap();
    (Block::new(Options { disk: file.into(), cache, id: "a disk".into(), queues }), image)
}

fn disk() -> Subject {
    disk_with(Cache::Writeback, false, 1)
}

fn started(subject: Subject) -> Harness<Subject> {
    let mut harness = Harness::new(subject);
    harness.activate();
    harness
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// A request in guest memory.
struct Request {
    buffers: Vec<Buffer>,
    room: (u64, u32),
    status: u64,
}

/// What the driver is told.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u8,
    /// Bytes that the device says it wrote, status byte included.
    written: u32,
    data: Vec<u8>,
}

impl Request {
    /// A request that carries `data` and has room for `room` bytes.
    fn new<D: Device>(
        harness: &mut Harness<D>,
        kind: u32,
        sector: u64,
        data: &[u8],
        room: u32,
    ) -> Request {
        let (head, len) = harness.readable(&header(kind, sector));
        let mut buffers = vec![(head, len, false)];
        if !data.is_empty() {
            let (gpa, len) = harness.readable(data);
            buffers.push((gpa, len, false));
        }
        let room = harness.writable(room);
        if room.1 > 0 {
            buffers.push((room.0, room.1, true));
        }
        let (status, _) = harness.readable(&[UNTOUCHED]);
        buffers.push((status, 1, true));
        Request { buffers, room, status }
    }

    fn answer<D: Device>(&self, harness: &Harness<D>, written: u32) -> Answer {
        let status = harness.read(self.status, 1)[0];
        Answer { status, written, data: harness.read(self.room.0, self.room.1) }
    }
}

/// Makes a request and waits for its end.
fn ask_queue<D: Device>(
    harness: &mut Harness<D>,
    queue: u16,
    (kind, sector): (u32, u64),
    data: &[u8],
    room: u32,
) -> Answer {
    let request = Request::new(harness, kind, sector, data, room);
    let written = harness.request(queue, &request.buffers).expect("no answer");
    request.answer(harness, written)
}

fn ask<D: Device>(
    harness: &mut Harness<D>,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> Answer {
    ask_queue(harness, 0, (kind, sector), data, room)
}

/// Starts a request and leaves its file operation waiting.
fn begin(
    harness: &mut Harness<Subject>,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> Request {
    harness.hold_operations(true);
    let request = Request::new(harness, kind, sector, data, room);
    harness.offer(0, &request.buffers);
    harness.kick(0);
    harness.run();
    request
}

/// The answer to `request`, if there is one.
fn answer_to(harness: &mut Harness<Subject>, request: &Request) -> Option<Answer> {
    let (_, written) = harness.used(0)?;
    Some(request.answer(harness, written))
}

fn only_status(status: u8) -> Answer {
    Answer { status, written: 1, data: Vec::new() }
}

/// A write of a sector, as the device contract asks for it.
fn writes<D: Device>() -> Probe<D> {
    Probe {
        request: |harness| Request::new(harness, OUT, 9, &[0xaa; SECTOR as usize], 0).buffers,
        check: |_, written| assert_eq!(written, 1),
        ..Probe::default()
    }
}

/// A flush, on the second queue of two.
fn flushes<D: Device>() -> Probe<D> {
    Probe {
        queue: 1,
        request: |harness| Request::new(harness, FLUSH, 0, &[], 0).buffers,
        check: |_, written| assert_eq!(written, 1),
        ..Probe::default()
    }
}

fn on_file(harness: &Harness<Subject>, sector: u64, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; (count * SECTOR) as usize];
    let file = File::open(harness.device().1.path()).unwrap();
    file.read_exact_at(&mut bytes, sector * SECTOR).unwrap();
    bytes
}

/// A limiter that lets so many bytes and operations pass, and no more while a test runs.
fn limiter(bytes: Option<u64>, ops: Option<u64>) -> Option<RateLimiter> {
    use crate::rate::{Bucket, Limits};
    let bucket = |size| Bucket { size, one_time_burst: 0, refill_ms: 1 << 40 };
    let limits = Limits { bandwidth: bytes.map(bucket), ops: ops.map(bucket) };
    RateLimiter::new(limits, std::time::Instant::now())
}

#[test]
fn configuration_space_describes_the_disk() {
    let (block, _image) = disk_with(Cache::Writeback, false, 4);
    let config = block.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(word(12), 254, "seg_max: a queue of 256 less header and status");
    assert_eq!(word(20), 512, "blk_size");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(config[34..36], [4, 0], "num_queues");
    assert_eq!((word(36), word(40), word(44)), (32768, 16, 1), "discard");
    assert_eq!((word(48), word(52), config[56]), (32768, 16, 1), "write zeroes, may unmap");
    assert_eq!(block.queues(), [256; 4]);

    let (block, _image) = disk_with(Cache::Writethrough, false, 1);
    assert_eq!(block.config()[32], 0);
}

#[test]
fn features_follow_the_options() {
    let features = |read_only| disk_with(Cache::Writeback, read_only, 1).0.features();
    assert_eq!(features(false) & feature::RO, 0);
    let changing = feature::FLUSH | feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES;
    assert_eq!(features(false) & changing, changing);
    assert_eq!(features(true) & (feature::RO | changing), feature::RO);
}
