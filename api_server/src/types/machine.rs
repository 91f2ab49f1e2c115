//! `/machine-config`.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{ByteSize, StaticTemplate, VmConfig};

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

/// A CPU that the guest is shown in place of the host's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[allow(missing_docs)]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    /// On aarch64 only.
    V1N1,
    /// The host's CPU.
    #[default]
    None,
}

impl From<StaticTemplate> for CpuTemplate {
    fn from(template: StaticTemplate) -> CpuTemplate {
        match template {
            StaticTemplate::C3 => CpuTemplate::C3,
            StaticTemplate::T2 => CpuTemplate::T2,
            StaticTemplate::T2S => CpuTemplate::T2S,
            StaticTemplate::T2CL => CpuTemplate::T2CL,
            StaticTemplate::T2A => CpuTemplate::T2A,
        }
    }
}

impl CpuTemplate {
    /// The template, if it is one; that the host's CPU fits is seen at the start.
    fn known(self) -> Result<Option<StaticTemplate>, Fault> {
        Ok(Some(match self {
            CpuTemplate::C3 => StaticTemplate::C3,
            CpuTemplate::T2 => StaticTemplate::T2,
            CpuTemplate::T2S => StaticTemplate::T2S,
            CpuTemplate::T2CL => StaticTemplate::T2CL,
            CpuTemplate::T2A => StaticTemplate::T2A,
            CpuTemplate::None => return Ok(None),
            CpuTemplate::V1N1 => {
                return Err(Fault::bad(
                    "cpu_template: V1N1 is for aarch64; here C3, T2, T2S, T2CL, T2A and None are \
                     allowed.",
                ));
            }
        }))
    }
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
    /// Two vCPUs are the threads of a core; their number is even then, or 1.
    #[serde(default, alias = "ht_enabled")]
    pub smt: bool,
    /// The CPU that the guest is shown, in the place of what was put as `/cpu-config`. If it is left out,
    /// that and any other template stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// Firecracker needs this for diff snapshots; Hull does not, and only remembers it.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Size of the pages that back guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Keep memory where copies of the machine can have it: it is halted for shorter when it is forked first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub forkable: bool,
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
    /// Two vCPUs are the threads of a core; their number is even then, or 1.
    #[serde(alias = "ht_enabled")]
    pub smt: Option<bool>,
    /// The CPU that the guest is shown, in the place of what was put as `/cpu-config`. If it is left out,
    /// that and any other template stay.
    pub cpu_template: Option<CpuTemplate>,
    /// Firecracker needs this for diff snapshots; Hull does not, and only remembers it.
    pub track_dirty_pages: Option<bool>,
    /// Size of the pages that back guest memory.
    pub huge_pages: Option<HugePages>,
    /// Keep memory where copies of the machine can have it: it is halted for shorter when it is forked first.
    pub forkable: Option<bool>,
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
            && self.forkable.is_none()
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
            forkable: self.forkable.unwrap_or(old.forkable),
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
            cpu_template: config.cpu.template.map(CpuTemplate::from),
            track_dirty_pages: config.memory.track_dirty_pages,
            huge_pages: if config.memory.huge_pages {
                HugePages::Hugetlbfs2M
            } else {
                HugePages::None
            },
            forkable: config.memory.forkable,
        }
    }
}

impl MachineConfiguration {
    /// Puts this into `config`.
    ///
    /// # Errors
    /// A value that no machine can have.
    pub fn put_into(self, config: &mut VmConfig) -> Result<(), Fault> {
        let template = self.cpu_template.map(CpuTemplate::known).transpose()?;
        let size = self.mem_size_mib.checked_mul(MIB).ok_or_else(|| {
            Fault::bad(format!("mem_size_mib: {} is too large.", self.mem_size_mib))
        })?;
        config.cpus = self.vcpu_count;
        config.cpu.smt = self.smt;
        if let Some(template) = template {
            config.cpu.set_template(template);
        }
        config.memory.size = ByteSize(size);
        config.memory.huge_pages = self.huge_pages == HugePages::Hugetlbfs2M;
        config.memory.forkable = self.forkable;
        config.memory.track_dirty_pages = self.track_dirty_pages;
        Ok(())
    }
}
