use proptest::prelude::*;

use super::*;
use crate::x86_64::MAX_VCPUS;

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
    let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
    entry(0, 0, [max, word(0), word(8), word(4)])
}

/// A host with everything set that may be: what is not masked shows up.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"GenuineIntel", 0x1F),
        entry(0x1, 0, [0x606A6, 0x5820_0800, u32::MAX, u32::MAX]),
        entry(0x4, 0, [0xFC1F_C121, 0x02C0_003F, 63, 0]),
        entry(0x4, 1, [0xFC1F_C122, 0x01C0_003F, 63, 0]),
        entry(0x4, 2, [0xFC1F_C143, 0x04C0_003F, 1023, 0]),
        entry(0x4, 3, [0xFC1F_C163, 0x02C0_003F, 57343, 0]),
        entry(0x4, 4, [0, 0, 0, 0]),
        entry(0x5, 0, [64, 64, 3, 0x20]),
        entry(0x6, 0, [0x77, 2, 9, 0]),
        entry(0xA, 0, [0x0730_0805, 0, 0, 0x8604]),
        entry(0xB, 0, [1, 2, 0x100, 88]),
        entry(0xB, 1, [7, 96, 0x201, 88]),
        entry(0x1F, 0, [1, 2, 0x100, 88]),
        entry(0x4000_0000, 0, [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D]),
        entry(0x4000_0001, 0, [0x0100_7EFB, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2C10_0800]),
        entry(0x8000_0002, 0, [1, 2, 3, 4]),
        entry(0x8000_0008, 0, [0x3934, 0, 0, 0]),
    ]
}

fn amd() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"AuthenticAMD", 0x10),
        entry(0x1, 0, [0x80_0F12, 0x0D40_0800, u32::MAX, u32::MAX]),
        entry(0x8000_0000, 0, [0x8000_001E, 0, 0, 0]),
        entry(0x8000_0001, 0, [0x80_0F12, 0, u32::MAX, u32::MAX]),
        entry(0x8000_0008, 0, [0x3030, 0x1000, 0x7F1F, 0]),
        entry(0x8000_000A, 0, [1, 0x8000, 0, 0xFF]),
        entry(0x8000_001D, 0, [0x4121, 0x01C0_003F, 63, 0]),
        entry(0x8000_001D, 2, [0x4143, 0x01C0_003F, 1023, 2]),
        entry(0x8000_001D, 3, [0x1_C163, 0x03C0_003F, 8191, 1]),
        entry(0x8000_001E, 0, [13, 0x106, 0x301, 0]),
        entry(0x8000_0022, 0, [1, 6, 0, 0]),
    ]
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    let mut matching = entries.iter().filter(|e| e.function == function && e.index == index);
    let found = *matching.next().unwrap_or_else(|| panic!("leaf {function:#x}.{index} is there"));
    assert!(matching.next().is_none(), "leaf {function:#x}.{index} is there once");
    found
}

fn config(cpus: u8) -> CpuidConfig {
    CpuidConfig { cpus, smt: false, tsc_deadline: false, tsc_khz: None }
}

proptest! {
    #[test]
    fn every_topology_leaf_says_the_same(pairs in 1..=MAX_VCPUS / 2, odd: bool, smt: bool, on_amd: bool) {
        // With several threads a core, their number is even.
        let cpus = if odd { 2 * pairs - 1 } else { 2 * pairs };
        let smt = smt && (cpus == 1 || !odd);
        let config = CpuidConfig { smt, ..config(cpus) };
        let cpuid = Cpuid::new(&if on_amd { amd() } else { intel() }, &config);
        let n = u32::from(cpus);
        let each = if smt && n > 1 { 2 } else { 1 };
        for index in 0..cpus {
            let entries = cpuid.for_vcpu(index);
            let id = u32::from(index);
            let features = leaf(&entries, 1, 0);
            prop_assert_eq!(features.ebx >> 24, id);
            prop_assert_eq!(features.ebx >> 16 & 0xFF, n);
            prop_assert_eq!(features.edx >> 28 & 1 == 1, n > 1);

            let (threads, cores) = (leaf(&entries, 0xB, 0), leaf(&entries, 0xB, 1));
            prop_assert_eq!((threads.eax, threads.ebx, threads.ecx), (each - 1, each, 0x100));
            prop_assert_eq!((cores.ebx, cores.ecx), (n, 0x201));
            prop_assert_eq!(leaf(&entries, 0xB, 2).ecx, 2);
            prop_assert_eq!((threads.edx, cores.edx), (id, id));
            // No two CPUs of a package differ above the package shift.
            prop_assert_eq!(id >> cores.eax, 0);
            prop_assert!(n <= 1 << cores.eax && (cores.eax == 0 || n > 1 << (cores.eax - 1)));

            if on_amd {
                prop_assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx & 0xFF, n - 1);
                prop_assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx >> 12 & 0xF, cores.eax);
                prop_assert_eq!(leaf(&entries, 0x8000_001E, 0).eax, id);
                // Who is a thread of whose core is what the shift of leaf 0xB says.
                prop_assert_eq!(leaf(&entries, 0x8000_001E, 0).ebx & 0xFF, id >> threads.eax);
                prop_assert_eq!(leaf(&entries, 0x8000_001E, 0).ebx >> 8, each - 1);
                prop_assert_eq!(leaf(&entries, 0x8000_001E, 0).ecx, 0);
                prop_assert_eq!(leaf(&entries, 0x8000_001D, 0).eax >> 14 & 0xFFF, each - 1);
                prop_assert_eq!(leaf(&entries, 0x8000_001D, 3).eax >> 14 & 0xFFF, n - 1);
                prop_assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx >> 1 & 1 == 1, n > 1);
            } else {
                prop_assert_eq!(leaf(&entries, 0x1F, 0).ebx, each);
                prop_assert_eq!(leaf(&entries, 0x1F, 1).ebx, n);
                prop_assert_eq!(leaf(&entries, 0x4, 2).eax >> 14 & 0xFFF, each - 1);
                prop_assert_eq!(leaf(&entries, 0x4, 3).eax >> 14 & 0xFFF, (1 << cores.eax) - 1);
                prop_assert_eq!(
                    leaf(&entries, 0x4, 0).eax >> 26,
                    (1 << (cores.eax - threads.eax)) - 1
                );
                prop_assert_eq!(leaf(&entries, 0x4, 4).eax, 0);
            }
        }
    }

    #[test]
    fn any_host_table_is_shaped_without_panic(
        raw in proptest::collection::vec(any::<(u32, u32, [u32; 4])>(), 0..40),
        cpus: u8,
        smt: bool,
        index: u8,
    ) {
        let host: Vec<_> = raw.into_iter().map(|(f, i, r)| entry(f, i, r)).collect();
        let config = CpuidConfig { cpus, smt, tsc_deadline: true, tsc_khz: Some(1) };
        let _ = Cpuid::new(&host, &config).for_vcpu(index);
    }
}

#[test]
fn nested_virtualisation_and_counters_are_masked() {
    let entries = Cpuid::new(&intel(), &config(2)).for_vcpu(0);
    let ecx = leaf(&entries, 1, 0).ecx;
    for (bit, name) in
        [(3, "MONITOR"), (5, "VMX"), (15, "PDCM"), (24, "TSC deadline"), (27, "OSXSAVE")]
    {
        assert_eq!(ecx >> bit & 1, 0, "{name}");
    }
    assert_eq!(ecx >> 31, 1, "hypervisor");
    assert_eq!(ecx >> 21 & 1, 1, "x2APIC");
    assert_eq!(leaf(&entries, 6, 0).eax, 4, "ARAT only");
    assert_eq!(leaf(&entries, 0xA, 0), entry(0xA, 0, [0; 4]));

    let entries = Cpuid::new(&amd(), &config(2)).for_vcpu(0);
    assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx >> 2 & 1, 0, "SVM");
    assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx >> 22 & 1, 1, "topology extensions");
    assert_eq!(leaf(&entries, 0x8000_000A, 0), entry(0x8000_000A, 0, [0; 4]));
    assert_eq!(leaf(&entries, 0x8000_0022, 0), entry(0x8000_0022, 0, [0; 4]));
}

#[test]
fn a_register_of_intels_is_not_shown_on_amd() {
    for (mut host, left) in [(intel(), u32::MAX), (amd(), !(1 << 29))] {
        host.push(entry(7, 0, [u32::MAX; 4]));
        assert_eq!(leaf(&Cpuid::new(&host, &config(1)).for_vcpu(0), 7, 0).edx, left);
    }
}

#[test]
fn the_tsc_deadline_timer_comes_from_its_capability() {
    let mut host = intel();
    host[1].ecx = 0;
    let with = CpuidConfig { tsc_deadline: true, ..config(1) };
    assert_eq!(leaf(&Cpuid::new(&host, &with).for_vcpu(0), 1, 0).ecx >> 24 & 1, 1);
    assert_eq!(leaf(&Cpuid::new(&host, &config(1)).for_vcpu(0), 1, 0).ecx >> 24 & 1, 0);
}

#[test]
fn frequencies_are_told_behind_the_leaves_of_kvm() {
    let timing = CpuidConfig { tsc_khz: Some(2_500_000), ..config(1) };
    let entries = Cpuid::new(&intel(), &timing).for_vcpu(0);
    assert_eq!(leaf(&entries, 0x4000_0000, 0).eax, 0x4000_0010);
    let told = leaf(&entries, 0x4000_0010, 0);
    assert_eq!((told.eax, told.ebx), (2_500_000, 1_000_000));

    let entries = Cpuid::new(&intel(), &config(1)).for_vcpu(0);
    assert_eq!(leaf(&entries, 0x4000_0000, 0).eax, 0x4000_0001);
    assert!(!entries.iter().any(|e| e.function == 0x4000_0010));
    // Without KVM's leaves there is none to put it behind.
    let entries = Cpuid::new(&amd(), &timing).for_vcpu(0);
    assert!(!entries.iter().any(|e| e.function == 0x4000_0010));
}

#[test]
fn paravirtual_features_and_brand_are_the_hosts() {
    let host = intel();
    let entries = Cpuid::new(&host, &config(4)).for_vcpu(3);
    for function in [0x4000_0001, 0x8000_0002] {
        assert_eq!(leaf(&entries, function, 0), leaf(&host, function, 0));
    }
}

#[test]
fn amd_without_extended_topology_gets_a_leaf_for_it() {
    let mut host = amd();
    host[0].eax = 0x7;
    let entries = Cpuid::new(&host, &config(3)).for_vcpu(2);
    assert_eq!(leaf(&entries, 0, 0).eax, 0xB);
    assert_eq!(leaf(&entries, 0xB, 1).edx, 2);
    assert!(!entries.iter().any(|e| e.function == 0x1F));
}

#[test]
fn amd_without_topology_extensions_gets_them_where_cores_have_threads() {
    let mut host = amd();
    host[2].eax = 0x8000_0008;
    host[3].ecx = 0;
    host.retain(|e| e.function != 0x8000_001E);
    let smt = CpuidConfig { smt: true, ..config(4) };
    let entries = Cpuid::new(&host, &smt).for_vcpu(3);
    assert_eq!(leaf(&entries, 0x8000_0000, 0).eax, 0x8000_001E);
    assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx >> 22 & 1, 1);
    let ids = leaf(&entries, 0x8000_001E, 0);
    assert_eq!((ids.eax, ids.ebx), (3, 0x101), "the second thread of the second core");
    let entries = Cpuid::new(&host, &config(4)).for_vcpu(3);
    assert!(!entries.iter().any(|e| e.function == 0x8000_001E));
    assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx >> 22 & 1, 0);
}
