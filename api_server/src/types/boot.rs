//! `/boot-source`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{BootMode, KernelConfig};

/// What is booted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// ELF vmlinux or bzImage.
    #[schema(value_type = String)]
    pub kernel_image_path: PathBuf,
    /// Initial RAM disk.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; Hull's own if there is none. The root drive and the devices are
    /// added to it.
    #[serde(default)]
    pub boot_args: Option<String>,
}

impl From<BootSource> for KernelConfig {
    fn from(source: BootSource) -> KernelConfig {
        KernelConfig {
            path: source.kernel_image_path,
            initrd: source.initrd_path,
            replace_cmdline: source.boot_args.is_some(),
            cmdline: source.boot_args,
            boot: BootMode::Auto,
            force: false,
        }
    }
}

impl From<&KernelConfig> for BootSource {
    fn from(kernel: &KernelConfig) -> BootSource {
        BootSource {
            kernel_image_path: kernel.path.clone(),
            initrd_path: kernel.initrd.clone(),
            boot_args: kernel.cmdline.clone(),
        }
    }
}
