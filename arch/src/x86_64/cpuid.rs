//! CPUID: what the host's KVM offers, made into the CPUs of this machine.
//!
//! The features are the host's, less what a guest cannot use here. The topology is ours: one
//! package of cores with one thread each or two, whatever the host has, and APIC ids equal to vCPU
//! indices. Leaves follow the Intel SDM vol. 2 (CPUID) and the AMD APM vol. 3 appendix E.

mod features;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub use features::{is_same, missing};

/// What shapes the CPUID of a machine's vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Number of vCPUs, 1 to [`super::MAX_VCPUS`].
    pub cpus: u8,
    /// Simultaneous multithreading: two vCPUs, of which the first has an even number, are the threads of
    /// a core. Each is a core of its own without it, or if there is only one.
    pub smt: bool,
    /// Whether the local APIC has TSC deadline mode (`KVM_CAP_TSC_DEADLINE_TIMER`).
    /// `KVM_GET_SUPPORTED_CPUID` never says so.
    pub tsc_deadline: bool,
    /// Frequency of the guest's TSC in kHz, if known. It is then given to the guest, with the
    /// frequency of the local APIC, in leaf 0x4000_0010.
    pub tsc_khz: Option<u32>,
}

mod leaf {
    pub(super) const VENDOR: u32 = 0x0;
    pub(super) const FEATURES: u32 = 0x1;
    pub(super) const CACHES: u32 = 0x4;
    pub(super) const MONITOR: u32 = 0x5;
    pub(super) const POWER: u32 = 0x6;
    pub(super) const STRUCTURED: u32 = 0x7;
    pub(super) const PERFMON: u32 = 0xA;
    pub(super) const TOPOLOGY: u32 = 0xB;
    pub(super) const HYBRID: u32 = 0x1A;
    pub(super) const TOPOLOGY_V2: u32 = 0x1F;
    pub(super) const HYPERVISOR: u32 = 0x4000_0000;
    pub(super) const TIMING: u32 = 0x4000_0010;
    pub(super) const LAST_EXTENDED: u32 = 0x8000_0000;
    pub(super) const AMD_FEATURES: u32 = 0x8000_0001;
    pub(super) const SIZES: u32 = 0x8000_0008;
    pub(super) const SVM: u32 = 0x8000_000A;
    pub(super) const AMD_CACHES: u32 = 0x8000_001D;
    pub(super) const AMD_TOPOLOGY: u32 = 0x8000_001E;
    pub(super) const AMD_PERFMON_V2: u32 = 0x8000_0022;
    pub(super) const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;
}

// Leaf 1, ECX.
const ECX_DTES64: u32 = 1 << 2;
const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_OSXSAVE: u32 = 1 << 27;
const ECX_HYPERVISOR: u32 = 1 << 31;
// Leaf 1, EDX.
const EDX_DEBUG_STORE: u32 = 1 << 21;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x8000_0001, ECX.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_IBS: u32 = 1 << 10;
const ECX_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
const ECX_PERF_CORE: u32 = 1 << 23;
const ECX_PERF_NORTHBRIDGE: u32 = 1 << 24;
const ECX_PERF_LAST_LEVEL: u32 = 1 << 28;
// Leaf 7, EDX.
const EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
// Leaf 6.
const EAX_ARAT: u32 = 1 << 2;

/// Level types of leaves 0xB and 0x1F.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Frequency of KVM's emulated APIC bus in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The CPUID that all vCPUs of a machine share; each gets it with its own APIC id.
#[derive(Clone, Debug)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
    amd: bool,
    /// Threads of a core.
    threads: u32,
}

impl Cpuid {
    /// Shapes what `KVM_GET_SUPPORTED_CPUID` gave.
    pub fn new(supported: &[kvm_cpuid_entry2], config: &CpuidConfig) -> Self {
        let mut entries = supported.to_vec();
        let amd = is_amd(&entries);
        let topology = Topology::new(config);
        if amd && topology.threads > 1 {
            announce_threads(&mut entries);
        }
        for entry in &mut entries {
            mask_features(entry, config.tsc_deadline, amd);
            set_sharing(entry, topology, amd);
        }
        if let Some(tsc_khz) = config.tsc_khz {
            add_timing(&mut entries, tsc_khz);
        }
        if find(&mut entries, leaf::TOPOLOGY_V2).is_some() {
            replace_topology(&mut entries, leaf::TOPOLOGY_V2, topology);
        }
        replace_topology(&mut entries, leaf::TOPOLOGY, topology);
        // There is always a leaf 0xB now, so the highest leaf has to reach it.
        if let Some(vendor) = find(&mut entries, leaf::VENDOR) {
            vendor.eax = vendor.eax.max(leaf::TOPOLOGY);
        }
        Self { entries, amd, threads: topology.threads }
    }

    /// The entries for vCPU `index`, from 0, for `KVM_SET_CPUID2`.
    pub fn for_vcpu(&self, index: u8) -> Vec<kvm_cpuid_entry2> {
        let apic_id = u32::from(index);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                leaf::FEATURES => entry.ebx = entry.ebx & 0x00FF_FFFF | apic_id << 24,
                leaf::TOPOLOGY | leaf::TOPOLOGY_V2 => entry.edx = apic_id,
                leaf::AMD_TOPOLOGY if self.amd => {
                    entry.eax = apic_id;
                    entry.ebx |= apic_id / self.threads;
                }
                _ => {}
            }
        }
        entries
    }

    /// EAX and EDX of leaf 1: signature and features, as the MP table repeats them.
    pub fn signature_and_features(&self) -> (u32, u32) {
        self.entries
            .iter()
            .find(|entry| entry.function == leaf::FEATURES)
            .map_or((0, 0), |entry| (entry.eax, entry.edx))
    }

    /// The first guest-physical address that these CPUs cannot reach: 2 to the bits that leaf 0x8000_0008
    /// names (Intel SDM vol. 2, CPUID; AMD APM vol. 3, E.4.7), 2^36 where it is absent.
    pub fn address_limit(&self) -> u64 {
        let sizes = self.entries.iter().find(|entry| entry.function == leaf::SIZES);
        // KVM in the place of AMD's SEV may take some away: bits 16 to 23, 0 if none.
        let bits = sizes.map_or(36, |entry| match entry.eax >> 16 & 0xFF {
            0 => entry.eax & 0xFF,
            guest => guest,
        });
        1u64.checked_shl(bits).unwrap_or(u64::MAX)
    }

    /// The entries as they are without a vCPU's APIC id: for whoever asks what the guest's CPUs
    /// can do.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }
}

fn find(entries: &mut [kvm_cpuid_entry2], function: u32) -> Option<&mut kvm_cpuid_entry2> {
    entries.iter_mut().find(|entry| entry.function == function)
}

/// The vendor's name and EAX of leaf 1, which are family, model and stepping. Empty and 0 where there is
/// no such leaf.
pub(super) fn vendor_and_signature(entries: &[kvm_cpuid_entry2]) -> (Vec<u8>, u32) {
    let find = |leaf| entries.iter().find(|entry| entry.function == leaf);
    let name = |entry: &kvm_cpuid_entry2| {
        [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes).collect()
    };
    let vendor = find(leaf::VENDOR).map(name).unwrap_or_default();
    (vendor, find(leaf::FEATURES).map_or(0, |entry| entry.eax))
}

/// Whether the vendor leaf names AMD, or Hygon, whose CPUs have AMD's leaves.
fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    let (name, _) = vendor_and_signature(entries);
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}

/// Takes away what a guest cannot use: nested virtualisation, performance counters, MWAIT, and
/// what only the host knows. Adds what KVM emulates without saying so.
fn mask_features(entry: &mut kvm_cpuid_entry2, tsc_deadline: bool, amd: bool) {
    match entry.function {
        leaf::FEATURES => {
            entry.ecx &= !(ECX_DTES64 | ECX_MONITOR | ECX_VMX | ECX_PDCM | ECX_TSC_DEADLINE);
            // KVM shows OSXSAVE according to the guest's own CR4.
            entry.ecx &= !ECX_OSXSAVE;
            entry.ecx |= ECX_HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            entry.edx &= !EDX_DEBUG_STORE;
        }
        leaf::POWER => {
            // All that remains is that the APIC timer runs in every power state.
            entry.eax &= EAX_ARAT;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        // A register of Intel's. Some versions of KVM give it to any guest, and others do not, so a
        // guest would see on which it is.
        leaf::STRUCTURED if amd && entry.index == 0 => entry.edx &= !EDX_ARCH_CAPABILITIES,
        leaf::AMD_FEATURES => {
            entry.ecx &=
                !(ECX_SVM | ECX_IBS | ECX_PERF_CORE | ECX_PERF_NORTHBRIDGE | ECX_PERF_LAST_LEVEL);
        }
        // Of the last one, the host's topology, zero says that there is none: leaf 0xB has ours.
        leaf::MONITOR
        | leaf::PERFMON
        | leaf::HYBRID
        | leaf::SVM
        | leaf::AMD_PERFMON_V2
        | leaf::AMD_TOPOLOGY_V2 => {
            entry.eax = 0;
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        _ => {}
    }
}

/// What the leaves say of one package.
#[derive(Clone, Copy)]
struct Topology {
    /// Threads of all cores together, at least 1.
    cpus: u32,
    /// Threads of a core, 1 or 2.
    threads: u32,
}

impl Topology {
    fn new(config: &CpuidConfig) -> Topology {
        let cpus = u32::from(config.cpus.max(1));
        Topology { cpus, threads: if config.smt && cpus > 1 { 2 } else { 1 } }
    }

    /// Bits of an APIC id that tell the threads of one core from each other.
    fn thread_bits(self) -> u32 {
        self.threads.trailing_zeros()
    }

    /// Bits of an APIC id that tell the threads of the package from each other.
    fn bits(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

/// How many CPUs there are, and which caches they share: the first two levels are a core's own,
/// the others the package's.
fn set_sharing(entry: &mut kvm_cpuid_entry2, topology: Topology, amd: bool) {
    let Topology { cpus, threads } = topology;
    let (ids, several) = (1 << topology.bits(), cpus > 1);
    let (cache_type, cache_level) = (entry.eax & 0x1F, entry.eax >> 5 & 0x7);
    let shared = cache_level >= 3;
    match entry.function {
        leaf::FEATURES => {
            entry.ebx = entry.ebx & 0x0000_FFFF | cpus << 16;
            entry.edx = with_bits(entry.edx, EDX_HTT, several);
        }
        leaf::CACHES if cache_type != 0 => {
            let sharing = if shared { ids } else { threads } - 1;
            let cores = ids / threads - 1;
            entry.eax = entry.eax & 0x3FFF | sharing << 14 | cores << 26;
        }
        leaf::AMD_FEATURES if amd => {
            entry.ecx = with_bits(entry.ecx, ECX_CMP_LEGACY, several);
        }
        leaf::SIZES if amd => {
            entry.ecx = entry.ecx & 0xFFFF_0F00 | topology.bits() << 12 | (cpus - 1);
        }
        leaf::AMD_CACHES if amd && cache_type != 0 => {
            let sharing = if shared { cpus } else { threads } - 1;
            entry.eax = entry.eax & 0xFC00_3FFF | sharing << 14;
        }
        leaf::AMD_TOPOLOGY if amd => {
            // One node; the ids of thread and core are each vCPU's own.
            entry.eax = 0;
            entry.ebx = (threads - 1) << 8;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// AMD's guests look for threads of a core where topology extensions are announced, and nowhere else.
fn announce_threads(entries: &mut Vec<kvm_cpuid_entry2>) {
    if let Some(features) = find(entries, leaf::AMD_FEATURES) {
        features.ecx |= ECX_TOPOLOGY_EXTENSIONS;
    }
    if let Some(last) = find(entries, leaf::LAST_EXTENDED) {
        last.eax = last.eax.max(leaf::AMD_TOPOLOGY);
    }
    if find(entries, leaf::AMD_TOPOLOGY).is_none() {
        entries.push(kvm_cpuid_entry2 { function: leaf::AMD_TOPOLOGY, ..Default::default() });
    }
}

fn with_bits(value: u32, bits: u32, set: bool) -> u32 {
    if set { value | bits } else { value & !bits }
}

/// Puts our extended topology into leaf 0xB or 0x1F: threads, cores, end.
fn replace_topology(entries: &mut Vec<kvm_cpuid_entry2>, function: u32, topology: Topology) {
    entries.retain(|entry| entry.function != function);
    let levels = [
        (topology.thread_bits(), topology.threads, LEVEL_THREAD),
        (topology.bits(), topology.cpus, LEVEL_CORE),
        (0, 0, 0),
    ];
    entries.extend(levels.into_iter().zip(0..).map(|((shift, count, kind), index)| {
        kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind << 8 | index,
            ..Default::default()
        }
    }));
}

/// Tells the frequencies in the leaf that guests know from other hypervisors, behind those of
/// KVM. Without KVM's leaves there is no place for it.
fn add_timing(entries: &mut Vec<kvm_cpuid_entry2>, tsc_khz: u32) {
    let Some(hypervisor) = find(entries, leaf::HYPERVISOR) else { return };
    hypervisor.eax = hypervisor.eax.max(leaf::TIMING);
    entries.retain(|entry| entry.function != leaf::TIMING);
    entries.push(kvm_cpuid_entry2 {
        function: leaf::TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
}

#[cfg(test)]
mod tests;
