//! Hosts that lack something, or have less of it than a machine wants: what Hull says then, and what
//! `hull doctor` makes of them.

use machine_tests::{Guest, NOBODY, Outcome, PAYLOAD, Surroundings};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use testnet::{NAME, in_namespace};

const KVM: &str = "/dev/kvm";
const TUN: &str = "/dev/net/tun";

/// A folder that everybody may look into, on a real file system.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    folder
}

/// The payload where every user finds it.
fn payload(folder: &Path) -> PathBuf {
    let path = folder.join("payload");
    fs::copy(&*PAYLOAD, &path).unwrap();
    path
}

fn guest(kernel: &Path) -> Guest {
    Guest::bare()
        .option("--kernel", kernel)
        .option("--memory", "64M")
        .option("--cmdline", "payload=hello")
}

/// A host where anybody may have machines, and a user who is not root.
fn anybody() -> Surroundings {
    Surroundings::new().bare_devices().device(KVM, 0o666).user(NOBODY)
}

#[test]
fn no_kvm() {
    let outcome = Guest::new("hello").on(Surroundings::new().bare_devices()).run();
    outcome.failed(&[
        "hull: cannot use KVM\n",
        "No such file or directory",
        "hint: load KVM with `modprobe kvm_intel` or `modprobe kvm_amd`",
    ]);
    assert_eq!(outcome.stdout, "");
    let with = Surroundings::new().bare_devices().device(KVM, 0o600);
    assert_eq!(Guest::new("hello").on(with).run().ok(), "hello\n");
}

#[test]
fn no_permission_to_use_kvm() {
    let folder = folder();
    let guest = || guest(&payload(folder.path())).option("--name", "nobodys");
    let host = |mode| Surroundings::new().bare_devices().device(KVM, mode).user(NOBODY);
    // Enough to look at it is not enough.
    for mode in [0o600, 0o644] {
        let outcome = guest().on(host(mode)).run();
        outcome.failed(&[
            "hull: cannot use KVM\n",
            "Permission denied",
            "hint: /dev/kvm is root's alone: run as root, or have root give it to a group",
        ]);
        assert_eq!(outcome.stdout, "");
    }
    // A group that nobody is in, and has no name here.
    let devices = || Surroundings::new().bare_devices().device_of_group(KVM, 0o660, 4_000_000_000);
    let outcome = guest().on(devices().user(NOBODY)).run();
    outcome.failed(&[
        "hull: cannot use KVM\n",
        "Permission denied",
        "hint: join the group that may use KVM (`usermod -aG 4000000000 $USER`, then log in again)",
    ]);
    // Root may, but not where the device is kept from everybody.
    assert_eq!(guest().on(devices()).run().ok(), "hello\n");
    let outcome = guest().on(devices().devices_of_no_use()).run();
    outcome.failed(&[
        "hull: cannot use KVM\n",
        "Permission denied",
        "hint: root is refused too: let this container or service have /dev/kvm\n",
    ]);
    assert_eq!(guest().on(anybody()).run().ok(), "hello\n");
}

/// The payload with a note that makes it say of itself what Linux does; it still is the payload.
fn linux(folder: &Path) -> PathBuf {
    let mut bytes = fs::read(&*PAYLOAD).unwrap();
    let note = |name: u32, length: u32, kind: u32, rest: &[u8]| {
        let words = [name, length, kind].map(u32::to_le_bytes).concat();
        [&words, rest].concat()
    };
    let pvh = note(4, 4, 18, b"Xen\0");
    let linux = note(6, 0, 0x101, b"Linux\0\0\0");
    let at = bytes.windows(pvh.len()).position(|some| some == pvh).unwrap();
    bytes[at..at + linux.len()].copy_from_slice(&linux);
    let path = folder.join("vmlinux");
    fs::write(&path, bytes).unwrap();
    path
}

/// As much of a bzImage as it takes to be one (Linux boot protocol 2.15); nothing in it runs.
fn bzimage(folder: &Path) -> PathBuf {
    let mut bytes = vec![0; 64 << 10];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0x1f1, &[3]); // setup_sects, after the boot sector
    put(0x1f4, &0xe00_u32.to_le_bytes()); // syssize: the rest, in units of 16 bytes
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]); // the jump that says where the header ends
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes());
    put(0x211, &[1]); // loadflags: loaded high
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: a 64-bit entry
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x248, &0x1000_u32.to_le_bytes()); // payload_offset
    put(0x24c, &0x1000_u32.to_le_bytes()); // payload_length
    put(0x258, &0x100_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x100_0000_u32.to_le_bytes()); // init_size
    let path = folder.join("vmlinuz");
    fs::write(&path, bytes).unwrap();
    path
}

const NO_HARDWARE: &str = "cannot run on this host: its KVM has no hardware behind it (PVM), and a kernel not built for \
     that stops before its first message";

#[test]
fn stock_kernels_on_pvm() {
    let folder = folder();
    let (vmlinux, vmlinuz) = (linux(folder.path()), bzimage(folder.path()));
    let pvm = || Surroundings::new().modules(&["kvm", "kvm_pvm"]);
    let hardware = || Surroundings::new().modules(&["kvm", "kvm_amd"]);
    for kernel in [&vmlinux, &vmlinuz] {
        let outcome = guest(kernel).on(pvm()).run();
        outcome.failed(&[
            NO_HARDWARE,
            "hint: use a machine with hardware virtualisation, or a kernel built with \
             CONFIG_PVM_GUEST; --force starts it all the same",
        ]);
        assert_eq!(outcome.stdout, "");
    }
    assert_eq!(guest(&vmlinux).flag("--force").on(pvm()).run().ok(), "hello\n");
    // Other kernels are nobody's business.
    assert_eq!(guest(&PAYLOAD).on(pvm()).run().ok(), "hello\n");
    // Nor is any, where there is hardware.
    assert_eq!(guest(&vmlinux).on(hardware()).run().ok(), "hello\n");
    let outcome = guest(&vmlinuz).option("--boot", "pvh").on(hardware()).run();
    outcome.failed(&["cannot use the kernel", "no known compression"]);
    assert!(!outcome.stderr.contains("PVM"), "{}", outcome.stderr);
    // And this host as it is.
    let outcome = guest(&vmlinux).run();
    if Path::new("/sys/module/kvm_pvm").exists() {
        outcome.failed(&[NO_HARDWARE]);
    } else {
        assert_eq!(outcome.ok(), "hello\n");
    }
}

#[test]
fn a_modular_kernel_with_a_root_disk() {
    let folder = folder();
    let kernel = linux(folder.path());
    let disk = folder.path().join("root.img");
    fs::write(&disk, [0; 512]).unwrap();
    let host = || Surroundings::new().modules(&["kvm", "kvm_amd"]);
    let with = |options: &str| guest(&kernel).disk(&disk, options);
    let missing = |driver: &str| {
        let outcome = with(",root").on(host()).run();
        outcome.failed(&[
            &format!("has no built-in {driver} driver, and there is no initrd to load it from"),
            "hint: add an --initrd that loads the virtio modules, or use a kernel that has them \
             built in; --force starts it all the same",
        ]);
        assert_eq!(outcome.stdout, "");
    };
    missing("virtio_blk");
    // Nothing is wrong with a disk that is not the root, with force, or with an initrd.
    assert_eq!(with("").on(host()).run().ok(), "hello\n");
    assert_eq!(with(",root").flag("--force").on(host()).run().ok(), "hello\n");
    let initrd = folder.path().join("initrd");
    fs::write(&initrd, "modules").unwrap();
    assert_eq!(with(",root").option("--initrd", &initrd).on(host()).run().ok(), "hello\n");
    // Nor with both drivers; the payload knows of virtio_mmio by itself.
    let mut bytes = fs::read(&kernel).unwrap();
    bytes.extend(b"virtio_blk");
    fs::write(&kernel, &bytes).unwrap();
    assert_eq!(with(",root").on(host()).run().ok(), "hello\n");
    while let Some(at) = bytes.windows(11).position(|some| some == b"virtio_mmio") {
        bytes[at] = b'V';
    }
    fs::write(&kernel, &bytes).unwrap();
    missing("virtio_mmio");
}

#[test]
fn memory_beyond_the_limit_of_address_space() {
    let run = |memory: &str| {
        Guest::bare()
            .option("--kernel", &*PAYLOAD)
            .option("--cmdline", "payload=hello")
            .option("--memory", memory)
            .on(Surroundings::new().limit(libc::RLIMIT_AS, 1 << 30))
            .run()
    };
    let outcome = run("2G");
    outcome.failed(&[
        "hull: cannot set up the guest's memory\n",
        "cannot map 2147483648 bytes of guest memory at 0x0",
        "Cannot allocate memory",
        "hint: use less --memory, or look at `ulimit -v` and overcommit settings",
    ]);
    assert_eq!(outcome.stdout, "");
    assert_eq!(run("128M").ok(), "hello\n");
}

#[test]
fn more_memory_than_the_host_has() {
    const WARNING: &str = "the guest has more memory than the host";
    // SAFETY: no memory arguments.
    let (pages, page) =
        unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let host = (pages * page) as u64;
    let run = |gib: u64| {
        let outcome = Guest::bare()
            .option("--kernel", &*PAYLOAD)
            .option("--cmdline", "payload=hello")
            .option("--memory", format!("{gib}G"))
            .run();
        assert_eq!(outcome.ok(), "hello\n");
        outcome.stderr
    };
    let said = run((host >> 30) + 1);
    assert!(said.contains("WARN") && said.contains(WARNING), "{said}");
    assert!(said.contains(&format!("host_mib={}", host >> 20)), "{said}");
    if host >= 1 << 30 {
        let said = run(1);
        assert!(!said.contains(WARNING), "{said}");
    }
}

#[test]
fn a_disk_that_may_only_be_read() {
    let folder = folder();
    let disks = folder.path().join("disks");
    fs::create_dir(&disks).unwrap();
    let disk = disks.join("disk.img");
    fs::write(&disk, [7; 4096]).unwrap();
    let kernel = payload(folder.path());
    let hosts: [(&str, &dyn Fn() -> Surroundings); 2] = [
        ("Permission denied", &anybody),
        ("Read-only file system", &|| Surroundings::new().read_only(&disks)),
    ];
    for (reason, host) in hosts {
        let outcome = guest(&kernel).disk(&disk, "").on(host()).run();
        outcome.failed(&[
            "cannot set up disk0",
            "disk.img for reading and writing",
            reason,
            "hint: add ,ro to the disk if the guest only reads it",
        ]);
        assert_eq!(outcome.stdout, "");
        assert_eq!(guest(&kernel).disk(&disk, ",ro").on(host()).run().ok(), "hello\n");
    }
    assert_eq!(fs::read(&disk).unwrap(), [7; 4096]);
}

/// Makes root the owner of the namespace's interface, which without one is anybody's.
fn give_tap_to_root() {
    /// `_IOW('T', 202, int)` and `_IOW('T', 204, int)`, linux/if_tun.h.
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    const TUNSETOWNER: libc::Ioctl = 0x4004_54cc;
    let tun = fs::File::options().read(true).write(true).open(TUN).unwrap();
    // SAFETY: all zeroes is a value of this plain structure, which outlives its call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (target, byte) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *target = byte as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        assert_eq!(libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw const request), 0);
        assert_eq!(libc::ioctl(tun.as_raw_fd(), TUNSETOWNER, 0), 0);
    }
}

#[test]
fn taps_that_are_not_for_this_user() {
    let folder = folder();
    let kernel = payload(folder.path());
    let run = |net: &str, host: Surroundings| guest(&kernel).option("--net", net).on(host).run();
    let outcome = in_namespace(false, || {
        let named = format!("tap={NAME}");
        give_tap_to_root();
        let outcome = run(&named, anybody().device(TUN, 0o666));
        outcome.failed(&[
            "cannot set up net0",
            &format!("no permission to use TAP interface {NAME}"),
            "hint: run as root, or make an interface for this user beforehand",
        ]);
        // One of its own is not for this user either.
        let outcome = run("tap", anybody().device(TUN, 0o666));
        outcome.failed(&["cannot set up net0", "no permission", "hint: run as root"]);
        // Without the device that makes them, nobody has any.
        for net in [&named, "tap"] {
            let outcome = run(net, Surroundings::new().bare_devices().device(KVM, 0o600));
            outcome.failed(&[
                "cannot open /dev/net/tun",
                "No such file or directory",
                "hint: load the driver with `modprobe tun`",
            ]);
            let outcome = run(net, anybody().device(TUN, 0o600));
            outcome.failed(&["cannot open /dev/net/tun", "Permission denied"]);
        }
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

/// What the doctor says about one thing: its verdict and what it found, and the advice below.
fn check<'a>(outcome: &'a Outcome, name: &str) -> (&'a str, &'a str, &'a str) {
    assert_eq!(outcome.stderr, "");
    let mut lines = outcome.stdout.lines();
    let found = lines.find_map(|line| {
        let (verdict, rest) = line.split_once("  ")?;
        Some((verdict, rest.trim_start().strip_prefix(name)?.trim_start()))
    });
    let Some((verdict, found)) = found else { panic!("no {name} in: {}", outcome.stdout) };
    let advice = lines.next().and_then(|line| line.trim_start().strip_prefix("-> "));
    (verdict, found, advice.unwrap_or_default())
}

fn doctor(host: Surroundings) -> Outcome {
    let outcome = Guest::hull("doctor").on(host).run();
    // Its code is the worst of its verdicts.
    let failed = outcome.stdout.lines().any(|line| line.starts_with("FAIL"));
    assert_eq!(outcome.code(), i32::from(failed), "{}", outcome.stdout);
    outcome
}

#[test]
fn doctor_misses_devices() {
    let outcome = doctor(Surroundings::new().bare_devices());
    let (verdict, found, advice) = check(&outcome, KVM);
    assert_eq!((verdict, found), ("FAIL", "is missing"));
    assert!(advice.contains("`modprobe kvm_intel` or `modprobe kvm_amd`"), "{advice}");
    let (verdict, _, advice) = check(&outcome, "KVM capabilities");
    assert_eq!((verdict, advice), ("FAIL", "mend what stands above, or use a newer kernel"));
    let (verdict, found, advice) = check(&outcome, "network (TAP)");
    assert_eq!(verdict, "warn");
    assert!(found.starts_with("/dev/net/tun cannot be opened: No such file"), "{found}");
    assert!(advice.contains("`modprobe tun`"), "{advice}");
    let json = Guest::hull("doctor").flag("--json").on(Surroundings::new().bare_devices()).run();
    assert_eq!(json.code(), 1);
    let entry =
        "\"name\": \"/dev/kvm\",\n    \"verdict\": \"fail\",\n    \"found\": \"is missing\",";
    assert!(json.stdout.contains(entry), "{}", json.stdout);
}

#[test]
fn doctor_finds_what_there_is() {
    let host = Surroundings::new().bare_devices().device(KVM, 0o600).device(TUN, 0o600);
    let outcome = doctor(host);
    assert_eq!(check(&outcome, KVM), ("ok", "can be opened", ""));
    let (verdict, found, _) = check(&outcome, "KVM capabilities");
    assert_eq!(verdict, "ok");
    assert!(found.starts_with("a machine can be made, with up to "), "{found}");
    assert_eq!(check(&outcome, "network (TAP)"), ("ok", "interfaces can be made", ""));
}

#[test]
fn doctor_for_a_user_without_rights() {
    let host = |mode| {
        let devices = Surroundings::new().bare_devices();
        devices.device(KVM, mode).device(TUN, mode).user(NOBODY)
    };
    let outcome = doctor(host(0o600));
    let (verdict, found, advice) = check(&outcome, KVM);
    assert_eq!((verdict, found), ("FAIL", "may not be opened by this user"));
    assert!(advice.contains("chgrp kvm /dev/kvm"), "{advice}");
    let (verdict, found, advice) = check(&outcome, "network (TAP)");
    assert_eq!((verdict, found), ("warn", "/dev/net/tun may not be opened by this user"));
    assert!(advice.contains("`chmod 0666 /dev/net/tun`"), "{advice}");
    let outcome = doctor(host(0o666));
    assert_eq!(check(&outcome, KVM).0, "ok");
    let (verdict, found, advice) = check(&outcome, "network (TAP)");
    assert_eq!((verdict, found), ("warn", "this user may not make TAP interfaces"));
    assert!(advice.contains("ip tuntap add NAME mode tap user $USER"), "{advice}");
}

#[test]
fn doctor_tells_kinds_of_kvm_apart() {
    for (module, verdict, found) in [
        ("kvm_intel", "ok", "Intel VT-x (vmx)"),
        ("kvm_amd", "ok", "AMD-V (svm)"),
        ("kvm_pvm", "FAIL", "PVM: guest kernel code is interpreted, stock kernels do not boot"),
        ("ext4", "warn", "no KVM module is loaded (it may be built in)"),
    ] {
        let outcome = doctor(Surroundings::new().modules(&[module]));
        let (said, what, advice) = check(&outcome, "KVM  ");
        assert_eq!((said, what), (verdict, found), "{module}");
        assert_eq!(advice.is_empty(), verdict == "ok", "{module}: {advice}");
    }
}

#[test]
fn doctor_looks_at_limits() {
    let outcome = doctor(Surroundings::new().limit(libc::RLIMIT_NOFILE, 256));
    assert_eq!(check(&outcome, "limits"), ("warn", "256 open files", "`ulimit -n 512`"));
    let roomy = || Surroundings::new().limit(libc::RLIMIT_NOFILE, 1024);
    let outcome = doctor(roomy().limit(libc::RLIMIT_AS, 4 << 30));
    let expected = ("warn", "4096 MiB of address space", "`ulimit -v unlimited`");
    assert_eq!(check(&outcome, "limits"), expected);
    let outcome = doctor(roomy().limit(libc::RLIMIT_AS, libc::RLIM_INFINITY));
    let expected = ("ok", "1024 open files, no limit on address space", "");
    assert_eq!(check(&outcome, "limits"), expected);
}
