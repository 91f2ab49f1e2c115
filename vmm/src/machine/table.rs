//! The device table: which virtio devices a configuration asks for, in the order in which the guest
//! finds them. A new kind of device is one line here.

use std::sync::Arc;

use devices::virtio::device::Device;
use devices::virtio::rng::Rng;

use super::build::BuildError;
use crate::config::VmConfig;
use crate::console::Output;

type Named = (String, Box<dyn Device>);

/// Opens the back-ends of all devices of `config`.
pub(super) fn devices(
    config: &VmConfig,
    _output: &Arc<Output>,
    _window: Option<(u16, u16)>,
) -> Result<Vec<Named>, BuildError> {
    let mut devices: Vec<Named> = Vec::new();
    if config.rng {
        devices.push(("rng".into(), Box::new(Rng)));
    }
    Ok(devices)
}
