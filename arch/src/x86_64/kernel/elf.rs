//! ELF64 images: segments, entry points, the PVH note.
//!
//! Follows the System V ABI ("gABI" chapters 4 and 5) and, for the note, Xen's
//! `public/elfnote.h`.

use std::io::{Read, Seek};

use super::super::layout::HIGH_RAM_START;
use super::{Fields, KernelError, Source};

pub(super) const MAGIC: [u8; 4] = *b"\x7FELF";

const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u16 = 56;
/// More program headers than any kernel has; bounds what is read.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More notes than any kernel has, in bytes; bounds what is read.
const MAX_NOTE_SIZE: u64 = 256 << 10;
/// No kernel is larger in memory; keeps sums of addresses far from overflow.
const MAX_ADDRESS: u64 = 1 << 46;

const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const DATA_LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

const XEN_NOTE_NAME: &[u8] = b"Xen\0";
/// The name of the guest's system.
const XEN_ELFNOTE_GUEST_OS: u32 = 6;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// The name of Linux's own notes (`include/linux/elfnote.h`), with its NUL.
const LINUX_NOTE_NAME: &[u8] = b"Linux\0";

/// Names for the machines that Linux runs on.
const MACHINES: &[(u16, &str)] = &[
    (2, "sparc"),
    (8, "mips"),
    (20, "32-bit powerpc"),
    (21, "powerpc64"),
    (22, "s390x"),
    (40, "32-bit arm"),
    (43, "sparc64"),
    (183, "aarch64"),
    (243, "riscv"),
    (258, "loongarch64"),
];

/// A part of an ELF file that goes into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes start in the file.
    pub file_offset: u64,
    /// How many bytes the file has of it; at most `mem_size`.
    pub file_size: u64,
    /// How many bytes it has in memory; those beyond `file_size` are zero.
    pub mem_size: u64,
    /// Its guest-physical address, 1 MiB at least.
    pub gpa: u64,
    /// Whether the image wants to write to it (PF_W).
    pub writable: bool,
}

impl Segment {
    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.gpa + self.mem_size
    }
}

/// An ELF kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElfKernel {
    /// What to load: at least one, none empty, ascending by address, without overlaps.
    pub segments: Vec<Segment>,
    /// Guest-physical address of the 64-bit entry. It lies in the file's part of a segment.
    pub entry: u64,
    /// Guest-physical address of the 32-bit PVH entry, of images that have one.
    pub pvh_entry: Option<u64>,
    /// It says of itself that it is Linux, by a note named "Linux" (since 4.19) or by Xen's note of
    /// the guest's system.
    pub is_linux: bool,
}

impl ElfKernel {
    /// The lowest address it occupies.
    pub fn start(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.gpa)
    }

    /// The first address behind all its segments.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, Segment::end)
    }
}

/// A program header, as it is.
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

impl ProgramHeader {
    /// Whether it describes something that goes into memory.
    fn is_loaded(&self) -> bool {
        self.kind == PT_LOAD && self.mem_size > 0
    }

    fn new(bytes: &[u8]) -> Self {
        Self {
            kind: bytes.u32_at(0),
            flags: bytes.u32_at(4),
            offset: bytes.u64_at(8),
            vaddr: bytes.u64_at(16),
            paddr: bytes.u64_at(24),
            file_size: bytes.u64_at(32),
            mem_size: bytes.u64_at(40),
            align: bytes.u64_at(48),
        }
    }
}

/// Reads the headers of an ELF file, whose magic the caller has seen.
pub(super) fn parse<R: Read + Seek>(source: &mut Source<'_, R>) -> Result<ElfKernel, KernelError> {
    let header = source.read(0, source.length.min(HEADER_SIZE), "the ELF header")?;
    check_machine(&header)?;
    source.check(0, HEADER_SIZE, "the ELF header")?;

    let entry = header.u64_at(24);
    let table_offset = header.u64_at(32);
    let entry_size = header.u16_at(54);
    let count = header.u16_at(56);
    if entry_size != PROGRAM_HEADER_SIZE {
        return Err(KernelError::Malformed(format!(
            "its ELF program headers have {entry_size} bytes, not {PROGRAM_HEADER_SIZE}"
        )));
    }
    if count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(KernelError::Malformed(format!("it has {count} ELF program headers")));
    }
    let table_size = u64::from(count) * u64::from(PROGRAM_HEADER_SIZE);
    let table = source.read(table_offset, table_size, "the ELF program headers")?;
    let headers: Vec<_> =
        table.chunks_exact(PROGRAM_HEADER_SIZE.into()).map(ProgramHeader::new).collect();
    if headers.iter().any(|header| header.kind == PT_INTERP) {
        return Err(KernelError::NotAKernel {
            looks_like: "a dynamically linked program".to_owned(),
        });
    }

    let segments = segments(source, &headers)?;
    let entry = physical_entry(entry, &headers)?;
    let Notes { pvh_entry, is_linux } = notes(source, &headers)?;
    if let Some(pvh) = pvh_entry
        && !in_file_part(pvh, &segments)
    {
        return Err(KernelError::Malformed(format!(
            "its PVH entry point {pvh:#x} lies in none of its segments"
        )));
    }
    Ok(ElfKernel { segments, entry, pvh_entry, is_linux })
}

/// Class, byte order, machine and type. Reads the first 20 bytes only, so that a file for another
/// machine is named as such even if it is cut off.
fn check_machine(header: &[u8]) -> Result<(), KernelError> {
    const IDENTIFICATION: u64 = 20;
    if (header.len() as u64) < IDENTIFICATION {
        return Err(KernelError::Truncated {
            what: "the ELF header",
            need: HEADER_SIZE,
            have: header.len() as u64,
        });
    }
    let class = header.u8_at(4);
    let big_endian = header.u8_at(5) != DATA_LITTLE_ENDIAN;
    let number = |offset| {
        let bytes: [u8; 2] = header.array(offset);
        if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    };
    let machine = number(18);
    let arch = match (class, machine) {
        (CLASS_64, MACHINE_X86_64) if !big_endian => None,
        (CLASS_32, MACHINE_386 | MACHINE_X86_64) => Some("32-bit x86".to_owned()),
        (CLASS_32 | CLASS_64, _) => Some(
            MACHINES
                .iter()
                .find(|&&(id, _)| id == machine)
                .map_or_else(|| format!("ELF machine {machine}"), |&(_, name)| name.to_owned()),
        ),
        _ => return Err(KernelError::Malformed(format!("its ELF class is {class}"))),
    };
    if let Some(arch) = arch {
        return Err(KernelError::WrongArchitecture { arch });
    }
    match number(16) {
        TYPE_EXECUTABLE | TYPE_SHARED => Ok(()),
        1 => Err(KernelError::NotAKernel { looks_like: "an object file or kernel module".into() }),
        4 => Err(KernelError::NotAKernel { looks_like: "a core dump".into() }),
        other => Err(KernelError::Malformed(format!("its ELF type is {other}"))),
    }
}

/// The segments to load, checked and sorted.
fn segments<R: Read + Seek>(
    source: &Source<'_, R>,
    headers: &[ProgramHeader],
) -> Result<Vec<Segment>, KernelError> {
    let mut segments = Vec::new();
    for header in headers.iter().filter(|h| h.is_loaded()) {
        let malformed = |what: &str| {
            KernelError::Malformed(format!("its segment at {:#x} {what}", header.paddr))
        };
        if header.file_size > header.mem_size {
            return Err(malformed("is larger in the file than in memory"));
        }
        if header.paddr < HIGH_RAM_START {
            return Err(malformed("lies below 1 MiB"));
        }
        if header.paddr.checked_add(header.mem_size).is_none_or(|end| end > MAX_ADDRESS) {
            return Err(malformed("ends beyond any memory"));
        }
        source.check(header.offset, header.file_size, "a segment")?;
        segments.push(Segment {
            file_offset: header.offset,
            file_size: header.file_size,
            mem_size: header.mem_size,
            gpa: header.paddr,
            writable: header.flags & 2 != 0,
        });
    }
    if segments.is_empty() {
        return Err(KernelError::Malformed("it has nothing to load".to_owned()));
    }
    segments.sort_by_key(|segment| segment.gpa);
    for pair in segments.windows(2) {
        if let [a, b] = pair
            && a.end() > b.gpa
        {
            return Err(KernelError::Malformed(format!(
                "its segments {:#x}..{:#x} and {:#x}..{:#x} overlap",
                a.gpa,
                a.end(),
                b.gpa,
                b.end()
            )));
        }
    }
    Ok(segments)
}

/// Whether `address` is one whose byte comes from the file.
fn in_file_part(address: u64, segments: &[Segment]) -> bool {
    segments.iter().any(|s| address >= s.gpa && address - s.gpa < s.file_size)
}

/// The entry point as a physical address. Linux writes it as one; other images are linked with a
/// virtual one, which is translated by the segment it lies in. [`segments`] has accepted
/// `headers`, so that no address inside a segment overflows.
fn physical_entry(entry: u64, headers: &[ProgramHeader]) -> Result<u64, KernelError> {
    let offset_in = |base: fn(&ProgramHeader) -> u64| {
        headers.iter().filter(|h| h.is_loaded()).find_map(|header| {
            let offset = entry.checked_sub(base(header))?;
            (offset < header.file_size).then(|| header.paddr + offset)
        })
    };
    offset_in(|h| h.paddr).or_else(|| offset_in(|h| h.vaddr)).ok_or_else(|| {
        KernelError::Malformed(format!("its entry point {entry:#x} lies in none of its segments"))
    })
}

/// What the ELF notes say.
#[derive(Default)]
struct Notes {
    pvh_entry: Option<u64>,
    is_linux: bool,
}

/// Reads the notes that matter of all note segments.
fn notes<R: Read + Seek>(
    source: &mut Source<'_, R>,
    headers: &[ProgramHeader],
) -> Result<Notes, KernelError> {
    let mut found = Notes::default();
    for header in headers.iter().filter(|h| h.kind == PT_NOTE) {
        if header.file_size > MAX_NOTE_SIZE {
            return Err(KernelError::TooLarge { what: "its ELF notes", size: header.file_size });
        }
        let bytes = source.read(header.offset, header.file_size, "the ELF notes")?;
        let align = if header.align == 8 { 8 } else { 4 };
        // A note that runs over its end ends the search: notes are optional, and other tools
        // ignore broken ones as well.
        let _ = found.collect(&bytes, align);
    }
    Ok(found)
}

impl Notes {
    /// Goes through one note segment. `None` if it ends in the middle of a note.
    fn collect(&mut self, mut notes: &[u8], align: usize) -> Option<()> {
        const NOTE_HEADER: usize = 12;
        while notes.len() >= NOTE_HEADER {
            let name_size = usize::try_from(notes.u32_at(0)).ok()?;
            let desc_size = usize::try_from(notes.u32_at(4)).ok()?;
            let kind = notes.u32_at(8);
            let desc_start = NOTE_HEADER.checked_add(name_size)?.checked_next_multiple_of(align)?;
            let desc_end = desc_start.checked_add(desc_size)?;
            let name = notes.get(NOTE_HEADER..NOTE_HEADER + name_size)?;
            let desc = notes.get(desc_start..desc_end)?;
            match (name, kind, desc_size) {
                (XEN_NOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY, 4) => {
                    self.pvh_entry.get_or_insert(desc.u32_at(0).into());
                }
                // 64-bit kernels store a pointer; the entry is 32-bit code all the same.
                (XEN_NOTE_NAME, XEN_ELFNOTE_PHYS32_ENTRY, 8) => {
                    self.pvh_entry.get_or_insert(desc.u64_at(0));
                }
                (XEN_NOTE_NAME, XEN_ELFNOTE_GUEST_OS, _) => {
                    self.is_linux |= desc.starts_with(b"linux");
                }
                (LINUX_NOTE_NAME, ..) => self.is_linux = true,
                _ => {}
            }
            let next = desc_end.checked_next_multiple_of(align)?;
            notes = notes.get(next..)?;
        }
        Some(())
    }
}
