//! `/cpu-config`.

use serde::de::{Deserializer, Error, IgnoredAny};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmm::config::{self, CpuModifiers, KvmCapability, VmConfig};

use crate::fault::{Fault, chain};

/// A CPU template of the client's own: what is changed of the CPU that the host's KVM offers.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CpuConfig {
    /// Numbers of KVM's capabilities (`KVM_CAP_*` of linux/kvm.h) that the machine needs; with a `!`
    /// before it, one that it does not need.
    #[schema(value_type = Vec<String>)]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID leaves that KVM gives.
    #[schema(value_type = Vec<CpuidLeafModifier>)]
    pub cpuid_modifiers: Vec<config::CpuidModifier>,
    /// Changes of model-specific registers.
    #[schema(value_type = Vec<MsrModifier>)]
    pub msr_modifiers: Vec<config::MsrModifier>,
    /// Changes of an aarch64 CPU's registers: none. They and the next are read, and never written.
    #[serde(skip_serializing, deserialize_with = "of_aarch64")]
    pub reg_modifiers: (),
    /// Changes of an aarch64 CPU's features: none.
    #[serde(skip_serializing, deserialize_with = "of_aarch64")]
    pub vcpu_features: (),
}

/// A change of one subleaf of CPUID.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "describes what is read into the type of vmm::config")]
pub struct CpuidLeafModifier {
    /// The leaf: `0x7`, `0b111` or `7`.
    leaf: String,
    /// The subleaf, `0` for a leaf that has none.
    subleaf: String,
    /// Flags of the leaf for KVM: 1 for a leaf with subleaves, 0 for others.
    flags: u32,
    /// Changes of its registers.
    modifiers: Vec<CpuidRegisterModifier>,
}

/// A change of one register of a CPUID leaf.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "describes what is read into the type of vmm::config")]
pub struct CpuidRegisterModifier {
    /// The register.
    register: CpuidRegister,
    /// `0b` and up to 32 characters, the last for bit 0: `0`, `1`, or `x` for a bit that is kept. Bits in
    /// front are kept, and `_` may stand anywhere.
    #[schema(pattern = "^(0b)?_*[01x](_*[01x]){0,31}_*$")]
    bitmap: String,
}

/// A register that CPUID answers in.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(dead_code, missing_docs, reason = "describes what is read into the type of vmm::config")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of a model-specific register.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "describes what is read into the type of vmm::config")]
pub struct MsrModifier {
    /// Its number: `0x10a`, `0b100001010` or `266`.
    addr: String,
    /// As of a CPUID register, with up to 64 bits.
    #[schema(pattern = "^(0b)?_*[01x](_*[01x]){0,63}_*$")]
    bitmap: String,
}

fn of_aarch64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    match Vec::<IgnoredAny>::deserialize(deserializer)?.len() {
        0 => Ok(()),
        count => Err(D::Error::custom(format_args!(
            "{count} of them are given, and they are for aarch64; here there has to be none"
        ))),
    }
}

impl CpuConfig {
    /// The template that `config` has, an empty one if it has none or one with a name. It may have to
    /// read it from a file.
    ///
    /// # Errors
    /// The file cannot be read, or is none of a template.
    pub fn of(config: &VmConfig) -> Result<CpuConfig, Fault> {
        let template = config.cpu.own_template().map_err(|error| Fault::bad(chain(&error)))?;
        let CpuModifiers { kvm_capabilities, cpuid_modifiers, msr_modifiers } =
            template.unwrap_or_default();
        Ok(CpuConfig { kvm_capabilities, cpuid_modifiers, msr_modifiers, ..CpuConfig::default() })
    }

    /// The template that `config` itself has.
    pub fn inline(config: &VmConfig) -> Option<CpuConfig> {
        let CpuModifiers { kvm_capabilities, cpuid_modifiers, msr_modifiers } =
            config.cpu.modifiers.clone()?;
        let ignored = CpuConfig::default();
        Some(CpuConfig { kvm_capabilities, cpuid_modifiers, msr_modifiers, ..ignored })
    }

    /// Puts this into `config`, in the place of whatever template it has.
    pub fn put_into(self, config: &mut VmConfig) {
        let CpuConfig { kvm_capabilities, cpuid_modifiers, msr_modifiers, .. } = self;
        let template = CpuModifiers { kvm_capabilities, cpuid_modifiers, msr_modifiers };
        config.cpu.set_modifiers(template);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body;

    #[test]
    fn a_template_comes_back_as_it_was_put() {
        let text = br#"{ "kvm_capabilities": ["!56"], "cpuid_modifiers": [{ "leaf": "0x1",
            "subleaf": "0", "flags": 0, "modifiers": [{ "register": "eax", "bitmap": "0b1x" }] }],
            "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b0" }],
            "reg_modifiers": [], "vcpu_features": [] }"#;
        let mut config = VmConfig::default();
        body::parse::<CpuConfig>(text).unwrap().put_into(&mut config);
        let found = serde_json::to_value(CpuConfig::of(&config).unwrap()).unwrap();
        assert_eq!(found["kvm_capabilities"][0], "!56");
        assert_eq!(found["cpuid_modifiers"][0]["leaf"], "0x1");
        let bitmap = format!("0b{}1x", "x".repeat(30));
        assert_eq!(found["cpuid_modifiers"][0]["modifiers"][0]["bitmap"], bitmap);
        assert_eq!(found["msr_modifiers"][0]["addr"], "0x10a");
        assert!(found.get("reg_modifiers").is_none(), "{found}");
        let again = body::parse::<CpuConfig>(found.to_string().as_bytes()).unwrap();
        let before = config.clone();
        again.put_into(&mut config);
        assert_eq!(config, before);
    }

    #[test]
    fn the_field_is_named() {
        let refused =
            |text: &str| body::parse::<CpuConfig>(text.as_bytes()).unwrap_err().to_string();
        for (text, words) in [
            (
                r#"{"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,
                    "modifiers":[{"register":"eax","bitmap":"0b2"}]}]}"#,
                ["cpuid_modifiers[0].modifiers[0].bitmap: ", "\"0b2\" has '2'", "0, 1 and x"],
            ),
            (
                r#"{"msr_modifiers":[{"addr":"q","bitmap":"0b1"}]}"#,
                ["msr_modifiers[0].addr: ", "\"q\"", "0x10a"],
            ),
            (r#"{"kvm_capabilities":["1","y"]}"#, ["kvm_capabilities[1]: ", "\"y\"", "number"]),
            (r#"{"reg_modifiers":[{}]}"#, ["reg_modifiers: ", "1 of them", "none"]),
            (r#"{"vcpu_features":[1, 2]}"#, ["vcpu_features: ", "2 of them", "aarch64"]),
            (r#"{"msrs":[]}"#, ["unknown field `msrs`", "`msr_modifiers`", "`cpuid_modifiers`"]),
        ] {
            let message = refused(text);
            for word in words {
                assert!(message.contains(word), "{word}: {message}");
            }
        }
    }
}
