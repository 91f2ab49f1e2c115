//! The CPUs that a guest is shown: threads and cores, and templates, on each vCPU.

use machine_tests::{Guest, Outcome};
use std::fs;
use tempfile::TempDir;

/// What a vCPU sees.
#[derive(Debug)]
struct Seen<'a> {
    id: u32,
    lines: Vec<&'a str>,
}

impl Seen<'_> {
    /// A leaf of CPUID.
    fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let start = format!("cpuid {leaf:08x} {subleaf} ");
        let values = self.lines.iter().find_map(|line| line.strip_prefix(&start)).unwrap();
        let mut words = values.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap());
        std::array::from_fn(|_| words.next().unwrap())
    }

    /// A model-specific register.
    fn msr(&self, number: u32) -> u64 {
        let start = format!("msr {number:#x} 0x");
        let value = self.lines.iter().find_map(|line| line.strip_prefix(&start)).unwrap();
        u64::from_str_radix(value, 16).unwrap()
    }
}

/// A guest whose `cpus` say what they see, with one more leaf and a register.
fn guest(cpus: u32, more: &str) -> Guest {
    Guest::new(&format!("cpus cpus={cpus} {more}")).option("--cpus", cpus.to_string())
}

/// What all of them see, by APIC id.
fn seen(outcome: &Outcome, cpus: u32) -> Vec<Seen<'_>> {
    let text = outcome.ok();
    assert_eq!(outcome.number("n"), u64::from(cpus), "{text}");
    let lines = |id| {
        let start = format!("cpu {id} ");
        text.lines().filter_map(|line| line.strip_prefix(&start)).collect::<Vec<_>>()
    };
    (0..cpus).map(|id| Seen { id, lines: lines(id) }).collect()
}

fn is_amd(cpu: &Seen<'_>) -> bool {
    let [_, ebx, ecx, edx] = cpu.leaf(0, 0);
    let name: Vec<u8> = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    name == b"AuthenticAMD" || name == b"HygonGenuine"
}

#[test]
fn vcpus_are_cores_or_threads_of_them() {
    for (cpus, smt) in [(4, false), (4, true), (6, true), (1, true), (2, true)] {
        let option = if smt { "smt" } else { "smt=off" };
        let outcome = guest(cpus, "").option("--cpu", option).run();
        let threads = if smt && cpus > 1 { 2 } else { 1 };
        for cpu in seen(&outcome, cpus) {
            let id = cpu.id;
            let [_, ebx, _, edx] = cpu.leaf(1, 0);
            assert_eq!((ebx >> 24, ebx >> 16 & 0xFF), (id, cpus));
            // PVM shows the bit to a single one as well.
            assert!(cpus == 1 || edx >> 28 & 1 == 1, "several in a package");
            let (of_core, of_package) = (cpu.leaf(0xb, 0), cpu.leaf(0xb, 1));
            assert_eq!((of_core[0] & 0x1F, of_core[1], of_core[3]), (threads - 1, threads, id));
            assert_eq!((of_package[1], of_package[2] >> 8, of_package[3]), (cpus, 2, id));
            // The package's bits are enough for all, and no more.
            assert_eq!(of_package[0] & 0x1F, cpus.next_power_of_two().trailing_zeros());
            // Caches of the first level are a core's own.
            let (leaf, shared) = if is_amd(&cpu) { (0x8000_001d, 3) } else { (4, 3) };
            let (first, third) = (cpu.leaf(leaf, 0), cpu.leaf(leaf, shared));
            if first[0] & 0x1F != 0 {
                assert_eq!(first[0] >> 14 & 0xFFF, threads - 1, "{cpu:?}");
            }
            if third[0] & 0x1F != 0 {
                assert!(third[0] >> 14 & 0xFFF >= cpus - 1, "{cpu:?}");
            }
            // A processor without topology extensions has no such leaf.
            let extended = cpu.leaf(0x8000_0001, 0)[2] >> 22 & 1 == 1;
            let [apic, core, node, _] = cpu.leaf(0x8000_001e, 0);
            if is_amd(&cpu) && extended && (apic, core, node) != (0, 0, 0) {
                assert_eq!((apic, node), (id, 0));
                assert_eq!((core & 0xFF, core >> 8), (id / threads, threads - 1));
            }
        }
    }
}

#[test]
fn threads_come_in_pairs() {
    Guest::new("hello")
        .option("--cpus", "3")
        .option("--cpu", "smt")
        .run()
        .misused(&["cpus", "3 is odd"]);
}

/// A folder with a template in a file, and the option that names it.
fn template(text: &str) -> (TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("template.json");
    fs::write(&path, text).unwrap();
    let option = format!("config={}", path.display());
    (folder, option)
}

/// Brand string, and one of the ranges of memory types that PCs have below 1 MiB (Intel SDM vol. 3
/// § 12.11.2.2), which no kernel of today's reads anything from.
const BRAND: u32 = 0x8000_0002;
const MTRR: u32 = 0x250;

#[test]
fn a_template_reaches_each_vcpu() {
    let ask = format!("leaf={BRAND:#x} msr={MTRR:#x}");
    let before = guest(3, &ask).run();
    let (_folder, option) = template(&format!(
        r#"{{ "cpuid_modifiers": [
            {{ "leaf": "{BRAND:#x}", "subleaf": "0x0", "flags": 0, "modifiers": [
                {{ "register": "eax", "bitmap": "0b1111_0000_xxxx_xxxx" }},
                {{ "register": "edx", "bitmap": "{}" }}] }},
            {{ "leaf": "1", "subleaf": "0", "flags": 0, "modifiers": [
                {{ "register": "ecx", "bitmap": "0b0xx" }},
                {{ "register": "ebx", "bitmap": "0b{}" }}] }},
            {{ "leaf": "0x0", "subleaf": "0x0", "flags": 0, "modifiers": [
                {{ "register": "ebx", "bitmap": "0b{}" }}] }}],
          "msr_modifiers": [{{ "addr": "{MTRR:#x}", "bitmap": "0b110" }}] }}"#,
        "1".repeat(32),
        "1".repeat(32),
        "0".repeat(32),
    ));
    let after = guest(3, &ask).option("--cpu", &option).run();
    for (then, now) in seen(&before, 3).iter().zip(seen(&after, 3)) {
        let ([eax, ebx, ecx, _], id) = (then.leaf(BRAND, 0), then.id);
        assert_eq!(now.leaf(BRAND, 0), [eax & 0xFFFF_00FF | 0xF000, ebx, ecx, u32::MAX]);
        // What the machine dictates comes on top of a template: count and APIC id.
        assert_eq!(now.leaf(1, 0)[1], id << 24 | 3 << 16 | 0xFFFF);
        assert_eq!(now.leaf(1, 0)[2], then.leaf(1, 0)[2] & !4);
        assert_eq!(now.leaf(7, 0), then.leaf(7, 0));
        assert_eq!(now.msr(MTRR), then.msr(MTRR) & !7 | 6);
    }
    // Without their vendor's name, guests would read other leaves in the wrong way.
    let (before, after) =
        (guest(1, "leaf=0").run(), guest(1, "leaf=0").option("--cpu", option).run());
    let vendor = |outcome: &Outcome| seen(outcome, 1)[0].leaf(0, 0);
    assert_eq!(vendor(&before), vendor(&after));
}

#[test]
fn a_template_that_the_host_cannot_have_is_refused() {
    for (text, words) in [
        (
            r#"{ "cpuid_modifiers": [
                { "leaf": "0x77", "subleaf": "0x3", "flags": 0, "modifiers": [] }] }"#,
            ["cpuid_modifiers", "leaf 0x77", "subleaf 0x3"],
        ),
        (
            r#"{ "msr_modifiers": [{ "addr": "0x12345", "bitmap": "0b1" }] }"#,
            ["msr_modifiers", "KVM_GET_MSRS", "0x12345"],
        ),
        // Memory types of 7 there are none of.
        (
            r#"{ "msr_modifiers": [{ "addr": "0x250", "bitmap": "0b111" }] }"#,
            ["msr_modifiers", "KVM_SET_MSRS", "0x250"],
        ),
        (r#"{ "kvm_capabilities": ["!0", "999999"] }"#, ["KVM", "999999", "missing"]),
    ] {
        let (_folder, option) = template(text);
        Guest::new("hello").option("--cpu", option).run().failed(&words);
    }
    let (_folder, option) = template(r#"{ "kvm_capabilities": ["0", "!1", "!999999"] }"#);
    let outcome = Guest::new("hello").option("--cpu", option).run();
    assert!(outcome.ok().contains("hello"));
}

#[test]
fn a_file_that_is_no_template_is_misuse() {
    let (_folder, option) =
        template("{\n  \"msr_modifiers\": [{ \"addr\": \"0x1\", \"bitmap\": \"0b3\" }]\n}");
    let refused = Guest::new("hello").option("--cpu", option).run();
    refused.misused(&["cpu.config", "template.json", "'3'", "line 2"]);
    let refused = Guest::new("hello").option("--cpu", "config=/nowhere").run();
    refused.misused(&["cpu.config", "/nowhere", "No such file"]);
    let refused = Guest::new("hello").option("--cpu", "config=a,template=T2").run();
    refused.misused(&["cpu.config", "together with cpu.template"]);
    let refused = Guest::new("hello").option("--cpu", "template=T3").run();
    refused.misused(&["template", "T3", "T2CL"]);
}

#[test]
fn the_console_does_not_go_into_the_template() {
    let (folder, option) = template("{}");
    let path = folder.path().join("template.json");
    let guest = Guest::new("hello").console(format!("file={}", path.display()));
    guest.option("--cpu", option).run().refused(&["template.json"]);
    assert_eq!(fs::read_to_string(path).unwrap(), "{}");
}

#[test]
fn a_static_template_is_used_where_it_fits() {
    let outcome = guest(1, "leaf=0").run();
    let host = seen(&outcome, 1);
    let (amd, signature) = (is_amd(&host[0]), host[0].leaf(1, 0)[0]);
    for (template, of_amd, shown, hosts) in [
        ("C3", false, 0x306E4, &[0x50654, 0x50657, 0x606A6][..]),
        ("T2", false, 0x306F2, &[0x50654, 0x50657, 0x606A6]),
        ("T2S", false, 0x306F2, &[0x50654, 0x50657]),
        ("T2CL", false, 0x306F2, &[0x50657, 0x606A6]),
        ("T2A", true, 0x306F2, &[0xA00F11]),
    ] {
        let outcome = guest(1, "").option("--cpu", format!("template={template}")).run();
        if amd != of_amd {
            let vendor = if of_amd { "AuthenticAMD" } else { "GenuineIntel" };
            outcome.failed(&["CPU template", template, vendor]);
        } else if !hosts.contains(&signature) {
            outcome.failed(&["CPU template", template, &format!("signature {signature:#x}")]);
        } else {
            assert_eq!(seen(&outcome, 1)[0].leaf(1, 0)[0], shown, "{template}");
        }
    }
}
