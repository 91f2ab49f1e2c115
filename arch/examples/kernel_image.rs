//! Prints what Hull makes of a kernel image, and unpacks a bzImage:
//!
//! ```text
//! cargo run --release -p arch --example kernel_image -- FILE [UNPACKED]
//! ```

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::time::Instant;

use arch::kernel::{ElfKernel, KernelImage};

fn main() {
    if let Err(error) = run() {
        let mut cause: Option<&dyn Error> = Some(&*error);
        while let Some(error) = cause {
            eprintln!("{error}");
            cause = error.source();
        }
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1);
    let path = arguments.next().ok_or("usage: kernel_image FILE [UNPACKED]")?;
    let mut file = File::open(path)?;
    match KernelImage::parse(&mut file)? {
        KernelImage::Elf(elf) => print(&elf),
        KernelImage::BzImage(image) => {
            println!(
                "bzImage: load {:#x}, entry {:#x}, init_size {:#x}, command line {}, initrd up to {:#x}",
                image.load_address,
                image.entry(),
                image.init_size,
                image.cmdline_max,
                image.initrd_addr_max
            );
            let start = Instant::now();
            let (unpacked, elf) = image.unpack(&mut file)?;
            println!("unpacked {} bytes in {:.0?}", unpacked.len(), start.elapsed());
            print(&elf);
            if let Some(path) = arguments.next() {
                fs::write(path, unpacked)?;
            }
        }
    }
    Ok(())
}

fn print(elf: &ElfKernel) {
    println!("ELF: entry {:#x}, PVH entry {:x?}", elf.entry, elf.pvh_entry);
    for segment in &elf.segments {
        println!(
            "  {:#x}..{:#x}  file {:#x}+{:#x}{}",
            segment.gpa,
            segment.end(),
            segment.file_offset,
            segment.file_size,
            if segment.writable { "  writable" } else { "" }
        );
    }
}
