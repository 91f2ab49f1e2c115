//! Any file as a kernel. The first byte chooses what stands in front, so that files which nearly are
//! kernels do not have to be found by chance.
#![no_main]

use std::io::Cursor;

use arch::kernel::KernelImage;
use libfuzzer_sys::fuzz_target;

/// The start of an ELF file of this architecture, as far as it is always the same.
const ELF: &[u8] = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0";

/// The start of a bzImage: one setup sector, protocol 2.15, a 64-bit entry.
fn setup() -> Vec<u8> {
    let mut head = vec![0; 0x400];
    head[0x1f1] = 1;
    head[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    head[0x201] = 0x66;
    head[0x202..0x206].copy_from_slice(b"HdrS");
    head[0x206..0x208].copy_from_slice(&[0x0f, 0x02]);
    head[0x211] = 1;
    head[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    head[0x236] = 1;
    // Room for what is unpacked, and a payload behind the setup.
    head[0x248..0x24c].copy_from_slice(&0x100u32.to_le_bytes());
    head[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    head
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let file = match choice & 3 {
        0 => data.to_vec(),
        1 => [ELF, data].concat(),
        _ => {
            let mut file = setup();
            // Some bytes change the header, the others follow it.
            let (patches, rest) = data.split_at(data.len().min(usize::from(choice >> 2)) / 3 * 3);
            for patch in patches.chunks_exact(3) {
                let at = 0x1f1 + usize::from(u16::from_le_bytes([patch[0], patch[1]])) % 0x7f;
                file[at] = patch[2];
            }
            file.resize(file.len() + 0x100, 0);
            file.extend(rest);
            if choice & 1 != 0 {
                file[0x24c..0x250].copy_from_slice(&(rest.len() as u32).to_le_bytes());
            }
            file
        }
    };
    let length = file.len() as u64;
    match KernelImage::parse_bytes(&file) {
        Ok(KernelImage::Elf(elf)) => {
            for segment in &elf.segments {
                assert!(segment.file_size <= segment.mem_size);
                assert!(segment.file_offset + segment.file_size <= length);
            }
            assert!(elf.segments.windows(2).all(|pair| pair[0].end() <= pair[1].gpa));
            assert!(elf.segments.iter().any(|s| (s.gpa..s.end()).contains(&elf.entry)));
        }
        Ok(KernelImage::BzImage(image)) => {
            assert!(image.code_offset + image.code_size <= length);
            // A payload may be as large as it says: not here, where a run has little memory.
            if image.init_size <= 64 << 20
                && let Ok((bytes, _)) = image.unpack(&mut Cursor::new(&file))
            {
                assert!(bytes.len() as u64 <= image.init_size);
            }
        }
        Err(err) => assert!(!err.to_string().is_empty()),
    }
});
