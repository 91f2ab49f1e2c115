//! `/machine-config`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{ByteSize, VmConfig};

use crate::fault::Fault;

/// Size of the pages that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum HugePages {
    /// The host's default.
    #[default]
    None,
    /// From the host's pool of 2 MiB pages.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// A static CPU template; deprecated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    /// The host's CPU.
    #[default]
    None,
}

/// CPUs and memory of a machine.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfiguration {
    /// Number of vCPUs, 1 to 64.
    #[schema(minimum = 1, maximum = 64)]
    pub vcpu_count: u32,
    /// Memory in MiB.
    pub mem_size_mib: u64,
    /// Asks for an even number of vCPUs. They are cores of one thread all the same.
    #[serde(default, alias = "ht_enabled")]
    pub smt: bool,
    /// A static CPU template; deprecated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Firecracker needs this for diff snapshots; Hull does not, and only remembers it.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Size of the pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// A change of some of them.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfigurationUpdate {
    /// Number of vCPUs, 1 to 64.
    #[schema(minimum = 1, maximum = 64)]
    pub vcpu_count: Option<u32>,
    /// Memory in MiB.
    pub mem_size_mib: Option<u64>,
    /// Asks for an even number of vCPUs. They are cores of one thread all the same.
    #[serde(alias = "ht_enabled")]
    pub smt: Option<bool>,
    /// A static CPU template; deprecated.
    pub cpu_template: Option<CpuTemplate>,
    /// Firecracker needs this for diff snapshots; Hull does not, and only remembers it.
    pub track_dirty_pages: Option<bool>,
    /// Size of the pages that back guest memory.
    pub huge_pages: Option<HugePages>,
}

impl MachineConfigurationUpdate {
    /// Nothing is changed.
    pub fn is_empty(&self) -> bool {
        self.vcpu_count.is_none()
            && self.mem_size_mib.is_none()
            && self.smt.is_none()
            && self.cpu_template.is_none()
            && self.track_dirty_pages.is_none()
            && self.huge_pages.is_none()
    }

    /// The configuration with this change.
    pub fn applied_to(self, old: MachineConfiguration) -> MachineConfiguration {
        MachineConfiguration {
            vcpu_count: self.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: self.smt.unwrap_or(old.smt),
            cpu_template: self.cpu_template.or(old.cpu_template),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: self.huge_pages.unwrap_or(old.huge_pages),
        }
    }
}

const MIB: u64 = 1 << 20;

impl From<&VmConfig> for MachineConfiguration {
    fn from(config: &VmConfig) -> MachineConfiguration {
        MachineConfiguration {
            vcpu_count: config.cpus,
            mem_size_mib: config.memory.size.0 / MIB,
            smt: config.cpu.smt,
            cpu_template: None,
            track_dirty_pages: config.memory.track_dirty_pages,
            huge_pages: if config.memory.huge_pages {
                HugePages::Hugetlbfs2M
            } else {
                HugePages::None
            },
        }
    }
}

impl MachineConfiguration {
    /// Puts this into `config`.
    ///
    /// # Errors
    /// A value that no machine can have, or a CPU template.
    pub fn put_into(self, config: &mut VmConfig) -> Result<(), Fault> {
        if self.cpu_template.is_some_and(|template| template != CpuTemplate::None) {
            return Err(Fault::bad(
                "cpu_template: static templates are deprecated and not supported; only None is \
                 allowed.",
            ));
        }
        let size = self.mem_size_mib.checked_mul(MIB).ok_or_else(|| {
            Fault::bad(format!("mem_size_mib: {} is too large.", self.mem_size_mib))
        })?;
        config.cpus = self.vcpu_count;
        config.cpu.smt = self.smt;
        config.memory.size = ByteSize(size);
        config.memory.huge_pages = self.huge_pages == HugePages::Hugetlbfs2M;
        config.memory.track_dirty_pages = self.track_dirty_pages;
        Ok(())
    }
}
