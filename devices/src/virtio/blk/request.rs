//! What a descriptor chain asks of a disk (virtio 1.3 § 5.2.6), checked against the disk.

use std::collections::VecDeque;

use super::{ID_LEN, MAX_RANGE_SECTORS, MAX_RANGE_SEGMENTS, SECTOR};
use crate::virtio::iobuf::{GuestByte, IoBuf};
use crate::virtio::queue::Chain;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// The segment may be unmapped (§ 5.2.6, `flags` of write zeroes).
const FLAG_UNMAP: u32 = 1;

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;

/// What the status byte says (§ 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A range of bytes to be discarded or zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The bytes must read as zeroes afterwards.
    pub(super) zero: bool,
    /// Space may be given back.
    pub(super) unmap: bool,
}

/// A request that this disk can try.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Fill the writable buffers from this byte offset.
    Read(u64),
    /// Write the readable buffers at this byte offset.
    Write(u64),
    Flush,
    GetId,
    Ranges(VecDeque<ByteRange>),
}

/// What the disk is like.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    pub(super) len: u64,
    pub(super) read_only: bool,
}

/// Takes header and status off `chain`, whose buffers are then the data alone. The inner error is
/// a request that is answered with that status.
///
/// # Errors
/// A chain without room for header or status, which cannot be answered at all.
#[allow(clippy::type_complexity)]
pub(super) fn parse(
    chain: &mut Chain,
    disk: Disk,
) -> Result<(GuestByte, Result<Kind, Status>), &'static str> {
    let mut header = [0; HEADER_LEN];
    if chain.readable.read(&mut header) < HEADER_LEN {
        return Err("a request without a header");
    }
    let status = chain.writable.pop_last_byte().ok_or("a request without a status byte")?;
    let field = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i]));
    let sector = u64::from(field(8)) | u64::from(field(12)) << 32;
    Ok((status, kind(field(0), sector, chain, disk)))
}

fn kind(typ: u32, sector: u64, chain: &mut Chain, disk: Disk) -> Result<Kind, Status> {
    match typ {
        TYPE_IN => span(sector, chain.writable.len(), disk).map(Kind::Read),
        TYPE_OUT if disk.read_only => Err(Status::IoError),
        TYPE_OUT => span(sector, chain.readable.len(), disk).map(Kind::Write),
        TYPE_FLUSH => Ok(Kind::Flush),
        TYPE_GET_ID if chain.writable.len() >= ID_LEN as u64 => Ok(Kind::GetId),
        TYPE_GET_ID => Err(Status::IoError),
        TYPE_DISCARD | TYPE_WRITE_ZEROES if disk.read_only => Err(Status::IoError),
        TYPE_DISCARD => ranges(&mut chain.readable, false, disk),
        TYPE_WRITE_ZEROES => ranges(&mut chain.readable, true, disk),
        _ => Err(Status::Unsupported),
    }
}

/// Byte offset of `len` bytes from `sector` on, if they are whole sectors on the disk, and no more
/// than a used entry can tell (§ 2.7.8): a hostile chain may refer to one buffer many times.
fn span(sector: u64, len: u64, disk: Disk) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
    let end = offset.checked_add(len).ok_or(Status::IoError)?;
    if len == 0 || !len.is_multiple_of(SECTOR) || end > disk.len || len >= u64::from(u32::MAX) {
        return Err(Status::IoError);
    }
    Ok(offset)
}

fn ranges(data: &mut IoBuf, zero: bool, disk: Disk) -> Result<Kind, Status> {
    let count = data.len() / SEGMENT_LEN as u64;
    if !data.len().is_multiple_of(SEGMENT_LEN as u64)
        || !(1..=u64::from(MAX_RANGE_SEGMENTS)).contains(&count)
    {
        return Err(Status::IoError);
    }
    let mut ranges = VecDeque::new();
    for _ in 0..count {
        let mut segment = [0; SEGMENT_LEN];
        data.read(&mut segment);
        let word = u128::from_le_bytes(segment);
        let (sector, sectors, flags) = (word as u64, (word >> 64) as u32, (word >> 96) as u32);
        // § 5.2.6.2: unknown flags, and unmap in a discard, are not supported.
        let known = if zero { FLAG_UNMAP } else { 0 };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > MAX_RANGE_SECTORS {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        let offset = span(sector, len, disk)?;
        ranges.push_back(ByteRange { offset, len, zero, unmap: flags & FLAG_UNMAP != 0 || !zero });
    }
    Ok(Kind::Ranges(ranges))
}
