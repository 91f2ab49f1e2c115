//! Names for files that are not x86 kernels, so that the error says what the user passed instead.

use super::{Fields, KernelError};

/// Magic bytes, where they stand, and what a file with them is.
const FORMATS: &[(usize, &[u8], &str)] = &[
    (0, &[0x1F, 0x8B], "a gzip file"),
    (0, b"\xFD7zXZ\0", "an xz file"),
    (0, &[0x28, 0xB5, 0x2F, 0xFD], "a zstd file"),
    (0, &[0x02, 0x21, 0x4C, 0x18], "an lz4 file"),
    (0, &[0x04, 0x22, 0x4D, 0x18], "an lz4 file"),
    (0, b"BZh", "a bzip2 file"),
    (0, b"#!", "a script"),
    (0, b"070701", "an initramfs (cpio archive)"),
    (0, b"070702", "an initramfs (cpio archive)"),
    (0, b"QFI\xFB", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"!<arch>\n", "a package or archive (ar)"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0x438, &[0x53, 0xEF], "an ext2/3/4 file system"),
    (0, &[0x27, 0x05, 0x19, 0x56], "a U-Boot image"),
    (0, &[0xD0, 0x0D, 0xFE, 0xED], "a device tree or FIT image"),
];

/// Magic bytes of other architectures' kernels (Linux, `Documentation/arch/*/booting.rst`).
const KERNELS: &[(usize, &[u8], &str)] = &[
    (0x38, b"ARM\x64", "aarch64"),
    (0x38, b"RSC\x05", "riscv"),
    (0x38, &[0xCD, 0x23, 0x82, 0x81], "loongarch64"),
    (0x24, &[0x18, 0x28, 0x6F, 0x01], "32-bit arm"),
];

/// Machines of COFF headers, for EFI programs.
const COFF_MACHINES: &[(u16, &str)] = &[
    (0x014C, "32-bit x86"),
    (0x01C2, "32-bit arm"),
    (0xAA64, "aarch64"),
    (0x5032, "riscv32"),
    (0x5064, "riscv64"),
    (0x6264, "loongarch64"),
];

/// The machine field of x86-64 in a COFF header.
const COFF_X86_64: u16 = 0x8664;

/// The error for a file that starts with `head` and is neither ELF nor bzImage.
pub(super) fn explain(head: &[u8]) -> KernelError {
    let has = |&&(offset, magic, _): &&(usize, &[u8], &str)| {
        head.get(offset..).is_some_and(|rest| rest.starts_with(magic))
    };
    if let Some(&(_, _, arch)) = KERNELS.iter().find(has) {
        return KernelError::WrongArchitecture { arch: arch.into() };
    }
    if let Some(error) = explain_pe(head) {
        return error;
    }
    if let Some(&(_, _, name)) = FORMATS.iter().find(has) {
        return KernelError::NotAKernel { looks_like: name.into() };
    }
    // A bzImage is known by its setup header; one cut off before it shows the boot sector only.
    if head.len() < 0x268 && head.starts_with(b"MZ") {
        return KernelError::Truncated { what: "the header", need: 0x268, have: head.len() as u64 };
    }
    KernelError::NotAKernel { looks_like: looks_like_content(head).into() }
}

/// Kernels in the shape of an EFI program: other architectures' and "EFI zboot" images.
fn explain_pe(head: &[u8]) -> Option<KernelError> {
    if !head.starts_with(b"MZ") {
        return None;
    }
    let pe = usize::try_from(head.u32_at(0x3C)).ok()?;
    if !head.get(pe..)?.starts_with(b"PE\0\0") {
        return None;
    }
    let machine = head.u16_at(pe.checked_add(4)?);
    if let Some(&(_, arch)) = COFF_MACHINES.iter().find(|&&(number, _)| number == machine) {
        return Some(KernelError::WrongArchitecture { arch: arch.into() });
    }
    let looks_like = match machine {
        COFF_X86_64 => "an EFI program without a Linux kernel's setup header".to_owned(),
        other => format!("an EFI program for machine {other:#06x}"),
    };
    Some(KernelError::NotAKernel { looks_like })
}

/// What can be said of a file without any magic.
fn looks_like_content(head: &[u8]) -> &'static str {
    if head.iter().all(|&byte| byte == 0) {
        "nothing but zeroes"
    } else if head.get(510..512) == Some(&[0x55, 0xAA]) {
        "a disk image with a boot sector"
    } else if std::str::from_utf8(head).is_ok_and(|text| {
        !text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t' | '\x0C'))
    }) {
        "text"
    } else {
        "data of no known format"
    }
}
