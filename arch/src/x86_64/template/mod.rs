//! CPU templates: what is changed of the CPU that the host's KVM offers, before the guest sees it.
//!
//! A template names bits of CPUID leaves and of model-specific registers. It is applied to what KVM
//! gives; what a machine dictates ([`super::cpuid`], [`super::msr`]) comes on top, so that no template
//! makes a topology that the machine has not. The types have the form of Firecracker's custom CPU
//! templates (its docs/cpu_templates/schema.json), in which people write them; [`StaticTemplate`] are
//! the ones that have names.

mod bitmap;
mod fixed;

pub use bitmap::{Bitmap, BitmapError, Word};
pub use fixed::{Misfit, StaticTemplate};

use std::fmt;
use std::str::FromStr;

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a template changes. Where it names a register twice, the later change comes on top.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Template {
    /// What KVM has to be able to do, or need not.
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID leaves.
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model-specific registers.
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability of KVM by its number (`KVM_CAP_*` of linux/kvm.h). As text it is the number, or `!` and
/// the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmCapability {
    /// Without it the machine is not made.
    Needed(u32),
    /// The machine is made without it, even if machines usually are not.
    NotNeeded(u32),
}

impl FromStr for KvmCapability {
    type Err = String;

    fn from_str(text: &str) -> Result<KvmCapability, String> {
        let (kind, digits): (fn(u32) -> KvmCapability, _) = match text.strip_prefix('!') {
            Some(digits) => (KvmCapability::NotNeeded, digits),
            None => (KvmCapability::Needed, text),
        };
        // The standard library would take a sign.
        let number = digits.parse().ok().filter(|_| !digits.starts_with('+'));
        number.map(kind).ok_or_else(|| {
            format!("{text:?} is not the number of a KVM capability, with or without a ! before it")
        })
    }
}

impl fmt::Display for KvmCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvmCapability::Needed(number) => write!(f, "{number}"),
            KvmCapability::NotNeeded(number) => write!(f, "!{number}"),
        }
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<KvmCapability, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A change of one subleaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf, as EAX names it.
    #[serde(with = "bitmap::number")]
    pub leaf: u32,
    /// The subleaf, as ECX names it; 0 for a leaf that has none.
    #[serde(with = "bitmap::number")]
    pub subleaf: u32,
    /// Flags of the leaf for KVM (`KVM_CPUID_FLAG_*`): 1 for a leaf with subleaves, 0 for others.
    pub flags: u32,
    /// Changes of its registers.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a CPUID leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// The register.
    pub register: Register,
    /// What happens to its bits.
    pub bitmap: Bitmap<u32>,
}

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    #[serde(with = "bitmap::number")]
    pub addr: u32,
    /// What happens to its bits.
    pub bitmap: Bitmap<u64>,
}

/// A template changes a CPUID leaf that the host's KVM does not give.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cpuid_modifiers: leaf {leaf:#x}, subleaf {subleaf:#x} is none of those that this host's KVM gives"
)]
pub struct MissingLeaf {
    /// The leaf.
    pub leaf: u32,
    /// The subleaf.
    pub subleaf: u32,
}

impl Template {
    /// Changes what `KVM_GET_SUPPORTED_CPUID` gave. The vendor's name, which is in EBX, ECX and EDX of
    /// leaf 0, stays: a guest chooses by it how it reads all the rest.
    ///
    /// # Errors
    /// There is no such leaf.
    pub fn change_cpuid(&self, entries: &mut [kvm_cpuid_entry2]) -> Result<(), MissingLeaf> {
        for modifier in &self.cpuid_modifiers {
            let (leaf, subleaf) = (modifier.leaf, modifier.subleaf);
            let found =
                entries.iter_mut().find(|entry| (entry.function, entry.index) == (leaf, subleaf));
            let entry = found.ok_or(MissingLeaf { leaf, subleaf })?;
            entry.flags = modifier.flags;
            for change in &modifier.modifiers {
                let register = match change.register {
                    Register::Eax => &mut entry.eax,
                    _ if leaf == 0 => continue,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                *register = change.bitmap.apply(*register);
            }
        }
        Ok(())
    }

    /// The registers that [`Template::change_msrs`] changes, each once.
    pub fn msrs(&self) -> Vec<u32> {
        let mut numbers: Vec<_> = self.msr_modifiers.iter().map(|modifier| modifier.addr).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    }

    /// Changes model-specific registers that have their values of a new vCPU.
    pub fn change_msrs(&self, registers: &mut [kvm_msr_entry]) {
        for modifier in &self.msr_modifiers {
            for register in registers.iter_mut().filter(|found| found.index == modifier.addr) {
                register.data = modifier.bitmap.apply(register.data);
            }
        }
    }
}

#[cfg(test)]
mod tests;
