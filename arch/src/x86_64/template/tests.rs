use proptest::prelude::*;

use super::*;

fn bitmap<T: Word>(text: &str) -> Bitmap<T> {
    text.parse().unwrap()
}

#[test]
fn bitmaps_name_bits_from_the_highest_to_bit_0() {
    let map: Bitmap<u32> = bitmap("0b1x0");
    assert_eq!(map, Bitmap::new(0b101, 0b100));
    assert_eq!((map.apply(0), map.apply(u32::MAX)), (0b100, u32::MAX - 1));
    for same in ["1x0", "0b_1_x0_", "0bxxxxxxxx_xxxxxxxx_xxxxxxxx_xxxxx1x0"] {
        assert_eq!(bitmap::<u32>(same), map, "{same}");
    }
    let high = format!("0b1{}", "x".repeat(63));
    assert_eq!(bitmap::<u64>(&high), Bitmap::new(1 << 63, 1 << 63));
    assert_eq!(bitmap::<u32>(&"1".repeat(32)).apply(0), u32::MAX);
}

#[test]
fn what_is_no_bitmap_is_refused_by_what_is_wrong() {
    let refused = |text: &str| text.parse::<Bitmap<u32>>().unwrap_err().to_string();
    for (text, why) in [
        ("", "has 0 bits"),
        ("0b", "has 0 bits"),
        ("__", "has 0 bits"),
        ("0b2", "has '2'"),
        ("0bX", "has 'X'"),
        ("0h1", "up to 32 of 0, 1 and x"),
        ("0b 1", "has ' '"),
        ("-1", "has '-'"),
        ("0b1é", "has 'é'"),
        ("0b0b1", "has 'b'"),
    ] {
        let message = refused(text);
        assert!(message.contains(why) && message.contains(&format!("{text:?}")), "{message}");
    }
    let long = "x".repeat(33);
    assert!(refused(&long).contains("has 33 bits"), "{}", refused(&long));
    assert!(long.parse::<Bitmap<u64>>().is_ok());
    assert!("0".repeat(65).parse::<Bitmap<u64>>().is_err());
}

const EXAMPLE: &str = r#"{
    "kvm_capabilities": ["121", "!56"],
    "cpuid_modifiers": [{
        "leaf": "0x7", "subleaf": "0b1", "flags": 1,
        "modifiers": [{ "register": "ebx", "bitmap": "0b1x0" }]
    }],
    "msr_modifiers": [{ "addr": "266", "bitmap": "0b0" }]
}"#;

fn read(text: &str) -> Result<Template, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

#[test]
fn a_template_is_read_and_written() {
    let template = read(EXAMPLE).unwrap();
    assert_eq!(
        template.kvm_capabilities,
        [KvmCapability::Needed(121), KvmCapability::NotNeeded(56)]
    );
    let modifier = &template.cpuid_modifiers[0];
    assert_eq!((modifier.leaf, modifier.subleaf, modifier.flags), (7, 1, 1));
    assert_eq!(modifier.modifiers[0].register, Register::Ebx);
    assert_eq!(template.msr_modifiers[0].addr, 0x10A);
    let text = serde_json::to_string(&template).unwrap();
    assert!(text.contains(r#""addr":"0x10a""#) && text.contains(r#""!56""#), "{text}");
    assert_eq!(read(&text).unwrap(), template);
    assert_eq!(read("{}").unwrap(), Template::default());
}

#[test]
fn what_is_no_template_is_refused() {
    let replaced = |from: &str, to: &str| {
        assert!(EXAMPLE.contains(from), "{from}");
        read(&EXAMPLE.replace(from, to)).unwrap_err()
    };
    for (from, to, why) in [
        ("\"121\"", "\"x\"", "\"x\" is not the number of a KVM capability"),
        ("\"121\"", "\"!!1\"", "\"!!1\""),
        ("\"121\"", "\"+1\"", "\"+1\""),
        ("\"121\"", "\"4294967296\"", "4294967296"),
        ("\"121\"", "121", "string"),
        ("\"0x7\"", "\"0x1_0000_0000\"", "not a number of 32 bits"),
        ("\"0x7\"", "\"0x100000000\"", "not a number of 32 bits"),
        ("\"0x7\"", "\"0x\"", "not a number"),
        ("\"0x7\"", "\"0x+7\"", "not a number"),
        ("\"0x7\"", "\"-7\"", "not a number"),
        ("\"0x7\"", "\"é\"", "not a number"),
        ("\"0x7\"", "7", "string"),
        ("\"flags\": 1,", "", "flags"),
        ("\"flags\": 1", "\"flags\": -1", "-1"),
        ("\"ebx\"", "\"EBX\"", "`eax`, `ebx`, `ecx`, `edx`"),
        ("0b1x0", "0b12", "has '2'"),
        ("\"addr\"", "\"address\"", "unknown field `address`"),
        ("\"flags\"", "\"more\": 1, \"flags\"", "unknown field `more`"),
        ("\"msr_modifiers\"", "\"msrs\"", "unknown field `msrs`"),
    ] {
        let message = replaced(from, to);
        assert!(message.contains(why), "{from} → {to}: {message}");
    }
}

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn registers(entry: &kvm_cpuid_entry2) -> [u32; 4] {
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

fn change(leaf: u32, subleaf: u32, register: Register, bitmap: Bitmap<u32>) -> CpuidModifier {
    CpuidModifier {
        leaf,
        subleaf,
        flags: 0,
        modifiers: vec![RegisterModifier { register, bitmap }],
    }
}

proptest! {
    #[test]
    fn a_modifier_changes_the_bits_that_it_names_and_no_others(
        before in any::<[[u32; 4]; 3]>(),
        target in 0..3usize,
        register in 0..4usize,
        mask: u32,
        value: u32,
    ) {
        let places = [(1, 0), (7, 0), (7, 1)];
        let mut entries: Vec<_> =
            places.iter().zip(before).map(|(&(leaf, sub), r)| entry(leaf, sub, r)).collect();
        let name = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx][register];
        let (leaf, subleaf) = places[target];
        // By way of its text, as users do.
        let map = bitmap(&Bitmap::new(mask, value).to_string());
        let template = Template {
            cpuid_modifiers: vec![change(leaf, subleaf, name, map)],
            ..Template::default()
        };
        template.change_cpuid(&mut entries).unwrap();
        for (n, (now, then)) in entries.iter().zip(before).enumerate() {
            for (k, (now, then)) in registers(now).into_iter().zip(then).enumerate() {
                for bit in 0..32 {
                    let named = n == target && k == register && mask >> bit & 1 == 1;
                    let wanted = if named { value >> bit & 1 } else { then >> bit & 1 };
                    prop_assert_eq!(now >> bit & 1, wanted, "entry {} register {} bit {}", n, k, bit);
                }
            }
        }
    }

    #[test]
    fn msrs_are_changed_by_their_numbers(data: [u64; 2], mask: u64, value: u64) {
        let map = bitmap(&Bitmap::new(mask, value).to_string());
        let template = Template {
            msr_modifiers: vec![MsrModifier { addr: 0x277, bitmap: map }],
            ..Template::default()
        };
        let mut msrs = [0x10A, 0x277].iter().zip(data).map(|(&index, data)| kvm_msr_entry {
            index, data, ..Default::default()
        }).collect::<Vec<_>>();
        template.change_msrs(&mut msrs);
        prop_assert_eq!(template.msrs(), [0x277]);
        prop_assert_eq!(msrs[0].data, data[0]);
        prop_assert_eq!(msrs[1].data & mask, value & mask);
        prop_assert_eq!(msrs[1].data & !mask, data[1] & !mask);
    }

    #[test]
    fn bitmaps_never_panic_and_survive_printing(text in "(0b)?[01x_]{0,70}|.{0,10}") {
        if let Ok(map) = text.parse::<Bitmap<u32>>() {
            prop_assert_eq!(map.to_string().parse(), Ok(map));
        }
        if let Ok(map) = text.parse::<Bitmap<u64>>() {
            prop_assert_eq!(map.to_string().parse(), Ok(map));
        }
    }

    #[test]
    fn templates_never_panic(text in ".{0,60}") {
        let _ = read(&text);
        let _ = read(&EXAMPLE.replace("0x7", &text.replace(['"', '\\'], "")));
    }
}

#[test]
fn later_changes_come_on_top_and_flags_are_set() {
    let mut first = change(1, 0, Register::Eax, bitmap("0b11"));
    first.flags = 1;
    first.modifiers.push(RegisterModifier { register: Register::Eax, bitmap: bitmap("0bx0") });
    let second = change(1, 0, Register::Eax, bitmap("0b1xx"));
    let mut entries = [entry(1, 0, [0; 4])];
    let mut template = Template { cpuid_modifiers: vec![first], ..Template::default() };
    template.change_cpuid(&mut entries).unwrap();
    assert_eq!((entries[0].eax, entries[0].flags), (0b10, 1));
    template.cpuid_modifiers.push(second);
    template.change_cpuid(&mut entries).unwrap();
    assert_eq!((entries[0].eax, entries[0].flags), (0b110, 0));
    let msr = |text| MsrModifier { addr: 1, bitmap: bitmap(text) };
    template.msr_modifiers = vec![msr("0b11"), msr("0bx0")];
    let mut msrs = [kvm_msr_entry { index: 1, data: 4, ..Default::default() }];
    template.change_msrs(&mut msrs);
    assert_eq!((msrs[0].data, template.msrs()), (0b110, vec![1]));
}

#[test]
fn the_vendor_stays() {
    let all = Bitmap::new(u32::MAX, 0);
    let modifiers = [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx]
        .map(|register| RegisterModifier { register, bitmap: all });
    let leaf = CpuidModifier { leaf: 0, subleaf: 0, flags: 0, modifiers: modifiers.into() };
    let template = Template { cpuid_modifiers: vec![leaf], ..Template::default() };
    let mut entries = [entry(0, 0, [0x1F, 1, 2, 3])];
    template.change_cpuid(&mut entries).unwrap();
    assert_eq!(registers(&entries[0]), [0, 1, 2, 3]);
}

#[test]
fn a_leaf_that_is_not_there_is_named() {
    let template = Template {
        cpuid_modifiers: vec![change(7, 3, Register::Eax, bitmap("1"))],
        ..Template::default()
    };
    let error = template.change_cpuid(&mut [entry(7, 0, [0; 4])]).unwrap_err();
    assert_eq!(error, MissingLeaf { leaf: 7, subleaf: 3 });
    assert!(error.to_string().contains("leaf 0x7, subleaf 0x3"), "{error}");
}

/// A host's leaves as far as templates look at them.
fn host(vendor: &[u8; 12], signature: u32) -> Vec<kvm_cpuid_entry2> {
    let word =
        |i: usize| u32::from_le_bytes([vendor[i], vendor[i + 1], vendor[i + 2], vendor[i + 3]]);
    let all = [u32::MAX; 4];
    let mut entries =
        vec![entry(0, 0, [0x1F, word(0), word(8), word(4)]), entry(1, 0, [signature, 0, !0, !0])];
    let others = [(7, 0), (0xD, 0), (0xD, 1), (0x8000_0001, 0), (0x8000_0008, 0)];
    entries.extend(others.map(|(leaf, subleaf)| entry(leaf, subleaf, all)));
    entries
}

#[test]
fn static_templates_are_for_the_cpus_that_they_were_made_for() {
    use StaticTemplate::*;
    let fitting = |vendor: &[u8; 12], signature| -> Vec<StaticTemplate> {
        let host = host(vendor, signature);
        StaticTemplate::ALL.into_iter().filter(|t| t.template(&host).is_ok()).collect()
    };
    let intel = b"GenuineIntel";
    assert_eq!(fitting(intel, 0x50654), [C3, T2, T2S]);
    assert_eq!(fitting(intel, 0x50657), [C3, T2, T2S, T2CL]);
    assert_eq!(fitting(intel, 0x606A6), [C3, T2, T2CL]);
    assert_eq!(fitting(intel, 0x806F8), [], "Sapphire Rapids");
    assert_eq!(fitting(intel, 0x50655), [], "another stepping");
    assert_eq!(fitting(b"AuthenticAMD", 0xA00F11), [T2A]);
    assert_eq!(fitting(b"AuthenticAMD", 0xA10F11), [], "Genoa");
    assert_eq!(fitting(b"AuthenticAMD", 0x50657), []);
    let error = T2.template(&host(b"AuthenticAMD", 0xA00F11)).unwrap_err().to_string();
    assert_eq!(error, "T2 is for CPUs of GenuineIntel; this host's is of AuthenticAMD");
    let error = T2CL.template(&host(intel, 0x50654)).unwrap_err().to_string();
    assert!(error.contains("Cascade Lake, Ice Lake") && error.contains("0x50654"), "{error}");
    assert!(T2.template(&[]).is_err(), "a host without leaves");
}

#[test]
fn static_templates_show_the_cpu_that_they_are_named_for() {
    use StaticTemplate::*;
    let seen = |template: StaticTemplate, vendor: &[u8; 12], signature: u32| {
        let mut entries = host(vendor, signature);
        template.template(&entries).unwrap().change_cpuid(&mut entries).unwrap();
        move |leaf: u32, subleaf: u32| {
            let found = entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf)).unwrap();
            (registers(found), found.flags)
        }
    };
    let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
    for template in StaticTemplate::ALL {
        let (vendor, signature): (&[u8; 12], _) = match template {
            T2A => (b"AuthenticAMD", 0xA0_0F11),
            _ => (b"GenuineIntel", 0x5_0657),
        };
        let cpu = seen(template, vendor, signature);
        let ([eax, _, ecx, edx], flags) = cpu(1, 0);
        assert_eq!(eax, if template == C3 { 0x306E4 } else { 0x306F2 }, "{template}");
        assert!(!bit(ecx, 5) && bit(ecx, 28), "{template}: VMX goes, AVX stays");
        assert_eq!((bit(ecx, 12), flags), (template != C3, 0), "{template}: FMA");
        assert!(bit(edx, 12) && bit(edx, 7) && !bit(edx, 22), "{template}: MTRR, MCE, no ACPI");
        let ([_, ebx, ecx, _], flags) = cpu(7, 0);
        assert_eq!((bit(ebx, 5), flags), (template != C3, 1), "{template}: AVX2");
        assert!(!bit(ebx, 16) && !bit(ebx, 31) && !bit(ebx, 11), "{template}: AVX-512, RTM");
        assert!(!bit(ecx, 11) && !bit(ecx, 22), "{template}: VNNI, RDPID");
        assert_eq!(cpu(0xD, 0).0[0] & 0xFF, 7, "{template}: x87, SSE and AVX have state");
        assert_eq!(cpu(0xD, 1).0[0] & 0xF, 1, "{template}: of all XSAVE is optimised alone");
        let [_, _, ecx, edx] = cpu(0x8000_0001, 0).0;
        assert!(!bit(edx, 26) && !bit(ecx, 8), "{template}: pages of 1 GiB, PREFETCHW");
        assert_eq!(bit(ecx, 6), !matches!(template, T2A | T2CL), "{template}: SSE4A");
        let msrs = template.changes().msrs();
        assert_eq!(!msrs.is_empty(), matches!(template, T2S | T2CL), "{template}: {msrs:?}");
    }
    let capabilities = |template: StaticTemplate, data| {
        let mut msrs = [kvm_msr_entry { index: 0x10A, data, ..Default::default() }];
        template.changes().change_msrs(&mut msrs);
        msrs[0].data
    };
    assert_eq!(capabilities(T2S, u64::MAX), 0x0C08_0C4C);
    // RDCL_NO to TAA_NO are the host's.
    assert_eq!(capabilities(T2CL, 0x1FF), 0x1FF);
    assert_eq!(capabilities(T2CL, 1 << 12 | 1 << 63), 0);
}
