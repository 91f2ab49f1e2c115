//! Virtio block device (virtio 1.3 § 5.2) on a raw file or block device, on an overlay of one, or on an image.
//!
//! - this file: what the driver sees: features, configuration space, saved state;
//! - [`backing`]: what is behind it; [`file`]: opening, locking and measuring a raw file;
//! - [`overlay`]: a file that has what was written, over others that have the rest;
//! - [`qcow2`]: an image in that format;
//! - [`request`]: what a chain asks for, checked;
//! - [`worker`]: serving a queue; [`overlaid`] and [`cow`]: what is otherwise with an overlay;
//! - [`metrics`]: what is counted meanwhile.

mod backing;
mod cow;
mod file;
mod metrics;
mod overlaid;
pub mod overlay;
mod pending;
pub mod qcow2;
mod request;
mod worker;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use backing::{Backing, DiskError};
pub use file::{Candidate, DiskFile, OpenError};
pub use metrics::BlockMetrics;

use super::Kind;
use super::device::{
    BackEnd, Device, Message, Payload, ReplaceError, RestoreError, Traffic, Worker,
};
use super::queue::MAX_SIZE;
use crate::metrics::{Metrics, Set};
use crate::rate::RateLimiter;

const NAME: &str = "virtio-blk";
const VERSION: u16 = 1;

/// Bytes of a sector, the unit of the protocol (§ 5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the id that a driver can ask for (§ 5.2.6).
pub const ID_LEN: usize = 20;

/// Device-specific feature bits (§ 5.2.3).
mod feature {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback` in the configuration space (§ 5.2.4).
const WRITEBACK_OFFSET: usize = 32;
/// Length of the configuration space as far as it is used.
const CONFIG_LEN: usize = 60;

/// Most sectors that one discard or write-zeroes segment may have: 16 MiB, so that a request that
/// has to be done by writing zeroes ends in reasonable time.
const MAX_RANGE_SECTORS: u32 = (16 << 20) / SECTOR as u32;
/// Most segments of one discard or write-zeroes request.
const MAX_RANGE_SEGMENTS: u32 = 16;

/// When written data is made durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// When the driver flushes; the driver may switch its write cache off.
    #[default]
    Writeback,
    /// Before a write is reported as done, from the start.
    Writethrough,
    /// Never on request: a flush does nothing.
    Unsafe,
}

/// What a [`Block`] is made from.
#[derive(Debug)]
pub struct Options {
    /// What is behind it.
    pub disk: Backing,
    /// Write cache.
    pub cache: Cache,
    /// Name that the driver can ask for, cut to 20 bytes.
    pub id: String,
    /// Request queues, at least 1.
    pub queues: u16,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Backing>,
    cache: Cache,
    id: [u8; ID_LEN],
    queues: Vec<u16>,
    /// The driver's write cache is on. Shared with the workers, which look at each write.
    writeback: Arc<AtomicBool>,
    limit: Option<RateLimiter>,
    metrics: Arc<BlockMetrics>,
}

impl Block {
    /// A disk.
    pub fn new(options: Options) -> Block {
        let mut id = [0; ID_LEN];
        for (slot, byte) in id.iter_mut().zip(options.id.bytes()) {
            *slot = byte;
        }
        let writeback = Arc::new(AtomicBool::new(options.cache != Cache::Writethrough));
        Block {
            disk: Arc::new(options.disk),
            cache: options.cache,
            id,
            queues: vec![MAX_SIZE; usize::from(options.queues.max(1))],
            writeback,
            limit: None,
            metrics: Arc::default(),
        }
    }

    /// Limits what all queues together do: bytes are those of data that is read or written, and
    /// each request is an operation, a flush too.
    pub fn set_limit(&mut self, limit: Option<RateLimiter>) {
        self.limit = limit;
    }
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        let common = feature::SEG_MAX | feature::BLK_SIZE | feature::MQ;
        if self.disk.read_only() {
            return common | feature::RO;
        }
        common | feature::FLUSH | feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn groups(&self) -> Vec<Range<u16>> {
        if self.disk.overlay().is_some() {
            // Which blocks are on their way is known to one worker.
            return std::iter::once(0..self.queues.len() as u16).collect();
        }
        (0..self.queues.len() as u16).map(|queue| queue..queue + 1).collect()
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_LEN];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(self.disk.len() / SECTOR).to_le_bytes());
        // A header and a status byte beside the data.
        put(12, &(u32::from(MAX_SIZE) - 2).to_le_bytes());
        put(20, &self.disk.block_size().to_le_bytes());
        put(WRITEBACK_OFFSET, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(34, &(self.queues.len() as u16).to_le_bytes());
        let alignment = self.disk.block_size() / SECTOR as u32;
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGE_SEGMENTS.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGE_SEGMENTS.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Option<Vec<u8>> {
        // § 5.2.4: `writeback` is the only field that a driver may write, with 0 or 1.
        match data {
            [value @ (0 | 1)] if offset == WRITEBACK_OFFSET as u64 && !self.disk.read_only() => {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                Some(self.config())
            }
            _ => None,
        }
    }

    fn update(&mut self, message: &Message) -> Option<Vec<u8>> {
        if let Message::RateLimit(Traffic::All, limit) = message {
            self.set_limit(limit.clone());
        }
        None
    }

    fn replace(&mut self, back_end: BackEnd) -> Result<Vec<u8>, ReplaceError> {
        let replaced = match back_end {
            BackEnd::Disk(candidate) => self.disk.replaced_by(candidate).map(Backing::from),
            BackEnd::Image(image) => Ok(Backing::from(*image)),
            // Nobody changed it: it goes on as another.
            BackEnd::Frozen(disk) => {
                self.disk = Arc::new(disk);
                return Ok(self.config());
            }
        };
        match &replaced {
            Ok(_) => self.metrics.update_count.count(),
            Err(_) => self.metrics.update_fails.count(),
        }
        self.disk = Arc::new(replaced?);
        Ok(self.config())
    }

    fn disk(&self) -> Option<&Arc<Backing>> {
        Some(&self.disk)
    }

    fn worker(&mut self, _group: usize, negotiated: u64) -> io::Result<Box<dyn Worker>> {
        // § 5.2.6.2: without FLUSH the driver cannot ask for durability, so it always gets it.
        let always_durable = negotiated & feature::FLUSH == 0;
        let settings = worker::Settings {
            disk: Arc::clone(&self.disk),
            id: self.id,
            writeback: Arc::clone(&self.writeback),
            always_durable,
            ignore_flush: self.cache == Cache::Unsafe,
            limit: self.limit.clone(),
            metrics: Arc::clone(&self.metrics),
        };
        Ok(match self.disk.overlay() {
            Some(_) => Box::new(overlaid::OverlayWorker::new(settings)),
            None => Box::new(worker::BlockWorker::new(settings)),
        })
    }

    fn end(&mut self) {
        let saved = match &*self.disk {
            Backing::Raw(_) => Ok(()),
            Backing::Overlay(overlay) => overlay.close(),
            Backing::Qcow2(image) => image.close(),
        };
        if let Err(err) = saved {
            tracing::error!(path = %self.disk.path().display(), %err, "the last writes to a disk are not on it");
        }
    }

    fn metrics(&self) -> Vec<Set> {
        vec![("block", Arc::clone(&self.metrics) as Arc<dyn Metrics>)]
    }

    fn reset(&mut self) {
        self.writeback.store(self.cache != Cache::Writethrough, Ordering::Relaxed);
    }

    fn save(&self) -> Payload {
        let bytes = vec![self.writeback.load(Ordering::Relaxed).into()];
        Payload { kind: NAME, version: VERSION, bytes }
    }

    fn restore(&mut self, payload: &Payload) -> Result<(), RestoreError> {
        match payload.expect(NAME, VERSION)? {
            [value @ (0 | 1)] => {
                self.writeback.store(*value == 1, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(RestoreError::Invalid { kind: NAME, reason: "expected one flag" }),
        }
    }
}

#[cfg(test)]
mod tests;
