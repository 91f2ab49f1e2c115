//! Firecracker's static templates: which CPUs they show a guest, and where they may be used.
//!
//! Masks and models are those of Firecracker 1.12.1, which documents what each template is for
//! (docs/cpu_templates/cpu-templates.md). They were read from the program of that release, since later
//! ones have other masks; with T2A, guests of either show the same features.

use std::fmt;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use super::Register::{Eax, Ebx, Ecx, Edx};
use super::{Bitmap, CpuidModifier, MsrModifier, Register, RegisterModifier, Template};
use crate::x86_64::cpuid::vendor_and_signature;

/// A CPU that a guest is shown in place of the host's, by the name of a family of EC2 instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StaticTemplate {
    /// Ivy Bridge, without AVX2; on Intel's Skylake, Cascade Lake and Ice Lake.
    C3,
    /// Haswell, without AVX-512; on Intel's Skylake, Cascade Lake and Ice Lake.
    T2,
    /// As T2, with what differs between Skylake and Cascade Lake taken away, for snapshots that go from
    /// one to the other.
    T2S,
    /// The instruction set that T2A has, on Intel's Cascade Lake and Ice Lake.
    T2CL,
    /// The instruction set that T2CL has, on AMD's Milan.
    T2A,
}

/// The host's CPU is not one that a static template was made for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// It is of another vendor.
    #[error("{template} is for CPUs of {wanted}; this host's is of {found}")]
    Vendor {
        /// The template.
        template: StaticTemplate,
        /// Whose CPUs it is for, as CPUID spells it.
        wanted: &'static str,
        /// Whose CPU the host has.
        found: String,
    },
    /// It is another model.
    #[error("{template} is for {models}; this host's CPU is another (signature {found:#x})")]
    Model {
        /// The template.
        template: StaticTemplate,
        /// The CPUs it is for.
        models: String,
        /// EAX of the host's leaf 1: family, model and stepping.
        found: u32,
    },
}

/// A CPU model by EAX of its leaf 1, as far as that is family, model and stepping.
struct Model {
    name: &'static str,
    signature: u32,
}

/// Stepping, model, family, and the two extensions; the processor type and reserved bits are not in it
/// (Intel SDM vol. 2, CPUID, figure 3-6).
const SIGNATURE: u32 = 0x0FFF_0FFF;
const SKYLAKE: Model = Model { name: "Skylake", signature: 0x5_0654 };
const CASCADE_LAKE: Model = Model { name: "Cascade Lake", signature: 0x5_0657 };
const ICE_LAKE: Model = Model { name: "Ice Lake", signature: 0x6_06A6 };
const MILAN: Model = Model { name: "Milan", signature: 0xA0_0F11 };

/// The bits of `mask` in a register of CPUID become those of `value`.
struct Row {
    leaf: u32,
    subleaf: u32,
    register: Register,
    mask: u32,
    value: u32,
}

const fn row(leaf: u32, subleaf: u32, register: Register, mask: u32, value: u32) -> Row {
    Row { leaf, subleaf, register, mask, value }
}

/// What the templates named T2 have in common.
const HASWELL: [Row; 8] = [
    // Signature of a Xeon E5 v3: family 6, model 0x3F, stepping 2.
    row(0x1, 0, Eax, 0x0FFF_3FFF, 0x0003_06F2),
    // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR, PDCM, DCA.
    row(0x1, 0, Ecx, 0x0004_CDFC, 0),
    // PSN, DS, ACPI, SS, TM, IA-64, PBE; MCE and MTRR are there.
    row(0x1, 0, Edx, 0xE864_1080, 0x0000_1080),
    // SGX, HLE, RTM, RDT, MPX, AVX-512, RDSEED, ADX, PCOMMIT, CLFLUSHOPT, CLWB, PT, SHA; ERMS is there.
    row(0x7, 0, Ebx, 0xFFEF_DA14, 0x0000_0200),
    // UMIP, PKU, GFNI, VAES, VPCLMULQDQ, AVX-512, LA57, RDPID, SGX_LC.
    row(0x7, 0, Ecx, 0x4041_5F5E, 0),
    // AVX-512, FSRM.
    row(0x7, 0, Edx, 0x0000_011C, 0),
    // State of MPX, AVX-512, PKRU.
    row(0xD, 0, Eax, 0x0000_02F8, 0),
    // XSAVEC, XGETBV of state 1, XSAVES.
    row(0xD, 1, Eax, 0x0000_000E, 0),
];

/// The rest of T2 and T2S.
const HASWELL_EXTENDED: [Row; 3] = [
    // PREFETCHW, MONITORX; pages of 1 GiB; WBNOINVD.
    row(0x8000_0001, 0, Ecx, 0x2000_0100, 0),
    row(0x8000_0001, 0, Edx, 0x0400_0000, 0),
    row(0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

/// The rest of T2CL: what AMD alone has goes as well.
const COMMON_ON_INTEL: [Row; 3] = [
    // SSE4A, misaligned SSE, PREFETCHW, MONITORX.
    row(0x8000_0001, 0, Ecx, 0x2000_01C0, 0),
    // AMD's MMX extensions and copies of MMX and FXSR, fast FXSR, pages of 1 GiB.
    row(0x8000_0001, 0, Edx, 0x07C0_0000, 0),
    // WBNOINVD.
    row(0x8000_0008, 0, Ebx, 0x0000_0200, 0),
];

/// The rest of T2A.
const COMMON_ON_AMD: [Row; 3] = [
    // SVM, SSE4A, misaligned SSE, PREFETCHW, MONITORX.
    row(0x8000_0001, 0, Ecx, 0x2000_01C4, 0),
    // MMX extensions, fast FXSR, pages of 1 GiB.
    row(0x8000_0001, 0, Edx, 0x0640_0000, 0),
    // CLZERO, WBNOINVD; error pointers are restored, and IBRS is preferred, always on or in the same mode.
    row(0x8000_0008, 0, Ebx, 0x001C_0205, 0x001C_0004),
];

const IVY_BRIDGE: [Row; 10] = [
    // Signature of a Xeon E5 v2: family 6, model 0x3E, stepping 4.
    row(0x1, 0, Eax, 0x0FFF_3FFF, 0x0003_06E4),
    // DTES64, MONITOR, DS-CPL, VMX, TM2, CNXT-ID, SDBG, FMA, xTPR, PDCM, MOVBE.
    row(0x1, 0, Ecx, 0x0040_DD3C, 0),
    // PSN, DS, ACPI, SS, TM, PBE; MCE and MTRR are there.
    row(0x1, 0, Edx, 0xA864_1080, 0x0000_1080),
    // SGX, BMI, HLE, AVX2, INVPCID, RTM, RDT, MPX, AVX-512, RDSEED, ADX, CLFLUSHOPT, CLWB, PT, SHA.
    row(0x7, 0, Ebx, 0xFFAF_DD3C, 0),
    // UMIP, PKU, AVX-512, LA57, RDPID, SGX_LC.
    row(0x7, 0, Ecx, 0x4041_481E, 0),
    // AVX-512.
    row(0x7, 0, Edx, 0x0000_000C, 0),
    // State of MPX, AVX-512, PKRU.
    row(0xD, 0, Eax, 0x0000_02F8, 0),
    // XSAVEC, XGETBV of state 1, XSAVES.
    row(0xD, 1, Eax, 0x0000_000E, 0),
    // LZCNT, PREFETCHW; pages of 1 GiB.
    row(0x8000_0001, 0, Ecx, 0x0000_0120, 0),
    row(0x8000_0001, 0, Edx, 0x0400_0000, 0),
];

/// `IA32_ARCH_CAPABILITIES` (Intel SDM vol. 4, table 2-2).
const ARCH_CAPABILITIES: u32 = 0x10A;
/// Skylake's and Cascade Lake's common ground: what either lacks is not claimed.
const SKYLAKE_CAPABILITIES: (u64, u64) = (u64::MAX, 0x0C08_0C4C);
/// All but the mitigations that KVM passes on.
const NO_CONTROLS: (u64, u64) = (0xFFFF_FFFF_E2F5_1E00, 0);

impl StaticTemplate {
    /// All of them.
    pub const ALL: [StaticTemplate; 5] = [
        StaticTemplate::C3,
        StaticTemplate::T2,
        StaticTemplate::T2S,
        StaticTemplate::T2CL,
        StaticTemplate::T2A,
    ];

    /// What it changes, for a host with these CPUID leaves.
    ///
    /// # Errors
    /// The template was not made for the host's CPU.
    pub fn template(self, supported: &[kvm_cpuid_entry2]) -> Result<Template, Misfit> {
        let (vendor, signature) = vendor_and_signature(supported);
        let wanted = if self == StaticTemplate::T2A { "AuthenticAMD" } else { "GenuineIntel" };
        if vendor != wanted.as_bytes() {
            let found = String::from_utf8_lossy(&vendor).into_owned();
            return Err(Misfit::Vendor { template: self, wanted, found });
        }
        let models = self.models();
        if !models.iter().any(|model| model.signature == signature & SIGNATURE) {
            let names: Vec<_> = models.iter().map(|model| model.name).collect();
            let (models, found) = (names.join(", "), signature);
            return Err(Misfit::Model { template: self, models, found });
        }
        Ok(self.changes())
    }

    fn models(self) -> &'static [Model] {
        match self {
            StaticTemplate::C3 | StaticTemplate::T2 => &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
            StaticTemplate::T2S => &[SKYLAKE, CASCADE_LAKE],
            StaticTemplate::T2CL => &[CASCADE_LAKE, ICE_LAKE],
            StaticTemplate::T2A => &[MILAN],
        }
    }

    pub(super) fn changes(self) -> Template {
        let (base, rest, capabilities): (&[Row], &[Row], _) = match self {
            StaticTemplate::C3 => (&IVY_BRIDGE, &[], None),
            StaticTemplate::T2 => (&HASWELL, &HASWELL_EXTENDED, None),
            StaticTemplate::T2S => (&HASWELL, &HASWELL_EXTENDED, Some(SKYLAKE_CAPABILITIES)),
            StaticTemplate::T2CL => (&HASWELL, &COMMON_ON_INTEL, Some(NO_CONTROLS)),
            StaticTemplate::T2A => (&HASWELL, &COMMON_ON_AMD, None),
        };
        let cpuid = base.iter().chain(rest).map(|row| CpuidModifier {
            leaf: row.leaf,
            subleaf: row.subleaf,
            // These leaves have subleaves.
            flags: if matches!(row.leaf, 0x7 | 0xD) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            modifiers: vec![RegisterModifier {
                register: row.register,
                bitmap: Bitmap::new(row.mask, row.value),
            }],
        });
        let msrs = capabilities.map(|(mask, value)| MsrModifier {
            addr: ARCH_CAPABILITIES,
            bitmap: Bitmap::new(mask, value),
        });
        Template {
            cpuid_modifiers: cpuid.collect(),
            msr_modifiers: msrs.into_iter().collect(),
            ..Template::default()
        }
    }
}

impl fmt::Display for StaticTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
