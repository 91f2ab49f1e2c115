//! Writes the ACPI tables of a machine with everything into a directory, for inspection:
//!
//! ```text
//! cargo run -p arch --example acpi_tables -- DIR [CPUS]
//! iasl -d DIR/*.aml
//! ```

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use arch::acpi::{self, AcpiConfig};
use arch::layout::VirtioSlot;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args().skip(1);
    let directory = PathBuf::from(arguments.next().ok_or("usage: acpi_tables DIR [CPUS]")?);
    let cpus = arguments.next().map_or(Ok(2), |cpus| cpus.parse())?;
    let config = AcpiConfig {
        cpus,
        virtio: (0..).map_while(VirtioSlot::new).collect(),
        serial: true,
        i8042: true,
        vmgenid: true,
        vmclock: true,
    };
    fs::create_dir_all(&directory)?;
    for table in acpi::build(&config)?.tables {
        let name = String::from_utf8_lossy(&table.signature).trim().to_lowercase();
        let path = directory.join(format!("{name}.aml"));
        println!("{:#x} {:5} bytes  {}", table.address, table.bytes.len(), path.display());
        fs::write(path, table.bytes)?;
    }
    Ok(())
}
