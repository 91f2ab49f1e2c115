//! Which features a guest was shown that a host cannot give it: what stands between a machine that was
//! saved and a host where it is to go on.

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a leaf, as 0 to 3 for EAX to EDX.
type Register = usize;

/// Leaves whose bits are features, by leaf, subleaf and register, and those of their bits that are not:
/// they say what the operating system does, or are the monitor's to set (Intel SDM volume 2, CPUID; AMD
/// APM volume 3, appendix E).
const FEATURES: [(u32, u32, Register, u32); 14] = [
    // TSC_DEADLINE, OSXSAVE, the hypervisor bit.
    (1, 0, 2, 1 << 24 | 1 << 27 | 1 << 31),
    // HTT.
    (1, 0, 3, 1 << 28),
    (7, 0, 1, 0),
    // OSPKE.
    (7, 0, 2, 1 << 4),
    (7, 0, 3, 0),
    (7, 1, 0, 0),
    (7, 1, 3, 0),
    (7, 2, 3, 0),
    (0xd, 0, 0, 0),
    (0xd, 1, 0, 0),
    // CmpLegacy, TopologyExtensions.
    (0x8000_0001, 0, 2, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, 3, 0),
    (0x8000_0008, 0, 1, 0),
    (0x4000_0001, 0, 0, 0),
];

/// Names of features that programs are known to use, by leaf, subleaf, register and bit.
const NAMES: [(u32, u32, Register, u32, &str); 44] = [
    (1, 0, 2, 0, "SSE3"),
    (1, 0, 2, 1, "PCLMULQDQ"),
    (1, 0, 2, 9, "SSSE3"),
    (1, 0, 2, 12, "FMA"),
    (1, 0, 2, 13, "CMPXCHG16B"),
    (1, 0, 2, 17, "PCID"),
    (1, 0, 2, 19, "SSE4.1"),
    (1, 0, 2, 20, "SSE4.2"),
    (1, 0, 2, 21, "x2APIC"),
    (1, 0, 2, 22, "MOVBE"),
    (1, 0, 2, 23, "POPCNT"),
    (1, 0, 2, 25, "AES"),
    (1, 0, 2, 26, "XSAVE"),
    (1, 0, 2, 28, "AVX"),
    (1, 0, 2, 29, "F16C"),
    (1, 0, 2, 30, "RDRAND"),
    (7, 0, 1, 0, "FSGSBASE"),
    (7, 0, 1, 3, "BMI1"),
    (7, 0, 1, 5, "AVX2"),
    (7, 0, 1, 7, "SMEP"),
    (7, 0, 1, 8, "BMI2"),
    (7, 0, 1, 9, "ERMS"),
    (7, 0, 1, 10, "INVPCID"),
    (7, 0, 1, 16, "AVX512F"),
    (7, 0, 1, 18, "RDSEED"),
    (7, 0, 1, 19, "ADX"),
    (7, 0, 1, 20, "SMAP"),
    (7, 0, 1, 23, "CLFLUSHOPT"),
    (7, 0, 1, 24, "CLWB"),
    (7, 0, 1, 29, "SHA"),
    (7, 0, 1, 30, "AVX512BW"),
    (7, 0, 1, 31, "AVX512VL"),
    (7, 0, 2, 2, "UMIP"),
    (7, 0, 2, 3, "PKU"),
    (7, 0, 2, 8, "GFNI"),
    (7, 0, 2, 9, "VAES"),
    (7, 0, 2, 22, "RDPID"),
    (0xd, 1, 0, 1, "XSAVEC"),
    (0xd, 1, 0, 3, "XSAVES"),
    (0x8000_0001, 0, 2, 5, "ABM"),
    (0x8000_0001, 0, 2, 6, "SSE4A"),
    (0x8000_0001, 0, 3, 26, "1 GiB pages"),
    (0x8000_0001, 0, 3, 27, "RDTSCP"),
    (0x8000_0008, 0, 1, 0, "CLZERO"),
];

fn register(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32, register: Register) -> u32 {
    let fits = |entry: &&kvm_cpuid_entry2| entry.function == leaf && entry.index == subleaf;
    entries.iter().find(fits).map_or(0, |entry| {
        [entry.eax, entry.ebx, entry.ecx, entry.edx].get(register).copied().unwrap_or(0)
    })
}

/// The features of `shown`, which a guest may use, that are not in `supported`, what a host gives: by
/// their names, or by leaf, register and bit.
pub fn missing(shown: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for (leaf, subleaf, place, ignored) in FEATURES {
        let had = register(shown, leaf, subleaf, place) & !ignored;
        let lacking = had & !register(supported, leaf, subleaf, place);
        for bit in (0..32).filter(|bit| lacking & 1 << bit != 0) {
            let named = NAMES
                .iter()
                .find(|(l, s, r, b, _)| (*l, *s, *r, *b) == (leaf, subleaf, place, bit));
            let letter = ["eax", "ebx", "ecx", "edx"][place];
            missing.push(named.map_or_else(
                || format!("CPUID {leaf:#x}/{subleaf} {letter} bit {bit}"),
                |(.., name)| (*name).to_owned(),
            ));
        }
    }
    missing
}

/// Bits that follow a vCPU's registers, by leaf, subleaf and register: KVM keeps them up to date itself.
const FOLLOWING: [(u32, u32, Register, u32); 5] = [
    // MONITOR (IA32_MISC_ENABLE), OSXSAVE (CR4).
    (1, 0, 2, 1 << 3 | 1 << 27),
    // APIC (IA32_APIC_BASE).
    (1, 0, 3, 1 << 9),
    // OSPKE (CR4).
    (7, 0, 2, 1 << 4),
    // Sizes of the states that are in use (XCR0, IA32_XSS).
    (0xd, 0, 1, !0),
    (0xd, 1, 1, !0),
];

/// True if two vCPUs are shown the same, but for what follows from their registers.
pub fn is_same(one: &[kvm_cpuid_entry2], other: &[kvm_cpuid_entry2]) -> bool {
    let lasting = |entry: &kvm_cpuid_entry2| {
        let mut registers = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        for (leaf, subleaf, place, bits) in FOLLOWING {
            if (leaf, subleaf) == (entry.function, entry.index)
                && let Some(register) = registers.get_mut(place)
            {
                *register &= !bits;
            }
        }
        (entry.function, entry.index, entry.flags, registers)
    };
    one.iter().map(lasting).eq(other.iter().map(lasting))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ecx, edx, ..Default::default() }
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let shown = [entry(1, 1 << 28 | 1 << 25 | 1 << 24 | 1 << 31, 1 << 5)];
        assert_eq!(missing(&shown, &shown), [""; 0]);
        let here = [entry(1, 1 << 25, 0)];
        assert_eq!(missing(&shown, &here), ["AVX", "CPUID 0x1/0 edx bit 5"]);
        assert_eq!(missing(&here, &shown), [""; 0]);
        assert_eq!(missing(&shown, &[]), ["AES", "AVX", "CPUID 0x1/0 edx bit 5"]);
    }

    #[test]
    fn what_follows_from_registers_makes_no_difference() {
        let one = [entry(1, 0, 0), entry(2, 0, 0)];
        assert!(is_same(&one, &[entry(1, 1 << 27, 1 << 9), entry(2, 0, 0)]));
        assert!(!is_same(&one, &[entry(1, 1 << 28, 0), entry(2, 0, 0)]));
        assert!(!is_same(&one, &[entry(1, 0, 0), entry(2, 1 << 27, 0)]));
        assert!(!is_same(&one, &one[..1]));
        assert!(!is_same(&one, &[one[1], one[0]]));
    }
}
