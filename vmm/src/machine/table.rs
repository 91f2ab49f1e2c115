//! The device table: which virtio devices a configuration asks for, in the order in which the guest
//! finds them. A new kind of device is one line here.

use std::sync::Arc;

use devices::virtio::blk::{Block, Cache, DiskFile, Options};
use devices::virtio::device::Device;
use devices::virtio::rng::Rng;

use super::build::BuildError;
use crate::config::{CacheMode, DiskConfig, VmConfig};
use crate::console::Output;

type Named = (String, Box<dyn Device>);

/// Opens the back-ends of all devices of `config`.
pub(super) fn devices(
    config: &VmConfig,
    _output: &Arc<Output>,
    _window: Option<(u16, u16)>,
) -> Result<Vec<Named>, BuildError> {
    let mut devices: Vec<Named> = Vec::new();
    for (n, disk) in config.disk.iter().enumerate() {
        let name = config.disk_name(n);
        devices.push((name.clone(), Box::new(block(name, disk)?)));
    }
    if config.rng {
        devices.push(("rng".into(), Box::new(Rng)));
    }
    Ok(devices)
}

fn block(name: String, config: &DiskConfig) -> Result<Block, BuildError> {
    let file = DiskFile::open(&config.path, config.ro, config.direct)
        .map_err(|err| BuildError::Device { device: name.clone(), source: err.into() })?;
    let cache = match config.cache {
        CacheMode::Writeback => Cache::Writeback,
        CacheMode::Writethrough => Cache::Writethrough,
        CacheMode::Unsafe => Cache::Unsafe,
    };
    Ok(Block::new(Options { file, cache, id: name, queues: config.queues.unwrap_or(1) }))
}
